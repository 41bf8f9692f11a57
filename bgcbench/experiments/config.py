"""What every experiment is told: variants, group counts, device, precision, seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bgcbench.errors import UsageError
from bgcbench.results import Json
from bgcbench.specs import (
    PRECISIONS,
    VARIANTS,
    WEIGHTS,
    WHERE,
    NetSpec,
    Preprocessing,
    check_choice,
    check_positive,
)

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

    height, width, num_classes and stem_stride are None for the network's own (a library's size is found when its
    weights are, see :mod:`bgcbench.experiments.images`); where, include and exclude choose the convolutions as in
    :func:`bgcbench.convert`.
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


@dataclass(frozen=True)
class ImageChoice:
    """How images are prepared where that is not what belongs to the weights: None is what they, or the data, say.

    mean, std: of the three channels, 0 being black and 1 white. resize: (height, width) in px before the centre is cut
    out. weights_key: which of a file's state dicts.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, int] | None = None
    interpolation: str | None = None
    weights_key: str | None = None

    def _check_images(self, weights: str, *, in_memory: bool) -> None:
        """Raise UsageError for what cannot be, or has no meaning here."""
        for name in ("mean", "std"):
            if getattr(self, name) is not None and weights == "default":
                raise UsageError(f"--{name} is for weights that come from a file; published ones have theirs")
        for name in ("resize", "interpolation"):
            if getattr(self, name) is not None and in_memory:
                raise UsageError(f"--{name} is for image files, and these images are in memory; leave it out")
        if self.weights_key is not None and weights in WEIGHTS:
            raise UsageError(f"--weights-key is for a file of weights, and --weights is {weights}; leave it out")
        possible = Preprocessing((1, 1), (0.5,) * 3, (0.5,) * 3, (1, 1), "bilinear")
        dataclasses.replace(possible, **self.preparation)

    @property
    def preparation(self) -> Json:
        """What was asked for of :class:`bgcbench.specs.Preprocessing`, its size apart."""
        given = {name: getattr(self, name) for name in ("mean", "std", "resize", "interpolation")}
        return {name: value for name, value in given.items() if value is not None}
