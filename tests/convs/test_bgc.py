from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bgcbench.convs.bgc import BalancedGroupConv2d, copy_blocks, least_squares, white_optimum
from bgcbench.convs.bgc_algorithms import append_to_groups, dense_kernel, group_mean
from bgcbench.convs.gc import GroupConv2d
from bgcbench.convs.gc import least_squares as gc_least_squares
from bgcbench.theory.leastsquares import Fit


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_equation_3_1_written_out_group_by_group() -> None:
    groups, x = 3, randn(2, 6, 5, 5)
    layer = BalancedGroupConv2d(6, 9, 3, padding=1, groups=groups, dtype=torch.float64)
    parts = x.split(2, dim=1)
    mean = (parts[0] + parts[1] + parts[2]) / 3
    rows = [
        F.conv2d(parts[k], layer.weight_group[3 * k : 3 * k + 3], padding=1)
        + F.conv2d(mean, layer.weight_mean[3 * k : 3 * k + 3], padding=1)
        for k in range(groups)
    ]
    torch.testing.assert_close(layer(x), torch.cat(rows, dim=1), rtol=1e-12, atol=1e-12)


def test_the_dense_kernel_entry_by_entry() -> None:
    groups, a, b = 2, randn(4, 3, 1, 1), randn(4, 3, 1, 1)
    dense = dense_kernel(a, b, groups)
    for i in range(4):
        for j in range(6):
            own = a[i, j % 3, 0, 0] if i // 2 == j // 3 else 0.0
            assert dense[i, j, 0, 0] == pytest.approx(float(own + b[i, j % 3, 0, 0] / groups), rel=1e-15)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_mean_is_over_groups_and_not_within_one(memory_format: torch.memory_format) -> None:
    x = randn(2, 6, 4, 3).contiguous(memory_format=memory_format)
    expected = (x[:, 0:2] + x[:, 2:4] + x[:, 4:6]) / 3
    torch.testing.assert_close(group_mean(x, 3), expected)
    both = append_to_groups(x, group_mean(x, 3), 3)
    torch.testing.assert_close(both, torch.cat([x[:, 0:2], expected, x[:, 2:4], expected, x[:, 4:6], expected], 1))
    assert group_mean(x, 3).is_contiguous(memory_format=memory_format)
    assert both.is_contiguous(memory_format=memory_format)


def test_permuting_whole_groups_of_the_input_leaves_the_mean_unchanged() -> None:
    x = randn(1, 8, 3, 3)
    permuted = x.unflatten(1, (4, 2))[:, [2, 0, 3, 1]].flatten(1, 2)
    torch.testing.assert_close(group_mean(x, 4), group_mean(permuted, 4))


def test_without_its_mean_branch_it_is_a_group_convolution() -> None:
    layer = BalancedGroupConv2d(8, 8, 3, groups=4, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight_mean)
    plain = GroupConv2d(8, 8, 3, groups=4, dtype=torch.float64)
    plain.load_state_dict({"weight": layer.weight_group, "bias": layer.bias})
    x = randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_groups_projected_with_white_reproduce_every_standard_convolution(stride, dilation, dtype) -> None:
    weight, bias, x = (torch.randn(s, dtype=dtype) for s in ((6, 10, 3, 3), (6,), (2, 10, 11, 9)))
    layer = BalancedGroupConv2d.from_dense(
        weight, 2, bias=bias, stride=stride, padding=1, dilation=dilation, projection="white"
    )
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1, dilation)
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("projection", ["copy", "white"])
def test_both_closed_forms_are_exact_when_all_input_groups_are_equal(groups: int, projection: str) -> None:
    weight, part = randn(16, 16, 3, 3), randn(2, 16 // groups, 6, 6)
    x = part.repeat(1, groups, 1, 1)
    layer = BalancedGroupConv2d.from_dense(weight, groups, projection=projection)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight), rtol=1e-11, atol=1e-11)


def test_the_papers_construction_is_the_diagonal_and_the_sum_of_the_rest() -> None:
    weight = randn(4, 4, 1, 1)
    a, b = copy_blocks(weight, 2)
    torch.testing.assert_close(a, torch.cat([weight[:2, :2], weight[2:, 2:]]))
    torch.testing.assert_close(b, torch.cat([weight[:2, 2:], weight[2:, :2]]))


def test_rebuilding_from_the_papers_construction_shrinks_the_mean_weights() -> None:
    groups = 4
    layer = BalancedGroupConv2d(8, 8, 3, groups=groups, dtype=torch.float64)
    a, b = copy_blocks(layer.dense_weight(), groups)
    torch.testing.assert_close(b, (groups - 1) / groups * layer.weight_mean)
    torch.testing.assert_close(a, layer.weight_group + layer.weight_mean / groups)


