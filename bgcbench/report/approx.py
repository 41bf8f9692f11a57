"""The table of an ``approx`` document of sampled convolutions, versus the theory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bgcbench.report.approx_network import network_report
from bgcbench.report.format import label_of, milli, scaled, significant
from bgcbench.report.notes import failed_rows, notes
from bgcbench.report.table import Column, Report, Table, group_columns, label, row_record, words
from bgcbench.results.aggregate import at_equal_params, front_of
from bgcbench.results.document import Document
from bgcbench.results.rows import Counts, Fit, LayerRow, SampledRow
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER
from bgcbench.theory.fits import EXACT

SOLVERS = {
    "exact": "itself",
    "schur": "least squares",
    "als": "alternating least squares",
    "svd": "singular values",
    "partition-search": "search for a partition, least squares",
    "column-search": "inputs by energy, least squares",
}


def approx_report(document: Document) -> Report:
    """The report of sampled convolutions, or with --model of a network's layers."""
    if document.asked.model or any(isinstance(row, LayerRow) for row in document.results):
        return network_report(document, document.results)
    rows: Sequence[SampledRow] = document.results
    by_input: dict[str, list[SampledRow]] = {}
    for row in rows:
        if row.status == "ok":
            by_input.setdefault(row.params.input, []).append(row)
    marks = _fronts(by_input)
    sections = {
        "Slopes of log E against log(1 - 1/N)": [_slope(fit, rows) for fit in document.fits],
        "What this shows": [line for name, mine in by_input.items() for line in _findings(name, mine)],
    }
    missing = {
        f"{name}: {why}"
        for row in rows
        for name, why in row.null_reasons.items()
        if name.startswith("bound") and "no bound" not in why
    }
    invalid = [f"{row.key}: invalid: {row.reason}" for row in rows if row.status == "invalid"]
    noted = notes(document, sorted(missing), invalid + failed_rows(document))
    table = Table(_title(document, rows), sampled_columns(marks), rows, sections)
    records = [row_record(row, without=("null_reasons",)) | {"front": marks.get(row.key, "")} for row in rows]
    return Report([table], noted, records)


def _title(document: Document, rows: Sequence[SampledRow]) -> list[str]:
    ran = f"{document.settings.precision}; {document.environment.where}"
    if not rows:
        return [ran]
    p = rows[0].params
    about = (
        f"{p.dims}-D convolutions, kernel {p.kernel}, {p.in_channels} -> {p.out_channels} channels, stride {p.stride}, "
        f"inputs of {' x '.join([str(p.length)] * p.dims)}; He initialisation, S = {p.samples} convolutions and inputs"
    )
    return [about, ran]


def sampled_columns(marks: Mapping[str, str]) -> list[Column[SampledRow]]:
    return [
        label("input", lambda row: row.params.input, "Law of the input."),
        label("variant", lambda row: label_of(row.params.variant), "The variant."),
        *group_columns(lambda row: row.params),
        Column("params", lambda row: row.counts and row.counts.params, "Parameters.", scaled),
        Column("MACs", lambda row: row.counts and row.counts.macs, "Multiply-accumulate operations.", scaled, drop=7),
        Column("E", lambda row: row.error, "Smallest error (5.1), the mean over the convolutions.", _tiny(5), drop=6),
        Column("Rel.E e-3", _relative, RELATIVE),
        Column("exact e-3", lambda row: row.exact_relative_error, EXACT_ERROR, milli),
        Column("limit e-3", lambda row: row.limit_relative_error, LIMIT, milli, optional=True, drop=4),
        Column("in sample", _in_sample, IN_SAMPLE, "{:.4f}".format, drop=6),
        Column("proof's weights e-3", lambda row: row.construction_relative_error, PROOF, milli, drop=5),
        Column("bound e-3", lambda row: row.bound_zero_mean, BOUND, milli, drop=3),
        Column("general bound", lambda row: row.bound_general, "K (1 - 1/N)^(p+1).", _tiny(3), drop=8),
        Column("scaled e-3", lambda row: row.scaled_error, "Rel.E / (1 - 1/N)^p.", milli),
        Column("lost", lambda row: row.output_relative_error, LOST, "{:.2%}".format),
        words("front", lambda row: marks.get(row.key, ""), FRONT, drop=2),
        words("found by", _solver, FOUND_BY, drop=9),
    ]


RELATIVE = (
    "E over E||W||^2 E||x||^2 (5.3) and ±, its standard error over the convolutions for the given inputs. What the "
    "inputs scatter, all rows of an input share."
)
EXACT_ERROR = "Rel.E of an infinite sample in closed form, border included."
LIMIT = "Rel.E of low rank on white input, of many channels: the tail of Marchenko and Pastur's law."
IN_SAMPLE = (
    "Rel.E / (exact (1 - p/(SD))): within a sample the error is low by that factor; an output fits p numbers and sees "
    "SD positions."
)
PROOF = "Rel.E of the construction in the proofs of Theorems 3.5 and 3.6."
BOUND = "(K/n)(1 - 1/N)^p, where p = 1 for GC and 2 for BGC."
LOST = "E over E||Wx||^2: the share of the output."
FRONT = "Where no other row of the input has fewer params (MACs) without losing more: the Pareto front."
FOUND_BY = (
    "The solver, and for how many convolutions it ran. A search proves no minimum, and its rows hold the number of "
    "convolutions given."
)


def _tiny(digits: int) -> Callable[[float], str]:
    """So many digits; what may be rounding as a power of ten."""
    return lambda value: f"{value:.1e}" if 0 < value < 1e-6 else significant(value, digits)


def _solver(row: SampledRow) -> str:
    return f"{SOLVERS.get(row.params.solver, row.params.solver)}, {row.params.convolutions}x"


def _relative(row: SampledRow) -> str:
    spread = "" if row.relative_error_se is None else f" ± {milli(row.relative_error_se)}"
    return row.status if row.relative_error is None else milli(row.relative_error) + spread


def _in_sample(row: SampledRow) -> float | None:
    """What was measured over what the closed form and the size of the sample lead to expect."""
    if not row.relative_error or not row.exact_relative_error or not row.in_sample_factor:
        return None
    return row.relative_error / (row.exact_relative_error * row.in_sample_factor)


def _fronts(by_input: Mapping[str, Sequence[SampledRow]]) -> dict[str, str]:
    """For each row on a Pareto front of its input, which: error against params, MACs, or both."""
    costs: dict[str, Callable[[Counts], int]] = {"params": lambda counts: counts.params, "MACs": lambda c: c.macs}
    marks: dict[str, list[str]] = {}
    for mine in by_input.values():
        for title, cost in costs.items():
            for row in front_of(mine, cost):
                marks.setdefault(row.key, []).append(title)
    return {key: ", ".join(titles) for key, titles in marks.items()}


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
    channels = paper.FIGURE_CHANNELS
    shapes = {(row.params.in_channels, row.params.out_channels, row.params.kernel, row.params.dims) for row in rows}
    if printed is not None and fit.input in ("normal", "uniform") and shapes <= {(channels, channels, 3, 1)}:
        line += f"; the paper reads {printed}, and at most {paper.FIGURE_CEILING * 1e3:.2f}e-3"
    return line


def _findings(name: str, rows: Sequence[SampledRow]) -> list[str]:
    """Of the rows of one input: BGC at 2N versus GC at N, and the theorem's weights versus the best ones."""
    at = {(row.params.variant, row.params.groups): row for row in rows if row.params.rank is None}
    pairs = [pair for pair in at_equal_params(at) if pair[1].params.variant == "gc"]
    lines = []
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
