"""``bgcbench profile``: what a convolution variant (Table 4 of the paper, done right) or a network costs here.

Configurations, and the plan of one layer, are pure Python, so that everything wrong with them is said before torch is
imported; that of a network is in :mod:`bgcbench.experiments.network_run`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import msgspec

from bgcbench.errors import ResultFileError, UsageError
from bgcbench.experiments.config import ConvertedNetwork, RunConfig, refuse_misfits
from bgcbench.experiments.options import (
    CHANNELS,
    GRID,
    MEASURE,
    NETWORK,
    SIZE,
    WORKLOAD,
    Option,
    is_shard,
    one_of,
    option,
    positive,
)
from bgcbench.measure.counts import Counts as Work
from bgcbench.measure.counts import count, paper_bytes
from bgcbench.results import Json
from bgcbench.results.rows import Counts, DistinctLayer, Memory, PaperRow, ProfileParams, ProfileRow, White
from bgcbench.specs import (
    ALGORITHMS,
    CUDA_ALGORITHMS,
    LAYOUTS,
    MEMORY,
    MODES,
    NETWORK_PHASES,
    PHASES,
    PLAIN_ALGORITHMS,
    POINTWISE_ALGORITHMS,
    PRECISIONS,
    RUNTIME,
    TRAINED_AND_DEPLOYED,
    VARIANTS,
    Choice,
    ConvSpec,
    check_choice,
    check_in_runtime,
    check_on_cpu,
)
from bgcbench.theory import paper
from bgcbench.theory.exact import white_error

# Fields that only say which rows there are: a resumed run may add to them.
GRID_FIELDS = ("variants", "groups", "ranks", "algorithm", "reference", "skip_invalid", "layers", "inputs", "seeds")


def _modes(field: str, value: str) -> None:
    """A check: some modes, each once."""
    names = value.split(",")
    for name in names:
        check_choice(field, name, MODES)
    if len(names) > len(set(names)):
        raise UsageError(f"--mode {value} has a mode twice; name each once")


@dataclass(frozen=True)
class MeasureConfig(RunConfig):
    """What every ``profile`` run depends on, of a layer or of a network; valid once constructed.

    Raises UsageError or ShapeError. None stands for a default that depends on the device. phases: None for
    USUAL_PHASES, and for the forward pass alone in a quick look.
    """

    groups: tuple[int, ...] = option(paper.GROUPS)
    precision: str = option("fp32", "fp64, fp32, tf32, bf16 or fp16.", everyday=True)
    quick: bool = option(False, "A look in seconds: the forward pass, few samples, no claim.")
    batch: int = option(1, "Images a call.", panel=WORKLOAD, everyday=True, check=positive)
    layout: str = option("nchw", "nchw, or nhwc (channels_last).", panel=MEASURE, check=one_of(LAYOUTS))
    mode: str = option(
        "eager",
        "eager, compile (torch.compile), graph (CUDA graphs) or onnxruntime (extra: onnx); several are compared.",
        panel=MEASURE,
        check=_modes,
    )
    algorithm: str = option(
        "auto",
        "Algorithm to run: BGC two_conv, concat, dense, split, matmul (1x1), triton (CUDA), or auto, the fastest; GC "
        "triton; LGC, FLGC masked, deployed; LR two_conv, dense, matmul (1x1); all measures each. In ONNX "
        "Runtime there is matrix, too.",
        panel=GRID,
        check=one_of(dict.fromkeys(("auto", "all", *ALGORITHMS, *PLAIN_ALGORITHMS))),
    )
    phases: tuple[str, ...] = option(
        None,
        "Of fwd, bwd, fwd_bwd; with --model of fwd, train_step.",
        panel=MEASURE,
        shown="all but bwd; with --quick fwd",
        check=one_of(PHASES, "phase"),
    )
    input_grad: bool = option(
        True, "The backward pass leaves the input's gradient out.", name="no-input-grad", panel=MEASURE
    )
    cache: str | None = option(
        None,
        "cold: overwrite the cache before every call. warm: do not.",
        panel=MEASURE,
        shown="cold on CUDA, warm on a CPU",
        check=one_of(("cold", "warm")),
    )
    memory: str | None = option(
        None,
        "kept: a CPU's tensors reuse freed memory, as most of a whole network's do. fresh: all of it comes anew from "
        "the system at each call, as in a script of one layer.",
        panel=MEASURE,
        shown="kept",
        check=one_of(MEMORY),
    )
    max_time_s: float | None = option(
        None,
        "Seconds of sampling a row, at most, for speed-ups known to 2 % instead of 5 %; 6 rounds (CUDA: 10) are "
        "measured in any case.",
        name="max-time",
        panel=MEASURE,
        shown="10",
    )
    reference: bool = option(True, "Leave the standard convolution out.", name="no-reference", panel=GRID)
    shard: str | None = option(
        None,
        "K/M: only part K of M of the rows, as for a batch queue's array job; bgcbench merge joins the parts.",
        panel=GRID,
        check=is_shard,
    )

    USUAL_PHASES: ClassVar[tuple[str, ...]] = ("fwd", "fwd_bwd")

    def __post_init__(self) -> None:
        if self.phases is None:
            object.__setattr__(self, "phases", ("fwd",) if self.quick else self.USUAL_PHASES)
        super().__post_init__()
        if self.max_time_s is not None and not 0 < self.max_time_s < float("inf"):
            raise UsageError(f"--max-time {self.max_time_s} must be a positive number of seconds")
        if not self.input_grad and self.phases == ("fwd",):
            raise UsageError("--no-input-grad changes the backward pass, and --phases fwd has none; add fwd_bwd")
        if self.device == "cpu":
            for mode in self.modes:
                check_on_cpu(self.precision, mode)
        if RUNTIME in self.modes:
            check_in_runtime(phases=self.phases, precision=self.precision, layout=self.layout)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that are compared."""
        return tuple(self.mode.split(","))

    @property
    def is_pointwise(self) -> bool:
        """Whether every convolution that is measured as a variant has a 1x1 kernel."""
        return False


