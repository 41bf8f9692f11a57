"""``bgcbench profile``: what a convolution variant costs on this device (the paper's Table 4, done right).

The configuration and the plan are pure Python, so that everything wrong with them is said before torch is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.measure.counts import Counts, call_work, count, paper_bytes
from bgcbench.measure.timing import PROTOCOL, Group, Progress, Rules, Track
from bgcbench.results import DONE, Json
from bgcbench.specs import (
    ALGORITHMS,
    LAYERS,
    LAYOUTS,
    MODES,
    PHASES,
    PRECISIONS,
    VARIANTS,
    ConvSpec,
    check_choice,
    check_positive,
    indivisible,
    load_layer,
)
from bgcbench.theory import paper
from bgcbench.theory.exact import white_error

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bgcbench.measure.ceilings import Ceilings
    from bgcbench.measure.device import DeviceStopwatch
    from bgcbench.measure.memory import Peak
    from bgcbench.measure.workload import Cell, Workload

# Fields that only say which rows there are: a resumed run may add to them.
GRID_FIELDS = ("variants", "groups", "algorithm", "reference", "skip_invalid")


@dataclass(frozen=True)
class ProfileConfig:
    """Everything one ``profile`` run depends on; valid once constructed (raises UsageError or ShapeError)."""

    variants: tuple[str, ...] = ("standard", "gc", "bgc")
    groups: tuple[int, ...] = paper.GROUPS
    in_channels: int = paper.WORKLOAD["in_channels"]
    out_channels: int = paper.WORKLOAD["out_channels"]
    kernel: int = paper.WORKLOAD["kernel"]
    stride: int = paper.WORKLOAD["stride"]
    batch: int = paper.WORKLOAD["batch"]
    height: int = paper.WORKLOAD["height"]
    width: int = paper.WORKLOAD["width"]
    precision: str = "fp32"
    layout: str = "nchw"
    mode: str = "eager"
    algorithm: str = "auto"
    phases: tuple[str, ...] = ("fwd", "fwd_bwd")
    input_grad: bool = True
    cache: str | None = None
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    max_time_s: float | None = None
    quick: bool = False
    reference: bool = True
    skip_invalid: bool = False

    def __post_init__(self) -> None:
        for name in self.variants:
            check_choice("variant", name, VARIANTS if name in VARIANTS else LAYERS)
            if name not in LAYERS:
                load_layer(name)  # raises, saying which variants have a layer
        for what, values in (("variants", self.variants), ("groups", self.groups), ("phases", self.phases)):
            if not values:
                raise UsageError(f"--{what} is empty; name at least one")
        for value in self.groups:
            check_positive("groups", value)
        for name in ("in_channels", "out_channels", "kernel", "stride", "batch", "height", "width"):
            check_positive(name, getattr(self, name))
        choices: tuple[tuple[str, str | None, Iterable[str]], ...] = (
            ("precision", self.precision, PRECISIONS),
            ("layout", self.layout, LAYOUTS),
            ("mode", self.mode, MODES),
            ("algorithm", self.algorithm, ("auto", "all", *ALGORITHMS)),
            ("cache", self.cache, ("cold", "warm")),
            *(("phase", phase, PHASES) for phase in self.phases),
        )
        for what, chosen, names in choices:
            if chosen is not None:
                check_choice(what, chosen, names)
        self._check_measurement()

    def _check_measurement(self) -> None:
        """Values and combinations that have no meaning whatever the device is."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"unknown device '{self.device}': choose from auto, cpu, cuda, cuda:K")
        if self.threads is not None:
            check_positive("threads", self.threads)
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} must be 0 or positive")
        if self.max_time_s is not None and not 0 < self.max_time_s < float("inf"):
            raise UsageError(f"--max-time {self.max_time_s} must be a positive number of seconds")
        if not self.input_grad and self.phases == ("fwd",):
            raise UsageError("--no-input-grad changes the backward pass, and --phases fwd has none")
        if self.device == "cpu" and self.precision == "tf32":
            raise UsageError("--precision tf32 is a mode of CUDA devices; on a CPU use fp32 or bf16")
        if self.device == "cpu" and self.mode == "graph":
            raise UsageError("--mode graph replays CUDA graphs; on a CPU use eager or compile")

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ProfileConfig:
        """The configuration that a result file holds."""
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        return cls(**values)

    def to_json(self) -> Json:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def what(self) -> str:
        """The workload in a file name."""
        return f"conv{self.in_channels}x{self.out_channels}k{self.kernel}-{self.precision}-{self.layout}"


