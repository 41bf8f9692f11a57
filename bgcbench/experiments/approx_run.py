"""Computes the rows of ``bgcbench approx``: errors of sampled convolutions, exact values and bounds beside them.

E of (5.1) is (1/S) sum over convolutions of min over V of (1/S) sum over inputs of ||Wx - Vx||^2. All convolutions see
the same inputs, so the inputs' patch moment M is formed once, the residual form S_k = M - H^T H of each group once, and
the convolutions enter through the second moments of their rows: E = (1/S) sum_k <S_k, G_k>.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bgcbench.experiments.approx import ApproxConfig, ApproxRow, counts_of, few_rows, unknowns
from bgcbench.experiments.base import Run
from bgcbench.experiments.config import RunConfig
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.session import Session, open_device
from bgcbench.measure.device import (
    DTYPES,
    backend_state,
    describe_failure,
)
from bgcbench.results import DONE, Json
from bgcbench.specs import LINEAR, VARIANTS, as_pair, load_layer
from bgcbench.theory.bounds import SCALING_POWER, bounds
from bgcbench.theory.exchangeable import exact_relative_error
from bgcbench.theory.fits import EXACT, fit
from bgcbench.theory.inputs import InputLaw
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
class Step:
    """What the run is at: ``doing`` for people, ``done`` (0 to 1) where it is known, save: whether rows are new."""

    doing: str
    done: float | None = None
    save: bool = False


@dataclass(frozen=True)
class _Inputs:
    """One law's sample: M = (1/S) sum u u^T over inputs and positions, and (1/S) sum ||x||^2."""

    law: InputLaw
    moment: Tensor
    energy: float


@dataclass
class _Sums:
    """What the groups of one variant, N and input add up to, over all convolutions."""

    error: float = 0.0
    construction: float = 0.0
    weights: float = 0.0  # sum ||W||^2
    output: float = 0.0  # sum ||Wx||^2
    trace: float = 0.0  # sum over groups of tr S_k
    squares: list[float] = field(default_factory=list)  # tr S_k^2 of some groups


