"""The experiment: its plan without torch, and real runs of small layers on the CPU."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bgcbench.convs import autotune
from bgcbench.convs.gc import GroupConv2d
from bgcbench.convs.standard import StandardConv2d
from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.experiments import profile_run
from bgcbench.experiments.profile import (
    NetworkConfig,
    ProfileConfig,
    Wanted,
    check_same_workload,
    plan,
    planned_layer,
    row_seed,
)
from bgcbench.experiments.profile_run import ProfileRun, Update, open_session, subjects_of
from bgcbench.measure import ceilings, environment
from bgcbench.measure.device import CpuStopwatch
from bgcbench.report import flags
from bgcbench.results.times import is_doubtful
from bgcbench.specs import VARIANTS, Choice, ConvSpec
from tests.measure.test_allocator import GLIBC
from tests.processes import Forked
from tests.stored import stored

SMALL = ProfileConfig(
    in_channels=16, out_channels=16, batch=4, height=5, width=5, groups=(2, 4), device="cpu", max_time_s=0.01
)


def labels(config: ProfileConfig) -> list[tuple[str, int, str]]:
    return [(r.params.variant, r.params.groups, r.params.algorithm) for r in plan(config)]


def needed_bytes(config: ProfileConfig, phase: str) -> int:
    """Of the standard convolution."""
    return next(iter(subjects_of(plan(config)).values())).needed_bytes(phase)


pytestmark = pytest.mark.usefixtures("brisk", "one_thread")


def run(config: ProfileConfig, watch: Callable[[Update], None] = lambda update: None, **options: Any) -> ProfileRun:
    """A run that has ended; ``watch`` sees every update."""
    done = ProfileRun(config, open_session(config), plan(config), **options)
    for update in done.run():
        watch(update)
    return done


def in_round(number: int, flag: dict[str, bool]) -> Callable[[Update], None]:
    """A watcher that raises ``flag`` once that round has begun."""

    def watch(update: Update) -> None:
        flag["up"] |= update.progress is not None and update.progress.round >= number

    return watch


class TestPlan:
    def test_without_a_shape_it_is_table_4(self) -> None:
        config = ProfileConfig()
        assert (config.in_channels, config.kernel, config.batch, config.height) == (1024, 3, 128, 7)
        assert labels(config) == [
            ("standard", 1, "stock"),
            *((name, n, form) for n in (2, 4, 8, 16) for name, form in (("gc", "stock"), ("bgc", "auto"))),
        ]

    def test_a_quick_look_is_of_the_forward_pass_unless_others_are_named(self) -> None:
        assert ProfileConfig().phases == ("fwd", "fwd_bwd")
        assert NetworkConfig().phases == ("fwd", "train_step")
        for kind in (ProfileConfig, NetworkConfig):
            assert kind(quick=True).phases == ("fwd",)
        assert ProfileConfig(quick=True, phases=("fwd_bwd",)).phases == ("fwd_bwd",)

    def test_the_reference_is_there_once_whatever_is_asked(self) -> None:
        assert labels(replace(SMALL, variants=("gc",), groups=(1, 2)))[0] == ("standard", 1, "stock")
        assert len(labels(replace(SMALL, variants=("standard", "gc"), groups=(1, 2)))) == 2
        assert labels(replace(SMALL, variants=("gc",), reference=False, groups=(2,))) == [("gc", 2, "stock")]

    def test_all_algorithms_are_rows_of_their_own(self) -> None:
        forms = [label for label in labels(replace(SMALL, algorithm="all", groups=(2,))) if label[0] == "bgc"]
        offered = ["two_conv", "concat", "dense", "split"]
        assert forms == [("bgc", 2, form) for form in offered]
        pointwise = labels(replace(SMALL, algorithm="all", kernel=1, groups=(2,), device="cuda"))
        assert [form for name, _, form in pointwise if name == "bgc"] == [*offered, "matmul", "triton"]
        assert [form for name, _, form in pointwise if name == "gc"] == ["stock", "triton"]
        assert ("gc", 2, "stock") in labels(replace(SMALL, algorithm="concat", groups=(2,)))

    def test_keys_are_unique_and_do_not_depend_on_the_other_rows(self) -> None:
        every = replace(SMALL, variants=tuple(VARIANTS), algorithm="all", groups=(2, 4, 8))
        keys = [row.key for row in plan(every)]
        assert len(keys) == len(set(keys))
        assert {row.key for row in plan(replace(SMALL, groups=(4,)))} <= {row.key for row in plan(SMALL)}
        assert row_seed(0, keys[0]) != row_seed(0, keys[1]) != row_seed(1, keys[1])

    def test_groups_that_do_not_divide_are_listed_before_anything_runs(self) -> None:
        config = replace(SMALL, groups=(2, 3, 5))
        with pytest.raises(ShapeError, match=r"groups=3.*groups=5.*--skip-invalid"):
            plan(config)
        rows = plan(replace(config, skip_invalid=True))
        assert [row.params.groups for row in rows if row.invalid] == [3, 3, 5, 5]

    def test_ranks_are_rows_besides_those_by_n_with_the_n_that_each_keeps_to(self) -> None:
        config = replace(SMALL, variants=("gc", "lowrank"), groups=(4,), ranks=(9, 3, 2))
        rows = plan(config)
        assert [(r.params.variant, r.params.groups, r.params.rank) for r in rows] == [
            ("standard", 1, None), ("gc", 4, None), ("lowrank", 4, None),
            ("lowrank", 7, 2), ("lowrank", 4, 3), ("lowrank", 1, 9),
        ]  # fmt: skip
        shape = "16x16-k3-s1-b4-5x5-fp32-nchw-eager"
        assert [row.key for row in rows[2:]] == [f"lowrank-{what}-{shape}" for what in ("n4", "r2", "r3", "r9")]
        assert [row.params.choice.label for row in rows[2:]] == ["LR N=4", "LR r=2", "LR r=3", "LR r=9"]
        assert [row.row.counts.params for row in rows[2:]] == [r * (9 * 16 + 16) for r in (3, 2, 3, 9)]
        assert rows[-1].row.approximability.white_error is None  # at N = 1, and yet not the standard convolution
        assert "rank" not in rows[2].params.to_json()
        alone = plan(replace(config, variants=("standard",), ranks=(3,)))
        assert [row.key for row in alone] == [rows[0].key, rows[4].key]
        assert labels(ProfileConfig.from_json(config.to_json())) == labels(config)

    def test_a_rank_that_does_not_fit_is_refused_or_a_row_that_says_so(self) -> None:
        config = replace(SMALL, variants=("gc",), groups=(2,), ranks=(16, 17))
        with pytest.raises(ShapeError, match=r"^rank=17 is more than 16.* use at most 16; drop .* use --skip-invalid$"):
            plan(config)
        rows = plan(replace(config, skip_invalid=True))
        assert [(row.params.rank, bool(row.invalid)) for row in rows[2:]] == [(16, False), (17, True)]

    def test_a_plan_without_a_valid_row_is_refused(self) -> None:
        with pytest.raises(UsageError, match="nothing to measure"):
            plan(replace(SMALL, groups=(3,), skip_invalid=True, reference=False))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"variants": ("bcg",)}, "did you mean 'bgc'"),
            ({"variants": ()}, "--variants is empty"),
            ({"groups": ()}, "--groups is empty"),
            ({"phases": ("forward",)}, "unknown phase 'forward'"),
            ({"groups": (0,)}, "groups=0"),
            ({"ranks": (8, 0)}, "rank=0"),
            ({"batch": -1}, "batch=-1"),
            ({"precision": "fp31"}, "did you mean 'fp32'"),
            ({"layout": "chwn"}, "unknown layout"),
            ({"mode": "graf"}, "did you mean 'graph'"),
            ({"algorithm": "winograd"}, "unknown algorithm"),
            ({"cache": "lukewarm"}, "unknown cache"),
            ({"memory": "keep"}, "did you mean 'kept'"),
            ({"device": "gpu"}, "unknown device 'gpu'"),
            ({"threads": 0}, "threads=0"),
            ({"seed": -1}, "--seed -1"),
            ({"max_time_s": 0.0}, "--max-time 0.0"),
            ({"max_time_s": float("nan")}, "--max-time nan"),
            ({"input_grad": False, "phases": ("fwd",)}, "--no-input-grad"),
            ({"precision": "tf32"}, "mode of CUDA devices"),
            ({"mode": "graph"}, "CUDA graphs"),
        ],
    )
    def test_what_has_no_meaning_is_refused(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            replace(SMALL, **wrong)

    def test_a_configuration_survives_the_file(self) -> None:
        config = replace(SMALL, phases=("bwd",), input_grad=False, cache="cold", threads=1)
        assert ProfileConfig.from_json(config.to_json()) == config

    def test_another_workload_does_not_continue_a_file_and_a_larger_grid_does(self) -> None:
        stored = SMALL.to_json()
        check_same_workload(stored, replace(SMALL, groups=(2, 4, 8), variants=("bgc",)), "r.json")
        for change in ({"batch": 8}, {"seed": 3}, {"quick": True}, {"phases": ("fwd",)}):
            with pytest.raises(ResultFileError, match="cannot be resumed"):
                check_same_workload(stored, replace(SMALL, **change), "r.json")

    def test_least_memory_by_hand(self) -> None:
        x = y = 4 * 16 * 5 * 5
        weights = 16 * 16 * 9
        assert needed_bytes(SMALL, "fwd_bwd") == 4 * (2 * x + 2 * y + 2 * weights)
        assert needed_bytes(SMALL, "fwd") == 4 * (x + y + weights)
        assert needed_bytes(replace(SMALL, input_grad=False), "fwd_bwd") == 4 * (x + 2 * y + 2 * weights)


class TestRun:
    def test_every_row_is_measured_interleaved_and_complete(self) -> None:
        done = run(replace(SMALL, phases=("fwd", "bwd", "fwd_bwd"), variants=tuple(VARIANTS)))
        assert [row.status for row in done.results] == ["ok"] * len(done.results)
        assert {row.interleaved for row in done.results} == {1}
        for row in done.results:
            assert set(row.phases) == {"fwd", "bwd", "fwd_bwd"}
            for measured in row.phases.values():
                assert set(measured.rounds) == set(range(1, done.interleaved[0].rounds + 1))
                assert len(measured.samples_s) == measured.summary.n
                assert measured.first_call_s > 0
            assert row.memory.peak_bytes >= row.memory.baseline_bytes
        assert done.ceilings is not None
        assert done.ceilings.flops_per_s > 0

    @pytest.mark.parametrize("precision", ["fp64", "bf16"])
    def test_layout_precision_and_algorithm_are_those_asked_for(
        self, precision: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[bool, torch.dtype]] = []
        forward = GroupConv2d.forward

        def spy(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.is_contiguous(memory_format=torch.channels_last), x.dtype))
            return forward(self, x)

        monkeypatch.setattr(GroupConv2d, "forward", spy)
        config = replace(SMALL, precision=precision, layout="nhwc", algorithm="concat", groups=(2,), quick=True)
        done = run(config)
        assert set(seen) == {(True, {"fp64": torch.float64, "bf16": torch.bfloat16}[precision])}
        assert done.results[2].params.algorithm == "concat"

    def test_a_quick_look_measures_one_round_at_least_and_goes_on_while_it_has_time(self, monkeypatch) -> None:
        autotune.forget()
        for seconds, enough in ((0.0, False), (60.0, True)):  # in which any interval is narrow enough
            monkeypatch.setattr(profile_run, "QUICK_S", seconds)
            done = run(replace(SMALL, quick=True, max_time_s=None))
            rounds = {len(set(phase.rounds)) for row in done.results for phase in row.phases.values()}
            assert (min(rounds) >= 6) is enough
            assert enough or rounds == {1}
        assert autotune.remembered() == []  # what was chosen in haste is not for later runs

    def test_an_estimate_counts_the_calls_of_slow_rows_and_the_time_of_a_quick_look(self, monkeypatch) -> None:
        """On a device that needs 1 s for the dense forward pass, and so 4 s for both phases."""
        config = replace(SMALL, groups=(4,), variants=("standard",), max_time_s=None)
        flops = 2 * 16 * 16 * 9 * 25 * 4
        monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_, **__: ceilings.Ceilings(flops, 1e12, (1,), 1))

        def estimate(config: ProfileConfig) -> float:
            return ProfileRun(config, open_session(config), plan(config)).estimated_s()

        assert 6 * 4 < estimate(config) < 10 * 4
        assert estimate(replace(config, quick=True)) < 3 * 4  # its looks and one round
        assert estimate(replace(config, groups=(2, 4), variants=("standard", "gc"))) > 1.5 * estimate(config)

    @pytest.mark.parametrize("ends", ["well", "no better", "stopped"])
    def test_a_group_with_a_time_that_cannot_be_is_measured_once_more(self, ends: str, monkeypatch) -> None:
        """Something holds up the standard convolution: as if GC were by far faster than what there is less to do."""
        forward, held = StandardConv2d.forward, {"up": True, "again": False, "stop": False}

        def slow(self: StandardConv2d, x: torch.Tensor) -> torch.Tensor:
            if held["up"]:
                time.sleep(0.005)
            return forward(self, x)

        def watch(update: Update) -> None:
            if update.doing == "group done":
                held["up"], held["again"] = ends == "no better", True
            held["stop"] |= ends == "stopped" and held["again"] and update.doing == "round 2"

        monkeypatch.setattr(StandardConv2d, "forward", slow)
        monkeypatch.setattr(profile_run, "is_doubtful", is_doubtful)
        done = run(replace(SMALL, groups=(2,), phases=("fwd",)), watch, stop=lambda: held["stop"])
        dense, gc, _ = done.results
        assert {row.status for row in done.results} == {"ok"}
        assert is_doubtful(gc, "fwd", dense) is (ends != "well")
        assert len(done.interleaved) == 2
        if ends == "stopped":  # what there was stands
            assert (dense.interleaved, dense.phases["fwd"].discarded.samples_s) == (1, ())
            return
        assert min(dense.phases["fwd"].discarded.samples_s) > 0.005
        assert [row.interleaved for row in done.results] == [2, 2, 2]
        (said,) = [text for text in done.warnings if "twice" in text]
        assert said.startswith("measured twice, because of times that cannot be: ")
        assert "GC N=2" in said

    def test_threads_are_set_for_the_run_only(self) -> None:
        before = torch.get_num_threads()
        config = replace(SMALL, threads=2, quick=True, groups=(2,), phases=("fwd",))
        assert open_session(config).environment.cpu.threads == 2
        run(config)
        assert torch.get_num_threads() == before

    def test_a_row_that_runs_out_of_memory_is_a_row_and_the_others_go_on(self, monkeypatch) -> None:
        def greedy(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 8 GiB")

        monkeypatch.setattr(GroupConv2d, "forward", greedy)
        done = run(SMALL)
        status = {(row.params.variant, row.status) for row in done.results}
        assert status == {("standard", "ok"), ("gc", "oom"), ("bgc", "ok")}
        assert all(str(20 * 2**30) in row.reason for row in done.results if row.status == "oom")

    def test_a_row_that_breaks_in_the_middle_of_the_rounds_keeps_its_samples(self, monkeypatch) -> None:
        flag, forward = {"up": False}, GroupConv2d.forward

        def brittle(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            if flag["up"]:
                raise RuntimeError("it broke")
            return forward(self, x)

        monkeypatch.setattr(GroupConv2d, "forward", brittle)
        done = run(replace(SMALL, groups=(2,)), in_round(3, flag))
        broken = done.results[1]
        assert (broken.status, broken.reason) == ("error", "RuntimeError: it broke")
        assert broken.phases["fwd"].samples_s
        assert [row.status for row in done.results] == ["ok", "error", "ok"]

    def test_what_cannot_fit_is_not_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(environment, "available_bytes", lambda device: 10)
        done = run(SMALL)
        assert {row.status for row in done.results} == {"oom"}
        assert all("10 there" in row.reason for row in done.results)

    def test_rows_that_do_not_fit_together_are_measured_one_after_the_other(self, monkeypatch) -> None:
        room = needed_bytes(SMALL, "fwd_bwd")
        monkeypatch.setattr(environment, "available_bytes", lambda device: room)
        done = run(SMALL)
        assert [row.interleaved for row in done.results] == [1, 2, 3, 4, 5]
        assert [group.alone for group in done.interleaved] == [True] * 5

    @pytest.mark.parametrize("begins", ["in the first look", "in a round"])
    def test_a_lost_device_ends_the_rows_and_leaves_a_valid_file(self, begins: str, monkeypatch) -> None:
        """After a sticky error nothing on the device works any more: no layer, no canary, no new buffer."""
        lost, forward = {"up": begins == "in the first look"}, GroupConv2d.forward
        message = "CUDA error: an illegal memory access was encountered"

        def sticky(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            if lost["up"]:
                lost["now"] = True
                raise RuntimeError(message)
            return forward(self, x)

        times, make = CpuStopwatch._times, profile_run.make_stopwatch

        def dead_times(self: CpuStopwatch, *arguments: Any) -> list[float]:
            if lost.get("now"):
                raise RuntimeError(message)
            return times(self, *arguments)

        def dead_make(*arguments: Any, **options: Any) -> Any:
            if lost.get("now"):
                raise RuntimeError(message)
            return make(*arguments, **options)

        monkeypatch.setattr(GroupConv2d, "forward", sticky)
        monkeypatch.setattr(CpuStopwatch, "_times", dead_times)
        monkeypatch.setattr(profile_run, "make_stopwatch", dead_make)
        monkeypatch.setattr("bgcbench.measure.device.device_answers", lambda device: not lost.get("now"))
        done = run(SMALL, in_round(2, lost))
        reasons = [(row.status, row.reason) for row in done.results]
        assert reasons == [("error", "device lost")] * len(done.results)
        if begins == "in a round":
            assert all(row.phases for row in done.results)

    def test_a_stop_marks_the_rows_and_a_resumed_run_ends_with_the_same_ones(self) -> None:
        flag = {"up": False}
        cut = run(SMALL, in_round(3, flag), stop=lambda: flag["up"])
        assert {row.status for row in cut.results} == {"interrupted"}
        assert all(set(row.phases["fwd"].rounds) >= {1, 2} for row in cut.results)
        kept = {row.key: row for row in cut.results}
        resumed = run(SMALL, kept=kept, interleaved=cut.interleaved)
        assert [row.key for row in resumed.results] == [row.key for row in plan(SMALL)]
        assert {row.status for row in resumed.results} == {"ok"}
        (group,) = resumed.interleaved
        assert group.id == 1
        assert group.rounds >= 6
        assert len(group.canary.readings_s) >= 6
        for before, after in zip(cut.results, resumed.results, strict=True):
            first, last = (row.phases["fwd"] for row in (before, after))
            whole = sum(number < 3 for number in first.rounds)  # the third was not: it was done again
            assert last.samples_s[:whole] == first.samples_s[:whole]
            assert last.discarded.samples_s == first.samples_s[whole:]
            assert set(last.rounds) == set(range(1, group.rounds + 1))
        # With other rows it is another group.
        wider = run(replace(SMALL, groups=(2, 4, 8)), kept=kept, interleaved=cut.interleaved)
        assert {row.interleaved for row in wider.results} == {2}
        assert {min(row.phases["fwd"].rounds) for row in wider.results} == {1}

    def test_a_resumed_run_keeps_finished_rows_and_measures_the_rest_in_a_group_of_their_own(self) -> None:
        first = run(SMALL)
        wider = replace(SMALL, groups=(2, 4, 8))
        again = run(wider, kept={row.key: row for row in first.results}, interleaved=first.interleaved)
        old = [row for row in again.results if row.params.groups != 8]
        assert old == first.results
        assert {row.interleaved for row in again.results if row.params.groups == 8} == {2}

    def test_the_weights_of_a_row_do_not_depend_on_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def weights(config: ProfileConfig) -> dict[str, torch.Tensor]:
            one = ProfileRun(config, open_session(config), plan(config))
            return {row.planned.key: row.subject.module(one.session).kernel.detach().clone() for row in one.rows}

        few, many = weights(replace(SMALL, groups=(4,))), weights(SMALL)
        assert all(torch.equal(many[key], weight) for key, weight in few.items())
        other = weights(replace(SMALL, seed=1, groups=(4,)))
        assert not any(torch.equal(other[key], weight) for key, weight in few.items())


@GLIBC
@pytest.mark.parametrize(("state", "least"), [("kept", 0), ("fresh", 196)])
def test_kept_memory_has_no_faults_and_fresh_memory_one_for_every_page(state: str, least: int, tmp_path: Path) -> None:
    """The layer's output, which is made anew at each call, is 784 KiB: 196 pages."""
    path = tmp_path / "r.json"
    arguments = ["profile", "--channels", "64", "--size", "14", "--batch", "16", "--groups", "2", "--device", "cpu",
                 "--phases", "fwd", "--max-time", "0.01", "--quiet", "--format", "csv"]  # fmt: skip
    given = ["--memory", "fresh"] if state == "fresh" else []
    done = Forked(tmp_path, *arguments, *given, "--out", str(path), brisk=True)
    printed, errors = done.communicate()
    assert done.returncode == 0, errors
    document = stored(path)
    assert document["settings"]["memory"] == state
    measured = [row["phases"]["fwd"] for row in document["results"]]
    faults = [phase["minor_faults_per_call"] for phase in measured]
    assert faults == [0] * 3 if state == "kept" else min(faults) >= least
    assert [phase["derived"]["page_faults"] for phase in measured] == [False if state == "kept" else None] * 3
    assert [float(line["minor_faults_per_call"]) for line in csv.DictReader(printed.splitlines())] == faults


