"""``bgcbench transfer`` as it is typed without images: closed forms, costs, and where images are looked for."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import torchvision

import bgcbench
from bgcbench import results
from bgcbench.cli import main
from bgcbench.data import imagefolder
from bgcbench.data.imagefolder import VAL_ALONE, open_imagefolder, open_imagenet
from bgcbench.errors import UsageError
from bgcbench.experiments import transfer
from bgcbench.experiments.transfer import with_images
from bgcbench.interrupts import Interrupts
from bgcbench.models import build_model
from bgcbench.models.preprocessing import published
from bgcbench.specs import NetSpec
from bgcbench.theory import paper
from tests.models.test_weights import hashed, trained, written
from tests.stored import stored
from tests.test_cli_train import pictures

pytestmark = pytest.mark.usefixtures("one_thread", "tried_once")

Json = dict[str, Any]
NET = "squeezenet1_1"  # the smallest network with published weights; its 3x3 convolutions are replaced
SMALL = ["--where", "3x3", "--device", "cpu"]


@pytest.fixture
def here(here: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, no network, and nothing that was downloaded before."""
    monkeypatch.delenv("BGCBENCH_DATA_DIR", raising=False)
    return here


def publish(monkeypatch: pytest.MonkeyPatch, name: str = NET) -> torch.nn.Module:
    """Weights in torch.hub's cache, as if they were those that torchvision publishes of the network."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    model = trained(NetSpec(name))
    torch.save(model.state_dict(), cache / "weights.pth")
    path = hashed(cache / "weights.pth")
    member = torchvision.models.get_model_weights(name)[published(name).name]
    monkeypatch.setattr(member.value, "url", f"https://download.pytorch.org/models/{path.name}")
    return model


def rows_of(path: str) -> list[Json]:
    found = stored(Path(path))
    jsonschema.validate(found, results.schema())
    return found["results"]


# ----------------------------------------------------------------------------------------------------- without images


def test_what_is_typed_does_its_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = publish(monkeypatch)
    assert main(["transfer", NET, *SMALL, "--save", "nets", "--out", "r.json"]) == 0
    printed = capsys.readouterr()
    rows = rows_of("r.json")
    # the default grid of the paper, by the closed form
    assert [(r["params"]["variant"], r["params"]["groups"], r["params"]["init"], r["status"]) for r in rows] == [
        ("standard", 1, "none", "ok"),
        *((variant, n, "white", "ok") for n in paper.GROUPS for variant in ("gc", "bgc")),
    ]
    assert {(r["params"]["weights"], r["params"]["dataset"], r["params"]["rebn"]) for r in rows} == {
        ("IMAGENET1K_V1", "none", False)
    }
    assert all(r["error_initial"] is None and r["epochs"] == [] for r in rows)
    for row in rows[1:]:
        loss, variant, n = row["white_loss"], row["params"]["variant"], row["params"]["groups"]
        assert loss["expected"] == pytest.approx(1 - (1 if variant == "gc" else 2) / n)
        assert [layer["name"] for layer in loss["layers"]] == row["convert"]["replaced"]
        # The saved network is the converted one, and what its layers lose of the published kernels is what is written.
        converted = bgcbench.load_converted(Path("nets", row["saved"]))
        for layer in loss["layers"]:
            kernel = model.get_submodule(layer["name"]).weight.detach().double()
            probe = torch.eye(kernel.shape[1]).view(-1, kernel.shape[1], 1, 1)  # an impulse in each input channel
            with torch.no_grad():
                wide = torch.nn.functional.pad(probe, (1, 1, 1, 1))
                own, other = (
                    net.get_submodule(layer["name"])(wide) - net.get_submodule(layer["name"])(torch.zeros_like(wide))
                    for net in (model, converted)
                )
            lost = float((own - other).double().square().sum() / own.double().square().sum())
            assert layer["loss"] == pytest.approx(lost, abs=1e-5)
        losses = [layer["loss"] for layer in loss["layers"]]
        worst = max(loss["layers"], key=lambda layer: layer["loss"])["name"]
        (line,) = [text for text in printed.out.splitlines() if text.startswith(f"| {variant.upper()} | {n} | white ")]
        assert f" {100 * statistics.median(losses):.0f} | {100 * max(losses):.0f} | {worst} |" in line
    assert "squeezenet1_1 (weights IMAGENET1K_V1) without images, 224 x 224 px, 1000 classes" in printed.out
    assert (
        "- no images: --data-dir DIR (or BGCBENCH_DATA_DIR, ./data or ./imagenet) with train/ and val/" in printed.out
    )
    assert "no images: data is not there; data/imagenet is not there; imagenet is not there; " in printed.err
    # The file shows the same, and a resumed run has nothing left to do.
    assert main(["show", "r.json"]) == 0
    assert capsys.readouterr().out == printed.out
    assert main(["transfer", "--resume", "r.json", "--quiet"]) == 0
    auto = ["--resume", "auto", "--out", "r.json", "--quiet"]
    assert main(["transfer", NET, *SMALL, "--save", "nets", *auto]) == 0


def test_the_papers_errors_stand_beside_its_network(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Without weights too: what does not depend on them is there, and one line says what is missing.
    assert main(["transfer", "resnet50", "--device", "cpu", "--groups", "16", "--out", "r.json"]) == 1
    printed = capsys.readouterr()
    rows = rows_of("r.json")
    config = transfer.TransferConfig(model="resnet50", data="none", inits=("white",), rebn=False, epochs=0)
    planned = {row.params.cell[:2]: row.paper.error for row in transfer.plan(config) if row.paper is not None}
    assert planned == paper.TABLE3
    printed_there = {cell: error for cell, error in paper.TABLE3.items() if cell[1] in (1, 16)}
    assert {(r["params"]["variant"], r["params"]["groups"]): r["paper"]["error"] for r in rows} == printed_there
    assert "| GC | 16 | white | 14.9 M | 2.36 G | 94 | 50.09 | error |" in printed.out
    assert "| BGC | 16 | white | 15.7 M | 2.47 G | 88 | 35.45 | error |" in printed.out
    assert all((r["white_loss"] or {}).get("layers") is None for r in rows)
    (line,) = [text for text in printed.err.splitlines() if "resnet50-0676ba61.pth" in text]
    assert f"is not in {torch.hub.get_dir()}/checkpoints (TORCH_HOME moves this folder)" in line
    assert "could not be downloaded from download.pytorch.org (Temporary failure in name resolution)" in line
    assert "give a copy of it with --weights FILE" in line
    assert printed.err.count("missing") == 0


def test_a_run_without_weights_goes_on_when_they_are_there(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transfer", NET, *SMALL, "--variants", "gc", "--groups", "2"]
    assert main([*arguments, "--out", "r.json", "--quiet"]) == 1
    assert {r["status"] for r in rows_of("r.json")} == {"error"}
    assert {r["reason"] for r in rows_of("r.json")} == {"the weights are missing"}
    publish(monkeypatch)
    assert main(["transfer", "--resume", "r.json", "--quiet"]) == 0
    found = stored("r.json")
    assert (found["complete"], found["warnings"]) == (True, [])
    assert found["settings"]["weights_sha256"] is not None
    assert {r["status"] for r in found["results"]} == {"ok"}
    # Other weights are not mixed with these.
    publish(monkeypatch)
    assert main(["transfer", "--resume", "r.json", "--groups", "4"]) == 2
    assert "its weights_sha256 was" in capsys.readouterr().err


def test_a_file_of_weights_a_checkpoint_and_copied_weights(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(here / "mine.pt", build_model("wrn_10_1").state_dict())
    arguments = ["--groups", "2", "--variants", "bgc", "--device", "cpu", "--quiet"]
    assert main(["transfer", "wrn_10_1", "--weights", path, *arguments, "--init", "copy,white", "--out", "r.json"]) == 0
    _, copied, white = rows_of("r.json")
    assert [(r["params"]["init"], r["white_loss"]["expected"]) for r in (copied, white)] == [
        ("copy", None),
        ("white", 0.0),
    ]
    assert all(layer["loss"] < 1e-9 for layer in white["white_loss"]["layers"])
    assert all(0.2 < layer["loss"] < 0.3 for layer in copied["white_loss"]["layers"])  # (1 - 1/2)^2
    pytest.importorskip("sklearn")
    train = ["train", "wrn_10_1", "--data", "digits", "--size", "8", "--variants", "gc", "--groups", "2", "--epochs",
             "1", "--subset", "64", "--device", "cpu", "--quiet", "--out", "t.json"]  # fmt: skip
    assert main(train) == 0
    (dense,) = Path("t.checkpoints/wrn_10_1-digits-standard-n1-s0").glob("final-*.pt")
    assert main(["transfer", str(dense), *arguments, "--out", "c.json"]) == 0
    assert [(r["params"]["weights"], r["status"]) for r in rows_of("c.json")] == [(dense.name, "ok")] * 2
    capsys.readouterr()


def test_a_dry_run_writes_nothing_and_times_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(monkeypatch)
    before = sorted(here.rglob("*"))
    assert main(["transfer", NET, *SMALL, "--dry-run", "--save", "nets"]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "plan: squeezenet1_1 without images, 9 of 9 rows by the closed form (init white), on" in printed.err
    assert "time in total" not in printed.err
    assert sorted(here.rglob("*")) == before


def test_a_run_that_was_stopped_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch)
    left = iter(range(3))
    requested = Interrupts.requested
    with monkeypatch.context() as patched:
        patched.setattr(Interrupts, "requested", lambda self: next(left, None) is None or requested(self))
        assert main(["transfer", NET, *SMALL, "--groups", "2,4", "--out", "r.json", "--quiet"]) == 130
    assert 0 < len(rows_of("r.json")) < 5
    kept = rows_of("r.json")
    assert main(["transfer", "--resume", "r.json", "--quiet"]) == 0
    assert rows_of("r.json")[: len(kept)] == kept
    assert len(rows_of("r.json")) == 5


def test_a_conversion_that_fails_is_a_row_and_the_others_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bgcbench.experiments import transfer_run

    publish(monkeypatch)
    whole = transfer_run.convert

    def refuse(model: Any, variant: str, *rest: Any, **options: Any) -> Any:
        if variant == "gc":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return whole(model, variant, *rest, **options)

    monkeypatch.setattr(transfer_run, "convert", refuse)
    assert main(["transfer", NET, *SMALL, "--groups", "2", "--out", "r.json", "--quiet"]) == 1
    assert [(r["params"]["variant"], r["status"]) for r in rows_of("r.json")] == [
        ("standard", "ok"), ("gc", "oom"), ("bgc", "ok")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--init", "calibrated"],
            "--init calibrated needs images; give --data-dir DIR (or BGCBENCH_DATA_DIR) that has",
        ),
        (["--rebn"], "--rebn needs images; give --data-dir DIR"),
        (["--epochs", "3"], "--epochs 3 needs images; give --data-dir DIR"),
        (["--mean", "0.5", "--weights", "none"], "--mean needs images; give --data-dir DIR"),
        (["--interpolation", "box"], "--interpolation needs images; give --data-dir DIR"),
        (["--plot", "r.png"], "--plot draws errors and calibrated layers, which need images: give --data-dir DIR"),
        (
            ["--classes", "10"],
            "published weights of squeezenet1_1 tell imagenet's 1,000 classes apart, and --classes 10",
        ),
        (
            ["--data-dir", "nowhere"],
            "--data-dir: nowhere is not there; nowhere/imagenet is not there; it has train/ and",
        ),
    ],
)
def test_what_needs_images_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["transfer", NET, "--quiet", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(here.iterdir()) == []


# --------------------------------------------------------------------------------------------- where images are found


def images(root: Path, *splits: str, classes: int = 3) -> None:
    pictures(root, dict.fromkeys(splits, 16), classes)


@pytest.mark.parametrize("place", ["data", "imagenet", "data/imagenet"])
@pytest.mark.parametrize("splits", [("train", "val"), ("val",)])
def test_images_are_found_where_people_keep_them(here: Path, place: str, splits: tuple[str, ...]) -> None:
    images(here / place, *splits)
    found, reasons = with_images({"model": "resnet50"}, 3, typed=False)
    assert (found["data"], found["data_dirs"], found["val_alone"]) == ("folder", (place,), len(splits) == 1)
    assert found.get("epochs") == (0 if len(splits) == 1 else None)
    assert reasons == []
    elsewhere, _ = with_images({"model": "resnet50", "data_dirs": (str(here / place),)}, 3, typed=True)
    assert (elsewhere["data_dirs"], elsewhere["data"]) == ((str(here / place),), "folder")


def test_images_of_other_classes_are_passed_over_and_named(here: Path) -> None:
    images(here / "data", "train", "val")
    images(here / "imagenet", "val", classes=4)
    found, reasons = with_images({"model": "resnet50"}, 1000, typed=False)
    assert (found["data"], found["inits"], found["rebn"], found["epochs"]) == ("none", ("white",), False, 0)
    assert "data/val has 3 classes, and the network tells 1,000 apart" in reasons
    assert "imagenet/val has 4 classes, and the network tells 1,000 apart" in reasons
    assert with_images({"model": "resnet50"}, 4, typed=False)[0]["data_dirs"] == ("imagenet",)
    # What is asked for by name is taken at its word; opening it says what does not fit.
    assert with_images({"data_dirs": ("data",)}, 1000, typed=True)[0]["data"] == "folder"
    # What a variable of the environment says is looked at first, and need not be there.
    assert with_images({"data_dirs": ("gone",)}, 4, typed=False)[0]["data_dirs"] == ("imagenet",)


def test_what_is_asked_for_is_not_looked_for_elsewhere(here: Path) -> None:
    images(here / "data", "train", "val")
    images(here / "own", "train", "valid")
    images(here / "other", "val")
    for given in ({"data": "folder", "data_dirs": ("own", "other")}, {"data": "folder", "data_dirs": ("gone",)},
                  {"data": "digits"}, {"data": "synthetic"}):  # fmt: skip
        assert with_images(given, 3, typed=False) == (given, [])
    assert with_images({"data": "none"}, 3, typed=False)[0]["data"] == "none"
    assert with_images({"data": "imagenet"}, 3, typed=False)[0]["data_dirs"] == ("data",)


def test_only_the_whole_of_imagenets_validation_images_is_called_imagenet(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(here / "data", "val")
    monkeypatch.setitem(transfer.CLASSES, "imagenet", 3)
    for whole, name in ((48, "imagenet"), (49, "folder")):
        monkeypatch.setattr(transfer, "IMAGENET_VAL", whole)
        assert with_images({}, 3, typed=False)[0]["data"] == name


def test_val_alone_calibrates_with_a_part_that_does_not_judge(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(here / "data", "val")
    data = open_imagefolder((8, 8), [here / "data"], val_alone=True)
    train, test = set(data.train_files), set(data.test_files)
    assert not train & test
    assert train | test == {path.relative_to(here / "data/val").as_posix() for path in (here / "data/val").rglob("*.*")}
    assert len(train) == 48 // VAL_ALONE
    labels = [int(name[2]) for name in data.test_files]  # n00, n01, n02
    assert (data.test_labels.tolist(), data.num_classes) == (labels, 3)
    assert [int(name[2]) for name in data.train_files] == data.train_labels.tolist()
    assert "one image in 8 of" in data.notes[0]
    expected = imagefolder.Expected(3, 1_281_167, 48)
    assert open_imagenet((8, 8), [here / "data"], val_alone=True, expected=expected).num_classes == 3
    with pytest.raises(UsageError, match="has 48 images, and imagenet has 50"):
        open_imagenet((8, 8), [here / "data"], val_alone=True, expected=imagefolder.Expected(3, 9, 50))
    with pytest.raises(UsageError, match="data has no folder train, it has val"):
        open_imagefolder((8, 8), [here / "data"])


def test_with_val_alone_conversions_are_calibrated_and_judged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(here / "data", "val")
    weights = written(here / "mine.pt", build_model("wrn_10_1", num_classes=3).state_dict())
    arguments = ["transfer", "wrn_10_1", "--classes", "3", "--weights", weights, "--size", "16", "--groups", "2",
                 "--variants", "gc", "--device", "cpu", "--workers", "0"]  # fmt: skip
    assert main([*arguments, "--out", "r.json"]) == 0
    printed = capsys.readouterr()
    assert "looked for images in data\n" in printed.err
    assert "data has no train: one image in 8 of data/val calibrates and is not evaluated" in printed.err
    standard, gc = rows_of("r.json")
    assert (standard["test_images"], gc["convert"]["calibration"]["images"]) == (42, 6)
    assert (gc["params"]["init"], gc["params"]["dataset"], gc["params"]["epochs"]) == ("calibrated", "folder", 0)
    assert gc["error_initial"] is not None
    assert main([*arguments, "--epochs", "2", "--out", "s.json"]) == 2
    assert "--epochs 2 needs images to train with, and data has no train/; add it, or say" in capsys.readouterr().err
    assert main(["transfer", "--resume", "r.json", "--quiet"]) == 0
    shutil.rmtree(here / "data")
    assert main([*arguments, "--out", "t.json", "--quiet"]) == 0
    assert {r["params"]["dataset"] for r in rows_of("t.json")} == {"none"}
