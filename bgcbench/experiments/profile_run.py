"""The run behind ``bgcbench profile``: from planned rows to measured ones, on an open device."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import statistics
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import msgspec
import torch
from torch import nn

from bgcbench.convs import VariantConv2d, build_conv
from bgcbench.convs.autotune import AutotunedConv2d, hastily
from bgcbench.deployment.workload import RuntimeFile, RuntimeWorkload, runtime_file
from bgcbench.experiments.base import Run, Session, Step, open_device
from bgcbench.experiments.plan import PlanConfig
from bgcbench.experiments.profile import Layer, MeasureConfig, PlannedRow, row_seed
from bgcbench.measure import ceilings, environment, timing
from bgcbench.measure.allocator import FAULT_S, memory_state, resolve_memory
from bgcbench.measure.counts import CallWork, call_work
from bgcbench.measure.device import (
    DEVICE_LOST,
    DTYPES,
    DeviceStopwatch,
    Failure,
    backend_state,
    compile_state,
    current,
    describe_failure,
    free_memory,
    frozen_heap,
    make_stopwatch,
    random_input,
)
from bgcbench.measure.environment import diagnose
from bgcbench.measure.load import Contention
from bgcbench.measure.memory import Peak, measure_peak
from bgcbench.measure.statistics import ROUNDS_OF_INTERVAL
from bgcbench.measure.workload import Cell, Like, Workload
from bgcbench.results import Document, rows
from bgcbench.results.rows import Canary, Derived, Discarded, Forms, Group, Phase, ProfileRow, Summary
from bgcbench.results.times import is_doubtful
from bgcbench.specs import NETWORK_PHASES, PHASES, PRECISIONS, RUNTIME

QUICK_S = 10.0  # of a quick look, of which one round at least is measured
# What an estimate takes things to take: what is done once, building a row twice, the shortest call, and the calls in
# which a layer finds its algorithm.
SET_UP_S, BUILD_S, LEAST_CALL_S, TUNING_CALLS = 1.5, 0.05, 2e-5, 6


def open_session(config: MeasureConfig) -> Session:
    """The device to measure; raises DeviceError where it is not there, UsageError for what it cannot do and for a
    package that a mode needs."""
    session = open_device(config, config.device, modes=config.modes, layout=config.layout)
    device = session.device.type
    rules = timing.Rules.for_device(device, quick=config.quick, max_time_s=config.max_time_s)
    session.settings |= {
        "deterministic": False,
        "mode": config.mode,
        "cache": config.cache or ("cold" if device == "cuda" else "warm"),
        "memory": resolve_memory(config.memory, device),
        "phases": list(config.phases),
        "input_grad": config.input_grad,
        "timing": {"protocol": timing.PROTOCOL, **dataclasses.asdict(rules)},
    }
    with backend_state(config.precision, config.threads):
        found = diagnose(session.device)
    session.warnings.extend(f"{what} {state}: {advice}" for what, state, advice in found if advice)
    return session


class Subject(ABC):
    """What one row measures: how it is built and run on a device, and what it must cost."""

    phases: tuple[str, ...]
    batch: int
    input_shape: tuple[int, ...]
    input_grad: bool
    mode: str
    algorithm: str  # as it was asked for
    quick_share: float = 1.0  # of a quick look's time; a network's calls are long
    _file: RuntimeFile | None = None
    held_bytes: int  # what stays in memory between calls

    @property
    @abstractmethod
    def is_tuned(self) -> bool:
        """Whether it has layers that find their algorithm by measuring."""

    @abstractmethod
    def module(self, session: Session) -> nn.Module:
        """A fresh module on the session's device; the same weights every time."""

    def workload(self, session: Session, x: torch.Tensor, like: Like | None) -> Workload:
        """The cells of a fresh module on ``x``."""
        if self.mode != RUNTIME:
            return self.in_torch(session, x, like)
        if self._file is None:  # written once: its algorithms were measured
            self._file = runtime_file(self.module(session), x, self.algorithm)
        return RuntimeWorkload(self._file, x)

    @abstractmethod
    def in_torch(self, session: Session, x: torch.Tensor, like: Like | None) -> Workload:
        """The same where torch runs it."""

    @abstractmethod
    def work(self, phase: str) -> CallWork:
        """Operations and least bytes of one call."""

    @abstractmethod
    def needed_bytes(self, phase: str) -> int:
        """The least memory that measuring a phase of this takes."""

    def way_out(self, phase: str) -> str:
        """What to try where ``phase`` raises an error, to follow the reason."""
        return ""


