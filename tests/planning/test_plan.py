"""Plans of a small network: what is predicted against what is measured, budgets, files, and bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgcbench
from bgcbench.conversion.convert import candidates
from bgcbench.conversion.layer_moments import Holding, parts_of
from bgcbench.conversion.lockstep import Stopped
from bgcbench.errors import BgcbenchError, UsageError
from bgcbench.measure.batches import Passing
from bgcbench.planning import plan as planning
from bgcbench.planning.choices import LayerOptions, Problem, families
from bgcbench.planning.decision import Plan, again, planned, taken
from bgcbench.planning.decision import choose as best_choices
from bgcbench.planning.losses import Outputs, _put_in
from bgcbench.planning.plan import Seen, counted_problem, timed
from bgcbench.specs import Choice


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(3, 16, 3), Block(16, 16, 3), Block(16, 32, 1), Block(32, 32, 3), Block(32, 16, 1)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images(64))
    return model.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Smooth pictures, whose channels have something to do with one another."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    mixed = torch.einsum("ij,bjhw->bihw", torch.randn(3, 3, generator=torch.Generator().manual_seed(9)), small)
    smooth = nn.functional.interpolate(mixed, (12, 12), mode="bilinear")
    return smooth + 0.3 * torch.randn(count, 3, 12, 12, generator=generator)


LOADER = [images(64, 1), images(64, 2)]


def choose(problem: Problem, kind: str, budget: float, most_variants: int | None = None) -> Plan:
    return planned(problem, kind, budget, best_choices(problem, kind, budget, most_variants=most_variants))


def scored(
    model: nn.Module, batches: list[torch.Tensor], variants: tuple[str, ...], groups: tuple[int, ...]
) -> Problem:
    """Its convolutions with what every choice costs and loses."""
    layers = candidates(model, example_input=(3, 12, 12)).chosen
    return planning.scored(model, counted_problem(layers, variants, groups), Seen(batches=batches))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return scored(network(), LOADER, groups=(2, 4), variants=("gc", "bgc", "lowrank"))


def lost(model: nn.Module, other: nn.Module) -> float:
    x = images(128, 3)
    with torch.no_grad():
        z, changed = model(x), other(x)
    return float((z - changed).square().sum() / (z - z.mean(0)).square().sum())


def test_every_choice_has_its_cost_and_loss(problem: Problem) -> None:
    assert [options.layer.name for options in problem.layers] == ["1.conv", "2.conv", "3.conv", "4.conv"]
    for options in problem.layers:
        layer, by_choice = options.layer, {each.choice: each for each in options.options}
        dense = by_choice[Choice()]
        weights = layer.in_channels * layer.out_channels * layer.kernel[0] * layer.kernel[1]
        assert (dense.params, dense.macs, dense.loss, dense.felt) == (weights, 144 * weights, 0, 0)
        assert by_choice[Choice("gc", 4)].params == weights // 4
        assert by_choice[Choice("bgc", 2)].loss == pytest.approx(0, abs=1e-9)
        assert 0 < by_choice[Choice("gc", 2)].loss < by_choice[Choice("gc", 4)].loss < 1
        assert by_choice[Choice("bgc", 4)].loss < by_choice[Choice("gc", 4)].loss


def test_a_layer_that_is_put_in_computes_with_that_kernel() -> None:
    model, x = network(), images(8)
    layer = scored(model, [images(16)], groups=(2,), variants=("gc",)).layers[0].layer
    kernel = torch.randn_like(model[1].conv.weight)
    before = model(x)
    with _put_in(model, layer, kernel, centred=False):
        changed = model(x)
    assert torch.equal(model(x), before)
    model[1].conv.weight.data = kernel
    torch.testing.assert_close(changed, model(x))


def test_norms_before_the_layer_that_is_put_in_need_no_look() -> None:
    model = network()
    outputs = Outputs(model, list(parts_of([images(8, 1), images(8, 2)], 16, Passing(), model, Holding())), Passing())
    for options in scored(model, [images(16)], groups=(4,), variants=("gc",)).layers:
        conv = model.get_submodule(options.layer.name)
        with _put_in(model, options.layer, torch.randn_like(conv.weight), centred=True):
            assert 0 < outputs.error(behind=conv) == pytest.approx(outputs.error(), rel=1e-6)
    with _put_in(model, options.layer, torch.randn_like(conv.weight), centred=True):
        assert outputs.error(behind=model[-1]) > 1.01 * outputs.error(behind=conv)  # nothing is estimated


def test_predicted_losses_rank_plans_as_measured_ones_do(problem: Problem) -> None:
    """Plans at random: Spearman's correlation of what is predicted with what the converted networks lose."""
    rng, model, layers = random.Random(0), network(), problem.solved_anew().layers
    predicted, real = [], []
    for _ in range(10):
        chosen = {options.layer.name: rng.choice(options.options) for options in layers if rng.random() < 0.7}
        plan = {name: each.choice for name, each in chosen.items()} | {"1.conv": Choice("gc", 2)}
        done = bgcbench.convert(model, plan=plan, init="refit", calibration=LOADER)
        options = {each.layer.name: each.options for each in layers}
        felt = [next(o.felt for o in options[name] if o.choice == choice) for name, choice in plan.items()]
        predicted.append(sum(felt))
        real.append(lost(model, done.model))
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (predicted, real)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


