"""Runs of sampled convolutions against the problems they stand for, solved one by one from explicit matrices."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bgcbench.convs import CONVS
from bgcbench.errors import ShapeError, UsageError
from bgcbench.experiments import approx_run
from bgcbench.experiments.approx import ApproxConfig, few_rows, plan
from bgcbench.experiments.approx_run import ApproxRun, draw_inputs, fits, open_session
from bgcbench.results.rows import SampledRow
from bgcbench.specs import VARIANTS, divisors
from bgcbench.theory import moments
from bgcbench.theory.inputs import InputLaw
from bgcbench.theory.sampled import he_rows
from tests.theory.explicit import residual_forms

LINEAR = ("gc", "shuffle", "bgc")
SEARCHED = ("tlgc", "flgc", "lgc")
NUMBERS = ("error", "error_se", "relative_error", "relative_error_se", "output_relative_error", "scaled_error",
           "exact_relative_error", "in_sample_factor", "construction_relative_error", "bound_general",
           "bound_zero_mean")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def small(**options: Any) -> ApproxConfig:
    """8 -> 12 channels on rows of eight values."""
    given: dict[str, Any] = {"in_channels": 8, "out_channels": 12, "length": 8, "samples": 12, "groups": (2, 4),
                             "variants": LINEAR, "inputs": ("normal", "relu"), "device": "cpu"}  # fmt: skip
    return ApproxConfig(**{**given, **options})


def run_of(config: ApproxConfig, **options: Any) -> ApproxRun:
    return ApproxRun(config, open_session(config), plan(config), **options)


def computed(config: ApproxConfig, **options: Any) -> list[SampledRow]:
    run = run_of(config, **options)
    for _ in run.run():
        pass
    return run.results


def by_row(results: list[SampledRow]) -> dict[tuple[str, int, str], SampledRow]:
    return {(r.params.variant, r.params.groups, r.params.input): r for r in results}


@dataclass(frozen=True)
class Sample:
    """The very inputs and convolutions of a run, held whole, and the problem (5.1) on them."""

    config: ApproxConfig
    x: Tensor  # (S, n, H, W)
    weight: Tensor  # (S, m, n, kh, kw)

    @classmethod
    def of(cls, config: ApproxConfig, name: str) -> Sample:
        seeds = run_of(replace(config, groups=(1,)))._seeds
        size = (1 if config.dims == 1 else config.length, config.length)
        kernel = (1 if config.dims == 1 else config.kernel, config.kernel)
        generator = torch.Generator().manual_seed(seeds(f"inputs:{name}"))
        x = draw_inputs(InputLaw.parse(name), (config.samples, config.in_channels, *size), generator)
        length = config.in_channels * math.prod(kernel)
        rows = [he_rows(row, config.samples, length, seeds, torch.float64) for row in range(config.out_channels)]
        weight = torch.stack(rows, 1)
        return cls(config, x, weight.reshape(*weight.shape[:2], config.in_channels, *kernel))

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, stride=self._stride, padding=self._padding)

    @property
    def _stride(self) -> tuple[int, int]:
        return (1 if self.config.dims == 1 else self.config.stride), self.config.stride

    @property
    def _padding(self) -> tuple[int, int]:
        pad = (self.config.kernel - 1) // 2  # "same" for odd kernels at stride 1
        return (0 if self.config.dims == 1 else pad), pad

    def design(self, x: Tensor) -> Tensor:
        """The im2col matrix: (S D, channels K)."""
        patches = F.unfold(x, tuple(self.weight.shape[-2:]), padding=self._padding, stride=self._stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def targets(self, which: int) -> Tensor:
        """The outputs of one convolution on all inputs: (S D, m)."""
        return self.convolve(self.x, self.weight[which]).flatten(2).transpose(1, 2).flatten(0, 1)

    @functools.cached_property
    def moment(self) -> Tensor:
        design = self.design(self.x)
        return design.T @ design / self.config.samples

    @property
    def input_energy(self) -> float:
        return float(self.x.square().sum()) / self.config.samples

    @property
    def weight_energy(self) -> float:
        return float(self.weight.square().sum()) / self.config.samples

    @functools.cached_property
    def output_energy(self) -> float:
        """E||Wx||^2 over convolutions and inputs."""
        energies = [float(self.targets(which).square().sum()) for which in range(self.config.samples)]
        return sum(energies) / self.config.samples**2

    def least_errors(self, variant: str, groups: int, convolutions: int | None = None) -> list[float]:
        """(1/S) sum over inputs of the least ||Wx - Vx||^2, convolution by convolution, group by group."""
        m = self.config.out_channels
        order = torch.arange(m).reshape(1, m, 1, 1)
        if variant == "shuffle":  # final channel p is what the group convolution put at order[p]
            order = torch.nn.ChannelShuffle(groups)(order)
        of_group = (order.flatten() // (m // groups)).tolist()
        designs = []
        for group, own in enumerate(self.x.chunk(groups, 1)):
            parts = [self.design(own)]
            if variant == "bgc":
                parts.append(self.design(sum(self.x.chunk(groups, 1)) / groups))
            designs.append((torch.cat(parts, 1), [row for row in range(m) if of_group[row] == group]))
        found = []
        for which in range(convolutions or self.config.samples):
            y, error = self.targets(which), 0.0
            for design, rows in designs:
                solution = torch.linalg.lstsq(design, y[:, rows], driver="gelsd").solution
                error += float((y[:, rows] - design @ solution).square().sum())
            found.append(error / self.config.samples)
        return found

    def constructed_errors(self, variant: str, groups: int) -> float:
        """(1/S^2) sum of ||Wx - Vx||^2 for the V that the proofs write down, by direct convolution."""
        x, m, n = self.x, self.config.out_channels // groups, self.config.in_channels // groups
        mean, lost = x.unflatten(1, (groups, n)).mean(1), 0.0
        for weight in self.weight:
            for k in range(groups):
                rows = weight[k * m : (k + 1) * m]
                own = slice(k * n, (k + 1) * n)
                built = self.convolve(x[:, own], rows[:, own])
                if variant == "bgc":
                    others = rows.unflatten(1, (groups, n)).sum(1) - rows[:, own]
                    built = built + self.convolve(mean, others)
                lost += float((self.convolve(x, rows) - built).square().sum())
        return lost / self.config.samples**2


SHAPES: list[dict[str, Any]] = [
    {},
    {"samples": 8, "stride": 2, "length": 13},
    {"in_channels": 16, "out_channels": 8, "samples": 12, "length": 9},
    {"in_channels": 12, "samples": 9, "length": 7, "kernel": 1},
    {"in_channels": 12, "samples": 12, "length": 6, "kernel": 2},
    {"out_channels": 8, "samples": 6, "length": 9, "kernel": 5, "stride": 1},
    {"dims": 2, "length": 5, "samples": 6, "out_channels": 8},
    {"dims": 2, "length": 5, "samples": 10, "stride": 2},
    {"dims": 2, "length": 4, "samples": 6, "kernel": 2, "stride": 1, "in_channels": 12},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()) or "plain")
def test_a_run_gives_what_separate_least_squares_problems_give(shape: dict[str, Any]) -> None:
    config = small(**shape)
    common = [n for n in divisors(config.in_channels) if config.out_channels % n == 0]
    config = replace(config, groups=tuple(common), variants=(*LINEAR, "standard"))
    found = by_row(computed(config))
    assert len(found) == len(config.inputs) * (1 + 3 * (len(common) - 1))
    for name in config.inputs:
        sample = Sample.of(config, name)
        scale, floor = sample.weight_energy * sample.input_energy, 1e-12 * sample.output_energy
        for variant, groups in [("standard", 1), *((v, n) for v in LINEAR for n in common[1:])]:
            row = found[variant, groups, name]
            expected = 0.0
            if groups > 1:
                errors = sample.least_errors(variant, groups)
                assert len(errors) == row.params.convolutions == config.samples
                expected = sum(errors) / len(errors)
            where = (variant, groups, name)
            assert row.error == pytest.approx(expected, rel=1e-9, abs=floor), where
            assert row.relative_error == pytest.approx(expected / scale, rel=1e-9, abs=floor / scale), where
            share = expected / sample.output_energy
            assert row.output_relative_error == pytest.approx(share, rel=1e-9, abs=1e-12), where
            assert (row.error <= floor) == (groups == 1 or (variant, groups) == ("bgc", 2)), where
            if groups > 1:
                power = 2 if variant == "bgc" else 1
                scaled = expected / scale / (1 - 1 / groups) ** power
                assert row.scaled_error == pytest.approx(scaled, rel=1e-9, abs=4 * floor / scale), where


@pytest.mark.parametrize("name", ["factor:1", "factor:0.4", "normal:0.7", "uniform"])
def test_so_it_does_for_every_other_input(name: str) -> None:
    config = small(inputs=(name,), groups=(2, 4), samples=8)
    found, sample = by_row(computed(config)), Sample.of(config, name)
    for variant in LINEAR:
        for groups in (2, 4):
            errors = sample.least_errors(variant, groups)
            expected = sum(errors) / len(errors)
            row = found[variant, groups, name]
            assert row.error == pytest.approx(expected, rel=1e-9, abs=1e-12 * sample.output_energy)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "length": 13}, {"dims": 2, "length": 4, "samples": 6}])
def test_the_constructions_of_the_proofs_are_measured_by_direct_convolution(options: dict[str, Any]) -> None:
    config = small(variants=("gc", "bgc", "shuffle", "standard"), inputs=("normal", "relu", "factor:0.4"), **options)
    found = by_row(computed(config))
    for name in config.inputs:
        sample = Sample.of(config, name)
        scale = sample.weight_energy * sample.input_energy
        assert found["standard", 1, name].construction_relative_error == 0.0
        for variant, groups in (("gc", 2), ("gc", 4), ("bgc", 2), ("bgc", 4)):
            expected = sample.constructed_errors(variant, groups) / scale
            row = found[variant, groups, name]
            assert row.construction_relative_error == pytest.approx(expected, rel=1e-10)
            assert row.relative_error < row.construction_relative_error


def test_a_shuffle_constructs_the_blocks_of_its_own_order() -> None:
    config = small(variants=("shuffle",), inputs=("relu",))
    sample = Sample.of(config, "relu")
    for groups in (2, 4):
        order = torch.nn.ChannelShuffle(groups)(torch.arange(12).reshape(1, 12, 1, 1)).flatten() // (12 // groups)
        lost = 0.0
        for weight in sample.weight:
            kept = torch.zeros_like(weight)
            for p in range(12):
                own = slice(int(order[p]) * 8 // groups, (int(order[p]) + 1) * 8 // groups)
                kept[p, own] = weight[p, own]
            lost += float(sample.convolve(sample.x, weight - kept).square().sum())
        row = by_row(computed(config))["shuffle", groups, "relu"]
        expected = lost / config.samples**2 / (sample.weight_energy * sample.input_energy)
        assert row.construction_relative_error == pytest.approx(expected, rel=1e-10)


# -------------------------------------------------------------------------------------------------- standard errors


@pytest.mark.parametrize("name", ["normal", "relu"])
def test_standard_errors_are_those_of_gaussian_quadratic_forms(name: str) -> None:
    # With S of every group explicit. For a row w ~ N(0, s^2 I): Var(w S w^T) = 2 s^4 tr(S^2), Var(w w^T) = 2 s^4 nK,
    # Cov = 2 s^4 tr S; convolutions are independent, so are their rows.
    config = small(inputs=(name,), variants=("gc", "bgc"), groups=(2, 3, 4), in_channels=12, samples=20)
    sample, found = Sample.of(config, name), by_row(computed(config))
    size, m = 36, 12
    s4 = (2 / size) ** 2
    for variant, groups in (("gc", 2), ("gc", 3), ("gc", 4), ("bgc", 3), ("bgc", 4)):
        forms, row = residual_forms(variant, sample.moment, groups), found[variant, groups, name]
        of_error = 2 * s4 * sum(m // groups * float((form @ form).trace()) for form in forms)
        of_both = 2 * s4 * sum(m // groups * float(form.trace()) for form in forms)
        of_weights = 2 * s4 * m * size
        assert row.error_se == pytest.approx(math.sqrt(of_error / 20), rel=1e-8)
        ratio = row.error / sample.weight_energy
        spread = math.sqrt((of_error - 2 * ratio * of_both + ratio**2 * of_weights) / 20)
        assert row.relative_error_se == pytest.approx(spread / sample.weight_energy / sample.input_energy, rel=1e-7)


@pytest.mark.parametrize("name", ["normal", "relu", "factor:0.4"])
def test_standard_errors_are_what_many_convolutions_show(name: str) -> None:
    # 2000 convolutions: a standard deviation is known to 1.6 %, five times which is allowed. With 8 groups, of which
    # the run looks at some.
    config = small(inputs=(name,), variants=("gc", "bgc"), groups=(2, 4, 8), out_channels=16, samples=2000, length=6)
    sample, found = Sample.of(config, name), by_row(computed(config))
    rows = sample.weight.flatten(2)  # (S, m, nK)
    weights = rows.square().sum((1, 2))
    for variant, groups in (("gc", 2), ("gc", 4), ("gc", 8), ("bgc", 4), ("bgc", 8)):
        errors = torch.zeros(2000, dtype=torch.float64)
        for form, own in zip(residual_forms(variant, sample.moment, groups), rows.chunk(groups, 1), strict=True):
            errors += ((own @ form) * own).sum((1, 2))
        row = found[variant, groups, name]
        assert row.error == pytest.approx(float(errors.mean()), rel=1e-9)
        assert row.error_se == pytest.approx(float(errors.std()) / math.sqrt(2000), rel=0.08)
        rest = errors - weights * (errors.mean() / weights.mean())
        spread = float(rest.std()) / math.sqrt(2000) / float(weights.mean()) / sample.input_energy
        assert row.relative_error_se == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize("seed", range(6))
def test_an_exact_variant_has_no_spread_to_speak_of(seed: int) -> None:
    for (_, groups, _), row in by_row(computed(small(seed=seed, variants=("bgc", "standard"), groups=(2,)))).items():
        assert row.error < 1e-12
        assert 0 <= row.error_se < 1e-6
        assert 0 <= row.relative_error_se < 1e-8
        assert groups == 2 or row.error_se == 0.0


# -------------------------------------------------------------------------------- variants that are no linear space


@pytest.mark.parametrize("variant", SEARCHED)
@pytest.mark.parametrize("shape", [{}, {"dims": 2, "length": 4, "samples": 30, "stride": 2}, {"out_channels": 16}])
def test_each_searched_convolution_loses_what_its_own_kernel_loses(
    shape: dict[str, Any], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(**{"variants": (variant,), "search_samples": 3, "samples": 24, **shape})
    solve, solved = CONVS[variant].from_dense, []

    def recorded(weight: Tensor, groups: int, **options: Any) -> Any:
        solved.append((weight, groups, options, solve(weight, groups, **options).dense_weight().detach()))
        return solve(weight, groups, **options)

    monkeypatch.setattr(CONVS[variant], "from_dense", recorded)
    rows = computed(config)
    monkeypatch.undo()
    assert len(solved) == 3 * len(rows) == 12
    for number, row in enumerate(rows):
        groups, name = row.params.groups, row.params.input
        sample = Sample.of(config, name)

        def energy(kernel: Tensor, sample: Sample = sample) -> float:
            return float(sample.convolve(sample.x, kernel).square().sum()) / config.samples

        errors, outputs, weights = [], [], []
        for which, (weight, n, options, kernel) in enumerate(solved[3 * number : 3 * number + 3]):
            assert torch.equal(weight, sample.weight[which])
            assert (n, options["projection"]) == (groups, "least_squares")
            torch.testing.assert_close(options["second_moment"], sample.moment, rtol=1e-12, atol=1e-12)
            errors.append(energy(weight - kernel))
            outputs.append(energy(weight))
            weights.append(float(weight.square().sum()))
            if variant == "tlgc":  # the search starts from the white optimum
                assert errors[-1] <= energy(weight - solve(weight, groups).dense_weight().detach()) * (1 + 1e-9)
            else:  # the weights that were kept are solved for, which is better than copying them
                assert errors[-1] < energy(weight - torch.where(kernel != 0, weight, 0))
        if variant == "tlgc":  # it holds every group convolution
            assert all(own < gc for own, gc in zip(errors, sample.least_errors("gc", groups, 3), strict=True))
        mean, energies = (torch.tensor(values, dtype=torch.float64) for values in (errors, weights))
        assert row.params.convolutions == 3
        assert row.error == pytest.approx(float(mean.mean()), rel=1e-9)
        assert row.error_se == pytest.approx(float(mean.std()) / math.sqrt(3), rel=1e-7)
        scale = float(energies.mean()) * sample.input_energy
        assert row.relative_error == pytest.approx(float(mean.mean()) / scale, rel=1e-9)
        rest = mean - energies * (mean.mean() / energies.mean())
        assert row.relative_error_se == pytest.approx(float(rest.std()) / math.sqrt(3) / scale, rel=1e-6)
        assert row.output_relative_error == pytest.approx(sum(errors) / sum(outputs), rel=1e-9)
        missing = ("scaled_error", "exact_relative_error", "construction_relative_error", "bound_general")
        assert all(getattr(row, what) is None and variant in row.null_reasons[what] for what in missing)


def test_one_searched_convolution_has_no_spread() -> None:
    for row in computed(small(variants=("tlgc",), search_samples=1)):
        assert row.params.convolutions == 1
        assert row.error_se is None
        assert row.relative_error_se is None


def test_no_more_convolutions_are_searched_than_there_are() -> None:
    (row,) = computed(small(variants=("lgc",), groups=(4,), inputs=("normal",), samples=6, search_samples=50))
    assert row.params.convolutions == 6
    assert row.params.samples == 6


# -------------------------------------------------------------------------------------------------- plan and rows


def test_rows_come_by_input_then_n_in_the_order_of_the_variants() -> None:
    config = small(variants=("bgc", "tlgc", "gc"), groups=(4, 1, 2), inputs=("relu", "normal"))
    order = [(row.params.input, row.params.groups, row.params.variant) for row in plan(config)]
    one = [(1, "standard"), *((n, v) for n in (2, 4) for v in ("gc", "tlgc", "bgc"))]
    assert order == [(name, *rest) for name in ("relu", "normal") for rest in one]
    rows = computed(config)
    assert [(r.params.input, r.params.groups, r.params.variant) for r in rows] == order
    assert [r.key for r in rows] == [row.key for row in plan(config)]


def test_one_group_of_any_variant_is_the_standard_convolution_and_one_row() -> None:
    both = [computed(small(variants=v, groups=g, inputs=("relu",))) for v, g in
            ((("gc", "bgc"), (1,)), (("standard",), (2,)))]  # fmt: skip
    for (row,) in both:
        assert (row.params.variant, row.params.groups) == ("standard", 1)
        assert [getattr(row, n) for n in ("error", "error_se", "relative_error", "output_relative_error")] == [0.0] * 4
        assert [getattr(row, n) for n in ("exact_relative_error", "bound_general", "bound_zero_mean")] == [0.0] * 3
        assert row.in_sample_factor == 1.0
        assert row.scaled_error is None
        assert row.status == "ok"
    assert both[0] == both[1]


def test_keys_tell_rows_apart_and_name_what_decides_their_numbers() -> None:
    keys = [row.key for row in plan(small(variants=tuple(VARIANTS), groups=(1, 2, 4)))]
    assert len(set(keys)) == len(keys)
    for change in ({"length": 9}, {"kernel": 5}, {"stride": 2}, {"dims": 2}, {"samples": 13}, {"precision": "fp32"},
                   {"out_channels": 16}, {"in_channels": 16}):  # fmt: skip
        other = {row.key for row in plan(small(variants=("gc",), **change))}
        assert not other & {row.key for row in plan(small(variants=("gc",)))}, change


def test_a_row_says_what_it_is_and_why_a_number_is_missing() -> None:
    rows = computed(small(variants=tuple(VARIANTS), groups=(1, 2, 4), inputs=("normal", "factor:0.4"), samples=24))
    for row in rows:
        params = row.params
        assert (row.status, row.reason) == ("ok", None)
        missing = {name for name in NUMBERS if getattr(row, name) is None}
        assert set(row.null_reasons) == missing
        assert all(row.null_reasons.values())
        variant, groups = params.variant, params.groups
        weights = 3 * 8 * 12 // groups
        assert row.counts.params == {"bgc": 2 * weights, "tlgc": weights + 3 * 8 + 12 * groups}.get(variant, weights)
        unknown = {"standard": 0, "bgc": 48 // groups, "tlgc": 24 // groups + groups}.get(variant, 24 // groups)
        assert row.in_sample_factor == pytest.approx(1 - unknown / (24 * 8), rel=1e-14)
        assert (params.dims, params.kernel, params.length, params.stride) == (1, 3, 8, 1)
        assert (params.precision, params.samples) == ("fp64", 24)
        assert params.solver == {"standard": "exact", "tlgc": "als", "flgc": "partition-search",
                                    "lgc": "column-search", "lowrank": "svd"}.get(variant, "schur")  # fmt: skip


@pytest.mark.parametrize("variant", ["bgc", "tlgc"])
def test_an_n_that_does_not_divide_is_refused_with_what_would_do(variant: str) -> None:
    with pytest.raises(ShapeError) as refused:
        plan(small(variants=(variant,), groups=(2, 3, 5)))
    message = str(refused.value)
    assert "in_channels=8 is not divisible by groups=3; groups that divide 8 -> 12 channels: 1, 2, 4" in message
    assert "groups=5" in message
    assert "--skip-invalid" in message
    assert message.count("groups=3") == 1  # once, not once a variant and input


def test_an_n_that_does_not_divide_can_be_skipped_and_is_a_row_without_numbers() -> None:
    config = small(variants=("bgc", "tlgc"), groups=(2, 3), skip_invalid=True)
    found, alone = by_row(computed(config)), by_row(computed(replace(config, groups=(2,))))
    for (_, groups, _), row in found.items():
        assert row.status == ("invalid" if groups == 3 else "ok")
        if groups == 3:
            assert "divisible by groups=3" in row.reason
            assert row.counts is None
            assert all(getattr(row, name) is None for name in NUMBERS)
    assert {at: row for at, row in found.items() if at[1] == 2} == alone


def test_low_rank_by_its_rank_is_what_it_is_by_the_n_that_leaves_this_rank() -> None:
    config = small(variants=("lowrank",), groups=(2,), ranks=(12, 4, 3), search_samples=2)
    rows = computed(config)
    mine = rows[:4]  # of the first input; Kmn / (N (Kn + m)) = 288 / 36 N
    assert [(r.params.groups, r.params.rank, r.key.split("-8x12")[0]) for r in mine] == [
        (2, None, "lowrank-n2"), (2, 3, "lowrank-r3"), (2, 4, "lowrank-r4"), (1, 12, "lowrank-r12"),
    ]  # fmt: skip
    by_groups, three, four, full = mine
    assert [getattr(four, name) for name in NUMBERS] == [getattr(by_groups, name) for name in NUMBERS]
    assert three.error > four.error > 1e-3
    assert full.error < 1e-12
    assert full.exact_relative_error is None
    assert {(fit.variant, fit.groups) for fit in fits(rows)} == {("lowrank", (2,))}  # of a rank there is no slope
    with pytest.raises(ShapeError, match=r"^rank=13 is more than 12.*use at most 12; drop .*--skip-invalid$"):
        plan(replace(config, ranks=(13,)))
    (*_, invalid) = computed(replace(config, ranks=(13,), skip_invalid=True))
    assert (invalid.status, invalid.params.rank) == ("invalid", 13)


def test_low_rank_stands_beside_the_limit_of_marchenko_and_pastur_on_white_input() -> None:
    shape = {"in_channels": 48, "out_channels": 48, "length": 64, "samples": 400, "search_samples": 6}
    rows = computed(small(variants=("gc", "lowrank"), ranks=(5, 30), inputs=("normal", "uniform", "relu"), **shape))
    ours = [row for row in rows if row.limit_relative_error is not None]
    assert {(r.params.variant, r.params.input) for r in ours} == {("lowrank", "normal"), ("lowrank", "uniform")}
    assert len(ours) == 2 * 4
    for row in ours:
        assert row.relative_error == pytest.approx(
            row.limit_relative_error * row.in_sample_factor, rel=0.02, abs=3 * row.relative_error_se
        )


def test_groups_that_are_learnt_need_not_divide() -> None:
    (row,) = computed(small(variants=("flgc",), groups=(3,), inputs=("normal",), search_samples=2))
    assert row.status == "ok"
    assert 0 < row.output_relative_error < 1


def test_nothing_valid_is_nothing_to_compute() -> None:
    with pytest.raises(UsageError, match="nothing to compute"):
        plan(small(groups=(3,), skip_invalid=True))


@pytest.mark.parametrize(
    ("options", "needed", "label"),
    [({"variants": ("gc", "bgc"), "groups": (2, 4)}, 24, "BGC N=2"),
     ({"variants": ("gc",), "groups": (4, 2)}, 12, "GC N=2"),
     ({"variants": ("tlgc", "gc"), "groups": (4,)}, 10, "TLGC N=4"),
     ({"dims": 2, "length": 3, "groups": (2,)}, 32, "BGC N=2"),
     ({"variants": ("bgc",), "groups": (3, 4), "skip_invalid": True}, 12, "BGC N=4")],
)  # fmt: skip
def test_fewer_data_than_unknowns_are_refused_with_the_number_that_would_do(
    options: dict[str, Any], needed: int, label: str
) -> None:
    config = small(samples=1, stride=3, **{"length": 8, **options})
    outputs = config.rows_of_data
    least = math.ceil(needed / outputs)
    assert least > 1
    with pytest.raises(UsageError) as refused:
        plan(replace(config, samples=least - 1))
    message = str(refused.value)
    assert f"--samples {least - 1} gives {(least - 1) * outputs} positions for {needed} unknowns" in message
    assert label in message
    assert "any error could be fitted away" in message
    assert f"at least {least}, or {10 * least} " in message
    assert "larger N" in message
    assert plan(replace(config, samples=least))
    assert few_rows(replace(config, samples=10 * least), plan(replace(config, samples=10 * least))) == []


def test_fewer_than_ten_data_an_unknown_is_a_warning() -> None:
    for samples, warned in ((29, True), (30, False)):
        config = small(variants=("gc", "bgc"), samples=samples, groups=(2,))  # 24 unknowns, 8 positions
        run = run_of(config)
        assert bool(run.warnings) == warned == bool(few_rows(config, plan(config)))
    (warning,) = run_of(small(variants=("gc", "bgc"), samples=9, groups=(2, 4))).warnings
    assert "only 3.0 data an unknown for BGC N=2" in warning
    assert "factor of about 0.67" in warning
    assert "--samples" in warning


def test_the_in_sample_factor_is_what_fitting_the_sample_takes_away() -> None:
    # On white input the least error within the sample is the closed form times 1 - p / (S D), here as low as 0.33.
    config = small(in_channels=16, out_channels=16, groups=(2, 4), length=6, samples=12, kernel=1, inputs=("normal",))
    rows = [by_row(computed(replace(config, seed=seed))) for seed in range(40)]
    for variant, groups in (("gc", 2), ("gc", 4), ("bgc", 4)):
        mine = [each[variant, groups, "normal"] for each in rows]
        ratio = torch.tensor([row.relative_error / row.exact_relative_error for row in mine])
        assert float(ratio.mean()) == pytest.approx(
            mine[0].in_sample_factor, abs=5 * float(ratio.std()) / math.sqrt(40)
        )
        assert mine[0].in_sample_factor < 0.95


def test_inputs_named_twice_are_one() -> None:
    config = small(inputs=("normal:0.50", "normal:0.5", "relu", "relu"))
    assert config.inputs == ("normal:0.5", "relu")
    assert len(plan(config)) == 2 * 6


def test_in_single_precision_a_mean_may_not_hide_what_stands_beside_it() -> None:
    for mean in (10.5, -11):
        assert small(inputs=(f"normal:{mean}",))
        with pytest.raises(UsageError, match=f"'normal:{mean}' has too large a mean for --precision fp32"):
            small(inputs=("relu", f"normal:{mean}"), precision="fp32")
    config = small(inputs=("normal:-10",), variants=("gc", "bgc"), samples=60)
    double, single = (by_row(computed(replace(config, precision=p))) for p in ("fp64", "fp32"))
    for at, row in double.items():
        assert single[at].error == pytest.approx(row.error, rel=1e-3, abs=1e-2), at


def test_the_defaults_are_the_papers_experiment() -> None:
    config = ApproxConfig()
    assert (config.in_channels, config.out_channels, config.kernel, config.dims) == (256, 256, 3, 1)
    assert config.groups == (4, 8, 16, 32, 64)
    assert config.inputs == ("normal", "uniform")
    assert config.variants == ("gc", "bgc")
    assert (config.precision, config.samples, config.rows_of_data) == ("fp64", 1000, 32000)
    assert ApproxConfig(quick=True).samples == 64
    assert ApproxConfig(quick=True, samples=7).samples == 7
    assert ApproxConfig.from_json(config.to_json()) == config


# ------------------------------------------------------------------------------------- runs beside and after others


def test_the_seed_decides_the_numbers() -> None:
    first, again, other = (computed(small(variants=("gc",), seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert all(a.error != b.error for a, b in zip(first, other, strict=True))


GROWN = {
    "inputs": ({"inputs": ("normal", "relu", "factor:0.4")}, 0.0),
    "searched variants": ({"variants": ("gc", "bgc", "tlgc", "lgc")}, 0.0),
    "shuffle": ({"variants": ("gc", "bgc", "shuffle")}, 0.0),
    "standard": ({"variants": ("gc", "bgc", "standard")}, 0.0),
    # Rows are added up by the finest groups that are asked for, and BGC's products are wider than GC's: other sums.
    "groups": ({"groups": (2, 4, 8), "out_channels": 16}, 1e-12),
    "groups apart": ({"groups": (2, 3, 4, 6), "in_channels": 12, "out_channels": 12}, 1e-12),
    "a coarser n": ({"groups": (1, 2, 4)}, 1e-12),
}


@pytest.mark.parametrize("what", GROWN)
def test_what_else_a_run_computes_does_not_change_a_row(what: str) -> None:
    more, tolerance = GROWN[what]
    whole = small(**{"variants": ("gc", "bgc"), "groups": (2, 4), **more})
    alone = replace(whole, variants=("gc", "bgc"), groups=(2, 4), inputs=("normal", "relu"))
    found = by_row(computed(whole))
    for at, row in by_row(computed(alone)).items():
        if not tolerance:
            assert found[at] == row
            continue
        for name in NUMBERS:
            # what is exact is rounding and nothing else; its spread a root of it
            floor = 1e-7 if name.endswith("_se") and at[:2] == ("bgc", 2) else 1e-12
            assert getattr(found[at], name) == (getattr(row, name) if getattr(row, name) is None else pytest.approx(
                getattr(row, name), rel=tolerance, abs=floor)), (at, name)  # fmt: skip


def test_gc_is_the_same_with_and_without_bgc_beside_it() -> None:
    both, alone = (by_row(computed(small(variants=v))) for v in (("gc", "bgc"), ("gc",)))
    for at, row in alone.items():
        for name in NUMBERS:
            assert getattr(both[at], name) == (
                None if getattr(row, name) is None else pytest.approx(getattr(row, name), rel=1e-12)
            )


def test_how_many_inputs_are_drawn_at_once_changes_the_draw_but_not_what_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 16 numbers an input and 3 inputs at a time: the last part is smaller. The same draws, in parts, count the same.
    config = small(inputs=("relu",), variants=("gc", "bgc"), groups=(2, 4), samples=11)
    seeds = run_of(config)._seeds
    monkeypatch.setattr(approx_run, "CHUNK_NUMBERS", 3 * 8 * 8)
    monkeypatch.setattr(moments, "CHUNK_NUMBERS", 1)
    found = by_row(computed(config))
    generator = torch.Generator().manual_seed(seeds("inputs:relu"))
    parts = [draw_inputs(InputLaw.parse("relu"), (count, 8, 1, 8), generator) for count in (3, 3, 3, 2)]
    sample = replace(Sample.of(config, "relu"), x=torch.cat(parts))
    for variant, groups in (("gc", 2), ("gc", 4), ("bgc", 4)):
        errors = sample.least_errors(variant, groups)
        row = found[variant, groups, "relu"]
        assert row.error == pytest.approx(sum(errors) / 11, rel=1e-9)
        relative = sum(errors) / 11 / sample.weight_energy / sample.input_energy
        assert row.relative_error == pytest.approx(relative, rel=1e-9)


def test_single_precision_agrees_to_its_own_precision() -> None:
    options: dict[str, Any] = {"variants": ("gc", "bgc", "tlgc"), "groups": (2, 4), "samples": 40, "search_samples": 2}
    double, single = (by_row(computed(small(precision=p, **options))) for p in ("fp64", "fp32"))
    for at, row in double.items():
        for name in ("error", "relative_error", "output_relative_error", "error_se", "construction_relative_error"):
            if getattr(row, name) is not None:
                floor = 1e-2 if name.startswith("error") else 1e-5
                assert getattr(single[at], name) == pytest.approx(getattr(row, name), rel=1e-3, abs=floor), (at, name)


def test_kept_rows_stay_as_they_are_and_only_the_rest_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(variants=("gc", "bgc", "tlgc"), inputs=("normal", "relu"))
    first = computed(replace(config, groups=(2,)))
    marked = {row.key: msgspec.structs.replace(row, error=-1.0) for row in first}
    (four, *_) = computed(replace(config, groups=(4,), inputs=("relu",)))
    broken = msgspec.structs.replace(four, status="error", error=-2.0)
    elsewhere = msgspec.structs.replace(first[0], key="a row that this plan does not have")
    drawn: list[str] = []
    draw = approx_run.draw_inputs
    monkeypatch.setattr(approx_run, "draw_inputs", lambda law, *rest: (drawn.append(law.name), draw(law, *rest))[1])
    kept = {**marked, broken.key: broken, elsewhere.key: elsewhere}
    results = computed(config, kept=kept)
    assert [row.key for row in results] == [*(row.key for row in plan(config)), elsewhere.key]
    fresh = by_row(computed(config))
    for row in results[:-1]:
        at = row.params.variant, row.params.groups, row.params.input
        if at[1] == 2:
            assert row == marked[row.key]
        else:
            assert row.status == "ok"
            assert row.error == pytest.approx(fresh[at].error, rel=1e-12)
    assert sorted(drawn) == ["normal", "normal", "relu", "relu"]  # once in the resumed run, once in the fresh one


def test_an_input_whose_rows_are_all_kept_is_not_even_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(variants=("gc", "bgc"))
    kept = {row.key: row for row in computed(replace(config, inputs=("normal",)))}
    drawn: list[str] = []
    draw = approx_run.draw_inputs
    monkeypatch.setattr(approx_run, "draw_inputs", lambda law, *rest: (drawn.append(law.name), draw(law, *rest))[1])
    assert len(computed(config, kept=kept)) == len(plan(config))
    assert drawn == ["relu"]
    everything = {row.key: row for row in computed(config)}
    assert list(run_of(config, kept=everything).run()) == []


def stopped_after(config: ApproxConfig, times: int) -> tuple[list[SampledRow], list[approx_run.Step], int]:
    """(rows, steps, rows that were there when it was told to stop) of a run that is let go on ``times`` times."""
    there: list[int] = []

    def stop() -> bool:
        there.append(len(run.results))
        return len(there) > times

    run = run_of(config, stop=stop)
    steps, saved = [], []
    for step in run.run():
        steps.append(step)
        saved = run.results if step.save else saved
    assert saved == run.results
    return saved, steps, there[times] if len(there) > times else len(run.results)


def test_a_run_that_is_stopped_ends_soon_with_whole_rows_only() -> None:
    config = small(variants=("gc", "shuffle", "bgc", "tlgc"), inputs=("normal", "relu"), search_samples=1)
    whole = {row.key: row for row in computed(config)}
    lengths = []
    for times in range(40):
        rows, steps, there = stopped_after(config, times)
        assert len(rows) == there  # none after the stop
        assert all(row == whole[row.key] for row in rows)
        lengths.append(len(rows))
        if len(rows) == len(whole):
            break
        if times == 0:
            assert steps == []  # not even the inputs are drawn
    assert lengths[0] == 0
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(whole)
    assert len(set(lengths)) > 3  # after the linear variants, after the shuffled ones, after each searched row


def test_steps_tell_what_is_done_and_how_far_it_is() -> None:
    run = run_of(small(variants=("gc", "shuffle", "tlgc"), groups=(4,), inputs=("relu",)))
    steps, saved = [], []
    for step in run.run():
        steps.append(step)
        saved += [len(run.results)] if step.save else []
    assert steps[0].doing == "inputs relu"
    shares = [step.done for step in steps if step.done is not None]
    assert shares == [0.25, 0.5, 0.75, 1.0] * 2
    assert any("TLGC N=4, relu" in step.doing for step in steps)
    assert saved == [1, 2, 3]


# ------------------------------------------------------------------------------------------------ the paper's figures


@pytest.fixture(scope="module")
def paper() -> dict[tuple[str, int, str], SampledRow]:
    """Section 5.1 as the defaults have it, on half of the samples."""
    return by_row(computed(ApproxConfig(device="cpu", samples=500)))


RHO = (3 * 32 - 2) / (3 * 32) / 256
FIGURE = (4, 8, 16, 32, 64)


@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("groups", FIGURE)
def test_the_papers_scaled_errors_are_the_closed_forms(paper: dict, groups: int, name: str) -> None:
    gc, bgc = (paper[variant, groups, name] for variant in ("gc", "bgc"))
    assert pytest.approx(3.825e-3, rel=1e-4) == RHO
    fitted = [1 - own * 768 // groups / (500 * 32) for own in (1, 2)]
    assert [gc.in_sample_factor, bgc.in_sample_factor] == pytest.approx(fitted, rel=1e-12)
    assert gc.scaled_error == pytest.approx(RHO * fitted[0], rel=3e-3)
    curve = groups * (groups - 2) / (groups - 1) ** 2
    assert bgc.scaled_error == pytest.approx(RHO * curve * fitted[1], rel=3e-3)
    assert gc.exact_relative_error == pytest.approx(RHO * (1 - 1 / groups), rel=1e-12)
    assert bgc.exact_relative_error == pytest.approx(RHO * (1 - 2 / groups), rel=1e-12)
    for row, power in ((gc, 1), (bgc, 2)):
        assert row.construction_relative_error / (1 - 1 / groups) ** power == pytest.approx(RHO, rel=3e-3)
        assert row.scaled_error < 3.83e-3  # the ceiling that the paper reads off
        assert row.bound_zero_mean / (1 - 1 / groups) ** power == pytest.approx(11.72e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["normal", "uniform"])
@pytest.mark.parametrize("groups", FIGURE[:-1])
def test_at_equal_parameters_balanced_and_plain_groups_tie_on_white_input(paper: dict, groups: int, name: str) -> None:
    gc, bgc = paper["gc", groups, name], paper["bgc", 2 * groups, name]
    assert gc.counts.params == bgc.counts.params
    assert bgc.relative_error == pytest.approx(gc.relative_error, rel=1e-3)


def slopes(errors: dict[int, float]) -> tuple[float, float]:
    """The mean of the slopes between neighbours, and that of a regression."""
    x, y = (torch.tensor(v, dtype=torch.float64) for v in ([math.log(1 - 1 / n) for n in errors],
                                                           [math.log(e) for e in errors.values()]))  # fmt: skip
    slope = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution[0, 0]
    return float((y.diff() / x.diff()).mean()), float(slope)


def test_the_papers_slopes_are_those_of_the_closed_forms_with_their_in_sample_factors(paper: dict) -> None:
    found = {(fit.variant, fit.input): fit for fit in fits(paper.values())}
    assert len(found) == 4
    for (variant, name), fit in found.items():
        lost = {"gc": 1, "bgc": 2}[variant]
        closed = {n: RHO * (1 - lost / n) for n in FIGURE}
        assert [fit.exact_slope_mean, fit.exact_slope_regression] == pytest.approx(slopes(closed), rel=1e-9)
        own = {n: closed[n] * paper[variant, n, name].in_sample_factor for n in FIGURE}
        assert [fit.slope_mean, fit.slope_regression] == pytest.approx(slopes(own), abs=5e-3)
        measured = {n: paper[variant, n, name].relative_error for n in FIGURE}
        assert [fit.slope_mean, fit.slope_regression] == pytest.approx(slopes(measured), rel=1e-9)
        assert fit.max_scaled_error == max(paper[variant, n, name].scaled_error for n in FIGURE)
        assert fit.groups == FIGURE
        assert fit.reason is None
    assert found["gc", "normal"].exact_slope_mean == pytest.approx(1, rel=1e-9)
    assert found["bgc", "normal"].exact_slope_mean == pytest.approx(2.2545, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- fits


def test_fits_leave_the_standard_convolution_and_exact_groups_out() -> None:
    config = small(variants=("gc", "bgc"), groups=(1, 2, 4, 8), out_channels=16, samples=100, inputs=("normal",))
    rows = computed(config)
    found = {fit.variant: fit for fit in fits(rows)}
    assert set(found) == {"gc", "bgc"}  # the one group is the standard convolution, which has no slope
    assert found["gc"].groups == (2, 4, 8)
    assert found["bgc"].groups == (4, 8)  # at N = 2 nothing is lost
    assert by_row(rows)["bgc", 2, "normal"].relative_error < 1e-12
    for variant, lost in (("gc", 1), ("bgc", 2)):
        errors = {n: by_row(rows)[variant, n, "normal"].relative_error for n in found[variant].groups}
        assert [found[variant].slope_mean, found[variant].slope_regression] == pytest.approx(slopes(errors), rel=1e-9)
        exact = found[variant].exact_slope_mean, found[variant].exact_slope_regression
        assert exact == pytest.approx(slopes({n: 1 - lost / n for n in errors}))


def test_a_variant_that_is_exact_at_every_n_has_a_reason_instead_of_a_slope() -> None:
    (fit,) = fits(computed(small(variants=("bgc",), groups=(1, 2), inputs=("normal",))))
    assert (fit.slope_mean, fit.slope_regression, fit.c, fit.groups) == (None, None, None, ())
    assert (fit.exact_slope_mean, fit.exact_slope_regression) == (None, None)
    assert "N = 2 has no error" in fit.reason
    assert fits([]) == []


def test_fits_are_for_each_variant_and_input_of_the_rows_that_came_out() -> None:
    rows = computed(small(variants=("gc", "tlgc"), groups=(2, 3, 4), skip_invalid=True, search_samples=1))
    found = fits(rows)
    assert [(fit.variant, fit.input) for fit in found] == [
        ("gc", "normal"), ("tlgc", "normal"), ("gc", "relu"), ("tlgc", "relu"),
    ]  # fmt: skip
    for fit in found:
        assert fit.groups == (2, 4)
        two = {n: by_row(rows)[fit.variant, n, fit.input].relative_error for n in (2, 4)}
        assert fit.slope_mean == pytest.approx(slopes(two)[0], rel=1e-9)
        assert fit.c == pytest.approx(two[2] * 2**fit.slope_mean, rel=1e-9)
        assert (fit.max_scaled_error is None) == (fit.variant == "tlgc")
        assert (fit.exact_slope_mean is None) == (fit.variant == "tlgc")


@pytest.mark.parametrize("seed", range(6))
def test_in_single_precision_what_is_exact_is_left_out_too(seed: int) -> None:
    found = fits(computed(small(variants=("bgc",), groups=(2, 4, 8), out_channels=16, samples=60, seed=seed,
                                precision="fp32")))  # fmt: skip
    assert [fit.groups for fit in found] == [(4, 8)] * 2


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_where_all_channels_are_equal_nothing_has_a_slope(precision: str) -> None:
    # On rows of a hundred the closed form itself is 0 to rounding only.
    for seed, shape in itertools.product(range(4), ({}, {"length": 100, "stride": 2})):
        given = {"groups": (2, 4, 8), "out_channels": 16, "samples": 60, **shape}
        rows = computed(small(variants=("gc", "bgc"), inputs=("factor:1",), seed=seed, precision=precision, **given))
        for fit in fits(rows):
            assert (fit.groups, fit.slope_mean, fit.c) == ((), None, None)
            assert (fit.exact_slope_mean, fit.exact_slope_regression) == (None, None)


# ----------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
def test_the_numbers_on_cuda_are_those_of_the_cpu() -> None:
    options: dict[str, Any] = {"variants": tuple(VARIANTS), "groups": (1, 2, 4), "samples": 40, "search_samples": 2}
    cpu, cuda = (by_row(computed(small(device=device, **options))) for device in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    for at, row in cpu.items():
        tolerance, floor = 1e-9, 1e-13
        if at[0] == "tlgc":  # a search that ends when a sweep gains less than 1e-8
            tolerance = 1e-6
        for name in NUMBERS:
            if at[:2] == ("bgc", 2):  # rounding, and its root
                floor = 1e-5 if name.endswith("_se") else 1e-10
            expected = (
                None if getattr(row, name) is None else pytest.approx(getattr(row, name), rel=tolerance, abs=floor)
            )
            assert getattr(cuda[at], name) == expected, (at, name)
