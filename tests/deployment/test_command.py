"""``bgcbench export`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bgcbench
from bgcbench.cli import main
from bgcbench.training.checkpoint import FORMAT
from tests.deployment.example import opened

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (3, 16, 16)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bgcbench.Converted:
    """A converted network, in converted.pt of the current folder."""
    monkeypatch.chdir(tmp_path)
    made = bgcbench.convert(bgcbench.build_model("wrn_10_1").eval(), "bgc", 4, example_input=SIZE)
    bgcbench.save_converted(made, "converted.pt")
    return made


def test_a_saved_conversion_is_written_and_said_in_one_line(saved: bgcbench.Converted, capsys) -> None:
    assert main(["export", "converted.pt", "--to", "torch", "-o", "net.pt"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("net.pt and net.py: ")
    assert said.out.count("\n") == 1
    assert "algorithms: 6 two_conv" in said.out
    assert said.err == "converted.pt: WideResNet on images of 3x16x16\n"
    x = torch.randn(2, *SIZE)
    (found,) = opened([Path("net.pt"), Path("net.py")], "torch")(x)
    torch.testing.assert_close(found, saved.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_training_is_written_too(saved: bgcbench.Converted, capsys) -> None:
    model = bgcbench.build_model("wrn_10_1").eval()
    meta = '{"identity": {"model": "wrn_10_1", "num_classes": 10, "height": 16, "width": 16, "stem_stride": null}}'
    torch.save({"format": FORMAT, "meta": meta, "model": model.state_dict(), "extra": {}}, "dense.pt")
    torch.save(torch.randn(4, *SIZE), "images.pt")
    assert main(["export", "dense.pt", "--to", "exported", "-o", "net.pt2", "--inputs", "images.pt"]) == 0
    assert "on 3 inputs" in capsys.readouterr().out
    x = torch.randn(2, *SIZE)
    torch.testing.assert_close(opened([Path("net.pt2")], "exported")(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["gone.pt", "--to", "torch", "-o", "net.pt"], 2, "NETWORK gone.pt is not there; give a file that"),
        ([".", "--to", "torch", "-o", "net.pt"], 2, "NETWORK . is a folder; name a file in it"),
        (["converted.pt", "--to", "torch", "-o", "converted.pt"], 4, "converted.pt exists; --force"),
        (["converted.pt", "--to", "torch", "-o", "gone/x/net.onnx"], 2, "ends with .pt"),
        (["converted.pt", "--to", "torch", "-o", "converted.pt/net.pt"], 4, "converted.pt is no folder"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--algorithm", "triton"], 2, "unknown algorithm 'triton'"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--exporter", "torchscript"], 2, "are for --to onnx"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--opset", "17"], 2, "are for --to onnx"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--batch", "0"], 2, "batch=0 must be"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--size", "big"], 2, "--size big must be"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--tolerance", "0"], 2, "--tolerance 0 must be"),
        (
            ["converted.pt", "--to", "torch", "-o", "net.pt", "--inputs", "other.pt"],
            2,
            "--inputs other.pt is not",
        ),
        (["other.txt", "--to", "torch", "-o", "net.pt"], 2, "other.txt holds no network that bgcbench wrote"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--inputs", "other.txt"], 2, "cannot be read"),
        (["converted.pt", "--to", "torch", "-o", "net.pt", "--tolerance", "1e-12"], 1, "computes something else"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    saved: bgcbench.Converted, capsys, words: list[str], code: int, says: str
) -> None:
    Path("other.txt").write_text("no network")
    assert main(["export", *words]) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("bgcbench: ")
    assert says in last
    assert not Path("net.pt").exists()
