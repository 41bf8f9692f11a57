"""What each convolution of a network should become for a budget of parameters, multiply-adds, time or loss.

    plan = bgcbench.plan(model, loader, macs=0.5)
    print(plan)
    converted = bgcbench.convert(model, plan=plan, init="refit", calibration=loader)

The choice is exact for the costs and losses that it is given (:mod:`bgcbench.theory.knapsack`): costs are counted or
measured (:mod:`bgcbench.planning.times`), losses are measured on the images (:mod:`bgcbench.planning.losses`). Then the
best plans are tried out: converted and compared with the original on images held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bgcbench.conversion.convert import candidates, convert
from bgcbench.conversion.layer_moments import Holding, Part, Pictures, first_of, parts_of
from bgcbench.conversion.lockstep import Stopped
from bgcbench.conversion.record import counted
from bgcbench.conversion.selection import checked_example
from bgcbench.conversion.solve import SETTLED
from bgcbench.errors import UsageError
from bgcbench.measure import timing
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.batches import Forward, Passing, count_images, device_of, first_image, reference_of
from bgcbench.measure.undisturbed import random_state_kept, undisturbed
from bgcbench.planning import TRIED, asked_for
from bgcbench.planning.choices import LayerOptions, Problem, Scored, choices_for
from bgcbench.planning.decision import AGAIN, FELT, Contender, Plan, again, choose, contenders, planned, taken
from bgcbench.planning.execution import Execution
from bgcbench.planning.losses import SENSITIVITY_IMAGES, Outputs, absorbed, choice_losses, felt_losses
from bgcbench.planning.times import (
    EAGER,
    as_choice,
    corrections,
    doubtful,
    in_network,
    layer_times,
    network_times,
    scaling,
)
from bgcbench.results.rows import Record, Replaced
from bgcbench.specs import REFIT, VARIANTS, Choice, check_choice, check_positive, cost_kind

GROUPS_TRIED = (2, 4, 8, 16)
DEFAULT_IMAGES = 256
DENSE, PLAN = "dense", "plan"  # among the names of networks
NETWORK_ROUNDS = 8  # of whole networks that are timed, at least
SCALINGS = {"eager": 2}  # see saved_by_its_network; once where a network takes minutes to be made ready
SCALING_ROUNDS = 24
CLOSE = 0.005  # of the network's time: nearer than that to a measurement's interval a prediction is as good
QUICKLY_SETTLED = 1e-2  # instead of calibration's: TLGC's losses are then known to some percent


@memory_state("kept")
def plan(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    params: float | None = None,
    macs: float | None = None,
    time: float | None = None,
    loss: float | None = None,
    variants: Sequence[str] = TRIED,
    groups: Sequence[int] = GROUPS_TRIED,
    ranks: Sequence[int] = (),
    mode: str = "eager",
    phase: str = "fwd",
    quick: bool = False,
    try_out: bool = True,
    most_variants: int | None = None,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Any = None,
    forward_fn: Forward | None = None,
    pictures: Pictures = None,
    images: int = DEFAULT_IMAGES,
    memory_bytes: int = 4 * 2**30,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Plan:
    """Choose what each convolution of ``model`` becomes, or stays, for one budget.

    params, macs: at most that share (0 to 1) of what the convolutions that may be replaced have; the plan loses the
    least. time: at most that share of what the network takes for ``example_input`` (by default the loader's first
    batch) on the device where it is; every layer and choice is measured there (``quick``: few samples), in ``mode``
    'eager', 'compile' or 'onnxruntime' and in ``phase`` 'fwd' or 'train_step' (see
    :class:`bgcbench.planning.execution.Execution`). loss: the plan has the fewest MACs with at most that predicted
    share of the variance of the network's outputs lost. With none of them the plan keeps everything, and its ``curve``
    has the best plan for every budget of MACs.
    try_out: convert the network by the best plans and by the best choices for all layers alike, calibrated on these
    images, and take what is nearest to the original on those held out (:func:`bgcbench.planning.decision.contenders`);
    otherwise the plan by the predicted loss is taken.
    variants, groups, ranks: what is tried for every layer. most_variants: use so many different ones at most. where,
    include, exclude, example_input, forward_fn, pictures, memory_bytes, seed: as in :func:`bgcbench.convert`
    (calibration_pictures); the loader's batches are held in memory, ``images`` of them at most, without labels.

    Raises UsageError for a budget that cannot be met, with the least that can, for too few images, and as
    :func:`bgcbench.approximability`; Stopped where ``stop`` asked for the end.
    """
    kind, budget = asked_for({"params": params, "macs": macs, "time": time, "loss": loss})
    check_budget(kind, budget)
    check_positive("images", images)
    execution = Execution(mode, phase)
    seen, first = seen_of(
        model, loader, Passing(forward_fn), pictures=pictures, images=images, memory_bytes=memory_bytes, seed=seed,
        quick=quick, stop=stop,
    )  # fmt: skip
    options: dict[str, Any] = {"where": where, "include": include, "exclude": exclude, "passing": seen.passing}
    with random_state_kept(model):
        shown = first_image(first) if example_input is None else example_input
        found = candidates(model, example_input=shown, **options)
    problem = counted_problem(found.chosen, variants, groups, ranks)
    if kind == "time":
        example = first if example_input is None else _filled(checked_example(example_input), model)
        problem = timed(model, problem, seen.passing, example, execution, quick=quick, seed=seed, stop=stop)
    choose(problem, kind, budget, most_variants=most_variants)  # refuses what cannot be met, whatever is lost
    problem = scored(model, problem, seen).solved_anew()
    if kind == "time" and budget < 1:
        scale, note = saved_by_its_network(
            model, problem, budget, seen.passing, example, execution, most_variants=most_variants, quick=quick,
            seed=seed, stop=stop,
        )  # fmt: skip
        problem = dataclasses.replace(problem.saving(scale), notes=(*problem.notes, *filter(None, [note])))
    problem = dataclasses.replace(problem, notes=(*found.notes, *seen.passing.notes, *problem.notes))
    if stop():
        raise Stopped
    if not try_out or budget == 1:
        return planned(problem, kind, budget, choose(problem, kind, budget, most_variants=most_variants))
    original = held_outputs(model, seen)

    def converted(contender: Contender) -> tuple[float, Mapping[str, float]]:
        done = convert(
            model, plan=contender.choices, init=REFIT, calibration=seen.batches, calibration_images=images,
            calibration_pictures=seen.pictures, example_input=example_input, forward_fn=forward_fn, seed=seed,
            stop=stop,
        )  # fmt: skip
        return original.error(done.model), losses_of(done.record)

    tried = {
        each.name: (each, error) for each, error in tryout(problem, kind, budget, converted, most_variants, quick=quick)
    }
    return decided(problem, kind, budget, tried)


def tryout(
    problem: Problem,
    kind: str,
    budget: float,
    converted: Callable[[Contender], tuple[float, Mapping[str, float]]],
    most_variants: int | None = None,
    *,
    quick: bool = False,
) -> Iterator[tuple[Contender, float]]:
    """Every contender for the plan with the error of its outputs, as it is known.

    converted: returns that error for a contender, and what its layers lose, after converting the network. What is
    chosen by the real losses of the first of them comes last. quick: only two of them (see :func:`contenders`).
    """
    real: tuple[Mapping[str, float], float] = {}, 0.0
    found = contenders(problem, kind, budget, most_variants=most_variants, quick=quick)
    for each in found:
        error, lost = converted(each)
        real = (lost, error) if each.name == FELT else real
        yield each, error
    if quick:
        return
    lost, error = real
    choices = choose(again(problem, lost, found[0].choices, error), kind, budget, most_variants=most_variants)
    if all(choices != each.choices for each in found):
        last = Contender(AGAIN, "by its real losses", choices)
        yield last, converted(last)[0]


def losses_of(record: Record) -> dict[str, float]:
    """What each layer of a calibrated conversion loses in it, on images held out."""
    layers = record.calibration.layers if record.calibration else ()
    return {layer.name: layer.after for layer in layers if layer.after is not None}


def decided(problem: Problem, kind: str, budget: float, tried: Mapping[str, tuple[Contender, float]]) -> Plan:
    """The plan, of the contenders and their errors by name."""
    errors = {name: error for name, (_, error) in tried.items()}
    costs = {name: problem.share(each.choices, cost_kind(kind)) for name, (each, _) in tried.items()}
    name = taken(kind, budget, errors, costs)
    return planned(problem, kind, budget, tried[name][0].choices, tried=errors, by=name)


def held_outputs(model: nn.Module, seen: Seen) -> Outputs:
    """What ``model`` puts out on the images that calibration holds out; raises UsageError for too few."""
    return Outputs(model, [part for part in seen.parts(model) if part.held_out], seen.passing)


def check_budget(kind: str, budget: float) -> None:
    """Raise UsageError for a budget that says nothing."""
    if not 0 < budget <= 1:
        raise UsageError(f"{kind}={budget} must be above 0 and at most 1: a share of what is there")


# ------------------------------------------------------------------------------------------------------ costs, losses


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The images that a network is planned on, and how losses are found on them.

    batches: gone through more than once. images: of them, at most. passing: how they reach the network. pictures,
    memory_bytes, seed: as in :func:`bgcbench.convert`. quick: sensitivity by few images, and TLGC's search ends early.
    """

    batches: Sequence[Any]
    images: int = DEFAULT_IMAGES
    passing: Passing = field(default_factory=Passing)
    pictures: Pictures = None
    memory_bytes: int = 4 * 2**30
    seed: int = 0
    quick: bool = False
    stop: Callable[[], bool] = lambda: False

    def parts(self, model: nn.Module) -> list[Part]:
        """The batches taken apart into what calibrates and what is held out; raises UsageError for too few images."""
        holding = Holding(self.pictures)
        found = list(parts_of(self.batches, self.images, self.passing, model, holding))
        holding.check_enough()
        return found


