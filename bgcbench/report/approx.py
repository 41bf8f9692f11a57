"""The table of an ``approx`` document of sampled convolutions, versus the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bgcbench.report.approx_network import network_report
from bgcbench.report.format import fixed, label_of, milli, percent, scaled, significant
from bgcbench.report.notes import failed_rows, notes
from bgcbench.report.table import Column, Report, Table, flat
from bgcbench.results.aggregate import Pair, at_equal_params, front_of
from bgcbench.results.document import Document
from bgcbench.results.rows import Counts, Fit, LayerRow, SampledParams, SampledRow
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER
from bgcbench.theory.fits import EXACT

SOLVERS = {
    "exact": "itself",
    "schur": "least squares",
    "als": "alternating least squares",
    "partition-search": "search for a partition, least squares",
    "column-search": "inputs by energy, least squares",
}


def approx_report(document: Document) -> Report:
    """The report of sampled convolutions, or with --model of a network's layers."""
    if document.asked.model or any(isinstance(row, LayerRow) for row in document.results):
        return network_report(document, document.results)
    return _sampled_report(document, document.results)


# ------------------------------------------------------------------------------------------------- sampled convolutions


def _sampled_report(document: Document, rows: Sequence[SampledRow]) -> Report:
    marks = _fronts(rows)
    sections = {
        "Slopes of log E against log(1 - 1/N)": [_slope(fit, rows) for fit in document.fits],
        "What this shows": _findings(rows),
    }
    shown = {heading: lines for heading, lines in sections.items() if lines}
    missing = {
        f"{name}: {why}"
        for row in rows
        for name, why in row.null_reasons.items()
        if name.startswith("bound") and "no bound" not in why
    }
    invalid = [f"{row.key}: invalid: {row.reason}" for row in rows if row.status == "invalid"]
    failures = invalid + failed_rows(rows)
    title = [*_title(rows), f"{document.settings.precision}; {document.environment.where}"]
    table = Table(title, sampled_columns(marks), rows, shown)
    return Report([table], notes(document, sorted(missing), failures), [_record(row, marks) for row in rows])


def _title(rows: Sequence[SampledRow]) -> list[str]:
    if not rows:
        return []
    p = rows[0].params
    return [
        f"{p.dims}-D convolutions, kernel {p.kernel}, {p.in_channels} -> {p.out_channels} channels, stride {p.stride}, "
        f"inputs of {' x '.join([str(p.length)] * p.dims)}; He initialisation, S = {p.samples} convolutions and inputs"
    ]


def sampled_columns(marks: Mapping[str, str]) -> list[Column[SampledRow]]:
    return [
        Column("input", lambda row: row.params.input, meaning="Law of the input.", right=False, lead=True),
        Column("variant", lambda row: label_of(row.params.variant), meaning="The variant.", right=False, lead=True),
        Column("N", lambda row: row.params.groups, meaning="Groups.", lead=True),
        Column("params", lambda row: row.counts and row.counts.params, scaled, "Parameters."),
        Column("MACs", lambda row: row.counts and row.counts.macs, scaled, "Multiply-accumulate operations."),
        Column("E", lambda row: row.error, _number(5), "Smallest error (5.1), the mean over the convolutions."),
        Column("Rel.E e-3", lambda row: row, _relative, RELATIVE),
        Column("exact e-3", lambda row: row.exact_relative_error, milli, EXACT_ERROR),
        Column("in sample", _in_sample, fixed(4), IN_SAMPLE),
        Column("proof's weights e-3", lambda row: row.construction_relative_error, milli, PROOF),
        Column("bound e-3", lambda row: row.bound_zero_mean, milli, BOUND),
        Column("general bound", lambda row: row.bound_general, _number(3), GENERAL_BOUND),
        Column("scaled e-3", lambda row: row.scaled_error, milli, "Rel.E / (1 - 1/N)^p."),
        Column("lost", lambda row: row.output_relative_error, percent(2), "E over E||Wx||^2: the share of the output."),
        Column("front", lambda row: marks.get(row.key, ""), meaning=FRONT, right=False),
        Column("found by", _method, meaning=FOUND_BY, right=False),
    ]


RELATIVE = (
    "E over E||W||^2 E||x||^2 (5.3) and ±, its standard error over the convolutions for the given inputs. What the "
    "inputs scatter, all rows of an input share."
)
EXACT_ERROR = "Rel.E of an infinite sample in closed form, border included."
IN_SAMPLE = (
    "Rel.E / (exact (1 - p/(SD))): within a sample the error is low by that factor; an output fits p numbers and sees "
    "SD positions."
)
PROOF = "Rel.E of the construction in the proofs of Theorems 3.5 and 3.6."
BOUND = "(K/n)(1 - 1/N)^p, where p = 1 for GC and 2 for BGC."
GENERAL_BOUND = "K (1 - 1/N)^(p+1)."
FRONT = "Where no other row of the input has fewer params (MACs) without losing more: the Pareto front."
FOUND_BY = (
    "The solver, and for how many convolutions it ran. A search proves no minimum, and its rows hold the number of "
    "convolutions given."
)