@dataclass(frozen=True)
class ProfileConfig(MeasureConfig):
    """One layer to measure; without a shape it is that of the paper's Table 4."""

    batch: int = option(paper.WORKLOAD["batch"])
    in_channels: int = option(
        paper.WORKLOAD["in_channels"], "Input channels.", panel=WORKLOAD, shown="--channels", check=positive
    )
    out_channels: int = option(
        paper.WORKLOAD["out_channels"], "Output channels.", panel=WORKLOAD, shown="--channels", check=positive
    )
    kernel: int = option(
        paper.WORKLOAD["kernel"], "Kernel size; padded by (k - 1) // 2.", panel=WORKLOAD, check=positive
    )
    stride: int = option(paper.WORKLOAD["stride"], panel=WORKLOAD, check=positive)
    height: int = paper.WORKLOAD["height"]
    width: int = paper.WORKLOAD["width"]

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(CHANNELS, shown=str(paper.WORKLOAD["in_channels"])),
        dataclasses.replace(SIZE, help="Input height and width: 7 or 7x14.", shown=str(paper.WORKLOAD["height"])),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("height", self.height)
        positive("width", self.width)

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == 1

    @property
    def what(self) -> str:
        return f"conv{self.in_channels}x{self.out_channels}k{self.kernel}-{self.precision}-{self.layout}"


