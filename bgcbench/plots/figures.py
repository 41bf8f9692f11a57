"""Figures 1 and 2 of Lee, Park & Lee: the error against 1 - 1/N, both as logarithms, and over (1 - 1/N)^p against N."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.plots import sampled
from bgcbench.plots.sampled import Series, lossy
from bgcbench.plots.style import Look, NothingToDraw, Paint, label_of, legend, scale_groups
from bgcbench.results.document import Document
from bgcbench.results.rows import Fit
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER

TOUCHING = 0.035  # of the axis, between two ticks


def figure1(document: Document) -> Paint:
    """log E against log(1 - 1/N)."""
    every = sampled.by_groups(document)
    rows = lossy(every)
    if not rows:
        raise NothingToDraw("rows of sampled convolutions with N > 1 and an error above 0; this result has none")
    fits = {(fit.variant, fit.input): fit for fit in document.fits}

    def paint(panel: SubFigure) -> None:
        axes = panel.subplots()
        sampled.sampled_title(panel, document, "Error against 1 - 1/N")
        looks: dict[str, Look] = {}
        for series in sampled.series_of(rows):
            label, look = f"{series.label}: {_slopes(fits.get((series.variant, series.input)))}", series.look()
            looks[label] = look
            x = [_log_share(row.params.groups) for row in series.rows]
            y = [math.log(row.error or 0.0) for row in series.rows]
            axes.plot(x, y, label=label, **look)
            unit = statistics.fmean((row.error or 0.0) / (row.relative_error or 1.0) for row in series.rows)
            if not series.draw_exact(axes, _log_share, functools.partial(_log_error, unit)):
                join = f"_join {series.variant}, {series.input}"
                axes.plot(x, y, label=join, color=look["color"], linewidth=0.6, alpha=0.4)
        groups = _spaced(sorted({row.params.groups for row in rows}))
        axes.set_xticks([_log_share(n) for n in groups], [str(n) for n in groups])
        axes.set(xlabel="N, spaced as log(1 - 1/N)", ylabel="log E   (natural; E: output energy an input)")
        legend(panel, sampled.in_short(rows, looks), sampled.notes_of(every), beside=True)

    return paint


def _log_share(groups: float) -> float:
    return math.log(1 - 1 / groups)


def _log_error(unit: float, _: float, relative_error: float) -> float:
    return math.log(unit * relative_error)


def _slopes(fit: Fit | None) -> str:
    if fit is None or fit.slope_mean is None:
        return "no slope"
    exact = "" if fit.exact_slope_mean is None else f" (exact {fit.exact_slope_mean:.2f})"
    return f"slope {fit.slope_mean:.2f}{exact}"


def _spaced(groups: Sequence[int]) -> list[int]:
    """The last N, and before it those whose ticks do not touch the one after."""
    least = TOUCHING * (_log_share(groups[-1]) - _log_share(groups[0]))
    shown = [groups[-1]]
    for n in reversed(groups[:-1]):
        if _log_share(shown[0]) - _log_share(n) >= least:
            shown.insert(0, n)
    return shown


def figure2(document: Document) -> Paint:
    """1000 Rel. E / (1 - 1/N)^p of GC and BGC against N."""
    every = [row for row in sampled.finished(document) if row.params.variant in ("gc", "bgc")]
    if not lossy(every):
        raise NothingToDraw("rows of gc or bgc on sampled convolutions with N > 1; this result has none")
    rows = [row for row in every if row.params.groups > 1]

    def paint(panel: SubFigure) -> None:
        axes = panel.subplots()
        sampled.sampled_title(panel, document, "Error over a power of 1 - 1/N")
        looks: dict[str, Look] = {}
        for series in sampled.series_of(rows):
            looks |= _measured(axes, series) | _constructed(axes, series)
        p = rows[0].params
        if (p.in_channels, p.out_channels, p.kernel) == (paper.FIGURE_CHANNELS, paper.FIGURE_CHANNELS, 3):
            _ceiling(axes)
        axes.margins(y=0.13)
        scale_groups(axes, {row.params.groups for row in rows})
        variants = dict.fromkeys(series.variant for series in sampled.series_of(lossy(rows)))
        powers = ", ".join(f"{SCALING_POWER[variant]} for {label_of(variant)}" for variant in variants)
        axes.set(xlabel="N", ylabel=f"1000 Rel. E / (1 - 1/N)^p,   p = {powers}")
        legend(panel, sampled.in_short(rows, looks), sampled.notes_of(every), beside=True)

    return paint


def _measured(axes: Axes, series: Series) -> dict[str, Look]:
    """Scaled errors with their standard errors, and the exact ones."""
    rows, look, scaled = lossy(series.rows), series.look(), functools.partial(_scaled, series.variant)
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
    known = {n: _scaled(series.variant, n, error) for n, error in errors.items() if error is not None}
    if not known:
        return {}
    label = f"{series.label}: the proof's construction"
    look = series.look(marker="x", markersize=5.0, alpha=0.6, zorder=5)
    axes.plot([*known], [*known.values()], label=label, **look)
    return {label: look}


def _scaled(variant: str, groups: float, error: float) -> float:
    return 1e3 * error / float((1 - 1 / groups) ** SCALING_POWER[variant])


def _ceiling(axes: Axes) -> None:
    """The line that the paper reads from its figure."""
    ceiling = 1e3 * paper.FIGURE_CEILING
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1, label="_ceiling")
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 8), "textcoords": "offset points"}
    axes.annotate(f"paper: all below {ceiling:.2f}e-3", (1, ceiling), ha="right", fontsize=7.5, **place)