def _number(digits: int) -> Any:
    return lambda value: f"{value:.1e}" if 0 < value < 1e-6 else significant(value, digits)


def _relative(row: SampledRow) -> str:
    if row.relative_error is None:
        return row.status
    spread = "" if row.relative_error_se is None else f" ± {milli(row.relative_error_se)}"
    return milli(row.relative_error) + spread


def _in_sample(row: SampledRow) -> float | None:
    """What was measured over what the closed form and the size of the sample lead to expect."""
    if not row.relative_error or not row.exact_relative_error or not row.in_sample_factor:
        return None
    return row.relative_error / (row.exact_relative_error * row.in_sample_factor)


def _method(row: SampledRow) -> str:
    return f"{SOLVERS.get(row.params.solver, row.params.solver)}, {row.params.convolutions}x"


def _fronts(rows: Sequence[SampledRow]) -> dict[str, str]:
    """For each row on a Pareto front of its input, which: error against params, MACs, or both."""
    marks: dict[str, list[str]] = {}
    for mine in _by_input(rows).values():
        on_params = front_of(mine, lambda counts: counts.params)
        on_macs = front_of(mine, lambda counts: counts.macs)
        for title, front in (("params", on_params), ("MACs", on_macs)):
            for row in front:
                marks.setdefault(row.key, []).append(title)
    return {key: ", ".join(titles) for key, titles in marks.items()}


def _by_input(rows: Sequence[SampledRow]) -> dict[str, list[SampledRow]]:
    found: dict[str, list[SampledRow]] = {}
    for row in rows:
        if row.status == "ok":
            found.setdefault(row.params.input, []).append(row)
    return found


def _slope(fit: Fit, rows: Sequence[SampledRow]) -> str:
    name = f"{label_of(fit.variant)}, {fit.input}"
    if fit.slope_mean is None or fit.slope_regression is None or fit.c is None:
        return f"{name}: {fit.reason}"
    line = f"{name}: {fit.slope_mean:.3f} on average, {fit.slope_regression:.3f} by regression"
    if fit.exact_slope_mean is not None:
        line += f" (closed form {fit.exact_slope_mean:.3f}, {fit.exact_slope_regression:.3f})"
    line += f" over N = {', '.join(map(str, fit.groups))}; C of (5.2) {fit.c * 1e3:.3f}e-3"
    power = SCALING_POWER.get(fit.variant)
    if fit.max_scaled_error is not None and power is not None:
        of = "(1 - 1/N)" if power == 1 else f"(1 - 1/N)^{power}"
        line += f"; Rel.E / {of} at most {fit.max_scaled_error * 1e3:.3f}e-3"
    printed = paper.FIGURE_SLOPES.get(fit.variant)
    if printed is not None and fit.input in ("normal", "uniform") and _is_papers(rows):
        line += f"; the paper reads {printed}, and at most {paper.FIGURE_CEILING * 1e3:.2f}e-3"
    return line


def _is_papers(rows: Sequence[SampledRow]) -> bool:
    channels = paper.FIGURE_CHANNELS
    shapes = {(row.params.in_channels, row.params.out_channels, row.params.kernel, row.params.dims) for row in rows}
    return shapes <= {(channels, channels, 3, 1)}


def _findings(rows: Sequence[SampledRow]) -> list[str]:
    """BGC at 2N versus GC at N, and the theorem's weights versus the best ones."""
    lines = []
    for name, mine in _by_input(rows).items():
        at = {(row.params.variant, row.params.groups): row for row in mine}
        pairs: list[Pair[SampledRow]] = [pair for pair in at_equal_params(at) if pair[1].params.variant == "gc"]
        if pairs:
            ratios = [_over(bgc.relative_error, gc.relative_error, bgc, 4) for bgc, gc in pairs if _inexact(gc)]
            lines.append(f"{name}: BGC at 2N over GC at N, equal parameters: {', '.join(ratios)}")
        proofs = [row for (variant, _), row in at.items() if variant == "bgc" and _inexact(row)]
        if proofs:
            ratios = [_over(row.construction_relative_error, row.relative_error, row, 3) for row in proofs]
            lines.append(f"{name}: the weights in the proof of Theorem 3.6 over the best ones: {', '.join(ratios)}")
        if ("bgc", 2) in at:
            error = at["bgc", 2].relative_error
            lines.append(f"{name}: BGC at N=2 can be every standard convolution; its Rel.E is {error:.1e}")
    return lines


def _inexact(row: SampledRow) -> bool:
    return row.relative_error is not None and row.relative_error > EXACT


def _over(ours: float | None, theirs: float | None, row: SampledRow, decimals: int) -> str:
    ratio = f"{ours / theirs:.{decimals}f}" if ours is not None and theirs else "-"
    return f"{ratio} (N={row.params.groups})"


def _record(row: SampledRow, marks: Mapping[str, str]) -> dict[str, Any]:
    numbers = {
        name: value for name, value in flat(row, SampledRow).items() if name not in ("params", "counts", "null_reasons")
    }
    head = {"key": row.key, **flat(row.params, SampledParams), "status": row.status, "reason": row.reason}
    return {**head, **flat(row.counts, Counts), **numbers, "front": marks.get(row.key, "")}
