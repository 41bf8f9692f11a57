from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from bgcbench.theory.fits import EXACT, fit


@pytest.mark.parametrize(("slope", "c"), [(1.0, 3.825e-3), (2.0, 1.0), (0.3, 1e-6)])
def test_a_power_law_is_recovered(slope: float, c: float) -> None:
    found = fit({n: c * (1 - 1 / n) ** slope for n in (2, 4, 8, 16)})
    assert (found.slope_mean, found.slope_regression, found.c) == pytest.approx((slope, slope, c), rel=1e-12)
    assert found.groups == (2, 4, 8, 16)
    assert found.reason is None


@pytest.mark.parametrize("seed", range(5))
def test_the_regression_is_ordinary_least_squares_and_the_mean_that_of_neighbours(seed: int) -> None:
    draw = random.Random(seed)
    errors = {n: draw.uniform(0.1, 1.0) for n in (2, 3, 5, 12, 40)}
    x, y = [math.log(1 - 1 / n) for n in errors], [math.log(e) for e in errors.values()]
    truth = stats.linregress(x, y)
    local = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(4)]
    found = fit(errors)
    assert found.slope_regression == pytest.approx(truth.slope, rel=1e-9)
    assert found.c == pytest.approx(math.exp(truth.intercept), rel=1e-9)
    assert found.slope_mean == pytest.approx(sum(local) / 4, rel=1e-9)


def test_two_points_determine_all_three_numbers() -> None:
    found = fit({2: 0.25, 4: 0.75**3})
    slope = math.log(0.75**3 / 0.25) / math.log(1.5)
    expected = slope, slope, 0.25 * 2**slope
    assert (found.slope_mean, found.slope_regression, found.c) == pytest.approx(expected, rel=1e-12)


def test_the_order_in_which_errors_are_given_does_not_matter() -> None:
    errors = {2: 0.1, 4: 0.5, 8: 0.6}
    assert fit(errors) == fit(dict(reversed(errors.items())))


def test_balanced_groups_on_white_input_are_no_power_law() -> None:
    # (1 - 2/N) for N = 4, 8, ..., 64 has the local slopes 2.63, 2.23, 2.10 and 2.05; mean and regression differ.
    found = fit({n: 1 - 2 / n for n in (4, 8, 16, 32, 64)})
    x, y = ([math.log(1 - k / n) for n in (4, 8, 16, 32, 64)] for k in (1, 2))
    assert found.slope_regression == pytest.approx(stats.linregress(x, y).slope, rel=1e-12)
    assert (found.slope_mean, found.slope_regression) == pytest.approx((2.2545, 2.4393), abs=5e-5)


def test_one_group_and_exact_groups_are_left_out() -> None:
    errors = {n: 0.1 * (1 - 1 / n) ** 2 for n in (4, 8, 16)}
    found = fit({1: 0.0, 2: 3e-17, **errors})
    assert found == fit(errors)
    assert found.groups == (4, 8, 16)


def test_an_error_that_one_group_has_by_rounding_is_left_out_as_well() -> None:
    errors = {4: 0.1, 8: 0.2}
    assert fit({1: 1e-3, **errors}) == fit(errors)  # 1 - 1/N is 0 there: its logarithm does not exist


def test_what_lies_above_rounding_is_used() -> None:
    assert fit({2: 2 * EXACT, 4: 0.1}).groups == (2, 4)
    assert fit({2: EXACT, 4: 0.1, 8: 0.2}).groups == (4, 8)


@pytest.mark.parametrize(
    ("errors", "used", "left_out"),
    [({}, (), None), ({8: 0.1}, (8,), None), ({8: 0.1, 2: 0.0}, (8,), "N = 2 "), ({2: 0.0, 1: 0.0}, (), "N = 1, 2 ")],
)
def test_without_two_errors_there_is_a_reason_and_no_number(
    errors: dict[int, float], used: tuple[int, ...], left_out: str | None
) -> None:
    found = fit(errors)
    assert (found.slope_mean, found.slope_regression, found.c, found.groups) == (None, None, None, used)
    assert "a slope needs two N with an error above 0" in str(found.reason)
    assert ("N = " in str(found.reason)) == (left_out is not None)
    assert (left_out or "") in str(found.reason)
