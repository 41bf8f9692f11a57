from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from bgcbench.experiments.approx_run import draw_inputs
from bgcbench.specs import ConvSpec, as_pair, divisors
from bgcbench.theory.exchangeable import axis_coverage, border_factor, coverage, exact_relative_error
from bgcbench.theory.inputs import InputLaw
from tests.theory.explicit import LAWS, moment_of_patches, residual_forms

# (channels, (height, width), the rest of a ConvSpec): rows of values with one to three pixels lost or added at the
# border, images, a rectangular kernel, dilation, and a kernel whose outer rows never meet the image.
GEOMETRIES: list[tuple[int, tuple[int, int], dict[str, Any]]] = [
    (4, (1, 6), {"kernel_size": (1, 3), "padding": (0, 1)}),
    (6, (1, 7), {"kernel_size": (1, 3), "padding": (0, 2)}),
    (6, (1, 5), {"kernel_size": (1, 3)}),
    (4, (1, 7), {"kernel_size": (1, 3), "stride": (1, 2), "padding": (0, 1)}),
    (4, (1, 6), {"kernel_size": (1, 3), "stride": (1, 2)}),
    (5, (1, 6), {"kernel_size": (1, 2)}),
    (4, (1, 7), {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2)}),
    (4, (1, 4), {"kernel_size": 1}),
    (4, (4, 5), {"kernel_size": 3, "padding": 1}),
    (4, (5, 4), {"kernel_size": 3, "stride": 2, "padding": (1, 0)}),
    (4, (4, 5), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2)}),
    (4, (1, 5), {"kernel_size": 3, "padding": 1}),
]


def spec_of(variant: str, channels: int, groups: int, shape: dict[str, Any]) -> ConvSpec:
    return ConvSpec(variant, channels, 2 * channels, groups=groups, bias=False, **shape)


def brute_force(variant: str, channels: int, groups: int, size: tuple[int, int], shape: dict, name: str) -> float:
    """The least error of all rows over E||W||_par^2 E||x||^2 for weights of variance 1, from pseudo-inverses."""
    spec = spec_of(variant, channels, groups, shape)
    kernel, stride, dilation = (as_pair("", getattr(spec, part)) for part in ("kernel_size", "stride", "dilation"))
    moment = moment_of_patches(name, channels, size, kernel, stride, as_pair("", spec.padding, 0), dilation)
    rows = 2 * channels // groups
    error = sum(rows * float(form.trace()) for form in residual_forms(variant, moment, groups))
    mean, variance, _ = LAWS[name]
    weights = 2 * channels * channels * kernel[0] * kernel[1]
    return error / weights / (channels * size[0] * size[1] * (variance + mean**2))


@pytest.mark.parametrize(
    ("geometry", "name"),
    # Half of all pairs: every geometry with half of the laws, every law with half of the geometries.
    [(g, name) for place, g in enumerate(GEOMETRIES) for at, name in enumerate(LAWS) if (place + at) % 2 == 0],
)
def test_the_closed_forms_are_the_least_errors_that_pseudo_inverses_give(geometry: tuple[Any, ...], name: str) -> None:
    channels, size, shape = geometry
    law = InputLaw.parse(name)
    for variant, groups in itertools.product(("gc", "bgc"), divisors(channels)[1:]):
        found = exact_relative_error(spec_of(variant, channels, groups, shape), size, law)
        expected = brute_force(variant, channels, groups, size, shape, name)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-13), (variant, groups)


@pytest.mark.parametrize("name", LAWS)
def test_a_shuffle_of_the_outputs_changes_nothing(name: str) -> None:
    law, shape = InputLaw.parse(name), {"kernel_size": (1, 3), "padding": (0, 1)}
    found = [exact_relative_error(spec_of(v, 8, 4, shape), (1, 6), law) for v in ("gc", "shuffle")]
    assert found[0] == found[1]
    assert found[0] is not None


@pytest.mark.parametrize("variant", ["standard", "gc", "shuffle", "bgc", "tlgc", "lgc", "flgc"])
def test_one_group_loses_nothing(variant: str) -> None:
    spec = spec_of(variant, 8, 1, {"kernel_size": 3, "padding": 1})
    assert exact_relative_error(spec, (4, 4), InputLaw.parse("relu")) == 0.0


@pytest.mark.parametrize("variant", ["tlgc", "lgc", "flgc"])
def test_what_is_no_linear_space_has_no_closed_form(variant: str) -> None:
    spec = spec_of(variant, 8, 4, {"kernel_size": 3, "padding": 1})
    assert exact_relative_error(spec, (4, 4), InputLaw.parse("normal")) is None


