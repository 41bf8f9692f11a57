from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bgcbench.convs import CONVS
from bgcbench.theory import residual
from bgcbench.theory.residual import SEES_MEAN, centred, explained, inner_product, outside, squared_norms
from tests.theory.explicit import left_over, moment_of_patches, regressors, residual_forms

SIZE = 24  # nK: 8 channels of 3 taps, or 24 of one


def moment_of_rank(rank: int) -> Tensor:
    """The second moment of ``rank`` random vectors with a common part: nothing about it is special."""
    rows = torch.randn(rank, SIZE, dtype=torch.float64) + torch.randn(rank, 1, dtype=torch.float64)
    return rows.T @ rows / rank


def hard_moments() -> dict[str, Tensor]:
    """Moments that are singular, each in a way of its own."""
    never = moment_of_rank(60)
    never[:3], never[:, :3] = 0.0, 0.0  # taps that never meet the image
    return {
        "few": moment_of_rank(5),  # fewer positions than any group has unknowns
        "half": moment_of_rank(14),  # more than one group's unknowns, fewer than two groups'
        "equal": moment_of_patches("factor:1", 8, (1, 6), (1, 3), padding=(0, 1)),
        "never": never,
        "one": torch.ones(SIZE, SIZE, dtype=torch.float64),
        "nothing": torch.zeros(SIZE, SIZE, dtype=torch.float64),
    }


def form(moment: Tensor, factor: Tensor) -> Tensor:
    return moment - factor.T @ factor


