"""A variant is a class and an entry of VARIANTS: with these two alone it works everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bgcbench.cli import main
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.blocks import block_diagonal
from bgcbench.convs.gc import best_kernel
from bgcbench.measure.counts import count
from bgcbench.plots import style
from bgcbench.specs import VARIANTS, ConvSpec, Variant, one_block
from bgcbench.theory.leastsquares import Fit
from tests.convs import test_contract as contract


class MirroredGroupConv2d(VariantConv2d):
    """y = GC(x with its channels in reverse order)."""

    variant = "mirror"
    kernel_name = "weight_group"
    weight_group: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input.flip(-3), self.weight_group, self.bias, self.groups)

    def dense_weight(self) -> Tensor:
        return block_diagonal(self.weight_group, self.groups).flip(1)

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        if fit is not None:
            order = torch.arange(weight[0].numel()).reshape(weight.shape[1], -1).flip(0).flatten()
            fit = replace(fit, second_moment=fit.second_moment[order][:, order])
        return {"weight_group": best_kernel(weight.flip(1), self.groups, fit)}


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> str:
    home = f"{__name__}:MirroredGroupConv2d"
    added = Variant("mirror", "Mirror", "GC of reversed channels", home, one_block, look=("#123456", "h", 5.0))
    monkeypatch.setitem(VARIANTS, "mirror", added)
    return "mirror"


def test_it_keeps_the_contract(mirror: str) -> None:
    for groups in (1, 4):
        for shape in contract.SHAPES:
            for name, check in vars(contract.TestForward).items():
                if name.startswith("test_"):
                    check(None, mirror, "stock", groups, *shape.values)
    for name, check in vars(contract.TestModule).items():
        if name.startswith("test_"):
            check(None, mirror, "stock")
    rebuilt = contract.TestProjection()
    for projection in ("white", "least_squares", "copy"):
        rebuilt.test_a_layer_is_rebuilt_from_its_own_dense_kernel(mirror, 4, projection)
    for projection in ("white", "least_squares"):
        rebuilt.test_no_perturbation_lowers_the_error_it_minimises(mirror, 4, projection)


def test_it_is_counted_and_stands_in_table_1(mirror: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert count(ConvSpec(mirror, 8, 16, 3, groups=4, bias=False), 3, 3).params == 9 * 8 * 16 // 4
    assert main(["show", "--table1", "--channels", "8", "--groups", "4", "--format", "csv"]) == 0
    assert any(line.startswith("mirror,4") for line in capsys.readouterr().out.splitlines())


def test_a_misspelt_name_finds_it(mirror: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--variants", "miror"]) == 2
    assert "did you mean 'mirror'" in capsys.readouterr().err


def test_it_is_planned_measured_and_reported(mirror: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ["profile", "--channels", "8", "--size", "5", "--batch", "2", "--variants", mirror, "--groups", "4",
             "--no-reference", "--phases", "fwd", "--device", "cpu"]  # fmt: skip
    assert main([*layer, "--dry-run"]) == 0
    assert "mirror-n4-8x8" in capsys.readouterr().err
    assert main([*layer, "--quick", "--out", str(tmp_path / "layer.json")]) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "layer.json"), "--format", "markdown"]) == 0
    assert "| Mirror" in capsys.readouterr().out


def test_it_is_solved_for_and_drawn(mirror: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "errors.json"
    command = ["approx", "--in-channels", "8", "--out-channels", "8", "--length", "8", "--samples", "64", "--groups",
               "2,4", "--input", "normal", "--variants", f"gc,{mirror}", "--device", "cpu"]  # fmt: skip
    assert main([*command, "--out", str(file)]) == 0
    rows = {(row["params"]["variant"], row["params"]["groups"]): row for row in json.loads(file.read_text())["results"]}
    assert rows["mirror", 4]["params"]["solver"] == "from_dense"
    # On white input it loses what GC loses; of 64 convolutions it is solved for four.
    for groups in (2, 4):
        found, plain = (rows[name, groups]["relative_error"] for name in ("mirror", "gc"))
        assert found == pytest.approx(plain, rel=0.2)
    assert main(["show", str(file), "--plot", str(tmp_path / "errors.svg")]) == 0
    assert "#123456" in (tmp_path / "errors.svg").read_text()
    assert style.label_of(mirror) == "Mirror"