def seen_of(
    model: nn.Module, loader: Iterable[Any], passing: Passing, *, pictures: Pictures = None, images: int, **options: Any
) -> tuple[Seen, Any]:
    """The first ``images`` images of ``loader``, held in memory, and what ``model`` is called with for its first batch.

    options: those of Seen.
    """
    with random_state_kept(model):
        first, batches = first_of(loader)
        pictures = pictures or getattr(loader, "pictures", None)
        held = _held(batches, images, passing, model)
    return Seen(batches=held, images=images, passing=passing, pictures=pictures, **options), passing.of(first, model)


def counted_problem(
    layers: Sequence[Replaced], variants: Sequence[str] = TRIED, groups: Sequence[int] = GROUPS_TRIED,
    ranks: Sequence[int] = (),
) -> Problem:  # fmt: skip
    """``layers`` with what each choice costs by formula; of losses and times nothing is known yet.

    Raises UsageError for an unknown variant and for numbers that are none of groups.
    """
    for name in variants:
        check_choice("variant", name, VARIANTS)
    for number in (*groups, *ranks):
        check_positive("groups and ranks", number)
    made = []
    for layer in layers:
        choices = (Choice(), *choices_for(layer, variants, groups, ranks))
        made.append(LayerOptions(layer, tuple(Scored(each, *counted(layer, each), 0.0, 0.0) for each in choices)))
    return Problem(tuple(made))