def check_same_workload(stored: Mapping[str, Any], config: ProfileConfig, name: str) -> None:
    """Raise ResultFileError if ``config`` measures something else than the run in file ``name`` did."""
    for field_name, value in config.to_json().items():
        if field_name in GRID_FIELDS or field_name == "device" or stored.get(field_name) == value:
            continue
        raise ResultFileError(
            f"{name} cannot be resumed: its {field_name} is {stored.get(field_name)} and {value} is asked for; "
            "leave the option out, or start a new file with --out"
        )


@dataclass(frozen=True)
class PlannedRow:
    """One row to measure: its stable key, its parameters, and its layer or the reason why there is none."""

    key: str
    params: Json
    spec: ConvSpec | None
    invalid: str | None = None


def plan(config: ProfileConfig) -> list[PlannedRow]:
    """The rows of ``config`` in the order of the table: by N, the standard convolution first.

    Raises ShapeError naming every N that does not divide the channels, unless ``skip_invalid``.
    """
    wanted = [("standard", 1)] if config.reference else []
    for groups in sorted(set(config.groups) - {1}):
        wanted += [(name, groups) for name in VARIANTS if name in config.variants and name != "standard"]
    rows: list[PlannedRow] = []
    for variant, groups in wanted:
        for algorithm in _forms(variant, config.algorithm):
            rows.append(_planned(config, variant, groups, algorithm))
    offenders = list(dict.fromkeys(row.invalid for row in rows if row.invalid))
    if offenders and not config.skip_invalid:
        raise ShapeError("; ".join(offenders) + "; drop these groups or use --skip-invalid")
    if not any(row.spec for row in rows):
        raise UsageError("nothing to measure: --groups and --variants leave no valid row")
    return rows


def _forms(variant: str, algorithm: str) -> tuple[str, ...]:
    """The algorithms to measure a variant in; variants without a choice have their one form."""
    offered = VARIANTS[variant].algorithms
    if algorithm == "all":
        return offered if len(offered) > 1 else ("auto",)
    return (algorithm if algorithm in offered else "auto",)


def _planned(config: ProfileConfig, variant: str, groups: int, algorithm: str) -> PlannedRow:
    params: Json = {
        "variant": variant,
        "groups": groups,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "kernel": config.kernel,
        "stride": config.stride,
        "batch": config.batch,
        "height": config.height,
        "width": config.width,
        "precision": config.precision,
        "layout": config.layout,
        "mode": config.mode,
        "algorithm": VARIANTS[variant].algorithms[0] if algorithm == "auto" else algorithm,
    }
    key = (
        f"{variant}-n{groups}-{config.in_channels}x{config.out_channels}-k{config.kernel}-s{config.stride}"
        f"-b{config.batch}-{config.height}x{config.width}-{config.precision}-{config.layout}-{config.mode}"
    )
    if algorithm != "auto":
        key += f"-{algorithm}"
    reason = indivisible(config.in_channels, config.out_channels, groups)
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


def estimated_bytes(config: ProfileConfig, spec: ConvSpec) -> int:
    """Least memory that measuring ``spec`` takes: input, weights and output, and their gradients where taken."""
    item = PRECISIONS[config.precision]
    counts = count(spec, config.height, config.width)
    out_height, out_width = spec.output_size(config.height, config.width)
    x = config.batch * config.in_channels * config.height * config.width
    y = config.batch * config.out_channels * out_height * out_width
    if config.phases == ("fwd",):
        return (x + y + counts.params) * item
    return ((2 if config.input_grad else 1) * x + 2 * y + 2 * counts.params) * item


