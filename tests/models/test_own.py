"""Networks of the user's own: which functions are called, what they may return, and that no file makes one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bgcbench
from bgcbench import specs
from bgcbench.cli import main
from bgcbench.errors import UsageError
from bgcbench.models import identify
from bgcbench.specs import NetSpec
from tests.stored import stored

NETWORK = """
import torch
from torch import nn
from helper import widths

calls = []
shared = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def make():
    calls.append(1)
    a, b = widths
    return nn.Sequential(nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 5))

def same(): return shared
def needs(width): return shared
def fails(): raise OSError("the weights are gone")
def number(): return 3
def features(): return nn.Conv2d(3, 8, 3)
def scripted(): return torch.jit.script(shared)
constant = 3
"""
LIGHT = ["--size", "8", "--batch", "2", "--groups", "2", "--device", "cpu", "--quick", "--quiet"]

pytestmark = pytest.mark.usefixtures("brisk", "one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's file and its helper; what the user named before is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "_named_by_user", set())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.py").write_text(NETWORK)
    (tmp_path / "mine" / "helper.py").write_text("widths = (16, 32)\n")
    (tmp_path / "shop.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 8, 3)\n")
    return tmp_path


def test_a_function_in_a_file_or_in_a_module_makes_the_network() -> None:
    model = bgcbench.build_model("mine/net.py:make")
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert bgcbench.build_model("shop:make").out_channels == 8
    assert identify(model) is None


def test_one_that_returns_the_same_network_twice_gives_two() -> None:
    one, other = (bgcbench.build_model("mine/net.py:same") for _ in range(2))
    with torch.no_grad():
        one[0].weight.zero_()
    assert other[0].weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("mine/net.py:mak", "did you mean 'make'? mine/net.py has no function 'mak'"),
        ("mine/net.py:constant", "has no function 'constant'"),
        ("mine/net.py:needs", "calling it without arguments failed: TypeError"),
        ("mine/net.py:fails", "failed: OSError: the weights are gone"),
        ("mine/net.py:number", "returns a int; return the torch.nn.Module itself"),
        ("mine/net.py:features", "must return a tensor of (images, classes); for one image it is (1, 8, 6, 6)"),
        ("mine/net.py:scripted", "returns TorchScript, which cannot be changed"),
        ("mine/net.py", "must name the function that makes the network, too, such as mine/net.py:make"),
        ("gone.py:make", "there is no file gone.py"),
        ("no_such_module:make", "importing no_such_module failed: ModuleNotFoundError"),
        ("net.pt2", "is an exported program, whose convolutions cannot be replaced"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_is_no_network_is_one_line(model: str, words: str, capsys: Any) -> None:
    assert main(["profile", model, *LIGHT, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_file_that_names_a_function_does_not_make_it_run(here: Path, capsys: Any) -> None:
    assert main(["profile", "mine/net.py:make", *LIGHT, "--out", "r.json"]) == 0
    assert stored(here / "r.json")["config"]["num_classes"] == 5
    specs._named_by_user.clear()
    capsys.readouterr()
    assert main(["profile", "--resume", "r.json", "--quiet"]) == 2
    assert "a file asks for it; name it on the command line" in capsys.readouterr().err
    with pytest.raises(UsageError, match="name it on the command line"):
        NetSpec("mine/net.py:make")
    assert main(["profile", "mine/net.py:make", "--resume", "r.json", "--quiet"]) == 0


def test_its_own_weights_are_converted_and_other_classes_are_refused(here: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    shared = [
        "mine/net.py:make",
        "--data",
        "digits",
        "--size",
        "8",
        "--groups",
        "2",
        "--device",
        "cpu",
        "--quick",
        "--quiet",
    ]
    assert main(["approx", *shared, "--calibration-images", "8", "--out", "a.json"]) == 0
    assert {row["params"]["weights"] for row in json.loads((here / "a.json").read_text())["results"]} == {"own"}
    capsys.readouterr()
    assert main(["train", *shared]) == 2
    assert "tells 5 classes apart, and 10 are needed" in capsys.readouterr().err
    assert main(["approx", "wrn_10_1", "--data", "digits", "--weights", "own"]) == 2
    assert "--weights own is for a network of your own" in capsys.readouterr().err