@memory_state("kept")
def scored(model: nn.Module, problem: Problem, seen: Seen) -> Problem:
    """``problem`` with what every option loses. Raises UsageError for too few images."""
    with random_state_kept(model):
        return dataclasses.replace(problem, layers=tuple(score(model, problem.layers, seen)))


def score(model: nn.Module, layers: Sequence[LayerOptions], seen: Seen) -> Iterator[LayerOptions]:
    """Each of ``layers`` with what its options lose, one by one. Raises UsageError for too few images."""
    replaced = [options.layer for options in layers]
    choices = {options.layer.name: [each.choice for each in options.options[1:]] for options in layers}
    parts = seen.parts(model)
    centred = absorbed(model, replaced, lambda: seen.passing(model, first_image(parts[0].batch)))
    put_in = SENSITIVITY_IMAGES // 4 if seen.quick else SENSITIVITY_IMAGES
    outputs = Outputs(model, _some([part for part in parts if part.held_out], put_in), seen.passing)
    losses = choice_losses(
        model, replaced, choices, seen.batches, centred=centred, passing=seen.passing, pictures=seen.pictures,
        settled=QUICKLY_SETTLED if seen.quick else SETTLED, images=seen.images, memory_bytes=seen.memory_bytes,
        seed=seen.seed, stop=seen.stop,
    )  # fmt: skip
    known = {options.layer.name: options for options in layers}
    for layer, found in losses:
        felt = felt_losses(outputs, layer, found, centred=layer.name in centred)
        lost = {each.choice: (each.loss, felt[each.choice]) for each in found}
        yield known[layer.name].losing(lost)


