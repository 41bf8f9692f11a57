"""The test error by epoch, a panel an N."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from bgcbench.plots import style
from bgcbench.plots.errors import unfinished, variants_of
from bgcbench.results.aggregate import SYNTHETIC, Cell, training_cells
from bgcbench.results.document import Document
from bgcbench.specs import VARIANTS

ACROSS = 3  # panels side by side
MARKS = 6  # markers along a curve, about
NOTE = "Lines: mean over the seeds; bands: from the lowest to the highest of them."


def part(document: Document) -> style.Paint:
    cells = training_cells([row for row in document.results if row.params.dataset != SYNTHETIC])
    curves = {cell: curve for cell in cells if (curve := _curve(cell))}
    if not curves:
        raise style.NothingToDraw("test errors by epoch; this result has none")
    planned = [cell for cell in curves if cell.planned]
    everywhere = [*planned, *(cell for cell in curves if cell.dense)]
    asked = list(dict.fromkeys((cell.groups, cell.rank) for cell in curves if cell not in everywhere))
    kept, gone = style.most(asked or [(1, None)], lambda at: style.asked_of(*at))
    places = style.wrapped(kept, ACROSS)
    every = [error for curve in curves.values() for errors in curve.values() for error in errors]
    repeated = len(every) > sum(map(len, curves.values()))

    def paint(panel: SubFigure) -> None:
        style.training_title(panel, document, "Test error by epoch")
        grid = style.grid_of(panel, places, "epoch", "test error (%)")
        for axes, at in grid:
            for cell, curve in curves.items():
                if (cell.groups, cell.rank) == at or cell in everywhere:
                    _plot(axes, cell.variant, curve)
            axes.set_title("" if planned and not asked else style.asked_of(*at))
        first, _ = grid[0]
        style.scale_errors(first, every)
        first.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        looks = {style.label_of(variant): _look(variant) for variant in variants_of(curves)}
        style.legend(panel, looks, [NOTE if repeated else "", unfinished(cells), gone])

    return paint


def _curve(cell: Cell) -> dict[int, list[float]]:
    """Test errors of all seeds by epoch, of the finished rows or, where there are none, of those that began.

    Only epochs that every one of them has: a mean over fewer would jump where one ends.
    """
    known = [(row, {e.epoch: e.test_error for e in row.epochs if e.test_error is not None}) for row in cell.rows]
    began = [(row, errors) for row, errors in known if errors]
    each = [errors for row, errors in began if row.status == "ok"] or [errors for _, errors in began]
    common = sorted(set.intersection(*map(set, each))) if each else []
    return {epoch: [errors[epoch] for errors in each] for epoch in common}


def _look(variant: str) -> style.Look:
    return style.look_of(variant, markersize=0.65 * style.look_of(variant)["markersize"], linewidth=1.1)


def _plot(axes: Axes, variant: str, curve: dict[int, list[float]]) -> None:
    """The mean over the seeds with a marker now and then, and the band from the lowest to the highest seed."""
    epochs, step = list(curve), max(1, len(curve) // MARKS)
    first = list(VARIANTS).index(variant) * step // len(VARIANTS) if variant in VARIANTS else 0
    means = [statistics.fmean(errors) for errors in curve.values()]
    axes.plot(epochs, means, label=f"_curve {variant}", markevery=(first, step), **_look(variant))
    low, high = [min(errors) for errors in curve.values()], [max(errors) for errors in curve.values()]
    if low != high:
        axes.fill_between(epochs, low, high, color=style.look_of(variant)["color"], alpha=0.15, linewidth=0, zorder=1.5)