def estimated_seconds(config: ProfileConfig, rows: Sequence[PlannedRow], device_type: str, threads: int) -> float:
    """A rough guess of the run's length, before anything is timed.

    The guess takes 30 GFLOP/s a CPU thread or 10 TFLOP/s on CUDA; each cell is called for its first look, its memory
    passes, its warm-up and its floor of rounds, and the group samples for at most its time a row.
    """
    rules = Rules.for_device(device_type, quick=config.quick, max_time_s=config.max_time_s)
    rate = 1e13 if device_type == "cuda" else 3e10 * threads
    specs = [row.spec for row in rows if row.spec is not None]
    calls = [
        call_work(count(spec, config.height, config.width), config.batch, phase, input_grad=config.input_grad).flops
        / rate
        for spec in specs
        for phase in config.phases
    ]
    looks = (2 if config.quick else 3) * sum(calls)
    warm_up = sum(0.0 if call > rules.warmup_max_s else rules.warmup_max_s for call in calls)
    sampling = max(rules.min_rounds * sum(calls), len(specs) * rules.max_time_s)
    return 5.0 + looks + warm_up + sampling


def row_seed(seed: int, key: str) -> int:
    """A row's own seed, so that adding rows never changes others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big")


@dataclass
class Session:
    """The device at hand and what is recorded about it."""

    device: torch.device
    environment: Json
    settings: Json
    rules: Rules
    cold: bool
    warnings: list[str] = field(default_factory=list)


def open_session(config: ProfileConfig) -> Session:
    """Find the device and describe it; nothing is computed on it yet.

    Raises DeviceError where the device asked for is not there, UsageError for what it cannot do.
    """
    from bgcbench.measure.device import backend_state, check_combination, resolve_device, tf32_state
    from bgcbench.measure.environment import describe_environment

    device, warning = resolve_device(config.device)
    check_combination(device, config.precision, config.mode)
    rules = Rules.for_device(device.type, quick=config.quick, max_time_s=config.max_time_s)
    cold = config.cache == "cold" if config.cache else device.type == "cuda"
    with backend_state(config.precision, config.threads):
        environment = describe_environment(device)
        settings: Json = {
            "seed": config.seed,
            "precision": config.precision,
            "layout": config.layout,
            "tf32": tf32_state(),
            "cudnn_benchmark": True,
            "deterministic": False,
            "mode": config.mode,
            "cache": "cold" if cold else "warm",
            "phases": list(config.phases),
            "input_grad": config.input_grad,
            "timing": {"protocol": PROTOCOL, **dataclasses.asdict(rules)},
        }
    return Session(device, environment, settings, rules, cold, [warning] if warning else [])


@dataclass
class _Row:
    """A planned row with what has been measured of it."""

    planned: PlannedRow
    spec: ConvSpec
    counts: Counts
    first_call_s: dict[str, float] = field(default_factory=dict)
    host_s: dict[str, float | None] = field(default_factory=dict)
    peak: Peak | None = None
    tracks: dict[str, Track[Cell]] = field(default_factory=dict)
    phases: dict[str, Json] = field(default_factory=dict)
    interleaved: int | None = None
    status: str = "interrupted"
    reason: str | None = "not measured yet"

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Update:
    """What the run has so far: the document's changing parts, and what is happening."""

    rows: list[Json]
    ceilings: Json | None
    interleaved: list[Json]
    warnings: list[str]
    doing: str
    progress: Progress | None
    save: bool


