"""The paper's lemmas and theorems, on what the package computes them from: moments, residual forms and whole runs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bgcbench.experiments.approx import ApproxConfig, plan
from bgcbench.experiments.approx_run import ApproxRun, draw_inputs, open_session
from bgcbench.results.rows import SampledRow
from bgcbench.specs import ConvSpec
from bgcbench.theory.bounds import bounds
from bgcbench.theory.exchangeable import border_factor
from bgcbench.theory.inputs import InputLaw
from bgcbench.theory.moments import PatchMoments
from bgcbench.theory.residual import centred, explained, inner_product, outside
from tests.theory.explicit import LAWS

INDEPENDENT = [name for name in LAWS if not name.startswith("factor")]
SHAPES: list[dict[str, Any]] = [
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"kernel_size": (1, 2)},
    {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1)},
    {"kernel_size": (3, 3), "padding": (1, 1)},
    {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1)},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (1, 1)},
]


def convolve(x: Tensor, weight: Tensor, shape: dict[str, Any]) -> Tensor:
    return F.conv2d(x, weight, stride=shape.get("stride", 1), padding=shape.get("padding", 0))


def energy_through_moments(x: Tensor, weight: Tensor, shape: dict[str, Any]) -> float:
    """sum over the inputs of ||Wx||^2, as the package computes it: <M, G>."""
    moments = PatchMoments(x.shape[1], **shape)
    moments.add(x)
    rows = weight.flatten(1)
    return inner_product(moments.total, rows.T @ rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_lemma_3_3_no_convolution_enlarges_an_input_by_more_than_the_root_of_k(shape: dict[str, Any]) -> None:
    taps = math.prod(shape["kernel_size"])
    for seed, (n, m) in itertools.product(range(10), ((1, 1), (3, 2), (4, 8))):
        torch.manual_seed(seed)
        x = torch.randn(1, n, 1 if shape["kernel_size"][0] == 1 else 6, 6, dtype=torch.float64) + seed % 3
        weight = torch.randn(m, n, *shape["kernel_size"], dtype=torch.float64) + seed % 2
        energy = float(convolve(x, weight, shape).square().sum())
        assert energy <= taps * float(weight.square().sum()) * float(x.square().sum()) * (1 + 1e-14)
        assert energy_through_moments(x, weight, shape) == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize("length", [4, 40, 4000])
@pytest.mark.parametrize("channels", [1, 3])
def test_lemma_3_3_is_attained_in_the_interior_of_a_constant_input(length: int, channels: int) -> None:
    # Equal taps on a constant row: every output is K w x, and K - 1 of the L windows do not fit.
    shape: dict[str, Any] = {"kernel_size": (1, 3)}
    x = torch.full((1, channels, 1, length), 2.0, dtype=torch.float64)
    weight = torch.full((2, channels, 1, 3), 0.5, dtype=torch.float64)
    bound = 3 * float(weight.square().sum()) * float(x.square().sum())
    assert energy_through_moments(x, weight, shape) / bound == pytest.approx(1 - 2 / length, rel=1e-12)


def test_lemma_3_3_is_an_equality_for_one_tap() -> None:
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    weight = torch.randn(4, 1, 1, 1, dtype=torch.float64)
    bound = float(weight.square().sum()) * float(x.square().sum())
    assert energy_through_moments(x, weight, {"kernel_size": (1, 1)}) == pytest.approx(bound, rel=1e-13)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]])
def test_lemma_3_4_holds_and_its_sharp_constant_is_the_borders_share_of_one_nth(
    shape: dict[str, Any], name: str
) -> None:
    # The sharp constant needs zero-mean weights alone: neither whiteness nor independence of the channels.
    n, m, size = 6, 4, (1 if shape["kernel_size"][0] == 1 else 5, 5)
    taps, samples = math.prod(shape["kernel_size"]), 4000
    x = draw_inputs(InputLaw.parse(name), (samples, n, *size), torch.Generator().manual_seed(0))
    weight = torch.randn(samples, m, n, *shape["kernel_size"], dtype=torch.float64)
    # One convolution an input, side by side as the groups of one large convolution.
    y = F.conv2d(x.reshape(1, -1, *size), weight.flatten(0, 1), groups=samples, stride=shape.get("stride", 1),
                 padding=shape["padding"])  # fmt: skip
    energy = y.reshape(samples, -1).square().sum(1)
    mean, variance, _ = LAWS[name]
    scale = (m * n * taps) * (n * size[0] * size[1] * (variance + mean**2))  # E||W||^2 E||x||^2
    found, error = float(energy.mean()) / scale, float(energy.std()) / scale / math.sqrt(samples)
    sharp = border_factor(ConvSpec("gc", n, m, **shape), *size) / n
    assert abs(found - sharp) < 5 * error
    assert error < 0.02 * sharp  # or the line above would say nothing
    assert sharp <= taps / n
    assert found + 5 * error < taps / n


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("name", LAWS)
def test_identity_3_13_and_the_energy_about_the_mean(name: str, groups: int) -> None:
    n, positions, samples = 8, 4, 20000
    x = draw_inputs(InputLaw.parse(name), (samples, n, 1, positions), torch.Generator().manual_seed(1))
    moments = PatchMoments(n, (1, 1))
    moments.add(x)
    whole = float(moments.total.trace()) / samples
    mean = x.unflatten(1, (groups, -1)).mean(1)
    of_mean = mean.square().sum((1, 2, 3))
    found, error = float(of_mean.mean()), float(of_mean.std()) / math.sqrt(samples)
    law = InputLaw.parse(name)
    expected = n * positions * (law.variance + law.mean**2)  # E||x||^2
    of_first = n // groups * positions * law.mean**2  # ||E x^1||^2
    identity = expected / groups**2 + (groups - 1) / groups * of_first
    if law.independent:
        assert abs(found - identity) < 5 * error
    else:  # a common factor adds to the mean's energy: the identity fails, the inequality does not
        assert found > identity + 5 * error
    assert found + 5 * error > expected / groups**2
    # ||x - xbar||^2 = ||x||^2 - N ||xbar||^2, sample by sample, is the trace of the centred moment.
    centred_energy = float(centred(moments.total, groups).trace()) / samples
    assert centred_energy == pytest.approx(whole - groups * found, rel=1e-10, abs=1e-10 * whole)
    assert centred_energy <= (1 - 1 / groups) * whole + 5 * groups * error


@pytest.fixture(scope="module")
def measured() -> list[SampledRow]:
    """Least errors of small convolutions on every law, in one dimension and two."""
    rows: list[SampledRow] = []
    for shape in ({"length": 10, "stride": 1, "dims": 1}, {"length": 5, "stride": 2, "dims": 2}):
        config = ApproxConfig(in_channels=8, out_channels=8, groups=(1, 2, 4, 8), inputs=tuple(LAWS), samples=100,
                              variants=("gc", "bgc", "shuffle", "tlgc"), device="cpu", search_samples=1,
                              **shape)  # fmt: skip
        run = ApproxRun(config, open_session(config), plan(config))
        for _ in run.run():
            pass
        rows += run.results
    return rows


def test_theorems_3_5_and_3_6_hold_for_what_was_measured(measured: list[SampledRow]) -> None:
    checked = 0
    for row in measured:
        params, tolerance = row.params, 1e-12
        if params.variant not in ("gc", "bgc") or params.input.startswith("factor"):
            continue
        taps = 3**params.dims
        missed, power = 1 - 1 / params.groups, {"gc": 1, "bgc": 2}[params.variant]
        assert row.bound_general == pytest.approx(taps * missed ** (power + 1), rel=1e-12)
        assert row.bound_zero_mean == pytest.approx(taps / 8 * missed**power, rel=1e-12)
        assert row.relative_error <= row.bound_zero_mean <= row.bound_general
        # The proofs bound what they construct, which can only be worse than the least error.
        assert row.relative_error <= row.construction_relative_error + tolerance
        assert row.construction_relative_error <= row.bound_zero_mean
        checked += 1
    assert checked == 2 * len(INDEPENDENT) * 2 * 3


def test_there_are_no_bounds_where_independence_fails_or_the_paper_has_none(measured: list[SampledRow]) -> None:
    for row in measured:
        params = row.params
        unbounded = params.variant in ("shuffle", "tlgc") or params.input.startswith("factor")
        for name in ("bound_general", "bound_zero_mean"):
            if params.groups == 1:
                assert getattr(row, name) == 0.0
            else:
                assert (getattr(row, name) is None) == unbounded
                assert (name in row.null_reasons) == unbounded


def test_without_independent_channels_theorem_3_6_would_be_off_by_what_they_share(measured: list[SampledRow]) -> None:
    # All channels equal: nothing is lost, while on independent ones the construction is bounded and not exact.
    for row in measured:
        if row.params.groups > 1 and row.params.variant == "bgc":
            exact = row.params.input == "factor:1"
            assert (row.construction_relative_error < 1e-12) == exact


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("groups", [2, 4])
def test_the_general_bounds_hold_for_weights_with_a_mean(name: str, groups: int) -> None:
    # Assumption 3.1 alone: identically distributed weights, here all of one convolution's alike up to noise.
    n, m, shape = 8, 8, {"kernel_size": (1, 3), "padding": (0, 1)}
    law = InputLaw.parse(name)
    x = draw_inputs(law, (400, n, 1, 8), torch.Generator().manual_seed(2))
    moments = PatchMoments(n, **shape)
    moments.add(x)
    moment, energy = moments.total / 400, float(x.square().sum()) / 400
    weight = 1 + 0.1 * torch.randn(m, n * 3, dtype=torch.float64)
    for variant, form in (("gc", moment), ("bgc", centred(moment, groups))):
        least = built = 0.0
        for group, rows in enumerate(weight.chunk(groups)):
            factor = explained(moment, group, groups, with_mean=variant == "bgc").factor
            least += inner_product(moment - factor.T @ factor, rows.T @ rows)
            built += outside(form, rows.T @ rows, group, groups)
        general, _ = bounds(variant, groups, 3, n, law)
        assert general.value is not None
        scale = float(weight.square().sum()) * energy
        assert least <= built * (1 + 1e-12)
        assert built <= general.value * scale