@dataclass(frozen=True)
class NetworkConfig(ConvertedNetwork, MeasureConfig):
    """One network to measure, dense and converted; valid once constructed (raises UsageError or ShapeError).

    layers adds each distinct convolution by itself.
    """

    model: str = option(
        "resnet50",
        "A whole network instead of a layer: resnet50, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any classification "
        "network of torchvision, or timm/NAME.",
    )
    batch: int = option(32)
    phases: tuple[str, ...] = option(None, check=one_of(NETWORK_PHASES, "phase"))
    layers: bool = option(
        False, "Also each distinct convolution by itself: where the time goes, and what would save some.", panel=NETWORK
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (dataclasses.replace(SIZE, shown="the network's own"),)
    USUAL_PHASES: ClassVar[tuple[str, ...]] = NETWORK_PHASES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input_grad:
            raise UsageError("--no-input-grad is for one layer; a network's images take no gradient")
        self._resolve_network()
        self._settle_plan()

    @property
    def is_pointwise(self) -> bool:
        return self.where == "1x1"

    @property
    def what(self) -> str:
        return f"{self.model.replace('/', '-')}-{self.precision}-{self.layout}"


def check_same_workload(stored: Mapping[str, Any], config: RunConfig, name: str) -> None:
    """Raise ResultFileError if ``config`` measures something else than the run in file ``name`` did.

    A field that the file does not have came later, and does by default what was done without it.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    check_same_fields({**defaults, **stored}, config.to_json(), config.FREE, name)


def check_same_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any], free: Collection[str], name: str) -> None:
    """Raise ResultFileError for the first of the ``wanted`` fields that is another one in file ``name``."""
    for field_name, given in wanted.items():
        value: Any = list(given) if isinstance(given, tuple) else given
        if field_name in (*GRID_FIELDS, *free, "device") or stored.get(field_name) == value:
            continue
        was, of = stored.get(field_name), ""
        if isinstance(value, Mapping) or isinstance(was, Mapping):  # plans: one convolution that differs is enough
            value, was = value or {}, was or {}
            entry = next(entry for entry in (*value, *was) if was.get(entry) != value.get(entry))
            was, value, of = was.get(entry), value.get(entry), f" of {entry}"
        raise ResultFileError(
            f"{name} cannot be resumed: its {field_name}{of} is {was} and {value} is asked for; "
            "leave the option out, or start a new file with --out"
        )


@dataclass(frozen=True)
class PlannedRow:
    """One row to measure: what is known of it before, 'interrupted', or 'invalid' with the reason.

    subject: what is measured, None where nothing is: a layer as it is in a configuration, or a network
    (bgcbench.experiments.profile_run.Subject).
    """

    row: ProfileRow
    subject: Any = None

    @property
    def key(self) -> str:
        return self.row.key

    @property
    def params(self) -> ProfileParams:
        return self.row.params

    @property
    def invalid(self) -> str | None:
        """Why there is nothing to measure."""
        return self.row.reason if self.row.status == "invalid" else None


class Layer(NamedTuple):
    """One convolution, measured as the configuration says."""

    config: ProfileConfig
    spec: ConvSpec
    counts: Work
    memory: Memory


class Wanted(NamedTuple):
    """What a row is asked to be."""

    choice: Choice
    algorithm: str = "auto"
    mode: str = "eager"

    def in_torch(self, variant: str) -> str:
        """The algorithm that layers of ``variant`` are built with: the one that is asked for where they have it, as not
        all of a plan do. In ONNX Runtime a plain one is made of it afterwards."""
        offered = VARIANTS[variant].algorithms
        if self.mode == RUNTIME:
            return "deployed" if offered == TRAINED_AND_DEPLOYED else "auto"
        return self.algorithm if self.algorithm in offered else "auto"

    @property
    def settled(self) -> str:
        """The algorithm that runs, 'auto' where it is found by measuring."""
        if self.choice.is_planned:
            return self.algorithm
        variant = VARIANTS[self.choice.variant]
        if self.mode == RUNTIME:
            return variant.plain[0] if len(variant.plain) == 1 else self.algorithm
        return variant.settled(self.algorithm)


def plan(config: ProfileConfig) -> list[PlannedRow]:
    """The rows of ``config`` in the order of the table: the standard convolution, then by N, then by rank.

    Raises ShapeError naming every N and rank that does not fit the channels, unless ``skip_invalid``.
    """
    channels, kernel = (config.in_channels, config.out_channels), config.kernel
    own = ConvSpec("standard", *channels, kernel, config.stride, (kernel - 1) // 2, bias=False)
    rows = [planned_layer(config, wanted, own) for wanted in wanted_rows(config)]
    if not config.skip_invalid:
        refuse_misfits(row.invalid for row in rows if row.invalid)
    if all(row.invalid for row in rows):
        raise UsageError("nothing to measure: --groups and --variants leave no valid row")
    return rows


def wanted_rows(config: MeasureConfig) -> list[Wanted]:
    """Every row that is asked for, the standard convolution first.

    Raises UsageError for an algorithm that none of them has.
    """
    choices = [Choice()] * config.reference + config.choices
    if config.algorithm not in ("auto", "all") and not any(
        config.algorithm in config.algorithms_of(choice, mode) for choice in choices for mode in config.modes
    ):
        raise UsageError(
            f"--algorithm {config.algorithm}: no variant asked for has it in this mode; add bgc, or leave it out"
        )
    return wanted_of(config, choices)


def wanted_of(config: MeasureConfig, choices: Collection[Choice]) -> list[Wanted]:
    """Each of ``choices`` in each mode and algorithm that is to be measured."""
    return [
        Wanted(choice, each, mode)
        for mode in config.modes
        for choice in choices
        for each in _algorithms(choice, mode, config)
    ]


def _algorithms(choice: Choice, mode: str, config: MeasureConfig) -> tuple[str, ...]:
    """The algorithms to measure a choice in; variants without several have their one.

    What a masked variant costs in training and when deployed are two answers, and both are given.
    """
    offered, algorithm = config.algorithms_of(choice, mode), config.algorithm
    if algorithm == "all" and mode != RUNTIME:
        on_cuda = config.device.startswith("cuda")  # what 'auto' will be is not known yet
        unfit = (() if on_cuda else CUDA_ALGORITHMS) + (() if config.is_pointwise else POINTWISE_ALGORITHMS)
        offered = tuple(each for each in offered if each not in unfit)
    if algorithm == "auto" and set(TRAINED_AND_DEPLOYED) <= set(offered):
        return TRAINED_AND_DEPLOYED
    if algorithm == "all":
        return offered if len(offered) > 1 else ("auto",)
    return (algorithm if algorithm in offered else "auto",)


def unmeasured(config: Any, wanted: Wanted, what: str, params: Json, **facts: Any) -> ProfileRow:
    """The row of ``what`` before it is measured, under the conditions of ``config``.

    config: a ProfileConfig or a NetworkConfig. params, facts: fields of the row's own.
    """
    conditions = {name: getattr(config, name) for name in ("batch", "height", "width", "precision", "layout")}
    key = f"{what}-b{config.batch}-{config.height}x{config.width}-{config.precision}-{config.layout}-{wanted.mode}"
    choice = wanted.choice
    conditions |= {"mode": wanted.mode, "algorithm": wanted.settled}
    unknown: Json = dict.fromkeys(("counts", "approximability", "memory", "paper"))
    return ProfileRow(
        key=key if wanted.algorithm == "auto" else f"{key}-{wanted.algorithm}",
        params=ProfileParams(**{**dataclasses.asdict(choice), **conditions, **params}),
        phases={},
        **{"status": "interrupted", "reason": "not measured yet", **unknown, **facts},
    )


def planned_layer(
    config: ProfileConfig, wanted: Wanted, own: ConvSpec, place: tuple[str, int, DistinctLayer] | None = None
) -> PlannedRow:
    """The row of a convolution as ``wanted``; own: the standard one, or the network's own, which may be grouped.

    place: of a network's convolution, (name of the network, number, what it is there).
    """
    choice, shape = wanted.choice, (config.in_channels, config.out_channels, own.kernel_positions)
    channels = {name: getattr(config, name) for name in ("in_channels", "out_channels", "kernel", "stride")}
    params: Json = {"groups": choice.reduction(*shape), **channels}
    what, layer = f"{choice.key}-{shape[0]}x{shape[1]}-k{config.kernel}-s{config.stride}", None
    if place is not None:
        model, number, layer = place
        what = f"{model}-layer{number}-{choice.key}"
        height, width = layer.kernel or (0, 0)
        params |= {"model": model, "layer": number} | ({"kernel_width": width} if width != height else {})
    if reason := choice.unfit(*shape):
        return PlannedRow(unmeasured(config, wanted, what, params, status="invalid", reason=reason))
    asked: Json = {} if choice.is_dense else dataclasses.asdict(choice)
    spec = dataclasses.replace(own, algorithm=wanted.in_torch(choice.variant), **asked)
    size, item = (config.height, config.width), PRECISIONS[config.precision]
    counts = count(spec, *size, batch=config.batch, precision=config.precision)
    facts = {
        "counts": msgspec.convert(counts, Counts, from_attributes=True),
        "approximability": White(white_error=white_error(*dataclasses.astuple(choice))),
        "layer": layer,
    }
    row = unmeasured(config, wanted, what, params, **facts)
    memory = Memory(
        paper_bytes=paper_bytes(spec, *size, config.batch, config.precision),
        params_bytes=counts.executed(row.params.algorithm).params * item,
        input_bytes=config.batch * config.in_channels * math.prod(size) * item,
        output_bytes=config.batch * config.out_channels * math.prod(spec.output_size(*size)) * item,
    )
    row = msgspec.structs.replace(row, memory=memory, paper=_printed(row.params))
    return PlannedRow(row, Layer(config, spec, counts, memory))


def _printed(params: ProfileParams) -> PaperRow | None:
    """What the paper prints for this row (Table 4), or None.

    Its memory column is in 4-byte numbers, so rows in other precisions are not its rows.
    """
    printed = paper.TABLE4.get((params.variant, params.groups))
    is_its_layer = all(getattr(params, name) == value for name, value in paper.WORKLOAD.items())
    if printed is None or not is_its_layer or params.precision not in ("fp32", "tf32"):
        return None
    return msgspec.convert(printed, PaperRow, from_attributes=True)


def row_seed(seed: int, key: str) -> int:
    """A row's own seed, so that adding rows never changes others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big")
