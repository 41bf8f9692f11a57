"""Times of layers and networks: everything is measured, and corrections follow from savings in closed form."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch

import bgcbench
from bgcbench.conversion.convert import candidates
from bgcbench.measure.batches import Passing
from bgcbench.measure.timing import Rules
from bgcbench.planning import plan as planning
from bgcbench.planning.choices import LayerOptions, Problem, choices_for
from bgcbench.planning.decision import choose
from bgcbench.planning.plan import counted_problem, saved_by_its_network
from bgcbench.planning.times import (
    FAR,
    LayerTimes,
    Measured,
    Timed,
    corrections,
    doubtful,
    in_network,
    layer_times,
    network_times,
)
from bgcbench.results.rows import Replaced
from bgcbench.specs import Choice
from tests.planning.test_plan import images, network

FEW = Rules(min_rounds=6, max_time_s=0.02, warmup_min_s=0.0, warmup_min_calls=1, warmup_max_s=0.01)
CPU = torch.device("cpu")
GC2, GC4, BGC4 = Choice("gc", 2), Choice("gc", 4), Choice("bgc", 4)


def test_every_layer_is_measured_as_every_choice_and_equal_shapes_once() -> None:
    model, x = network(), images(2)
    layers = bgcbench.convert(model, "gc", 4, example_input=(3, 12, 12)).record.layers
    choices = {layer.name: choices_for(layer, ("gc", "bgc", "lowrank"), (2, 4), (3,)) for layer in layers}
    times = dict(layer_times(model, layers, choices, partial(model, x), CPU, FEW))
    assert list(times) == [layer.name for layer in layers]
    for layer in layers:
        assert set(times[layer.name].times) == {Choice(), *choices[layer.name]}
        for timed in times[layer.name].times.values():
            assert timed.median_s > 0
            assert len(timed.samples_s) == len(timed.rounds) >= 6
    networks = network_times(model, {"dense": (), "gc": layers}, Passing(), (x,), CPU, FEW).times
    ratio, interval = networks["gc"].ratio_to(networks["dense"])
    assert ratio == pytest.approx(networks["gc"].median_s / networks["dense"].median_s, rel=0.5)
    assert interval is None or interval[0] <= ratio <= interval[1]
    assert not any(type(module).__name__ == "GroupConv2d" for module in model.modules())


def test_a_correction_makes_the_layers_savings_those_of_the_network() -> None:
    """Two layers that save 6 + 2 alone as GC N=2 and 9 + 3 as N=4, in a network that saves 4 and 6: the half."""
    half = {"gc": 0.5, "bgc": -0.5}
    alone = {"a": {Choice(): 10.0, GC2: 4.0, GC4: 1.0, BGC4: 8.0}, "b": {Choice(): 5.0, GC2: 3.0, GC4: 2.0}}
    factors = corrections(100.0, {GC2: 96.0, GC4: 94.0, BGC4: 101.0}, alone)
    noise = (0.02 * 100) ** 2  # seconds of a network are not known better, which draws factors towards 1
    assert factors["gc"] == pytest.approx((8 * 4 + 12 * 6 + noise) / (8**2 + 12**2 + noise))
    assert factors["bgc"] == pytest.approx((2 * -1 + noise) / (2**2 + noise))
    assert in_network(alone["a"], half) == {Choice(): 10.0, GC2: 7.0, GC4: 5.5, BGC4: 11.0}
    assert in_network({Choice(): 3.0, Choice("tlgc", 2): 2.0}, half) == {Choice(): 3.0, Choice("tlgc", 2): 2.0}


def test_a_choice_that_is_not_known_to_save_time_saves_none() -> None:
    """Faster in all of 6 rounds, which happens by chance in one of 32 pairs of equals; and in 5 of them."""
    rounds, dense = tuple(range(6)), (1.0, 1.1, 0.9, 1.0, 1.2, 1.0)
    always, mostly = tuple(0.97 * each for each in dense), (*(0.9 * each for each in dense[:5]), 1.01)
    times = {
        choice: Timed(samples, rounds, statistics.median(samples))
        for choice, samples in {Choice(): dense, GC2: always, GC4: mostly}.items()
    }
    found = LayerTimes(times, {})
    assert found.seconds(2) == {Choice(): 2.0, GC2: pytest.approx(1.94), GC4: pytest.approx(1.89)}
    assert found.seconds(2, surely=True) == {Choice(): 2.0, GC2: pytest.approx(1.94), GC4: 2.0}
    assert not times[GC2].differs_from(Timed(dense[:5], rounds[:5], 1.0))  # too few of them to know


def test_no_factor_makes_a_time_negative() -> None:
    alone = {Choice(): 1.0, GC2: 0.5, BGC4: 1.5}
    assert in_network(alone, {"gc": -132.0, "bgc": 9.0}) == {Choice(): 1.0, GC2: 1.0 + 0.5 * FAR, BGC4: 1.0 + 0.5 * FAR}
    assert in_network({Choice(): 1.0, GC2: 0.1}, {"gc": 2.0}) == {Choice(): 1.0, GC2: 0.0}


def planned_time(
    monkeypatch: pytest.MonkeyPatch, really: float, failed: Measured | None = None
) -> tuple[Problem, float, str | None]:
    """A network of 100 s, 90 of them in its layers, of which groups save 0.3 and 0.5 alone, and
    ``really`` times that in the network; and what its plan for 0.75 of the time tells: how many times, and the note."""
    model = network()
    layers = candidates(model, example_input=(3, 12, 12)).chosen
    made = []
    for options in counted_problem(layers, ("gc",), (2, 4)).layers:
        dense = 90.0 / len(layers)
        seconds = {choice: dense * (1 - {1: 0.0, 2: 0.3, 4: 0.5}[choice.groups]) for choice in (Choice(), GC2, GC4)}
        own = (dataclasses.replace(one, loss=1 / one.params, seconds=seconds[one.choice]) for one in options.options)
        made.append(LayerOptions(options.layer, tuple(own)))
    problem = Problem(tuple(made), rest_s=10.0)

    def clock(_: object, networks: Mapping[str, Sequence[Replaced]], *__: object, **___: object) -> Measured:
        found = {}
        if failed is not None:
            return failed
        for name, replaced in networks.items():
            chosen = {layer.name: Choice(layer.variant, layer.groups) for layer in replaced}
            share = problem.share({each.name: chosen.get(each.name, Choice()) for each in layers}, "time")
            seconds = 100 * (1 - really * (1 - share))
            found[name] = Timed((seconds,) * 6, tuple(range(6)), seconds)
        return Measured(found)

    monkeypatch.setattr(planning, "network_times", clock)
    scale, note = saved_by_its_network(model, problem, 0.75, Passing(), (images(2),))
    return problem, scale, note


@pytest.mark.parametrize("really", [0.6, 1.0, 1.4])
def test_a_plan_keeps_to_a_budget_of_time_by_what_its_own_network_takes(
    really: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, scale, note = planned_time(monkeypatch, really)
    assert note is None
    assert scale == pytest.approx(really, rel=0.02)
    scaled = problem.saving(scale)
    choices = choose(scaled, "time", 0.75)
    assert 1 - really * (1 - problem.share(choices, "time")) == pytest.approx(scaled.share(choices, "time"), abs=0.01)
    assert scaled.share(choices, "time") <= 0.75


def test_a_plan_that_its_network_does_not_keep_to_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, scale, note = planned_time(monkeypatch, 0.1)
    assert choose(problem.saving(scale), "time", 0.75)
    assert "and no plan can be expected to take 0.75" in (note or "")


def test_times_that_cannot_be_are_doubtful() -> None:
    assert doubtful(1.0, 0.9, {"gc": 0.8, "bgc": 1.2}) is None
    assert "gc -8" in (doubtful(1.0, 0.9, {"gc": -8.0, "bgc": 1.0}) or "")
    assert "take 1.5 times the network's time" in (doubtful(1.0, 1.5, {}) or "")


def test_a_plan_whose_network_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Measured({}, {"plan": "no such kernel"})
    _, scale, note = planned_time(monkeypatch, 0.5, failed)
    assert scale == 1.0
    assert "could not be measured: no such kernel" in (note or "")
