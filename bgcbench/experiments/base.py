"""What all runs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bgcbench.experiments.config import RunConfig
from bgcbench.measure.ceilings import Ceilings
from bgcbench.results import Json


class Run(ABC):
    """One run of an experiment; iterate ``run()`` for its updates, each of which has ``save``: whether rows are new.

    config: as it ran. warnings: what the user should know so far. ceilings: the device's, where they are measured.
    """

    config: RunConfig
    warnings: list[str]
    ceilings: Ceilings | None = None

    @property
    @abstractmethod
    def keys(self) -> list[str]:
        """Of the rows of the plan."""

    @property
    @abstractmethod
    def results(self) -> list[Json]:
        """The rows so far: those of the plan in its order, and any others of a resumed file."""

    @abstractmethod
    def run(self) -> Iterator[Any]:
        """Do what is left, and say how it goes."""

    def make_room(self) -> None:  # noqa: B027 - most leave nothing behind
        """See that nothing of an earlier run is in the way; raises OutputError."""

    def take_into(self, document: Json) -> None:
        """Put what is known so far into the result document."""
        document["results"] = self.results
        document["warnings"] = list(dict.fromkeys((*document["warnings"], *self.warnings)))
        if self.ceilings is not None:
            document["ceilings"] = {**asdict(self.ceilings), "matmul_sizes": list(self.ceilings.matmul_sizes)}