class LayerSubject(Subject):
    """One convolution of the plan."""

    def __init__(self, layer: Layer, row: ProfileRow) -> None:
        self.config, self.spec, self.counts, self.memory = layer
        self.key, self.mode, self.algorithm = row.key, row.params.mode, row.params.algorithm
        self.phases, self.batch, self.input_grad = self.config.phases, self.config.batch, self.config.input_grad
        self.input_shape = (self.batch, self.spec.in_channels, self.config.height, self.config.width)
        self.executed = self.counts.executed(self.algorithm)
        self.held_bytes = 2 * self.memory.params_bytes

    @property
    def is_tuned(self) -> bool:
        return self.algorithm == "auto"

    def module(self, session: Session) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, self.key))
            module: nn.Module = build_conv(self.spec)
        return on_device(module, self.config, session)

    def in_torch(self, session: Session, x: torch.Tensor, like: Like | None) -> Workload:
        return Workload(self.module(session), x, self.mode, like)

    def work(self, phase: str) -> CallWork:
        return call_work(self.executed, self.batch, phase, input_grad=self.input_grad)

    def needed_bytes(self, phase: str) -> int:
        """Input, weights and output, and their gradients where taken."""
        x, y = self.memory.input_bytes, self.memory.output_bytes
        held = x + y + self.counts.params * PRECISIONS[self.config.precision]
        return held if phase == "fwd" else 2 * held - (0 if self.input_grad else x)


def is_measured(module: nn.Module) -> TypeGuard[VariantConv2d]:
    """Whether it is a layer that finds its algorithm by measuring."""
    return isinstance(module, VariantConv2d) and module.algorithm == "auto"


def measured_forms(module: nn.Module) -> Forms:
    """How many layers run which algorithm, {"inference": {algorithm: layers}, ...}, where 'auto' has chosen it."""
    found: dict[str, Counter[str]] = {}
    for layer in module.modules():
        if is_measured(layer):
            for phase, algorithm in layer.chosen.items():
                found.setdefault(phase, Counter())[algorithm] += 1
    return {phase: dict(sorted(counted.items())) for phase, counted in sorted(found.items())}


def on_device(module: nn.Module, config: MeasureConfig | PlanConfig, session: Session) -> nn.Module:
    """``module`` on the session's device in the run's precision and layout."""
    module.to(device=session.device, dtype=DTYPES[config.precision])
    return module.to(memory_format=torch.channels_last) if config.layout == "nhwc" else module


