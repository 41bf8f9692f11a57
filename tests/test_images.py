"""Preprocessing belongs to the weights: where a run takes it from, what it judges with, and what it writes down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bgcbench.cli import main
from bgcbench.data.folder import IMAGENET_EVALUATION
from bgcbench.experiments import train_run, transfer_run
from bgcbench.experiments.approx import ApproxNetworkConfig
from bgcbench.experiments.images import prepared_for, sized
from bgcbench.experiments.train import TrainConfig
from bgcbench.experiments.transfer import TransferConfig
from bgcbench.models import build_model
from bgcbench.models.preprocessing import members, of_published, published, stated
from bgcbench.models.weights import Weights, _file_name
from bgcbench.specs import NetSpec, Preprocessing
from bgcbench.training.distributed import World
from tests.data.test_folder import picture
from tests.models.test_weights import trained, written
from tests.stored import stored

pytestmark = pytest.mark.usefixtures("one_thread", "tried_once")

Json = dict[str, Any]
NET, SPEC = "timm/test_resnet", NetSpec("timm/test_resnet", 2)
IMAGENET = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with timm's test_resnet of two classes, and images in the folders of what it tells, seen by timm.

    So its error is 0 %, if the images are prepared as it wants them.
    """
    timm = pytest.importorskip("timm")
    place = tmp_path_factory.mktemp("judged")
    torch.manual_seed(0)
    model = build_model(SPEC).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
    pictures = [picture(170 + 7 * n, 200 + 3 * (n % 5)).point(lambda v, n=n: v * (n % 11 + 2) // 12) for n in range(44)]
    with torch.no_grad():
        scores = model(torch.stack([transform(image) for image in pictures]))
        margins = scores[:, 1] - scores[:, 0]
        model.fc.bias[1] -= margins.median()
    for number, image in enumerate(pictures):
        label = "ab"[int(margins[number] > margins.median())]
        path = place / ("train" if number % 2 else "val") / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    torch.save(model.state_dict(), place / "weights.pth")
    return place


def transferred(judged: Path, out: Path, *more: str) -> int:
    return main(["transfer", NET, "--weights", str(judged / "weights.pth"), "--data", str(judged), "--groups", "2",
                 "--variants", "gc", "--epochs", "0", "--calibration-images", "8", "--device", "cpu", "--workers", "0",
                 "--include", "layer1.*", "--where", "none", "--out", str(out), *more])  # fmt: skip


def test_a_network_is_judged_with_the_preprocessing_that_its_library_states(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transferred(judged, tmp_path / "r.json") == 0
    printed = capsys.readouterr()
    found = stored(tmp_path / "r.json")
    assert found["results"][0]["error_initial"] == 0
    expected = stated(NET)
    assert expected is not None
    assert Preprocessing.from_json(found["settings"]["preprocessing"]) == expected
    assert (expected.mean, expected.size, found["results"][0]["params"]["height"]) == (3 * (0.5,), (160, 160), 160)
    line = f"images: {expected} (what its library states for this network)"
    assert f"{line}; --mean, --std, --resize and --interpolation say others\n" in printed.err
    assert line in printed.out
    # ImageNet's, which every network was judged with before, is another one.
    assert transferred(judged, tmp_path / "other.json", *IMAGENET, "--quiet") == 0
    other = stored(tmp_path / "other.json")
    assert other["results"][0]["error_initial"] > 5
    assert other["settings"]["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    # Numbers of another preprocessing are not mixed with these.
    assert main(["transfer", "--resume", str(tmp_path / "r.json"), "--mean", "0.4"]) == 2
    assert "cannot be resumed: its mean is None and [0.4, 0.4, 0.4] is asked for" in capsys.readouterr().err
    found["settings"]["preprocessing"]["std"] = [0.25, 0.25, 0.25]
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert main(["transfer", "--resume", str(tmp_path / "r.json")]) == 2
    assert "cannot be resumed: its preprocessing was " in capsys.readouterr().err


def test_a_file_from_before_still_shows(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transferred(judged, tmp_path / "r.json", "--size", "64", "--quiet") == 0
    found = stored(tmp_path / "r.json")
    del found["settings"]["preprocessing"]
    (tmp_path / "r.json").write_text(json.dumps(found))
    capsys.readouterr()
    assert main(["show", str(tmp_path / "r.json")]) == 0
    assert "images: " not in capsys.readouterr().out


def test_evaluation_calibration_and_training_prepare_images_alike(judged: Path) -> None:
    config = TransferConfig(model=NET, weights=str(judged / "weights.pth"), data="folder", data_dirs=(str(judged),),
                            device="cpu", batch_size=2, variants=("gc",), groups=(2,), resize=(170, 170),
                            interpolation="lanczos", std=(0.3, 0.3, 0.3))  # fmt: skip
    prepared = transfer_run.prepare(config, World())
    own = stated(NET)
    assert own is not None
    how = prepared.data.preprocessing
    assert how == Preprocessing((160, 160), own.mean, 3 * (0.3,), (170, 170), "lanczos", source="library")
    assert prepared.images.preprocessing == how
    feed: Any = prepared.data.feed(torch.device("cpu"))
    assert feed.how == how
    row = prepared.rows[1]
    run = transfer_run.TransferRun(prepared, train_run.open_session(config), World())
    training = run._training(row, prepared.network, checkpoints=False)
    assert training.identity["preprocessing"] == how.to_json()
    assert torch.allclose(training.plain.scale.flatten(), torch.full((3,), 1 / (255 * 0.3)))


def test_a_networks_layers_are_asked_with_the_images_that_its_weights_want(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["approx", "--model", NET, "--classes", "2", "--weights", str(judged / "weights.pth"), "--data",
              str(judged), "--groups", "2", "--variants", "gc", "--device", "cpu", "--calibration-images", "8",
              "--include", "layer1.*", "--where", "none", "--quiet"]  # fmt: skip
    found = []
    for name, more in (("r", []), ("same", ["--mean", "0.5", "--std", "0.5"]), ("other", IMAGENET)):
        assert main([*common, *more, "--out", str(tmp_path / f"{name}.json")]) == 0
        document = stored(tmp_path / f"{name}.json")
        found.append([row["output_relative_error"]["white"] for row in document["results"]])
    assert found[0] == found[1]
    assert found[0] != pytest.approx(found[2], rel=1e-3)
    assert stored(tmp_path / "r.json")["settings"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert main(["approx", "--resume", str(tmp_path / "r.json"), "--mean", "0.4"]) == 2
    assert "its mean is None and [0.4, 0.4, 0.4] is asked for" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- what weights say


def test_published_weights_say_it_whether_by_name_or_as_a_file(tmp_path: Path) -> None:
    model = trained(NetSpec("mobilenet_v2"))
    for member in members("mobilenet_v2"):
        path = tmp_path / _file_name(member)
        torch.save(model.state_dict(), path)
        with pytest.MonkeyPatch.context() as patched:  # the contents are not the published ones
            patched.setattr("bgcbench.models.weights._checked_digest", lambda *_: "")
            weights = Weights("mobilenet_v2", str(path))
        assert weights.preprocessing == of_published(member)
        assert weights.preprocessing.source == "weights"
    assert len({of_published(member).resize for member in members("mobilenet_v2")}) == 2
    assert Weights("mobilenet_v2", "default").preprocessing == of_published(published("mobilenet_v2"))


def test_other_files_have_what_their_library_states_and_untrained_networks_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", trained(NetSpec("squeezenet1_1")).state_dict())
    assert Weights("squeezenet1_1", path).preprocessing == stated("squeezenet1_1")
    assert Weights("wrn_10_1", path).preprocessing is None
    assert Weights("squeezenet1_1", "none").preprocessing is None


def config_of(name: str, **given: Any) -> TransferConfig:
    values = {"data": "digits", "weights": "none", "variants": ("gc",), "groups": (2,), "device": "cpu", **given}
    return TransferConfig(model=name, **values)


def fake(how: Preprocessing | None) -> Any:
    """Weights of which only the preprocessing matters."""
    weights = Weights("wrn_10_1", "none")
    weights.preprocessing = how
    return weights


def test_images_in_memory_keep_their_own_where_a_network_was_trained_on_them() -> None:
    pytest.importorskip("sklearn")
    from bgcbench.data import open_labelled

    digits = open_labelled("digits", (16, 16), [])
    library, own = fake(stated("resnet18")), digits.preprocessing
    ten = config_of("resnet18")
    assert (ten.num_classes, ten.height) == (10, 16)
    assert prepared_for(ten, digits, library).preprocessing == own
    assert prepared_for(ten, digits, fake(None)).preprocessing == own
    # A network of other classes was trained on other images, and so was one whose weights say so.
    thousand = ApproxNetworkConfig(model="resnet18", data="digits", height=16, width=16)
    seen = prepared_for(thousand, digits.calibration(), library).preprocessing
    assert (seen.mean, seen.resize, seen.size, seen.source) == ((0.485, 0.456, 0.406), None, (16, 16), "library")
    elsewhere = fake(Preprocessing((32, 32), 3 * (0.4,), 3 * (0.2,), source="weights"))
    seen = prepared_for(ten, digits, elsewhere).preprocessing
    assert (seen.mean, seen.size, seen.source) == ((0.4, 0.4, 0.4), (16, 16), "weights")
    asked = prepared_for(config_of("resnet18", mean=(0.1, 0.1, 0.1)), digits, elsewhere).preprocessing
    assert (asked.mean, asked.std) == ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))


def test_a_network_takes_images_of_the_size_that_its_weights_were_trained_on() -> None:
    config = config_of("efficientnet_b1", data="synthetic")
    assert sized(config).height == sized(config, fake(None)).height == 240  # torchvision's own
    weights = fake(Preprocessing((96, 128), 3 * (0.4,), 3 * (0.2,), source="weights"))
    assert (sized(config, weights).height, sized(config, weights).width) == (96, 128)
    assert sized(config_of("efficientnet_b1", data="synthetic", height=64, width=64), weights).spec.size == (3, 64, 64)


def test_files_are_read_as_ever_where_the_weights_were_trained_on_images_in_memory(judged: Path) -> None:
    from bgcbench.data import open_labelled

    files = open_labelled("folder", (80, 80), [judged])
    config = config_of("wrn_10_1", data="folder", data_dirs=(str(judged),), height=80, width=80)
    how = prepared_for(config, files, fake(Preprocessing((16, 16), 3 * (0.4,), 3 * (0.2,), source="weights")))
    own = IMAGENET_EVALUATION.at((80, 80))
    assert how.preprocessing == Preprocessing(
        (80, 80), 3 * (0.4,), 3 * (0.2,), own.resize, "bilinear", source="weights"
    )


def test_a_checkpoint_of_a_training_is_judged_with_what_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    from bgcbench.data import digits

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(digits, "MEAN", 0.25)  # as if its data had been normalised otherwise
        train = ["train", "wrn_10_1", "--data", "digits", "--size", "8", "--variants", "gc", "--groups", "2",
                 "--epochs", "1", "--subset", "64", "--device", "cpu", "--quiet", "--out", "t.json"]  # fmt: skip
        assert main(train) == 0
    found = stored("t.json")
    assert found["settings"]["preprocessing"]["mean"] == [0.25, 0.25, 0.25]
    (dense,) = Path("t.checkpoints/wrn_10_1-digits-standard-n1-s0").glob("final-*.pt")
    transfer = ["transfer", "--data", "digits", "--groups", "2", "--variants", "gc", "--epochs", "0", "--device", "cpu",
                "--calibration-images", "8"]  # fmt: skip
    assert main([*transfer, str(dense), "--out", "r.json"]) == 0
    assert "images: 8 px, mean 0.25,0.25,0.25, std 0.376571,0.376571,0.376571 (the weights' own)\n" in (
        capsys.readouterr().err
    )
    assert main([*transfer, "wrn_10_1", "--weights", str(dense), "--size", "8", "--quiet", "--out", "s.json"]) == 0
    errors = [stored(Path(name))["results"][0]["error_initial"] for name in ("r.json", "s.json")]
    assert errors == [found["results"][0]["epochs"][-1]["test_error"]] * 2


def test_training_from_scratch_keeps_the_datas_own(judged: Path) -> None:
    config = TrainConfig(model=NET, data="folder", data_dirs=(str(judged),), device="cpu", batch_size=2,
                         variants=("gc",), groups=(2,))  # fmt: skip
    prepared = train_run.prepare(config, World())
    assert prepared.config.height == prepared.config.width == 160  # the network's own
    assert prepared.data.preprocessing == IMAGENET_EVALUATION.at((160, 160))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean", "128"], "--mean 128,128,128 must be one number or three, from 0 (black) to 1 (white), not to 255"),
        (["--mean", "a"], "--mean a must be one number or three separated by commas"),
        (["--std", "0.5,0.5"], "--std 0.5,0.5 must be one positive number or three"),
        (["--interpolation", "bicubik"], "unknown interpolation 'bicubik': did you mean 'bicubic'?"),
        (["--resize", "big"], "--resize big must be a number of pixels or HEIGHTxWIDTH"),
        (["--weights", "default", "--mean", "0.5"], "--mean is for weights that come from a file; published ones have"),
        (["--weights-key", "ema"], "--weights-key is for a file of weights, and --weights is none; leave it out"),
        (["--data", "digits", "--resize", "20"], "--resize is for image files, and these images are in memory; leave"),
    ],
)
@pytest.mark.parametrize("command", [["transfer", "resnet18"], ["approx", "--model", "resnet18"]])
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], arguments: list[str], message: str
) -> None:
    data = ["--data-dir", str(tmp_path), "--data", "folder"] if command[0] == "transfer" else ["--data", str(tmp_path)]
    given = [*([] if "--data" in arguments else data), *([] if "--weights" in arguments else ["--weights", "none"])]
    assert main([*command, *given, *arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, len(captured.err.splitlines())) == ("", 1)
    assert message in captured.err


def test_a_resize_below_the_crop_is_refused(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transferred(judged, tmp_path / "r.json", "--resize", "100") == 2
    assert "--resize 100 is less than the 160 px that are cut out; give more, or a smaller --size" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "r.json").exists()
