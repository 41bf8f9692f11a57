"""Timing protocol "timing/2": interleaved rounds until the ratios are known, on an injected clock. No torch here.

A *cell* is one thing to time (a layer in one phase). All cells of a group are measured in rounds; every round runs
each cell once, in a seeded random order, for a few samples. Whatever the machine does meanwhile then hits all of
them alike, and their ratios are taken round by round. A group ends as a whole, when every cell's ratio to its
reference is known well enough or the time is used up; no sample is dropped, whatever it says.

What ends a group is how wide the intervals are, never where they lie, and they are looked at after 6, 8, 11, 15, ...
rounds only. So stopping favours no result, and the intervals cover what they claim (a test holds them to it).
"timing/1" went on until each median by itself was known to 0.5 %, which a drifting machine never lets happen.

The *stopwatch* is the only thing that touches a device or a clock. Everything else here is logic that the tests run
on a simulated machine.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from bgcbench.measure.statistics import ROUNDS_OF_INTERVAL, Series, Summary, ratio_of_medians, summarise

PROTOCOL = "timing/2"


@dataclass(frozen=True)
class Rules:
    """Every constant of the protocol, written into each result file's settings.

    min_rounds stands above max_time_s, so that a cell whose single call takes seconds still has that many samples.
    target_half_width: half of the width of the 95 % interval of a cell's ratio to its reference, relative to that
    ratio, at which it is known. max_time_s is a row's share: a group may use its number of rows times that.
    slice_share is the part of that time which one cell may use in one round.
    """

    min_rounds: int = ROUNDS_OF_INTERVAL
    target_half_width: float = 0.05
    max_time_s: float = 10.0
    max_queue: int = 50
    slice_share: float = 1 / 24
    warmup_min_s: float = 0.2
    warmup_min_calls: int = 10
    warmup_tolerance: float = 0.01
    warmup_max_s: float = 0.3
    canary_tolerance: float = 0.02
    canary_redo: int = 0

    @classmethod
    def for_device(cls, device_type: str, *, quick: bool, max_time_s: float | None) -> Rules:
        """The protocol's defaults on a device. ``quick`` trades certainty for an answer in seconds, and a time that is
        asked for (``max_time_s``, a row) is used for certainty."""
        rules = cls(min_rounds=10, canary_redo=3, warmup_max_s=3.0) if device_type == "cuda" else cls()
        if quick:
            rules = replace(
                rules,
                min_rounds=1,
                max_time_s=1.5,
                warmup_min_s=0.02,
                warmup_min_calls=1,
                warmup_max_s=0.1,
                canary_redo=0,
            )
        return rules if max_time_s is None else replace(rules, max_time_s=max_time_s, target_half_width=0.02)


CellT = TypeVar("CellT")
CellT_contra = TypeVar("CellT_contra", contravariant=True)


class Stopwatch(Protocol[CellT_contra]):
    """The device's side of timing."""

    def sample(self, cell: CellT_contra, count: int, faults: list[int] | None = None) -> list[float]:
        """Seconds of each of ``count`` calls of ``cell``, in order; adds the page faults of each to ``faults``."""

    def canary(self) -> float:
        """Seconds of a fixed piece of work, the same all through the run."""

    def now(self) -> float:
        """Seconds on a clock that only moves forward."""


@dataclass
class Track(Generic[CellT]):
    """One cell's samples and where they came from. ``row`` ties the phases of one row together.

    ``estimate_s`` is what one call is expected to take; the first call's time will do to begin with. ``label`` is for
    people. reference: what the cell is compared with; itself, where the others are compared with it. Without one its
    median is what is to be known. faults: minor page faults of the samples' calls, empty where they are not counted.
    """

    row: str
    cell: CellT
    estimate_s: float = math.nan
    label: str = ""
    reference: Track[CellT] | None = None
    samples: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    discarded: list[float] = field(default_factory=list)
    discarded_rounds: list[int] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    failure: Exception | None = None
    converged: bool = False
    stop_reason: str = "running"

    def summary(self) -> Summary:
        """Summary of the samples; there must be some."""
        return summarise(self.samples, self.rounds)

    def half_width(self) -> float | None:
        """Of the 95 % interval of the ratio to the reference, or else of the median, relative to it; None where there
        are too few rounds for one."""
        if self.reference is None or not self.reference.samples:
            return self.summary().half_width
        over, under = (Series(track.samples, track.rounds) for track in (self.reference, self))
        return ratio_of_medians(over, under, paired=True).half_width

    def fail(self, failure: Exception) -> None:
        """Take the cell out of its group, with everything that would keep its memory alive."""
        self.failure = failure.with_traceback(None)
        self.stop_reason = "failed"
        self.cell = None  # type: ignore[assignment]

    def discard_round(self, number: int) -> None:
        """Move the samples of the last round, which is repeated, out of the summary; the track keeps them."""
        first = bisect.bisect_left(self.rounds, number)
        self.discarded += self.samples[first:]
        self.discarded_rounds += self.rounds[first:]
        del self.samples[first:], self.rounds[first:]


