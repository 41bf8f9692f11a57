"""The test error of trained networks: against N and their parameters, and by epoch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator

from bgcbench.plots import style
from bgcbench.results.aggregate import SYNTHETIC, Cell, Spread, spread_of, training_cells, variant_place
from bgcbench.results.document import Document
from bgcbench.specs import VARIANTS

DODGE = 0.1  # octaves of N between two variants of one N, which would hide each other
BESIDE = 1.04  # times the place of a marker: that of its seeds
MARKS = 6  # markers along a curve, about
RANGE = "Lines: mean over the seeds; bands: from the lowest to the highest of them."
HOLLOW = {"markerfacecolor": "none", "linestyle": "none"}

Spreads = dict[Cell, Spread]


def against_size(document: Document) -> style.Paint:
    """Against N and against the parameters."""
    cells = training_cells(document.results)
    spreads = {cell: spread for cell in cells if (spread := spread_of(cell.errors.values()))}
    if not spreads:
        raise style.NothingToDraw("finished trainings on real images; this result has none")
    variants = variants_of(spreads)
    printed = [cell.paper_error for cell in spreads if cell.paper_error is not None]
    repeated = any(spread.n > 1 for spread in spreads.values())
    notes = [
        "Markers: mean over the seeds, which are the dots; bars and band: one standard deviation." if repeated else "",
        "Hollow: what Lee, Park & Lee print." if printed else "",
        "Left: variants of one N stand side by side." if len({*variants} - {"standard"}) > 1 else "",
        "Right: N grows to the left." if sum(not cell.planned for cell in spreads) > 1 else "",
        unfinished(cells),
    ]

    def paint(panel: SubFigure) -> None:
        by_n = [cell for cell in spreads if cell.rank is None and not cell.planned]
        at_groups = {cell: _place(cell, variants_of(by_n)) for cell in by_n}
        by_groups, by_params = panel.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
        style.training_title(panel, document, "Test error after the last epoch")
        _panel(by_groups, spreads, at_groups, seeds=True)
        groups = sorted({cell.groups for cell in at_groups} or {1})
        style.scale_groups(by_groups, groups)
        by_groups.set(xlabel="N", ylabel="test error (%)", xlim=(groups[0] / 2**0.4, groups[-1] * 2**0.4))
        params = {cell: cell.params for cell in spreads if cell.params is not None}
        _panel(by_params, spreads, params, seeds=False)
        if params:
            style.scale_params(by_params, list(params.values()))
        by_params.set_xlabel("parameters (millions)")
        drawn = [error for cell in spreads for error in cell.errors.values()]
        style.scale_errors(by_groups, [*drawn, *printed], spreads.values())
        paper = {"paper": {"color": style.GREY, "marker": "o", "markersize": 6.0, **HOLLOW}} if printed else {}
        style.legend(panel, style.looks_of(variants) | paper, notes)

    return paint


def variants_of(cells: Iterable[Cell]) -> list[str]:
    return sorted({cell.variant for cell in cells}, key=variant_place)


def unfinished(cells: Iterable[Cell]) -> str:
    """A note on the cells of which not every seed has finished."""
    gone = [
        f"{style.label_of(*cell.asked)} ({len(cell.done)} of {len(cell.rows)} seeds)"
        for cell in cells
        if len(cell.done) < len(cell.rows)
    ]
    return f"Not all finished: {', '.join(gone)}." if gone else ""


def _place(cell: Cell, variants: Sequence[str]) -> float:
    """Where a cell stands on the axis of N: beside the others of its N."""
    others = [variant for variant in variants if variant != "standard"]
    steps = 0.0 if cell.dense else others.index(cell.variant) - (len(others) - 1) / 2
    return float(cell.groups * 2 ** (DODGE * steps))


def _panel(axes: Axes, spreads: Spreads, places: Mapping[Cell, float], *, seeds: bool) -> None:
    """The cells at their places: means joined by variant, with their spread and what the paper prints."""
    for variant in variants_of(places):
        cells = sorted((cell for cell in places if cell.variant == variant), key=lambda cell: places[cell])
        style.spread_line(axes, variant, [(places[cell], spreads[cell]) for cell in cells], f"_mean {variant}")
        colour = style.look_of(variant)["color"]
        for cell in cells:
            x, errors = places[cell], list(cell.errors.values())
            if seeds and len(errors) > 1:
                axes.plot(
                    [BESIDE * x] * len(errors), errors, "o", label=f"_seeds {variant}", color=colour, markersize=2.2,
                    alpha=0.6, zorder=2.5,
                )  # fmt: skip
            if cell.paper_error is not None:
                hollow = style.look_of(variant, markeredgewidth=0.9, **HOLLOW)
                axes.plot([x], [cell.paper_error], label=f"_paper {variant}", **hollow)
        if variant == "standard":
            spread = spreads[cells[0]]
            axes.axhline(spread.mean, color=colour, linewidth=0.9, label="_standard", zorder=2)
            if spread.sd is not None:
                low, high = spread.mean - spread.sd, spread.mean + spread.sd
                axes.axhspan(low, high, color=style.GREY, alpha=0.15, linewidth=0, zorder=1.5)


# --------------------------------------------------------------------------------------------------------- by epoch


def by_epoch(document: Document) -> style.Paint:
    """A panel an N; for each variant the mean over the seeds, and their range."""
    cells = training_cells([row for row in document.results if row.params.dataset != SYNTHETIC])
    curves = {cell: curve for cell in cells if (curve := _curve(cell))}
    if not curves:
        raise style.NothingToDraw("test errors by epoch; this result has none")
    planned = [cell for cell in curves if cell.planned]
    everywhere = [*planned, *(cell for cell in curves if cell.dense)]
    asked = list(dict.fromkeys((cell.groups, cell.rank) for cell in curves if cell not in everywhere))
    kept, gone = style.most(asked or [(1, None)], lambda at: style.asked_of(*at))
    places = style.wrapped(kept)
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
        style.legend(panel, looks, [RANGE if repeated else "", unfinished(cells), gone])

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
