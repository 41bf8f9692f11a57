"""Slopes of log E against log(1 - 1/N), as in Figure 1 of Lee, Park & Lee. No torch here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

# Errors below this share are rounding: the variant is exact, and its logarithm says nothing.
EXACT = 1e-12


@dataclass(frozen=True)
class Fit:
    """How a relative error falls with 1 - 1/N.

    slope_mean: mean of the slopes between neighbouring N, what Figure 1's legend gives; slope_regression: least squares
    over all of them; c: the constant of (5.2) that goes with it, Rel.E = c (1 - 1/N)^slope_regression. All None, and
    ``reason`` set, where fewer than two N have an error to take the logarithm of.
    """

    slope_mean: float | None
    slope_regression: float | None
    c: float | None
    groups: tuple[int, ...]
    reason: str | None = None


def fit(relative_errors: Mapping[int, float]) -> Fit:
    """The slopes through {N: relative error}; N = 1, where 1 - 1/N = 0, and exact N (BGC at 2) are left out."""
    used = {n: e for n, e in sorted(relative_errors.items()) if n > 1 and e > EXACT}
    if len(used) < 2:
        left_out = ", ".join(str(n) for n in sorted(relative_errors) if n not in used)
        why = f"; N = {left_out} has no error to take the logarithm of" if left_out else ""
        return Fit(None, None, None, tuple(used), f"a slope needs two N with an error above 0{why}")
    x, y = [math.log(1 - 1 / n) for n in used], [math.log(e) for e in used.values()]
    local = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in itertools.pairwise(zip(x, y, strict=True))]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return Fit(sum(local) / len(local), slope, math.exp(mean_y - slope * mean_x), tuple(used))
