"""What every experiment is told: variants, group counts, device, precision, seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.experiments.options import (
    GRID,
    MEASURE,
    NETWORK,
    WORKLOAD,
    Option,
    check_options,
    listed,
    network,
    one_of,
    option,
    positive,
    size,
    threads,
    three,
    variants,
    word,
)
from bgcbench.planning import read_plan
from bgcbench.results import Json
from bgcbench.specs import (
    PLANNED,
    PRECISIONS,
    RANKED,
    RUNTIME,
    VARIANTS,
    WEIGHTS,
    WHERE,
    Choice,
    NetSpec,
    Preprocessing,
    check_positive,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_OF_WEIGHTS = "the weights'"


def _is_device(field: str, value: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise UsageError(f"unknown device '{value}': choose from auto, cpu, cuda, cuda:K")


def _is_seed(field: str, value: int) -> None:
    if value < 0:
        raise UsageError(f"--seed {value} must be 0 or positive")


@dataclass(frozen=True)
class RunConfig:
    """The settings that all commands share; valid once constructed (raises UsageError or ShapeError)."""

    variants: tuple[str, ...] = option(
        ("standard", "gc", "bgc"), "Variants, or all.", short="v", panel=GRID, everyday=True, read=variants,
        check=one_of(VARIANTS, "variant"),
    )  # fmt: skip
    groups: tuple[int, ...] = option(
        (2, 4, 8, 16), "Group counts N.", short="g", panel=GRID, everyday=True, check=positive
    )
    ranks: tuple[int, ...] = option(
        (), "Ranks of low rank (LR), such as 8,16: a row each, besides those by N.", panel=GRID
    )
    precision: str = option("fp32", panel=MEASURE, check=one_of(PRECISIONS))
    device: str = option(
        "auto", "auto, cpu, cuda or cuda:K.", panel=MEASURE, everyday=True, read=word, check=_is_device
    )
    threads: int | None = option(
        None, "CPU threads; auto: as many as other processes leave cores.", panel=MEASURE, shown="torch's", kind=str,
        read=threads, check=positive,
    )  # fmt: skip
    seed: int = option(0, panel=MEASURE, check=_is_seed)
    quick: bool = option(False, short="q", panel=MEASURE, everyday=True)
    skip_invalid: bool = option(False, "Go on when N or a rank does not fit the channels; the row says so.", panel=GRID)

    SHORTHANDS: ClassVar[tuple[Option, ...]] = ()  # options of several fields
    PRECISIONS: ClassVar[tuple[str, ...]] = tuple(PRECISIONS)
    FREE: ClassVar[tuple[str, ...]] = ()  # fields that change no number: a resumed run may choose them anew

    def __post_init__(self) -> None:
        check_options(self)
        for rank in self.ranks:
            check_positive("rank", rank)
        if self.precision not in self.PRECISIONS:
            raise UsageError(f"--precision {self.precision} is not for this command; use {', '.join(self.PRECISIONS)}")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The configuration that a result file holds."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return cls(**values)

    def to_json(self) -> Json:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def choices(self) -> list[Choice]:
        """What is compared besides the standard convolution: by N in the order of the variants, then by rank."""
        others = [name for name in VARIANTS if name in self.variants and name != "standard"]
        by_groups = [Choice(name, groups) for groups in sorted(set(self.groups) - {1}) for name in others]
        return by_groups + [Choice(name, rank=rank) for rank in sorted(set(self.ranks)) for name in RANKED]

    def algorithms_of(self, choice: Choice, mode: str = "eager") -> tuple[str, ...]:
        """The algorithms that layers of ``choice`` may run, the default first."""
        variant = VARIANTS[choice.variant]
        return variant.plain if mode == RUNTIME else variant.algorithms

    @property
    def what(self) -> str:
        """The workload in a file name."""
        raise NotImplementedError


def shared_fields(config: Any, kind: type[Any]) -> Json:
    """The values of what configurations of ``kind`` have, too."""
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(kind) if hasattr(config, each.name)}


def refuse_misfits(reasons: Iterable[str]) -> None:
    """Raise one ShapeError with everything that does not fit, if there is anything."""
    if found := list(dict.fromkeys(reasons)):
        raise ShapeError("; ".join(found) + "; drop what does not fit, or use --skip-invalid")


@dataclass(frozen=True)
class NetworkChoice:
    """The part of a configuration that names a network and which of its convolutions are replaced.

    height, width, num_classes and stem_stride are None for the network's own (a library's size is found when its
    weights are, see :mod:`bgcbench.experiments.images`); where, include and exclude choose the convolutions as in
    :func:`bgcbench.convert`.
    """

    model: str = option("resnet50", panel=NETWORK, everyday=True, shown="", argument=True, read=network)
    height: int | None = None
    width: int | None = None
    num_classes: int | None = option(
        None, "Classes.", name="classes", panel=NETWORK, shown="1000; 10 for wrn and resnext29"
    )
    stem_stride: int | None = option(
        None,
        "Stride of the first convolution of efficientnet_* and mobilenet_v*.",
        panel=NETWORK,
        shown="2, and 1 up to 64 px",
    )
    where: str = option(
        "auto", "Which of its convolutions: auto (what the paper replaces), 3x3, 1x1, all, none.", panel=NETWORK,
        check=one_of(WHERE),
    )  # fmt: skip
    include: tuple[str, ...] = option(
        (), "These too (GLOB of module names; repeatable).", panel=NETWORK, kind=list[str], read=listed
    )
    exclude: tuple[str, ...] = option((), "Not these (GLOB; repeatable).", panel=NETWORK, kind=list[str], read=listed)

    @property
    def spec(self) -> NetSpec:
        """The network."""
        return NetSpec(self.model, self.num_classes, self.height, self.width, self.stem_stride)

    def _resolve_network(self) -> None:
        """Write the network's own numbers out, so that a file says what ran."""
        spec = self.spec
        for name in ("height", "width", "num_classes", "stem_stride"):
            object.__setattr__(self, name, getattr(spec, name))