@pytest.mark.parametrize(("construct", "exact"), [(copy_blocks, (1 - 1 / 4) ** 2), (white_optimum, 1 - 2 / 4)])
def test_white_errors_by_monte_carlo(construct, exact: float) -> None:
    lost = total = 0.0
    for _ in range(20):
        weight = randn(64, 64, 1, 1)
        lost += float((weight - dense_kernel(*construct(weight, 4), 4)).square().sum())
        total += float(weight.square().sum())
    # 20 kernels of 4096 independent entries: the share's standard deviation is near sqrt(2 / 81920) = 0.5 %.
    assert lost / total == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_least_squares_equals_lstsq_on_the_explicit_design_matrix(groups: int) -> None:
    n, m, samples = 16, 8, 400
    weight = randn(m, n, 1, 1)
    mixing = randn(n, n) + 1.0
    u = randn(samples, n) @ mixing  # correlated, with a common factor
    moment = u.T @ u / samples
    a, b = least_squares(weight, groups, Fit(moment))
    gc = gc_least_squares(weight, groups, Fit(moment))
    per, rows = n // groups, m // groups
    mean = u.unflatten(1, (groups, per)).mean(1)
    for k in range(groups):
        y = u @ weight.flatten(1)[k * rows : (k + 1) * rows].T
        own = u[:, k * per : (k + 1) * per]
        design = torch.cat([own, mean], dim=1)
        best = torch.linalg.lstsq(design, y).solution
        ours = torch.cat([a, b], dim=1).flatten(1)[k * rows : (k + 1) * rows].T
        torch.testing.assert_close(design @ ours, design @ best, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
        alone = torch.linalg.lstsq(own, y).solution
        torch.testing.assert_close(own @ gc.flatten(1)[k * rows : (k + 1) * rows].T, own @ alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [2, 4])
def test_least_squares_equals_the_white_optimum_for_exchangeable_groups(groups: int) -> None:
    weight, per = randn(8, 8, 1, 1), 8 // groups
    root = randn(per, per)
    shared = root @ root.T  # C_kl for k != l; the diagonal blocks are larger by another positive matrix
    own = randn(per, per)
    moment = shared.repeat(groups, groups) + torch.block_diag(*[own @ own.T + torch.eye(per)] * groups)
    a, b = least_squares(weight, groups, Fit(moment))
    torch.testing.assert_close(
        dense_kernel(a, b, groups), dense_kernel(*white_optimum(weight, groups), groups), rtol=1e-7, atol=1e-7
    )


def test_a_strong_ridge_gives_the_white_optimum_and_a_weak_one_least_squares() -> None:
    weight, root = randn(8, 8, 3, 3), randn(72, 72)
    moment = root @ root.T
    white, exact = white_optimum(weight, 4), least_squares(weight, 4, Fit(moment))
    for strong, limit in zip(least_squares(weight, 4, Fit(moment, ridge=1e9)), white, strict=True):
        torch.testing.assert_close(strong, limit, rtol=1e-6, atol=1e-6)
    for weak, limit in zip(least_squares(weight, 4, Fit(moment, ridge=1e-12)), exact, strict=True):
        torch.testing.assert_close(weak, limit, rtol=1e-4, atol=1e-5)


def test_bgc_with_twice_the_groups_ties_gc_at_equal_size_on_white_input_and_wins_on_correlated_input() -> None:
    n, weight = 64, randn(64, 64, 1, 1)

    def best(groups: int, moment: Tensor, kernel: str) -> float:
        if kernel == "gc":
            dense = GroupConv2d.from_dense(weight, groups, projection="least_squares", second_moment=moment)
        else:
            dense = BalancedGroupConv2d.from_dense(weight, groups, projection="least_squares", second_moment=moment)
        flat = (weight - dense.dense_weight()).detach().flatten(1)
        whole = weight.flatten(1)
        return float(((flat @ moment) * flat).sum() / ((whole @ moment) * whole).sum())

    white, common = torch.eye(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64) + 1.0
    assert best(8, white, "bgc") == pytest.approx(best(4, white, "gc"), rel=0.05)
    assert best(16, common, "bgc") < 0.95 * best(8, common, "gc")


def test_one_group_is_the_standard_convolution_without_a_second_kernel() -> None:
    layer = BalancedGroupConv2d(4, 6, 3, dtype=torch.float64)
    assert layer.weight_mean is None
    assert layer.params == 6 * 4 * 9 + 6
    x = randn(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight_group, layer.bias))


def test_as_many_groups_as_channels_is_depthwise_plus_one_mean_channel() -> None:
    layer = BalancedGroupConv2d(4, 4, 3, groups=4, bias=False, dtype=torch.float64)
    x = randn(1, 4, 5, 5)
    depthwise = F.conv2d(x, layer.weight_group, groups=4)
    mean = F.conv2d(x.mean(1, keepdim=True), layer.weight_mean)
    torch.testing.assert_close(layer(x), depthwise + mean, rtol=1e-12, atol=1e-12)
