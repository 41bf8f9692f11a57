from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from bgcbench.errors import UsageError
from bgcbench.experiments.approx_run import draw_inputs
from bgcbench.theory.inputs import NAMES, InputLaw
from tests.theory.explicit import LAWS


@pytest.mark.parametrize("name", LAWS)
def test_a_law_knows_its_mean_variance_and_correlation(name: str) -> None:
    law = InputLaw.parse(name)
    assert (law.mean, law.variance, law.correlation) == pytest.approx(LAWS[name], rel=1e-15)
    assert law.independent == (name not in ("factor:0.4", "factor:1"))


def test_the_numbers_of_the_rectified_normal_and_the_uniform_law_are_their_integrals() -> None:
    for name, density, span in (
        ("relu", stats.norm.pdf, (0, 20)),
        ("uniform", stats.uniform(-1, 2).pdf, (-1, 1)),
    ):
        first, second = (integrate.quad(lambda t, p=power, f=density: t**p * f(t), *span)[0] for power in (1, 2))
        law = InputLaw.parse(name)
        assert law.mean == pytest.approx(first, abs=1e-12)
        assert law.variance == pytest.approx(second - first**2, rel=1e-10)


@pytest.mark.parametrize("name", LAWS)
def test_what_is_drawn_follows_the_law(name: str) -> None:
    mean, variance, correlation = LAWS[name]
    images, channels, height, width = 4000, 3, 2, 8
    x = draw_inputs(InputLaw.parse(name), (images, channels, height, width), torch.Generator().manual_seed(1))
    assert x.shape == (images, channels, height, width)
    assert x.dtype == torch.float64
    values = x.transpose(0, 1).flatten(1)  # one row a channel
    seen = torch.cov(values)
    sure = 5 / math.sqrt(values.shape[1])  # five standard errors of a unit's mean; of squares no more than twice that
    assert values.mean(1).tolist() == pytest.approx([mean] * channels, abs=sure)
    assert seen.diagonal().tolist() == pytest.approx([variance] * channels, rel=2 * sure)
    off = [float(seen[i, j] / variance) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert off == pytest.approx([correlation] * 3, abs=2 * sure)
    # Neighbours along either axis, in one channel and across two, have nothing in common.
    for first, second in ((x[..., :-1], x[..., 1:]), (x[..., :-1, :], x[..., 1:, :])):
        for other in (second, second.roll(1, dims=1)):
            both = torch.stack([first.flatten(), other.flatten()])
            assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(0.0, abs=2 * sure)


@pytest.mark.parametrize(
    ("name", "cdf"),
    [
        ("normal", stats.norm.cdf),
        ("uniform", stats.uniform(-1, 2).cdf),
        ("normal:0.7", stats.norm(0.7, 1).cdf),
        ("factor:0.4", stats.norm.cdf),
    ],
)
def test_the_values_have_the_distribution_that_the_law_is_named_after(name: str, cdf) -> None:
    x = draw_inputs(InputLaw.parse(name), (20000, 1, 1, 1), torch.Generator().manual_seed(2))
    assert stats.kstest(x.flatten().numpy(), cdf).pvalue > 1e-3


def test_relu_is_the_rectified_standard_normal() -> None:
    x = draw_inputs(InputLaw.parse("relu"), (20000, 1, 1, 1), torch.Generator().manual_seed(2)).flatten()
    assert float((x == 0).double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(20000))
    assert stats.kstest(x[x > 0].numpy(), stats.halfnorm.cdf).pvalue > 1e-3


def test_a_common_factor_of_share_one_makes_all_channels_equal() -> None:
    x = draw_inputs(InputLaw.parse("factor:1"), (3, 4, 2, 5), torch.Generator().manual_seed(0))
    assert all(torch.equal(x[:, 0], x[:, j]) for j in range(1, 4))


def test_inputs_come_from_the_generator_alone() -> None:
    law, shape = InputLaw.parse("factor:0.4"), (5, 4, 1, 6)
    before = torch.get_rng_state()
    first, again, other = (draw_inputs(law, shape, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("given", "name"),
    [("normal", "normal"), ("normal:0.50", "normal:0.5"), ("normal:-2", "normal:-2"), ("normal:0", "normal"),
     ("normal:-0.0", "normal"), ("normal:1e3", "normal:1000"), ("factor:.4", "factor:0.4"), ("factor:0", "factor:0"),
     ("factor:1.0", "factor:1"), ("relu", "relu"), ("uniform", "uniform")],
)  # fmt: skip
def test_a_law_has_one_name(given: str, name: str) -> None:
    law = InputLaw.parse(given)
    assert law.name == name
    assert InputLaw.parse(law.name) == law


@pytest.mark.parametrize("given", ["normal:0.1234567", "normal:999.125", "factor:0.12345678"])
def test_a_name_says_the_whole_number(given: str) -> None:
    law = InputLaw.parse(given)
    assert InputLaw.parse(law.name) == law


def test_a_factor_without_a_share_leaves_the_channels_independent() -> None:
    assert InputLaw.parse("factor:0").independent
    assert InputLaw.parse("normal:3").independent


@pytest.mark.parametrize("name", ["gauss", "", "normal:", "normal:x", "normal:inf", "normal:nan", "normal:1000.5",
                                  "normal:-1001", "uniform:2", "relu:1", "relu:", "factor", "factor:", "factor:x",
                                  "factor:-0.1", "factor:1.1", "factor:nan", "Normal", "normal:1:2"])  # fmt: skip
def test_any_other_name_is_refused_with_the_value_and_what_would_do(name: str) -> None:
    with pytest.raises(UsageError) as refused:
        InputLaw.parse(name)
    message = str(refused.value)
    assert f"'{name}'" in message
    kind = name.split(":")[0]
    if kind == "factor" and ":" in name:
        assert "from 0 to 1" in message
    elif kind == "normal":
        assert "MU is a mean" in message
    else:
        assert all(known in message for known in NAMES)
