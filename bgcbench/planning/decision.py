"""The choice: the best plan for a budget, the plans that are tried out against one another, and the plan itself."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from os import PathLike
from pathlib import Path
from typing import Any

from bgcbench.errors import UsageError
from bgcbench.planning import FORMAT, read_plan
from bgcbench.planning.choices import SATURATES, LayerOptions, Problem, Scored, best_families
from bgcbench.results import write_atomically
from bgcbench.specs import Choice, check_positive, cost_kind
from bgcbench.theory import knapsack

# What plans are tried out besides the best family of every variant: by what the network feels, by the layers' losses
# alone, and by what the network feels of the losses that the first of these really has.
FELT, PLAIN, AGAIN = "felt", "plain", "again"
FURTHEST = 4.0  # times that a layer's loss in the converted network may differ from what was measured alone


@dataclass(frozen=True)
class PlannedLayer:
    """What becomes of a convolution: ``chosen`` in the place of ``dense``.

    better: the least costly option that loses less, None where there is none; better_cost: what it costs more than
    ``chosen``, as a share of what the network costs.
    """

    name: str
    shape: str
    dense: Scored
    chosen: Scored
    better: Scored | None
    better_cost: float | None = None


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
    plans from the least cost to no loss. notes: what the user should know. tried: of what was tried out (see
    :func:`contenders`) the error of the converted network's outputs, as a share of their variance, on images held out;
    by: which of them the plan is.
    """

    choices: Mapping[str, Choice]
    kind: str = "params"
    asked: float | None = None
    cost: float | None = None
    loss: float | None = None
    layers: tuple[PlannedLayer, ...] = ()
    curve: tuple[Point, ...] = ()
    notes: tuple[str, ...] = ()
    tried: Mapping[str, float] = field(default_factory=dict)
    by: str = FELT

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
        """A plan from its file, from one that holds the choices alone, or from a result file of ``bgcbench plan``.

        Raises ResultFileError.
        """
        choices, budget = read_plan(path)
        return cls(choices, **budget)

    def __str__(self) -> str:
        widest = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:{widest}}  {layer.shape:24}  {layer.chosen.choice.label:10}  "
            f"params {layer.chosen.params / layer.dense.params:5.0%}  loss {layer.chosen.loss:7.2%}"
            for layer in self.layers
        ]
        if self.cost is not None and self.loss is not None:
            lines.append(f"{self.kind}: {self.cost:.3f} of the original's, predicted loss {self.loss:.3g}")
        if self.tried:
            tried = ", ".join(f"{name} {error:.3g}" for name, error in self.tried.items())
            lines.append(f"tried out, error of the outputs: {tried}; taken: {self.by}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- choice


def choose(
    problem: Problem, kind: str, budget: float, *, most_variants: int | None = None, weigh: str = FELT
) -> dict[str, Choice]:
    """The best choices for a budget, by convolution. weigh: by what is lost, 'felt' or 'plain'.

    Raises UsageError where even the cheapest choices cost more, with what they cost.
    """
    layers, of = problem.layers, cost_kind(kind)
    rest, whole = problem.rest(of), problem.whole(of)
    best: knapsack.Solution[Choice] | None = None
    for allowed in _allowed(layers, most_variants):
        tables = _table(layers, of, allowed, weigh)
        if kind == "loss":
            turned = knapsack.best(knapsack.swapped(tables), budget)
            found = None if turned is None else knapsack.Solution(turned.keys, turned.loss, turned.cost)
            if found is not None and (best is None or (found.cost, found.loss) < (best.cost, best.loss)):
                best = found
        else:
            found = knapsack.best(tables, budget * whole - rest)
            if found is not None and (best is None or (found.loss, found.cost) < (best.loss, best.cost)):
                best = found
    if best is None:
        least = knapsack.cheapest(_table(layers, of))
        commonest = max(set(least.keys.values()), key=list(least.keys.values()).count)
        raise UsageError(
            f"{kind}={budget:g} cannot be met: the least is {(least.cost + rest) / whole:.3g} "
            f"(mostly {commonest.label}); give more, or try other variants and groups"
        )
    return best.keys


def planned(problem: Problem, kind: str, budget: float, choices: Mapping[str, Choice], **about: Any) -> Plan:
    """``choices`` as a plan: with what they cost and lose, and the curve of the best ones. about: see :class:`Plan`."""
    of = cost_kind(kind)
    rest, whole = problem.rest(of), problem.whole(of)
    best = knapsack.curve(_table(problem.layers, of))
    return Plan(
        choices={options.layer.name: choices[options.layer.name] for options in problem.layers},
        kind=kind,
        asked=budget,
        cost=problem.share(choices, of),
        loss=problem.felt(choices),
        layers=tuple(_planned(options, choices[options.layer.name], of, whole) for options in problem.layers),
        curve=tuple(Point((rest + point.cost) / whole, point.loss, point.keys) for point in best),
        notes=problem.notes,
        **about,
    )


@dataclass(frozen=True)
class Contender:
    """What may become the plan; label: in words."""

    name: str
    label: str
    choices: Mapping[str, Choice]


def contenders(
    problem: Problem, kind: str, budget: float, *, most_variants: int | None = None, quick: bool = False
) -> list[Contender]:
    """The plans that keep to a budget and are worth trying out, by name; the best ones first.

    quick: the first of them, and of the families the one of the least predicted loss.

    What is predicted is the loss of every layer by itself. In the network a layer makes up for what those before it
    lose, and errors mask one another; so the plan by what the network feels is tried out against the one that weighs
    all layers alike, and against the best family (the same choice everywhere) of every variant.
    """
    made = [Contender(FELT, "by sensitivity", choose(problem, kind, budget, most_variants=most_variants))]
    families = best_families(problem, kind, budget, quick=quick)
    if kind != "loss" and not quick:
        plain = choose(problem, kind, budget, most_variants=most_variants, weigh=PLAIN)
        made.append(Contender(PLAIN, "by the layers' losses", plain))
    return made + [Contender(variant, label, choices) for variant, (label, choices) in families.items()]


def again(problem: Problem, lost: Mapping[str, float], choices: Mapping[str, Choice], error: float) -> Problem:
    """``problem`` with what the network converted by ``choices`` really lost, in the place of what was expected.

    What a layer loses as its choice there (``lost``, by name), over what it was to lose by itself, scales what is felt
    of all its choices, as far as that grows with it; and all layers are scaled so that the ``error`` of that network's
    outputs is what is predicted of it.
    """

    def scaled(problem: Problem, scales: Mapping[str, float]) -> Problem:
        return problem.changed(lambda each, one: replaced(one, felt=one.felt * scales[each.layer.name]))

    scales = {}
    for options in problem.layers:
        name = options.layer.name
        expected, real = options.of(choices[name]).loss, lost.get(name)
        ratio = real / expected if real is not None and expected > 0 else 1.0
        scales[name] = min(FURTHEST, max(1 / FURTHEST, ratio)) ** SATURATES
    by_layer = scaled(problem, scales)
    predicted = by_layer.felt(choices)
    known = 0 < error < math.inf and predicted > 0
    return scaled(by_layer, dict.fromkeys(scales, error / predicted)) if known else by_layer


def taken(kind: str, budget: float, tried: Mapping[str, float], costs: Mapping[str, float]) -> str:
    """Which of those tried is the plan: that of least error; of a budget of loss, the cheapest that keeps to it."""
    keeping = [name for name, error in tried.items() if kind == "loss" and error <= budget]
    return min(keeping, key=lambda name: costs[name]) if keeping else min(tried, key=lambda name: tried[name])


def _table(
    layers: Sequence[LayerOptions], kind: str, allowed: Sequence[str] | None = None, weigh: str = FELT
) -> dict[str, list[knapsack.Option[Choice]]]:
    return {
        options.layer.name: [
            knapsack.Option(each.choice, each.cost(kind), each.felt if weigh == FELT else each.loss)
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


def _planned(options: LayerOptions, choice: Choice, kind: str, whole: float) -> PlannedLayer:
    layer, chosen = options.layer, options.of(choice)
    height, width = layer.kernel
    made = PlannedLayer(
        layer.name, f"{layer.in_channels} -> {layer.out_channels} {height}x{width}", options.dense, chosen, None
    )
    better = [each for each in options.options if each.felt < chosen.felt and each.cost(kind) > chosen.cost(kind)]
    if not better:
        return made
    least = min(better, key=lambda each: each.cost(kind))
    return replaced(made, better=least, better_cost=(least.cost(kind) - chosen.cost(kind)) / whole)
