"""Running a network and leaving no trace; telling whether it computed the same, and where numbers stop being finite."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from bgcbench.measure.undisturbed import RandomState, first_not_finite, random_state_kept, same_outputs, seed_everything

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], True),
        ([1.0, 2.0], [1.0, 2.001], False),
        ([1e6, 1.0], [1e6, 2.0], True),  # rounding is relative to the largest
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [NAN, 1.0], False),
        ([NAN, NAN], [NAN, NAN], True),
        ([NAN, NAN], [INF, 1.0], False),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_outputs_are_the_same_but_for_rounding(one: list[float], other: list[float], same: bool) -> None:
    left, right = torch.tensor(one), torch.tensor(other)
    assert same_outputs(left, right) is same
    assert same_outputs({"boxes": [left], "n": 1}, {"boxes": [right], "n": 1}) is same


def test_types_counts_and_whole_numbers_count() -> None:
    x = torch.ones(3)
    assert not same_outputs(x, x.double())
    assert not same_outputs(x, (x, x))
    assert not same_outputs(torch.tensor([10**9]), torch.tensor([10**9 + 1]))
    assert same_outputs(x.to("meta"), x.to("meta"))


def drawn() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def test_all_generators_are_put_back_and_can_be_replayed() -> None:
    model = nn.Linear(2, 2)
    state = RandomState.of(model)
    assert state.is_now()
    first = drawn()
    for draw in (lambda: torch.rand(()), random.random, np.random.rand):
        state.restore()
        assert state.is_now()
        draw()
        assert not state.is_now()
    state.restore()
    assert drawn() == first
    seeded = RandomState.seeded(model, 3)
    with random_state_kept(model):
        seed_everything(3)
        wanted = drawn()
    seeded.restore()
    assert drawn() == wanted


def test_the_innermost_module_that_makes_them_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()), nn.Conv2d(2, 2, 1))
    x = torch.ones(1, 1, 2, 2)
    assert first_not_finite(model, lambda: model(x)) is None
    model[1][0].running_var[1] = -1.0
    expected = "1.0 puts out numbers that are not finite (running_var has negative ones)"
    assert first_not_finite(model, lambda: model(x)) == expected
    assert model.training
    model[1][0].running_var[1] = NAN
    expected = "1.0 puts out numbers that are not finite (running_var holds such)"
    assert first_not_finite(model, lambda: model(x)) == expected
    assert first_not_finite(model, lambda: model(x * INF)) == "what comes to 0 has numbers that are not finite"