@dataclass
class _Row:
    """A planned row with what has been measured of it.

    failures: of single phases; the others go on, and the row ends with its first failure's status.
    """

    planned: PlannedRow
    subject: Subject
    label: str  # in a line of progress
    first_call_s: dict[str, float] = field(default_factory=dict)
    host_s: dict[str, float | None] = field(default_factory=dict)
    peak: Peak | None = None
    like: Like | None = None
    forms: Forms = field(default_factory=dict)
    tracks: dict[str, timing.Track[Cell]] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    before: dict[str, Phase] = field(default_factory=dict)  # of a measurement that was doubtful
    kept: ProfileRow | None = None  # of an earlier run, which was stopped
    failures: dict[str, Failure] = field(default_factory=dict)
    interleaved: int | None = None
    alone: bool = False  # measured by itself because the group does not fit into memory together
    status: str = "interrupted"
    reason: str | None = "not measured yet"

    @property
    def is_dense(self) -> bool:
        return self.planned.params.variant == "standard"

    def is_reference_of(self, other: _Row) -> bool:
        """Whether it is the standard convolution, or dense network, that ``other`` is compared with."""
        ours, theirs = self.planned.params, other.planned.params
        return self.is_dense and (ours.mode, ours.layer) == (theirs.mode, theirs.layer)

    def is_network_of(self, other: _Row) -> bool:
        """Whether it is the dense network that ``other`` is a layer of."""
        ours, theirs = self.planned.params, other.planned.params
        return self.is_dense and ours.layer is None and theirs.layer is not None and ours.mode == theirs.mode

    @property
    def alive(self) -> list[str]:
        """The phases that have not failed."""
        return [phase for phase in self.subject.phases if phase not in self.failures]

    @property
    def fullest(self) -> str:
        """Of the phases that have not failed, the one that holds the most memory."""
        return max(self.alive, key=(*PHASES, *NETWORK_PHASES).index)

    def fail(self, found: Failure, *phases: str) -> None:
        """Note what became of ``phases``, by default of all that are alive; a row without any has ended."""
        self.failures |= dict.fromkeys(phases or self.alive, found)
        if not self.alive:
            self.end()

    def end(self) -> None:
        """The row's own status, now that nothing more is measured of it."""
        found = list(dict.fromkeys(self.failures.values()))
        if not found:
            self.status, self.reason = "ok", None
        elif len(found) == 1 and not self.alive:
            self.status, self.reason = found[0].status, found[0].reason
        else:
            texts = (f"{phase}: {failure.reason}" for phase, failure in self.failures.items())
            self.status, self.reason = found[0].status, "; ".join(texts)

    def result(self) -> ProfileRow:
        """The row with what has been measured so far."""
        memory = self.planned.row.memory
        if self.peak is not None and memory is not None:
            measured = {**vars(self.peak), "peak_delta_bytes": self.peak.delta_bytes}
            memory = msgspec.structs.replace(memory, **measured)
        return msgspec.structs.replace(
            self.planned.row,
            status=self.status,
            reason=self.reason,
            memory=memory,
            phases=dict(self.phases),
            failures=msgspec.convert(self.failures, dict[str, rows.Failure], from_attributes=True),
            forms=self.forms,
            interleaved=self.interleaved,
        )


@dataclass(frozen=True)
class Update(Step):
    """What is happening, and how far a group of rows is."""

    progress: timing.Progress | None = None


def subjects_of(planned: Sequence[PlannedRow]) -> dict[str, Subject]:
    """What the rows of a plan measure, by key."""
    return {
        each.key: LayerSubject(each.subject, each.row) if isinstance(each.subject, Layer) else each.subject
        for each in planned
        if not each.invalid
    }


