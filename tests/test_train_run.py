"""The run behind ``bgcbench train``, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from bgcbench.experiments import train_run
from bgcbench.experiments.train import TrainConfig, identity, plan
from bgcbench.experiments.train_run import TrainRun, open_session, prepare
from bgcbench.measure.ceilings import Ceilings
from bgcbench.results.rows import Counts, TrainRow
from bgcbench.training.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")


def run_of(**given: object) -> TrainRun[TrainRow]:
    values: dict[str, object] = {
        "model": "wrn_10_1", "data": "digits", "groups": (2,), "variants": ("gc", "flgc"), "device": "cpu",
        "seeds": (0, 1), "epochs": 2, "subset": 128, **given,
    }  # fmt: skip
    config = TrainConfig(**values)  # type: ignore[arg-type]
    return TrainRun(prepare(config, World()), open_session(config), World())


def test_all_variants_of_a_seed_see_the_same_images_in_the_same_order() -> None:
    run = run_of()
    seeds = {row.key: run.training(row).seed for row in run.planned}
    by_seed = {
        row.params.seed: {seeds[other.key] for other in run.planned if other.params.seed == row.params.seed}
        for row in run.planned
    }
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[0] != by_seed[1]


def test_rows_are_trained_seed_by_seed() -> None:
    config = TrainConfig(model="wrn_10_1", data="digits", groups=(2, 4), variants=("bgc",), seeds=(3, 1))
    found = [(row.params.seed, *row.params.cell) for row in plan(config)]
    grid = [("standard", 1, None), ("bgc", 2, None), ("bgc", 4, None)]
    assert found == [(seed, *cell) for seed in (3, 1) for cell in grid]
    ranked = TrainConfig(model="wrn_10_1", data="digits", variants=("standard",), ranks=(4,))
    assert [row.key for row in plan(ranked)] == [f"wrn_10_1-digits-{what}-s0" for what in ("standard-n1", "lowrank-r4")]
    identities = [identity(ranked, row.params) for row in plan(ranked)]
    assert ["rank" in each for each in identities] == [False, True]  # older checkpoints have none


def test_the_global_random_state_and_threads_are_put_back() -> None:
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        run = run_of(variants=("gc",), seeds=(0,), reference=False, epochs=1, subset=64, threads=1)
        seen = {torch.get_num_threads() for _ in run.run()}
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(1)
    assert (seen, after) == ({1}, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.status for row in run.results] == ["ok"]


def test_the_time_left_is_that_of_what_this_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    run._begun = 100.0
    monkeypatch.setattr(train_run.time, "perf_counter", lambda: 130.0)
    assert run._left(0.25, 0.0) == pytest.approx(90.0)  # 30 s for a quarter
    assert run._left(0.5, 0.25) == pytest.approx(60.0)  # 30 s for the second quarter
    assert run._left(0.25, 0.25) is None


def test_the_share_of_the_peak_counts_three_passes_on_every_device() -> None:
    run, counts = run_of(), Counts(params=1, macs=100)
    assert run._of_peak(counts, 1000.0) is None
    run.ceilings = Ceilings(6e6, 1.0, (1,), 1)
    assert run._of_peak(counts, 1000.0) == pytest.approx(2 * 3 * 100 * 1000 / 6e6)
    assert run._of_peak(replace(counts, macs_training=400), 1000.0) == pytest.approx(0.4)
    run.world = World(size=2)
    assert run._of_peak(counts, 1000.0) == pytest.approx(0.05)


def test_an_estimate_that_runs_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from bgcbench.errors import BgcbenchError
    from bgcbench.training.loop import Training

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(Training, "_step", refuse)
    with pytest.raises(BgcbenchError, match=r"^dense: out of memory: 3221225472 bytes asked for; use --accumulate 2"):
        list(run_of().estimates())


def test_workers_are_shared_by_the_trainings_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = TrainConfig(model="resnet18", data="folder", data_dirs=(str(tmp_path),))
    monkeypatch.setattr(train_run.os, "cpu_count", lambda: 16)
    assert train_run._workers(config) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert train_run._workers(config) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert train_run._workers(config) == 1


def test_a_quick_look_at_few_images_takes_them_all() -> None:
    run = run_of(quick=True, subset=None, epochs=None)
    assert (run.config.subset, run.config.epochs) == (512, 2)
    import dataclasses

    config = dataclasses.replace(run.config, subset=5000)
    assert prepare(config, World()).config.subset == 1297