@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_on_white_input_groups_keep_one_and_balanced_groups_two_of_n_parts(name: str, groups: int) -> None:
    shape = {"kernel_size": (1, 3), "padding": (0, 1)}
    law, rho = InputLaw.parse(name), border_factor(spec_of("gc", 8, 2, shape), 1, 5) / 8
    for variant, kept in (("gc", 1), ("bgc", 2)):
        found = exact_relative_error(spec_of(variant, 8, groups, shape), (1, 5), law)
        assert found == pytest.approx(rho * (1 - kept / groups), rel=1e-12, abs=1e-15)


def test_only_balanced_groups_are_spared_what_a_mean_or_a_common_factor_costs() -> None:
    shape = {"kernel_size": 3, "padding": 1}
    for name in ("normal:0.7", "relu", "factor:0.4"):
        mean, variance, correlation = LAWS[name]
        own = variance * (1 - correlation) / (variance + mean**2)
        white, law = InputLaw.parse("normal"), InputLaw.parse(name)
        gc, bgc = (
            [exact_relative_error(spec_of(v, 8, 4, shape), (5, 5), it) for it in (law, white)] for v in ("gc", "bgc")
        )
        assert bgc[0] == pytest.approx(own * bgc[1], rel=1e-12)
        assert gc[0] > own * gc[1] * (1 + 1e-3)


def counted(length: int, kernel: int, stride: int, padding: int, dilation: int) -> list[list[int]]:
    """How many windows of an axis have both taps on the input, window by window."""
    found = [[0] * kernel for _ in range(kernel)]
    start = -padding
    while start + dilation * (kernel - 1) <= length - 1 + padding:
        for a, b in itertools.product(range(kernel), repeat=2):
            found[a][b] += all(0 <= start + dilation * tap < length for tap in (a, b))
        start += stride
    return found


@pytest.mark.parametrize(("length", "kernel"), [(7, 3), (6, 2), (5, 1), (8, 4)])
def test_coverage_is_what_counting_windows_gives(length: int, kernel: int) -> None:
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1, 2), (1, 2)):
        found = axis_coverage(length, kernel, stride, padding, dilation)
        assert found.tolist() == counted(length, kernel, stride, padding, dilation)


@pytest.mark.parametrize(
    "shape",
    [
        {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 3)},
        {"kernel_size": 3, "padding": 1},
    ],
)
def test_coverage_of_an_image_counts_the_two_axes_together(shape: dict[str, Any]) -> None:
    spec, (height, width) = ConvSpec("standard", 4, 4, bias=False, **shape), (6, 7)
    sides = [as_pair("", getattr(spec, part), 0) for part in ("kernel_size", "stride", "padding", "dilation")]
    rows, columns = (counted(length, *(side[at] for side in sides)) for at, length in enumerate((height, width)))
    taps = list(itertools.product(range(sides[0][0]), range(sides[0][1])))
    expected = [[rows[a][c] * columns[b][d] for c, d in taps] for a, b in taps]
    both = coverage(spec, height, width)
    assert both.tolist() == expected
    share = sum(expected[i][i] for i in range(len(taps))) / (len(taps) * height * width)
    assert border_factor(spec, height, width) == pytest.approx(share, rel=1e-14)


@pytest.mark.parametrize("length", [3, 5, 32, 100])
def test_three_taps_on_a_padded_row_miss_the_image_twice(length: int) -> None:
    spec = ConvSpec("gc", 12, 12, (1, 3), padding=(0, 1), groups=4)
    assert border_factor(spec, 1, length) == pytest.approx((3 * length - 2) / (3 * length), rel=1e-14)


def test_the_papers_shape_has_the_ceiling_that_its_figure_shows() -> None:
    spec = ConvSpec("gc", 256, 256, (1, 3), padding=(0, 1), groups=4)
    assert border_factor(spec, 1, 32) / 256 == pytest.approx(3.825e-3, rel=5e-5)


def test_without_a_border_every_tap_meets_the_image_at_every_output() -> None:
    for height, width in ((5, 9), (1, 4)):
        assert border_factor(ConvSpec("gc", 4, 4, 1, groups=2), height, width) == 1.0
    assert math.isclose(border_factor(ConvSpec("gc", 4, 4, 1, 2, groups=2), 8, 8), 1 / 4)


@pytest.mark.parametrize("name", LAWS)
def test_the_truth_used_here_is_what_many_drawn_inputs_have(name: str) -> None:
    x = draw_inputs(InputLaw.parse(name), (4000, 4, 1, 6), torch.Generator().manual_seed(3))
    u = torch.nn.functional.unfold(x, (1, 3), padding=(0, 1))
    products = torch.einsum("bid,bjd->bij", u, u)
    difference = products.mean(0) - moment_of_patches(name, 4, (1, 6), (1, 3), padding=(0, 1))
    assert bool((difference.abs() <= 5 * products.std(0) / math.sqrt(4000)).all())
