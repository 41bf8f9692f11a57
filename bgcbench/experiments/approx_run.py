"""Computes the rows of ``bgcbench approx``: errors of sampled convolutions, exact values and bounds beside them.

E of (5.1) is (1/S) sum over convolutions of min over V of (1/S) sum over inputs of ||Wx - Vx||^2. All convolutions see
the same inputs, so the inputs' patch moment M is formed once, the residual form S_k = M - H^T H of each group once, and
the convolutions enter through the second moments of their rows: E = (1/S) sum_k <S_k, G_k>.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from bgcbench.experiments.approx import ApproxConfig, few_rows
from bgcbench.experiments.base import Run, Session, Step, open_device
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.profile import row_seed
from bgcbench.measure.counts import count
from bgcbench.measure.device import DTYPES, backend_state, describe_failure
from bgcbench.results import Document
from bgcbench.results.rows import Counts, Fit, SampledRow
from bgcbench.specs import LINEAR, as_pair, load_layer
from bgcbench.theory.bounds import SCALING_POWER, bounds
from bgcbench.theory.exchangeable import exact_relative_error
from bgcbench.theory.fits import EXACT, fit
from bgcbench.theory.inputs import InputLaw
from bgcbench.theory.lowrank import limit_relative_error
from bgcbench.theory.moments import CHUNK_NUMBERS, PatchMoments
from bgcbench.theory.residual import SEES_MEAN, centred, explained, inner_product, outside, squared_norms
from bgcbench.theory.sampled import GroupMoment, contiguous_rows, group_moments, he_rows, shuffled_rows

# Of how many groups the spread of a row's error is computed; the groups are alike, and a spread known to a percent is
# more than its use needs.
SPREAD_GROUPS = 4


def open_session(config: RunConfig) -> Session:
    """The device to compute on; raises DeviceError where it is not there."""
    session = open_device(config, config.device)
    session.warnings.clear()  # the numbers are the same wherever they are computed
    return session


@dataclass(frozen=True)
class _Inputs:
    """One law's sample: M = (1/S) sum u u^T over inputs and positions, and (1/S) sum ||x||^2."""

    moment: Tensor
    energy: float
    _centred: dict[int, Tensor] = field(default_factory=dict)

    def centred(self, groups: int) -> Tensor:
        """M about the mean over N = ``groups`` groups."""
        if groups not in self._centred:
            self._centred[groups] = centred(self.moment, groups)
        return self._centred[groups]


@dataclass
class _Sums:
    """What the groups of one row's variant and N add up to, over all convolutions."""

    error: float = 0.0
    construction: float = 0.0
    weights: float = 0.0  # sum ||W||^2
    output: float = 0.0  # sum ||Wx||^2
    trace: float = 0.0  # sum over groups of tr S_k
    squares: list[float] = field(default_factory=list)  # tr S_k^2 of some groups


