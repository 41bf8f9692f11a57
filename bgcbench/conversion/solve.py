"""One layer's weights by least squares on what comes to it, against what the original network put out.

What solves a variant for given moments is its own ``project``; here a ridge is chosen and what is lost is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.convs.base import VariantConv2d
from bgcbench.results.rows import CalibratedLayer
from bgcbench.specs import CLOSED_FORM, LINEAR, VARIANTS, ConvSpec
from bgcbench.theory.fits import EXACT
from bgcbench.theory.leastsquares import Fit, Regression, best_ridge, condition_number, shrink_to_white
from bgcbench.theory.moments import RegressionMoments

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the least squares, in units of the mean power of the regressors
SETTLED = 1e-4  # relative gain at which a search in turns ends: far below what other images would change
SEARCH_RIDGE = 1e-2  # of the variants that are no linear space, which take too long to be solved several times
OVERFITTED = 1.5  # times the loss on the images that were fitted, from which on images held out say that they are few
ROWS_A_NUMBER = 10  # positions for each number that an output has; fewer are scarce


@dataclass(frozen=True)
class Solution:
    """What a layer is to hold: ``values`` by parameter name, and ``shift`` (m,), to be added to its output.

    told: what the layer loses and what it was solved from, as shares of the output's energy on the images held out, or
    of its variance where the moments are about the means.
    """

    values: dict[str, Tensor]
    shift: Tensor
    told: CalibratedLayer


@dataclass(frozen=True)
class Losses:
    """What is lost with copied, white and calibrated weights; ridge: of the last, None where white was no worse."""

    copied: float
    white: float
    calibrated: float
    ridge: float | None


def best_of(variant: str, lost: Callable[[str, float], float]) -> Losses:
    """Choose the ridge of ``variant``. lost: what is lost with a projection and a ridge, on the images held out."""
    return Losses(lost("copy", 0.0), *best_calibrated(variant, lost))


def best_calibrated(variant: str, lost: Callable[[str, float], float]) -> tuple[float, float, float | None]:
    """What is lost with white and with calibrated weights, and the ridge of these, as in :class:`Losses`."""
    white = lost("white", 0.0)
    if white <= EXACT:
        return white, white, None
    ridges = RIDGES if variant in CLOSED_FORM else (SEARCH_RIDGE,)
    return white, *best_ridge(ridges, lambda ridge: lost("least_squares", ridge), white)


def is_scarce(variant: str, patch_length: int, groups: int, rows: int) -> bool:
    """Whether ``rows`` positions are fewer than ten for each number that an output of the layer has."""
    return rows < ROWS_A_NUMBER * VARIANTS[variant].unknowns(patch_length // groups, groups)


def overfitted(layers: Sequence[CalibratedLayer]) -> list[str]:
    """A note where calibrated layers lose far more on images held out than on those they were solved for."""
    ratios = [layer.after / layer.fitted for layer in layers if layer.after and layer.fitted and layer.after > EXACT]
    if not ratios or statistics.median(ratios) < OVERFITTED:
        return []
    return [
        f"the images are too few: calibrated layers lose over {OVERFITTED:g} times as much on images held out as on "
        "those they were solved for (median); calibrate on more, or on several views of each"
    ]


def solve_layer(
    name: str,
    layer: VariantConv2d,
    weight: Tensor,
    fit: RegressionMoments,
    held_out: RegressionMoments,
    *,
    centred: bool,
) -> Solution:
    """The best weights of ``layer``, called ``name``, in the place of the dense kernel ``weight`` (m, n, kh, kw).

    fit, held_out: of the layer's input patches and the outputs (without bias) wanted there. The ridge is chosen by what
    is lost on ``held_out``; the weights are then solved for on both, and ``fit`` holds both afterwards.
    """
    weight = weight.detach().to(fit.origin_in)
    means = fit.means if centred else (torch.zeros_like(fit.origin_in), torch.zeros_like(fit.origin_out))
    rows, held_out_rows = fit.positions, held_out.positions
    losses, fitted = _losses(layer, weight, fit.about(*means), (held_out if held_out_rows else fit).about(*means))
    fit.absorb(held_out)
    means = fit.means if centred else means
    if losses.ridge is None:
        values, condition = _projected(layer, weight, "white"), None
    else:
        whole = fit.about(*means)
        values = _projected(layer, weight, "least_squares", whole, losses.ridge)
        condition = _condition(layer, weight, values, whole, losses.ridge)
    dense = _like(layer, weight, values).dense_weight().flatten(1)
    told = CalibratedLayer(
        name=name,
        groups=layer.groups,
        copied=losses.copied,
        before=losses.white,
        after=losses.calibrated,
        fitted=fitted,
        rows=rows,
        held_out_rows=held_out_rows,
        condition=condition,
        ridge=losses.ridge,
        centred=centred,
        scarce=is_scarce(layer.variant, len(fit.origin_in), layer.groups, rows),
    )
    return Solution(values, means[1] - dense @ means[0], told)


def _losses(
    layer: VariantConv2d, weight: Tensor, fitted: Regression, unseen: Regression
) -> tuple[Losses, float | None]:
    """What ``layer`` loses on ``unseen`` with weights solved for on ``fitted``, and with the last of them on these."""

    on_fitted: dict[float, float] = {}

    def lost(projection: str, ridge: float) -> float:
        if unseen.power <= 0:
            return 0.0
        values = _projected(layer, weight, projection, fitted, ridge)
        dense = _like(layer, weight, values).dense_weight()
        if projection == "least_squares" and fitted.power > 0:
            on_fitted[ridge] = fitted.error(dense) / fitted.power
        return unseen.error(dense) / unseen.power

    found = best_of(layer.variant, lost)
    return found, None if found.ridge is None else on_fitted.get(found.ridge)


def _projected(
    layer: VariantConv2d, weight: Tensor, projection: str, regression: Regression | None = None, ridge: float = 0.0
) -> dict[str, Tensor]:
    fit = None
    if projection == "least_squares" and regression is not None:
        fit = Fit(regression.moment, regression.cross, ridge, SETTLED)
    return dict(layer.project(weight, projection, fit))


@torch.no_grad()
def _like(layer: VariantConv2d, weight: Tensor, values: dict[str, Tensor]) -> VariantConv2d:
    """A layer of the same variant with these values, in float64 and without a bias."""
    m, n, *kernel = weight.shape
    spec = ConvSpec(layer.variant, n, m, (kernel[0], kernel[1]), groups=layer.groups, bias=False, rank=layer.spec.rank)
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        made = layer.of(spec, device=weight.device, dtype=weight.dtype)
    made.load_projected(values)
    return made


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
