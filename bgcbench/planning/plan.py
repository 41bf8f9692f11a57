"""What each convolution of a network should become for a budget of parameters, multiply-adds, time or loss.

    plan = bgcbench.plan(model, loader, macs=0.5)
    print(plan)
    converted = bgcbench.convert(model, plan=plan, init="calibrated", calibration=loader)

The choice is exact for the costs and losses that it is given (:mod:`bgcbench.planning.knapsack`): costs are counted,
losses are measured on the images (:mod:`bgcbench.planning.losses`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from bgcbench.conversion.convert import candidates
from bgcbench.conversion.layer_moments import Holding, Part, Pictures, first_of, parts_of
from bgcbench.conversion.lockstep import Stopped
from bgcbench.conversion.record import spec_of
from bgcbench.conversion.selection import checked_example
from bgcbench.errors import ResultFileError, UsageError, reason_of
from bgcbench.measure import timing
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.batches import Forward, Passing, count_images, device_of, first_image, reference_of
from bgcbench.measure.counts import Counts, count
from bgcbench.measure.undisturbed import random_state_kept, undisturbed
from bgcbench.planning import TRIED, asked_for, knapsack
from bgcbench.planning.losses import SENSITIVITY_IMAGES, Outputs, absorbed, choice_losses, sensitivity
from bgcbench.planning.times import corrections, in_network, layer_times, network_times
from bgcbench.results import write_atomically
from bgcbench.results.rows import Replaced
from bgcbench.specs import VARIANTS, Choice, check_choice, check_positive

GROUPS_TRIED = (2, 4, 8, 16)
DEFAULT_IMAGES = 256
FORMAT = "bgcbench.plan/1"


@dataclass(frozen=True)
class Scored:
    """A choice for a layer, and what it comes to.

    params, macs: of the layer as that, biases apart, one image, all calls. loss: the share of its output's variance
    that is lost; felt: of the variance of the network's outputs, by the network's sensitivity to the layer. seconds: of
    one call of the network, where it was measured.
    """

    choice: Choice
    params: int
    macs: int
    loss: float
    felt: float
    seconds: float | None = None

    def cost(self, kind: str) -> float:
        found: float | None = {"params": self.params, "macs": self.macs, "time": self.seconds}[kind]
        if found is None:
            raise UsageError("a budget of time needs measured times")
        return found


@dataclass(frozen=True)
class LayerOptions:
    """A convolution and what it may become; the first option is the layer as it is."""

    layer: Replaced
    options: tuple[Scored, ...]

    @property
    def dense(self) -> Scored:
        return self.options[0]


@dataclass(frozen=True)
class PlannedLayer:
    """What becomes of a convolution: ``chosen`` in the place of ``dense``.

    better: the least costly option that loses less, None where there is none.
    """

    name: str
    shape: str
    dense: Scored
    chosen: Scored
    better: Scored | None


@dataclass(frozen=True)
class Point:
    """A point of the curve: shares of the convolutions' cost, the predicted loss, and the choices that have them."""

    cost: float
    loss: float
    choices: Mapping[str, Choice]


