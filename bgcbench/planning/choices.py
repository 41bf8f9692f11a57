"""What a convolution may become, what that costs and loses, and what is the same choice for all convolutions."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from bgcbench.errors import UsageError
from bgcbench.results.rows import Replaced
from bgcbench.specs import VARIANTS, Choice, cost_kind, rank_of

# Shares of a layer's parameters for which there is no N, and a rank.
SHARES = (Fraction(7, 8), Fraction(6, 8), Fraction(5, 8), Fraction(3, 8))
# What remains of the felt loss f of a layer once the convolutions behind it are solved anew: f^SATURATES, as large as f
# at AT, times MADE_UP to the share of the convolutions that are behind it. Found on random plans (docs/plan.md).
SATURATES, AT, MADE_UP = 0.7, 0.01, 0.2


@dataclass(frozen=True)
class Scored:
    """A choice for a layer, and what it comes to.

    params, macs: of the layer as that, biases apart, one image, all calls. loss: the share of its output's variance
    that is lost; felt: of the variance of the network's outputs, by the network's sensitivity to the layer (see also
    :meth:`Problem.solved_anew`). seconds: of one call of the network, where it was measured.
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

    def of(self, choice: Choice) -> Scored:
        """The option that is this choice."""
        return {each.choice: each for each in self.options}[choice]

    def losing(self, lost: Mapping[Choice, tuple[float, float]]) -> LayerOptions:
        """The same with the loss and the felt loss of every choice; the layer as it is loses nothing."""
        found = []
        for each in self.options:
            loss, felt = lost.get(each.choice, (0.0, 0.0))
            found.append(dataclasses.replace(each, loss=loss, felt=felt))
        return LayerOptions(self.layer, tuple(found))


@dataclass(frozen=True)
class Problem:
    """Every convolution that may be replaced with its options, and what the user should know.

    rest_s: seconds of the network besides these convolutions, where times are measured. factors: of a variant's savings
    alone, what the network saves (see planning.times). untimed: by layer and choice, why it could not be measured; such
    a choice is none of the layer's options.
    """

    layers: tuple[LayerOptions, ...]
    notes: tuple[str, ...] = ()
    rest_s: float = 0.0
    factors: Mapping[str, float] = field(default_factory=dict)
    untimed: Mapping[tuple[str, Choice], str] = field(default_factory=dict)

    def whole(self, kind: str) -> float:
        """What the network costs as it is: its convolutions (params, macs), or all of it (time)."""
        return self.rest(kind) + sum(each.dense.cost(kind) for each in self.layers)

    def share(self, choices: Mapping[str, Choice], kind: str) -> float:
        """What these choices cost, as a share of :meth:`whole`."""
        return (self.rest(kind) + sum(each.cost(kind) for each in self._chosen(choices))) / self.whole(kind)

    def felt(self, choices: Mapping[str, Choice]) -> float:
        """The predicted loss."""
        return sum(each.felt for each in self._chosen(choices))

    def _chosen(self, choices: Mapping[str, Choice]) -> list[Scored]:
        return [each.of(choices[each.layer.name]) for each in self.layers]

    def solved_anew(self) -> Problem:
        """The same with what is expected to remain of felt losses in a conversion that solves what stays, too.

        Large errors are made up for more than small ones, and those of the first layers more than those of the last.
        """
        names = [each.layer.name for each in self.layers]
        left = {name: MADE_UP ** (behind / max(1, len(names) - 1)) for behind, name in enumerate(reversed(names))}
        share = AT ** (1 - SATURATES)
        return self.changed(
            lambda each, one: dataclasses.replace(one, felt=left[each.layer.name] * share * one.felt**SATURATES)
        )

    def saving(self, scale: float) -> Problem:
        """The same where all that is saved of the time is ``scale`` times as much."""

        def scaled(each: LayerOptions, one: Scored) -> Scored:
            dense = each.dense.cost("time")
            return dataclasses.replace(one, seconds=max(0.0, dense - scale * (dense - one.cost("time"))))

        return self.changed(scaled)

    def changed(self, change: Callable[[LayerOptions, Scored], Scored]) -> Problem:
        """The same with every option of every layer changed."""
        layers = (LayerOptions(each.layer, tuple(change(each, one) for one in each.options)) for each in self.layers)
        return dataclasses.replace(self, layers=tuple(layers))

    def rest(self, kind: str) -> float:
        """What it costs besides its convolutions."""
        return self.rest_s if kind == "time" else 0.0


def choices_for(
    layer: Replaced, variants: Sequence[str], groups: Sequence[int], ranks: Sequence[int] = ()
) -> list[Choice]:
    """What a convolution may become besides what it is; what does not fit it is left out.

    Without ``ranks``, low rank also has those at SHARES of the parameters.
    """
    shape = layer.in_channels, layer.out_channels, math.prod(layer.kernel)
    tried = [
        Choice(variant, n) for variant, n in itertools.product(variants, groups) if variant != "standard" and n > 1
    ]
    ranked = [variant for variant in variants if VARIANTS[variant].has_rank]
    between = sorted({int(rank_of(shape[0], shape[1], 1, shape[2]) * share) for share in SHARES} - {0}, reverse=True)
    tried += [Choice(variant, rank=rank) for variant, rank in itertools.product(ranked, ranks or between)]
    return [choice for choice in tried if choice.unfit(*shape) is None]


def families(problem: Problem) -> dict[str, dict[str, Choice]]:
    """Choices for all layers that are the same choice, by its label; a layer that it does not fit stays as it is.

    Low rank is the same with the same rank, or with the same share of every layer's parameters ("LR 6/8").
    """
    alike: dict[str, dict[str, Choice]] = {}
    for options in problem.layers:
        for each in options.options[1:]:
            labels = [each.choice.label]
            if each.choice.rank is not None:
                eighths = math.ceil(8 * each.params / options.dense.params - 1e-9)
                labels.append(f"{VARIANTS[each.choice.variant].label} {eighths}/8")
            for label in labels:
                alike.setdefault(label, {})[options.layer.name] = each.choice
    names = [options.layer.name for options in problem.layers]
    return {label: {name: chosen.get(name, Choice()) for name in names} for label, chosen in alike.items()}


def best_families(
    problem: Problem, kind: str, budget: float, *, quick: bool = False
) -> dict[str, tuple[str, dict[str, Choice]]]:
    """By variant the label and the choices of the family that is predicted to lose least within the budget.

    Of a budget of loss, the one that costs least. Variants of which none keeps to it are left out. quick: only the
    variant of the least predicted loss.
    """
    best: dict[str, tuple[tuple[float, float], str, dict[str, Choice]]] = {}
    for label, choices in families(problem).items():
        variant = next(choice.variant for choice in choices.values() if not choice.is_dense)
        felt = problem.felt(choices)
        share = problem.share(choices, cost_kind(kind))
        if (felt if kind == "loss" else share) > budget * (1 + 1e-9):
            continue
        rank = (share, felt) if kind == "loss" else (felt, share)
        if variant not in best or rank < best[variant][0]:
            best[variant] = rank, label, choices
    found = {variant: (label, choices) for variant, (_, label, choices) in best.items()}
    return dict(sorted(found.items(), key=lambda each: problem.felt(each[1][1]))[:1]) if quick else found
