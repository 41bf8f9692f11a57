"""Which variants are worth their cost: the Pareto front of points whose errors are known to an uncertainty. No torch.

With d = 3 hypot(u_i, u_j), a point j is significantly better than i if e_j < e_i - d. It is preferable to i

    if it costs less and is not significantly worse,       c_j < c_i  and  e_j <= e_i + d
    or if it costs as much and is significantly better.    c_j = c_i  and  e_j <  e_i - d

The front therefore holds both of two points of equal cost whose errors do not differ significantly (BGC at 2N and GC at
N on white input).

"Not significantly worse" is not transitive: down a chain of cheaper and cheaper points, each like the next, the error
can rise significantly. If a point fell to its neighbour and the neighbour to the next, a significantly better point
would be lost without a replacement on the front. So a point falls only to a point on the front. Preference has no
cycles: it goes down in cost, and among equal costs "significantly better" is transitive, as hypot(a, c) <= hypot(a, b)
+ hypot(b, c). So there is exactly one such front, the kernel of that graph: of two points on it the costlier one is
significantly better, and for every point off it some point on it is preferable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from bgcbench.theory.fits import EXACT

SIGNIFICANT_SE = 3.0  # a difference is significant beyond so many of its standard errors


def front(costs: Sequence[float], errors: Sequence[float], uncertainties: Sequence[float]) -> list[bool]:
    """For each point whether it is on the front.

    ``uncertainties`` are the standard errors of ``errors``, which are shares: up to ``fits.EXACT`` they are 0.
    """
    if not len(costs) == len(errors) == len(uncertainties):
        raise ValueError(f"{len(costs)} costs, {len(errors)} errors and {len(uncertainties)} uncertainties")
    values = [0.0 if error <= EXACT else error for error in errors]

    def significantly_better(i: int, j: int) -> bool:
        return values[i] < values[j] - SIGNIFICANT_SE * math.hypot(uncertainties[i], uncertainties[j])

    kept: list[int] = []
    order = sorted(range(len(costs)), key=lambda i: costs[i])
    for _, level in itertools.groupby(order, key=lambda i: costs[i]):
        left = [i for i in level if all(significantly_better(i, j) for j in kept)]
        kept += [i for i in left if not any(significantly_better(j, i) for j in left)]
    return [i in kept for i in range(len(costs))]


def uncertainty(error: float, relative_se: float, input_values: int) -> float:
    """Standard error of a share of the output that is lost, from both samples.

    relative_se: standard error over the convolutions, as a share of the error; they all see the same inputs, so it
    leaves out what these scatter. input_values: S n D of the inputs; the energy of so many normal numbers has a
    standard error of sqrt(2 / (S n D)), as a share. What two errors from the same inputs differ by scatters less.
    """
    return error * math.hypot(relative_se, math.sqrt(2 / input_values))
