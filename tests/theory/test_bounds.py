from __future__ import annotations

import pytest

from bgcbench.theory.bounds import SCALING_POWER, bounds
from bgcbench.theory.inputs import InputLaw

WHITE = InputLaw.parse("normal")


def from_the_proof(variant: str, groups: int, taps: int, channels: int) -> tuple[float, float]:
    """C (1 - 1/N)^2 as in (3.10): C = K, or K / (n - n/N) where weights are independent with zero mean.

    For BGC, E||x - xbar||^2 = E||x||^2 - N E||xbar||^2 of zero-mean inputs stands in the place of E||x||^2.
    """
    constants = taps, taps / (channels - channels / groups)
    rest = 1 - groups / groups**2 if variant == "bgc" else 1.0
    general, zero_mean = (c * (1 - 1 / groups) ** 2 * rest for c in constants)
    return general, zero_mean


@pytest.mark.parametrize("variant", ["gc", "bgc"])
@pytest.mark.parametrize("groups", [2, 3, 4, 8, 64])
@pytest.mark.parametrize(("taps", "channels"), [(3, 192), (9, 192), (1, 384)])
def test_the_bounds_are_what_the_proofs_arrive_at(variant: str, groups: int, taps: int, channels: int) -> None:
    found = bounds(variant, groups, taps, channels, WHITE)
    assert [bound.value for bound in found] == pytest.approx(from_the_proof(variant, groups, taps, channels), rel=1e-14)
    assert [bound.reason for bound in found] == [None, None]


@pytest.mark.parametrize(
    ("variant", "expected"), [("gc", (3 * 9 / 16, 9 / 1024)), ("bgc", (3 * 27 / 64, 27 / 4096))]
)  # fmt: skip
def test_the_papers_shape_at_four_groups(variant: str, expected: tuple[float, float]) -> None:
    general, zero_mean = bounds(variant, 4, 3, 256, WHITE)
    assert (general.value, zero_mean.value) == pytest.approx(expected, rel=1e-14)


def test_divided_by_its_power_the_zero_mean_bound_is_the_constant_that_the_paper_names() -> None:
    for variant, power in SCALING_POWER.items():
        if variant != "shuffle":
            _, zero_mean = bounds(variant, 16, 3, 256, WHITE)
            assert zero_mean.value is not None
            assert zero_mean.value / (1 - 1 / 16) ** power == pytest.approx(11.72e-3, rel=1e-3)
    assert SCALING_POWER == {"gc": 1, "shuffle": 1, "bgc": 2}


@pytest.mark.parametrize("name", ["normal", "uniform", "relu", "normal:0.7", "factor:0"])
def test_every_law_with_independent_channels_has_the_same_bounds(name: str) -> None:
    assert bounds("bgc", 4, 3, 8, InputLaw.parse(name)) == bounds("bgc", 4, 3, 8, WHITE)


@pytest.mark.parametrize("variant", ["gc", "bgc"])
def test_where_channels_are_dependent_there_is_none_and_the_assumption_is_named(variant: str) -> None:
    for bound in bounds(variant, 4, 3, 8, InputLaw.parse("factor:0.4")):
        assert bound.value is None
        assert "3.1 (ii)" in str(bound.reason)
        assert "'factor:0.4'" in str(bound.reason)


@pytest.mark.parametrize("variant", ["standard", "gc", "bgc"])
def test_one_group_loses_nothing_whatever_the_input(variant: str) -> None:
    for name in ("normal", "factor:0.4"):
        assert [bound.value for bound in bounds(variant, 1, 3, 8, InputLaw.parse(name))] == [0.0, 0.0]


@pytest.mark.parametrize("variant", ["shuffle", "lgc", "flgc", "tlgc"])
def test_the_paper_bounds_no_other_variant(variant: str) -> None:
    for bound in bounds(variant, 4, 3, 8, WHITE):
        assert (bound.value, bound.reason) == (None, f"the paper has no bound for {variant}")
