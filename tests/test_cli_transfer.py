"""``bgcbench transfer`` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image

import bgcbench
from bgcbench import results
from bgcbench.cli import main
from bgcbench.data import imagefolder, open_labelled
from bgcbench.data.labelled import ResidentData
from bgcbench.models import build_model
from bgcbench.specs import NetSpec
from bgcbench.training.loop import Prepared
from tests.models.test_weights import hashed, sha256
from tests.processes import signalled, together
from tests.stored import stored
from tests.test_cli_train import pictures

pytestmark = pytest.mark.usefixtures("one_thread", "tried_once", "downloads")

SMALL = ["--data", "digits", "--groups", "2", "--device", "cpu", "--threads", "1", "--calibration-images", "16",
         "--batch-size", "64", "--subset", "128"]  # fmt: skip


UNLABELLED = ["transfer", "wrn_10_1", "--weights", "dense.pt", "--size", "8", "--groups", "4", "--variants", "gc",
              "--device", "cpu", "--threads", "1", "--calibration-images", "16", "--batch-size", "16"]  # fmt: skip


@pytest.fixture
def photos(here: Path) -> Path:
    """Digits without their labels, 40 and 24, and the weights of a network."""
    data = open_labelled("digits", (8, 8), [])
    assert isinstance(data, ResidentData)
    for split, images in (("train", data.train_images[:40]), ("val", data.test_images[:24])):
        (here / "photos" / split).mkdir(parents=True)
        for number, pixels in enumerate(images):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            image.save(here / "photos" / split / f"{number:02}.png")
    torch.manual_seed(0)
    model = build_model(NetSpec("wrn_10_1", 10, 8)).train()
    with torch.no_grad():
        for _ in range(20):  # norms whose outputs tell images apart
            model(data.train_images[:64].float() / 255)
        model.fc.weight.mul_(20)  # type: ignore[union-attr, operator]
    torch.save(model.state_dict(), "dense.pt")
    return here / "photos"


def test_without_labels_networks_agree_or_not_and_are_distilled(photos: Path, capsys: Any) -> None:
    words = [*UNLABELLED, "--data", "photos", "--epochs", "2", "--distill", "--lr", "0.02", "--save", "saved"]
    assert main([*words, "--out", "run.json", "--quiet"]) == 0
    dense, row = (row for row in stored("run.json")["results"])
    assert row["params"]["dataset"] == "unlabelled"
    assert (row["error_initial"], row["error_final"], dense["agreement_final"]) == (None, None, None)
    assert [(each["test_error"], each["test_loss"]) for each in row["epochs"]] == [(None, None)] * 2
    original = build_model(NetSpec("wrn_10_1", 10, 8)).eval()
    original.load_state_dict(torch.load("dense.pt", weights_only=True))
    final = bgcbench.load_converted(Path("saved", row["saved"])).eval()
    data = open_labelled("unlabelled", (8, 8), [photos], classes=10)
    (batch,) = data.feed(torch.device("cpu")).test([torch.arange(24)])
    seen = [
        Prepared(each, data.mean, data.std, torch.float32, "nchw")(batch[0]).argmax(1) for each in (original, final)
    ]
    assert len(seen[0].unique()) > 1
    assert row["agreement_final"] == pytest.approx(100 * float((seen[0] == seen[1]).double().mean()))
    shown = capsys.readouterr().out
    assert "agrees trained %" in shown
    assert "error" not in shown.partition("Notes")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "1"], "--epochs 1 needs labels, and photos has none"),
        (["--distill", "--control"], "--control would train the original towards its own outputs"),
        (["--distill", "--label-smoothing", "0.1"], "--label-smoothing 0.1 is of labels"),
    ],
)
def test_what_only_labels_can_give_is_refused(words: list[str], message: str, photos: Path, capsys: Any) -> None:
    assert main([*UNLABELLED, "--data", "photos", *words, "--out", "run.json"]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", "wrn_10_1", "--data", "unlabelled", "--data-dir", "photos"]) == 2
    assert "bgcbench transfer --distill takes it" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a network was trained (dense and converted), transferred, and its conversions saved."""
    place = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(place)
    try:
        train = ["train", "wrn_10_1", "--data", "digits", "--size", "8", "--groups", "2", "--device", "cpu",
                 "--threads", "1", "--quiet"]  # fmt: skip
        dense_alone = ["--variants", "standard", "--epochs", "3", "--subset", "512"]
        assert main([*train, *dense_alone, "--out", "d.json"]) == 0
        converted = ["--variants", "gc", "--no-reference", "--epochs", "1", "--subset", "64"]
        assert main([*train, *converted, "--out", "t.json"]) == 0
        (dense,) = Path("d.checkpoints/wrn_10_1-digits-standard-n1-s0").glob("final-*.pt")
        dense.rename("dense.pt")  # a name without digits that say what is in it
        options = ["--init", "copy,calibrated", "--epochs", "2", "--control", "--distill", "--save", "nets"]
        assert main(["transfer", "dense.pt", *SMALL, *options, "--quiet", "--out", "r.json", "--plot", "r.png"]) == 0
    finally:
        os.chdir(before)
    return place


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a MODEL, such as resnet50, the checkpoint of a bgcbench train run, or a file to go on with"),
        (["resnet50", "--data", "imagenet"], "--data imagenet needs --data-dir DIR (or BGCBENCH_DATA_DIR)"),
        (["resnet50", "--data", "imagenet", "--data-dir", "no"], "--data-dir no is not there; give the place of image"),
        (["resnet50", "--data", "./no"], "--data-dir ./no is not there"),
        (["resnet50", "--data", "digits"], "published weights of resnet50 tell imagenet's 1,000 classes apart, and"),
        (["wrn_10_1", "--data", "digits"], "torchvision publishes no weights of wrn_10_1; give weights with --weights"),
        (["timm/x", "--data", "synthetic"], "torchvision publishes no weights of timm/x; give weights with --weights"),
        (["wrn_10_1", "--data", "digits", "--weights", "gone.pth"], "--weights gone.pth: there is no such file"),
        (["gone.pt", "--data", "digits"], "MODEL gone.pt is not there; give a network's name, or a checkpoint that"),
        (["./gone", "--data", "digits"], "MODEL ./gone is not there"),
        (["gone.pt", "--data", "digits", "--weights", "x"], "MODEL gone.pt is a checkpoint and has its weights; leave"),
        (["CHECKPOINT", "--data", "digitz"], "unknown data set 'digitz': did you mean 'digits'?"),
        (["CHECKPOINT", "--data", "digits", "--lr", "-1"], "--lr -1 must be at least 0"),
        (["CHECKPOINT", "--data", "digits", "--plot", "x.doc"], "--plot x.doc: the name must end in .png"),
        (["CHECKPOINT", "--data", "cifar10"], "--data cifar10 needs --data-dir DIR"),
        (["NONE", "--init", "calibratd"], "unknown init 'calibratd': did you mean 'calibrated'? choose from copy"),
        (["NONE", "--init", ","], "--init is empty; name at least one"),
        (["NONE", "--calibration-images", "3"], "--calibration-images 3 must be at least 4: one in 4 is held out"),
        (["NONE", "--epochs", "0", "--distill"], "--distill is about training, and --epochs 0 trains nothing; leave"),
        (["NONE", "--epochs", "0", "--control"], "--control is about training, and --epochs 0 trains nothing; leave"),
        (["NONE", "--epochs", "-1"], "epochs=-1 must be a whole number of at least 0"),
        (["NONE", "--recipe", "digits"], "unknown recipe 'digits': choose from paper, fast"),
        (["NONE", "--milestones", "3"], "--milestones is for --schedule multistep, and this is constant"),
        (["NONE", "--variants", "standard"], "nothing to convert: --variants and --groups leave the standard convol"),
        (["NONE", "--groups", "1"], "nothing to convert: --variants and --groups leave the standard convolution"),
        (["NONE", "--classes", "5"], "the network tells 5 classes apart, and --data digits has 10; give the data"),
        (["NONE", "--save", "file/x"], "--save file/x cannot be written: file is no folder; choose one"),
        (["NONE", "--save", "nets"], "nets: wrn_10_1-digits-gc-n2-calibrated-s0.pt exist; --force replaces them, or"),
        (["NONE", "--out", "-", "--save-every", "9"], "--save-every is for checkpoints, which --out - keeps none of"),
        (["--preset", "table3"], "--data imagenet needs --data-dir DIR"),
        (["--preset", "table4"], "unknown preset 'table4': did you mean 'table3'? choose from table3"),
        (["resnet18", "--preset", "table3"], "--preset table3 fixes MODEL; leave one of them out"),
        (["--preset", "table3", "--init", "white"], "--preset table3 fixes --init; leave one of them out"),
        (["--preset", "table3", "--rebn"], "--preset table3 fixes --rebn; leave one of them out"),
        (["--preset", "table3", "--groups", "2"], "--preset table3 fixes --groups; leave one of them out"),
        (["--resume", "missing.json"], "missing.json cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2_before_torch_has_read_anything(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    from bgcbench.training import checkpoint

    monkeypatch.setattr(checkpoint, "network_in", None)
    for name in ("dense.pt", "file", "nets/wrn_10_1-digits-gc-n2-calibrated-s0.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    given = {"NONE": ["wrn_10_1", "--data", "digits", "--weights", "none", "--variants", "gc"],
             "CHECKPOINT": ["dense.pt"]}  # fmt: skip
    before = sorted(here.rglob("*"))
    code = main(["transfer", *(word for argument in arguments for word in given.get(argument, [argument]))])
    captured = capsys.readouterr()
    assert code == (4 if "--save" in arguments else 2), captured.err
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert sorted(here.rglob("*")) == before


def test_weights_that_cannot_be_had_are_named_with_where_they_belong(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transfer", "resnet18", "--data", "synthetic", "--size", "32", "--groups", "2", "--save", "n"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for text in (
        "resnet18-f37072fd.pth is not in",
        "hub/checkpoints (TORCH_HOME moves this folder)",
        "could not be downloaded from download.pytorch.org (Temporary failure in name resolution)",
        "give a copy of it with --weights FILE",
    ):
        assert text in line
    assert list(here.iterdir()) == []


def test_only_dense_checkpoints_are_transferred(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (converted,) = (folder / "t.checkpoints/wrn_10_1-digits-gc-n2-s0").glob("final-*.pt")
    saved = folder / "nets/wrn_10_1-digits-bgc-n2-copy-s0.pt"
    torch.save(build_model("wrn_10_1").state_dict(), here / "plain.pt")
    for path, message in ((converted, "holds a converted network"), (saved, "holds a converted network"),
                          (here / "plain.pt", "does not say which network it holds")):  # fmt: skip
        assert main(["transfer", str(path), *SMALL]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert [path.name for path in here.iterdir()] == ["plain.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "3"], "groups=3 does not divide the channels of 6 convolutions"),
        (["--batch-size", "256"], "--batch-size 256 is more than the 128 training images"),
        (["--size", "8", "--where", "none"], "nothing to replace with where='none'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_judged(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["transfer", str(folder / "dense.pt"), *SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ a whole run


def test_the_file_is_complete_and_valid(folder: Path) -> None:
    found = stored(folder / "r.json")
    jsonschema.validate(found, results.schema())
    assert (found["command"], found["complete"], found["exit_reason"]) == ("transfer", True, "ok")
    assert [row["key"] for row in found["results"]] == [
        f"wrn_10_1-digits-{what}-s0"
        for what in ("standard-n1", "gc-n2-copy", "gc-n2-calibrated", "bgc-n2-copy", "bgc-n2-calibrated")
    ]
    for row in found["results"]:
        params, dense = row["params"], row["params"]["variant"] == "standard"
        assert (row["status"], row["reason"], len(row["epochs"])) == ("ok", None, 2)
        assert row["error_final"] == row["epochs"][-1]["test_error"]
        assert (params["model"], params["weights"], params["classes"], params["height"]) == (
            "wrn_10_1",
            "dense.pt",
            10,
            8,
        )
        assert (params["init"] == "none", params["rebn"], params["distill"]) == (dense, not dense, True)
        assert (row["agreement_initial"] is None) is dense
        assert (row["saved"] is None) is dense
        assert row["time"] is row["paper"] is None
        if not dense:
            calibration = row["convert"]["calibration"]
            assert (calibration["images"], calibration["rebn"]) == (16, True)
            assert bool(calibration["layers"]) is (params["init"] == "calibrated")
    standard, copied, calibrated = found["results"][:3]
    assert standard["error_initial"] < calibrated["error_initial"] < copied["error_initial"]
    assert calibrated["agreement_initial"] > copied["agreement_initial"]
    assert found["settings"]["weights_sha256"] == sha256(folder / "dense.pt")[:16]
    assert (found["config"]["lr"], found["config"]["schedule"], found["config"]["recipe"]) == (
        0.01,
        "constant",
        "paper",
    )


def test_a_saved_network_computes_what_its_checkpoint_does(folder: Path) -> None:
    data = open_labelled("digits", (8, 8), [])
    for row in stored(folder / "r.json")["results"][1:]:
        (final,) = (folder / row["checkpoints"]).glob("final-*.pt")
        outputs = []
        for path in (folder / "nets" / row["saved"], final):
            model = Prepared(bgcbench.load_converted(path), data.mean, data.std, torch.float32, "nchw").eval()
            with torch.no_grad():
                outputs.append(model(data.test_images))  # type: ignore[attr-defined]
        assert torch.equal(*outputs)
        wrong = 100 * float((outputs[0].argmax(1) != data.test_labels).double().mean())
        assert wrong == pytest.approx(row["error_final"], abs=0.41)  # two near ties at most


def test_a_live_run_and_its_file_print_the_same(folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["transfer", str(folder / "dense.pt"), *SMALL, "--epochs", "0", "--variants", "bgc", "--out", "r.json"]
    assert main(arguments) == 0
    live = capsys.readouterr()
    assert main(["show", "r.json"]) == 0
    assert capsys.readouterr().out == live.out
    assert "| BGC | 2 |" in live.out
    assert (folder / "r.png").stat().st_size > 10_000
    # without a terminal there is a line a row
    (line,) = [line for line in live.err.splitlines() if line.startswith("wrn_10_1-digits-bgc-n2-calibrated-s0:")]
    for text in ("converted in ", "test error ", "agrees with the untouched network on "):
        assert text in line
    assert not (here / "r.checkpoints").exists()  # nothing to go on from
    assert main(["transfer", "--resume", "r.json", "--quiet"]) == 0


def test_saved_networks_are_replaced_only_by_force(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transfer", str(folder / "dense.pt"), *SMALL, "--epochs", "0", "--variants", "gc", "--save", "nets"]
    assert main([*arguments, "--out", "-"]) == 0
    (path,) = Path("nets").iterdir()
    path.write_text("somebody's")
    assert main([*arguments, "--out", "-"]) == 4
    assert "gc-n2-calibrated-s0.pt exist; --force replaces them" in capsys.readouterr().err
    assert path.read_text() == "somebody's"
    assert main([*arguments, "--out", "-", "--force"]) == 0
    bgcbench.load_converted(path)


def test_dry_run_names_every_convolution_and_writes_nothing(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transfer", str(folder / "dense.pt"), *SMALL, "--dry-run", "--save", "nets"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("replaced: stages.0.0.conv1", "kept: stem (the first convolution)", "16 images to calibrate with",
                 "weights: dense.pt", "dense: ", " to evaluate", "GC N=2: ", " an epoch, ",
                 "for 2 trainings and 1 networks to evaluate; conversions come on top"):  # fmt: skip
        assert text in captured.err
    assert list(here.iterdir()) == []


def test_random_images_are_for_speed_and_rehearsals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["transfer", "wrn_10_1", "--weights", "none", "--data", "synthetic", "--size", "8", "--groups", "2",
                 "--variants", "gc", "--epochs", "1", "--subset", "128", "--calibration-images", "8",
                 "--device", "cpu", "--out", "r.json"]  # fmt: skip
    assert main(arguments) == 0
    row = stored("r.json")["results"][1]
    assert [row[name] for name in ("error_initial", "error_final", "agreement_initial")] == [None] * 3
    assert row["images_per_s"] > 0
    captured = capsys.readouterr()
    assert "--weights none: the network is untrained" in captured.err
    assert "test error" not in captured.err


# ----------------------------------------------------------------------------------------------------- gone on with


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--lr", "0.2"], "lr"), (["--epochs", "3"], "epochs"), (["--no-rebn"], "rebn"), (["--where", "3x3"], "where"),
     (["--calibration-images", "8"], "calibration_images"), (["--save", "elsewhere"], "save")],
)  # fmt: skip
def test_a_file_is_not_gone_on_with_under_other_settings(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], field: str
) -> None:
    before = (folder / "r.json").read_bytes()
    assert main(["transfer", "--resume", str(folder / "r.json"), *arguments]) == 2
    assert f"r.json cannot be resumed: its {field} is" in capsys.readouterr().err
    assert (folder / "r.json").read_bytes() == before


def test_a_file_is_not_gone_on_with_under_other_weights_and_finds_them_elsewhere(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["transfer", str(folder / "dense.pt"), *SMALL, "--epochs", "0", "--variants", "gc", "--quiet"]
    assert main([*arguments, "--out", "r.json"]) == 0
    torch.save(build_model(NetSpec("wrn_10_1", 10, 8)).state_dict(), "other.pth")
    assert main(["transfer", "--resume", "r.json", "--weights", "other.pth", "--variants", "bgc"]) == 2
    assert "r.json cannot be resumed: its weights_sha256 was" in capsys.readouterr().err
    (here / "moved.pt").write_bytes((folder / "dense.pt").read_bytes())
    assert main(["transfer", "--resume", "r.json", "--weights", "moved.pt", "--variants", "bgc", "--quiet"]) == 0
    assert [row["params"]["variant"] for row in stored("r.json")["results"]] == ["standard", "gc", "bgc"]
    # Under the name of the checkpoint too; the newest unfinished run of the same settings is found.
    assert main(["transfer", "moved.pt", *arguments[2:], "--resume", "auto", "--out", "r.json"]) == 2
    assert "its variants are ['gc', 'bgc'] and ['gc'] are asked for" in capsys.readouterr().err
    assert main([*arguments, "--resume", "auto"]) == 0
    assert len(list(Path("results").glob("transfer-wrn_10_1-digits-*.json"))) == 1


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_with_their_codes_and_a_valid_file(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str], signum: int, code: int
) -> None:
    arguments = ["transfer", str(folder / "dense.pt"), *SMALL, "--epochs", "400", "--variants", "bgc", "--quiet"]
    # The untouched network is judged, a conversion begins.
    with signalled(signum, lambda: Path("r.json").exists() and bool(stored("r.json")["results"])):
        assert main([*arguments, "--out", "r.json"]) == code
    assert "resume with --resume r.json" in capsys.readouterr().err
    found = stored("r.json")
    jsonschema.validate(found, results.schema())
    assert (found["exit_reason"], found["complete"]) == ("interrupted", False)
    assert found["results"][0]["status"] == "ok"


def test_two_processes_convert_alike_and_judge_every_image_once(folder: Path, tmp_path: Path) -> None:
    arguments = ["transfer", str(folder / "dense.pt"), *SMALL, "--epochs", "1", "--variants", "gc,lgc", "--distill"]
    codes, _, errors = together(tmp_path, *arguments, "--save", "nets", "--quiet", "--out", "two.json")
    assert codes == [0, 0], errors
    assert main([*arguments, "--quiet", "--out", str(tmp_path / "one.json")]) == 0
    mine, theirs = (stored(tmp_path / f"{name}.json")["results"] for name in ("one", "two"))
    for row, other in zip(mine, theirs, strict=True):
        for field in ("error_initial", "agreement_initial"):
            assert row[field] == other[field]
        assert row["loss_initial"] == pytest.approx(other["loss_initial"])
        assert (other["test_images"], other["world_size"], other["status"]) == (500, 2, "ok")
        for part in (row["convert"], other["convert"]):
            (part["calibration"] or {}).pop("seconds", None)
        assert row["convert"] == other["convert"]
    assert len(list((tmp_path / "nets").glob("*.pt"))) == 2


# --------------------------------------------------------------------------------------- pictures and published weights


def test_weights_in_torchvisions_format_and_a_folder_like_imagenets_end_to_end(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bgcbench.interrupts import Interrupts

    pictures(here / "data", {"train": 8, "val": 4})
    monkeypatch.setattr(imagefolder, "IMAGENET", imagefolder.Expected(3, 24, 12))
    torch.save(build_model(NetSpec("wrn_10_1", 3)).state_dict(), "wrn_10_1.pth")
    weights = hashed(here / "wrn_10_1.pth")  # wrn_10_1-1a2b3c4d.pth
    common = ["--size", "32", "--groups", "2", "--epochs", "1", "--batch-size", "8", "--device", "cpu", "--workers",
              "0", "--calibration-images", "16", "--classes", "3", "--variants", "bgc", "--where", "none", "--include",
              "stages.0.*"]  # fmt: skip
    arguments = ["transfer", "wrn_10_1", "--data", "imagenet", "--data-dir", "data", *common, "--out", "r.json"]
    wrong = weights.with_name("wrn_10_1-00000000.pth")
    wrong.write_bytes(weights.read_bytes())
    assert main([*arguments, "--weights", wrong.name]) == 2
    assert "wrn_10_1-00000000.pth is damaged or renamed: its SHA-256 begins with" in capsys.readouterr().err
    left = 0
    requested = Interrupts.requested

    def asked(self: Interrupts) -> bool:
        nonlocal left
        left -= 1
        return left < 0 or requested(self)

    with monkeypatch.context() as patched:
        patched.setattr(Interrupts, "requested", asked)
        left, codes = 4, [main([*arguments, "--weights", weights.name, "--quiet"])]
        while codes[-1] == 130 and len(codes) < 10:
            left = 4 * 2 ** len(codes)
            codes.append(main(["transfer", "--resume", "r.json", "--quiet"]))
    assert codes == [130] * (len(codes) - 1) + [0]
    assert len(codes) > 3
    found = stored("r.json")
    jsonschema.validate(found, results.schema())
    standard, bgc = found["results"]
    assert (bgc["params"]["dataset"], bgc["params"]["classes"], bgc["params"]["weights"]) == (
        "imagenet",
        3,
        weights.name,
    )
    assert (bgc["train_images"], bgc["test_images"], bgc["error_final_top5"]) == (24, 12, None)
    assert (bgc["status"], len(bgc["epochs"]), len(standard["epochs"])) == ("ok", 1, 0)
    assert bgc["convert"]["calibration"]["images"] == 16
    assert json.loads(json.dumps(found)) == found
