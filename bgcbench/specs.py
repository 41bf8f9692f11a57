"""Names, frozen specifications and their validation. Nothing here imports torch.

Notation used throughout the package (Lee, Park & Lee, section 2): n input channels, m output channels, N groups,
K kernel positions (9 for 3x3), D output positions an image. MACs are multiply-adds: one multiplication and the
addition that follows it count as 1 (fvcore's convention; ``torch.utils.flop_counter`` counts 2).
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from bgcbench.errors import ShapeError, UsageError, did_you_mean

BUDGETS = {"params": "parameters", "macs": "MACs", "time": "time", "loss": "predicted loss"}  # of a plan, in words
Pair = tuple[int, int]
Channels = tuple[float, float, float]  # a number for red, green and blue


def cost_kind(budget: str) -> str:
    """What a plan saves under a kind of budget: that, and MACs where predicted loss is limited."""
    return "macs" if budget == "loss" else budget


def divisors(value: int) -> list[int]:
    """All positive divisors of ``value``, ascending."""
    small = [d for d in range(1, math.isqrt(value) + 1) if value % d == 0]
    return small + [value // d for d in reversed(small) if d * d != value]


def indivisible(in_channels: int, out_channels: int, groups: int, _kernel_positions: int = 1) -> str | None:
    """Why ``groups`` cannot split these channels evenly, with all that can; None if it does."""
    for what, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            common = ", ".join(map(str, divisors(math.gcd(in_channels, out_channels))))
            shape = f"{in_channels} -> {out_channels} channels"
            return f"{what}={channels} is not divisible by groups={groups}; groups that divide {shape}: {common}"
    return None


def too_many_groups(in_channels: int, out_channels: int, groups: int, _kernel_positions: int) -> str | None:
    """Why there cannot be ``groups`` uneven groups: with more than channels, some outputs could have no input."""
    for what, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if groups > channels:
            return f"groups={groups} is more than {what}={channels}; use at most {min(in_channels, out_channels)}"
    return None


def rank_of(in_channels: int, out_channels: int, groups: int, kernel_positions: int) -> int:
    """r = floor(Kmn / (N (Kn + m))): the largest rank whose two factors have at most Kmn/N parameters."""
    columns = kernel_positions * in_channels
    return columns * out_channels // (groups * (columns + out_channels))


def reduction_by(rank: int, in_channels: int, out_channels: int, kernel_positions: int) -> int:
    """The largest N whose Kmn/N parameters a rank keeps to; 1 where it keeps to none."""
    columns = kernel_positions * in_channels
    return max(1, columns * out_channels // (rank * (columns + out_channels)))


def no_rank(in_channels: int, out_channels: int, groups: int, kernel_positions: int) -> str | None:
    """Why a reduction by ``groups`` leaves no rank, with the largest that does; None if it does."""
    if groups == 1 or rank_of(in_channels, out_channels, groups, kernel_positions):
        return None
    most = rank_of(in_channels, out_channels, 1, kernel_positions)
    return (
        f"groups={groups} leaves no rank for {in_channels} -> {out_channels} channels and {kernel_positions} kernel "
        f"positions: r = Kmn / (N (Kn + m)) is below 1; " + (f"use at most {most}" if most > 1 else "keep it dense")
    )


@dataclass(frozen=True)
class Sizes:
    """The numbers that counting rules are written in."""

    n: int  # input channels
    m: int  # output channels
    groups: int  # N
    pairs: int  # sum over the groups of m_g n_g: output-input pairs that a weight connects
    k: int  # K, kernel positions
    d: int  # D, output positions
    d_in: int  # input positions
    rank: int | None = None  # r, where it is given and does not follow from N


@dataclass(frozen=True)
class Costs:
    """What a variant's counting rule says of one layer without bias and one image.

    weights: numbers that the deployed layer stores; each is multiplied at D positions. adds: additions outside the
    products. paper_params: the parameters in Table 1, None where they are the weights. paper_extra: what the operations
    of (3.14) and section 4 have besides D times the weights. trained: numbers stored while a masked dense kernel
    trains, None for a layer that is deployed as it trains.
    """

    weights: int
    adds: int = 0
    paper_params: int | None = None
    paper_extra: int = 0
    trained: int | None = None


def one_block(s: Sizes) -> Costs:
    """Kmn/N weights; at N = 1 the standard convolution."""
    return Costs(s.k * s.m * s.n // s.groups)


def _lgc(s: Sizes) -> Costs:
    """Condensation C = groups G = N, the setting of the paper's count; half of Table 1's 2Kmn is the 0/1 mask."""
    weights = s.k * s.m * s.n // s.groups
    pruning = (s.groups - 1) * (weights + s.m * s.n // s.groups + 1)
    dense = s.k * s.m * s.n
    return Costs(weights, paper_params=2 * dense, paper_extra=pruning, trained=dense)


def _flgc(s: Sizes) -> Costs:
    """Leaves out the m n N multiply-adds that build the mask once a call, whatever the batch."""
    weights = s.k * s.pairs
    trained = s.k * s.m * s.n + s.groups * (s.n + s.m)
    assignment = (s.n + s.m) * s.groups**2 + weights
    return Costs(weights, paper_params=trained, paper_extra=assignment, trained=trained)


def _tlgc(s: Sizes) -> Costs:
    return Costs(s.k * s.m * s.n // s.groups + s.k * s.n + s.groups * s.m)


def _lowrank(s: Sizes) -> Costs:
    return Costs((s.rank or rank_of(s.n, s.m, s.groups, s.k)) * (s.k * s.n + s.m))


def _bgc(s: Sizes) -> Costs:
    return Costs(2 * s.k * s.m * s.n // s.groups, adds=s.d_in * s.n, paper_extra=s.d * s.n)


@dataclass(frozen=True)
class Variant:
    """One row of the paper's Table 1: all that the package has to know of a variant besides its layer.

    name: on the command line. label: in tables and plots. summary: in ``bgcbench --help``. layer: "module:Class".
    costs: its counting rule for N >= 2; at N = 1 every variant is the standard convolution.
    table1: Table 1's columns: whether groups exchange information, the channels that an output sees, how groups are
    found. algorithms: the exact algorithms of its layer, the default first. measured: whether 'auto' measures which of
    them is the fastest; otherwise it is the first. plain: those that it has where bgcbench is not, made of standard
    operations (see bgcbench.deployment). unfit: why there can be no such layer, given n, m, N and K, None where there
    can; misfit: that in words, between N and the channels.
    has_rank: whether a layer may be given a rank in the place of N.
    has_lasso: whether its layers offer a group lasso to the training's loss.
    solver: how ``bgcbench approx`` finds the least error: 'schur' solves a linear space of kernels for all convolutions
    at once (:mod:`bgcbench.theory.residual`), any other name calls ``from_dense`` for each convolution. sees_mean: of
    'schur', whether a group's outputs see the mean over the groups besides their own inputs.
    unknowns: free numbers in the least squares of one output, given p = K n/N and N.
    look: colour, matplotlib's marker and the marker's size in points.
    """

    name: str
    label: str
    summary: str
    layer: str
    costs: Callable[[Sizes], Costs]
    table1: tuple[str, str, str] = ("yes", "n/N", "deterministic")
    algorithms: tuple[str, ...] = ("stock",)
    plain: tuple[str, ...] = ("dense",)
    measured: bool = False
    unfit: Callable[[int, int, int, int], str | None] = indivisible
    misfit: str = "does not divide"
    has_rank: bool = False
    has_lasso: bool = False
    solver: str = "from_dense"
    sees_mean: bool = False
    unknowns: Callable[[int, int], int] = lambda p, groups: p
    look: tuple[str, str, float] = ("#666666", "X", 6.0)

    def settled(self, algorithm: str) -> str:
        """``algorithm`` with 'auto' resolved where that does not take a measurement."""
        return self.algorithms[0] if algorithm == "auto" and not self.measured else algorithm


POINTWISE_ALGORITHMS = ("matmul",)  # for 1x1 kernels without padding only
CUDA_ALGORITHMS = ("triton",)  # kernels of our own; elsewhere the operator runs stock convolutions
# The algorithms of a layer that is trained as one thing and run as another.
TRAINED_AND_DEPLOYED = ("masked", "deployed")
# The one registration of the variants. A new layer is its file in convs/ and its entry here.
# Looks: Okabe and Ito's colours, distinct in all kinds of colour vision. Where two variants lose the same, the smaller
# marker stands inside the larger.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            "standard",
            "SC",
            "SC",
            "bgcbench.convs.standard:StandardConv2d",
            one_block,
            table1=("yes", "n", "none"),
            solver="exact",
            unknowns=lambda p, groups: 0,
            look=("#000000", "*", 9.0),
        ),
        Variant(
            "gc",
            "GC",
            "group convolution",
            "bgcbench.convs.gc:GroupConv2d",
            one_block,
            table1=("no", "n/N", "deterministic"),
            algorithms=("stock", "triton"),
            plain=("stock", "dense"),
            solver="schur",
            look=("#D55E00", "s", 7.5),
        ),
        Variant(
            "shuffle",
            "Shuffle",
            "GC and a channel shuffle",
            "bgcbench.convs.shuffle:ShuffleGroupConv2d",
            one_block,  # a shuffle moves numbers and computes none
            plain=("stock", "matrix", "dense"),
            solver="schur",
            look=("#E69F00", "D", 4.0),
        ),
        Variant(
            "lgc",
            "LGC",
            "pruned into groups",
            "bgcbench.convs.lgc:LearnedGroupConv2d",
            _lgc,
            table1=("yes", "n/N", "adaptive"),
            algorithms=TRAINED_AND_DEPLOYED,
            plain=("deployed", "dense"),
            has_lasso=True,
            solver="column-search",
            look=("#009E73", "^", 6.5),
        ),
        Variant(
            "flgc",
            "FLGC",
            "learnt groups",
            "bgcbench.convs.flgc:FullyLearnableGroupConv2d",
            _flgc,
            table1=("yes", "varies", "adaptive"),
            algorithms=TRAINED_AND_DEPLOYED,
            plain=("deployed", "dense"),
            unfit=too_many_groups,
            solver="partition-search",
            look=("#CC79A7", "v", 6.5),
        ),
        Variant(
            "tlgc",
            "TLGC",
            "two-level",
            "bgcbench.convs.tlgc:TwoLevelGroupConv2d",
            _tlgc,
            plain=("stock", "matrix", "dense"),
            solver="als",
            unknowns=lambda p, groups: p + groups,
            look=("#56B4E9", "P", 7.0),
        ),
        Variant(
            "bgc",
            "BGC",
            "balanced group convolution of Lee, Park & Lee",
            "bgcbench.convs.bgc:BalancedGroupConv2d",
            _bgc,
            algorithms=("two_conv", "concat", "dense", "split", "matmul", "triton"),
            plain=("two_conv", "matrix", "split", "dense"),
            measured=True,
            solver="schur",
            sees_mean=True,
            unknowns=lambda p, groups: 2 * p,
            look=("#0072B2", "o", 6.0),
        ),
        Variant(
            "lowrank",
            "LR",
            "low-rank factorisation, at the parameters of N groups",
            "bgcbench.convs.lowrank:LowRankConv2d",
            _lowrank,
            table1=("yes", "n", "none"),
            algorithms=("two_conv", "dense", "matmul"),
            plain=("two_conv", "dense"),
            measured=True,
            unfit=no_rank,
            misfit="leaves no rank for",
            has_rank=True,
            solver="svd",
            look=("#999933", "h", 6.5),
        ),
    )
}
ALGORITHMS: tuple[str, ...] = tuple(
    dict.fromkeys(algorithm for v in VARIANTS.values() for algorithm in v.algorithms if algorithm != "stock")
)
# The exact algorithms of what runs without bgcbench (see bgcbench.deployment).
PLAIN_ALGORITHMS: tuple[str, ...] = tuple(dict.fromkeys(algorithm for v in VARIANTS.values() for algorithm in v.plain))
# How --algorithm of a training may be answered: the first one of each variant, the fastest one, or one by name.
TRAINING_ALGORITHMS: tuple[str, ...] = ("fixed", "auto", *(a for a in ALGORITHMS if a not in TRAINED_AND_DEPLOYED))
PRECISIONS: dict[str, int] = {"fp64": 8, "fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}  # bytes a number
LAYOUTS: tuple[str, ...] = ("nchw", "nhwc")
WHERE: tuple[str, ...] = ("auto", "3x3", "1x1", "all", "none")  # which convolutions of a network
# Variants that are linear spaces of kernels, but the standard one.
LINEAR: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if variant.solver == "schur")
# Those whose least squares has a closed form; the others search.
CLOSED_FORM: tuple[str, ...] = (
    "standard", *LINEAR, *(name for name, variant in VARIANTS.items() if variant.solver == "svd")
)  # fmt: skip
RANKED: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if variant.has_rank)
REFIT = "refit"
SOLVED: tuple[str, ...] = ("calibrated", REFIT)  # initialisations by the network's own activations
PLAN = "plan"  # in the place of a variant: of a network whose convolutions become what a plan says of each
HELD_OUT = 4  # of so many calibration images one is held out to evaluate on; fewer images are too few
DATA_SETS: tuple[str, ...] = ("digits",)  # by name; anything else is a folder
UNLABELLED = "unlabelled"  # a data set: images of which nothing is known
TRAINING_SETS: tuple[str, ...] = ("digits", "cifar10", "imagenet", "folder", UNLABELLED, "synthetic")
TRAIN_SPLIT = "train"
TEST_SPLITS: tuple[str, ...] = ("val", "valid", "validation", "test")  # beside it; the first that is there
DIGITS_PX = 16  # a side of the digits for networks that are made for small images
WEIGHTS: tuple[str, ...] = ("none", "default", "own")  # what --weights may be besides a file
INTERPOLATIONS: tuple[str, ...] = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # Pillow's
CROPS: tuple[str, ...] = ("center", "squash")
PHASES: tuple[str, ...] = ("fwd", "bwd", "fwd_bwd")
NETWORK_PHASES: tuple[str, ...] = ("fwd", "train_step")
PHASE_TITLES = {"fwd": "fwd", "bwd": "bwd", "fwd_bwd": "fwd+bwd", "train_step": "train step"}  # in tables and pictures
MEMORY: tuple[str, ...] = ("kept", "fresh")  # whether a CPU's tensors reuse memory, or come anew at each call
RUNTIME = "onnxruntime"  # as a mode: not torch runs the network
MODES: tuple[str, ...] = ("eager", "graph", "compile", RUNTIME)
TARGETS: dict[str, str] = {"onnx": ".onnx", "torch": ".pt", "exported": ".pt2"}  # of an export, with its file's suffix
EXPORTERS: tuple[str, ...] = ("dynamo", "torchscript")  # torch's newer and older one to ONNX
OPSET = 18  # of ONNX: has all that convolutional networks use, and ONNX Runtime 1.14 and later read it
OUTPUT_TOLERANCE = 1e-5  # of an export's outputs, relative to their norm
FORMATS: tuple[str, ...] = ("auto", "table", "markdown", "csv", "json")
# The parts of a result file's environment that decide a measurement: equal in all rows of one file.
FINGERPRINT_FIELDS: tuple[str, ...] = ("cpu", "torch", "cuda", "cudnn", "driver", "device")


def load_layer(name: str) -> Any:
    """The layer class of a variant, imported on first use (this is where torch comes in)."""
    check_choice("variant", name, VARIANTS)
    return load(VARIANTS[name].layer)


def load(place: str) -> Any:
    """What stands at ``place``, "module:name", imported on first use."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def spelt(value: str, choices: Iterable[str]) -> str:
    """The one of ``choices`` that is ``value`` but for its case; ``value`` as it is where there is none."""
    return next((choice for choice in choices if choice.casefold() == value.casefold()), value)


