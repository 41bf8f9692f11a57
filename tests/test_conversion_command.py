"""``bgcbench convert``: what it writes is the conversion that Python makes, and what it says of it is true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bgcbench
from bgcbench import report
from bgcbench.cli import main
from bgcbench.specs import Choice

pytestmark = pytest.mark.usefixtures("one_thread", "here")


def weights_of(model: torch.nn.Module, path: str) -> None:
    torch.save(model.state_dict(), path)


def test_the_file_is_the_network_that_convert_makes_of_the_same_weights() -> None:
    dense = bgcbench.build_model("wrn_10_1").eval()
    weights_of(dense, "dense.pt")
    assert main(["convert", "WRN_10_1", "--weights", "dense.pt", "-v", "GC", "-g", "2", "-o", "gc.pt", "--quiet"]) == 0
    expected = bgcbench.convert(dense, "gc", groups=2, init="white", example_input=(3, 32, 32)).model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(bgcbench.load_converted("gc.pt")(x), expected(x))


def test_with_images_the_weights_are_calibrated_and_lose_less_than_white_ones(capsys: Any) -> None:
    pytest.importorskip("sklearn")
    common = ["convert", "wrn_10_1", "--weights", "none", "--groups", "4", "--size", "16", "--quiet", "--format", "csv"]
    assert main([*common, "--data", "digits", "--calibration-images", "16", "-o", "c.pt"]) == 0
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    place = {name: number for number, name in enumerate(lines[0])}
    assert {line[place["init"]] for line in lines[1:]} == {"calibrated"}
    assert all(0 <= float(line[place["lost"]]) < 0.75 for line in lines[1:])
    assert main([*common, "-o", "white.pt"]) == 0
    assert {line.split(",")[place["init"]] for line in capsys.readouterr().out.splitlines()[1:]} == {"white"}


def test_a_plan_says_what_each_convolution_becomes(capsys: Any) -> None:
    plan = {"stages.0.0.conv1": Choice("gc", 4), "stages.1.0.conv2": Choice("lowrank", rank=4)}
    bgcbench.Plan(plan).save("plan.json")
    dense = bgcbench.build_model("wrn_10_1").eval()
    weights_of(dense, "dense.pt")
    assert main(["convert", "wrn_10_1", "--weights", "dense.pt", "--plan", "plan.json", "-o", "c.pt"]) == 0
    assert "2 of 9 convolutions are as planned now (white weights)" in capsys.readouterr().out
    expected = bgcbench.convert(dense, plan=plan, init="white", example_input=(3, 32, 32)).model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(bgcbench.load_converted("c.pt")(x), expected(x))


def test_a_plan_is_calibrated_where_there_are_images(capsys: Any) -> None:
    pytest.importorskip("sklearn")
    bgcbench.Plan({"stages.1.0.conv2": Choice("bgc", 4)}).save("plan.json")
    words = ["convert", "wrn_10_1", "--weights", "none", "--plan", "plan.json", "--size", "16", "--data", "digits"]
    assert main([*words, "--calibration-images", "16", "-o", "c.pt", "--quiet"]) == 0
    assert "1 of 9 convolutions are as planned now (calibrated weights)" in capsys.readouterr().out


def test_what_is_said_is_what_the_saved_network_has(capsys: Any) -> None:
    assert main(["convert", "wrn_10_1", "--weights", "none", "-v", "gc", "-g", "4", "-o", "c.pt"]) == 0
    said = capsys.readouterr()
    params = sum(p.numel() for p in bgcbench.load_converted("c.pt").parameters())
    before = sum(p.numel() for p in bgcbench.build_model("wrn_10_1").parameters())
    assert f"parameters: {report.format.scaled(params)} instead of {report.format.scaled(before)}" in said.out
    assert "6 of 9 convolutions are GC N=4 now (white weights)" in said.out
    assert "- stem: the first convolution" in said.out
    assert said.err.splitlines() == ["saved to c.pt"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "name a MODEL to convert"),
        (["wrn_10_1"], 2, "name the file for the converted network: -o FILE"),
        (["wrn_10_1", "-o", "there.pt"], 4, "--out there.pt exists; use --force"),
        (["wrn_10_1", "-g", "3", "-o", "c.pt"], 2, "groups=3 does not divide the channels of 6 convolutions"),
        (["wrn_10_1", "-g", "0", "-o", "c.pt"], 2, "groups=0 must be a whole number"),
        (["wrn_10_1", "--rank", "4", "-o", "c.pt"], 2, "--rank is for lowrank, not for bgc"),
        (["wrn_10_1", "-v", "lowrank", "--rank", "4", "-g", "2", "-o", "c.pt"], 2, "stands in place of --groups 2"),
        (["wrn_10_1", "--init", "calibrated", "-o", "c.pt"], 2, "--init calibrated needs images"),
        (["wrn_10_1", "--data", "./gone", "-o", "c.pt"], 2, "--data ./gone is not there"),
        (["wrn_10_1", "--plan", "plan.json", "-v", "gc", "-o", "c.pt"], 2, "leave --variant out"),
        (
            ["wrn_10_1", "--plan", "plan.json", "--where", "3x3", "-o", "c.pt"],
            2,
            "each convolution; leave it out",
        ),
        (["wrn_10_1", "--plan", "plan.json", "-o", "c.pt"], 2, "it names a.conv, which is not there"),
        (["wrn_10_1", "--plan", "gone.json", "-o", "c.pt"], 2, "gone.json cannot be read"),
        (["wrn_10_1", "-v", "standard", "-o", "c.pt"], 2, "unknown variant 'standard'"),
    ],
)
def test_what_is_wrong_is_one_line_and_no_file(arguments: list[str], code: int, words: str, capsys: Any) -> None:
    Path("there.pt").write_text("mine")
    Path("plan.json").write_text('{"a.conv": {"variant": "gc", "groups": 2}}')
    assert main(["convert", *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert Path("there.pt").read_text() == "mine"
    assert not Path("c.pt").exists()
