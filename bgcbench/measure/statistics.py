"""Medians, their confidence intervals and ratios of medians. Pure Python, deterministic.

Sources. Interval of a median from order statistics: David & Nagaraja, *Order Statistics*, 3rd ed., section 7.1.
Percentile bootstrap whose tail is widened for few units (here: rounds): Hesterberg, "What Teachers Should Know
About the Bootstrap", The American Statistician 69 (2015), section 4.3 ("expanded percentile interval").
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

RESAMPLES = 2000
ROUNDS_OF_INTERVAL = 6  # fewer give no interval of 95 %
Pick = Callable[[Sequence[float]], Iterable[float]]
# 97.5 % points of Student's t, by degrees of freedom; beyond the table the normal's 1.96 is within 4 %.
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = statistics.NormalDist()


@dataclass(frozen=True)
class Interval:
    """A closed 95 % confidence interval."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


@functools.cache
def median_rank(n: int) -> int:
    """1-based rank k for which [x_(k), x_(n+1-k)] covers the median with at least 95 %; 0 where none does (n < 6).

    The interval misses iff fewer than k of n samples fall on one side, so its coverage is 1 - 2 P(Bin(n, 1/2) < k).
    """
    if n > 1000:  # the normal approximation, rounded outward
        return math.floor((n - _NORMAL.inv_cdf(0.975) * math.sqrt(n)) / 2)
    tail, k = 0, 0
    while (tail := tail + math.comb(n, k)) * 40 <= 2**n:  # P(Bin <= k) <= 0.025, in whole numbers
        k += 1
    return k


def median_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of the median from order statistics; needs no distribution. None below 6 values."""
    rank = median_rank(len(values))
    if rank == 0:
        return None
    ordered = sorted(values)
    return Interval(ordered[rank - 1], ordered[-rank])


def round_medians(samples: Sequence[float], rounds: Sequence[int]) -> dict[int, float]:
    """Median of each round, by round number."""
    grouped: dict[int, list[float]] = {}
    for sample, number in zip(samples, rounds, strict=True):
        grouped.setdefault(number, []).append(sample)
    return {number: statistics.median(values) for number, values in grouped.items()}


@dataclass(frozen=True)
class Summary:
    """Statistics of a series of samples, in seconds; ``ci95`` is None with too few samples."""

    n: int
    median_s: float
    ci95_s: Interval | None
    mean_s: float
    sd_s: float | None
    min_s: float
    q1_s: float
    q3_s: float
    max_s: float

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width, relative to the median."""
        return None if self.ci95_s is None else self.ci95_s.width / 2 / self.median_s


def summarise(samples: Sequence[float], rounds: Sequence[int]) -> Summary:
    """Summary of ``samples`` taken in ``rounds``.

    Samples of one round share whatever the machine did at that moment, so their own interval is too narrow when the
    machine drifts; the interval of the round medians is right but coarse. The wider of the two is reported.
    """
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else list(samples) * 3
    candidates = (median_interval(samples), median_interval(list(round_medians(samples, rounds).values())))
    known = [interval for interval in candidates if interval is not None]
    return Summary(
        n=len(samples),
        median_s=statistics.median(samples),
        ci95_s=max(known, key=lambda interval: interval.width) if len(known) == len(candidates) else None,
        mean_s=statistics.fmean(samples),
        sd_s=statistics.stdev(samples) if len(samples) > 1 else None,
        min_s=min(samples),
        q1_s=q1,
        q3_s=q3,
        max_s=max(samples),
    )


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians, numerator over denominator, with its 95 % interval where there is one.

    ``paired`` tells whether the two series were interleaved round by round.
    """

    value: float
    ci95: Interval | None
    paired: bool

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width, relative to the ratio."""
        return None if self.ci95 is None else self.ci95.width / 2 / self.value

    @property
    def is_significant(self) -> bool | None:
        """Whether the interval excludes 1; None without an interval."""
        return None if self.ci95 is None else not self.ci95.low <= 1.0 <= self.ci95.high


@dataclass(frozen=True)
class Series:
    """Samples (seconds) with the round each was taken in."""

    samples: Sequence[float]
    rounds: Sequence[int]


def _expanded_tail(units: int) -> float:
    """Tail probability at which a percentile bootstrap over ``units`` has the width of a t interval."""
    t = _T975[units - 2] if units - 2 < len(_T975) else 1.96
    return 1.0 - _NORMAL.cdf(t * math.sqrt(units / (units - 1)))


@functools.lru_cache(maxsize=4)
def _resamples(over: int, under: int, paired: bool) -> list[tuple[Pick, Pick]]:
    """What picks the rounds of each resample, of as many as there are: the same every time."""
    draw = random.Random(0)
    picks: list[tuple[Pick, Pick]] = []
    for _ in range(RESAMPLES):
        one = itemgetter(*draw.choices(range(over), k=over))
        picks.append((one, one if paired else itemgetter(*draw.choices(range(under), k=under))))
    return picks


def ratio_of_medians(over: Series, under: Series, *, paired: bool) -> Ratio:
    """median(over) / median(under) with a bootstrap interval over rounds.

    Rounds, not samples, are resampled: they are the units the machine's drift acts on. Where the two series were
    interleaved (``paired``), a resample takes the same rounds of both, so drift that hit both cancels; otherwise
    each is resampled by itself. The interval is the expanded percentile one, widened to hold the point estimate and,
    where paired, the order-statistics interval of the per-round ratios: with 6 rounds the bootstrap alone calls two
    equal rows different in 6 of 100 runs, the hull in 3. Below 6 common rounds there is none.
    """
    top, bottom = round_medians(over.samples, over.rounds), round_medians(under.samples, under.rounds)
    value = statistics.median(over.samples) / statistics.median(under.samples)
    if paired:
        common = sorted(top.keys() & bottom.keys())
        tops, bottoms = [top[r] for r in common], [bottom[r] for r in common]
    else:
        tops, bottoms = list(top.values()), list(bottom.values())
    units = min(len(tops), len(bottoms))
    if units < ROUNDS_OF_INTERVAL:
        return Ratio(value, None, paired)
    resamples = _resamples(len(tops), len(bottoms), paired)
    ratios = sorted(statistics.median(one(tops)) / statistics.median(other(bottoms)) for one, other in resamples)
    cut = int(_expanded_tail(units) * RESAMPLES)
    bounds = [value, ratios[cut], ratios[-1 - cut]]
    if paired and (exact := median_interval([a / b for a, b in zip(tops, bottoms, strict=True)])):
        bounds += [exact.low, exact.high]
    return Ratio(value, Interval(min(bounds), max(bounds)), paired)
