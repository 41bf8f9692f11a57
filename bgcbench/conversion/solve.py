"""One layer's weights by least squares on what comes to it, against what the original network put out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.convs.base import VariantConv2d
from bgcbench.specs import LINEAR
from bgcbench.theory.fits import EXACT
from bgcbench.theory.leastsquares import Fit, Regression, best_ridge, condition_number, shrink_to_white
from bgcbench.theory.moments import RegressionMoments

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the least squares, in units of the mean power of the regressors
SETTLED = 1e-4  # relative gain at which a search in turns ends: far below what other images would change
SEARCH_RIDGE = 1e-2  # of the variants that are no linear space, which take too long to be solved several times
ROWS_A_NUMBER = 10  # positions for each number that an output has; fewer are called scarce


@dataclass(frozen=True)
class Solution:
    """What a layer is to hold: ``values`` by parameter name, and ``shift`` (m,), to be added to its output.

    copied, before, after: the share of the output's energy (of its variance where ``centred``) that is lost on the
    images held out, with copied weights, with the white optimum, and with these. ridge: their pull towards white, None
    where the white optimum was better and is taken. condition: of the matrix that was solved with, of the worst group,
    None where none was.
    """

    values: dict[str, Tensor]
    shift: Tensor
    copied: float
    before: float
    after: float
    rows: int
    held_out_rows: int
    condition: float | None
    ridge: float | None
    centred: bool
    scarce: bool


def solve_layer(
    layer: VariantConv2d, weight: Tensor, fit: RegressionMoments, held_out: RegressionMoments, *, centred: bool
) -> Solution:
    """The best weights of ``layer`` in the place of the dense kernel ``weight`` (m, n, kh, kw).

    fit, held_out: of the layer's input patches and the outputs (without bias) wanted there. The ridge is chosen by what
    is lost on ``held_out``; the weights are then solved for on both, and ``fit`` holds both afterwards.
    """
    weight = weight.detach().to(fit.origin_in)
    means = fit.means if centred else (torch.zeros_like(fit.origin_in), torch.zeros_like(fit.origin_out))
    rows, held_out_rows = fit.positions, held_out.positions
    judged = (held_out if held_out_rows else fit).about(*means)
    copied, before, after, ridge = _judged(layer, weight, fit.about(*means), judged)
    del judged  # it may be large
    fit.absorb(held_out)
    means = fit.means if centred else means
    values, condition = _projected(layer, weight, "white"), None
    if ridge is not None:
        whole = fit.about(*means)
        values = _projected(layer, weight, "least_squares", _fit(whole, ridge))
        condition = _condition(layer, weight, values, whole, ridge)
    dense = _dense(layer, weight, values).flatten(1)
    numbers = (2 if layer.variant == "bgc" else 1) * len(fit.origin_in) // layer.groups
    return Solution(
        values,
        means[1] - dense @ means[0],
        copied=copied,
        before=before,
        after=after,
        rows=rows,
        held_out_rows=held_out_rows,
        condition=condition,
        ridge=ridge,
        centred=centred,
        scarce=rows < ROWS_A_NUMBER * numbers,
    )


def _judged(
    layer: VariantConv2d, weight: Tensor, fitted: Regression, judged: Regression
) -> tuple[float, float, float, float | None]:
    """What is lost with copied, white and calibrated weights, and the ridge of these (None: white is the best)."""

    def lost(projection: str, fit: Fit | None = None) -> float:
        if judged.power <= 0:
            return 0.0
        return judged.error(_dense(layer, weight, _projected(layer, weight, projection, fit))) / judged.power

    copied, before = lost("copy"), lost("white")
    if before <= EXACT:
        return copied, before, before, None
    ridges = RIDGES if layer.variant in LINEAR else (SEARCH_RIDGE,)
    return copied, before, *best_ridge(ridges, lambda ridge: lost("least_squares", _fit(fitted, ridge)), before)


def _fit(regression: Regression, ridge: float) -> Fit:
    return Fit(regression.moment, regression.cross, ridge, SETTLED)


def _projected(layer: VariantConv2d, weight: Tensor, projection: str, fit: Fit | None = None) -> dict[str, Tensor]:
    return dict(layer.project(weight, layer.groups, projection, fit))


def _like(layer: VariantConv2d, weight: Tensor, values: dict[str, Tensor]) -> VariantConv2d:
    """A layer of the same variant with these values, in float64 and without a bias."""
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        made = type(layer)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            groups=layer.groups,
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )
    made.load_projected(values)
    return made


@torch.no_grad()
def _dense(layer: VariantConv2d, weight: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The dense kernel (m, n, kh, kw) that the layer would stand for with these values."""
    return _like(layer, weight, values).dense_weight()


@torch.no_grad()
def _condition(
    layer: VariantConv2d, weight: Tensor, values: dict[str, Tensor], whole: Regression, ridge: float
) -> float | None:
    """Of the matrix with its ridge that was solved with, of the worst group; None where it is singular."""
    linear = layer.variant in LINEAR
    moment = whole.moment if linear else shrink_to_white(whole.moment, ridge)
    worst = 0.0
    for matrix in _like(layer, weight, values).normal_matrices(moment):
        worst = max(worst, condition_number(shrink_to_white(matrix, ridge) if linear else matrix))
    return worst if math.isfinite(worst) else None