def test_memory_that_is_not_kept_after_all_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an allocator that is not glibc's: 5000 pages a call, which take milliseconds."""
    counter = itertools.count(0, 5000)
    monkeypatch.setattr("bgcbench.measure.device.minor_faults", lambda: next(counter))
    monkeypatch.setattr("bgcbench.experiments.profile_run.resolve_memory", lambda asked, device_type: asked)
    for memory, flagged in (("kept", True), (None, False)):
        for row in run(replace(SMALL, memory=memory, phases=("fwd",))).results:
            assert row.phases["fwd"].minor_faults_per_call == 5000
            assert ("page faults" in flags(row, ["fwd"])) is flagged


def test_compile_mode_measures_a_compiled_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    real: Callable[..., Any] = torch.compile

    def spy(module: Any, **options: Any) -> Any:
        compiled.append(module)
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", spy)
    done = run(replace(SMALL, mode="compile", groups=(2,), quick=True))
    assert {row.status for row in done.results} == {"ok"}
    assert len(compiled) == 6  # each of 3 rows for its first look and for its group


def test_whether_a_row_fits_follows_the_kernel_of_its_own_convolution() -> None:
    """A network's kernel may be no square: 1x7 leaves a rank at N = 5 where 1x1 leaves none, and 7x7 would at 20."""
    config = replace(SMALL, in_channels=8, out_channels=8, kernel=1)
    own = ConvSpec("standard", 8, 8, (1, 7), padding=(0, 3), bias=False)
    rows = {n: planned_layer(config, Wanted(Choice("lowrank", n)), own).row for n in (5, 7, 8)}
    assert {n: row.status for n, row in rows.items()} == {5: "interrupted", 7: "interrupted", 8: "invalid"}
    assert rows[5].counts.params == 7 * 8 + 8  # r = floor(448 / (5 (56 + 8))) = 1
    assert "7 kernel positions" in str(rows[8].reason)
