"""One option for each layer, the least loss within a budget: the multiple-choice knapsack, solved exactly. No torch.

Layers are gone through one after the other, and of the partial plans only those are kept that no other one beats in
both cost and loss (dynamic programming), that can still be completed within the budget, and whose loss with the least
that the other layers can lose for what is left - the linear relaxation, known for every budget beforehand (Sinha &
Zoltners, 1979) - is below that of a plan that is known already. The last makes it fast; none of them loses an optimum.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")
ROUNDING = 1e-9  # relative: sums of the same numbers in another order


@dataclass(frozen=True)
class Option(Generic[Key]):
    """What a layer may become: what it costs then, and what is lost."""

    key: Key
    cost: float
    loss: float


@dataclass(frozen=True)
class Solution(Generic[Key]):
    """The option of each layer by name, and the sums."""

    keys: dict[str, Key]
    cost: float
    loss: float


class _Relaxation:
    """The least loss of some layers for any budget, where options may be mixed: convex and piecewise linear."""

    def __init__(self, layers: Sequence[Sequence[Option[Key]]]) -> None:
        hulls = [hull(options) for options in layers]
        self.least_cost = sum(points[0].cost for points in hulls)
        loss = sum(points[0].loss for points in hulls)
        steps = [
            ((a.loss - b.loss) / (b.cost - a.cost), b.cost - a.cost)
            for points in hulls
            for a, b in itertools.pairwise(points)
        ]
        self.costs, self.losses, self.slopes = [self.least_cost], [loss], []
        for slope, width in sorted(steps, reverse=True):
            self.slopes.append(slope)
            self.costs.append(self.costs[-1] + width)
            self.losses.append(self.losses[-1] - slope * width)

    def least_loss(self, budget: float) -> float:
        """Infinite where not even the cheapest options fit."""
        if budget < self.least_cost * (1 - ROUNDING) - ROUNDING:
            return float("inf")
        at = max(0, bisect.bisect_right(self.costs, budget) - 1)
        if at >= len(self.slopes):
            return self.losses[-1]
        return self.losses[at] - self.slopes[at] * max(0.0, budget - self.costs[at])


def undominated(options: Sequence[Option[Key]]) -> list[Option[Key]]:
    """Those that no other one beats or equals in both, by rising cost and falling loss."""
    kept: list[Option[Key]] = []
    for option in sorted(options, key=lambda each: (each.cost, each.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def hull(options: Sequence[Option[Key]]) -> list[Option[Key]]:
    """Those on the lower convex hull of (cost, loss), by rising cost."""
    kept: list[Option[Key]] = []
    for option in undominated(options):
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option[Key], b: Option[Key]) -> float:
    """How much less is lost for each unit that ``b`` costs more."""
    return (a.loss - b.loss) / (b.cost - a.cost)


def cheapest(layers: Mapping[str, Sequence[Option[Key]]]) -> Solution[Key]:
    """What costs the least, and loses the least of what does."""
    return _summed({name: min(options, key=lambda each: (each.cost, each.loss)) for name, options in layers.items()})


def best(layers: Mapping[str, Sequence[Option[Key]]], budget: float) -> Solution[Key] | None:
    """An option for each layer with the least sum of losses whose costs sum up to ``budget`` at most.

    None where not even the cheapest options fit. Costs and losses are finite; no layer is without options.
    """
    # Layers with much to lose come first: what they become decides the most.
    names = sorted(layers, key=lambda name: -max(each.loss for each in layers[name]))
    lists = [undominated(layers[name]) for name in names]
    rest = [_Relaxation(lists[number:]) for number in range(len(lists) + 1)]
    room = budget + ROUNDING * abs(budget)
    known = greedy(layers, room)
    if known is None:
        return None
    # A partial plan: cost, loss, and the way to it as (option, plan before).
    plans: list[tuple[float, float, tuple[Option[Key], object] | None]] = [(0.0, 0.0, None)]
    for number, options in enumerate(lists):
        after = rest[number + 1]
        longer = [
            (cost + option.cost, loss + option.loss, (option, way))
            for cost, loss, way in plans
            for option in options
            if loss + option.loss + after.least_loss(room - cost - option.cost) < known.loss * (1 - ROUNDING)
        ]
        longer.sort(key=lambda plan: plan[:2])
        plans = []
        for plan in longer:
            if not plans or plan[1] < plans[-1][1]:
                plans.append(plan)
    if not plans:  # nothing beats what was known
        return known
    way: object = min(plans, key=lambda plan: plan[1])[2]
    chosen: list[Option[Key]] = []
    while isinstance(way, tuple):
        option, way = way
        chosen.append(option)
    return _summed(dict(zip(names, reversed(chosen), strict=True)))


def greedy(layers: Mapping[str, Sequence[Option[Key]]], budget: float) -> Solution[Key] | None:
    """A good solution, at once: the Lagrangian's, which misses the optimum by a step of one layer at most.

    From the cheapest options on, the step along a hull that gains most per unit of cost is taken as long as there is
    room; where it does not fit, what does of the options that the hull leaves out. None as in :func:`best`.
    """
    hulls = {name: hull(options) for name, options in layers.items()}
    now = {name: points[0] for name, points in hulls.items()}
    room = budget - sum(option.cost for option in now.values())
    if room < 0:
        return None
    steps = [(_slope(a, b), name, b) for name, points in hulls.items() for a, b in itertools.pairwise(points)]
    for _, name, step in sorted(steps, key=lambda step: -step[0]):
        most = now[name].cost + room
        fitting = [step] if step.cost <= most else [option for option in layers[name] if option.cost <= most]
        now[name] = min(fitting, key=lambda option: (option.loss, option.cost))
        room = most - now[name].cost
    return _summed(now)


def _summed(options: Mapping[str, Option[Key]]) -> Solution[Key]:
    return Solution(
        {name: option.key for name, option in options.items()},
        sum(option.cost for option in options.values()),
        sum(option.loss for option in options.values()),
    )


def curve(layers: Mapping[str, Sequence[Option[Key]]], points: int = 33) -> list[Solution[Key]]:
    """The optima for ``points`` budgets, evenly from the least to what loses nothing more, without repetitions."""
    least = cheapest(layers)
    most = _summed({name: min(options, key=lambda each: (each.loss, each.cost)) for name, options in layers.items()})
    found: list[Solution[Key]] = []
    for number in range(points):
        solution = best(layers, least.cost + (most.cost - least.cost) * number / (points - 1))
        if solution is not None and (not found or solution.loss < found[-1].loss):
            found.append(solution)
    return found


def swapped(layers: Mapping[str, Sequence[Option[Key]]]) -> dict[str, list[Option[Key]]]:
    """The same with cost and loss exchanged: to find the cheapest that loses at most so much."""
    return {name: [Option(each.key, each.loss, each.cost) for each in options] for name, options in layers.items()}
