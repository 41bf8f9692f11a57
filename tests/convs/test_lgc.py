from __future__ import annotations

import copy

import pytest
import torch

from bgcbench.convs.lgc import LearnedGroupConv2d
from bgcbench.errors import UsageError


def test_drops_are_made_at_the_shares_of_training_that_condensenet_makes_them() -> None:
    # CondenseNet with C = 4: at 1/6, 1/3 and 1/2 of the training, and never after.
    layer = LearnedGroupConv2d(16, 8, 1, groups=4)
    kept = []
    for progress in (0.0, 1 / 6 - 1e-6, 1 / 6, 1 / 3 - 1e-6, 1 / 3, 1 / 2 - 1e-6, 1 / 2, 0.75, 1.0):
        layer.set_progress(progress)
        kept.append(int(layer.kept.sum(1)[0]))
        assert len(set(layer.kept.sum(1).tolist())) == 1
    assert kept == [16, 16, 12, 12, 8, 8, 4, 4, 4]


@pytest.mark.parametrize("groups", [2, 3, 6, 8, 16, 24])
def test_the_share_computed_in_floating_point_counts_as_reached(groups: int) -> None:
    layer = LearnedGroupConv2d(48, 48, 1, groups=groups)
    for stage in range(1, groups):
        assert layer.set_progress(stage / (2 * (groups - 1)))
        assert layer.stage == stage
        assert not layer.set_progress(stage / (2 * (groups - 1)))


def test_each_group_drops_the_inputs_with_the_least_absolute_weight_of_those_left() -> None:
    layer = LearnedGroupConv2d(8, 6, 3, groups=2, bias=False)
    weight = layer.weight.detach().abs()
    layer.set_progress(1.0)
    for group in range(2):
        # Outputs are interleaved: group 0 has outputs 0, 2, 4 and group 1 has 1, 3, 5.
        sums = weight[group::2].sum((0, 2, 3))
        assert sorted(sums.argsort(descending=True)[:4].tolist()) == torch.where(layer.kept[group])[0].tolist()


def test_what_was_dropped_stays_dropped_even_if_its_weight_grows_or_another_is_zero() -> None:
    layer = LearnedGroupConv2d(8, 8, 1, groups=4)
    layer.set_progress(1 / 6)
    first = ~layer.kept.clone()
    with torch.no_grad():
        layer.weight.masked_fill_(layer.mask()[:, :, None, None] == 0, 100.0)
    layer.set_progress(1 / 3)
    assert not (first & layer.kept).any()
    with torch.no_grad():
        layer.weight.zero_()  # now what is left sums to 0 too
    layer.set_progress(1.0)
    assert not (first & layer.kept).any()
    assert layer.kept.sum(1).tolist() == [2, 2, 2, 2]


def test_going_back_brings_nothing_back_and_a_progress_outside_0_to_1_is_refused() -> None:
    layer = LearnedGroupConv2d(8, 8, 1, groups=4)
    layer.set_progress(0.5)
    before = layer.kept.clone()
    assert not layer.set_progress(0.0)
    assert torch.equal(layer.kept, before)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            layer.set_progress(wrong)


def test_forward_never_prunes() -> None:
    layer = LearnedGroupConv2d(8, 8, 1, groups=4)
    for training in (True, False):
        layer.train(training)(torch.randn(1, 8, 2, 2))
    assert layer.kept.all()


def test_layers_do_not_share_their_progress() -> None:
    first, second = LearnedGroupConv2d(8, 8, 1, groups=4), LearnedGroupConv2d(8, 8, 1, groups=4)
    first.set_progress(1.0)
    assert (first.stage, second.stage) == (3, 0)


def test_dropped_weights_get_no_gradient() -> None:
    layer = LearnedGroupConv2d(8, 8, 3, groups=4)
    layer.set_progress(1.0)
    layer(torch.randn(2, 8, 5, 5)).square().sum().backward()
    gone = (layer.mask() == 0)[:, :, None, None].expand_as(layer.weight)
    assert layer.weight.grad is not None
    assert not layer.weight.grad[gone].any()
    assert layer.weight.grad[~gone].all()


