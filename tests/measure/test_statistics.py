from __future__ import annotations

import random
import statistics

import pytest
from scipy import stats

from bgcbench.measure.statistics import (
    _T975,
    Series,
    _expanded_tail,
    median_interval,
    median_rank,
    ratio_of_medians,
    round_medians,
    summarise,
)


@pytest.mark.parametrize("n", [*range(1, 120), 500, 999, 1000])
def test_the_rank_is_the_largest_whose_interval_covers_95_percent(n: int) -> None:
    rank = median_rank(n)
    covers = [1 - 2 * stats.binom.cdf(k - 1, n, 0.5) for k in range(1, n // 2 + 1)]
    assert rank == sum(coverage >= 0.95 - 1e-12 for coverage in covers)


@pytest.mark.parametrize("n", [1001, 5000, 100_000])
def test_the_rank_for_many_samples_is_within_two_of_the_exact_one_and_never_above(n: int) -> None:
    exact = int(stats.binom.ppf(0.025, n, 0.5))
    assert exact - 2 <= median_rank(n) <= exact


def test_six_values_are_the_fewest_with_an_interval() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    interval = median_interval([6.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    assert (interval.low, interval.high) == (1.0, 6.0)


def test_the_interval_covers_the_true_median_of_a_skewed_distribution() -> None:
    draw, missed = random.Random(3), 0
    for _ in range(1000):
        interval = median_interval([draw.lognormvariate(0, 1) for _ in range(20)])
        missed += not interval.low <= 1.0 <= interval.high
    assert missed <= 50 + 3 * 7  # 5 % of 1000 and three standard deviations


def test_student_points_are_scipys() -> None:
    for degrees, value in enumerate(_T975, 1):
        assert value == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)


def test_a_summary_by_hand() -> None:
    summary = summarise([4.0, 1.0, 3.0, 2.0, 5.0], [1, 1, 2, 2, 3])
    assert (summary.n, summary.median_s, summary.mean_s, summary.min_s, summary.max_s) == (5, 3.0, 3.0, 1.0, 5.0)
    assert (summary.q1_s, summary.q3_s) == (2.0, 4.0)
    assert summary.sd_s == pytest.approx(statistics.stdev([1, 2, 3, 4, 5]))
    assert summary.ci95_s is None


def test_a_single_sample_has_no_spread() -> None:
    summary = summarise([2.0], [1])
    assert (summary.median_s, summary.q1_s, summary.sd_s, summary.ci95_s) == (2.0, 2.0, None, None)


def test_the_wider_of_the_two_intervals_is_reported() -> None:
    # Rounds that differ by far more than the samples within one: the samples' own interval would be too narrow.
    rounds = [r for r in range(8) for _ in range(50)]
    samples = [1.0 + 0.1 * r for r in rounds]
    summary = summarise(samples, rounds)
    medians = list(round_medians(samples, rounds).values())
    assert summary.ci95_s == median_interval(medians)
    assert summary.ci95_s.width > median_interval(samples).width
    steady = summarise([1.0 + 0.01 * (i % 7) for i in range(400)], rounds)
    assert steady.ci95_s.width <= 0.06


def test_drift_that_hits_both_series_cancels_in_their_ratio() -> None:
    draw = random.Random(5)
    drift = [1 + draw.uniform(0, 0.5) for _ in range(10)]
    rounds = [r for r in range(10) for _ in range(5)]
    one = Series([2 * drift[r] * (1 + draw.gauss(0, 0.002)) for r in rounds], rounds)
    other = Series([1 * drift[r] * (1 + draw.gauss(0, 0.002)) for r in rounds], rounds)
    paired, apart = ratio_of_medians(one, other, paired=True), ratio_of_medians(one, other, paired=False)
    assert paired.ci95.low <= 2.0 <= paired.ci95.high
    assert paired.ci95.width < apart.ci95.width / 5
    assert paired.is_significant


@pytest.mark.parametrize(("rounds", "per_round"), [(6, 1), (6, 5), (10, 5), (20, 1)])
def test_two_equal_series_differ_significantly_in_at_most_one_of_twenty_tries(rounds: int, per_round: int) -> None:
    draw, significant, tries = random.Random(11), 0, 400
    for _ in range(tries):
        drift = [draw.gauss(0, 0.03) for _ in range(rounds)]

        def series(drift: list[float] = drift) -> Series:
            own = [draw.gauss(0, 0.01) for _ in range(rounds)]
            numbers = [r for r in range(rounds) for _ in range(per_round)]
            return Series([1 + drift[r] + own[r] + abs(draw.gauss(0, 0.02)) for r in numbers], numbers)

        significant += bool(ratio_of_medians(series(), series(), paired=True).is_significant)
    assert significant <= tries / 20 + 2 * (tries / 20) ** 0.5


@pytest.mark.parametrize("units", [6, 10, 25])
def test_the_widened_tail_gives_the_bootstrap_of_a_mean_the_width_of_students_interval(units: int) -> None:
    # A percentile bootstrap of a mean has the standard error s sqrt((n - 1) / n) / sqrt(n); Student's is t s / sqrt(n).
    quantile = stats.norm.isf(_expanded_tail(units))
    assert quantile * ((units - 1) / units) ** 0.5 == pytest.approx(stats.t.ppf(0.975, units - 1), rel=1e-3)


def test_a_real_difference_is_told() -> None:
    draw = random.Random(2)
    rounds = [r for r in range(10) for _ in range(5)]
    one, other = (Series([base + draw.gauss(0, 0.01) for _ in rounds], rounds) for base in (1.05, 1.0))
    ratio = ratio_of_medians(one, other, paired=True)
    assert ratio.is_significant
    assert ratio.ci95.low <= 1.05 <= ratio.ci95.high


def test_too_few_rounds_give_a_ratio_and_no_interval() -> None:
    ratio = ratio_of_medians(Series([2.0] * 5, range(5)), Series([1.0] * 5, range(5)), paired=True)
    assert (ratio.value, ratio.ci95, ratio.is_significant) == (2.0, None, None)


def test_the_same_data_always_give_the_same_interval() -> None:
    draw = random.Random(2)
    one, other = (Series([draw.random() for _ in range(12)], range(12)) for _ in range(2))
    assert ratio_of_medians(one, other, paired=True) == ratio_of_medians(one, other, paired=True)