class ApproxRun(Run):
    """One run over ``rows``; ``results`` are the finished ones at any time, :func:`fits` their slopes."""

    config: ApproxConfig

    def __init__(
        self,
        config: ApproxConfig,
        session: Session,
        rows: list[ApproxRow],
        *,
        kept: Mapping[str, Json] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.session, self.rows, self.stop = config, session, rows, stop
        self.done: dict[str, Json] = {key: row for key, row in (kept or {}).items() if row["status"] in DONE}
        self.warnings = few_rows(config, rows)
        self._dtype = DTYPES[config.precision]

    def run(self) -> Iterator[Step]:
        """Compute, and say after every step what is new."""
        with backend_state(self.config.precision, self.config.threads), torch.no_grad():
            for row in self.rows:
                if row.invalid:
                    self.done[row.key] = _unknown(row, "invalid", row.invalid)
            open_rows = [row for row in self.rows if row.key not in self.done]
            inputs: dict[str, _Inputs] = {}
            for law in dict.fromkeys(row.law for row in open_rows):
                if self.stop():
                    return
                yield Step(f"inputs {law.name}")
                inputs[law.name] = self._sample(law)
            if self.stop():
                return
            linear = [row for row in open_rows if row.variant in ("standard", *LINEAR)]
            for shuffled in (False, True):
                chosen = [row for row in linear if (row.variant == "shuffle") == shuffled]
                if chosen and not self.stop():
                    yield from self._solve_together(chosen, inputs, shuffled)
            for row in open_rows:
                if row not in linear and not self.stop():
                    yield Step(f"{VARIANTS[row.variant].label} N={row.groups}, {row.law.name} (solved one by one)")
                    try:
                        solved = self._solve_apart(row, inputs[row.law.name])
                    except Exception as problem:  # noqa: BLE001 - whatever it is, the other rows are worth having
                        failure = describe_failure(problem, self.session.device)
                        solved = _unknown(row, failure.status, failure.reason)
                    if solved is not None:
                        self.done[row.key] = solved
                        yield Step(row.key, save=True)

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self.rows]

    @property
    def results(self) -> list[Json]:
        return [self.done[key] for key in dict.fromkeys((*self.keys, *self.done)) if key in self.done]

    def take_into(self, document: Json) -> None:
        super().take_into(document)
        document["fits"] = fits(self.results)

    # ------------------------------------------------------------------------------------------------------- samples

    def _seeds(self, part: str) -> int:
        return row_seed(self.config.seed, part)

    def _sample(self, law: InputLaw) -> _Inputs:
        """S inputs of ``law``, met only through their patches."""
        config = self.config
        moments = _patch_moments(config, self._dtype, self.session.device)
        energy = 0.0
        shape = (config.in_channels, *config.size)
        at_once = max(1, CHUNK_NUMBERS // math.prod(shape))
        generator = torch.Generator(device="cpu").manual_seed(self._seeds(f"inputs:{law.name}"))
        for start in range(0, config.number, at_once):
            if self.stop():
                break
            x = draw_inputs(law, (min(at_once, config.number - start), *shape), generator)
            energy += float(x.square().sum())
            moments.add(x)
        return _Inputs(law, moments.total / config.number, energy / config.number)

    def _rows_of(self, row: int) -> Tensor:
        """Output channel ``row`` of all convolutions: (S, nK)."""
        config = self.config
        size = config.spec("standard", 1).kernel_positions * config.in_channels
        drawn = he_rows(row, config.number, size, self._seeds, self._dtype)
        return drawn.to(self.session.device)

    @functools.cached_property
    def _convolutions(self) -> Tensor:
        """The first S' convolutions: (S', m, n, kh, kw)."""
        config = self.config
        some = [self._rows_of(row)[: config.search_samples] for row in range(config.out_channels)]
        kernel = as_pair("kernel_size", config.spec("standard", 1).kernel_size)
        return torch.stack(some, dim=1).reshape(-1, config.out_channels, config.in_channels, *kernel)

    # ----------------------------------------------------------------------------------------------- linear variants

    def _solve_together(self, rows: list[ApproxRow], inputs: Mapping[str, _Inputs], shuffled: bool) -> Iterator[Step]:
        """The linear variants of one order of the outputs, all convolutions, inputs and N in one pass."""
        assigned = shuffled_rows if shuffled else contiguous_rows
        numbers = sorted({row.groups for row in rows})
        m = self.config.out_channels
        sums = {row.key: _Sums() for row in rows}
        at_hand = {number: [row for row in rows if row.groups == number] for number in numbers}
        spread: dict[tuple[str, int], Tensor] = {}
        for share, complete in group_moments(self._rows_of, {n: assigned(m, n) for n in numbers}, m):
            for found in complete:
                self._add_group(found, at_hand[found.groups], inputs, sums, spread)
            yield Step(f"{self.config.number} convolutions{', shuffled' if shuffled else ''}", share)
            if self.stop():
                return
        for row in rows:
            self.done[row.key] = self._linear_record(row, sums[row.key], inputs[row.law.name])
        yield Step("errors", save=True)

    def _add_group(
        self,
        found: GroupMoment,
        rows: list[ApproxRow],
        inputs: Mapping[str, _Inputs],
        sums: dict[str, _Sums],
        centred_moments: dict[tuple[str, int], Tensor],
    ) -> None:
        """Add one complete output group to the sums of every row that has it."""
        weights = float(found.matrix.trace())
        for name in dict.fromkeys(row.law.name for row in rows):
            mine = [row for row in rows if row.law.name == name]
            moment = inputs[name].moment
            output = inner_product(moment, found.matrix)
            for row in mine:
                sums[row.key].weights += weights
                sums[row.key].output += output
            if found.groups == 1:
                continue  # the standard convolution itself: nothing is lost
            factors = explained(moment, found.group, found.groups, with_mean=any(SEES_MEAN[r.variant] for r in mine))
            factor, first = factors.factor, len(factors.own)
            kept = ((factor @ found.matrix) * factor).sum(1)
            energy = factor.square().sum(1)
            spread = squared_norms(moment, factors) if found.group < SPREAD_GROUPS else None
            for row in mine:
                total, with_mean = sums[row.key], SEES_MEAN[row.variant]
                end = len(factor) if with_mean else first
                total.error += max(0.0, output - float(kept[:end].sum()))
                total.trace += float(moment.trace()) - float(energy[:end].sum())
                if spread is not None:
                    total.squares.append(spread[with_mean])
                if not with_mean:
                    total.construction += outside(moment, found.matrix, found.group, found.groups, output)
                    continue
                key = (name, found.groups)
                if key not in centred_moments:
                    centred_moments[key] = centred(moment, found.groups)
                total.construction += outside(centred_moments[key], found.matrix, found.group, found.groups)

    def _linear_record(self, row: ApproxRow, total: _Sums, inputs: _Inputs) -> Json:
        config = self.config
        number, m = config.number, config.out_channels
        error, weights = total.error / number, total.weights / number
        # w S w^T of a Gaussian row w ~ N(0, s^2 I) has variance 2 s^4 tr S^2, so a convolution's error has variance
        # 2 s^4 m mean_k(tr S_k^2): known, where a sample's own spread would only estimate it.
        size = config.spec("standard", 1).kernel_positions * config.in_channels
        s2 = 2 / size
        variance = 2 * s2**2 * m * statistics.fmean(total.squares) if total.squares else 0.0
        covariance = 2 * s2**2 * m * total.trace / row.groups  # of the error and ||W||^2
        relative_variance = 0.0
        if error > 0:
            relative_variance = (
                variance / error**2 + 2 * s2**2 * m * size / weights**2 - 2 * covariance / (error * weights)
            )
        relative = error / (weights * inputs.energy)
        return self._record(
            row,
            error=error,
            error_se=math.sqrt(variance / number),
            relative=relative,
            relative_se=relative * math.sqrt(max(0.0, relative_variance) / number),
            output_relative=total.error / total.output,
            construction=total.construction / (total.weights * inputs.energy),
        )

    # -------------------------------------------------------------------------------------------------- other variants

    def _solve_apart(self, row: ApproxRow, inputs: _Inputs) -> Json | None:
        """A variant that is no linear space: each of the first S' convolutions by its own projection.

        None where it was stopped in between.
        """
        layer = load_layer(row.variant)
        errors, weights, outputs = [], [], []
        for weight in self._convolutions:
            if self.stop():
                return None
            solved = layer.from_dense(weight, row.groups, projection="least_squares", second_moment=inputs.moment)
            lost = (weight - solved.dense_weight()).flatten(1)
            errors.append(inner_product(lost @ inputs.moment, lost))
            flat = weight.flatten(1)
            outputs.append(inner_product(flat @ inputs.moment, flat))
            weights.append(float(weight.square().sum()))
        number = len(errors)
        error, weight_energy = statistics.fmean(errors), statistics.fmean(weights)
        relative = error / (weight_energy * inputs.energy)
        error_se = relative_se = None
        if number > 1:
            error_se = statistics.stdev(errors) / math.sqrt(number)
            rest = [e - w * error / weight_energy for e, w in zip(errors, weights, strict=True)]
            relative_se = statistics.stdev(rest) / math.sqrt(number) / (weight_energy * inputs.energy)
        return self._record(
            row,
            error=error,
            error_se=error_se,
            relative=relative,
            relative_se=relative_se,
            output_relative=error / statistics.fmean(outputs),
            construction=None,
        )

    # --------------------------------------------------------------------------------------------------------- records

    def _record(
        self,
        row: ApproxRow,
        *,
        error: float,
        error_se: float | None,
        relative: float,
        relative_se: float | None,
        output_relative: float,
        construction: float | None,
    ) -> Json:
        config, variant, groups = self.config, row.variant, row.groups
        spec = config.spec(variant, groups)
        general, zero_mean = bounds(variant, groups, spec.kernel_positions, spec.in_channels, row.law)
        exact = exact_relative_error(spec, config.size, row.law)
        power = SCALING_POWER.get(variant)
        reasons: dict[str, str | None] = {"bound_general": general.reason, "bound_zero_mean": zero_mean.reason}
        scaled = None
        if power is None:
            reasons["scaled_error"] = f"the paper has no power of (1 - 1/N) for {variant}"
        elif groups == 1:
            reasons["scaled_error"] = "1 - 1/N is 0 at N = 1"
        else:
            scaled = relative / (1 - 1 / groups) ** power
        if exact is None:
            reasons["exact_relative_error"] = f"no closed form is known for {variant}"
        if construction is None:
            reasons["construction_relative_error"] = f"no theorem of the paper constructs {variant}"
        if error_se is None:
            reasons["error_se"] = reasons["relative_error_se"] = "one convolution has no spread; use --search-samples 2"
        return {
            "key": row.key,
            "params": row.params,
            "status": "ok",
            "reason": None,
            "counts": counts_of(config, variant, groups),
            "error": error,
            "error_se": error_se,
            "relative_error": relative,
            "relative_error_se": relative_se,
            "output_relative_error": output_relative,
            "scaled_error": scaled,
            "exact_relative_error": exact,
            "in_sample_factor": 1 - unknowns(config, variant, groups) / config.rows_of_data,
            "construction_relative_error": construction,
            "bound_general": general.value,
            "bound_zero_mean": zero_mean.value,
            "null_reasons": {name: reason for name, reason in reasons.items() if reason is not None},
        }


def _patch_moments(config: ApproxConfig, dtype: torch.dtype, device: torch.device) -> PatchMoments:
    spec: Any = config.spec("standard", 1)
    return PatchMoments(
        config.in_channels, spec.kernel_size, stride=spec.stride, padding=spec.padding, dtype=dtype, device=device
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


def fits(results: Collection[Json]) -> list[Json]:
    """Slopes and constants for every variant and input of the finished rows, measured and exact."""
    ok = [row for row in results if row["status"] == "ok" and row["params"]["groups"] > 1]
    found = []
    for variant, name in dict.fromkeys((row["params"]["variant"], row["params"]["input"]) for row in ok):
        mine = [r for r in ok if (r["params"]["variant"], r["params"]["input"]) == (variant, name)]
        closed = {
            row["params"]["groups"]: row["exact_relative_error"]
            for row in mine
            if row["exact_relative_error"] is not None
        }
        # What is known to be exact has no logarithm, whatever rounding leaves of it in this precision.
        errors = {row["params"]["groups"]: row["relative_error"] for row in mine}
        measured = fit({n: 0.0 if closed.get(n, 1.0) <= EXACT else error for n, error in errors.items()})
        exact = fit(closed)
        scaled = [row["scaled_error"] for row in mine if row["scaled_error"] is not None]
        found.append(
            {
                "variant": variant,
                "input": name,
                "groups": list(measured.groups),
                "slope_mean": measured.slope_mean,
                "slope_regression": measured.slope_regression,
                "c": measured.c,
                "max_scaled_error": max(scaled, default=None),
                "exact_slope_mean": exact.slope_mean,
                "exact_slope_regression": exact.slope_regression,
                "reason": measured.reason,
            }
        )
    return found


_NUMBERS = (
    "error", "error_se", "relative_error", "relative_error_se", "output_relative_error", "scaled_error",
    "exact_relative_error", "in_sample_factor", "construction_relative_error", "bound_general", "bound_zero_mean",
)  # fmt: skip


def _unknown(row: ApproxRow, status: str, reason: str | None) -> Json:
    """A row without numbers, and why."""
    head: Json = {"key": row.key, "params": row.params, "status": status, "reason": reason, "counts": None}
    return {**head, **dict.fromkeys(_NUMBERS), "null_reasons": {}}
