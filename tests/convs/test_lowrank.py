"""What is special to the low-rank layer: its rank, its parameters, and that its factors are the optimum."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bgcbench.convs.gc import GroupConv2d
from bgcbench.convs.lowrank import LowRankConv2d, factored
from bgcbench.errors import BgcbenchError, ShapeError, UsageError
from bgcbench.theory.moments import patch_second_moment

SHAPES = [(8, 12, 3, 2), (24, 8, 1, 4), (16, 48, (3, 1), 3), (96, 16, 1, 8)]  # N need not divide the channels


@pytest.mark.parametrize(("n", "m", "kernel", "groups"), SHAPES)
def test_its_rank_is_the_largest_with_at_most_the_parameters_of_n_groups(n, m, kernel, groups) -> None:
    layer = LowRankConv2d(n, m, kernel, groups=groups, bias=False)
    columns = n * layer.spec.kernel_positions
    fits = [rank for rank in range(1, min(m, columns) + 1) if rank * (columns + m) * groups <= columns * m]
    assert layer.rank == max(fits)
    assert layer.params == sum(p.numel() for p in layer.parameters()) == max(fits) * (columns + m)
    assert torch.linalg.matrix_rank(layer.double().dense_weight().flatten(1)) == max(fits)


def test_a_reduction_that_leaves_no_rank_is_refused_with_the_largest_that_does() -> None:
    with pytest.raises(ShapeError, match=r"groups=8 leaves no rank for 8 -> 16 .* use at most 5"):
        LowRankConv2d(8, 16, 1, groups=8)
    LowRankConv2d(8, 16, 1, groups=5)
    with pytest.raises(ShapeError, match=r"leaves no rank.* keep it dense"):
        LowRankConv2d(1, 2, 1, groups=2)


def test_a_rank_says_what_n_is() -> None:
    for rank, groups in ((1, 10), (3, 3), (10, 1), (12, 1)):  # 72 x 12 / (rank (72 + 12)) = 10.3 / rank
        layer = LowRankConv2d(8, 12, 3, rank=rank, bias=False)
        assert (layer.rank, layer.groups) == (rank, groups)
        assert layer.params == sum(p.numel() for p in layer.parameters()) == rank * (72 + 12)
        assert layer.macs(5, 5) == 9 * layer.params
    again = LowRankConv2d.of(layer.spec)
    assert again.spec == layer.spec
    assert "rank=12" in repr(again)


def test_at_full_rank_nothing_is_lost() -> None:
    weight = torch.randn(12, 8, 3, 3, dtype=torch.float64)
    layer = LowRankConv2d.from_dense(weight, rank=12)
    torch.testing.assert_close(layer.dense_weight(), weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 13}, "rank=13 is more than 12, the most that 8 -> 12 channels and 9 kernel positions have"),
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 3, "groups": 2}, "rank=3 and groups=2: give one of them; this rank is N=3"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(BgcbenchError, match=re.escape(message)):
        LowRankConv2d(8, 12, 3, **options)


def test_groups_have_no_rank() -> None:
    with pytest.raises(UsageError, match="gc has groups and no rank; lowrank has one"):
        GroupConv2d(8, 12, 3, rank=2)


@pytest.mark.parametrize("projection", ["copy", "white"])
@pytest.mark.parametrize("m", [12, 100])
def test_without_a_moment_it_is_the_truncated_singular_value_decomposition(m: int, projection: str) -> None:
    weight = torch.randn(m, 8, 3, 3, dtype=torch.float64)
    layer = LowRankConv2d.from_dense(weight, 2, projection=projection)
    u, sigma, vh = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)
    best = (u[:, : layer.rank] * sigma[: layer.rank]) @ vh[: layer.rank]
    np.testing.assert_allclose(layer.dense_weight().detach().flatten(1), best, atol=1e-12)


@pytest.mark.parametrize("is_deficient", [False, True])
@pytest.mark.parametrize("m", [12, 72, 200])
def test_least_squares_reaches_the_singular_values_that_numpy_finds(m: int, is_deficient: bool) -> None:
    """min tr((W - D) C (W - D)^T) over rank r is the tail of the squared singular values of W C^(1/2)."""
    weight = torch.randn(m, 8, 3, 3, dtype=torch.float64)
    inputs = torch.randn(72, 40 if is_deficient else 200, dtype=torch.float64) * torch.linspace(0.1, 3, 72)[:, None]
    moment = inputs @ inputs.T / inputs.shape[1]
    layer = LowRankConv2d.from_dense(weight, 3, projection="least_squares", second_moment=moment)
    lost = (weight - layer.dense_weight()).flatten(1).detach()
    values, vectors = np.linalg.eigh(moment.numpy())
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    sigma = np.linalg.svd(weight.flatten(1).numpy() @ root, compute_uv=False)
    assert float(((lost @ moment) * lost).sum()) == pytest.approx((sigma[layer.rank :] ** 2).sum(), rel=1e-9)


def test_where_outputs_are_wanted_it_is_reduced_rank_regression() -> None:
    """Izenman's solution, from the data: the regression's fitted values, cut to their first principal components."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((24, 400)), rng.standard_normal((10, 400))
    y += rng.standard_normal((10, 24)) @ x
    weight = torch.randn(10, 24, 1, 1, dtype=torch.float64)
    second, cross = torch.from_numpy(x @ x.T / 400), torch.from_numpy(y @ x.T / 400)
    layer = LowRankConv2d.from_dense(weight, 2, projection="least_squares", second_moment=second, cross_moment=cross)
    fitted = y @ np.linalg.pinv(x) @ x
    u, _, _ = np.linalg.svd(fitted, full_matrices=False)
    expected = u[:, : layer.rank] @ u[:, : layer.rank].T @ fitted
    np.testing.assert_allclose(layer.dense_weight().detach().flatten(1).numpy() @ x, expected, atol=1e-9)


def test_no_small_change_of_either_factor_lowers_the_error() -> None:
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64).relu()
    weight, moment = torch.randn(16, 8, 3, 3, dtype=torch.float64), patch_second_moment(x, (3, 3))
    layer = LowRankConv2d.from_dense(weight, 2, projection="least_squares", second_moment=moment)

    def error() -> float:
        lost = (weight - layer.dense_weight()).flatten(1).detach()
        return float(((lost @ moment) * lost).sum())

    least = error()
    with torch.no_grad():
        for _ in range(20):
            for factor in layer.parameters():
                step = 1e-3 * torch.randn_like(factor)
                factor.add_(step)
                assert error() > least
                factor.sub_(step)


def test_its_factors_share_the_size_and_a_target_of_lower_rank_is_met() -> None:
    target = torch.randn(6, 2, dtype=torch.float64) @ torch.randn(2, 9, dtype=torch.float64)
    expand, reduce = factored(target, None, 3)
    torch.testing.assert_close(expand @ reduce, target)
    torch.testing.assert_close(expand[:, :2].norm(dim=0), reduce[:2].norm(dim=1))
    assert torch.isfinite(expand).all()
    assert torch.isfinite(reduce).all()


class Watched(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients", [False, True])
def test_products_of_matrices_copy_no_image(gradients: bool) -> None:
    """torch.matmul would for a single matrix, for the sake of its gradient."""
    layer, x = LowRankConv2d(16, 32, 1, rank=2, algorithm="matmul"), torch.randn(3, 16, 5, 4)
    with torch.set_grad_enabled(gradients), Watched() as watched:
        y = layer(x)
    assert watched.names.count("bmm.default") == 2
    assert not {"clone.default", "copy_.default", "mm.default"} & set(watched.names)
    torch.testing.assert_close(y, layer(x))
