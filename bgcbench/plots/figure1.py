"""The error against 1 - 1/N, both as logarithms: Figure 1 of Lee, Park & Lee."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bgcbench.plots.sampled import (
    at_log_share,
    exact_curve,
    exact_line,
    finished,
    inputs_of,
    look_on,
    lossy,
    notes_of,
    sampled_title,
    series_of,
)
from bgcbench.plots.style import NothingToDraw, Part, label_of, legend
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import Fit

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

TOUCHING = 0.035  # of the axis, between two ticks


def part(document: Document) -> Part:
    rows = lossy(finished(document))
    if not rows:
        raise NothingToDraw("rows of sampled convolutions with N > 1 and an error above 0; this result has none")
    names, fits = inputs_of(rows), {(fit.variant, fit.input): fit for fit in document.fits}

    def paint(panel: SubFigure) -> None:
        axes, handles = panel.subplots(), []
        sampled_title(panel, document, "Error against 1 - 1/N")
        for at, mine in series_of(rows).items():
            x = [at_log_share(row.params.groups) for row in mine]
            y = [math.log(row.error or 0.0) for row in mine]
            label = f"{label_of(at[0])}, {printable(at[1])}: {_slopes(fits.get(at))}"
            handles += axes.plot(x, y, label=label, **look_on(at, names))
            numbers, curve = exact_curve(at, mine)
            unit = statistics.fmean((row.error or 0.0) / (row.relative_error or 1.0) for row in mine)
            if numbers:
                exact_line(axes, [*map(at_log_share, numbers)], [math.log(unit * e) for e in curve], at, names)
            else:
                colour = handles[-1].get_color()
                axes.plot(x, y, label=f"_join {at[0]}, {at[1]}", color=colour, linewidth=0.6, alpha=0.4)
        groups = _spaced(sorted({row.params.groups for row in rows}))
        axes.set_xticks([at_log_share(n) for n in groups], [str(n) for n in groups])
        axes.set_xlabel("N, spaced as log(1 - 1/N)")
        axes.set_ylabel("log E   (natural; E: output energy an input)")
        legend(panel, handles, notes_of(finished(document)), columns=min(len(names), 3))

    return Part(5.2, paint)


def _slopes(fit: Fit | None) -> str:
    if fit is None or fit.slope_mean is None:
        return "no slope"
    exact = "" if fit.exact_slope_mean is None else f" (exact {fit.exact_slope_mean:.2f})"
    return f"slope {fit.slope_mean:.2f}{exact}"


def _spaced(groups: Sequence[int]) -> list[int]:
    """The last N, and before it those whose ticks do not touch the one after."""
    least = TOUCHING * (at_log_share(groups[-1]) - at_log_share(groups[0]))
    shown = [groups[-1]]
    for n in reversed(groups[:-1]):
        if at_log_share(shown[0]) - at_log_share(n) >= least:
            shown.insert(0, n)
    return shown
