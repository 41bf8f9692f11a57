from __future__ import annotations

import math

import pytest
import torch

from bgcbench.convs.tlgc import TwoLevelGroupConv2d, white_optimum
from bgcbench.theory.moments import patch_second_moment


@pytest.mark.parametrize(("n", "m", "kernel", "groups"), [(8, 12, 3, 4), (24, 8, 1, 2), (16, 48, (3, 1), 8)])
def test_it_stores_kmn_over_n_plus_kn_plus_nm_numbers(n: int, m: int, kernel: int, groups: int) -> None:
    layer = TwoLevelGroupConv2d(n, m, kernel, groups=groups, bias=False)
    taps = math.prod(layer.kernel_size)
    expected = taps * m * n // groups + taps * n + groups * m
    assert layer.params == sum(p.numel() for p in layer.parameters()) == expected


def test_its_error_on_white_input_is_the_sum_of_the_remaining_squared_singular_values() -> None:
    groups, weight = 4, torch.randn(24, 16, 3, 3, dtype=torch.float64)
    layer = TwoLevelGroupConv2d.from_dense(weight, groups)
    blocks = weight.reshape(groups, 6, groups, 4 * 9)
    expected = 0.0
    for column in range(groups):
        panel = torch.cat([blocks[k, :, column] for k in range(groups) if k != column])
        expected += float(torch.linalg.svdvals(panel)[1:].square().sum())
    assert float((weight - layer.dense_weight()).detach().square().sum()) == pytest.approx(expected, rel=1e-12)


# Shares of the energy lost by i.i.d. 256 x 256 kernels, from the variants' fact sheet (Monte Carlo, 1x1 kernels).
@pytest.mark.parametrize(("groups", "expected"), [(4, 0.723), (8, 0.824), (16, 0.849)])
def test_the_white_error_of_random_1x1_kernels_is_the_one_computed_elsewhere(groups: int, expected: float) -> None:
    weight = torch.randn(256, 256, 1, 1, dtype=torch.float64)
    layer = TwoLevelGroupConv2d.from_dense(weight, groups)
    lost = float((weight - layer.dense_weight()).detach().square().sum() / weight.square().sum())
    assert lost == pytest.approx(expected, abs=0.01)


def test_off_the_diagonal_every_column_panel_of_the_dense_kernel_has_rank_one() -> None:
    dense = TwoLevelGroupConv2d(8, 12, 3, groups=4, dtype=torch.float64).dense_weight().detach()
    for column in range(4):
        panel = torch.cat([dense[3 * k : 3 * k + 3, 2 * column : 2 * column + 2].flatten(1)
                           for k in range(4) if k != column])  # fmt: skip
        assert int(torch.linalg.matrix_rank(panel)) == 1


def test_least_squares_on_real_patches_beats_the_white_optimum_and_ends_in_a_stationary_point() -> None:
    x = torch.randn(8, 16, 9, 9, dtype=torch.float64).relu() + torch.randn(8, 1, 9, 9, dtype=torch.float64)
    weight = torch.randn(16, 16, 3, 3, dtype=torch.float64)
    moment = patch_second_moment(x, (3, 3))
    solved = TwoLevelGroupConv2d.from_dense(weight, 4, projection="least_squares", second_moment=moment)

    def error(layer: TwoLevelGroupConv2d) -> torch.Tensor:
        difference = (weight - layer.dense_weight()).flatten(1)
        return ((difference @ moment) * difference).sum()

    def slope(layer: TwoLevelGroupConv2d) -> float:
        return sum(float(g.norm()) for g in torch.autograd.grad(error(layer), list(layer.parameters())))

    white = TwoLevelGroupConv2d.from_dense(weight, 4)
    assert float(error(solved).detach()) < 0.8 * float(error(white).detach())
    assert slope(solved) < 1e-4 * slope(white)


def test_a_large_ridge_gives_the_white_optimum() -> None:
    weight, root = torch.randn(8, 8, 3, 3, dtype=torch.float64), torch.randn(72, 72, dtype=torch.float64)
    layer = TwoLevelGroupConv2d.from_dense(
        weight, 2, projection="least_squares", second_moment=root @ root.T, ridge=1e9
    )
    white = TwoLevelGroupConv2d.from_dense(weight, 2)
    torch.testing.assert_close(layer.dense_weight(), white.dense_weight(), rtol=1e-5, atol=1e-6)


def test_a_kernel_of_its_own_form_is_found_from_white_input() -> None:
    own = TwoLevelGroupConv2d(8, 8, 3, groups=4, dtype=torch.float64)
    a, r, p = white_optimum(own.dense_weight().detach(), 4)
    assert p.shape == (8, 4, 1, 1)
    assert r.shape == (4, 2, 3, 3)
    assert not any(p[2 * k : 2 * k + 2, k].any() for k in range(4))  # A^k has taken in p_kk r_k
    assert not torch.allclose(a, own.weight_group)


def test_a_few_steps_of_training_move_both_levels_and_lower_the_loss() -> None:
    layer = TwoLevelGroupConv2d(8, 8, 3, groups=4, padding=1)
    x, target = torch.randn(16, 8, 6, 6), torch.randn(16, 8, 6, 6)
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in layer.named_parameters())
