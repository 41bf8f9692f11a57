"""What all runs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.session import Session
from bgcbench.measure import ceilings
from bgcbench.results import Document
from bgcbench.results.rows import Ceilings, Row


class Planned(Protocol):
    """A row of the plan; its key is that of the result."""

    @property
    def key(self) -> str: ...


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Step:
    """What a run is at: ``doing`` for people, ``done`` (0 to 1) where it is known, save: whether rows are new."""

    doing: str
    done: float | None = None
    save: bool = False


class Run(ABC, Generic[RowT]):
    """One run of an experiment; iterate ``run()`` for its updates, each of which has ``save``: whether rows are new.

    config: as it ran. planned: the rows of the plan, in order. known: what is known of any row, by key, at first the
    rows of a resumed file (kept). stop() is asked between the steps of a run. warnings: what the user should know so
    far. ceilings: the device's, where they are measured.
    """

    ceilings: ceilings.Ceilings | None = None

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        planned: Sequence[Planned],
        *,
        kept: Mapping[str, RowT] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.session, self.planned, self.stop = config, session, planned, stop
        self.known = dict(kept or {})
        self.warnings: list[str] = []

    @property
    def keys(self) -> list[str]:
        """Of the rows of the plan."""
        return [row.key for row in self.planned]

    @property
    def results(self) -> list[RowT]:
        """The rows so far: those of the plan in its order, then any others of a resumed file."""
        return [self.known[key] for key in dict.fromkeys((*self.keys, *self.known)) if key in self.known]

    @abstractmethod
    def run(self) -> Iterator[Any]:
        """Do what is left, and say how it goes."""

    def make_room(self) -> None:
        """See that nothing of an earlier run is in the way; raises OutputError."""

    def take_into(self, document: Document) -> None:
        """Put what is known so far into the result document."""
        document.results = tuple(self.results)
        document.warnings = tuple(dict.fromkeys((*document.warnings, *self.warnings)))
        if self.ceilings is not None:
            document.ceilings = msgspec.convert(self.ceilings, Ceilings, from_attributes=True)
