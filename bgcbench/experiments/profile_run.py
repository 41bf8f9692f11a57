"""The run behind ``bgcbench profile``: from planned rows to measured ones, on an open device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bgcbench.convs import build_conv
from bgcbench.experiments.profile import (
    PlannedRow,
    ProfileConfig,
    estimated_bytes,
    invalid_record,
    printed_figures,
    row_seed,
)
from bgcbench.measure import ceilings, environment
from bgcbench.measure.ceilings import Ceilings
from bgcbench.measure.counts import Counts, call_work, count, paper_bytes
from bgcbench.measure.device import (
    DEVICE_LOST,
    DTYPES,
    DeviceStopwatch,
    Failure,
    backend_state,
    check_combination,
    compile_state,
    current,
    describe_failure,
    free_memory,
    make_stopwatch,
    random_input,
    resolve_device,
    tf32_state,
)
from bgcbench.measure.memory import Peak, measure_peak
from bgcbench.measure.timing import PROTOCOL, Group, Progress, Rules, Track
from bgcbench.measure.workload import Cell, Like, Workload
from bgcbench.results import DONE, Json
from bgcbench.specs import PHASES, PRECISIONS, VARIANTS, ConvSpec
from bgcbench.theory.exact import white_error


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
    device, warning = resolve_device(config.device)
    check_combination(device, config.precision, config.mode)
    rules = Rules.for_device(device.type, quick=config.quick, max_time_s=config.max_time_s)
    cold = config.cache == "cold" if config.cache else device.type == "cuda"
    with backend_state(config.precision, config.threads):
        described = environment.describe_environment(device)
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
    return Session(device, described, settings, rules, cold, [warning] if warning else [])


@dataclass
class _Row:
    """A planned row with what has been measured of it."""

    planned: PlannedRow
    spec: ConvSpec
    counts: Counts
    first_call_s: dict[str, float] = field(default_factory=dict)
    host_s: dict[str, float | None] = field(default_factory=dict)
    peak: Peak | None = None
    like: Like | None = None
    tracks: dict[str, Track[Cell]] = field(default_factory=dict)
    phases: dict[str, Json] = field(default_factory=dict)
    interleaved: int | None = None
    status: str = "interrupted"
    reason: str | None = "not measured yet"

    @property
    def label(self) -> str:
        """The row for people: "BGC N=4"."""
        return f"{VARIANTS[self.spec.variant].label} N={self.spec.groups}"

    def fail(self, found: Failure) -> None:
        self.status, self.reason = found.status, found.reason


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

    kept: the rows of a resumed file by key; those that are done are not measured again, and those that are not in the
    plan stay as they are. stop() is asked between batches of samples.
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
        self.stored = dict(kept or {})
        self.kept = {key: row for key, row in self.stored.items() if row["status"] in DONE}
        self.interleaved = list(interleaved)
        self.warnings = list(session.warnings)
        self.ceilings: Ceilings | None = None
        self.rows = [
            _Row(row, row.spec, self._count(row.spec))
            for row in rows
            if row.spec is not None and row.key not in self.kept
        ]

    def _count(self, spec: ConvSpec) -> Counts:
        config = self.config
        return count(spec, config.height, config.width, batch=config.batch, precision=config.precision)

    def run(self) -> Iterator[Update]:
        """Measure every row; the last update holds the finished rows."""
        config, session = self.config, self.session
        if not self.rows:
            yield self._update("nothing left to measure", save=True)
            return
        compiling = compile_state() if config.mode == "compile" else contextlib.nullcontext()
        with backend_state(config.precision, config.threads), current(session.device), compiling:
            yield self._update("measuring the device's ceilings")
            try:
                plain = make_stopwatch(session.device, cold=False)
                self.ceilings = ceilings.measure_ceilings(plain, DTYPES[config.precision], quick=config.quick)
                yield from self._look_at_each(plain)
                alive = [row for row in self.rows if row.status == "interrupted"]
                stopwatch = make_stopwatch(session.device, cold=session.cold) if alive else plain
            except RuntimeError as failure:  # of the device itself: the rows' own failures are theirs
                self._give_up(describe_failure(failure, session.device))
                alive, stopwatch = [], None
            for group in self._groups(alive):
                if self.stop() or stopwatch is None:
                    break
                yield from self._measure(group, stopwatch)
        yield self._update("done", save=True)

    def _look_at_each(self, stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """Each row by itself: does it fit, how long is the first call, what does it hold at its highest."""
        for number, row in enumerate(self.rows, 1):
            if self.stop():
                return
            if row.status != "interrupted":  # the device was lost on an earlier one
                continue
            yield self._update(f"first call and memory of {row.label} ({number} of {len(self.rows)})")
            needed, there = estimated_bytes(self.config, row.spec), environment.available_bytes(self.session.device)
            if needed > there:
                reason = f"out of memory: at least {needed} bytes needed, {there} there; use a smaller --batch"
                row.fail(Failure("oom", reason))
                continue
            try:
                self._first_look(row, stopwatch)
            except Exception as failure:  # noqa: BLE001 - a row that cannot run is a result, not the end of the run
                self._fail(row, failure)
            free_memory(self.session.device)

    def _first_look(self, row: _Row, stopwatch: DeviceStopwatch) -> None:
        """First call of every phase, and the peak of the one that holds the most memory."""
        workload = self._workload(row)
        fullest = max(self.config.phases, key=PHASES.index)
        # A quick look at a slow layer takes one call for both. On CUDA a first call has the workspace of the library's
        # search, and a short one on a CPU what libraries set up once; both are measured again below.
        combined = self.config.quick and self.session.device.type == "cpu" and self.config.mode == "eager"
        for phase in self.config.phases:
            stopwatch.synchronize()
            began = time.perf_counter()
            cell = workload.cell(phase)
            if combined and phase == fullest:
                row.peak = measure_peak(cell, self.session.device, passes=1)
            else:
                cell.once()
            stopwatch.synchronize()
            row.first_call_s[phase] = time.perf_counter() - began
            cell.release()
            row.host_s[phase] = stopwatch.host_time(cell)
        row.like = workload.like
        if row.peak is None or row.first_call_s[fullest] < 0.25:
            cell = workload.cell(fullest)
            row.peak = measure_peak(cell.eager or cell, self.session.device, passes=1 if self.config.quick else 2)
            if not row.peak.agreed:
                self.warnings.append(f"{row.planned.key}: two memory passes differ")

    def _fail(self, row: _Row, failure: BaseException) -> None:
        """Give ``row`` its status; a lost device is the end of the others too."""
        found = describe_failure(failure, self.session.device)
        row.fail(found)
        if found == DEVICE_LOST:
            self._give_up(found)

    def _give_up(self, found: Failure) -> None:
        """The rows that were not finished share the device's end."""
        for row in self.rows:
            if row.status == "interrupted":
                row.fail(found)

    def _workload(self, row: _Row) -> Workload:
        return Workload(self._module(row), self._input, self.config.mode, row.like)

    def _module(self, row: _Row) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, row.planned.key))
            module: nn.Module = build_conv(row.spec)
        module.to(device=self.session.device, dtype=DTYPES[self.config.precision])
        return module.to(memory_format=torch.channels_last) if self.config.layout == "nhwc" else module

    @functools.cached_property
    def _input(self) -> torch.Tensor:
        """The input. All rows have the same shape and share one tensor."""
        config = self.config
        shape = (config.batch, config.in_channels, config.height, config.width)
        seed = row_seed(config.seed, f"input-{shape}")
        x = random_input(shape, self.session.device, DTYPES[config.precision], config.layout, seed)
        return x.requires_grad_(config.input_grad)

    def _groups(self, rows: list[_Row]) -> list[list[_Row]]:
        """All rows in one group, or, if their layers do not fit together, each by itself."""
        item = PRECISIONS[self.config.precision]
        layers = sum(2 * row.counts.params * item for row in rows)
        deltas = [row.peak.delta_bytes for row in rows if row.peak]
        # A captured graph keeps what it works on; an eager call gives it back.
        held = len(self.config.phases) * sum(deltas) if self.config.mode == "graph" else max(deltas, default=0)
        if rows and layers + held > 0.8 * environment.available_bytes(self.session.device):
            self.warnings.append("the rows do not fit into memory together: measured one after the other, not paired")
            return [[row] for row in rows]
        return [rows] if rows else []

    def _measure(self, rows: list[_Row], stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """One interleaved group, from building its layers to the summary of its rows."""
        config, device = self.config, self.session.device
        identity = 1 + max((entry["id"] for entry in self.interleaved), default=0)
        tracks: list[Track[Cell]] = []
        for row in rows:
            try:
                workload = self._workload(row)
                # On a CPU a first call tells how long the next will take; elsewhere it has tuned or compiled.
                plain = device.type == "cpu" and config.mode == "eager"
                for phase in config.phases:
                    cell = workload.cell(phase)
                    if not plain:  # a module built anew compiles anew; no warm-up should have to wait for that
                        cell.once()
                        cell.release()
                    expected_s = row.first_call_s[phase] if plain else math.nan
                    row.tracks[phase] = Track(row.planned.key, cell, expected_s, f"{row.label} {phase}")
            except Exception as failure:  # noqa: BLE001 - see _look_at_each
                row.tracks.clear()
                self._fail(row, failure)
                continue
            row.interleaved = identity
            tracks += row.tracks.values()
        order = random.Random(row_seed(config.seed, f"order-{identity}"))
        group = Group(tracks, stopwatch, self.session.rules, order, self.stop)
        entry: Json = {"id": identity}
        self.interleaved.append(entry)
        for progress in group.run():
            if progress.track is not None and progress.track.failure is not None:
                free_memory(device)
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
                self._fail(row, failure)
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
        """Every row as the file holds it, in the plan's order; rows not begun yet are interrupted ones."""
        measured = {row.planned.key: row for row in self.rows}
        planned_keys = {planned.key for planned in self.planned}
        records = [row for key, row in self.stored.items() if key not in planned_keys]
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
                # Without launch gaps in the way (a graph) the host is not what limits; in eager mode the two times
                # meet where it does.
                "launch_bound": None if host is None or self.config.mode == "graph" else host >= 0.9 * median,
            },
        }