@pytest.mark.parametrize("choice", [Choice("gc", 4), Choice("lowrank", 4)])
def test_what_the_network_feels_of_one_layer_is_what_its_conversion_loses(choice: Choice, problem: Problem) -> None:
    """With norms that are estimated anew, as in the conversion; other images, so to within a factor of 4."""
    model = network()
    for options in problem.layers:
        felt = next(each.felt for each in options.options if each.choice == choice)
        plan = {options.layer.name: choice}
        real = lost(model, bgcbench.convert(model, plan=plan, init="calibrated", calibration=LOADER).model)
        assert real / 4 < felt < 4 * real


def test_no_uniform_plan_at_the_same_cost_is_predicted_to_lose_less(problem: Problem) -> None:
    whole = sum(options.dense.params for options in problem.layers)
    for choice in (Choice("gc", 2), Choice("gc", 4), Choice("bgc", 4), Choice("lowrank", 2), Choice("lowrank", 4)):
        same = [next(each for each in options.options if each.choice == choice) for options in problem.layers]
        plan = choose(problem, "params", sum(each.params for each in same) / whole)
        assert plan.loss is not None
        assert plan.loss <= sum(each.felt for each in same) * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_plan_is_the_best_of_all(problem: Problem, kind: str) -> None:
    every = list(itertools.product(*(options.options for options in problem.layers)))
    whole = sum(options.dense.cost(kind) for options in problem.layers)
    for budget in (0.3, 0.5, 0.8):
        plan = choose(problem, kind, budget)
        fits = [each for each in every if sum(one.cost(kind) for one in each) <= budget * whole]
        assert plan.loss == pytest.approx(min(sum(one.felt for one in each) for each in fits), rel=1e-8)
        assert plan.cost is not None
        assert plan.cost <= budget
        few = choose(problem, kind, budget, most_variants=1)
        assert len({choice.variant for choice in few.choices.values()} - {"standard"}) <= 1
        assert few.loss is not None
        assert few.loss >= plan.loss


def test_what_is_the_same_choice_for_all_layers(problem: Problem) -> None:
    alike = families(problem)
    assert set(alike) >= {"GC N=2", "GC N=4", "BGC N=4", "LR N=2", "LR 7/8", "LR 6/8", "LR 5/8", "LR 3/8"}
    for options in problem.layers:
        assert alike["GC N=4"][options.layer.name] == Choice("gc", 4)
        share = options.of(alike["LR 5/8"][options.layer.name]).params / options.dense.params
        assert 0.5 < share <= 0.625


def test_the_plan_is_what_is_nearest_to_the_original_of_what_is_tried_out() -> None:
    model = network()
    given: dict[str, Any] = {"params": 0.4, "groups": (2, 8), "variants": ("gc", "lowrank")}
    plan = bgcbench.plan(model, LOADER, **given)
    assert set(plan.tried) >= {"felt", "plain", "gc", "lowrank"}
    assert plan.tried[plan.by] == min(plan.tried.values())
    done = bgcbench.convert(model, plan=plan, init="refit", calibration=LOADER)
    assert lost(model, done.model) < 2 * plan.tried[plan.by]
    assert plan.cost is not None
    assert plan.cost <= 0.4
    assert not bgcbench.plan(model, LOADER, **given, try_out=False).tried


