"""Ranks for a network's low-rank layers under one budget, as data-aware factorisation without training chooses them.

What a layer loses at rank r is known in closed form for every r: the tail sums of its outputs' variances along their
principal axes (the singular values of W, where nothing is known of its inputs). The ranks minimise the sum over the
layers of the share of the output's energy that is lost, under a budget of parameters or MACs, by a Lagrange multiplier
(as BALF does): a layer's curve is convex, so each step of rank is worth what it gains per unit of cost.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.conversion.layer_moments import patch_length
from bgcbench.errors import UsageError
from bgcbench.results.rows import Replaced
from bgcbench.specs import ConvSpec

COSTS = ("params", "macs")
DENSE = 0  # in the place of a rank: the layer stays


@dataclass(frozen=True)
class Curve:
    """What a layer costs and loses at each rank.

    tails: shares of the output's energy lost at ranks 0, 1, 2, ...; step: cost of one rank; dense: cost of the layer as
    it is, at which nothing is lost.
    """

    tails: Sequence[float]
    step: int
    dense: int

    def lost(self, rank: int) -> float:
        return 0.0 if rank == DENSE else self.tails[rank]

    def cost(self, rank: int) -> int:
        return self.dense if rank == DENSE else rank * self.step

    @property
    def hull(self) -> list[int]:
        """Ranks on the lower convex hull of (cost, loss), from the cheapest to the dense layer."""
        most = min(len(self.tails) - 1, (self.dense - 1) // self.step)  # ranks above that save nothing
        kept: list[int] = []
        for rank in (*range(1, most + 1), DENSE):
            while len(kept) > 1 and self.gain(kept[-2], kept[-1]) < self.gain(kept[-1], rank):
                kept.pop()
            kept.append(rank)
        return kept

    def gain(self, rank: int, other: int) -> float:
        """How much less is lost for each unit that ``other`` costs more."""
        return (self.lost(rank) - self.lost(other)) / (self.cost(other) - self.cost(rank))


def curve_of(layer: Replaced, energies: Tensor, cost: str) -> Curve:
    """The curve of ``layer`` whose output has ``energies`` (any order) along its principal axes.

    Raises UsageError for a budget of MACs where the size of the layer's input is not known.
    """
    values = energies.double().clamp_min(0).sort(descending=True).values
    total = float(values.sum())
    held = torch.cat([values.new_zeros(1), values.cumsum(0)])  # by ranks 0, 1, 2, ...
    tails = 1 - held / total if total else torch.zeros_like(held)
    positions = 1
    if cost == "macs":
        if layer.height is None or layer.width is None:
            raise UsageError("budget_of='macs' needs the sizes of the layers; pass example_input, or use 'params'")
        geometry = layer.kernel, layer.stride, layer.padding, layer.dilation
        spec = ConvSpec("standard", layer.in_channels, layer.out_channels, *geometry)
        positions = math.prod(spec.output_size(layer.height, layer.width)) * (layer.calls or 1)
    columns = patch_length(layer)
    step, dense = columns + layer.out_channels, columns * layer.out_channels
    return Curve(tails.clamp_min(0).tolist(), step * positions, dense * positions)


def principal_energies(parts: Sequence[Tensor]) -> Tensor:
    """Eigenvalues of sum_i Y_i Y_i^T for ``parts`` Y_i (m, any): W (m, nK) alone, or outputs at many positions.

    Their tail sums are what the best map of a given rank loses (Eckart & Young, 1936).
    """
    doubles = [part.double() for part in parts]
    gram = torch.stack([part @ part.T for part in doubles]).sum(0)
    energies: Tensor = torch.linalg.eigvalsh(gram)
    return energies


def centred(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs (m, positions) about their mean, which a bias or the norm that follows makes up for."""
    count = sum(part.shape[1] for part in outputs)
    mean = torch.stack([part.double().sum(1) for part in outputs]).sum(0) / max(count, 1)
    return [part - mean[:, None].to(part) for part in outputs]


def spread(curves: Mapping[str, Curve], budget: float) -> dict[str, int]:
    """Each layer's rank, or DENSE, such that all together cost at most ``budget`` times what they do as they are.

    From rank 1 everywhere the step that gains most per unit of cost is taken as long as there is room: the Lagrangian's
    solution, and what is left filled up. Raises UsageError for a budget that rank 1 everywhere exceeds.
    """
    room = budget * sum(curve.dense for curve in curves.values())
    ranks = {name: curve.hull[0] for name, curve in curves.items()}
    room -= sum(curves[name].cost(rank) for name, rank in ranks.items())
    if room < 0:
        least = budget - room / sum(curve.dense for curve in curves.values())
        raise UsageError(f"budget={budget:g} cannot be met: rank 1 in every layer costs {least:.3g}; give more")
    # Gains fall along a hull, so a layer's next step is never worth more than the one before.
    steps: list[tuple[float, str, int, int]] = []
    for name, curve in curves.items():
        steps += [(-curve.gain(a, b), name, a, b) for a, b in itertools.pairwise(curve.hull)]
    heapq.heapify(steps)
    full: set[str] = set()
    while steps:
        _, name, before, after = heapq.heappop(steps)
        curve = curves[name]
        price = curve.cost(after) - curve.cost(before)
        if name in full:
            continue
        if price > room:  # what still fits of a long step, over ranks that the hull leaves out
            full.add(name)
            more = int(room // curve.step)
            if after == DENSE and more:
                ranks[name] += more
                room -= more * curve.step
            continue
        ranks[name] = after
        room -= price
    return ranks