@dataclass(frozen=True)
class Plan:
    """Which convolution becomes what; ``choices`` by name, those that stay among them.

    kind, asked: the budget. cost: of what the convolutions cost as they were (params, macs; with kind 'time' of the
    network's time), predicted; loss: predicted, as a share of the variance of the network's outputs. curve: the best
    plans from the least cost to no loss. notes: what the user should know.
    """

    choices: Mapping[str, Choice]
    kind: str = "params"
    asked: float | None = None
    cost: float | None = None
    loss: float | None = None
    layers: tuple[PlannedLayer, ...] = ()
    curve: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What :meth:`load` reads; ``choices`` may be edited."""
        return {
            "format": FORMAT,
            "budget": {"kind": self.kind, "asked": self.asked, "cost": self.cost, "loss": self.loss},
            "choices": {name: choice.to_json() for name, choice in self.choices.items()},
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the choices as JSON, whole or not at all."""
        write_atomically(Path(path), (json.dumps(self.to_json(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """A plan from its file, or from one that holds the choices alone; raises ResultFileError."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            choices = stored.get("choices", stored)
            budget = stored.get("budget", {}) if "choices" in stored else {}
            return cls({str(name): Choice.of(choice) for name, choice in choices.items()}, **budget)
        except OSError as problem:
            raise ResultFileError(f"{path} cannot be read ({problem.strerror})") from problem
        except (ValueError, AttributeError, TypeError, UsageError) as problem:
            raise ResultFileError(f"{path} is no plan: {reason_of(problem)}") from problem

    def __str__(self) -> str:
        widest = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:{widest}}  {layer.shape:24}  {layer.chosen.choice.label:10}  "
            f"params {layer.chosen.params / layer.dense.params:5.0%}  loss {layer.chosen.loss:7.2%}"
            for layer in self.layers
        ]
        if self.cost is not None and self.loss is not None:
            lines.append(f"{self.kind}: {self.cost:.3f} of the original's, predicted loss {self.loss:.3g}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


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
    quick: bool = False,
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
    batch) on the device where it is, in inference mode; every layer and choice is measured there (``quick``: few
    samples). loss: the plan has the fewest MACs with at most that predicted share of the variance of the network's
    outputs lost. With none of them the plan keeps everything, and its ``curve`` has the best plan for every budget of
    MACs.
    variants, groups, ranks: what is tried for every layer. most_variants: use so many different ones at most. where,
    include, exclude, example_input, forward_fn, pictures, memory_bytes, seed: as in :func:`bgcbench.convert`
    (calibration_pictures); the loader's batches are held in memory, ``images`` of them at most, without labels.

    Raises UsageError for a budget that cannot be met, with the least that can, for too few images, and as
    :func:`bgcbench.approximability`; Stopped where ``stop`` asked for the end.
    """
    kind, budget = asked_for({"params": params, "macs": macs, "time": time, "loss": loss})
    check_budget(kind, budget)
    problem = scored(
        model, loader, variants=variants, groups=groups, ranks=ranks, where=where, include=include, exclude=exclude,
        example_input=example_input, forward_fn=forward_fn, pictures=pictures, images=images,
        memory_bytes=memory_bytes, seed=seed, stop=stop,
    )  # fmt: skip
    if kind == "time":
        if example_input is None and iter(loader) is loader:
            raise UsageError("time= needs example_input= where the loader can be gone through once only")
        passing = Passing(forward_fn)
        example = passing.of(first_of(loader)[0], model) if example_input is None else checked_example(example_input)
        problem = timed(model, problem, passing, _filled(example, model), quick=quick, seed=seed, stop=stop)
    if stop():
        raise Stopped
    return choose(problem.layers, kind, budget, most_variants=most_variants, rest=problem.rest_s, notes=problem.notes)


def check_budget(kind: str, budget: float) -> None:
    """Raise UsageError for a budget that says nothing."""
    if not 0 < budget <= 1:
        raise UsageError(f"{kind}={budget} must be above 0 and at most 1: a share of what is there")


# ------------------------------------------------------------------------------------------------------ costs, losses


@dataclass(frozen=True)
class Problem:
    """Every convolution that may be replaced with its options, and what the user should know.

    rest_s: seconds of the network besides these convolutions, where times are measured. factors: of a variant's savings
    alone, what the network saves (see planning.times).
    """

    layers: tuple[LayerOptions, ...]
    notes: tuple[str, ...] = ()
    rest_s: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)


def choices_for(
    layer: Replaced, variants: Sequence[str], groups: Sequence[int], ranks: Sequence[int] = ()
) -> list[Choice]:
    """What a convolution may become besides what it is; what does not fit it is left out."""
    shape = layer.in_channels, layer.out_channels, math.prod(layer.kernel)
    tried = [
        Choice(variant, n) for variant, n in itertools.product(variants, groups) if variant != "standard" and n > 1
    ]
    tried += [Choice(v, rank=r) for v, r in itertools.product(variants, ranks) if VARIANTS[v].has_rank]
    return [choice for choice in tried if choice.unfit(*shape) is None]


def counted(layer: Replaced, choice: Choice) -> tuple[int, int]:
    """Parameters (biases apart) and MACs of one image, of a convolution as ``choice``."""
    spec = spec_of(replace(layer, variant=choice.variant, groups=choice.groups, rank=choice.rank, bias=False))
    least = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel, strict=True)]  # where no size is known
    found: Counts = count(spec, layer.height or least[0], layer.width or least[1])
    return found.params, found.macs * (layer.calls or 1)


def scored(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    variants: Sequence[str] = TRIED,
    groups: Sequence[int] = GROUPS_TRIED,
    ranks: Sequence[int] = (),
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
) -> Problem:
    """The convolutions of ``model`` with what every choice costs and loses; arguments as of :func:`plan`."""
    for name in variants:
        check_choice("variant", name, VARIANTS)
    for number in (*groups, *ranks):
        check_positive("groups and ranks", number)
    passing = Passing(forward_fn)
    pictures = pictures or getattr(loader, "pictures", None)
    with random_state_kept(model):
        first, loader = first_of(loader)
        batches = _held(loader, images, passing, model)
        example = first_image(passing.of(first, model)) if example_input is None else example_input
        options: dict[str, Any] = {"where": where, "include": include, "exclude": exclude, "passing": passing}
        found = candidates(model, example_input=example, **options)
        choices = {layer.name: choices_for(layer, variants, groups, ranks) for layer in found.chosen}
        options = {"images": images, "memory_bytes": memory_bytes, "seed": seed, "stop": stop}
        made = tuple(score(model, found.chosen, choices, batches, passing=passing, pictures=pictures, **options))
    return Problem(made, (*found.notes, *passing.notes))


def score(
    model: nn.Module,
    layers: Sequence[Replaced],
    choices: Mapping[str, Sequence[Choice]],
    batches: Sequence[Any],
    *,
    images: int,
    passing: Passing,
    pictures: Pictures = None,
    memory_bytes: int = 4 * 2**30,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[LayerOptions]:
    """Each of ``layers`` with what it costs and loses as it is and as each of its ``choices`` (by name), one by one.

    batches: gone through more than once. Raises UsageError for too few images.
    """
    holding = Holding(pictures)
    parts = list(parts_of(batches, images, passing, model, holding))
    holding.check_enough()
    centred = absorbed(model, layers, lambda: passing(model, first_image(parts[0].batch)))
    outputs = Outputs(model, _some([part for part in parts if part.held_out], SENSITIVITY_IMAGES), passing)
    options: dict[str, Any] = {"images": images, "memory_bytes": memory_bytes, "seed": seed, "stop": stop}
    losses = choice_losses(
        model, layers, choices, batches, centred=centred, passing=passing, pictures=pictures, **options
    )
    for layer, found in losses:
        weight = sensitivity(outputs, layer, found, centred=layer.name in centred)
        own = [Scored(each.choice, *counted(layer, each.choice), each.loss, each.loss * weight) for each in found]
        yield LayerOptions(layer, (Scored(Choice(), *counted(layer, Choice()), 0.0, 0.0), *own))


def timed(
    model: nn.Module,
    problem: Problem,
    passing: Passing,
    example: Any,
    *,
    quick: bool = False,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Problem:
    """``problem`` with the seconds of every option, as they are in a call of the network on ``example``.

    Measured on the device where ``model`` is. Options that could not be measured are left out. Raises Stopped, and
    UsageError where the network or one of its convolutions could not be measured as it is.
    """
    device = device_of(model)
    rules = timing.Rules.for_device(device.type, quick=quick, max_time_s=0.1 if quick else 1.0)
    layers = [options.layer for options in problem.layers]
    choices = {each.layer.name: [one.choice for one in each.options[1:]] for each in problem.layers}
    shared: dict[str, Any] = {"seed": seed, "stop": stop}
    kept = memory_state("kept" if device.type == "cpu" else None)
    with undisturbed(model), kept:
        run = partial(passing, model, example)
        found = dict(layer_times(model, layers, choices, run, device, rules, **shared))
        if stop():
            raise Stopped
        alone = {
            layer.name: {choice: one.median_s * (layer.calls or 1) for choice, one in found[layer.name].items()}
            for layer in layers
        }
        uniform = {choice: _uniform(layers, choices, choice) for choice in _ends(choices)}
        networks = {choice.label: each for choice, each in uniform.items()}
        whole = network_times(model, {"dense": (), **networks}, passing, example, device, rules, **shared)
    if stop():
        raise Stopped
    if "dense" not in whole or not all(Choice() in times for times in alone.values()):
        raise UsageError("the network could not be measured; try a smaller example_input")
    dense_s = whole["dense"].median_s  # by a name of ours
    known = {choice: whole[choice.label].median_s for choice in uniform if choice.label in whole}
    factors = corrections(dense_s, known, alone)
    made = []
    for options in problem.layers:
        seconds = in_network(alone[options.layer.name], factors)
        there = (each for each in options.options if each.choice in seconds)
        own = tuple(dataclasses.replace(each, seconds=seconds[each.choice]) for each in there)
        made.append(LayerOptions(options.layer, own))
    rest = dense_s - sum(options.dense.cost("time") for options in made)
    return dataclasses.replace(problem, layers=tuple(made), rest_s=rest, factors=factors)


def _uniform(layers: Sequence[Replaced], choices: Mapping[str, Sequence[Choice]], choice: Choice) -> list[Replaced]:
    """The layers that it fits, as ``choice``."""
    return [
        replace(layer, variant=choice.variant, groups=choice.groups, rank=choice.rank)
        for layer in layers
        if choice in choices[layer.name]
    ]


def _ends(choices: Mapping[str, Sequence[Choice]]) -> list[Choice]:
    """Of each variant the choices with the fewest and the most groups: their networks say what a saving is worth."""
    by_variant: dict[str, list[Choice]] = {}
    for choice in (each for own in choices.values() for each in own if each.rank is None):
        by_variant.setdefault(choice.variant, []).append(choice)
    ends = [find(found, key=lambda choice: choice.groups) for found in by_variant.values() for find in (min, max)]
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


# ------------------------------------------------------------------------------------------------------------- choice


def choose(
    layers: Sequence[LayerOptions],
    kind: str,
    budget: float,
    *,
    most_variants: int | None = None,
    rest: float = 0.0,
    notes: Sequence[str] = (),
) -> Plan:
    """The best choices for a budget. rest: what the network costs besides its convolutions (of kind 'time').

    Raises UsageError where even the cheapest choices cost more, with what they cost.
    """
    cost_kind = "macs" if kind == "loss" else kind
    whole = rest + sum(options.dense.cost(cost_kind) for options in layers)
    best: knapsack.Solution[Choice] | None = None
    for allowed in _allowed(layers, most_variants):
        tables = _table(layers, cost_kind, allowed)
        if kind == "loss":
            turned = knapsack.best(knapsack.swapped(tables), budget)
            found = None if turned is None else knapsack.Solution(turned.keys, turned.loss, turned.cost)
            if found is not None and (best is None or (found.cost, found.loss) < (best.cost, best.loss)):
                best = found
        else:
            found = knapsack.best(tables, budget * whole - rest)
            if found is not None and (best is None or (found.loss, found.cost) < (best.loss, best.cost)):
                best = found
    everything = _table(layers, cost_kind, None)
    if best is None:
        least = knapsack.cheapest(everything)
        commonest = max(set(least.keys.values()), key=list(least.keys.values()).count)
        raise UsageError(
            f"{kind}={budget:g} cannot be met: the least is {(least.cost + rest) / whole:.3g} "
            f"(mostly {commonest.label}); give more, or try other variants and groups"
        )
    points = tuple(Point((rest + point.cost) / whole, point.loss, point.keys) for point in knapsack.curve(everything))
    return Plan(
        choices={options.layer.name: best.keys[options.layer.name] for options in layers},
        kind=kind,
        asked=budget,
        cost=(rest + best.cost) / whole,
        loss=best.loss,
        layers=tuple(_planned(options, best.keys[options.layer.name], cost_kind) for options in layers),
        curve=points,
        notes=tuple(notes),
    )


def _table(
    layers: Sequence[LayerOptions], kind: str, allowed: Sequence[str] | None
) -> dict[str, list[knapsack.Option[Choice]]]:
    return {
        options.layer.name: [
            knapsack.Option(each.choice, each.cost(kind), each.felt)
            for each in options.options
            if each.choice.is_dense or allowed is None or each.choice.variant in allowed
        ]
        for options in layers
    }


def _allowed(layers: Sequence[LayerOptions], most: int | None) -> list[Sequence[str] | None]:
    """The sets of variants that a plan may be made of; None is all of them."""
    if most is None:
        return [None]
    check_positive("most_variants", most)
    there = list(dict.fromkeys(s.choice.variant for o in layers for s in o.options if not s.choice.is_dense))
    return list(itertools.combinations(there, min(most, len(there))))


def _planned(options: LayerOptions, choice: Choice, kind: str) -> PlannedLayer:
    layer = options.layer
    chosen = next(each for each in options.options if each.choice == choice)
    better = [each for each in options.options if each.felt < chosen.felt and each.cost(kind) > chosen.cost(kind)]
    height, width = layer.kernel
    shape = f"{layer.in_channels} -> {layer.out_channels} {height}x{width}"
    least = min(better, key=lambda each: each.cost(kind), default=None)
    return PlannedLayer(layer.name, shape, options.dense, chosen, least)