class ApproxRun(Run[SampledRow]):
    """One run over the rows of :func:`bgcbench.experiments.approx.plan`."""

    config: ApproxConfig
    planned: Sequence[SampledRow]

    def __init__(self, config: ApproxConfig, session: Session, planned: Sequence[SampledRow], **options: Any) -> None:
        super().__init__(config, session, planned, **options)
        self.known = {key: row for key, row in self.known.items() if row.is_done}
        self.warnings = few_rows(config, planned)
        self._dtype = DTYPES[config.precision]
        self._standard = config.spec()
        self._seeds = functools.partial(row_seed, config.seed)
        self._inputs: dict[str, _Inputs] = {}

    def run(self) -> Iterator[Step]:
        with backend_state(self.config.precision, self.config.threads), torch.no_grad():
            self.known |= {row.key: row for row in self.planned if row.is_done}  # what is invalid
            left = [row for row in self.planned if row.key not in self.known]
            for law in dict.fromkeys(row.params.input for row in left):
                if self.stop():
                    return
                yield Step(f"inputs {law}")
                self._inputs[law] = self._sample(InputLaw.parse(law))
            if self.stop():
                return
            linear = [row for row in left if row.params.variant in ("standard", *LINEAR)]
            for shuffled in (False, True):
                chosen = [row for row in linear if (row.params.variant == "shuffle") == shuffled]
                if chosen and not self.stop():
                    yield from self._solve_together(chosen, shuffled)
            for row in left:
                if row in linear or self.stop():
                    continue
                yield Step(f"{row.params.choice.label}, {row.params.input} (solved one by one)")
                try:
                    found = self._searched_row(row)
                except Exception as problem:  # noqa: BLE001 - whatever it is, the other rows are worth having
                    failure = describe_failure(problem, self.session.device)
                    found = SampledRow(row.key, failure.status, failure.reason, row.params)
                if found is not None:
                    self.known[row.key] = found
                    yield Step(row.key, save=True)

    @property
    def plan_lines(self) -> list[str]:
        """The plan in words."""
        number, positions = self.config.samples, self.config.rows_of_data
        lines = [f"plan: {len(self.planned)} rows, {number} convolutions and inputs ({positions} positions)"]
        return lines + [f"  {row.key}" + (f"  invalid: {row.reason}" if row.reason else "") for row in self.planned]

    def take_into(self, document: Document) -> None:
        super().take_into(document)
        document.fits = tuple(fits(self.results))

    # ------------------------------------------------------------------------------------------------------- samples

    def _sample(self, law: InputLaw) -> _Inputs:
        """S inputs of ``law``, met only through their patches."""
        config = self.config
        spec: Any = self._standard
        moments = PatchMoments(
            config.in_channels,
            spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dtype=self._dtype,
            device=self.session.device,
        )
        energy = 0.0
        shape = (config.in_channels, *config.size)
        at_once = max(1, CHUNK_NUMBERS // math.prod(shape))
        generator = torch.Generator(device="cpu").manual_seed(self._seeds(f"inputs:{law.name}"))
        for start in range(0, config.samples, at_once):
            if self.stop():
                break
            x = draw_inputs(law, (min(at_once, config.samples - start), *shape), generator)
            energy += float(x.square().sum())
            moments.add(x)
        return _Inputs(moments.total / config.samples, energy / config.samples)

    def _rows_of(self, row: int) -> Tensor:
        """Output channel ``row`` of all convolutions: (S, nK)."""
        return he_rows(row, self.config.samples, self._fan_in, self._seeds, self._dtype).to(self.session.device)

    @property
    def _fan_in(self) -> int:
        """nK."""
        return self._standard.kernel_positions * self.config.in_channels

    @functools.cached_property
    def _convolutions(self) -> Tensor:
        """The first S' convolutions: (S', m, n, kh, kw)."""
        config = self.config
        some = [self._rows_of(row)[: config.search_samples] for row in range(config.out_channels)]
        kernel = as_pair("kernel_size", self._standard.kernel_size)
        return torch.stack(some, dim=1).reshape(-1, config.out_channels, config.in_channels, *kernel)

    # ----------------------------------------------------------------------------------------------- linear variants

    def _solve_together(self, rows: list[SampledRow], shuffled: bool) -> Iterator[Step]:
        """The linear variants of one order of the outputs, all convolutions, inputs and N in one pass."""
        assigned = shuffled_rows if shuffled else contiguous_rows
        at_hand = {n: [row for row in rows if row.params.groups == n] for n in sorted({r.params.groups for r in rows})}
        m = self.config.out_channels
        sums = {row.key: _Sums() for row in rows}
        for share, complete in group_moments(self._rows_of, {n: assigned(m, n) for n in at_hand}, m):
            for found in complete:
                self._add_group(found, at_hand[found.groups], sums)
            yield Step(f"{self.config.samples} convolutions{', shuffled' if shuffled else ''}", share)
            if self.stop():
                return
        for row in rows:
            self.known[row.key] = self._linear_row(row, sums[row.key])
        yield Step("errors", save=True)

    def _add_group(self, found: GroupMoment, rows: list[SampledRow], sums: dict[str, _Sums]) -> None:
        """Add one complete output group to the sums of every row that has it."""
        weights = float(found.matrix.trace())
        for name in dict.fromkeys(row.params.input for row in rows):
            mine = [row for row in rows if row.params.input == name]
            inputs = self._inputs[name]
            moment = inputs.moment
            output = inner_product(moment, found.matrix)
            for row in mine:
                sums[row.key].weights += weights
                sums[row.key].output += output
            if found.groups == 1:
                continue  # the standard convolution itself: nothing is lost
            with_means = any(SEES_MEAN[row.params.variant] for row in mine)
            factors = explained(moment, found.group, found.groups, with_mean=with_means)
            factor, first = factors.factor, len(factors.own)
            kept = ((factor @ found.matrix) * factor).sum(1)
            energy = factor.square().sum(1)
            spread = squared_norms(moment, factors) if found.group < SPREAD_GROUPS else None
            for row in mine:
                total, with_mean = sums[row.key], SEES_MEAN[row.params.variant]
                end = len(factor) if with_mean else first
                total.error += max(0.0, output - float(kept[:end].sum()))
                total.trace += float(moment.trace()) - float(energy[:end].sum())
                if spread is not None:
                    total.squares.append(spread[with_mean])
                if with_mean:
                    total.construction += outside(inputs.centred(found.groups), found.matrix, found.group, found.groups)
                else:
                    total.construction += outside(moment, found.matrix, found.group, found.groups, output)

    def _linear_row(self, row: SampledRow, total: _Sums) -> SampledRow:
        number, m, size = self.config.samples, self.config.out_channels, self._fan_in
        energy = self._inputs[row.params.input].energy
        error, weights = total.error / number, total.weights / number
        # w S w^T of a Gaussian row w ~ N(0, s^2 I) has variance 2 s^4 tr S^2, so a convolution's error has variance
        # 2 s^4 m mean_k(tr S_k^2): known, where a sample's own spread would only estimate it.
        s2 = 2 / size
        variance = 2 * s2**2 * m * statistics.fmean(total.squares) if total.squares else 0.0
        covariance = 2 * s2**2 * m * total.trace / row.params.groups  # of the error and ||W||^2
        relative_variance = 0.0
        if error > 0:
            relative_variance = (
                variance / error**2 + 2 * s2**2 * m * size / weights**2 - 2 * covariance / (error * weights)
            )
        relative = error / (weights * energy)
        return self._finished(
            row,
            error=error,
            error_se=math.sqrt(variance / number),
            relative_error=relative,
            relative_error_se=relative * math.sqrt(max(0.0, relative_variance) / number),
            output_relative_error=total.error / total.output,
            construction_relative_error=total.construction / (total.weights * energy),
        )

    # -------------------------------------------------------------------------------------------------- other variants

    def _searched_row(self, row: SampledRow) -> SampledRow | None:
        """A variant that is no linear space: each of the first S' convolutions by its own projection.

        None where it was stopped in between.
        """
        layer, choice, inputs = load_layer(row.params.variant), row.params.choice, self._inputs[row.params.input]
        errors, weights, outputs = [], [], []
        for weight in self._convolutions:
            if self.stop():
                return None
            solved = layer.from_dense(
                weight, choice.groups, rank=choice.rank, projection="least_squares", second_moment=inputs.moment
            )
            lost, flat = (weight - solved.dense_weight()).flatten(1), weight.flatten(1)
            errors.append(inner_product(lost @ inputs.moment, lost))
            outputs.append(inner_product(flat @ inputs.moment, flat))
            weights.append(float(weight.square().sum()))
        error, weight_energy = statistics.fmean(errors), statistics.fmean(weights)
        scale = weight_energy * inputs.energy
        error_se = relative_se = None
        if len(errors) > 1:
            rest = [e - w * error / weight_energy for e, w in zip(errors, weights, strict=True)]
            error_se, relative_se = (statistics.stdev(values) / math.sqrt(len(values)) for values in (errors, rest))
            relative_se /= scale
        return self._finished(
            row,
            error=error,
            error_se=error_se,
            relative_error=error / scale,
            relative_error_se=relative_se,
            output_relative_error=error / statistics.fmean(outputs),
            construction_relative_error=None,
        )

    # ------------------------------------------------------------------------------------------------------------ rows

    def _finished(self, row: SampledRow, *, relative_error: float, **measured: float | None) -> SampledRow:
        """The row with what theory says beside what was measured, and why a number is missing."""
        config, variant, groups = self.config, row.params.variant, row.params.groups
        spec, law = config.spec(row.params.choice), InputLaw.parse(row.params.input)
        general, zero_mean = bounds(variant, groups, spec.kernel_positions, spec.in_channels, law)
        power = SCALING_POWER.get(variant)
        numbers = measured | {
            "relative_error": relative_error,
            "scaled_error": relative_error / (1 - 1 / groups) ** power if power and groups > 1 else None,
            "exact_relative_error": exact_relative_error(spec, config.size, law),
            "limit_relative_error": limit_relative_error(spec, config.size, law),
            "in_sample_factor": 1 - config.unknowns(row.params) / config.rows_of_data,
            "bound_general": general.value,
            "bound_zero_mean": zero_mean.value,
        }
        one = "one convolution has no spread; use --search-samples 2"
        why = {
            "bound_general": general.reason,
            "bound_zero_mean": zero_mean.reason,
            "scaled_error": "1 - 1/N is 0 at N = 1" if power else f"the paper has no power of (1 - 1/N) for {variant}",
            "exact_relative_error": f"no closed form is known for {variant}",
            "construction_relative_error": f"no theorem of the paper constructs {variant}",
            "error_se": one,
            "relative_error_se": one,
        }
        return SampledRow(
            row.key,
            "ok",
            None,
            row.params,
            counts=msgspec.convert(count(spec, *config.size), Counts, from_attributes=True),
            null_reasons={name: reason for name, reason in why.items() if reason and numbers[name] is None},
            **numbers,
        )


def draw_inputs(law: InputLaw, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Inputs of ``law`` (S, n, H, W) in float64, values independent from position to position, on the CPU."""
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    if law.kind == "uniform":
        return torch.rand(shape, **options).mul_(2).sub_(1)
    x = torch.randn(shape, **options)
    if law.kind == "relu":
        return x.clamp_(min=0)
    if law.kind == "factor":
        common = torch.randn((shape[0], 1, *shape[2:]), **options)
        return x.mul_(math.sqrt(1 - law.correlation)).add_(common, alpha=math.sqrt(law.correlation))
    return x.add_(law.mean)


def fits(results: Collection[SampledRow]) -> list[Fit]:
    """Slopes and constants over N for every variant and input of the finished rows, measured and exact."""
    found: dict[tuple[str, str], list[SampledRow]] = {}
    for row in results:
        if row.status == "ok" and row.params.groups > 1 and row.params.rank is None:
            found.setdefault((row.params.variant, row.params.input), []).append(row)
    return [_fit(*at, rows) for at, rows in found.items()]


def _fit(variant: str, law: str, rows: list[SampledRow]) -> Fit:
    closed = {row.params.groups: row.exact_relative_error for row in rows if row.exact_relative_error is not None}
    errors = {row.params.groups: row.relative_error or 0.0 for row in rows}
    # What is known to be exact has no logarithm, whatever rounding leaves of it in this precision.
    measured = fit({n: 0.0 if closed.get(n, 1.0) <= EXACT else error for n, error in errors.items()})
    exact = fit(closed)
    return Fit(
        variant=variant,
        input=law,
        **vars(measured),
        max_scaled_error=max((row.scaled_error for row in rows if row.scaled_error is not None), default=None),
        exact_slope_mean=exact.slope_mean,
        exact_slope_regression=exact.slope_regression,
    )