def _plan_in(name: str, path: Path) -> Json:
    try:
        return {layer: choice.to_json() for layer, choice in read_plan(path)[0].items()}
    except ResultFileError as problem:
        raise ResultFileError(f"--{name} {problem}") from None


@dataclass(frozen=True)
class ConvertedNetwork(NetworkChoice):
    """The part of a configuration that names a network and what it is converted to; it may hold a plan.

    plan: what each convolution becomes, by its name, as in a plan file, or a bgcbench.Plan; kept as JSON, so that a
    result file says what ran. A planned network is a row of its own, to which where, include, exclude and skip_invalid
    mean nothing.
    """

    plan: Mapping[str, Any] | None = option(
        None,
        "A plan of the network: plan.json of bgcbench plan --save, or its result file. Without --variants, --groups "
        "and --ranks it is compared with the dense network alone.",
        panel=GRID,
        kind=Path,
        read=_plan_in,
    )

    @property
    def planned(self) -> dict[str, Choice]:
        """What each convolution becomes that the plan names."""
        return {name: Choice.of(choice) for name, choice in (self.plan or {}).items()}

    @property
    def choices(self) -> list[Choice]:
        """What is compared besides the standard convolution: the plan first, then what is the same for all layers."""
        uniform: list[Choice] = super().choices  # type: ignore[misc]
        return [PLANNED] * (self.plan is not None) + uniform

    def algorithms_of(self, choice: Choice, mode: str = "eager") -> tuple[str, ...]:
        """Of the plan, those that some of its variants have; a layer without the one asked for runs its own."""
        of: Callable[[Choice, str], tuple[str, ...]] = super().algorithms_of  # type: ignore[misc]
        if not choice.is_planned:
            return of(choice, mode)
        every = (name for each in self.planned.values() if not each.is_dense for name in of(each, mode))
        return tuple(dict.fromkeys(name for name in every if name != "stock"))

    def conversion(self, choice: Choice, algorithm_of: Callable[[str], str]) -> Json:
        """The arguments of ``convert`` that make of the network what ``choice`` says: PLANNED what the plan says.

        algorithm_of: the algorithm of a variant's layers.
        """
        if choice.is_planned:
            algorithms = {each.variant: algorithm_of(each.variant) for each in self.planned.values()}
            return {"plan": self.planned, "algorithm": algorithms, "example_input": self.spec.size}
        return {
            **choice.to_json(),
            "where": self.where,
            "include": self.include,
            "exclude": self.exclude,
            "on_indivisible": "skip" if getattr(self, "skip_invalid", False) else "raise",
            "algorithm": algorithm_of(choice.variant),
            "example_input": self.spec.size,
        }

    def _settle_plan(self) -> None:
        """Write the plan out as JSON.

        Raises UsageError for one that changes nothing, and for what is said of variants where there is only a plan.
        """
        if self.plan is None:
            return
        choices = {name: Choice.of(each) for name, each in getattr(self.plan, "choices", self.plan).items()}
        if all(choice.is_dense for choice in choices.values()):
            raise UsageError("--plan keeps every convolution as it is; give a plan that replaces one at least")
        object.__setattr__(self, "plan", {name: choice.to_json() for name, choice in choices.items()})
        about = {"where": "auto", "include": (), "exclude": (), "skip_invalid": False}
        said = [name for name, usual in about.items() if getattr(self, name) != usual]
        if self.choices == [PLANNED] and said:
            too = ", or name --variants, too" if hasattr(self, "variants") else ""
            raise UsageError(
                f"--{said[0].replace('_', '-')} is for variants, and --plan names each convolution; leave it out{too}"
            )


@dataclass(frozen=True)
class ImageChoice:
    """How images are prepared where that is not what belongs to the weights: None is what they, or the data, say.

    mean, std: of the three channels, 0 being black and 1 white. resize: (height, width) in px before the centre is cut
    out. calibration_views: of each calibration image (see bgcbench.Views). weights_key: which of a file's state dicts.
    """

    mean: tuple[float, ...] | None = option(
        None, "Of the channels, 0 black, 1 white, where the weights come from a file: 0.5 or 0.485,0.456,0.406.",
        panel=WORKLOAD, shown=_OF_WEIGHTS, read=three,
    )  # fmt: skip
    std: tuple[float, ...] | None = option(
        None, "Their standard deviations.", panel=WORKLOAD, shown=_OF_WEIGHTS, read=three
    )
    resize: tuple[int, int] | None = option(
        None,
        "Short side of an image file before its centre of --size is cut out, or HEIGHTxWIDTH to cover.",
        panel=WORKLOAD,
        shown=_OF_WEIGHTS,
        read=size,
    )
    interpolation: str | None = option(
        None,
        "Of image files: bilinear, bicubic, nearest, box, hamming, lanczos.",
        panel=WORKLOAD,
        shown=_OF_WEIGHTS,
        read=word,
    )
    calibration_views: int = option(
        1,
        "Of each calibration image: itself and random crops, mirrored or not. More help where pictures are few.",
        panel=NETWORK,
        check=positive,
    )
    weights_key: str | None = option(
        None,
        "Which of a file's weights: the key that leads to them, nested ones joined by dots, such as model_ema.",
        panel=WORKLOAD,
        shown="the first that fits",
    )

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
