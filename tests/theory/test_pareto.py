from __future__ import annotations

import itertools
import math
import random

import pytest

from bgcbench.theory.pareto import SIGNIFICANT_SE, front, uncertainty


def preferable(j: int, i: int, costs: list[float], errors: list[float], doubts: list[float]) -> bool:
    """Whether j is preferable to i, as the module's text has it."""
    d = SIGNIFICANT_SE * math.hypot(doubts[i], doubts[j])
    cheaper = costs[j] < costs[i] and errors[j] <= errors[i] + d
    return cheaper or (costs[j] == costs[i] and errors[j] < errors[i] - d)


def kernels(costs: list[float], errors: list[float], doubts: list[float]) -> list[list[bool]]:
    """Every set in which nothing is preferable to another, and to everything outside of which something in it is."""
    points = range(len(costs))
    found = []
    for kept in itertools.product([False, True], repeat=len(costs)):
        beaten = [any(kept[j] and preferable(j, i, costs, errors, doubts) for j in points) for i in points]
        if all(kept[i] != beaten[i] for i in points):
            found.append(list(kept))
    return found


def test_the_front_is_the_one_set_that_stands_for_all_points() -> None:
    draw = random.Random(0)
    for _ in range(400):
        number = draw.randint(1, 7)
        costs = [float(draw.randint(1, 4)) for _ in range(number)]
        errors = [draw.randint(0, 12) / 20 for _ in range(number)]
        doubts = [draw.choice([0.0, 0.01, 0.02, 0.05]) for _ in range(number)]
        assert kernels(costs, errors, doubts) == [front(costs, errors, doubts)]


def test_without_doubt_it_is_the_usual_front() -> None:
    draw = random.Random(1)
    for _ in range(100):
        points = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(9)]
        usual = [not any(c <= x and e <= y and (c, e) != (x, y) for c, e in points) for x, y in points]
        assert front([c for c, _ in points], [e for _, e in points], [0.0] * 9) == usual


def test_equal_cost_and_indistinguishable_error_stand_side_by_side() -> None:
    assert front([4, 4, 8], [0.501, 0.500, 0.0], [1e-3, 1e-3, 0]) == [True, True, True]
    assert front([4, 4, 8], [0.501, 0.500, 0.0], [1e-5, 1e-5, 0]) == [False, True, True]


def test_a_cheaper_point_that_is_not_worse_beyond_doubt_dominates() -> None:
    assert front([3, 4], [0.501, 0.500], [1e-3, 1e-3]) == [True, False]
    assert front([3, 4], [0.501, 0.500], [1e-5, 1e-5]) == [True, True]


def test_down_a_chain_of_likes_nothing_that_is_surely_better_is_lost() -> None:
    # Each is like its neighbours, the last is surely better than the first: it falls only to what is on the front.
    assert front([1, 2, 3], [0.58, 0.54, 0.50], [0.01] * 3) == [True, False, True]


def test_what_is_only_rounding_is_no_error() -> None:
    assert front([8, 8], [0.0, 7e-16], [0.0, 0.0]) == [True, True]


def test_the_order_of_the_points_does_not_matter() -> None:
    draw = random.Random(2)
    points = [(draw.randint(1, 5), draw.random(), draw.choice([0.0, 0.05])) for _ in range(12)]
    once = dict(zip(points, front(*map(list, zip(*points, strict=True))), strict=True))
    for _ in range(20):
        draw.shuffle(points)
        assert front(*map(list, zip(*points, strict=True))) == [once[point] for point in points]


def test_lists_of_different_lengths_are_refused_and_none_is_fine() -> None:
    assert front([], [], []) == []
    with pytest.raises(ValueError, match="2 costs, 1 errors and 2 uncertainties"):
        front([1, 2], [0.5], [0, 0])


def test_an_uncertainty_has_both_samples_in_it() -> None:
    assert uncertainty(0.5, 0.0, 20000) == pytest.approx(0.5 * 0.01)
    assert uncertainty(0.5, 0.03, 2 * 25**2) == pytest.approx(0.5 * 0.05)
    assert uncertainty(0.0, 1e5, 100) == 0