def timed(
    model: nn.Module,
    problem: Problem,
    passing: Passing,
    example: Any,
    execution: Execution = EAGER,
    *,
    quick: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Problem:
    """``problem`` with the seconds of every option, as they are in a call of the network on ``example``.

    Measured on the device where ``model`` is. Options that could not be measured are left out, and said why in
    ``untimed``. Raises Stopped, and UsageError where the network or one of its convolutions could not be measured as it
    is.
    """
    device = device_of(model)
    execution.check(passing, example, device)
    rules = layer_rules(device.type, quick=quick)
    layers = [options.layer for options in problem.layers]
    choices = {each.layer.name: [one.choice for one in each.options[1:]] for each in problem.layers}
    shared: dict[str, Any] = {"execution": execution, "seed": seed, "stop": stop}
    with undisturbed(model), execution.state:
        network = execution.own(model)
        run = partial(passing, network, example)
        found = dict(layer_times(network, layers, choices, run, device, rules, **shared))
        if stop():
            raise Stopped
        alone = {layer.name: found[layer.name].seconds(layer.calls or 1) for layer in layers}
        failures = {(name, choice): why for name, one in found.items() for choice, why in one.failures.items()}
        uniform = {
            choice: _uniform(layers, choices, choice, execution)
            # A network takes a minute to be compiled or exported.
            for choice in _ends(choices, few=quick and execution.mode != "eager")
            if not any(failed == choice for _, failed in failures)
        }
        networks = {choice.label: each for choice, each in uniform.items()}
        # What layers save is scaled by these few, so they are measured with more care.
        careful = _careful(rules, NETWORK_ROUNDS)
        measured = network_times(network, {DENSE: (), **networks}, passing, example, device, careful, **shared)
        whole = measured.times
    if stop():
        raise Stopped
    reasons = [measured.failures.get(DENSE), *(failures.get((layer.name, Choice())) for layer in layers)]
    for reason in filter(None, reasons):
        raise UsageError(f"the network could not be measured: {reason}; try another mode, or a smaller example_input")
    left_out = [f"{name} for all layers could not be measured: {why}" for name, why in measured.failures.items()]
    for why in dict.fromkeys(failures.values()):
        named = [f"{choice.label} of {name}" for (name, choice), reason in failures.items() if reason == why]
        left_out.append(f"{len(named)} choices are left out, which could not be measured, such as {named[0]}: {why}")
    dense_s = whole[DENSE].median_s
    known = {choice: whole[choice.label].median_s for choice in uniform if choice.label in whole}
    factors = corrections(dense_s, known, alone)
    made = []
    for options in problem.layers:
        surely = found[options.layer.name].seconds(options.layer.calls or 1, surely=True)
        seconds = in_network(surely, factors)
        there = (each for each in options.options if each.choice in seconds)
        own = tuple(dataclasses.replace(each, seconds=seconds[each.choice]) for each in there)
        made.append(LayerOptions(options.layer, own))
    layers_s = sum(times[Choice()] for times in alone.values())
    notes = (*problem.notes, *left_out, *filter(None, [doubtful(dense_s, layers_s, factors)]))
    rest = max(0.0, dense_s - sum(options.dense.cost("time") for options in made))
    return dataclasses.replace(problem, layers=tuple(made), notes=notes, rest_s=rest, factors=factors, untimed=failures)


def saved_by_its_network(
    model: nn.Module,
    problem: Problem,
    budget: float,
    passing: Passing,
    example: Any,
    execution: Execution = EAGER,
    *,
    most_variants: int | None = None,
    quick: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, str | None]:
    """How many times what is predicted the network of the best plan for ``budget`` of the time saves, measured.

    To be given to :meth:`Problem.saving`; and a note where no plan keeps to the budget then. Uniform networks do not
    tell all of what a plan saves that mixes variants; so its own network is measured, and once more that of the plan
    that follows. Raises Stopped.
    """
    device, scale = device_of(model), 1.0
    rules = _careful(layer_rules(device.type, quick=quick), SCALING_ROUNDS)
    for _ in range(SCALINGS.get(execution.mode, 1)):
        scaled = problem.saving(scale)
        choices = choose(scaled, "time", budget, most_variants=most_variants)
        chosen = [(each.layer, choices[each.layer.name]) for each in problem.layers]
        replaced = [as_choice(layer, choice, execution) for layer, choice in chosen if not choice.is_dense]
        with undisturbed(model), execution.state:
            network = execution.own(model)
            measured = network_times(
                network, {DENSE: (), PLAN: replaced}, passing, example, device, rules, execution=execution, seed=seed,
                stop=stop,
            )  # fmt: skip
        if stop():
            raise Stopped
        if measured.failures:
            why = next(iter(measured.failures.values()))
            return scale, f"savings are not scaled to what the plan's network saves, which could not be measured: {why}"
        found = measured.times
        (took, ends), predicted = found[PLAN].ratio_to(found[DENSE]), scaled.share(choices, "time")
        low, high = ends or (took, took)
        if low - CLOSE <= predicted <= high + CLOSE:
            break
        wanted = scale * scaling(1 - took, 1 - predicted)
        try:
            choose(problem.saving(wanted), "time", budget, most_variants=most_variants)
        except UsageError:
            return scale, (
                f"the plan's network takes {took:.3g} of the time where {predicted:.3g} was predicted, and no plan can "
                f"be expected to take {budget:g}"
            )
        scale = wanted
    return scale, None


def _careful(rules: timing.Rules, rounds: int) -> timing.Rules:
    return dataclasses.replace(rules, min_rounds=max(rules.min_rounds, rounds))


def layer_rules(device_type: str, *, quick: bool) -> timing.Rules:
    """How a layer by itself is timed."""
    return timing.Rules.for_device(device_type, quick=quick, max_time_s=0.1 if quick else 1.0)


def _uniform(
    layers: Sequence[Replaced], choices: Mapping[str, Sequence[Choice]], choice: Choice, execution: Execution
) -> list[Replaced]:
    """The layers that it fits, as ``choice``."""
    return [as_choice(layer, choice, execution) for layer in layers if choice in choices[layer.name]]


def _ends(choices: Mapping[str, Sequence[Choice]], *, few: bool) -> list[Choice]:
    """Of each variant the choices with the fewest and the most groups: their networks say what a saving is worth.

    few: only those with the most groups, which save most.
    """
    by_variant: dict[str, list[Choice]] = {}
    for choice in (each for own in choices.values() for each in own if each.rank is None):
        by_variant.setdefault(choice.variant, []).append(choice)
    ends = [find(found, key=lambda choice: choice.groups) for found in by_variant.values() for find in (min, max)[few:]]
    return list(dict.fromkeys(ends))


def _filled(example: Any, model: nn.Module) -> Any:
    """The network's arguments of an example: one image of a size that is given as (channels, height, width)."""
    if isinstance(example, tuple) and all(isinstance(side, int) for side in example):
        like = reference_of(model)
        return (torch.randn(1, *example, dtype=like.dtype, device=like.device),)
    return example


def _held(loader: Iterable[Any], images: int, passing: Passing, model: nn.Module) -> list[Any]:
    """The batches with the first ``images`` images, in memory."""
    held: list[Any] = []
    there = 0
    for batch in loader:
        if there >= images:
            break
        held.append(batch)
        there += count_images(passing.of(batch, model)) or 1
    return held


def _some(parts: Sequence[Part], images: int) -> list[Part]:
    """The first parts with so many images, at most."""
    kept, left = [], images
    for part in parts:
        if left <= 0:
            break
        fewer = part if len(part.numbers) <= left else part.below(part.numbers[left])
        if fewer is not None:
            kept.append(fewer)
            left -= len(fewer.numbers)
    return kept