def test_real_losses_scale_what_is_felt(problem: Problem) -> None:
    choices = {options.layer.name: Choice("gc", 4) for options in problem.layers}
    first, second, *_ = problem.layers
    lost = {first.layer.name: 2 * first.of(Choice("gc", 4)).loss, second.layer.name: 1e6}
    scaled = again(problem, lost, choices, error=0)  # which says nothing of sizes
    for choice in (Choice("gc", 2), Choice("lowrank", 2)):
        assert scaled.layers[0].of(choice).felt == pytest.approx(2**0.7 * first.of(choice).felt)
        assert scaled.layers[1].of(choice).felt == pytest.approx(4**0.7 * second.of(choice).felt)
        assert scaled.layers[2].of(choice).felt == problem.layers[2].of(choice).felt
    measured = again(problem, lost, choices, error=0.05)
    assert measured.felt(choices) == pytest.approx(0.05)
    shares = [options.of(Choice("gc", 2)).felt / 0.05 for options in measured.layers]
    assert shares == pytest.approx([o.of(Choice("gc", 2)).felt / scaled.felt(choices) for o in scaled.layers])


def test_the_convolutions_behind_make_up_for_most_of_what_the_first_layer_loses(problem: Problem) -> None:
    lost = {Choice("gc", 2): (0.1, 0.01), Choice("gc", 4): (0.2, 0.02)}
    alike = dataclasses.replace(problem, layers=tuple(options.losing(lost) for options in problem.layers))
    of_half = [options.of(Choice("gc", 2)).felt for options in alike.solved_anew().layers]
    assert of_half == pytest.approx([0.01 * 0.2 ** (behind / 3) for behind in (3, 2, 1, 0)])
    for options, less in zip(alike.solved_anew().layers, of_half, strict=True):
        assert options.of(Choice("gc", 4)).felt == pytest.approx(2**0.7 * less)  # not twice as much
        assert (options.dense.felt, options.of(Choice("gc", 4)).loss) == (0, 0.2)


def test_of_a_budget_of_loss_the_cheapest_that_keeps_to_it_is_taken() -> None:
    tried, costs = {"felt": 0.08, "gc": 0.2, "bgc": 0.09}, {"felt": 0.5, "gc": 0.1, "bgc": 0.4}
    assert taken("loss", 0.1, tried, costs) == "bgc"
    assert taken("loss", 0.01, tried, costs) == taken("params", 0.1, tried, costs) == "felt"


def test_a_budget_of_loss_gives_the_fewest_multiply_adds(problem: Problem) -> None:
    loose = choose(problem, "loss", 0.5)
    tight = choose(problem, "loss", 0.01)
    assert loose.loss is not None
    assert tight.loss is not None
    assert loose.cost is not None
    assert tight.cost is not None
    assert loose.loss <= 0.5
    assert tight.loss <= 0.01
    assert loose.cost < tight.cost <= 1


def test_a_plan_converts_and_keeps_its_budget() -> None:
    model, loader = network(), [images(64, 1)]
    plan = bgcbench.plan(model, loader, params=0.4, groups=(2, 4), variants=("gc", "bgc", "lowrank"))
    done = bgcbench.convert(model, plan=plan, init="refit", calibration=loader)
    names = list(plan.choices)
    left = sum(p.numel() for name in names for p in done.model.get_submodule(name).parameters())
    assert left <= 0.4 * sum(model.get_submodule(name).weight.numel() for name in names)
    assert plan.curve[-1].loss == 0
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(plan.curve))
    for layer in plan.layers:
        if layer.better is not None:
            assert layer.better.felt < layer.chosen.felt
            more = layer.better.params - layer.chosen.params
            assert layer.better_cost == pytest.approx(more / sum(each.dense.params for each in plan.layers))
            assert plan.by != "felt" or plan.cost + layer.better_cost > 0.4  # else it would be the plan
    assert f"params: {plan.cost:.3f} of the original's" in str(plan)
    whole = bgcbench.plan(model, loader, groups=(2,), variants=("gc",))
    assert all(choice.is_dense for choice in whole.choices.values())


