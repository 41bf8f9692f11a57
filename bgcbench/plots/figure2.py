"""The relative error over (1 - 1/N)^p against N, of GC and BGC: Figure 2 of Lee, Park & Lee."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.plots.sampled import Series, finished, in_short, lossy, notes_of, sampled_title, series_of
from bgcbench.plots.style import Look, NothingToDraw, Paint, label_of, legend, scale_groups
from bgcbench.results.document import Document
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER


def part(document: Document) -> Paint:
    every = [row for row in finished(document) if row.params.variant in ("gc", "bgc")]
    if not lossy(every):
        raise NothingToDraw("rows of gc or bgc on sampled convolutions with N > 1; this result has none")
    rows = [row for row in every if row.params.groups > 1]

    def paint(panel: SubFigure) -> None:
        axes = panel.subplots()
        sampled_title(panel, document, "Error over a power of 1 - 1/N")
        looks: dict[str, Look] = {}
        for series in series_of(rows):
            looks |= _measured(axes, series) | _constructed(axes, series)
        p = rows[0].params
        if (p.in_channels, p.out_channels, p.kernel) == (paper.FIGURE_CHANNELS, paper.FIGURE_CHANNELS, 3):
            _ceiling(axes)
        axes.margins(y=0.13)
        scale_groups(axes, {row.params.groups for row in rows})
        variants = dict.fromkeys(series.variant for series in series_of(lossy(rows)))
        powers = ", ".join(f"{SCALING_POWER[variant]} for {label_of(variant)}" for variant in variants)
        axes.set(xlabel="N", ylabel=f"1000 Rel. E / (1 - 1/N)^p,   p = {powers}")
        legend(panel, in_short(rows, looks), notes_of(every), beside=True)

    return paint


def _measured(axes: Axes, series: Series) -> dict[str, Look]:
    """Scaled errors with their standard errors, and the exact ones."""

    def scaled(groups: float, error: float) -> float:
        return 1e3 * error / float((1 - 1 / groups) ** SCALING_POWER[series.variant])

    rows, look = lossy(series.rows), series.look()
    if not rows:
        return {}
    x, y = [row.params.groups for row in rows], [1e3 * (row.scaled_error or 0.0) for row in rows]
    axes.plot(x, y, label=series.label, **look)
    bars = [scaled(row.params.groups, row.relative_error_se or 0.0) for row in rows]
    axes.errorbar(x, y, bars, color=look["color"], linewidth=0.8, linestyle="none", zorder=2.5)
    series.draw_exact(axes, float, scaled)
    return {series.label: look}


def _constructed(axes: Axes, series: Series) -> dict[str, Look]:
    """What the weights in the proof of Theorem 3.6 lose, which are BGC's."""
    errors = {row.params.groups: row.construction_relative_error for row in series.rows if series.variant == "bgc"}
    known = {
        n: 1e3 * error / (1 - 1 / n) ** SCALING_POWER[series.variant]
        for n, error in errors.items()
        if error is not None
    }
    if not known:
        return {}
    label = f"{series.label}: the proof's construction"
    look = series.look(marker="x", markersize=5.0, alpha=0.6, zorder=5)
    axes.plot([*known], [*known.values()], label=label, **look)
    return {label: look}


def _ceiling(axes: Axes) -> None:
    """The line that the paper reads from its figure."""
    ceiling = 1e3 * paper.FIGURE_CEILING
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1, label="_ceiling")
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 8), "textcoords": "offset points"}
    axes.annotate(f"paper: all below {ceiling:.2f}e-3", (1, ceiling), ha="right", fontsize=7.5, **place)