@dataclass
class Canary:
    """Readings of the fixed piece of work: one before the first round (the baseline), one after each round, and one
    more after each that was slow."""

    baseline_s: float = math.nan
    readings_s: list[float] = field(default_factory=list)
    slow_rounds: list[int] = field(default_factory=list)
    redone: int = 0


@dataclass(frozen=True)
class Progress:
    """The last event. ``round`` is 0 while warming up; ``round_done`` marks the end of a round."""

    track: Track[object] | None
    round: int
    round_done: bool
    elapsed_s: float
    left_s: float | None


class Group(Generic[CellT]):
    """Interleaved measurement of ``tracks``; iterate ``run()`` and look at the tracks whenever it yields.

    rng orders the rounds; stop() is asked between batches and ends the group at once, keeping what was measured.
    A cell that raises is taken out of the group and leaves the others running, those of its row too. What the tracks
    hold already, of a group that was stopped, is gone on with after its last whole round.
    """

    def __init__(
        self,
        tracks: Sequence[Track[CellT]],
        stopwatch: Stopwatch[CellT],
        rules: Rules,
        rng: random.Random,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tracks = list(tracks)
        self.stopwatch = stopwatch
        self.rules = rules
        self.rng = rng
        self.stop = stop
        self.canary = Canary()
        self.rounds = self._earlier = min((track.rounds[-1] for track in self.tracks if track.rounds), default=0)
        for track in self.tracks:
            track.discard_round(self.rounds + 1)
        self.interrupted = False
        self._started_s = 0.0
        self._round_s = 0.0
        self._next_look = rules.min_rounds

    def run(self) -> Iterator[Progress]:
        """Warm up, then measure rounds until the group is done. Yields after every batch and every round."""
        self._started_s = self.stopwatch.now()
        for track in self._alive():
            if self._stopping():
                return
            self._guarded(track, self._warm_up)
            yield self._progress(track)
        if self._stopping() or not self._alive():
            return
        if (baseline := self._read_canary(5)) is None:
            return
        self.canary.baseline_s = baseline
        self._started_s = self.stopwatch.now()
        redone, slow_before = 0, False
        while not self._finished():
            self.rounds += 1
            began = self.stopwatch.now()
            order = self._alive()
            self.rng.shuffle(order)
            for track in order:
                if self._stopping():
                    return
                if track.failure is None:
                    self._guarded(track, self._measure)
                    yield self._progress(track)
            slow_after = self._clock_is_slow()
            # A blip between two rounds is none of the second one's: after a slow edge the clock is read afresh.
            slow, slow_before = slow_before or slow_after, slow_after and self._clock_is_slow()
            if slow and redone < self.rules.canary_redo:
                # The clock itself was slow: do this round again and keep its samples apart.
                redone += 1
                self.canary.redone += 1
                for track in self.tracks:
                    track.discard_round(self.rounds)
                self.rounds -= 1
                continue
            if slow:
                self.canary.slow_rounds.append(self.rounds)
            redone = 0
            self._round_s = self.stopwatch.now() - began
            yield self._progress(None, round_done=True)

    def _alive(self) -> list[Track[CellT]]:
        return [track for track in self.tracks if track.failure is None]

    def _stopping(self) -> bool:
        if self.stop():
            self.interrupted = True
            for track in self._alive():
                track.stop_reason = "interrupted"
        return self.interrupted

    def _guarded(self, track: Track[CellT], work: Callable[[Track[CellT]], None]) -> None:
        try:
            work(track)
        except Exception as failure:  # noqa: BLE001 - whatever a layer raises becomes its phase's failure
            track.fail(failure)

    def _warm_up(self, track: Track[CellT]) -> None:
        """Call until the time has settled: two successive windows agree, within the rules' limits."""
        rules, began = self.rules, self.stopwatch.now()
        if track.estimate_s > rules.warmup_max_s:
            return  # the first call, which is no sample either, was longer than all of the warm-up
        spent, calls, previous, window = 0.0, 0, math.inf, 1
        while True:
            times = self.stopwatch.sample(track.cell, window)
            spent, calls = spent + sum(times), calls + len(times)
            current = statistics.median(times)
            track.estimate_s = current
            settled = abs(current - previous) <= rules.warmup_tolerance * previous
            if settled and spent >= rules.warmup_min_s and calls >= rules.warmup_min_calls:
                return
            # One more window of this size must fit, or the limit would be overrun by a slow cell's last call.
            if self.stopwatch.now() - began + window * current > rules.warmup_max_s or self.stop():
                return
            previous = current
            window = max(1, min(rules.max_queue, int(rules.warmup_min_s / 4 / max(current, 1e-9))))

    def _batch(self, track: Track[CellT]) -> int:
        """Samples a round: as many as fit the cell's slice of the time, at least 1 and at most the queue."""
        phases = sum(other.row == track.row for other in self.tracks)
        slice_s = self.rules.max_time_s * self.rules.slice_share / phases
        return max(1, min(self.rules.max_queue, int(slice_s / max(track.estimate_s, 1e-9))))

    def _measure(self, track: Track[CellT]) -> None:
        times = self.stopwatch.sample(track.cell, self._batch(track), track.faults)
        track.samples += times
        track.rounds += [self.rounds] * len(times)
        track.estimate_s = statistics.median(times)  # the next batch's size follows what was seen last

    def _read_canary(self, readings: int) -> float | None:
        """Median of some readings; if the device no longer answers, fail every row and return None."""
        try:
            return statistics.median(self.stopwatch.canary() for _ in range(readings))
        except Exception as failure:  # noqa: BLE001 - what ends the device ends its rows, not the run
            for track in self._alive():
                track.fail(failure)
            return None

    def _clock_is_slow(self) -> bool:
        """Read the canary at a round's edge."""
        if (reading := self._read_canary(3)) is None:
            return False
        self.canary.readings_s.append(reading)
        return reading > self.canary.baseline_s * (1 + self.rules.canary_tolerance)

    def _budget_s(self) -> float:
        return self.rules.max_time_s * len({track.row for track in self.tracks})

    def _finished(self) -> bool:
        alive = self._alive()
        if not alive:
            return True
        if self.rounds < self.rules.min_rounds:
            return False
        # A round that would end past the budget is not begun.
        is_last = self.stopwatch.now() - self._started_s + self._round_s > self._budget_s()
        if not is_last and self.rounds < self._next_look:
            return False
        self._next_look = math.ceil(self.rounds * 4 / 3)
        for track in alive:
            self._check_convergence(track)
        return is_last or all(track.converged for track in alive)

    def _check_convergence(self, track: Track[CellT]) -> None:
        """Record whether what is asked of the cell is known well enough and, if not, what is missing."""
        wanted, half_width = self.rules.target_half_width, track.half_width()
        track.converged = half_width is not None and half_width <= wanted
        if track.converged:
            track.stop_reason = "converged"
        elif half_width is None:
            found = len(set(track.rounds))
            track.stop_reason = f"max time: {found} rounds, {ROUNDS_OF_INTERVAL} wanted for an interval"
        else:
            what = "median" if track.reference is None else "ratio"
            track.stop_reason = f"max time: {what} known to {half_width:.1%}, {wanted:.0%} wanted"

    def _progress(self, track: Track[CellT] | None, round_done: bool = False) -> Progress:
        elapsed = self.stopwatch.now() - self._started_s
        left = None
        if self.rounds > self._earlier:
            floor = elapsed / (self.rounds - self._earlier) * max(0, self.rules.min_rounds - self.rounds)
            left = max(floor, self._budget_s() - elapsed)
        return Progress(track, self.rounds, round_done, elapsed, left)  # type: ignore[arg-type]
