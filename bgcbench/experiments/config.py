"""What every experiment is told: variants, group counts, device, precision, seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bgcbench.errors import UsageError
from bgcbench.results import Json
from bgcbench.specs import PRECISIONS, VARIANTS, WHERE, NetSpec, check_choice, check_positive

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class RunConfig:
    """The settings that all commands share; valid once constructed (raises UsageError or ShapeError)."""

    variants: tuple[str, ...] = ("standard", "gc", "bgc")
    groups: tuple[int, ...] = (2, 4, 8, 16)
    precision: str = "fp32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    quick: bool = False
    skip_invalid: bool = False

    PRECISIONS: ClassVar[tuple[str, ...]] = tuple(PRECISIONS)
    FREE: ClassVar[tuple[str, ...]] = ()  # fields that change no number: a resumed run may choose them anew
    SIZES: ClassVar[tuple[str, ...]] = ()  # fields that are whole numbers of at least 1

    def __post_init__(self) -> None:
        for name in self.variants:
            check_choice("variant", name, VARIANTS)
        for what, values in (("variants", self.variants), ("groups", self.groups)):
            if not values:
                raise UsageError(f"--{what} is empty; name at least one")
        for value in self.groups:
            check_positive("groups", value)
        for name in self.SIZES:
            check_positive(name, getattr(self, name))
        check_choice("precision", self.precision, PRECISIONS)
        if self.precision not in self.PRECISIONS:
            raise UsageError(f"--precision {self.precision} is not for this command; use {', '.join(self.PRECISIONS)}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"unknown device '{self.device}': choose from auto, cpu, cuda, cuda:K")
        if self.threads is not None:
            check_positive("threads", self.threads)
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} must be 0 or positive")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The configuration that a result file holds."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return cls(**values)

    def to_json(self) -> Json:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def what(self) -> str:
        """The workload in a file name."""
        raise NotImplementedError


@dataclass(frozen=True)
class NetworkChoice:
    """The part of a configuration that names a network and which of its convolutions are replaced.

    height, width, num_classes and stem_stride are None for the network's own; where, include and exclude choose the
    convolutions as in :func:`bgcbench.convert`.
    """

    model: str = "resnet50"
    height: int | None = None
    width: int | None = None
    num_classes: int | None = None
    stem_stride: int | None = None
    where: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def spec(self) -> NetSpec:
        """The network."""
        return NetSpec(self.model, self.num_classes, self.height, self.width, self.stem_stride)

    def _resolve_network(self) -> None:
        """Check the choice and write the network's own numbers out, so that a file says what ran."""
        check_choice("where", self.where, WHERE)
        spec = self.spec
        for name in ("height", "width", "num_classes", "stem_stride"):
            object.__setattr__(self, name, getattr(spec, name))