@pytest.mark.parametrize("variant", ["gc", "shuffle", "bgc"])
@pytest.mark.parametrize("groups", [2, 3, 4, 8, 24])
def test_what_is_left_is_the_schur_complement_of_what_is_seen(variant: str, groups: int) -> None:
    moment = moment_of_rank(60)
    for group in range(groups):
        found = explained(moment, group, groups, with_mean=SEES_MEAN[variant])
        expected = left_over(moment, regressors(variant, group, groups, SIZE))
        torch.testing.assert_close(form(moment, found.factor), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", ["gc", "bgc"])
@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("name", ["few", "half", "equal", "never", "one", "nothing"])
def test_singular_moments_have_a_pseudo_inverse(name: str, groups: int, variant: str) -> None:
    moment = hard_moments()[name]
    scale = float(moment.diagonal().max())
    for group in range(groups):
        found = explained(moment, group, groups, with_mean=SEES_MEAN[variant])
        expected = left_over(moment, regressors(variant, group, groups, SIZE))
        torch.testing.assert_close(form(moment, found.factor), expected, rtol=0, atol=1e-9 * scale + 1e-300)
        assert all(len(part) <= SIZE // groups for part in (found.own, found.mean) if part is not None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [1, 2, 14, 23])
def test_directions_that_are_nothing_but_rounding_are_not_counted(rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    data = torch.randn(60, rank, dtype=torch.float64) @ torch.randn(rank, SIZE, dtype=torch.float64)
    data[:, 1] = data[:, 0] - data[:, 2]  # among the first group's own channels too
    data[:, 7] = data[:, 6]
    for groups in (2, 3, 4):
        for group in range(groups):
            found = explained(data.T @ data, group, groups, with_mean=True)
            own, both = (
                int(torch.linalg.matrix_rank(data @ regressors(variant, group, groups, SIZE).T))
                for variant in ("gc", "bgc")
            )
            assert (len(found.own), len(found.factor)) == (own, both)


@pytest.mark.parametrize("variant", ["gc", "bgc"])
@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_channels_may_have_very_different_scales(variant: str, ratio: float) -> None:
    scales = torch.ones(SIZE, dtype=torch.float64)
    scales[4:11], scales[17:20] = ratio, ratio
    data, groups = (torch.randn(60, SIZE, dtype=torch.float64) + 0.3) * scales, 4
    for group in range(groups):
        basis = torch.linalg.svd(data @ regressors(variant, group, groups, SIZE).T, full_matrices=False).U
        rest = data - basis @ (basis.T @ data)
        found = form(data.T @ data, explained(data.T @ data, group, groups, with_mean=SEES_MEAN[variant]).factor)
        error = (found - rest.T @ rest) / scales[:, None] / scales  # every entry in its own units
        assert float(error.abs().max()) < 60 * 1e-12 / ratio**2


@pytest.mark.parametrize("variant", ["gc", "bgc"])
def test_the_error_of_a_row_is_that_of_its_least_squares_problem(variant: str) -> None:
    # Straight from the data, without a second moment: residuals of lstsq on [u^k] and [u^k, ubar].
    data, row, groups = torch.randn(50, SIZE, dtype=torch.float64) + 0.3, torch.randn(SIZE, dtype=torch.float64), 4
    for group in range(groups):
        design = data @ regressors(variant, group, groups, SIZE).T
        target = (data @ row)[:, None]
        rest = target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution
        moment = data.T @ data
        found = form(moment, explained(moment, group, groups, with_mean=SEES_MEAN[variant]).factor)
        assert float(row @ found @ row) == pytest.approx(float(rest.square().sum()), rel=1e-11)


@pytest.mark.parametrize("name", ["regular", "few", "half", "equal", "never", "one"])
def test_two_balanced_groups_leave_nothing(name: str) -> None:
    moment = moment_of_rank(60) if name == "regular" else hard_moments()[name]
    for group in range(2):
        left = form(moment, explained(moment, group, 2, with_mean=True).factor)
        assert float(left.abs().max()) < 1e-10 * float(moment.diagonal().max())


@pytest.mark.parametrize("with_mean", [False, True])
def test_one_group_leaves_nothing_and_needs_no_mean(with_mean: bool) -> None:
    moment = moment_of_rank(60)
    found = explained(moment, 0, 1, with_mean=with_mean)
    assert found.mean is None
    assert float(form(moment, found.factor).abs().max()) < 1e-12 * float(moment.diagonal().max())


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("name", ["regular", "half", "equal"])
def test_the_rows_of_a_group_convolution_are_the_first_rows_of_a_balanced_one(name: str, groups: int) -> None:
    moment = moment_of_rank(60) if name == "regular" else hard_moments()[name]
    for group in range(groups):
        gc, bgc = (explained(moment, group, groups, with_mean=with_mean) for with_mean in (False, True))
        assert gc.mean is None
        assert bgc.mean is not None
        assert torch.equal(gc.factor, gc.own)
        assert torch.equal(bgc.own, gc.own)
        assert torch.equal(bgc.factor, torch.cat([bgc.own, bgc.mean]))


@pytest.mark.parametrize("groups", [3, 4])
def test_the_rows_are_orthonormal_combinations_of_the_regressors_times_the_moment(groups: int) -> None:
    moment = moment_of_rank(60)
    inverse = torch.linalg.inv(moment)
    for group in range(groups):
        factor = explained(moment, group, groups, with_mean=True).factor
        combinations = factor @ inverse  # Q with H = Q M, so that Q M Q^T is the moment of the combinations
        torch.testing.assert_close(combinations @ factor.T, torch.eye(len(factor)).double(), rtol=0, atol=1e-9)
        seen = regressors("bgc", group, groups, SIZE)
        outside_of_it = combinations - combinations @ torch.linalg.pinv(seen) @ seen
        assert float(outside_of_it.abs().max()) < 1e-9 * float(combinations.abs().max())


@pytest.mark.parametrize("with_mean", [False, True])
def test_eigenvectors_find_what_cholesky_finds(with_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = moment_of_rank(60)
    direct = [explained(moment, group, 4, with_mean=with_mean).factor for group in range(4)]
    monkeypatch.setattr(residual, "_SINGULAR", {torch.float64: 1.0})  # no Cholesky factor is trusted
    for group, factor in enumerate(direct):
        other = explained(moment, group, 4, with_mean=with_mean).factor
        assert not torch.equal(other, factor)
        torch.testing.assert_close(form(moment, other), form(moment, factor), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["regular", "half", "equal"])
def test_single_precision_finds_the_same_to_its_own_precision(name: str) -> None:
    moment = moment_of_rank(60) if name == "regular" else hard_moments()[name]
    scale = float(moment.diagonal().max())
    for variant in ("gc", "bgc"):
        found = explained(moment.float(), 1, 4, with_mean=SEES_MEAN[variant]).factor
        assert found.dtype == torch.float32
        expected = left_over(moment, regressors(variant, 1, 4, SIZE))
        assert float((form(moment, found.double()) - expected).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_the_spread_is_the_trace_of_the_squared_form(groups: int) -> None:
    moment = moment_of_rank(60)
    scale = float(moment.square().sum())
    for group in range(groups):
        found = squared_norms(moment, explained(moment, group, groups, with_mean=True))
        for variant, value in zip(("gc", "bgc"), found, strict=True):
            left = left_over(moment, regressors(variant, group, groups, SIZE))
            assert value == pytest.approx(float((left @ left).trace()), rel=1e-9, abs=1e-12 * scale)
        without = squared_norms(moment, explained(moment, group, groups, with_mean=False))
        assert without == pytest.approx((found[0], found[0]), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["regular", "few", "equal"])
def test_a_spread_is_never_negative_not_even_where_nothing_is_left(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    moment = moment_of_rank(60) if name == "regular" else hard_moments()[name]
    for group in range(2):
        own, both = squared_norms(moment, explained(moment, group, 2, with_mean=True))
        assert own >= 0
        assert 0 <= both < 1e-9 * float(moment.square().sum())


def test_the_spread_of_gaussian_rows_is_twice_the_squared_norm() -> None:
    # Var(w S w^T) = 2 tr(S^2) for w ~ N(0, I): what the standard errors of a run rest on.
    moment = moment_of_rank(60)
    own, both = squared_norms(moment, explained(moment, 1, 4, with_mean=True))
    rows = torch.randn(40000, SIZE, dtype=torch.float64)
    for variant, value in (("gc", own), ("bgc", both)):
        left = left_over(moment, regressors(variant, 1, 4, SIZE))
        errors = ((rows @ left) * rows).sum(1)
        kurtosis = float(((errors - errors.mean()) / errors.std()).pow(4).mean())
        sure = 5 * ((kurtosis - 1) / len(rows)) ** 0.5  # of a variance, relative
        assert 2 * value == pytest.approx(float(errors.var()), rel=sure)


@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_centring_takes_the_mean_of_the_groups_from_every_group(groups: int) -> None:
    data = torch.randn(50, SIZE, dtype=torch.float64) + 0.3
    parts = data.reshape(50, groups, -1)
    rest = (parts - parts.mean(1, keepdim=True)).flatten(1)
    torch.testing.assert_close(centred(data.T @ data, groups), rest.T @ rest, rtol=1e-12, atol=1e-11)


def test_centring_removes_all_that_the_groups_share() -> None:
    moment = moment_of_patches("factor:1", 8, (1, 6), (1, 3), padding=(0, 1))
    assert float(centred(moment, 4).abs().max()) < 1e-14 * float(moment.max())
    assert torch.equal(centred(moment, 1), torch.zeros_like(moment))


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_outside_of_a_group_is_what_is_in_none_of_its_rows_and_columns(groups: int) -> None:
    left, right = moment_of_rank(60), moment_of_rank(30)
    part = SIZE // groups
    for group in range(groups):
        mask = torch.ones(SIZE, dtype=torch.bool)
        mask[group * part : (group + 1) * part] = False
        expected = float((left * right)[mask][:, mask].sum())
        assert outside(left, right, group, groups) == pytest.approx(expected, rel=1e-12)
    assert inner_product(left, right) == pytest.approx(float((left * right).sum()), rel=1e-13)
    assert inner_product(left.T[:3], right[:3]) == pytest.approx(float((left[:3] * right[:3]).sum()), rel=1e-13)


@pytest.mark.parametrize("kernel", [(1, 3), (2, 2)])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_the_constructions_of_both_proofs_lose_what_is_outside(groups: int, kernel: tuple[int, int]) -> None:
    weight, taps = torch.randn(16, 8, *kernel, dtype=torch.float64), kernel[0] * kernel[1]
    data = torch.randn(90, 8 * taps, dtype=torch.float64) + 0.3
    moment = data.T @ data
    for variant, form_ in (("gc", moment), ("bgc", centred(moment, groups))):
        layer = CONVS[variant].from_dense(weight, groups, projection="copy")
        lost = (weight - layer.dense_weight()).detach().flatten(1)
        total = 0.0
        for group, rows in enumerate(weight.flatten(1).chunk(groups)):
            total += outside(form_, rows.T @ rows, group, groups)
        assert total == pytest.approx(float((lost @ data.T).square().sum()), rel=1e-11)


@pytest.mark.parametrize("variant", ["gc", "bgc"])
def test_the_construction_is_never_better_than_the_least_error(variant: str) -> None:
    moment, groups = moment_of_rank(60), 4
    rows = torch.randn(5, SIZE, dtype=torch.float64)
    for group, least in enumerate(residual_forms(variant, moment, groups)):
        chosen = centred(moment, groups) if variant == "bgc" else moment
        assert outside(chosen, rows.T @ rows, group, groups) >= inner_product(least, rows.T @ rows)
