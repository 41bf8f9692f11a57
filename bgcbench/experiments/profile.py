"""``bgcbench profile``: what a convolution variant costs on this device (the paper's Table 4, done right).

The configuration and the plan are pure Python, so that everything wrong with them is said before torch is imported;
:mod:`bgcbench.experiments.profile_run` measures them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.options import (
    CHANNELS,
    GRID,
    MEASURE,
    SIZE,
    WORKLOAD,
    Option,
    one_of,
    option,
    positive,
)
from bgcbench.measure.counts import count
from bgcbench.measure.timing import Rules
from bgcbench.results import Json
from bgcbench.specs import (
    ALGORITHMS,
    CUDA_ALGORITHMS,
    LAYOUTS,
    MEMORY,
    MODES,
    PHASES,
    POINTWISE_ALGORITHMS,
    PRECISIONS,
    TRAINED_AND_DEPLOYED,
    VARIANTS,
    ConvSpec,
    check_on_cpu,
    unfit,
)
from bgcbench.theory import paper

# Fields that only say which rows there are: a resumed run may add to them.
GRID_FIELDS = ("variants", "groups", "algorithm", "reference", "skip_invalid", "layers", "inputs", "seeds")


@dataclass(frozen=True)
class MeasureConfig(RunConfig):
    """What every ``profile`` run depends on, of a layer or of a network; valid once constructed.

    Raises UsageError or ShapeError. None stands for a default that depends on the device.
    """

    groups: tuple[int, ...] = option(paper.GROUPS)
    precision: str = option("fp32", "fp64, fp32, tf32, bf16 or fp16.", everyday=True)
    quick: bool = option(False, "A look in seconds: few samples, no claim.")
    batch: int = option(1, "Images a call.", panel=WORKLOAD, everyday=True, check=positive)
    layout: str = option("nchw", "nchw, or nhwc (channels_last).", panel=MEASURE, check=one_of(LAYOUTS))
    mode: str = option(
        "eager", "eager, compile (torch.compile) or graph (CUDA graphs).", panel=MEASURE, check=one_of(MODES)
    )
    algorithm: str = option(
        "auto",
        "Form to run in: BGC two_conv, concat, dense, split, matmul (1x1), triton (CUDA), or auto, the fastest; GC "
        "triton; LGC, FLGC masked, deployed; all measures each.",
        panel=GRID,
        check=one_of(("auto", "all", *ALGORITHMS)),
    )
    phases: tuple[str, ...] = option(
        ("fwd",),
        "Of fwd, bwd, fwd_bwd; with --model of fwd, train_step.",
        panel=MEASURE,
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
        "Seconds of sampling a row; 6 rounds (CUDA: 10) are measured in any case.",
        name="max-time",
        panel=MEASURE,
        shown="10",
    )
    reference: bool = option(True, "Leave the standard convolution out.", name="no-reference", panel=GRID)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_time_s is not None and not 0 < self.max_time_s < float("inf"):
            raise UsageError(f"--max-time {self.max_time_s} must be a positive number of seconds")
        if not self.input_grad and self.phases == ("fwd",):
            raise UsageError("--no-input-grad changes the backward pass, and --phases fwd has none")
        if self.device == "cpu":
            check_on_cpu(self.precision, self.mode)

    @property
    def is_pointwise(self) -> bool:
        """Whether every convolution that is measured as a variant has a 1x1 kernel."""
        return False


@dataclass(frozen=True)
class ProfileConfig(MeasureConfig):
    """One layer to measure; without a shape it is that of the paper's Table 4."""

    batch: int = option(paper.WORKLOAD["batch"])
    phases: tuple[str, ...] = option(("fwd", "fwd_bwd"))
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
        """The workload in a file name."""
        return f"conv{self.in_channels}x{self.out_channels}k{self.kernel}-{self.precision}-{self.layout}"


