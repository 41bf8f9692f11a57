from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from bgcbench.errors import UsageError
from bgcbench.theory import paper
from bgcbench.training.recipes import HYPER, TRANSFER_RECIPES, Recipe, make_recipe, make_transfer_recipe


def rates(recipe: Recipe, steps: int) -> list[float]:
    return [recipe.lr_at(step, steps) for step in range(recipe.epochs * steps)]


def torchs(make: Any, lr: float, count: int) -> list[float]:
    """The learning rates that one of PyTorch's schedulers gives ``count`` steps."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimiser)
    found = []
    for _ in range(count):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("epochs", "steps"), [(20, 20), (1, 7), (3, 1), (1, 2)])
def test_one_cycle_is_that_of_pytorch(epochs: int, steps: int) -> None:
    recipe = make_recipe("digits", 16, {"epochs": epochs, "lr": 0.3})
    count = epochs * steps
    expected = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=count + 1 - 1), 0.3, count - 1)
    assert rates(recipe, steps)[: count - 1] == pytest.approx(expected, rel=1e-9)


def test_one_cycle_ends_where_pytorchs_does() -> None:
    assert make_recipe("digits", 16, {"lr": 0.1}).lr_at(20 * 20 - 1, 20) == pytest.approx(0.1 / 25 / 1e4)


def test_steps_drop_where_pytorchs_do() -> None:
    recipe = make_recipe("paper", 32, {"epochs": 10, "milestones": (3, 6, 8), "gamma": 0.2})
    expected = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [12, 24, 32], 0.2), 0.1, 40)
    assert rates(recipe, 4) == pytest.approx(expected)


def test_the_cosine_is_that_of_pytorch() -> None:
    recipe = make_recipe("paper", 32, {"epochs": 6, "schedule": "cosine"})
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30), 0.1, 30)
    assert rates(recipe, 5) == pytest.approx(expected, abs=1e-12)


def test_a_constant_learning_rate_is_constant() -> None:
    assert set(rates(make_recipe("digits", 16, {"schedule": "constant", "lr": 0.02}), 3)) == {0.02}


def test_the_recipes_are_those_of_the_paper() -> None:
    small, large = make_recipe("paper", 32, {}), make_recipe("paper", 224, {})
    assert (small.epochs, small.milestones, small.weight_decay) == (200, (60, 120, 160), 5e-4)
    assert (large.epochs, large.milestones, large.weight_decay) == (90, (30, 60), 1e-4)
    for recipe in (small, large):
        assert (recipe.batch_size, recipe.lr, recipe.gamma, recipe.momentum, recipe.nesterov) == (
            128,
            0.1,
            0.1,
            0.9,
            True,
        )
        assert (recipe.label_smoothing, recipe.precision, recipe.layout, recipe.compile) == (0.0, "fp32", "nchw", False)


def test_fast_is_the_same_optimisation() -> None:
    paper, fast = make_recipe("paper", 32, {}), make_recipe("fast", 32, {})
    differing = {name for name in HYPER if getattr(paper, name) != getattr(fast, name)}
    assert differing == {"precision", "layout", "compile"}
    assert (fast.precision, fast.layout, fast.compile) == ("bf16", "nhwc", True)


def test_digits_are_trained_in_one_cycle_of_20_epochs() -> None:
    recipe = make_recipe("digits", 16, {})
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.schedule) == (20, 64, 0.1, "onecycle")
    assert (recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.9, True, 5e-4)


def test_milestones_keep_their_share_of_a_shorter_training() -> None:
    assert make_recipe("paper", 32, {"epochs": 20}).milestones == (6, 12, 16)
    assert make_recipe("paper", 32, {"epochs": 2}).milestones == (1,)
    assert make_recipe("paper", 32, {"epochs": 1}).milestones == ()
    assert make_recipe("paper", 32, {"epochs": 20, "milestones": (5,)}).milestones == (5,)
    assert make_recipe("digits", 16, {"epochs": 10, "schedule": "multistep"}).milestones == (3, 6, 8)


def test_transfer_has_recipes_of_its_own() -> None:
    slow, fast = (make_transfer_recipe(name, {}) for name in TRANSFER_RECIPES)
    assert (slow.epochs, slow.batch_size, slow.lr, slow.schedule) == (paper.TABLE3_EPOCHS, 128, 0.01, "constant")
    assert (slow.momentum, slow.nesterov, slow.weight_decay, slow.label_smoothing) == (0.9, True, 1e-4, 0.0)
    assert (slow.precision, slow.layout, slow.compile) == ("fp32", "nchw", False)
    assert {name for name in HYPER if getattr(slow, name) != getattr(fast, name)} == {"precision", "layout", "compile"}
    assert make_transfer_recipe("paper", {"schedule": "multistep", "epochs": 10}).milestones == (3, 6, 8)
    with pytest.raises(UsageError, match="unknown recipe 'digits': choose from paper, fast"):
        make_transfer_recipe("digits", {})


def test_transfer_without_epochs_has_no_use_for_the_rest_of_a_recipe() -> None:
    given = {"epochs": 0, "schedule": "multistep", "milestones": (10, 20), "lr": 0.1}
    assert make_transfer_recipe("paper", given).epochs == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -0.1}, "--lr -0.1 must be at least 0 and a number"),
        ({"lr": 0.0}, "--lr 0 trains nothing; give a positive learning rate"),
        ({"lr": float("nan")}, "--lr nan must be"),
        ({"momentum": 1.0}, "--momentum 1 must be at least 0 and below 1"),
        ({"momentum": 0.0}, "--momentum 0 has no Nesterov form; add --no-nesterov"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1 must be at least 0 and below 1"),
        ({"milestones": (8, 4)}, "--milestones 8,4 must rise"),
        ({"milestones": (5, 200)}, "--milestones 5,200 must lie between epoch 1 and the last but one of 200"),
        ({"schedule": "cosine", "milestones": (5,)}, "--milestones is for --schedule multistep, and this is cosine"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'?"),
        ({"epochs": 0}, "epochs=0 must be"),
        ({"precision": "bf6"}, "unknown precision 'bf6': did you mean 'bf16'?"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_recipe("paper", 32, given)
