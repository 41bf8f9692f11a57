"""What a layer of a converted network loses with copied, white and calibrated weights, a panel for each cell."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from graphlib import TopologicalSorter

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.plots.style import (
    Look,
    NothingToDraw,
    Part,
    asked_of,
    grid_of,
    label_of,
    legend,
    scale_errors,
    training_title,
)
from bgcbench.results.aggregate import Cell, Conversions, variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import CalibratedLayer

Loss = Callable[[CalibratedLayer], float | None]
LOSSES: dict[str, Loss] = {
    "copied": lambda layer: layer.copied,
    "white": lambda layer: layer.before,
    "calibrated": lambda layer: layer.after,
}
LOOKS: dict[str, Look] = {
    "copied": {"color": "#888888", "marker": "s", "markersize": 5.6, "markerfacecolor": "none", "zorder": 3},
    "white": {"color": "#E69F00", "marker": "D", "markersize": 4.0, "zorder": 3},
    "calibrated": {"color": "#0072B2", "marker": "o", "markersize": 3.0, "zorder": 4},
}
LEAST = 0.1  # percent of a layer's output; what loses less stands there
NAMES = 60  # of layers, that have room side by side
NOTE = "Share of each layer's output energy that is lost on images held out, on what the converted network gives it."


def part(document: Document) -> Part:
    cells = [cell for cell in Conversions.of(document).converted if cell.layers]
    at = {(cell.variant, (cell.groups, cell.rank)): cell for cell in cells if cell.start == cells[-1].start}
    if not at:
        raise NothingToDraw("calibrated conversions; this result has none")
    variants, lines = sorted({v for v, _ in at}, key=variant_place), list(dict.fromkeys(asked for _, asked in at))
    every = [layer for cell in at.values() for layer in cell.layers]
    names = _in_order([layer.name for layer in cell.layers] for cell in at.values())
    losses = [_percent(share) for layer in every for loss in LOSSES.values() if (share := loss(layer)) is not None]
    spelt = len(names) * len(variants) <= NAMES
    notes = [
        NOTE,
        "Mean over the seeds." if any(len(cell.calibrations) > 1 for cell in at.values()) else "",
        "Hollow: calibrated on few images for as many weights." if any(layer.scarce for layer in every) else "",
        f"Less than {LEAST:g} % stands at {LEAST:g} %." if min(losses) <= LEAST else "",
        "" if spelt else f"Layers in the order in which they run, from {names[0]} to {names[-1]}.",
    ]

    def paint(panel: SubFigure) -> None:
        training_title(panel, document, "What a layer loses when it is converted")
        places = [[at.get((variant, asked)) for variant in variants] for asked in lines]
        grid = grid_of(panel, places, "" if spelt else "layer", "output lost (%)")
        for axes, cell in grid:
            at_n = "" if cell.planned else f", {asked_of(cell.groups, cell.rank)}"
            axes.set_title(f"{label_of(cell.variant)}{at_n}")
            _panel(axes, names, cell, 1.0 if spelt else 0.6)
            if spelt:
                axes.set_xticks(range(1, len(names) + 1), map(printable, names), rotation=90, fontsize=6.5)
        scale_errors(grid[0][0], losses)
        grid[0][0].set_xlim(0.3, len(names) + 0.7)
        legend(panel, {name: {"linewidth": 1.0, **look} for name, look in LOOKS.items()}, notes)

    return Part(0.6 * len(lines) + (0.5 if spelt else 0.2), paint)


def _in_order(cells: Iterable[Sequence[str]]) -> list[str]:
    """The layers of all cells as they run in the network; a cell, such as a plan's, may have some of them only."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for names in cells:
        own = list(dict.fromkeys(names))  # of several seeds
        for name, before in zip(own, [[], *([name] for name in own)], strict=False):
            order.add(name, *before)
    return list(order.static_order())


def _percent(share: float) -> float:
    return max(100 * share, LEAST)


def _panel(axes: Axes, names: Sequence[str], cell: Cell, size: float) -> None:
    """The layers of a cell along the network, means over the seeds, with markers ``size`` times as large."""
    for weights, loss in LOSSES.items():
        look = {**LOOKS[weights], "markersize": size * LOOKS[weights]["markersize"], "linewidth": 1.0}
        means: dict[int, float] = {}
        for place, name in enumerate(names, start=1):
            known = [share for layer in cell.layers if layer.name == name and (share := loss(layer)) is not None]
            if known:
                means[place] = _percent(statistics.fmean(known))
        axes.plot([*means], [*means.values()], label=f"_{weights}", **look)
    scarce = {names.index(layer.name) + 1 for layer in cell.layers if layer.scarce}
    hollow = {**look, "linestyle": "none", "markerfacecolor": "white", "zorder": 5}
    few = {place: mean for place, mean in means.items() if place in scarce}
    axes.plot([*few], [*few.values()], label="_scarce", **hollow)