def check_same_workload(stored: Mapping[str, Any], config: RunConfig, name: str) -> None:
    """Raise ResultFileError if ``config`` measures something else than the run in file ``name`` did."""
    check_same_fields(stored, config.to_json(), config.FREE, name)


def check_same_fields(stored: Mapping[str, Any], wanted: Mapping[str, Any], free: Collection[str], name: str) -> None:
    """Raise ResultFileError for the first of the ``wanted`` fields that is another one in file ``name``."""
    for field_name, given in wanted.items():
        value = list(given) if isinstance(given, tuple) else given
        if field_name in (*GRID_FIELDS, *free, "device") or stored.get(field_name) == value:
            continue
        raise ResultFileError(
            f"{name} cannot be resumed: its {field_name} is {stored.get(field_name)} and {value} is asked for; "
            "leave the option out, or start a new file with --out"
        )


@dataclass(frozen=True)
class PlannedRow:
    """One row to measure: its stable key, its parameters, and its layer or the reason why there is none.

    group: rows of one group are interleaved with one another. A row of a whole network has no spec.
    """

    key: str
    params: Json
    spec: ConvSpec | None
    invalid: str | None = None
    group: str = ""


def plan(config: ProfileConfig) -> list[PlannedRow]:
    """The rows of ``config`` in the order of the table: by N, the standard convolution first.

    Raises ShapeError naming every N that does not divide the channels, unless ``skip_invalid``.
    """
    rows = [_planned(config, variant, groups, form) for variant, groups, form in wanted_rows(config)]
    offenders = list(dict.fromkeys(row.invalid for row in rows if row.invalid))
    if offenders and not config.skip_invalid:
        raise ShapeError("; ".join(offenders) + "; drop these groups or use --skip-invalid")
    if not any(row.spec for row in rows):
        raise UsageError("nothing to measure: --groups and --variants leave no valid row")
    return rows


def wanted_rows(config: MeasureConfig) -> list[tuple[str, int, str]]:
    """(variant, N, algorithm) of every row that is asked for, by N, the standard convolution first.

    Raises UsageError for an algorithm that none of them has.
    """
    wanted = [("standard", 1)] if config.reference else []
    for groups in sorted(set(config.groups) - {1}):
        wanted += [(name, groups) for name in VARIANTS if name in config.variants and name != "standard"]
    if config.algorithm not in ("auto", "all") and not any(
        config.algorithm in VARIANTS[name].algorithms for name, _ in wanted
    ):
        raise UsageError(f"--algorithm {config.algorithm}: no variant asked for has it; add bgc, or leave it out")
    return [(name, groups, form) for name, groups in wanted for form in _forms(name, config)]


def _forms(variant: str, config: MeasureConfig) -> tuple[str, ...]:
    """The algorithms to measure a variant in; variants without a choice have their one form.

    What a masked variant costs in training and when deployed are two answers, and both are given.
    """
    offered, algorithm = VARIANTS[variant].algorithms, config.algorithm
    if algorithm == "all":
        on_cuda = config.device.startswith("cuda")  # what 'auto' will be is not known yet
        unfit = (() if on_cuda else CUDA_ALGORITHMS) + (() if config.is_pointwise else POINTWISE_ALGORITHMS)
        offered = tuple(form for form in offered if form not in unfit)
    if algorithm == "all" or (algorithm == "auto" and offered == TRAINED_AND_DEPLOYED):
        return offered if len(offered) > 1 else ("auto",)
    return (algorithm if algorithm in offered else "auto",)


def conditions(config: Any, variant: str, algorithm: str) -> Json:
    """The end of every row's parameters: the input's size, how it runs, and the form that runs.

    config: a ProfileConfig or a NetworkConfig.
    """
    names = ("batch", "height", "width", "precision", "layout", "mode")
    form = VARIANTS[variant].settled(algorithm)
    return {**{name: getattr(config, name) for name in names}, "algorithm": form}


