"""What all runs have in common: an open device, what is said on the way, and how they are run and resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
import torch

from bgcbench.deployment.onnx_file import check_packages
from bgcbench.experiments.config import RunConfig
from bgcbench.measure import ceilings, runtime
from bgcbench.measure.device import backend_state, check_combination, resolve_device, tf32_state
from bgcbench.measure.environment import describe_environment
from bgcbench.results import Document, Json
from bgcbench.results.rows import Ceilings, Environment, Row, Settings
from bgcbench.specs import EXPORTERS, RUNTIME

RowT = TypeVar("RowT", bound=Row)


@dataclass
class Session:
    """The device at hand, its ``environment`` for the result file, and what the user should know.

    settings: what the run sets on purpose, to which opening the data adds.
    """

    device: torch.device
    environment: Environment
    settings: Json
    warnings: list[str] = field(default_factory=list)

    @property
    def conditions(self) -> Settings:
        """The settings as the result file has them."""
        return msgspec.convert(self.settings, Settings)


def open_device(
    config: RunConfig, name: str, *, modes: Sequence[str] = ("eager",), layout: str = "nchw", **settings: Any
) -> Session:
    """Find the device ``name`` and describe it; nothing is computed on it yet. settings: others that a run sets.

    Raises DeviceError where the device asked for is not there, UsageError for what it cannot do and for a package that
    a mode needs.
    """
    if RUNTIME in modes:
        check_packages(EXPORTERS[0])
        settings |= {"runtime": f"onnxruntime {runtime.version()}"}
    device, warning = resolve_device(name)
    for mode in modes:
        check_combination(device, config.precision, mode)
    with backend_state(config.precision, config.threads):
        shared = {
            "seed": config.seed,
            "precision": config.precision,
            "layout": layout,
            "tf32": tf32_state(),
            "cudnn_benchmark": True,
        }
        environment = msgspec.convert(describe_environment(device), Environment)
        return Session(device, environment, {**shared, **settings}, [warning] if warning else [])


@dataclass(frozen=True)
class Step:
    """What a run is at: ``doing`` for people, ``done`` (0 to 1) where it is known, save: whether rows are new."""

    doing: str
    done: float | None = None
    save: bool = False


class Run(ABC, Generic[RowT]):
    """One run of an experiment; iterate ``run()`` for its updates, each of which has ``save``: whether rows are new.

    config: as it ran. planned: the rows of the plan, in order, with the keys of their results. known: what is known of
    any row, by key, at first the rows of a resumed file (kept). stop() is asked between the steps of a run. warnings:
    what the user should know so far. ceilings: the device's, where they are measured.
    """

    ceilings: ceilings.Ceilings | None = None

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        planned: Sequence[Any],
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