def test_the_group_lasso_is_the_sum_of_the_columns_norms_and_ends_with_the_last_drop() -> None:
    layer = LearnedGroupConv2d(6, 4, 3, groups=2, dtype=torch.float64)
    weight = layer.weight.detach()
    by_hand = sum(float(weight[g::2, j].square().sum()) ** 0.5 for g in range(2) for j in range(6))
    assert layer.group_lasso().item() == pytest.approx(by_hand, rel=1e-12)
    layer.group_lasso().backward()
    assert torch.isfinite(layer.weight.grad).all()
    with torch.no_grad():
        layer.weight.zero_()
    layer.weight.grad = None
    layer.group_lasso().backward()
    assert torch.isfinite(layer.weight.grad).all()  # the root's gradient is unbounded at 0
    layer.set_progress(1.0)
    assert float(layer.group_lasso()) == 0.0


@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1, "stride": 2}])
def test_the_deployed_form_equals_the_masked_one(options: dict[str, int]) -> None:
    layer = LearnedGroupConv2d(12, 8, groups=4, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.bias)
    layer.set_progress(1.0)
    deployed = layer.deploy()
    x = torch.randn(2, 12, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(deployed(x), layer(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(deployed.dense_weight(), layer.dense_weight())
    assert torch.equal(deployed.mask(), layer.mask())
    assert sum(p.numel() for p in deployed.parameters()) == layer.params
    assert deployed.columns.shape == (12,)
    assert deployed.deploy() is deployed
    assert not deployed.set_progress(1.0)


def test_deploying_before_the_last_drop_is_refused_with_the_way_out() -> None:
    layer = LearnedGroupConv2d(8, 8, 1, groups=4)
    layer.set_progress(0.2)
    with pytest.raises(UsageError, match=r"1 of its 3 drops.*set_progress\(1.0\)"):
        layer.deploy()


@pytest.mark.parametrize("algorithm", ["masked", "deployed"])
def test_a_saved_layer_goes_on_where_it_was(algorithm: str) -> None:
    layer = LearnedGroupConv2d(8, 8, 1, groups=4)
    layer.set_progress(1.0 if algorithm == "deployed" else 0.2)
    layer = layer.deploy() if algorithm == "deployed" else layer
    fresh = LearnedGroupConv2d(8, 8, 1, groups=4, algorithm=algorithm)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 3, 3)
    assert fresh.stage == layer.stage
    assert torch.equal(fresh(x), layer(x))
    fresh.set_progress(1.0)
    assert fresh.stage == 3


def test_one_shot_projections_keep_the_largest_columns_by_their_own_measure() -> None:
    # One column of one large weight (energy 9, sum 3), one of many small ones (energy 8 * 0.25 = 2, sum 4).
    weight = torch.zeros(2, 2, 4, 2, dtype=torch.float64)
    weight[:, 0, 0, 0] = 3.0
    weight[:, 1] = 0.5
    copied = LearnedGroupConv2d.from_dense(weight, 2, projection="copy")
    white = LearnedGroupConv2d.from_dense(weight, 2, projection="white")
    assert copied.kept.tolist() == [[False, True]] * 2
    assert white.kept.tolist() == [[True, False]] * 2
    assert LearnedGroupConv2d.from_dense(weight, 2, algorithm="deployed").algorithm == "deployed"


def test_a_few_steps_of_training_lower_the_loss_and_drop_columns_on_schedule() -> None:
    layer = LearnedGroupConv2d(8, 8, 3, groups=4, padding=1)
    x = torch.randn(16, 8, 6, 6)
    target = torch.nn.functional.conv2d(x, torch.randn(8, 8, 3, 3), padding=1)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.02)
    steps, losses, kept = 60, [], []
    for step in range(steps):
        layer.set_progress(step / steps)
        loss = (layer(x) - target).square().mean() + 1e-5 * layer.group_lasso()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        kept.append(int(layer.kept[0].sum()))
    assert kept == [8] * 10 + [6] * 10 + [4] * 10 + [2] * 30
    assert losses[-1] < losses[30]  # the second half only trains
    assert copy.deepcopy(layer).stage == 3