def row_key(config: Any, what: str, algorithm: str) -> str:
    """A row's key: ``what`` it is, under which conditions, and the form where one was asked for."""
    size = f"b{config.batch}-{config.height}x{config.width}"
    key = f"{what}-{size}-{config.precision}-{config.layout}-{config.mode}"
    return key if algorithm == "auto" else f"{key}-{algorithm}"


def _planned(config: ProfileConfig, variant: str, groups: int, algorithm: str) -> PlannedRow:
    params: Json = {
        "variant": variant,
        "groups": groups,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "kernel": config.kernel,
        "stride": config.stride,
        **conditions(config, variant, algorithm),
    }
    shape = f"{config.in_channels}x{config.out_channels}-k{config.kernel}-s{config.stride}"
    key = row_key(config, f"{variant}-n{groups}-{shape}", algorithm)
    reason = unfit(variant, config.in_channels, config.out_channels, groups)
    if reason:
        return PlannedRow(key, params, None, reason)
    spec = ConvSpec(
        variant,
        config.in_channels,
        config.out_channels,
        config.kernel,
        config.stride,
        (config.kernel - 1) // 2,
        groups=groups,
        bias=False,
        algorithm=algorithm,
    )
    spec.output_size(config.height, config.width)
    return PlannedRow(key, params, spec)


def estimated_bytes(config: ProfileConfig, spec: ConvSpec, phase: str) -> int:
    """Least memory that ``phase`` of ``spec`` takes: input, weights and output, and their gradients where taken."""
    item = PRECISIONS[config.precision]
    counts = count(spec, config.height, config.width)
    out_height, out_width = spec.output_size(config.height, config.width)
    x = config.batch * config.in_channels * config.height * config.width
    y = config.batch * config.out_channels * out_height * out_width
    if phase == "fwd":
        return (x + y + counts.params) * item
    return ((2 if config.input_grad else 1) * x + 2 * y + 2 * counts.params) * item


def estimated_seconds(
    config: MeasureConfig, calls_flops: Sequence[Sequence[int]], device_type: str, threads: int
) -> float:
    """A rough guess of the run's length, before anything is timed.

    calls_flops: for each row the operations of one call in each phase. The guess takes 30 GFLOP/s a CPU thread or
    10 TFLOP/s on CUDA; each cell is called for its first look, its memory passes, its warm-up and its floor of rounds,
    and the group samples for at most its time a row.
    """
    rules = Rules.for_device(device_type, quick=config.quick, max_time_s=config.max_time_s)
    rate = 1e13 if device_type == "cuda" else 3e10 * threads
    calls = [flops / rate for row in calls_flops for flops in row]
    looks = (2 if config.quick else 3) * sum(calls)
    warm_up = sum(0.0 if call > rules.warmup_max_s else rules.warmup_max_s for call in calls)
    sampling = max(rules.min_rounds * sum(calls), len(calls_flops) * rules.max_time_s)
    return 5.0 + looks + warm_up + sampling


def row_seed(seed: int, key: str) -> int:
    """A row's own seed, so that adding rows never changes others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big")


def invalid_record(planned: PlannedRow) -> Json:
    """The row of a layer that does not exist: its parameters and the reason."""
    return {
        "key": planned.key,
        "params": planned.params,
        "status": "invalid",
        "reason": planned.invalid,
        "counts": None,
        "approximability": None,
        "memory": None,
        "phases": {},
        "paper": None,
        "interleaved": None,
    }


def printed_figures(params: Mapping[str, Any]) -> Json | None:
    """What the paper prints for this row (Table 4), or None.

    Its memory column is in 4-byte numbers, so rows in other precisions are not its rows.
    """
    if params["precision"] not in ("fp32", "tf32"):
        return None
    if any(params[name] != value for name, value in paper.WORKLOAD.items()):
        return None
    printed = paper.TABLE4.get((params["variant"], params["groups"]))
    return None if printed is None else dataclasses.asdict(printed)