class ProfileRun:
    """One run of ``profile`` on an open session; iterate ``run()`` for its updates.

    kept: rows of a resumed file that need no measuring, by key. stop() is asked between batches of samples.
    """

    def __init__(
        self,
        config: ProfileConfig,
        session: Session,
        rows: Sequence[PlannedRow],
        *,
        kept: Mapping[str, Json] | None = None,
        interleaved: Sequence[Json] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.session, self.planned, self.stop = config, session, rows, stop
        self.kept = {key: row for key, row in (kept or {}).items() if row["status"] in DONE}
        self.interleaved = list(interleaved)
        self.warnings = list(session.warnings)
        self.ceilings: Ceilings | None = None
        self.rows = [
            _Row(row, row.spec, count(row.spec, config.height, config.width, batch=config.batch,
                                      precision=config.precision))
            for row in rows
            if row.spec is not None and row.key not in self.kept
        ]  # fmt: skip

    def run(self) -> Iterator[Update]:
        """Measure every row; the last update holds the finished rows."""
        from bgcbench.measure.ceilings import measure_ceilings
        from bgcbench.measure.device import DTYPES, backend_state, current, make_stopwatch

        config, session = self.config, self.session
        if not self.rows:
            yield self._update("nothing left to measure", save=True)
            return
        with backend_state(config.precision, config.threads), current(session.device):
            yield self._update("measuring the device's ceilings")
            plain = make_stopwatch(session.device, cold=False)
            self.ceilings = measure_ceilings(plain, DTYPES[config.precision], quick=config.quick)
            yield from self._look_at_each(plain)
            alive = [row for row in self.rows if row.status == "interrupted"]
            stopwatch = make_stopwatch(session.device, cold=session.cold)
            for group in self._groups(alive):
                if self.stop():
                    break
                yield from self._measure(group, stopwatch)
        yield self._update("done", save=True)

    def _look_at_each(self, stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """Each row by itself: does it fit, how long is the first call, what does it hold at its highest."""
        from bgcbench.measure.device import describe_failure, free_memory
        from bgcbench.measure.environment import available_bytes

        for number, row in enumerate(self.rows, 1):
            if self.stop():
                return
            yield self._update(f"first call and memory of {row.planned.key} ({number} of {len(self.rows)})")
            needed, there = estimated_bytes(self.config, row.spec), available_bytes(self.session.device)
            if needed > there:
                row.fail("oom", f"out of memory: at least {needed} bytes needed, {there} there; use a smaller --batch")
                continue
            try:
                self._first_look(row, stopwatch)
            except Exception as failure:  # noqa: BLE001 - a row that cannot run is a result, not the end of the run
                found = describe_failure(failure, self.session.device)
                row.fail(found.status, found.reason)
                if found.reason == "device lost":
                    self._give_up(found.reason)
                    return
            free_memory(self.session.device)

    def _first_look(self, row: _Row, stopwatch: DeviceStopwatch) -> None:
        from bgcbench.measure.memory import measure_peak

        """First call of every phase, and the peak of the one that holds the most memory."""
        workload = self._workload(row)
        fullest = max(self.config.phases, key=("fwd", "bwd", "fwd_bwd").index)
        for phase in self.config.phases:
            stopwatch.synchronize()
            began = time.perf_counter()
            cell = workload.cell(phase)
            if self.config.quick and phase == fullest:  # a quick look takes one call for both
                row.peak = measure_peak(cell.eager or cell, self.session.device, passes=1)
            else:
                cell.once()
            stopwatch.synchronize()
            row.first_call_s[phase] = time.perf_counter() - began
            cell.release()
            row.host_s[phase] = stopwatch.host_time(cell)
        if row.peak is None:
            cell = workload.cell(fullest)
            row.peak = measure_peak(cell.eager or cell, self.session.device)
            if not row.peak.agreed:
                self.warnings.append(f"{row.planned.key}: two memory passes differ")

    def _give_up(self, reason: str) -> None:
        for row in self.rows:
            if row.status == "interrupted":
                row.fail("error", reason)

    def _workload(self, row: _Row) -> Workload:
        from bgcbench.measure.workload import Workload

        return Workload(self._module(row), self._input(), self.config.mode)

    def _module(self, row: _Row) -> nn.Module:
        import torch

        from bgcbench.convs import build_conv
        from bgcbench.measure.device import DTYPES

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, row.planned.key))
            module: nn.Module = build_conv(row.spec)
        module.to(device=self.session.device, dtype=DTYPES[self.config.precision])
        return module.to(memory_format=torch.channels_last) if self.config.layout == "nhwc" else module

    def _input(self) -> torch.Tensor:
        """The input. All rows have the same shape and share one tensor."""
        from bgcbench.measure.device import DTYPES, random_input

        config = self.config
        if not hasattr(self, "_x"):
            shape = (config.batch, config.in_channels, config.height, config.width)
            seed = row_seed(config.seed, f"input-{shape}")
            self._x = random_input(shape, self.session.device, DTYPES[config.precision], config.layout, seed)
            self._x.requires_grad_(config.input_grad)
        return self._x

    def _groups(self, rows: list[_Row]) -> list[list[_Row]]:
        """All rows in one group, or, if their layers do not fit together, each by itself."""
        from bgcbench.measure.environment import available_bytes

        item = PRECISIONS[self.config.precision]
        layers = sum(2 * row.counts.params * item for row in rows)
        busiest = max((row.peak.delta_bytes for row in rows if row.peak), default=0)
        if rows and layers + busiest > 0.8 * available_bytes(self.session.device):
            self.warnings.append("the rows do not fit into memory together: measured one after the other, not paired")
            return [[row] for row in rows]
        return [rows] if rows else []

    def _measure(self, rows: list[_Row], stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """One interleaved group, from building its layers to the summary of its rows."""
        from bgcbench.measure.device import describe_failure, free_memory

        config, device = self.config, self.session.device
        identity = 1 + max((entry["id"] for entry in self.interleaved), default=0)
        tracks: list[Track[Cell]] = []
        for row in rows:
            try:
                workload = self._workload(row)
                # On a CPU a first call tells how long the next will take; elsewhere it has tuned or compiled.
                plain = device.type == "cpu" and config.mode == "eager"
                row.tracks = {
                    phase: Track(row.planned.key, workload.cell(phase), row.first_call_s[phase] if plain else math.nan)
                    for phase in config.phases
                }
            except Exception as failure:  # noqa: BLE001 - see _look_at_each
                found = describe_failure(failure, device)
                row.fail(found.status, found.reason)
                continue
            row.interleaved = identity
            tracks += row.tracks.values()
        order = random.Random(row_seed(config.seed, f"order-{identity}"))
        group = Group(tracks, stopwatch, self.session.rules, order, self.stop)
        entry: Json = {"id": identity}
        self.interleaved.append(entry)
        for progress in group.run():
            if progress.round_done:
                self._settle(rows, group, entry, finished=False)
            doing = "warming up" if progress.round == 0 else f"round {progress.round}"
            yield self._update(doing, progress, save=progress.round_done)
        self._settle(rows, group, entry, finished=not group.interrupted)
        slow = group.canary.slow_rounds
        if slow and not group.interrupted:
            tolerance = self.session.rules.canary_tolerance
            self.warnings.append(
                f"{len(slow)} of {group.rounds} rounds ran on a clock over {tolerance:.0%} slower than at the start"
            )
        for row in rows:
            row.tracks.clear()  # and with them the layers
        free_memory(device)
        yield self._update("group done", save=True)

    def _settle(self, rows: list[_Row], group: Group[Cell], entry: Json, *, finished: bool) -> None:
        """Bring the rows' statuses and the group's record up to date."""
        from bgcbench.measure.device import describe_failure

        canary = group.canary
        entry.update(
            rows=len(rows),
            rounds=group.rounds,
            canary={
                "baseline_s": canary.baseline_s if canary.readings_s else None,
                "readings_s": list(canary.readings_s),
                "slow_rounds": list(canary.slow_rounds),
                "redone": canary.redone,
            },
        )
        for row in rows:
            if row.status != "interrupted":
                continue
            row.phases = {name: self._phase(row, name, track) for name, track in row.tracks.items() if track.samples}
            failure = next((track.failure for track in row.tracks.values() if track.failure), None)
            if failure is not None:
                found = describe_failure(failure, self.session.device)
                row.fail(found.status, found.reason)
                if found.reason == "device lost":
                    self._give_up(found.reason)
            elif finished:
                row.status, row.reason = "ok", None
            else:
                row.reason = f"stopped in round {group.rounds}; --resume measures its group again"

    def _update(self, doing: str, progress: Progress | None = None, *, save: bool = False) -> Update:
        records = self._records() if save else []
        return Update(records, self._ceilings_json(), self.interleaved, self.warnings, doing, progress, save)

    def _ceilings_json(self) -> Json | None:
        if self.ceilings is None:
            return None
        return {**dataclasses.asdict(self.ceilings), "matmul_sizes": list(self.ceilings.matmul_sizes)}

    def _records(self) -> list[Json]:
        """Every row as the file holds it, in the plan's order; rows not begun yet are left out."""
        measured = {row.planned.key: row for row in self.rows}
        records = []
        for planned in self.planned:
            if planned.key in self.kept:
                records.append(self.kept[planned.key])
            elif planned.spec is None:
                records.append(invalid_record(planned))
            else:
                records.append(self._record(measured[planned.key]))
        return records

    def _record(self, row: _Row) -> Json:
        config, spec, params = self.config, row.spec, row.planned.params
        item = PRECISIONS[config.precision]
        out_height, out_width = spec.output_size(config.height, config.width)
        counts = {
            "params": row.counts.params,
            "macs": row.counts.macs,
            "adds": row.counts.adds,
            "paper_ops": row.counts.paper_ops,
            "bytes_min": row.counts.bytes_min,
        }
        memory: Json = {
            "paper_bytes": paper_bytes(spec, config.height, config.width, config.batch, config.precision),
            "params_bytes": row.counts.params * item,
            "input_bytes": config.batch * config.in_channels * config.height * config.width * item,
            "output_bytes": config.batch * config.out_channels * out_height * out_width * item,
            "baseline_bytes": row.peak.baseline_bytes if row.peak else None,
            "peak_bytes": row.peak.peak_bytes if row.peak else None,
            "peak_delta_bytes": row.peak.delta_bytes if row.peak else None,
            "method": row.peak.method if row.peak else "formula",
        }
        return {
            "key": row.planned.key,
            "params": params,
            "status": row.status,
            "reason": row.reason,
            "counts": counts,
            "approximability": {"white_error": white_error(spec.variant, spec.groups)},
            "memory": memory,
            "phases": row.phases,
            "paper": printed_figures(params),
            "interleaved": row.interleaved,
        }

    def _phase(self, row: _Row, phase: str, track: Track[Any]) -> Json:
        summary = track.summary()
        work = call_work(row.counts, self.config.batch, phase, input_grad=self.config.input_grad)
        host = row.host_s.get(phase)
        median = summary.median_s
        return {
            "samples_s": list(track.samples),
            "rounds": list(track.rounds),
            "discarded": {"samples_s": list(track.discarded), "rounds": list(track.discarded_rounds)},
            "first_call_s": row.first_call_s.get(phase),
            "host_s": host,
            "converged": track.converged,
            "stop_reason": track.stop_reason,
            "summary": {
                **dataclasses.asdict(summary),
                "ci95_s": [summary.ci95_s.low, summary.ci95_s.high] if summary.ci95_s else None,
            },
            "derived": {
                "images_per_s": self.config.batch / median,
                "tflops": work.flops / median / 1e12,
                "gbytes_per_s": work.bytes / median / 1e9,
                "roofline_fraction": self.ceilings.roofline_fraction(work, median) if self.ceilings else None,
                "bound": self.ceilings.bound(work) if self.ceilings else None,
                "launch_bound": None if host is None else host >= median,
            },
        }


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
