"""The error against 1 - 1/N, both as logarithms: Figure 1 of Lee, Park & Lee."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import SubFigure

from bgcbench.plots.sampled import by_groups, in_short, lossy, notes_of, sampled_title, series_of
from bgcbench.plots.style import Look, NothingToDraw, Paint, legend
from bgcbench.results.document import Document
from bgcbench.results.rows import Fit

TOUCHING = 0.035  # of the axis, between two ticks


def part(document: Document) -> Paint:
    every = by_groups(document)
    rows = lossy(every)
    if not rows:
        raise NothingToDraw("rows of sampled convolutions with N > 1 and an error above 0; this result has none")
    fits = {(fit.variant, fit.input): fit for fit in document.fits}

    def paint(panel: SubFigure) -> None:
        axes = panel.subplots()
        sampled_title(panel, document, "Error against 1 - 1/N")
        looks: dict[str, Look] = {}
        for series in series_of(rows):
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
        legend(panel, in_short(rows, looks), notes_of(every), beside=True)

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
