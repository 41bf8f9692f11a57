"""``bgcbench train`` as a user meets it."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image

import bgcbench
from bgcbench import results
from bgcbench.cli import main
from bgcbench.data import cifar10, imagefolder
from bgcbench.experiments.train_run import TrainRun, Update
from bgcbench.results.rows import TrainRow
from bgcbench.theory import paper
from tests.conftest import ROOT
from tests.data.test_cifar10 import fabricate
from tests.processes import Forked, signalled, together
from tests.stored import stored

pytestmark = pytest.mark.usefixtures("one_thread", "tried_once")

BASE = ["train", "wrn_10_1", "--data", "digits", "--size", "8", "--device", "cpu", "--threads", "1"]
SMALL = [*BASE, "--groups", "2", "--epochs", "2", "--subset", "128", "--quiet"]


def weights(folder: Path, kind: str = "final") -> dict[str, torch.Tensor]:
    """The weights in the one checkpoint of that kind."""
    (path,) = folder.glob(f"{kind}-*.pt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def equal(one: Path, other: Path) -> bool:
    """Whether all trainings below two folders ended with the same bits."""
    rows = sorted(path.name for path in one.iterdir())
    assert rows == sorted(path.name for path in other.iterdir())
    pairs = [(weights(one / row), weights(other / row)) for row in rows]
    return all(torch.equal(value, theirs[name]) for mine, theirs in pairs for name, value in mine.items())


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a MODEL to train, such as wrn_10_2, or a file to go on with: --resume FILE"),
        (["wrn_10_1"], "--data is missing: choose from digits, cifar10, imagenet, folder, synthetic, or give a folder"),
        (["wrn_10_1", "--data", "cifar"], "unknown data set 'cifar': did you mean 'cifar10'? choose from"),
        (["wrn_10_1", "--data", "cifar10"], "--data cifar10 needs --data-dir DIR (or BGCBENCH_DATA_DIR), where it is"),
        (["wrn_10_1", "--data", "cifar10", "--data-dir", "no/a", "--data-dir", "no/b"], "--data-dir no/a, no/b is"),
        (["wrn_10_1", "--data", "./no"], "--data-dir ./no is not there; give the place of folder"),
        (["wrn_10_1", "--data", "digits", "--download"], "--download is for cifar10, not for digits; leave it out"),
        (["wrn_11_1", "--data", "digits"], "wrn_11_1: a wide residual network has 6 b + 4 layers"),
        (["wrn_10_1", "--data", "digits", "--variants", "bcg"], "unknown variant 'bcg': did you mean 'bgc'?"),
        (["wrn_10_1", "--data", "digits", "--recipe", "slow"], "unknown recipe 'slow': choose from digits, paper"),
        (["wrn_10_1", "--data", "digits", "--lr", "-1"], "--lr -1 must be at least 0"),
        (["wrn_10_1", "--data", "digits", "--epochs", "0"], "epochs=0 must be a whole number of at least 1"),
        (["wrn_10_1", "--data", "digits", "--seeds", "0,-1"], "--seeds 0,-1 must be whole numbers from 0 up"),
        (["wrn_10_1", "--data", "digits", "--seeds", "a"], "--seeds a must be whole numbers separated by commas"),
        (["wrn_10_1", "--data", "digits", "--seeds", "1", "--seed", "1"], "--seed 1 is the same as --seeds 1"),
        (["wrn_10_1", "--data", "digits", "--subset", "0"], "--subset 0 must be a number of training images"),
        (["wrn_10_1", "--data", "digits", "--accumulate", "0"], "accumulate=0 must be a whole number of at least 1"),
        (["wrn_10_1", "--data", "folder", "--data-dir", "d", "--workers", "-1"], "--workers -1 must be 0"),
        (["wrn_10_1", "--data", "digits", "--workers", "2"], "--workers reads image files, and digits is held in"),
        (["wrn_10_1", "--data", "digits", "--classes", "5"], "--classes 5 does not go with --data digits, which has"),
        (["wrn_10_1", "--data", "digits", "--accumulate", "3"], "--batch-size 64 cannot be divided by --accumulate 3;"),
        (["wrn_10_1", "--data", "digits", "--group-lasso", "1e-5"], "--group-lasso is a penalty on lgc, which is not"),
        (["wrn_10_1", "--data", "digits", "--gamma", "0.2"], "--gamma is for --schedule multistep, and this is one"),
        (["wrn_10_1", "--data", "digits", "--out", "-", "--save-every", "9"], "--save-every is for checkpoints, which"),
        (["wrn_10_1", "--data", "digits", "--resume", "x.json", "--force"], "x.json cannot be read"),
        (["wrn_10_1", "--data", "digits", "--pad", "-1"], "--pad -1 must be 0 or a number of pixels"),
        (["wrn_10_1", "--data", "digits", "--save-every", "0"], "--save-every 0 must be a positive number of seconds"),
        (["wrn_10_1", "--data", "digits", "--device", "cpu", "--precision", "fp16"], "fp16 trains on CUDA devices"),
        (["wrn_10_1", "--data", "digits", "--device", "cpu", "--precision", "tf32"], "tf32 is a mode of CUDA devices"),
        (["wrn_10_1", "--data", "digits", "--device", "cpu", "--sync-bn"], "--sync-bn is for CUDA devices"),
        (["wrn_10_1", "--data", "digits", "--groups", "1", "--no-reference"], "--no-reference leaves the standard"),
        (["wrn_10_1", "--data", "digits", "--variants", "gc", "--groups", "1", "--no-reference"], "--no-reference"),
        (["resnet50", "--preset", "table5"], "--preset table5 is for efficientnet_b0, wrn_28_10, resnext29_8x64d;"),
        (["wrn_28_10", "--preset", "table5", "--groups", "2"], "--preset table5 fixes --groups; leave one of them out"),
        (["wrn_28_10", "--preset", "table7"], "unknown preset 'table7'"),
        (["wrn_10_1", "--data", "digits", "--resume", "missing.json"], "missing.json cannot be read"),
        (["wrn_10_1", "--data", "digits", "--resume", "auto", "--out", "-"], "--resume auto needs a file"),
        (["wrn_10_1", "--data", "digits", "--resume", "x.json", "--out", "y.json"], "leave --out out, or say --resume"),
        (["wrn_10_1", "--data", "digits", "--plot", "x.doc"], "--plot x.doc: the name must end in .png"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subset", "32"], "--batch-size 64 is more than the 32 training images; use a smaller one"),
        (["--subset", "5000"], "--subset 5000 must be at most the 1297 training images"),
        (["--groups", "3"], "groups=3 does not divide the channels of 6 convolutions"),
        (["--exclude", "nothing.*"], "no convolution of the network is called 'nothing.*'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_trained(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*BASE, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not list(here.glob("**/*.json"))


def test_an_unknown_network_is_told_by_what_there_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "resnet51", "--data", "digits", "--device", "cpu"]) == 2
    assert "unknown model 'resnet51': did you mean 'resnet" in capsys.readouterr().err


def test_a_device_that_is_not_there_ends_with_3(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[:4], "--device", "cuda:77"]) == 3
    assert "--device cuda:77" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which five variants were trained, with two seeds."""
    folder = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        variants = ["--variants", "standard,gc,bgc,lgc,flgc", "--seeds", "0,1"]
        assert main([*SMALL, *variants, "--out", "r.json", "--plot", "r.png"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_the_file_is_complete_and_valid(run: Path) -> None:
    found = stored(run / "r.json")
    jsonschema.validate(found, results.schema())
    assert (found["complete"], found["exit_reason"], found["quality"]) == (True, "ok", "full")
    assert [row["key"] for row in found["results"]] == [
        f"wrn_10_1-digits-{cell}-s{seed}"
        for seed in (0, 1)
        for cell in ("standard-n1", "gc-n2", "lgc-n2", "flgc-n2", "bgc-n2")
    ]
    for row in found["results"]:
        assert row["status"] == "ok"
        assert [epoch["epoch"] for epoch in row["epochs"]] == [1, 2]
        assert row["error_final"] == row["epochs"][-1]["test_error"]
        assert row["error_best"] == min(epoch["test_error"] for epoch in row["epochs"])
        assert row["error_initial"] > 50
        assert (row["train_images"], row["test_images"], row["world_size"]) == (128, 500, 1)
        # Whole images: 500 of them, so every error is a multiple of 0.2.
        assert row["error_final"] * 5 == pytest.approx(round(row["error_final"] * 5), abs=1e-9)
    assert found["config"]["lr"] == 0.1
    assert (found["settings"]["pad"], found["settings"]["flip"]) == (2, False)


def test_what_was_replaced_and_counted_is_in_the_row(run: Path) -> None:
    rows = {(row["params"]["variant"], row["params"]["seed"]): row for row in stored(run / "r.json")["results"]}
    dense, gc = rows["standard", 0], rows["gc", 0]
    assert dense["convert"]["replaced"] == []
    assert len(gc["convert"]["replaced"]) == 6
    model = bgcbench.build_model("wrn_10_1")
    assert dense["counts"]["params"] == sum(p.numel() for p in model.parameters())
    halved = sum(dict(model.named_modules())[name].weight.numel() // 2 for name in gc["convert"]["replaced"])
    assert gc["counts"]["params"] == dense["counts"]["params"] - halved
    # FLGC's groups may have become uneven; LGC has dropped half of its inputs.
    assert rows["lgc", 0]["counts"]["params"] == gc["counts"]["params"]
    assert rows["lgc", 0]["counts"]["params_training"] == dense["counts"]["params"]
    assert rows["lgc", 0]["epochs"][-1]["learnt"] == {"kept": 0.5}
    assert set(rows["flgc", 0]["epochs"][-1]["learnt"]) == {"dead_outputs", "moved"}


def test_seeds_differ_and_a_seed_repeats(run: Path, here: Path) -> None:
    found = {row["key"]: row for row in stored(run / "r.json")["results"]}
    losses = [found[f"wrn_10_1-digits-bgc-n2-s{seed}"]["epochs"][0]["train_loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]
    # Other variants and seeds beside it change nothing in a row.
    assert main([*SMALL, "--variants", "bgc", "--seed", "1", "--no-reference", "--out", "again.json"]) == 0
    assert stored("again.json")["settings"]["seed"] == 1
    (row,) = stored("again.json")["results"]
    key = "wrn_10_1-digits-bgc-n2-s1"
    assert [e["train_loss"] for e in row["epochs"]] == [e["train_loss"] for e in found[key]["epochs"]]
    mine, theirs = weights(here / "again.checkpoints" / key), weights(run / "r.checkpoints" / key)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_what_is_not_replaced_starts_alike_in_all_variants(here: Path) -> None:
    # A learning rate of next to nothing leaves the initialisation to be seen.
    assert main([*SMALL, "--variants", "gc", "--epochs", "1", "--lr", "1e-30", "--out", "r.json"]) == 0
    dense, gc = (weights(here / "r.checkpoints" / f"wrn_10_1-digits-{cell}-s0") for cell in ("standard-n1", "gc-n2"))
    assert torch.equal(dense["stem.weight"], gc["stem.weight"])
    assert torch.equal(dense["fc.weight"], gc["fc.weight"])


def test_a_trained_network_loads_as_it_was_judged(run: Path) -> None:
    from bgcbench.data import open_labelled
    from bgcbench.training.loop import Prepared

    data = open_labelled("digits", (8, 8), [])
    rows = {row["key"]: row for row in stored(run / "r.json")["results"]}
    for variant in ("bgc", "lgc", "flgc"):
        row = rows[f"wrn_10_1-digits-{variant}-n2-s0"]
        (path,) = (run / row["checkpoints"]).glob("final-*.pt")
        model = Prepared(bgcbench.load_converted(path), data.mean, data.std, torch.float32, "nchw").eval()
        with torch.no_grad():
            wrong = (model(data.test_images).argmax(1) != data.test_labels).sum()  # type: ignore[attr-defined]
        assert 100 * int(wrong) / 500 == pytest.approx(row["error_final"], abs=0.41)  # two near ties at most


def test_a_live_run_and_its_file_print_the_same(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--variants", "gc", "--out", "r.json"]) == 0
    live = capsys.readouterr().out
    assert main(["show", "r.json"]) == 0
    assert capsys.readouterr().out == live
    assert "| GC | 2 |" in live
    assert (run / "r.png").stat().st_size > 10_000


def test_dry_run_names_every_convolution_and_the_time_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word for word in SMALL if word != "--quiet"]
    assert main([*arguments, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("replaced: stages.0.0.conv1", "kept: stem (the first convolution)", "GC N=2: ", "parameters",
                 "M MACs", " an epoch, ", "time in total: about"):  # fmt: skip
        assert text in captured.err
    assert list(here.iterdir()) == []


def test_without_a_terminal_there_is_a_line_an_epoch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word for word in SMALL if word != "--quiet"]
    arguments += ["--variants", "flgc,lgc", "--no-reference", "--epochs", "3", "--out", "r.json"]
    assert main(arguments) == 0
    every = capsys.readouterr().err.splitlines()
    # LGC's network is its own from half-way on, and has no best before.
    assert [line.count("(best ") for line in every if "-lgc-n2-s0 epoch" in line] == [0, 1, 1]
    lines = [line for line in every if "flgc-n2-s0 epoch 3/3" in line]
    assert len(lines) == 1
    for text in ("wrn_10_1-digits-flgc-n2-s0", "lr ", "loss ", "test error ", "dead_outputs 0.0%", "images/s", "left"):
        assert text in lines[0]


def test_stdout_as_the_file_keeps_no_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--variants", "gc", "--no-reference", "--out", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][0]["checkpoints"] is None
    assert list(here.iterdir()) == []


def test_overrides_are_used_and_recorded(here: Path) -> None:
    options = ["--batch-size", "32", "--lr", "0.05", "--schedule", "cosine", "--momentum", "0.8", "--no-nesterov",
               "--weight-decay", "0.001", "--label-smoothing", "0.1", "--pad", "1", "--flip", "--accumulate", "2",
               "--layout", "nhwc", "--precision", "bf16", "--group-lasso", "1e-5"]  # fmt: skip
    assert main([*SMALL, *options, "--variants", "lgc", "--no-reference", "--out", "r.json"]) == 0
    found = stored("r.json")
    wanted = {"batch_size": 32, "lr": 0.05, "schedule": "cosine", "momentum": 0.8, "nesterov": False,
              "weight_decay": 0.001, "label_smoothing": 0.1, "pad": 1, "flip": True, "accumulate": 2,
              "layout": "nhwc", "precision": "bf16", "group_lasso": 1e-5, "milestones": []}  # fmt: skip
    assert {name: found["config"][name] for name in wanted} == wanted
    assert (found["settings"]["pad"], found["settings"]["flip"]) == (1, True)
    assert found["results"][0]["epochs"][0]["lr"] == pytest.approx(0.025 * (1 + math.cos(3 / 8 * math.pi)))


def test_synthetic_images_measure_speed_and_show_no_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "wrn_10_1", "--data", "synthetic", "--size", "8", "--groups", "2", "--variants", "gc",
                 "--epochs", "1", "--subset", "256", "--device", "cpu", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 0
    row = stored("r.json")["results"][1]
    assert [row[name] for name in ("error_initial", "error_final", "error_best")] == [None] * 3
    assert row["epochs"][0]["test_error"] is None
    assert row["images_per_s"] > 0
    captured = capsys.readouterr()
    assert "error last" not in captured.out
    assert "test error" not in captured.err


def test_n_that_does_not_divide_is_kept_dense_where_that_is_asked_for(here: Path) -> None:
    assert main([*SMALL, "--groups", "3", "--variants", "gc", "--skip-invalid", "--out", "-"]) == 2  # 3 divides nothing
    assert main([*SMALL, "--groups", "32", "--variants", "gc", "--skip-invalid", "--out", "r.json"]) == 0
    gc = stored("r.json")["results"][1]
    assert "stages.0.0.conv1" not in gc["convert"]["replaced"]
    assert gc["convert"]["replaced"]


# ------------------------------------------------------------------------------------------------- the paper's grids


def test_the_presets_are_the_papers_grids() -> None:
    from bgcbench.experiments.train import TrainConfig, preset

    for name, cells in (("table5", paper.TABLE5), ("table6", paper.TABLE6)):
        for model in {model for model, _, _ in cells}:
            config = TrainConfig(**preset(name, {"model": model, "data_dirs": ("d",)}))
            assert {(model, cell.variant, cell.groups) for cell in config.cells} == {
                cell for cell in cells if cell[0] == model
            }
    small = TrainConfig(**preset("table5", {"model": "wrn_28_10", "data_dirs": ("d",)}))
    assert (small.data, small.epochs, small.spec.size, small.num_classes) == ("cifar10", 200, (3, 32, 32), 10)
    large = TrainConfig(**preset("table6", {"model": "mobilenet_v2", "data_dirs": ("d",), "recipe": "fast"}))
    assert (large.data, large.epochs, large.spec.size, large.precision) == ("imagenet", 90, (3, 224, 224), "bf16")


# ------------------------------------------------------------------------------------------------------- real files


def test_a_checkpoint_agrees_on_every_hyper_parameter() -> None:
    from bgcbench.experiments.train import TrainConfig, identity, plan
    from bgcbench.training.recipes import HYPER

    config = TrainConfig(model="wrn_10_1", data="digits", seeds=(3, 4), groups=(2,), variants=("bgc",))
    row = plan(config)[-1]
    found = identity(config, row.params)
    assert {*HYPER, "recipe", "pad", "flip", "accumulate", "sync_bn", "subset", "model", "data", "height"} <= set(found)
    assert (found["variant"], found["groups"], found["seed"]) == ("bgc", 2, 4)
    assert not {"variants", "seeds", "data_dirs", "workers", "threads", "device"} & set(found)


def test_cifar_10_in_the_real_format_trains_end_to_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "PUBLISHED", fabricate(here / "data", each=16))
    monkeypatch.setenv("BGCBENCH_DATA_DIR", str(here / "data"))
    arguments = ["train", "wrn_10_1", "--data", "cifar10", "--groups", "2", "--variants", "gc", "--epochs", "2",
                 "--batch-size", "16", "--device", "cpu", "--threads", "1", "--quiet", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 0
    found = stored("r.json")
    row = found["results"][1]
    assert (row["train_images"], row["test_images"], row["params"]["height"]) == (80, 16, 32)
    assert found["config"]["recipe"] == "paper"
    assert found["config"]["milestones"] == [1]
    assert (found["settings"]["pad"], found["settings"]["flip"]) == (4, True)


def pictures(root: Path, splits: dict[str, int], classes: int = 3) -> None:
    """An ImageNet-like folder of noise whose mean depends on the class."""
    generator = torch.Generator().manual_seed(0)
    for split, count in splits.items():
        for label in range(classes):
            folder = root / split / f"n0{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 120, (40, 44, 3), generator=generator) + 60 * label
                Image.fromarray(pixels.clamp(max=255).to(torch.uint8).numpy()).save(folder / f"{number}.JPEG")


@pytest.mark.parametrize(("name", "workers"), [("folder", "0"), ("imagenet", "2")])
def test_a_folder_like_imagenets_trains_end_to_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, name: str, workers: str
) -> None:
    pictures(here / "data", {"train": 8, "val": 4})
    monkeypatch.setattr(imagefolder, "IMAGENET", imagefolder.Expected(3, 24, 12))
    classes = ["--classes", "3"] if name == "imagenet" else []
    arguments = ["train", "wrn_10_1", "--data", name, "--data-dir", "data", "--size", "32", "--groups", "2",
                 "--variants", "bgc", "--epochs", "1", "--batch-size", "8", "--lr", "0.01", "--device", "cpu",
                 "--workers", workers, "--quiet", "--out", "r.json"]  # fmt: skip
    assert main([*arguments, *classes]) == 0
    found = stored("r.json")
    row = found["results"][1]
    assert (row["train_images"], row["test_images"], row["params"]["classes"]) == (24, 12, 3)
    assert row["error_final_top5"] is None
    assert row["status"] == "ok"


def test_a_picture_that_cannot_be_read_is_named_and_what_was_trained_is_kept(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(here / "data", {"train": 8, "val": 4})
    broken = here / "data" / "train" / "n01" / "3.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    arguments = ["train", "wrn_10_1", "--data", "data", "--size", "32", "--groups", "2", "--variants", "gc",
                 "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--quiet", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 2
    assert f"{Path('data/train/n01/3.JPEG')} cannot be read as an image" in capsys.readouterr().err
    found = stored("r.json")
    jsonschema.validate(found, results.schema())
    assert found["exit_reason"] == "error"


# ------------------------------------------------------------------------------------ what fails, and what goes on


def test_a_training_that_diverges_is_a_failed_row_and_the_others_are_trained(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--lr", "1e30", "--variants", "gc", "--out", "r.json"]) == 1
    found = stored("r.json")
    assert [row["status"] for row in found["results"]] == ["error", "error"]
    assert "no longer finite in epoch" in found["results"][0]["reason"]
    assert (here / found["results"][0]["checkpoints"] / "diagnosis.json").exists()
    assert found["exit_reason"] == "partial"


def test_too_little_memory_names_the_way_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bgcbench.training.loop import Training

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Training, "_step", refuse)
    assert main([*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]) == 1
    (row,) = stored("r.json")["results"]
    assert row["status"] == "oom"
    assert "2147483648 bytes asked for; use --accumulate 2 or more" in row["reason"]


def test_checkpoints_of_an_earlier_run_are_not_gone_on_with_by_accident(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]
    assert main(arguments) == 0
    assert main(arguments) == 4
    assert "--out r.json exists" in capsys.readouterr().err
    os.unlink("r.json")
    assert main(arguments) == 4
    assert "holds checkpoints of an earlier run; --force removes them" in capsys.readouterr().err
    (old,) = (here / "r.checkpoints" / "wrn_10_1-digits-gc-n2-s0").glob("final-*")
    assert main([*arguments, "--force", "--lr", "0.01"]) == 0
    assert not old.exists()


def test_a_dry_run_touches_nothing_even_with_force(here: Path) -> None:
    arguments = [*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert main([*arguments, "--force", "--dry-run"]) == 0
    assert main([*arguments, "--dry-run"]) == 4  # as the run itself
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_test_loss_that_is_no_number_fails_its_row_and_keeps_the_others(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from bgcbench.convs import VariantConv2d
    from bgcbench.training.loop import Scores, Training

    whole = Training.evaluate

    def evaluate(self: Training) -> Scores:
        scores, converted = whole(self), any(isinstance(module, VariantConv2d) for module in self.network.modules())
        return replace(scores, loss=float("nan")) if converted and self.state.step else scores

    monkeypatch.setattr(Training, "evaluate", evaluate)
    assert main([*SMALL, "--variants", "gc", "--out", "r.json"]) == 1
    found = stored("r.json")
    assert [row["status"] for row in found["results"]] == ["ok", "error"]
    assert "the test loss was no longer finite" in found["results"][1]["reason"]
    assert found["results"][1]["epochs"] == []


def test_files_with_a_dot_in_their_names_have_checkpoints_of_their_own(here: Path) -> None:
    for name in ("lr0.1", "lr0.2"):
        assert main([*SMALL, "--variants", "gc", "--no-reference", "--epochs", "1", "--out", name]) == 0
    assert {path.name for path in here.iterdir()} == {"lr0.1", "lr0.2", "lr0.1.checkpoints", "lr0.2.checkpoints"}


def test_a_row_whose_checkpoints_are_gone_is_said_to_begin_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    assert main([*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]) == 0
    found = stored("r.json")
    found["results"][0]["status"], found["complete"] = "interrupted", False
    Path("r.json").write_text(json.dumps(found))
    shutil.rmtree("r.checkpoints")
    assert main(["train", "--resume", "r.json"]) == 0
    assert (
        "wrn_10_1-digits-gc-n2-s0: no checkpoint is there, so it is trained from the start" in capsys.readouterr().err
    )


def test_uneven_groups_are_counted_as_they_are() -> None:
    from bgcbench.conversion.convert import convert
    from bgcbench.experiments.network_run import network_counts
    from bgcbench.measure.trace import trace

    dense = bgcbench.build_model("wrn_10_1")
    size = (3, 16, 16)
    converted = convert(dense, "flgc", 2, init="scratch", example_input=size).model
    balanced = network_counts(converted, trace(converted, size), 1, 4, learnt=True)
    assert balanced == network_counts(converted, trace(converted, size), 1, 4)
    with torch.no_grad():
        for name, logits in converted.named_parameters():
            if "logits" in name:
                logits[:, 0] = 100.0  # all channels in one group: the dense convolution
    uneven = network_counts(converted, trace(converted, size), 1, 4, learnt=True)
    found = trace(dense, size)
    assert uneven.params == sum(p.numel() for p in dense.parameters())
    assert (uneven.macs, uneven.macs_training) == (found.macs, found.macs)
    assert balanced.macs < uneven.macs
    assert balanced.macs_training == found.macs


@pytest.mark.parametrize("variants", ["standard,gc", "all", None])
def test_no_reference_leaves_the_standard_convolution_out(variants: str | None) -> None:
    from bgcbench.experiments.train import TrainConfig

    chosen = {} if variants is None else {"variants": tuple(variants.split(","))} if variants != "all" else {}
    config = TrainConfig(model="wrn_10_1", data="digits", reference=False, **chosen)
    assert "standard" not in {cell.variant for cell in config.cells}


def test_seeds_and_variants_can_be_added_to_a_file(here: Path) -> None:
    assert main([*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]) == 0
    found = stored("r.json")
    before = found["results"][0]
    found |= {"complete": False, "exit_reason": "error", "failure": "somebody pulled the plug"}
    Path("r.json").write_text(json.dumps(found))
    assert main(["train", "--resume", "r.json", "--seeds", "1", "--variants", "bgc", "--quiet"]) == 0
    found = stored("r.json")
    assert [row["key"][16:] for row in found["results"]] == ["gc-n2-s0", "bgc-n2-s0", "gc-n2-s1", "bgc-n2-s1"]
    assert found["results"][0] == before
    assert found["complete"]
    assert (found["failure"], found["warnings"]) == (None, [])


def test_a_second_run_with_force_touches_neither_the_file_nor_the_checkpoints_of_one_that_lives(
    here: Path, cli: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, "--variants", "gc", "--no-reference", "--out", "r.json"]
    second: list[subprocess.CompletedProcess[str]] = []
    work, checkpoints = TrainRun._work, Path("r.checkpoints")

    def working(self: TrainRun[TrainRow]) -> Iterator[Update]:
        yield from work(self)
        before = sorted(checkpoints.rglob("*.pt"))
        second.append(cli(*arguments, "--force", "--lr", "0.5"))
        assert sorted(checkpoints.rglob("*.pt")) == before != []

    monkeypatch.setattr(TrainRun, "_work", working)
    assert main(arguments) == 0
    assert second[0].returncode == 4
    assert "--out r.json is being written by another run" in second[0].stderr
    assert stored("r.json")["argv"] == arguments
    assert sorted(path.name for path in here.iterdir()) == ["r.checkpoints", "r.json"]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--lr", "0.2"], "lr"), (["--epochs", "3"], "epochs"), (["--precision", "bf16"], "precision"),
     (["--subset", "100"], "subset"), (["--size", "20"], "height"), (["--where", "3x3"], "where")],
)  # fmt: skip
def test_a_file_is_not_gone_on_with_under_other_settings(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], field: str
) -> None:
    before = (run / "r.json").read_bytes()
    assert main(["train", "--resume", str(run / "r.json"), *arguments]) == 2
    assert f"r.json cannot be resumed: its {field} is" in capsys.readouterr().err
    assert (run / "r.json").read_bytes() == before


def test_resume_auto_starts_goes_on_and_ends(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--variants", "gc", "--no-reference", "--resume", "auto"]
    assert main(arguments) == 0
    (path,) = Path("results").glob("train-*.json")
    found = stored(path)
    found["results"][0]["status"], found["complete"] = "interrupted", False
    path.write_text(json.dumps(found))
    # The training itself was done, so it is not done again, and the same file says so.
    assert main(arguments) == 0
    assert list(Path("results").glob("train-*.json")) == [path]
    again = stored(path)
    assert again["complete"]
    assert again["results"][0]["epochs"] == found["results"][0]["epochs"]
    assert main([*arguments, "--out", "named.json"]) == 0
    assert main([*arguments, "--out", "named.json"]) == 0
    assert stored("named.json")["complete"]


def test_resume_auto_leaves_runs_of_other_settings_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BASE, "--groups", "2", "--subset", "128", "--variants", "gc", "--no-reference", "--epochs", "1"]
    assert main([*arguments, "--lr", "0.5", "--quiet"]) == 0
    (path,) = Path("results").glob("train-*.json")
    found = stored(path)
    found["results"][0]["status"], found["complete"] = "interrupted", False
    path.write_text(json.dumps(found))
    path.with_suffix(".checkpoints").rename("results/train-older.checkpoints")
    path = path.rename(path.with_name("train-older.json"))
    capsys.readouterr()
    assert main([*arguments, "--resume", "auto"]) == 0  # the learning rate is the recipe's, not the other run's
    assert "going on with" not in capsys.readouterr().err
    assert len(list(Path("results").glob("train-*.json"))) == 2
    assert not stored(path)["complete"]
    assert main([*arguments, "--lr", "0.5", "--resume", "auto"]) == 0
    assert f"going on with {path}" in capsys.readouterr().err
    assert stored(path)["complete"]
    assert main([*arguments, "--resume", "auto", "--out", str(path)]) == 2
    assert "its lr is 0.5 and 0.1 is asked for" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ killed, stopped, several at once


def test_killed_and_stopped_at_random_it_ends_with_the_same_bits(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*BASE, "--groups", "2", "--variants", "bgc", "--no-reference", "--subset", "384",
                 "--epochs", "6", "--batch-size", "32", "--save-every", "0.05", "--quiet"]  # fmt: skip
    assert main([*arguments, "--out", "whole.json"]) == 0
    draw = random.Random(os.getpid())
    broken = here / "broken.checkpoints" / "wrn_10_1-digits-bgc-n2-s0"
    # Killed first: the file must be there before the first epoch has ended.
    killed = Forked(here, *arguments, "--out", "broken.json")
    deadline = time.monotonic() + 60
    while not list(broken.glob("*.pt")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    begun = (here / "broken.json").exists()
    for signum in (signal.SIGTERM, signal.SIGINT):
        again = ["train", "--resume", "broken.json", "--quiet"] if begun else [*arguments, "--out", "broken.json"]
        seen = set(broken.glob("*.pt"))
        capsys.readouterr()
        with signalled(signum, lambda seen=seen: not set(broken.glob("*.pt")) <= seen, draw.uniform(0, 0.1)):  # type: ignore[misc]
            code = main(again)
        errors = capsys.readouterr().err
        if code == 0:
            break  # it was faster than the signal
        assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum], errors
        assert "resume with --resume broken.json" in errors
        found = stored("broken.json")
        assert (found["exit_reason"], found["results"][0]["status"]) == ("interrupted", "interrupted")
        begun = True
    assert main(["train", "--resume", "broken.json", "--quiet"]) == 0
    assert equal(here / "whole.checkpoints", here / "broken.checkpoints")
    one, other = (stored(name)["results"][0]["epochs"] for name in ("whole.json", "broken.json"))
    for field in ("lr", "train_loss", "test_loss", "test_error"):
        assert [epoch[field] for epoch in one] == [epoch[field] for epoch in other]


def test_the_same_command_twice_gives_the_same_bits(here: Path) -> None:
    """Whatever the order of Python's sets is, and however fast BGC's forms were measured to be."""
    common = ["--data", "digits", "--size", "8", "--device", "cpu", "--threads", "1", "--variants", "bgc,tlgc,lgc",
              "--groups", "2", "--exclude", "stages.2.*", "--subset", "64", "--batch-size", "32", "--epochs", "1",
              "--quiet"]  # fmt: skip
    transfer = ["--weights", "none", "--calibration-images", "16", "--save", "saved"]
    commands = [
        ["train", "wrn_10_1", *common, "--out", "train.json"],
        ["transfer", "wrn_10_1", *common, *transfer, "--out", "transfer.json"],
    ]
    one, two = here, here / "two"
    two.mkdir()
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    both = (
        "import gc; from bgcbench.cli import main; from bgcbench.experiments import transfer_run; gc.freeze(); "
        f"assert [main(words) for words in {commands!r}] == [0, 0]"
    )
    other_order = subprocess.Popen(
        [sys.executable, "-c", both], cwd=two, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [main(words) for words in commands] == [0, 0]
    _, errors = other_order.communicate(timeout=180)
    assert other_order.returncode == 0, errors
    for command in ("train", "transfer"):
        assert equal(one / f"{command}.checkpoints", two / f"{command}.checkpoints")
        mine, theirs = (stored(folder / f"{command}.json")["results"] for folder in (one, two))
        for row, other in zip(mine, theirs, strict=True):
            assert row["params"] == other["params"]
            losses = [[epoch["train_loss"] for epoch in found["epochs"]] for found in (row, other)]
            assert losses[0] == losses[1]
        assert {row["params"]["algorithm"] for row in mine if row["params"]["variant"] == "bgc"} == {"two_conv"}


@pytest.mark.parametrize(
    ("asked", "algorithm", "form"),
    [([], "fixed", "two_conv"), (["--algorithm", "concat"], "concat", "concat"), (["--recipe", "fast"], "auto", "auto"),
     (["--algorithm", "auto"], "auto", "auto"), (["--recipe", "fast", "--algorithm", "fixed"], "fixed", "two_conv")],
)  # fmt: skip
def test_the_algorithm_is_fixed_unless_another_is_asked_for(asked: list[str], algorithm: str, form: str) -> None:
    from bgcbench.experiments.train import TrainConfig, plan

    options = dict(zip((word.removeprefix("--") for word in asked[::2]), asked[1::2], strict=True))
    config = TrainConfig(
        model="wrn_10_1", data="digits", variants=("standard", "gc", "lgc", "bgc"), groups=(2,), **options
    )
    assert config.algorithm == algorithm
    found = {row.params.variant: row.params.algorithm for row in plan(config)}
    assert found == {"standard": "stock", "gc": "stock", "lgc": "masked", "bgc": form}


def test_what_auto_has_found_stands_in_the_row_and_under_the_table(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--variants", "bgc", "--no-reference", "--algorithm"]
    assert main([*arguments, "auto", "--out", "auto.json"]) == 0
    (row,) = stored("auto.json")["results"]
    assert sum(row["forms"]["training"].values()) == len(row["convert"]["replaced"])
    capsys.readouterr()
    assert main(["show", "auto.json", "--explain"]) == 0  # which prints all notes
    assert "fastest algorithms, as measured: wrn_10_1-digits-bgc-n2-s0: inference" in capsys.readouterr().out
    jsonschema.validate(stored("auto.json"), results.schema())
    assert main([*arguments, "split", "--out", "split.json"]) == 0
    (row,) = stored("split.json")["results"]
    assert (row["params"]["algorithm"], row["forms"]) == ("split", {})
    assert "BGC as split" in capsys.readouterr().out
    (checkpoint,) = Path("split.checkpoints").rglob("final-*.pt")
    layers = [m for m in bgcbench.load_converted(checkpoint).modules() if isinstance(m, bgcbench.BalancedGroupConv2d)]
    assert {layer.algorithm for layer in layers} == {"split"}


def test_an_algorithm_that_no_layer_has_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (["--variants", "gc", "--algorithm", "concat"], "--algorithm concat: no variant asked for has it"),
        (["--algorithm", "masked"], "unknown algorithm 'masked'"),
        (["--algorithm", "matmul"], "algorithm 'matmul' is for 1x1 kernels"),
    ):
        assert main([*SMALL, *given]) == 2
        assert message in capsys.readouterr().err


def test_two_processes_train_the_same_network_and_judge_every_image_once(here: Path) -> None:
    # GroupNorm instead of batch norm: its numbers do not depend on who has which images.
    arguments = ["train", "timm/test_efficientnet_gn", "--data", "digits", "--variants", "bgc,lgc", "--groups", "2",
                 "--where", "1x1", "--no-reference", "--epochs", "2", "--subset", "64", "--batch-size", "32",
                 "--device", "cpu", "--threads", "1", "--lr", "0.01", "--precision", "fp64", "--quiet"]  # fmt: skip
    assert main([*arguments, "--out", "one.json"]) == 0
    codes, printed, errors = together(here, *arguments, "--accumulate", "2", "--out", "two.json")
    assert codes == [0, 0], errors
    assert printed.count("| BGC | 2 |") == 1  # one of them speaks
    mine, theirs = (stored(f"{name}.json")["results"] for name in ("one", "two"))
    assert [row["world_size"] for row in theirs] == [2, 2]
    for row, other in zip(mine, theirs, strict=True):
        assert other["test_images"] == 500
        assert [e["test_error"] for e in row["epochs"]] == [e["test_error"] for e in other["epochs"]]
        losses = [[e["train_loss"] for e in r["epochs"]] for r in (row, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        states = [weights(here / name / row["key"]) for name in ("one.checkpoints", "two.checkpoints")]
        for name, value in states[0].items():
            assert torch.allclose(value, states[1][name], rtol=1e-9, atol=1e-11), name


def test_what_one_process_finds_wrong_is_said_once_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "nope").mkdir()  # there, and empty: only the first process looks
    codes, _, said = together(tmp_path, "train", "wrn_10_1", "--data", "./nope", "--groups", "2", "--device", "cpu")
    assert codes == [2, 2]
    assert len([line for line in said.splitlines() if line.startswith("bgcbench: ")]) == 1, said
    assert "gloo" not in said.lower()
    assert "bgcbench/training" not in said


def test_two_processes_stop_together_and_one_goes_on(here: Path) -> None:
    arguments = ["train", "wrn_10_1", "--data", "synthetic", "--size", "8", "--device", "cpu", "--threads", "1",
                 "--groups", "2", "--variants", "bgc", "--no-reference", "--epochs", "400", "--batch-size", "32",
                 "--subset", "64"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bgcbench",
         *arguments, "--out", "r.json"],
        cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = here / "r.checkpoints" / "wrn_10_1-synthetic-bgc-n2-s0"
    deadline = time.monotonic() + 90
    while not list(folder.glob("e*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "bgcbench/training" not in errors, errors  # no traceback of ours
    found = stored("r.json")
    assert found["exit_reason"] == "interrupted", errors
    assert list(folder.glob("e*.pt"))
    done = len(found["results"][0]["epochs"])
    with signalled(signal.SIGTERM, lambda: len(stored("r.json")["results"][0]["epochs"]) > done):
        assert main(["train", "--resume", "r.json", "--quiet"]) == 143
    assert len(stored("r.json")["results"][0]["epochs"]) > done


def test_a_folder_in_the_environment_is_no_matter_for_data_that_needs_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BGCBENCH_DATA_DIR", os.pathsep.join(["gone/a", "gone/b"]))
    assert main([*SMALL, "--variants", "gc", "--no-reference", "--dry-run"]) == 0