class ProfileRun(Run[ProfileRow]):
    """One run of ``profile`` on an open session; iterate ``run()`` for its updates.

    kept: the rows of a resumed file by key; those that are done are not measured again, and those that are not in the
    plan stay as they are. interleaved: its groups. stop() is asked between batches of samples.
    """

    config: MeasureConfig
    planned: Sequence[PlannedRow]

    def __init__(
        self,
        config: MeasureConfig,
        session: Session,
        planned: Sequence[PlannedRow],
        *,
        interleaved: Sequence[Group] = (),
        **options: Any,
    ) -> None:
        super().__init__(config, session, planned, **options)
        self.rules = timing.Rules.for_device(session.device.type, quick=config.quick, max_time_s=config.max_time_s)
        self.conditions = session.conditions
        kept = self.known
        self.known = {each.key: each.row for each in planned if each.invalid} | kept
        self.interleaved = list(interleaved)
        self.warnings = list(session.warnings)
        self.subjects = subjects_of(planned)
        done = {key for key, row in self.known.items() if row.is_done}
        self.rows = [
            _Row(row, self.subjects[row.key], self._label(row.row), kept=kept.get(row.key))
            for row in planned
            if row.key in self.subjects and row.key not in done
        ]
        self._contention: Contention | None = None  # on a CPU, of the group that is measured
        self._began = 0.0
        self._inputs: dict[tuple[tuple[int, ...], bool], torch.Tensor] = {}

    def _label(self, row: ProfileRow) -> str:
        of = f" of {row.layer.label}" if row.layer else ""
        return row.params.choice.label + of + (f" in {row.params.mode}" if len(self.config.modes) > 1 else "")

    def take_into(self, document: Document) -> None:
        super().take_into(document)
        document.interleaved = tuple(self.interleaved)

    def estimated_s(self) -> float | None:
        """Roughly how long the run takes where nothing else runs, by a short look at what the device can do; None where
        it has no room for that.

        A call takes as long as its work does at the ceilings. Each cell is called for its first look and memory, its
        algorithm is chosen, it is warmed up, and rounds are measured until there are enough for an interval; a quick
        look then ends with its time, after one round at least.
        """
        config, rules, device = self.config, self.rules, self.session.device
        # One thread waits for no other, so that this is right where other processes run, too.
        try:
            with backend_state(config.precision, 1), current(device):
                stopwatch = make_stopwatch(device, cold=False)
                can = ceilings.measure_ceilings(stopwatch, DTYPES[config.precision], quick=True)
        except RuntimeError:  # which the rows will say
            return None
        if device.type == "cpu":
            can = dataclasses.replace(can, flops_per_s=can.flops_per_s * self.session.environment.cpu.threads)
        before, sampled, once = SET_UP_S, 0.0, 0.0
        for subject, params in ((row.subject, row.planned.params) for row in self.rows):
            calls = [max(can.floor_s(subject.work(phase)), LEAST_CALL_S) for phase in subject.phases]
            slice_s = rules.max_time_s * rules.slice_share / len(calls)
            before += BUILD_S + sum(calls)
            if subject.is_tuned:  # its algorithms, among them one that does a dense kernel's work
                before += TUNING_CALLS * sum(calls) + params.groups / 2 * calls[0]
            before += sum(rules.warmup_max_s for call in calls if call < rules.warmup_max_s)
            once += sum(calls)
            sampled += sum(max(call, min(slice_s, rules.max_queue * call)) for call in calls)
        sampled *= max(rules.min_rounds, ROUNDS_OF_INTERVAL)
        if config.quick and config.max_time_s is None:
            sampled = max(once, min(sampled, QUICK_S - before))
        return before + sampled

    def run(self) -> Iterator[Update]:
        """Measure every row; the last update holds the finished rows."""
        config, session = self.config, self.session
        if not self.rows:
            yield self._update("nothing left to measure", save=True)
            return
        compiling = compile_state() if "compile" in config.modes else contextlib.nullcontext()
        choosing = hastily() if config.quick else contextlib.nullcontext()
        state = backend_state(config.precision, config.threads)
        self._began = time.perf_counter()
        with memory_state(self.conditions.memory), frozen_heap(), state, current(session.device), compiling, choosing:
            yield self._update("measuring the device's ceilings")
            try:
                plain = make_stopwatch(session.device, cold=False)
                self.ceilings = ceilings.measure_ceilings(plain, DTYPES[config.precision], quick=config.quick)
                yield from self._look_at_each(plain)
                alive = [row for row in self.rows if row.status == "interrupted"]
                stopwatch = make_stopwatch(session.device, cold=self.conditions.cache == "cold") if alive else plain
            except RuntimeError as failure:  # of the device itself: the rows' own failures are theirs
                self._give_up(describe_failure(failure, session.device))
            else:
                groups = self._groups(alive)
                for number, group in enumerate(groups):
                    if self.stop():
                        break
                    yield from self._measure(group, stopwatch, self._rules(group, groups[number:]))
                yield from self._measure_again([group for group in groups if self._doubtful(group)], stopwatch)
        yield self._update("done", save=True)

    def _look_at_each(self, stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """Each row by itself: does it fit, how long is the first call, what does it hold at its highest."""
        for number, row in enumerate(self.rows, 1):
            if self.stop():
                return
            if row.status != "interrupted":  # the device was lost on an earlier one
                continue
            yield self._update(f"first call and memory of {row.label} ({number} of {len(self.rows)})")
            there = environment.available_bytes(self.session.device)
            for phase in row.alive:
                if (needed := row.subject.needed_bytes(phase)) > there:
                    reason = f"out of memory: at least {needed} bytes needed, {there} there; use a smaller --batch"
                    row.fail(Failure("oom", reason), phase)
            try:
                if row.alive:
                    self._first_look(row, stopwatch)
            except Exception as failure:  # noqa: BLE001 - a row that cannot run is a result, not the end of the run
                self._fail(row, failure)
            free_memory(self.session.device)

    def _first_look(self, row: _Row, stopwatch: DeviceStopwatch) -> None:
        """First call of every phase, and the peak of the one that holds the most memory."""
        workload = self._workload(row)
        # A slow layer takes one call for both. On CUDA a first call has the workspace of the library's search, and a
        # short one on a CPU what libraries set up once; both are measured again below.
        mode, on_cpu = row.subject.mode, self.session.device.type == "cpu"
        combined = on_cpu and mode == "eager"
        for phase in row.alive:
            try:
                self._first_call(row, workload, phase, stopwatch, peak=combined and phase == row.fullest)
            except Exception as failure:  # noqa: BLE001 - a phase that cannot run leaves the others
                self._fail(row, failure, phase)
                free_memory(self.session.device)
        row.like, row.forms = workload.like, measured_forms(workload.plain)
        if workload.forms:
            row.forms = {"inference": workload.forms}
        # What ONNX Runtime has taken from the system it keeps, so that a later call shows nothing.
        if mode != RUNTIME and row.alive and (row.peak is None or row.first_call_s[row.fullest] < 0.25):
            cell = workload.cell(row.fullest)
            row.peak = measure_peak(cell.eager or cell, self.session.device, passes=1 if self.config.quick else 2)

    def _first_call(self, row: _Row, workload: Workload, phase: str, stopwatch: DeviceStopwatch, *, peak: bool) -> None:
        """How long the first call of ``phase`` takes, on the host too; with its ``peak`` where that is asked for."""
        if any(is_measured(layer) for layer in workload.plain.modules()):
            # Finding the fastest algorithm takes many calls, and more memory than a step: neither is the row's.
            cell = workload.cell(phase)
            if isinstance(workload.plain, AutotunedConv2d) and workload.mode == "eager":
                with cell.context():
                    workload.plain.settle(workload.x)
            else:
                cell.once()
                cell.release()
        stopwatch.synchronize()
        began = time.perf_counter()
        cell = workload.cell(phase)
        try:
            if peak:
                row.peak = measure_peak(cell, self.session.device, passes=1)
            else:
                cell.once()
            stopwatch.synchronize()
            row.first_call_s[phase] = time.perf_counter() - began
        finally:
            cell.release()
        row.host_s[phase] = stopwatch.host_time(cell)

    def _fail(self, row: _Row, failure: BaseException, phase: str | None = None) -> None:
        """Note what became of a phase of ``row``, or of all of it; a lost device is the end of the others too."""
        found = describe_failure(failure, self.session.device)
        if found == DEVICE_LOST:
            self._give_up(found)
        elif phase is None:
            row.fail(found)
        else:
            more = row.subject.way_out(phase) if found.status == "error" else ""
            row.fail(Failure(found.status, found.reason + more), phase)

    def _give_up(self, found: Failure) -> None:
        """The rows that were not finished share the device's end."""
        for row in self.rows:
            if row.status == "interrupted":
                row.fail(found)

    def _workload(self, row: _Row) -> Workload:
        """The cells of ``row`` on its input; rows of the same shape share one tensor."""
        config, shape, gradient = self.config, row.subject.input_shape, row.subject.input_grad
        if (shape, gradient) not in self._inputs:
            seed = row_seed(config.seed, f"input-{shape}")
            x = random_input(shape, self.session.device, DTYPES[config.precision], config.layout, seed)
            self._inputs[shape, gradient] = x.requires_grad_(gradient)
        return row.subject.workload(self.session, self._inputs[shape, gradient], row.like)

    def _groups(self, rows: list[_Row]) -> list[list[_Row]]:
        """The network, or the layer, and each of its own layers, in one piece, or row by row if that does not fit."""
        planned: dict[int | None, list[_Row]] = {}
        for row in rows:
            planned.setdefault(row.planned.params.layer, []).append(row)
        groups: list[list[_Row]] = []
        for members in planned.values():
            deltas = [row.peak.delta_bytes for row in members if row.peak]
            # A captured graph keeps what it works on; an eager call gives it back.
            graphs = max(len(row.subject.phases) for row in members)
            held = graphs * sum(deltas) if "graph" in self.config.modes else max(deltas, default=0)
            held += sum(row.subject.held_bytes for row in members)
            if held > 0.8 * environment.available_bytes(self.session.device):
                for row in members:
                    row.alone = True
                    groups.append([row])
            else:
                groups.append(members)
        return groups

    def _rules(self, rows: list[_Row], left: list[list[_Row]]) -> timing.Rules:
        """Those of the device; in a quick look ``rows`` have their share of what is left of its time."""
        rules = self.rules
        if not self.config.quick or self.config.max_time_s is not None:
            return rules
        left_s = max(0.0, QUICK_S - (time.perf_counter() - self._began))
        shares = sum(row.subject.quick_share for group in left for row in group)
        return dataclasses.replace(rules, max_time_s=left_s * max(row.subject.quick_share for row in rows) / shares)

    def _measure(self, rows: list[_Row], stopwatch: DeviceStopwatch, rules: timing.Rules) -> Iterator[Update]:
        """One interleaved group, from building its layers to the summary of its rows."""
        config, device = self.config, self.session.device
        earlier = self._stopped(rows)
        entry = earlier or Group(
            id=1 + max((other.id for other in self.interleaved), default=0),
            max_time_s=rules.max_time_s,
            alone=any(row.alone for row in rows),
            rows=len(rows),
        )
        for row in rows:
            self._build(row, entry.id, stopped=earlier is not None)
        for row in rows:
            for dense in (other for other in rows if other.is_reference_of(row)):
                for phase, track in row.tracks.items():
                    track.reference = dense.tracks.get(phase)
        order = random.Random(row_seed(config.seed, f"order-{entry.id}"))
        tracks = [track for row in rows for track in row.tracks.values()]
        group = timing.Group(tracks, stopwatch, rules, order, self.stop)
        if device.type == "cpu":
            self._contention = Contention(self.session.environment.cpu.threads)
        self.interleaved = [other for other in self.interleaved if other is not entry] + [entry]
        for progress in group.run():
            if progress.track is not None and progress.track.failure is not None:
                free_memory(device)
            if progress.round_done:
                self._settle(rows, group, entry.canary, finished=False)
            doing = "warming up" if progress.round == 0 else f"round {progress.round}"
            yield self._update(doing, progress, save=progress.round_done)
        self._settle(rows, group, entry.canary, finished=not group.interrupted)
        for row in rows:
            row.tracks.clear()  # and with them the layers
        self._inputs.clear()
        free_memory(device)
        yield self._update("group done", save=True)

    def _doubtful(self, rows: Sequence[_Row]) -> list[str]:
        """The labels of those with a time that cannot be."""
        found = []
        for row in (row for row in rows if row.status == "ok"):
            dense = next((other.result() for other in rows if other.is_reference_of(row)), None)
            network = next((other.result() for other in self.rows if other.is_network_of(row)), None)
            if any(is_doubtful(row.result(), phase, dense, network) for phase in row.phases):
                found.append(row.label)
        return found

    def _measure_again(self, groups: list[list[_Row]], stopwatch: DeviceStopwatch) -> Iterator[Update]:
        """Measure ``groups`` once more, because of times that cannot be; the samples before are kept apart.

        What was measured before stands where this is stopped.
        """
        for number, group in enumerate(groups):
            if self.stop():
                return
            self.warnings.append(f"measured twice, because of times that cannot be: {', '.join(self._doubtful(group))}")
            again = [(row, row.interleaved) for row in group if row.status == "ok"]
            members = [row for row, _ in again]
            for row in members:
                row.before, row.status, row.reason = row.phases, "interrupted", "measured again"
                row.kept = None
            yield from self._measure(members, stopwatch, self._rules(members, groups[number:]))
            for row, interleaved in again:
                if row.status == "interrupted":
                    row.phases, row.interleaved = row.before, interleaved
                    row.end()
            yield self._update("group done", save=True)

    def _build(self, row: _Row, identity: int, *, stopped: bool) -> None:
        """A track, in group ``identity``, for each phase of ``row`` that is alive; stopped: with what it held then."""
        try:
            workload = self._workload(row)
        except Exception as failure:  # noqa: BLE001 - see _look_at_each
            self._fail(row, failure)
            return
        row.interleaved = identity
        # On a CPU a first call tells how long the next will take; elsewhere it has tuned or compiled.
        plain = self.session.device.type == "cpu" and row.subject.mode == "eager"
        for phase in row.alive:
            try:
                cell = workload.cell(phase)
                if not plain:  # a module built anew compiles anew; no warm-up should have to wait for that
                    cell.once()
                    cell.release()
            except Exception as failure:  # noqa: BLE001 - see _first_look
                self._fail(row, failure, phase)
                continue
            expected_s = row.first_call_s[phase] if plain else math.nan
            track = timing.Track(row.planned.key, cell, expected_s, f"{row.label} {phase}")
            if stopped and row.kept and phase in row.kept.phases:
                kept = row.kept.phases[phase]
                track.samples, track.rounds = list(kept.samples_s), list(kept.rounds)
                if kept.discarded:
                    track.discarded = list(kept.discarded.samples_s)
                    track.discarded_rounds = list(kept.discarded.rounds)
            row.tracks[phase] = track

    def _stopped(self, rows: Sequence[_Row]) -> Group | None:
        """The group that was stopped in an earlier run of these very rows, which is gone on with."""
        ids = {row.kept.interleaved if row.kept else None for row in rows}
        earlier = next((entry for entry in self.interleaved if ids == {entry.id}), None)
        return earlier if earlier is not None and earlier.rows == len(rows) else None

    def _settle(self, rows: list[_Row], group: timing.Group[Cell], before: Canary | None, *, finished: bool) -> None:
        """Bring the rows' statuses and the group's record up to date. before: of the rounds of an earlier run."""
        canary, before = group.canary, before or Canary()
        self.interleaved[-1] = msgspec.structs.replace(
            self.interleaved[-1],
            rounds=group.rounds,
            canary=Canary(
                baseline_s=canary.baseline_s if canary.readings_s else before.baseline_s,
                readings_s=before.readings_s + tuple(canary.readings_s),
                slow_rounds=before.slow_rounds + tuple(canary.slow_rounds),
                redone=before.redone + canary.redone,
            ),
        )
        for row in rows:
            if row.status != "interrupted":
                continue
            row.phases = {name: self._phase(row, name, track) for name, track in row.tracks.items() if track.samples}
            for phase, track in row.tracks.items():
                if track.failure is not None and phase not in row.failures:
                    self._fail(row, track.failure, phase)
            if row.status != "interrupted":
                continue
            if finished:
                row.end()
            else:
                row.reason = f"stopped in round {group.rounds}; --resume goes on"

    def _update(self, doing: str, progress: timing.Progress | None = None, *, save: bool = False) -> Update:
        if save:
            self.known |= {row.planned.key: row.result() for row in self.rows}
        return Update(doing, save=save, progress=progress)

    def _phase(self, row: _Row, phase: str, track: timing.Track[Cell]) -> Phase:
        summary, work = track.summary(), row.subject.work(phase)
        before = row.before.get(phase)
        host, median = row.host_s.get(phase), summary.median_s
        faults, kept = statistics.median(track.faults) if track.faults else None, self.conditions.memory == "kept"
        ends = (summary.ci95_s.low, summary.ci95_s.high) if summary.ci95_s else None
        return Phase(
            samples_s=tuple(track.samples),
            rounds=tuple(track.rounds),
            discarded=Discarded(
                samples_s=(before.samples_s if before else ()) + tuple(track.discarded),
                rounds=(before.rounds if before else ()) + tuple(track.discarded_rounds),
            ),
            first_call_s=row.first_call_s.get(phase),
            host_s=host,
            minor_faults_per_call=faults,
            converged=track.converged,
            stop_reason=track.stop_reason,
            summary=Summary(**{**vars(summary), "ci95_s": ends}),
            derived=Derived(
                images_per_s=row.subject.batch / median,
                tflops=work.flops / median / 1e12,
                gbytes_per_s=work.bytes / median / 1e9,
                roofline_fraction=self.ceilings.roofline_fraction(work, median) if self.ceilings else None,
                bound=self.ceilings.bound(work) if self.ceilings else None,
                # Without launch gaps in the way (a graph) the host is not what limits; in eager mode the two times
                # meet where it does.
                launch_bound=None if host is None or row.subject.mode == "graph" else host >= 0.9 * median,
                contended_cores=self._contention.cores if self._contention else None,
                # Memory that is to be kept and comes from the system all the same: another allocator, or not room.
                page_faults=None if faults is None or not kept else faults * FAULT_S > 0.01 * median,
            ),
        )
