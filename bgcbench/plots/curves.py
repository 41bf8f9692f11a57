"""The test error by epoch, a panel an N."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from bgcbench.plots.errors import unfinished, variants_of
from bgcbench.plots.style import NothingToDraw, Part, handle, label_of, legend, look_of, scale_errors, training_title
from bgcbench.results.aggregate import SYNTHETIC, Cell, training_cells
from bgcbench.results.document import Document
from bgcbench.results.rows import TrainRow
from bgcbench.specs import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

ACROSS = 3  # panels side by side
MARKS = 6  # markers along a curve, about
NOTE = "Lines: mean over the seeds; bands: from the lowest to the highest of them."


def part(document: Document) -> Part:
    cells = training_cells([row for row in document.results if row.params.dataset != SYNTHETIC])
    series = {cell: curve for cell in cells if (curve := _curve(cell))}
    if not series:
        raise NothingToDraw("test errors by epoch; this result has none")
    groups = sorted({cell.groups for cell in series if not cell.dense}) or [1]
    down = math.ceil(len(groups) / ACROSS)
    every = [error for curve in series.values() for errors in curve.values() for error in errors]
    repeated = len(every) > sum(len(curve) for curve in series.values())

    def paint(panel: SubFigure) -> None:
        from matplotlib.ticker import MaxNLocator

        grid = panel.subplots(down, math.ceil(len(groups) / down), squeeze=False, sharex=True, sharey=True)
        training_title(panel, document, "Test error by epoch")
        for axes, n in zip(grid.flat, groups, strict=False):
            for cell, curve in series.items():
                if cell.groups == n or cell.dense:
                    _plot(axes, cell.variant, curve)
            axes.set_title(f"N = {n}")
            axes.label_outer()
        scale_errors(grid[0, 0], every)
        for axes in grid.flat[len(groups) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("test error (%)")
        for axes in grid.flat[max(0, len(groups) - grid.shape[1]) : len(groups)]:  # with no panel below
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        handles = [handle(grid[0, 0], label_of(variant), **_look(variant)) for variant in variants_of(series)]
        legend(panel, handles, [NOTE if repeated else "", unfinished(cells)])

    return Part(2.5 * down + 0.9, paint)


def _curve(cell: Cell[TrainRow]) -> dict[int, list[float]]:
    """Test errors of all seeds by epoch, of the finished rows or, where there are none, of those that began.

    Only epochs that every one of them has: a mean over fewer would jump where one ends.
    """
    known = [(row, {e.epoch: e.test_error for e in row.epochs if e.test_error is not None}) for row in cell.rows]
    began = [(row, errors) for row, errors in known if errors]
    each = [errors for row, errors in began if row.status == "ok"] or [errors for _, errors in began]
    common = sorted(set.intersection(*map(set, each))) if each else []
    return {epoch: [errors[epoch] for errors in each] for epoch in common}


def _look(variant: str) -> dict[str, Any]:
    return look_of(variant, markersize=0.65 * look_of(variant)["markersize"], linewidth=1.1)


def _plot(axes: Axes, variant: str, curve: dict[int, list[float]]) -> None:
    """The mean over the seeds with a marker now and then, and the band from the lowest to the highest seed."""
    epochs, step = list(curve), max(1, len(curve) // MARKS)
    first = list(VARIANTS).index(variant) * step // len(VARIANTS) if variant in VARIANTS else 0
    means = [statistics.fmean(errors) for errors in curve.values()]
    axes.plot(epochs, means, label=f"_curve {variant}", markevery=(first, step), **_look(variant))
    low, high = [min(errors) for errors in curve.values()], [max(errors) for errors in curve.values()]
    if low != high:
        axes.fill_between(epochs, low, high, color=look_of(variant)["color"], alpha=0.15, linewidth=0, zorder=1.5)
