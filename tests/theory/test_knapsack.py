"""The multiple-choice knapsack against brute force."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from bgcbench.theory.knapsack import Option, best, cheapest, curve, greedy, hull, swapped, undominated

Layers = dict[str, list[Option[int]]]


def random_layers(rng: random.Random, count: int, options: int, *, whole: bool = False) -> Layers:
    """A layer that stays as it is loses nothing; the others cost less and lose something, in any order."""
    layers: Layers = {}
    for number in range(count):
        dense = rng.uniform(1, 100)
        made = [Option(0, dense, 0.0)]
        for key in range(1, options):
            cost, loss = dense * rng.uniform(0.05, 1.2), rng.expovariate(1 / dense)
            made.append(Option(key, float(round(cost)) if whole else cost, loss))
        layers[f"layer{number}"] = made
    return layers


def brute_force(layers: Layers, budget: float) -> tuple[float, float] | None:
    """(loss, cost) of the best of all plans."""
    every = (
        (sum(each.loss for each in plan), sum(each.cost for each in plan))
        for plan in itertools.product(*layers.values())
    )
    return min((found for found in every if found[1] <= budget * (1 + 1e-12)), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_optimum_of_all_plans(seed: int) -> None:
    rng = random.Random(seed)
    layers = random_layers(rng, rng.randint(1, 6), rng.randint(1, 5), whole=seed % 2 == 0)
    dense = sum(options[0].cost for options in layers.values())
    for share in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3):
        found, expected = best(layers, share * dense), brute_force(layers, share * dense)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.loss == pytest.approx(expected[0], rel=1e-8, abs=1e-12)
            assert found.cost <= share * dense * (1 + 1e-8)
            chosen = {name: next(o for o in layers[name] if o.key == key) for name, key in found.keys.items()}
            assert sum(option.cost for option in chosen.values()) == pytest.approx(found.cost)


@pytest.mark.parametrize("seed", range(12))
def test_the_greedy_one_is_as_good_as_any_within_a_step(seed: int) -> None:
    rng = random.Random(seed)
    layers = random_layers(rng, 4, 6)
    for share in (0.3, 0.5, 0.7, 0.9):
        budget = share * sum(options[0].cost for options in layers.values())
        longest = max(b.cost - a.cost for options in layers.values() for a, b in itertools.pairwise(hull(options)))
        found, expected, tighter = (
            greedy(layers, budget),
            brute_force(layers, budget),
            brute_force(layers, budget - longest),
        )
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.cost <= budget
            assert expected[0] <= found.loss * (1 + 1e-12)
            assert tighter is None or found.loss <= tighter[0] * (1 + 1e-12)


def test_the_greedy_one_fills_up_with_what_a_hull_leaves_out() -> None:
    layers = {"a": [Option(0, 10.0, 0.0), Option(1, 1.0, 9.0), Option(2, 5.0, 8.0), Option(3, 7.0, 7.5)]}
    assert [option.key for option in hull(layers["a"])] == [1, 0]
    assert [getattr(greedy(layers, budget), "keys", None) for budget in (0.5, 4.0, 6.0, 9.0, 10.0)] == [
        None, {"a": 1}, {"a": 2}, {"a": 3}, {"a": 0},
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_within_a_loss_is_the_same_problem_turned_round(seed: int) -> None:
    layers = random_layers(random.Random(100 + seed), 5, 4)
    allowed = 0.3 * sum(max(each.loss for each in options) for options in layers.values())
    found = best(swapped(layers), allowed)
    every = itertools.product(*layers.values())
    costs = [sum(o.cost for o in plan) for plan in every if sum(o.loss for o in plan) <= allowed]
    assert found is not None
    assert found.loss == pytest.approx(min(costs))


def test_the_curve_falls_from_the_cheapest_to_what_loses_nothing() -> None:
    layers = random_layers(random.Random(7), 8, 5)
    points = curve(layers)
    assert points[0].cost == pytest.approx(cheapest(layers).cost)
    assert points[-1].loss == 0
    assert all(a.loss > b.loss and a.cost < b.cost for a, b in itertools.pairwise(points))
    for point in points:
        found = best(layers, point.cost)
        assert found is not None
        assert found.loss == pytest.approx(point.loss)


def test_a_hull_is_convex_and_holds_the_ends() -> None:
    (options,) = random_layers(random.Random(3), 1, 30).values()
    points = hull(options)
    slopes = [(a.loss - b.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(points)]
    assert slopes == sorted(slopes, reverse=True)
    assert {points[0], points[-1]} <= set(undominated(options))


def test_networks_are_solved_at_once() -> None:
    """100 layers with 20 options, as no brute force could; the relaxation says that nothing is far better."""
    layers = random_layers(random.Random(5), 100, 20)
    begin = time.perf_counter()
    found = best(layers, 0.4 * sum(options[0].cost for options in layers.values()))
    assert time.perf_counter() - begin < 60  # not a claim: a search that blows up takes hours
    assert found is not None