def check_choice(what: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``; otherwise raise, naming the nearest one."""
    names = list(choices)
    if value in names:
        return value
    raise UsageError(f"unknown {what} '{value}': {did_you_mean(value, names)}choose from {', '.join(names)}")


def check_positive(what: str, value: int, least: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``least``; otherwise raise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ShapeError(f"{what}={value} must be a whole number of at least {least}")
    return value


def shard_of(text: str) -> tuple[int, int]:
    """'2/8' as (2, 8): the second of eight parts of a plan; raises UsageError for anything else."""
    found = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", text)
    if found is None or not int(found[1]) <= int(found[2]):
        raise UsageError(f"--shard {text} must be K/M, part K of M, such as 2/8")
    return int(found[1]), int(found[2])


def check_on_cpu(precision: str, mode: str) -> None:
    """Raise UsageError for a precision or mode that only CUDA devices have."""
    if precision == "tf32":
        raise UsageError("--precision tf32 is a mode of CUDA devices; on a CPU use fp32 or bf16")
    if mode == "graph":
        raise UsageError("--mode graph replays CUDA graphs; on a CPU use eager, compile or onnxruntime")


def check_in_runtime(**asked: Any) -> None:
    """Raise UsageError for a precision, layout, phase or phases that are not measured in ONNX Runtime."""
    has = {"phase": "fwd", "phases": ("fwd",), "precision": "fp32", "layout": "nchw"}
    for name, value in asked.items():
        if value != has[name]:
            given, only = (",".join(each) if isinstance(each, tuple) else each for each in (value, has[name]))
            raise UsageError(f"--mode {RUNTIME} has --{name} {only} alone, not {given}; ask for that")


def unfit(variant: str, in_channels: int, out_channels: int, groups: int, kernel_positions: int) -> str | None:
    """Why ``variant`` cannot have these channels at N = ``groups``; None if it can."""
    return VARIANTS[variant].unfit(in_channels, out_channels, groups, kernel_positions)


def unfit_rank(variant: str, in_channels: int, out_channels: int, kernel_positions: int, rank: int) -> str | None:
    """Why ``variant`` cannot have this rank; None if it can. Raises UsageError for a variant that has no rank."""
    if variant not in RANKED:
        raise UsageError(f"{variant} has groups and no rank; {', '.join(RANKED)} has one")
    check_positive("rank", rank)
    most = min(out_channels, kernel_positions * in_channels)
    if rank <= most:
        return None
    return (
        f"rank={rank} is more than {most}, the most that {in_channels} -> {out_channels} channels and "
        f"{kernel_positions} kernel positions have; use at most {most}"
    )


def as_pair(what: str, value: int | Sequence[int], least: int = 1) -> Pair:
    """An int or a pair of ints as a (height, width) pair, each at least ``least``."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise ShapeError(f"{what}={value} must be one whole number or a pair (height, width)")
    return check_positive(what, pair[0], least), check_positive(what, pair[1], least)


def output_length(length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of a convolution's output along one axis: floor((L + 2p - d (k - 1) - 1) / s) + 1."""
    return (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class ConvSpec:
    """One convolution of one variant, complete and valid once constructed.

    rank: r of a low-rank layer, which otherwise follows from N (see rank_of); given, it says what ``groups`` is: the
    largest N whose Kmn/N parameters it keeps to, at least 1.

    Raises ShapeError for sizes below 1, for a standard convolution with groups, for channels that ``groups`` does not
    divide (FLGC's groups may be uneven: there must only be channels enough) and for a rank above min(m, Kn);
    UsageError for an unknown variant or algorithm and for a rank of a variant that has none.
    """

    variant: str
    in_channels: int
    out_channels: int
    kernel_size: int | Pair
    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1
    bias: bool = True
    algorithm: str = "auto"
    rank: int | None = None

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_positive("in_channels", self.in_channels)
        check_positive("out_channels", self.out_channels)
        check_positive("groups", self.groups)
        for field, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, field, as_pair(field, getattr(self, field), least))
        if self.variant == "standard" and self.groups != 1:
            raise ShapeError(f"a standard convolution has groups=1, not {self.groups}; variant 'gc' has groups")
        if self.rank is not None:
            object.__setattr__(self, "groups", self._reduction(self.rank))
        elif why := unfit(self.variant, self.in_channels, self.out_channels, self.groups, self.kernel_positions):
            raise ShapeError(why)
        if self.algorithm != "auto":
            check_choice(f"algorithm of {self.variant}", self.algorithm, VARIANTS[self.variant].algorithms)
            if self.algorithm not in self.algorithms:
                raise UsageError(f"algorithm '{self.algorithm}' is for 1x1 kernels without padding; use 'auto'")

    def _reduction(self, rank: int) -> int:
        """N of a layer that is given its rank; raises where there is no such layer."""
        shape = self.in_channels, self.out_channels, self.kernel_positions
        if why := unfit_rank(self.variant, *shape, rank):
            raise ShapeError(why)
        reduction = reduction_by(rank, *shape)
        if self.groups not in (1, reduction):
            raise UsageError(f"rank={rank} and groups={self.groups}: give one of them; this rank is N={reduction}")
        return reduction

    @property
    def is_dense(self) -> bool:
        """Whether it is the standard convolution: N = 1, and no rank."""
        return self.groups == 1 and self.rank is None

    @property
    def is_pointwise(self) -> bool:
        """Whether an output depends on one position of the input: a 1x1 kernel without padding."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that this convolution can run, the default first."""
        every = VARIANTS[self.variant].algorithms
        return every if self.is_pointwise else tuple(name for name in every if name not in POINTWISE_ALGORITHMS)

    @property
    def plain(self) -> tuple[str, ...]:
        """The algorithms that this convolution has where bgcbench is not, the default first."""
        return ("dense",) if self.is_dense else VARIANTS[self.variant].plain

    @property
    def kernel_positions(self) -> int:
        """K, the number of kernel positions (taps) between one input and one output channel."""
        return math.prod(as_pair("kernel_size", self.kernel_size))

    def axes(self, height: int, width: int) -> list[tuple[int, int, int, int, int]]:
        """(length, kernel, stride, padding, dilation) of the rows and of the columns."""
        kernel, stride = as_pair("kernel_size", self.kernel_size), as_pair("stride", self.stride)
        padding, dilation = as_pair("padding", self.padding, 0), as_pair("dilation", self.dilation)
        return list(zip((height, width), kernel, stride, padding, dilation, strict=True))

    def output_size(self, height: int, width: int) -> Pair:
        """(height, width) of the output for an input of ``height`` x ``width``; raises where none is left."""
        out = tuple(output_length(*axis) for axis in self.axes(height, width))
        if min(out) < 1:
            raise ShapeError(
                f"an input of {height}x{width} leaves no output for kernel {self.kernel_size}, padding "
                f"{self.padding}, dilation {self.dilation}; use a larger input or a smaller kernel"
            )
        return out[0], out[1]


@dataclass(frozen=True)
class Choice:
    """What becomes of a convolution: ``variant`` with N = ``groups``, or with a ``rank``; by default it stays dense.

    Raises UsageError for an unknown variant and for a rank beside groups or of a variant without one, ShapeError for a
    number below 1.
    """

    variant: str = "standard"
    groups: int = 1
    rank: int | None = None

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, VARIANTS)
        check_positive("groups", self.groups)
        if self.variant == "standard" and self.groups != 1:
            raise ShapeError(f"a standard convolution has groups=1, not {self.groups}; variant 'gc' has groups")
        if self.rank is not None:
            unfit_rank(self.variant, 1, 1, 1, 1)
            check_positive("rank", self.rank)
            if self.groups != 1:
                raise UsageError(f"rank={self.rank} and groups={self.groups}: give one of them")

    @classmethod
    def of(cls, given: Choice | Mapping[str, Any]) -> Choice:
        """A choice as it is, or from its JSON; raises UsageError for anything else."""
        if isinstance(given, Choice):
            return given
        names = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or not set(given) <= set(names) or "variant" not in given:
            raise UsageError(f"{given!r} is no choice for a convolution: give {{variant, groups}} or {{variant, rank}}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """What it says, without what follows from it."""
        said = {"groups": self.groups} if self.rank is None else {"rank": self.rank}
        return {"variant": self.variant} | ({} if self.is_dense else said)

    @property
    def is_dense(self) -> bool:
        return self.groups == 1 and self.rank is None

    @property
    def is_planned(self) -> bool:
        """Whether it is PLANNED, and says nothing of any single convolution."""
        return False

    @property
    def key(self) -> str:
        """In the keys of rows: "bgc-n4", "lowrank-r16"."""
        return f"{self.variant}-" + (f"n{self.groups}" if self.rank is None else f"r{self.rank}")

    @property
    def misfit(self) -> str:
        """What is wrong, to be followed by the channels that it does not fit."""
        if self.rank is None:
            return f"groups={self.groups} {VARIANTS[self.variant].misfit}"
        return f"rank={self.rank} is too high for"

    @property
    def label(self) -> str:
        """For people: "BGC N=4", "LR r=16", "dense"."""
        said = f"N={self.groups}" if self.rank is None else f"r={self.rank}"
        return "dense" if self.is_dense else f"{VARIANTS[self.variant].label} {said}"

    def reduction(self, in_channels: int, out_channels: int, kernel_positions: int) -> int:
        """N, also where the rank is given."""
        shape = in_channels, out_channels, kernel_positions
        return self.groups if self.rank is None else reduction_by(self.rank, *shape)

    def fitting(self, shapes: Iterable[tuple[int, int, int]]) -> str:
        """In words, which N, or ranks in the place of a rank, fit convolutions of all these shapes (n, m, K)."""
        every = set(shapes)
        most = min(min(m, positions * n) for n, m, positions in every)
        others = (
            (replace(self, groups=number) for number in range(2, most + 1))
            if self.rank is None
            else (replace(self, rank=number) for number in range(1, most + 1))
        )
        fits = [each.rank or each.groups for each in others if not any(each.unfit(*shape) for shape in every)]
        name = "N" if self.rank is None else "rank"
        if not fits:
            return f"no other {name} fits all of them"
        in_a_row = len(fits) > 2 and fits[-1] - fits[0] == len(fits) - 1
        return f"{name} that fits all: " + (f"{fits[0]} to {fits[-1]}" if in_a_row else ", ".join(map(str, fits)))

    def unfit(self, in_channels: int, out_channels: int, kernel_positions: int) -> str | None:
        """Why a convolution of that shape cannot become this; None if it can."""
        shape = in_channels, out_channels
        if self.rank is None:
            return unfit(self.variant, *shape, self.groups, kernel_positions)
        return unfit_rank(self.variant, *shape, kernel_positions, self.rank)


class _Planned(Choice):
    """See PLANNED."""

    is_dense, is_planned = False, True
    key = label = PLAN

    def __post_init__(self) -> None:
        """There is nothing to check: a plan's own choices are."""


# Stands among the choices of a network, which are the same for all of its convolutions, for what a plan says of each.
PLANNED: Choice = _Planned(PLAN)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: resized, its centre cut out, then (pixel - mean) / std.

    size: (height, width) in px of the input. resize: (height, width) in px before the centre is cut out; the image is
    scaled with its proportions until it just covers that (crop 'center'), or stretched to exactly that ('squash').
    None, as interpolation is then, for images that are in memory and have their size. mean, std: of the channels, with
    0 as black and 1 as white. source: where this comes from, a key of SOURCES. Raises UsageError or ShapeError.
    """

    size: Pair
    mean: Channels
    std: Channels
    resize: Pair | None = None
    interpolation: str | None = None
    crop: str = "center"
    source: str = "data"

    SOURCES: ClassVar[dict[str, str]] = {
        "weights": "the weights' own",
        "library": "what its library states for this network",
        "data": "the data's own",
    }

    def __post_init__(self) -> None:
        as_pair("size", self.size)
        check_choice("crop", self.crop, CROPS)
        check_choice("source of a preprocessing", self.source, self.SOURCES)
        if len(self.mean) != 3 or not all(0 <= value <= 1 for value in self.mean):
            raise UsageError(
                f"--mean {_listed(self.mean)} must be one number or three, from 0 (black) to 1 (white), not to 255"
            )
        if len(self.std) != 3 or not all(0 < value < math.inf for value in self.std):
            raise UsageError(
                f"--std {_listed(self.std)} must be one positive number or three, of pixels from 0 (black) to 1 (white)"
            )
        if self.resize is None:
            return
        check_choice("interpolation", self.interpolation or "", INTERPOLATIONS)
        if min(resized - side for resized, side in zip(self.resize, self.size, strict=True)) < 0:
            raise UsageError(
                f"--resize {_side(self.resize)} is less than the {_side(self.size)} px that are cut out; give more, or "
                "a smaller --size"
            )

    def at(self, size: Pair) -> Preprocessing:
        """The same for inputs of another ``size``: resized in proportion."""
        if self.resize is None:
            return replace(self, size=size)
        height, width = (round(side * all_ / own) for side, all_, own in zip(size, self.resize, self.size, strict=True))
        return replace(self, size=size, resize=(height, width))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Preprocessing:
        """What :meth:`to_json` wrote, keys of newer versions left out. Raises TypeError where some are missing."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        steps = f"{_side(self.size)} px"
        if self.resize is not None:
            how = "short side " if self.crop == "center" and self.resize[0] == self.resize[1] else ""
            steps = f"{how}resized to {_side(self.resize)} ({self.interpolation}), centre {steps}"
        return f"{steps}, mean {_listed(self.mean)}, std {_listed(self.std)}"


def _side(size: Pair) -> str:
    """ "224", "224x160"."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


# Networks named by their numbers. D = 6 b + 4 layers, K times as wide; C groups of W channels.
WRN = re.compile(r"wrn_([1-9]\d*)_([1-9]\d*)")
RESNEXT29 = re.compile(r"resnext29_([1-9]\d*)x([1-9]\d*)d")
OWN = re.compile(f"{WRN.pattern}|{RESNEXT29.pattern}|wide_resnet34_2")  # networks of this package
TIMM_PREFIX = "timm/"
# What is the user's own, by the function that makes it: net.py:make or package.module:make.
FACTORY = re.compile(r"(?:.+\.py|[A-Za-z_]\w*(?:\.\w+)*):[A-Za-z_]\w*")
_named_by_user: set[str] = set()
_STRIDED_STEM = re.compile(r"efficientnet_.+|mobilenet_v[23].*")
SMALL_IMAGE_PX = 64  # up to here a stem of stride 2 throws away what later strides need
DEFAULT_PX = 224  # a side of the images of most networks


def is_own(name: str) -> bool:
    """Whether ``name`` is a function of the user's own, and not a network's or a data set's name, or a path."""
    return FACTORY.fullmatch(name) is not None


def may_run(factory: str) -> str:
    """``factory``, which is called only where the user has named it: a file that names code does not make it run."""
    _named_by_user.add(factory)
    return factory


def check_named(factory: str) -> str:
    """``factory``, if the user has named it; otherwise raise UsageError."""
    if factory not in _named_by_user:
        raise UsageError(
            f"{factory} is code of somebody's, and a file asks for it; name it on the command line for it to be run"
        )
    return factory


@dataclass(frozen=True)
class NetSpec:
    """One network of :mod:`bgcbench.models`, complete and valid once constructed.

    num_classes, height, width (px): by default 10 and 32 for wrn_D_K and resnext29_CxWd, 1000 and 224 for
    wide_resnet34_2, 1000 for any other. Its size is what its library states
    (:func:`bgcbench.models.preprocessing.own_size`); until then height and width are None, and 224 stand in for them.
    stem_stride: stride of the first convolution of EfficientNets and MobileNets; by default theirs, 2, and 1 for images
    of up to 64 px (the paper does not say what it used on 32 px). None for networks that have no such choice.
    A network of the user's own (name: FACTORY) has the classes that it has; num_classes is then what is needed.
    Raises ShapeError for a depth that is no wide residual network's, UsageError for a stem stride where none applies.
    Whether torchvision or timm knows the name is found out when it is built.
    """

    name: str
    num_classes: int | None = None
    height: int | None = None
    width: int | None = None
    stem_stride: int | None = None

    def __post_init__(self) -> None:
        own = is_own(self.name)
        if own:
            check_named(self.name)
        small = WRN.fullmatch(self.name) or RESNEXT29.fullmatch(self.name)
        if (found := WRN.fullmatch(self.name)) and ((depth := int(found[1])) < 10 or depth % 6 != 4):
            below = max(10, depth - (depth - 4) % 6)
            raise ShapeError(
                f"{self.name}: a wide residual network has 6 b + 4 layers, not {depth}; next to it are {below} and "
                f"{below + 6}"
            )
        side = (32 if small else DEFAULT_PX) if OWN.fullmatch(self.name) else None
        defaults = {"num_classes": None if own else 10 if small else 1000, "height": side, "width": self.height or side}
        for field, default in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)
        for field in ("num_classes", "height", "width"):
            if getattr(self, field) is not None:
                check_positive(field, getattr(self, field))
        strided = _STRIDED_STEM.fullmatch(self.name)
        if self.stem_stride is not None:
            if not strided:
                raise UsageError(f"--stem-stride is for efficientnet_* and mobilenet_v*, and {self.name} is neither")
            check_positive("stem_stride", self.stem_stride)
        elif strided:
            object.__setattr__(self, "stem_stride", 1 if max(self.size[1:]) <= SMALL_IMAGE_PX else 2)

    @property
    def source(self) -> dict[str, Any]:
        """What rebuilds the network: the arguments that its modules depend on."""
        fields = ("name", "num_classes") if self.stem_stride is None else ("name", "num_classes", "stem_stride")
        return {field: getattr(self, field) for field in fields}

    @property
    def classes(self) -> int:
        """num_classes, resolved."""
        return self.num_classes or 0

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an input."""
        return 3, self.height or DEFAULT_PX, self.width or DEFAULT_PX
