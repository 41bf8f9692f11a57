"""What low rank loses of a kernel of independent entries: the limit, held against sampling and a quadrature."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bgcbench.errors import ShapeError
from bgcbench.specs import ConvSpec
from bgcbench.theory.inputs import InputLaw
from bgcbench.theory.lowrank import limit_relative_error, marchenko_pastur_tail

SHAPES = [(48, 48), (32, 128), (288, 32)]  # square, 1:4, 9:1


def sampled_tail(rows: int, columns: int, rank: int, samples: int, generator: torch.Generator) -> tuple[float, float]:
    """Mean of sum_{i > r} sigma_i^2 / (m p) over so many standard normal W (m, p), and its standard error."""
    drawn = torch.randn(samples, rows, columns, generator=generator, dtype=torch.float64)
    tails = torch.linalg.svdvals(drawn)[:, rank:].square().sum(1) / (rows * columns)
    return float(tails.mean()), float(tails.std()) / math.sqrt(samples)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.8])
def test_the_limit_is_what_random_kernels_lose(rows: int, columns: int, share: float) -> None:
    few = min(rows, columns)
    rank = round(share * few)
    mean, se = sampled_tail(rows, columns, rank, 60, torch.Generator().manual_seed(1))
    assert 0 < se < 0.01
    assert abs(marchenko_pastur_tail(rows, columns, rank) - mean) < 3 * se + 0.25 / few


def test_the_distance_from_the_limit_falls_with_the_size() -> None:
    generator = torch.Generator().manual_seed(1)
    apart = [abs(sampled_tail(a, a, a // 4, 200, generator)[0] - marchenko_pastur_tail(a, a, a // 4)) for a in (8, 64)]
    assert apart[1] < apart[0] / 3


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (2, 200_000), (3, 4)])
def test_the_integrals_are_those_of_the_density(rows: int, columns: int) -> None:
    """Midpoint rule over the eigenvalues' own density, from the largest down."""
    few, y = min(rows, columns), min(rows, columns) / max(rows, columns)
    low, high, steps = (1 - math.sqrt(y)) ** 2, (1 + math.sqrt(y)) ** 2, 400_000
    x = high - (torch.arange(steps, dtype=torch.float64) + 0.5) * ((high - low) / steps)
    energy = ((high - x) * (x - low)).sqrt() / (2 * math.pi * y) * ((high - low) / steps)  # x f(x) dx
    counted, lost = (energy / x).cumsum(0), 1 - energy.cumsum(0)
    for rank in {1, few // 2, few - 1}:
        at = int(torch.searchsorted(counted, rank / few))
        assert marchenko_pastur_tail(rows, columns, rank) == pytest.approx(
            float(lost[at]), abs=2e-3 if y == 1 else 1e-4
        )


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_it_falls_from_all_to_nothing_and_does_not_know_rows_from_columns(rows: int, columns: int) -> None:
    few = min(rows, columns)
    tails = [marchenko_pastur_tail(rows, columns, rank) for rank in range(few + 1)]
    assert (tails[0], tails[-1]) == (pytest.approx(1, abs=1e-12), 0)
    assert all(one > other for one, other in itertools.pairwise(tails))
    assert tails == [marchenko_pastur_tail(columns, rows, rank) for rank in range(few + 1)]
    assert all(tail < 1 - rank / few for rank, tail in enumerate(tails[1:-1], 1))  # the largest go first
    assert marchenko_pastur_tail(rows, columns, few + 1) == 0


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ShapeError, match="rank=-1"):
        marchenko_pastur_tail(4, 4, -1)
    with pytest.raises(ShapeError, match="rows and columns=0"):
        marchenko_pastur_tail(4, 0, 1)


def test_a_layer_has_the_limit_on_white_input_only_and_taps_in_the_padding_do_not_count() -> None:
    white, size = InputLaw.parse("uniform"), (6, 6)
    pointwise = ConvSpec("lowrank", 8, 12, 1, rank=3)
    assert limit_relative_error(pointwise, size, white) == pytest.approx(marchenko_pastur_tail(12, 8, 3) / 8, rel=1e-12)
    assert limit_relative_error(ConvSpec("lowrank", 8, 8, 3, groups=2), size, white) is not None
    for spec, law in (
        (pointwise, "relu"),
        (ConvSpec("gc", 8, 12, 1, groups=2), "normal"),
        (ConvSpec("lowrank", 8, 8, 1), "normal"),
    ):
        assert limit_relative_error(spec, size, InputLaw.parse(law)) is None
    one = ConvSpec("lowrank", 8, 12, 3, padding=1, rank=3)  # on one pixel only the middle tap meets the input
    assert limit_relative_error(one, (1, 1), white) == pytest.approx(marchenko_pastur_tail(12, 8, 3) / 72, rel=1e-12)
