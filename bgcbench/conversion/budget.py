"""Ranks for a network's low-rank layers under one budget, as data-aware factorisation without training chooses them.

What a layer loses at rank r is known in closed form for every r: the tail sums of its outputs' variances along their
principal axes (the singular values of W, where nothing is known of its inputs). The ranks minimise the sum over the
layers of the share of the output's energy that is lost, under a budget of parameters or MACs, by a Lagrange multiplier
(as BALF does): a layer's curve is convex, so each step of rank is worth what it gains per unit of cost
(:func:`bgcbench.theory.knapsack.greedy`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bgcbench.conversion.layer_moments import patch_length
from bgcbench.errors import UsageError
from bgcbench.results.rows import Replaced
from bgcbench.specs import ConvSpec
from bgcbench.theory.knapsack import Option

COSTS = ("params", "macs")
DENSE = 0  # in the place of a rank: the layer stays


def ranks_of(layer: Replaced, energies: Tensor, cost: str) -> list[Option[int]]:
    """What ``layer`` costs and loses at each rank that saves something, and as it is (DENSE).

    energies: of its output along the principal axes, in any order. Raises UsageError for a budget of MACs where the
    size of the layer's input is not known.
    """
    values = energies.double().clamp_min(0).sort(descending=True).values
    total = float(values.sum())
    held = torch.cat([values.new_zeros(1), values.cumsum(0)])  # by ranks 0, 1, 2, ...
    tails = (1 - held / total if total else torch.zeros_like(held)).clamp_min(0).tolist()
    positions = 1
    if cost == "macs":
        if layer.height is None or layer.width is None:
            raise UsageError("budget_of='macs' needs the sizes of the layers; pass example_input, or use 'params'")
        geometry = layer.kernel, layer.stride, layer.padding, layer.dilation
        spec = ConvSpec("standard", layer.in_channels, layer.out_channels, *geometry)
        positions = math.prod(spec.output_size(layer.height, layer.width)) * (layer.calls or 1)
    columns = patch_length(layer)
    step, dense = columns + layer.out_channels, columns * layer.out_channels
    saving = range(1, min(len(tails) - 1, (dense - 1) // step) + 1)
    return [Option(rank, rank * step * positions, tails[rank]) for rank in saving] + [
        Option(DENSE, dense * positions, 0.0)
    ]


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
