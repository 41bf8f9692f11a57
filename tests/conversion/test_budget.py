"""Ranks under a budget (tests/theory/test_knapsack.py holds how they are chosen), and conversions by a plan."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from torch import nn

import bgcbench
from bgcbench.conversion.budget import DENSE, principal_energies, ranks_of
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.convs.lowrank import LowRankConv2d
from bgcbench.errors import BgcbenchError
from bgcbench.specs import Choice


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 1), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images(count: int = 16) -> torch.Tensor:
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    return torch.einsum(
        "ij,bjhw->bihw", mixed, torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    )


def test_a_curve_is_the_tail_of_the_singular_values() -> None:
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    (layer,) = bgcbench.convert(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 3, 1)), "lowrank", rank=1, where="3x3"
    ).record.layers
    *ranks, dense = ranks_of(layer, principal_energies([weight.flatten(1)]), "params")
    sigma = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False) ** 2
    assert [(each.key, each.cost) for each in ranks] == [(rank, rank * (72 + 12)) for rank in range(1, 11)]
    np.testing.assert_allclose(
        [each.loss for each in ranks], [sigma[r:].sum() / sigma.sum() for r in range(1, 11)], atol=1e-12
    )
    assert (dense.key, dense.cost, dense.loss) == (DENSE, 72 * 12, 0)


@pytest.mark.parametrize("budget_of", ["params", "macs"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_is_kept_and_told(budget_of: str, calibrated: bool) -> None:
    given = {"init": "calibrated", "calibration": [images()]} if calibrated else {"example_input": (3, 12, 12)}
    done = bgcbench.convert(network(), "lowrank", budget=0.6, budget_of=budget_of, where="all", **given)
    record, spent, whole = done.record, 0, 0
    layers = {layer.name: layer for layer in record.layers}
    for name in ("1", "4", "6"):
        module = done.model.get_submodule(name)
        assert isinstance(module, LowRankConv2d if name in layers else nn.Conv2d)
        weights = sum(p.numel() for key, p in module.named_parameters() if key != "bias")
        original = network().get_submodule(name)
        positions = 100 if name == "6" else 144  # of 12x12 images; the last one is not padded
        scale = positions if budget_of == "macs" else 1
        spent, whole = spent + scale * weights, whole + scale * original.weight.numel()
    assert record.budget is not None
    assert record.budget.cost == budget_of
    assert record.budget.reached == pytest.approx(spent / whole)
    assert spent <= 0.6 * whole
    assert {kept.code for kept in record.kept if kept.name in ("1", "4", "6")} <= {"budget"}
    stored = io.BytesIO()
    bgcbench.save_converted(done, stored)
    stored.seek(0)
    torch.testing.assert_close(bgcbench.load_converted(stored, network())(images()), done.model(images()))


def test_ranks_by_images_lose_less_than_equal_ones_at_the_same_parameters() -> None:
    x = images(64)
    options = {"init": "calibrated", "calibration": [x], "where": "all", "rebn": False}
    spread_out = bgcbench.convert(network(), "lowrank", budget=0.4, **options).model
    uniform = bgcbench.convert(network(), "lowrank", 3, **options).model
    other = images(48)
    wanted = network()(other)
    assert (spread_out(other) - wanted).square().sum() < (uniform(other) - wanted).square().sum()


def test_a_plan_is_followed_layer_by_layer() -> None:
    plan = {"1": {"variant": "bgc", "groups": 4}, "4": Choice("lowrank", rank=5), "6": Choice()}
    done = bgcbench.convert(network(), plan=plan, init="calibrated", calibration=[images()])
    assert isinstance(done.model[1], BalancedGroupConv2d)
    assert isinstance(done.model[4], LowRankConv2d)
    assert (done.model[1].groups, done.model[4].rank) == (4, 5)
    assert isinstance(done.model[6], nn.Conv2d)
    assert [layer.name for layer in done.record.layers] == ["1", "4"]
    assert {kept.name: kept.code for kept in done.record.kept} == {"0": "not_included", "6": "standard"}
    assert done.record.planned
    stored = io.BytesIO()
    bgcbench.save_converted(done, stored)
    stored.seek(0)
    torch.testing.assert_close(bgcbench.load_converted(stored, network())(images()), done.model(images()))


def test_a_choice_says_itself_in_json() -> None:
    for choice in (Choice(), Choice("bgc", 4), Choice("lowrank", rank=3), Choice("lowrank", 2)):
        assert Choice.of(choice.to_json()) == choice
    assert Choice("bgc", 4).to_json() == {"variant": "bgc", "groups": 4}
    assert [Choice().label, Choice("bgc", 4).label, Choice("lowrank", rank=3).label] == ["dense", "BGC N=4", "LR r=3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name a variant with groups=, rank= or budget=, or a plan="),
        ({"variant": "gc"}, "name a variant with groups=, rank= or budget=, or a plan="),
        ({"variant": "lowrank", "groups": 2, "budget": 0.5}, "name a variant with groups=, rank= or budget="),
        ({"variant": "gc", "budget": 0.5}, "gc has groups and no rank; lowrank has one"),
        ({"variant": "lowrank", "budget": 1.5}, "budget=1.5 must be between 0 and 1"),
        ({"variant": "lowrank", "budget": 0.01}, "rank 1 in every layer costs"),
        ({"variant": "lowrank", "budget": 0.5, "budget_of": "time"}, "unknown budget_of 'time'"),
        ({"variant": "lowrank", "rank": 40, "where": "all"}, "rank=40 is too high for the channels of 3 convolutions"),
        ({"plan": {}}, "plan must be {name"),
        ({"plan": {"1": {"variant": "gc", "groups": 4}}, "groups": 2}, "leave out variant, groups"),
        ({"plan": {"9": {"variant": "gc", "groups": 4}}}, "the plan is for another network: it names 9"),
        ({"plan": {"9": Choice(), "1": Choice("gc", 2)}}, "the plan is for another network: it names 9"),
        ({"plan": {"1": {"variant": "gc", "groups": 5}}}, "1 as GC N=5: in_channels=16 is not divisible by groups=5"),
        ({"plan": {"1": {"variant": "gc", "N": 4}}}, "is no choice for a convolution"),
        ({"plan": {"1": {"variant": "gc", "rank": 4}}}, "gc has groups and no rank"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BgcbenchError, match=re.escape(message)):
        bgcbench.convert(network(), **options)
