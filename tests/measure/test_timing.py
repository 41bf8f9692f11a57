"""The protocol's logic on a simulated machine: no device, no sleeping."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from bgcbench.measure.statistics import Series, ratio_of_medians
from bgcbench.measure.timing import Group, Rules, Track


@dataclass
class Machine:
    """A stopwatch whose clock moves by what it measures. ``speed(now)`` slows everything; noise is multiplicative."""

    cost: dict[str, float]
    noise: float = 0.0
    speed: Callable[[float], float] = lambda now: 1.0
    seed: int = 0
    clock: float = 0.0
    calls: list[tuple[str, int]] = field(default_factory=list)
    fail: dict[str, Exception] = field(default_factory=dict)
    fail_after: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def sample(self, cell: str, count: int, faults: list[int] | None = None) -> list[float]:
        self.calls.append((cell, count))
        if cell in self.fail and sum(name == cell for name, _ in self.calls) > self.fail_after:
            raise self.fail[cell]
        return [self._spend(self.cost[cell]) for _ in range(count)]

    def canary(self) -> float:
        return self._spend(0.001, quiet=True)

    def now(self) -> float:
        return self.clock

    def _spend(self, seconds: float, quiet: bool = False) -> float:
        noise = 0.0 if quiet else abs(self.draw.gauss(0, self.noise))
        spent = seconds * self.speed(self.clock) * (1 + noise)
        self.clock += spent
        return spent


def group_of(machine: Machine, rules: Rules, cells: Sequence[str] | None = None, **options: object) -> Group[str]:
    tracks = [Track(cell.split(":")[0], cell) for cell in cells or machine.cost]
    for track in tracks:
        track.reference = next((other for other in tracks if other.row == "dense"), None)
    return Group(tracks, machine, rules, random.Random(1), **options)  # type: ignore[arg-type]


def finish(group: Group[str]) -> dict[str, Track[str]]:
    names = [track.cell for track in group.tracks]
    for _ in group.run():
        pass
    return dict(zip(names, group.tracks, strict=True))


FAST = Rules(warmup_min_s=0.01, warmup_max_s=0.5)


def test_quiet_cells_converge_after_the_floor_of_rounds() -> None:
    group = group_of(Machine({"dense": 0.001, "b": 0.002}, noise=0.001), FAST)
    tracks = finish(group)
    assert group.rounds == FAST.min_rounds
    for track in tracks.values():
        assert track.converged
        assert track.stop_reason == "converged"


def test_what_must_be_known_is_the_ratio_to_the_reference_and_not_the_median() -> None:
    """On a machine that becomes slower and slower no median is known to 5 %, and ratios are."""
    for cells, ends in (({"dense": 0.05, "a": 0.02}, True), ({"a": 0.05, "b": 0.02}, False)):
        machine = Machine(cells, noise=0.005)
        machine.speed = lambda now: 1 + 0.03 * now
        group = group_of(machine, Rules(max_time_s=12.0, warmup_max_s=0.1))
        tracks = finish(group)
        assert all(track.converged is ends for track in tracks.values())
        assert all(track.summary().half_width > 0.05 for track in tracks.values())
        assert (machine.clock < 20.0) is ends  # of 24
    assert tracks["a"].stop_reason.startswith("max time: median known to")


def test_what_is_compared_with_a_reference_that_fails_is_to_be_known_by_itself() -> None:
    machine = Machine({"dense": 0.01, "a": 0.01}, noise=0.001, fail={"dense": MemoryError("no")})
    tracks = finish(group_of(machine, FAST))
    assert tracks["a"].converged
    assert tracks["dense"].stop_reason == "failed"


def test_the_wanted_width_decides_when_a_group_ends() -> None:
    rounds = []
    for width in (0.05, 0.02):
        rules = Rules(max_time_s=100.0, warmup_max_s=0.1, target_half_width=width, max_queue=1)
        group = group_of(Machine({"dense": 0.05, "a": 0.02}, noise=0.06), rules)
        tracks = finish(group)
        assert tracks["a"].half_width() <= width
        rounds.append(group.rounds)
    assert 6 < rounds[0] < rounds[1]


def test_stopping_when_the_intervals_are_narrow_leaves_them_honest() -> None:
    """At the worst noise for it: where it is luck whether a group ends after 6 rounds or after 20."""
    missed, tries, rounds = 0, 120, []
    for seed in range(tries):
        machine = Machine({"dense": 0.02, "a": 0.01}, noise=0.06, seed=seed)
        group = group_of(machine, Rules(max_time_s=100.0, warmup_max_s=0.1, max_queue=1))
        dense, a = (Series(track.samples, track.rounds) for track in finish(group).values())
        interval = ratio_of_medians(dense, a, paired=True).ci95
        missed += not interval.low <= 2.0 <= interval.high
        rounds.append(group.rounds)
    assert len(set(rounds)) > 3
    assert missed <= 0.05 * tries


def test_a_group_ends_as_a_whole_when_its_last_cell_is_known() -> None:
    group = group_of(Machine({"quiet": 0.001, "loud": 0.001}), FAST)
    machine = group.stopwatch
    quiet = machine.sample
    draw = random.Random(4)

    def louder(cell: str, count: int, *_: object) -> list[float]:
        times = quiet(cell, count)
        return [t * (1 + draw.uniform(0, 1)) for t in times] if cell == "loud" else times

    machine.sample = louder  # type: ignore[method-assign]
    tracks = finish(group)
    assert group.rounds > FAST.min_rounds
    assert set(tracks["quiet"].rounds) == set(tracks["loud"].rounds) == set(range(1, group.rounds + 1))


def test_the_time_is_capped_and_the_reason_said() -> None:
    rules = Rules(max_time_s=2.0, warmup_max_s=0.1)
    group = group_of(Machine({"a": 0.05, "b": 0.05}, noise=0.5), rules)
    tracks = finish(group)
    assert not any(track.converged for track in tracks.values())
    assert all(track.stop_reason.endswith("5% wanted") for track in tracks.values())
    # Two rows of 2 s each; the canary's readings come on top, and no round ends past the budget.
    spent = sum(sum(track.samples) for track in tracks.values())
    assert 0.7 * 4.0 <= spent <= 4.0


def test_the_floor_of_rounds_stands_above_the_cap() -> None:
    group = group_of(Machine({"slow": 30.0, "fast": 0.01}), Rules(max_time_s=1.0))
    tracks = finish(group)
    assert group.rounds == 6
    assert len(tracks["slow"].samples) == 6
    assert tracks["slow"].converged


def test_every_round_runs_every_cell_once_in_changing_order() -> None:
    machine = Machine({"a": 0.01, "b": 0.01, "c": 0.01, "d": 0.01}, noise=0.01)
    group = group_of(machine, FAST)
    for _ in group.run():
        if group.rounds == 0:
            machine.calls.clear()
    names = [name for name, _ in machine.calls]
    rounds = [tuple(names[i : i + 4]) for i in range(0, len(names), 4)]
    assert len(rounds) == group.rounds
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in rounds)
    assert len(set(rounds)) > 1


def test_the_order_is_the_seeds() -> None:
    orders = []
    for _ in range(2):
        machine = Machine({"a": 0.01, "b": 0.01, "c": 0.01}, noise=0.01)
        finish(group_of(machine, FAST))
        orders.append(machine.calls)
    assert orders[0] == orders[1]


def test_no_sample_is_lost() -> None:
    machine = Machine({"a": 0.01, "b": 0.03}, noise=0.2)
    group = group_of(machine, Rules(max_time_s=1.0, warmup_max_s=0.05))
    warm = 0
    for progress in group.run():
        if progress.round == 0:
            warm = len(machine.calls)
    taken = {cell: sum(n for name, n in machine.calls[warm:] if name == cell) for cell in machine.cost}
    for track in group.tracks:
        assert len(track.samples) == len(track.rounds) == taken[track.cell]
        assert track.rounds == sorted(track.rounds)


def test_the_first_samples_are_warm_up_and_are_not_kept() -> None:
    cold = Machine({"a": 0.01})
    cold.speed = lambda now: 3.0 if now < 0.2 else 1.0
    tracks = finish(group_of(cold, Rules(warmup_min_s=0.1, max_time_s=1.0)))
    assert max(tracks["a"].samples) == pytest.approx(0.01)


def test_warm_up_goes_on_until_two_windows_agree_and_then_ends() -> None:
    settling = Machine({"a": 0.01})
    settling.speed = lambda now: 1.0 + max(0.0, 1.0 - now)  # settles after a second
    group = group_of(settling, Rules(warmup_max_s=3.0))
    next(iter(group.run()))
    assert settling.clock > 0.9
    never = Machine({"a": 0.01})
    never.speed = lambda now: 10.0**now
    group = group_of(never, Rules(warmup_max_s=3.0))
    next(iter(group.run()))
    assert 2.0 < never.clock < 3.5


def test_a_cell_whose_first_call_took_longer_than_the_warm_up_needs_none() -> None:
    machine = Machine({"a": 4.0})
    group = Group([Track("a", "a", estimate_s=4.0)], machine, Rules(), random.Random(0))
    finish(group)
    assert machine.calls == [("a", 1)] * 6


def test_a_slow_phase_is_counted_by_the_canary() -> None:
    slow = Machine({"a": 0.05}, noise=0.05)
    slow.speed = lambda now: 1.5 if 1.0 < now < 2.0 else 1.0
    group = group_of(slow, Rules(max_time_s=4.0, warmup_max_s=0.1))
    tracks = finish(group)
    assert group.canary.slow_rounds
    assert len(group.canary.slow_rounds) < group.rounds
    assert group.canary.redone == 0
    assert len(group.canary.readings_s) == group.rounds + 1  # one slow edge was read again
    # On a CPU the samples of slow rounds stay where they are.
    assert set(group.canary.slow_rounds) <= set(tracks["a"].rounds)
    assert tracks["a"].discarded == []


def test_with_redo_a_slow_round_is_measured_again_and_its_samples_kept_apart() -> None:
    slow = Machine({"a": 0.05}, noise=0.01)
    slow.speed = lambda now: 1.5 if 0.8 < now < 1.2 else 1.0
    group = group_of(slow, Rules(max_time_s=4.0, warmup_max_s=0.1, canary_redo=3))
    track = finish(group)["a"]
    assert group.canary.redone >= 1
    assert group.canary.slow_rounds == []
    assert track.discarded
    assert max(track.samples) < 0.06
    assert max(track.discarded) > 0.07
    assert set(track.rounds) == set(range(1, group.rounds + 1))


def test_a_machine_that_stays_slow_is_redone_three_times_a_round_at_most() -> None:
    slow = Machine({"a": 0.05})
    slow.speed = lambda now: 1.0 if now < 0.25 else 2.0
    group = group_of(slow, Rules(max_time_s=0.5, warmup_max_s=0.1, canary_redo=3))
    finish(group)
    assert group.rounds == 6
    assert group.canary.redone == 3 * len(group.canary.slow_rounds)
    assert group.canary.slow_rounds


def test_a_blip_at_one_edge_is_one_rounds() -> None:
    machine = Machine({"a": 0.05})
    group = group_of(machine, Rules(max_time_s=1.0, warmup_max_s=0.1))
    readings = iter([0.001] * 5 + [0.001] * 3 + [0.002] * 3 + [0.001] * 300)
    machine.canary = lambda: next(readings)  # type: ignore[method-assign]
    finish(group)
    assert group.canary.slow_rounds == [2]


def test_a_device_that_stops_answering_between_rounds_ends_the_rows_and_not_the_run() -> None:
    machine = Machine({"a": 0.05, "b": 0.05})
    group = group_of(machine, Rules(max_time_s=1.0, warmup_max_s=0.1))
    readings = iter([0.001] * 8)

    def canary() -> float:
        for reading in readings:
            return reading
        raise RuntimeError("CUDA error: unspecified launch failure")

    machine.canary = canary  # type: ignore[method-assign]
    tracks = finish(group)
    assert all(isinstance(track.failure, RuntimeError) for track in tracks.values())
    assert all(track.samples for track in tracks.values())


def test_a_cell_that_fails_is_taken_out_and_the_others_go_on_those_of_its_row_too() -> None:
    machine = Machine({"a:fwd": 0.01, "a:bwd": 0.01, "b:fwd": 0.01}, fail={"a:bwd": MemoryError("no")}, fail_after=3)
    group = group_of(machine, FAST)
    tracks = finish(group)
    assert isinstance(tracks["a:bwd"].failure, MemoryError)
    assert tracks["a:bwd"].stop_reason == "failed"
    assert tracks["a:bwd"].cell is None
    assert tracks["a:bwd"].failure.__traceback__ is None  # its frames would hold the memory that ran out
    for other in ("a:fwd", "b:fwd"):
        assert tracks[other].failure is None
        assert tracks[other].converged


def test_a_group_whose_rows_all_fail_ends() -> None:
    machine = Machine({"a": 0.01}, fail={"a": RuntimeError("broken")})
    group = group_of(machine, FAST)
    finish(group)
    assert group.rounds == 0


def test_a_stop_is_obeyed_between_batches_and_keeps_what_was_measured() -> None:
    machine = Machine({"a": 0.01, "b": 0.01}, noise=0.3)
    stop = {"now": False}
    group = group_of(machine, Rules(max_time_s=5), stop=lambda: stop["now"])
    for progress in group.run():
        if progress.round == 3 and not progress.round_done:
            stop["now"] = True
    assert group.interrupted
    assert group.rounds == 3
    counts = sorted(track.rounds.count(3) for track in group.tracks)
    assert counts[0] == 0 < counts[1]
    assert all(track.stop_reason == "interrupted" for track in group.tracks)


def test_a_first_call_that_took_longer_does_not_keep_the_batches_small() -> None:
    machine = Machine({"a": 0.01})
    group = Group([Track("a", "a", estimate_s=4.0)], machine, Rules(max_time_s=24.0), random.Random(0))
    finish(group)
    counts = [count for _, count in machine.calls]
    assert counts[0] == 1
    assert min(counts[1:]) == 50


def test_progress_tells_the_time_left() -> None:
    group = group_of(Machine({"a": 0.1}, noise=0.5), Rules(max_time_s=3.0, warmup_max_s=0.1))
    left = [progress.left_s for progress in group.run() if progress.round_done]
    assert left == sorted(left, reverse=True)
    assert left[0] <= 3.0


def test_the_same_row_entered_twice_is_significant_in_at_most_one_of_twenty_tries() -> None:
    significant, tries = 0, 100
    for seed in range(tries):
        drift = random.Random(1000 + seed)
        phases = [drift.uniform(1.0, 1.3) for _ in range(400)]
        machine = Machine({"row": 0.02}, noise=0.05, seed=seed)
        machine.speed = lambda now, phases=phases: phases[int(now * 4) % 400]
        tracks = [Track("first", "row"), Track("second", "row")]
        group = Group(tracks, machine, Rules(max_time_s=3.0, warmup_max_s=0.1), random.Random(seed))
        for _ in group.run():
            pass
        first, second = (Series(track.samples, track.rounds) for track in group.tracks)
        significant += bool(ratio_of_medians(first, second, paired=True).is_significant)
    assert significant <= tries / 20


def test_quick_rules_measure_less_and_say_nothing_about_convergence_they_do_not_have() -> None:
    quick, full = (Rules.for_device("cpu", quick=q, max_time_s=None) for q in (True, False))
    assert quick.min_rounds < full.min_rounds
    assert quick.max_time_s < full.max_time_s
    assert Rules.for_device("cuda", quick=False, max_time_s=None).min_rounds == 10
    assert Rules.for_device("cuda", quick=False, max_time_s=None).canary_redo == 3
    asked = Rules.for_device("cpu", quick=False, max_time_s=2.5)
    assert (asked.max_time_s, asked.target_half_width) == (2.5, 0.02)
    group = group_of(Machine({"slow": 5.0}), quick)
    track = finish(group)["slow"]
    assert (len(track.samples), track.converged) == (1, False)