@pytest.mark.usefixtures("brisk")
def test_a_budget_of_time_measures_every_layer_and_choice() -> None:
    model, x = network(), images(16)
    plan = bgcbench.plan(model, [x], time=1.0, quick=True, groups=(2, 4), variants=("gc", "lowrank"))
    assert plan.kind == "time"
    assert plan.cost is not None
    assert plan.cost <= 1.0 + 1e-9
    assert all(layer.chosen.seconds is not None for layer in plan.layers)
    assert bgcbench.plan(model, iter([x]), time=1.0, quick=True, groups=(2,), variants=("gc",)).kind == "time"


@pytest.mark.usefixtures("brisk")
def test_seconds_add_up_to_the_network(problem: Problem) -> None:
    known = timed(network(), problem, Passing(), (images(4),), quick=True)
    dense = [options.dense.cost("time") for options in known.layers]
    assert all(seconds > 0 for seconds in dense)
    assert known.rest_s + sum(dense) > 0
    assert set(known.factors) <= {"gc", "bgc", "lowrank"}


def test_a_plan_file_can_be_read_edited_and_reduced_to_its_choices(tmp_path: Path) -> None:
    plan = Plan({"1.conv": Choice("bgc", 4), "2.conv": Choice(), "3.conv": Choice("lowrank", rank=3)}, "macs", 0.5)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert (again.choices, again.kind, again.asked) == (plan.choices, "macs", 0.5)
    bare = {"1.conv": {"variant": "gc", "groups": 2}}
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    assert bgcbench.convert(network(), plan=Plan.load(tmp_path / "bare.json")).record.replaced == ("1.conv",)
    for text in ("{", "[]", '{"1.conv": {"variant": "nope"}}', '{"choices": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(BgcbenchError, match="is no plan"):
            Plan.load(tmp_path / "bad.json")
    with pytest.raises(BgcbenchError, match="cannot be read"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": 0.5, "macs": 0.5}, "params and macs are two budgets; give one"),
        ({"params": 0.0}, "params=0.0 must be above 0 and at most 1"),
        ({"params": 0.05}, "params=0.05 cannot be met: the least is 0.25"),
        ({"variants": ["nope"]}, "unknown variant 'nope'"),
        ({"most_variants": 0}, "most_variants=0 must be a whole number"),
        ({"exclude": "9.*"}, "no convolution of the network is called '9.*'"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], message: str) -> None:
    given = {"groups": (2, 4), "variants": ("gc",), **options}
    with pytest.raises(BgcbenchError, match=re.escape(message)):
        bgcbench.plan(network(), [images(16)], **given)


def test_images_that_are_too_few_are_refused() -> None:
    with pytest.raises(UsageError, match="3 calibration images are too few"):
        bgcbench.plan(network(), [images(3)], params=0.5)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda z: z.argmax(1), "no tensors with a row of numbers for each image; give a forward_fn"),
        (lambda z: z[:, : 1 + int((1e3 * z.abs().sum()) % 7)], "other sizes with other weights"),
    ],
)
def test_outputs_that_cannot_be_compared_are_refused(
    outputs: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bgcbench.plan(
            network(), [images(32)], params=0.5, groups=(2, 4), variants=("gc", "lowrank"),
            forward_fn=lambda model, batch: outputs(model(batch)),
        )  # fmt: skip


def test_a_plan_that_is_stopped_is_no_plan(problem: Problem) -> None:
    with pytest.raises(Stopped):
        bgcbench.plan(network(), [images(16)], groups=(2,), variants=("gc",), stop=lambda: True)
    with pytest.raises(Stopped):
        timed(network(), problem, Passing(), (images(4),), quick=True, stop=lambda: True)


def test_options_are_the_layer_itself_first(problem: Problem) -> None:
    assert all(isinstance(options, LayerOptions) and options.dense.choice.is_dense for options in problem.layers)
