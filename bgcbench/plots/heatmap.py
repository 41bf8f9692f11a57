"""The share of each layer's output that is lost, as maps of layers and of what they become."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import SubFigure
from matplotlib.ticker import FixedLocator, NullLocator

from bgcbench.plots.style import NothingToDraw, Paint, grid_of, label_of, layer_axis, legend, title, training_title
from bgcbench.results.aggregate import Conversions, variant_place
from bgcbench.results.document import Document, shortened
from bgcbench.results.rows import CalibratedLayer, CellKey, LayerRow
from bgcbench.theory.fits import EXACT

COLOURS, EMPTY = "cividis", "#e6e6e6"  # of the map, and of its cells without a number
LEAST, MOST = 0.1, 100.0  # percent, at the ends of the colours
DARK = 0.465  # of the way from the one to the other: up to here white reads better than black
WRITTEN = 44, 30  # columns and rows up to which cells have room for their numbers
NOTE = "Share of each layer's output energy that is lost on images held out, with calibrated weights."
HOLES = "-: N or the rank does not fit the layer's channels, or the layer was not computed."
WEIGHTS: dict[str, Callable[[CalibratedLayer], float | None]] = {
    "copied": lambda layer: layer.copied,
    "white": lambda layer: layer.before,
    "calibrated": lambda layer: layer.after,
}
OWN = "Share of each layer's output energy that is lost on images held out, on what the converted network gives it."
Lost = Mapping[tuple[CellKey, str], float]  # percent, by cell and layer


def of_approx(document: Document) -> Paint:
    """What each layer of a network loses."""
    rows = [row for row in document.results if isinstance(row, LayerRow) and row.params.variant != "standard"]
    lost = {
        (row.params.cell, row.params.layer): 100 * row.output_relative_error.calibrated
        for row in rows
        if row.output_relative_error
    }
    if not lost:
        raise NothingToDraw("finished rows of a network's layers (approx --model); this result has none")

    def paint(panel: SubFigure) -> None:
        p = rows[0].params
        weights = "untrained" if p.weights == "none" else f"weights {p.weights}"
        about = f"{p.model} ({shortened(weights, 50)}), {p.calibration_images} images of {p.data}"
        title(panel, document, "What each layer loses", about)
        layers = list(dict.fromkeys(row.params.layer for row in rows))
        draw(panel, {"": lost}, {row.params.cell for row in rows}, layers, [NOTE])

    return paint


def of_transfer(document: Document) -> Paint:
    """What each layer of a converted network loses with copied, white and calibrated weights."""
    cells = [cell for cell in Conversions.of(document).converted if cell.layers]
    at: dict[CellKey, list[CalibratedLayer]] = {c.asked: c.layers for c in cells if c.start == cells[-1].start}
    if not at:
        raise NothingToDraw("calibrated conversions; this result has none")
    names = _in_order([layer.name for layer in layers] for layers in at.values())
    few = any(layer.scarce for layers in at.values() for layer in layers)
    notes = [
        OWN,
        "Mean over the seeds." if any(len(cell.calibrations) > 1 for cell in cells) else "",
        "Some are calibrated on few images for as many weights: see the notes of the table." if few else "",
    ]
    maps = {}
    for name, loss in WEIGHTS.items():
        known = {
            (cell, layer): [lost for each in layers if each.name == layer and (lost := loss(each)) is not None]
            for cell, layers in at.items()
            for layer in names
        }
        maps[name] = {place: 100 * statistics.fmean(lost) for place, lost in known.items() if lost}

    def paint(panel: SubFigure) -> None:
        training_title(panel, document, "What a layer loses when it is converted")
        draw(panel, maps, {*at}, names, notes)

    return paint


def draw(
    panel: SubFigure, maps: Mapping[str, Lost], cells: set[CellKey], layers: Sequence[str], notes: Sequence[str]
) -> None:
    """A map by title, side by side: a line for each of ``cells``, a column a layer, one scale of colours."""
    lines = sorted(cells, key=lambda cell: (variant_place(cell[0]), cell[2] is not None, cell[1], cell[2] or 0))
    order, drawn = "", {}
    for axes, name in grid_of(panel, [[*maps]], "", ""):
        drawn[name] = [[maps[name].get((cell, layer), math.nan) for layer in layers] for cell in lines]
        image = _map(axes, drawn[name], len(layers) * len(maps))
        axes.set_title(name)
        axes.set_yticks(range(len(lines)), [label_of(*cell) for cell in lines], fontsize=min(8.0, 140 / len(lines)))
        for number, (above, below) in enumerate(itertools.pairwise(lines)):
            if above[0] != below[0]:
                axes.axhline(number + 0.5, color="white", linewidth=2.5)
        order = layer_axis(axes, layers, len(maps))
    values = [value for table in drawn.values() for line in table for value in line]
    holes = any(map(math.isnan, values))
    low, high = (any(value < LEAST for value in values), any(value > MOST for value in values))
    ax: Any = panel.axes
    bar = panel.colorbar(image, ax=ax, label="output error (%)", aspect=25, pad=0.02,
                         extend=("neither", "min", "max", "both")[low + 2 * high])  # fmt: skip
    bar.ax.yaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3, 10, 30, 100]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter("{x:g}")
    outline: Any = bar.outline
    outline.set_visible(False)
    legend(panel, {}, [*notes, HOLES if holes else "", order])


def _map(axes: Axes, cells: Sequence[Sequence[float]], columns: int) -> Any:
    """The cells (percent) of one map, with their numbers where they have room; columns: of all maps."""
    norm = LogNorm(LEAST, MOST)
    shown = [[max(value, LEAST) for value in line] for line in cells]
    image = axes.imshow(shown, cmap=COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_facecolor(EMPTY)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns <= WRITTEN[0] and len(cells) <= WRITTEN[1]:
        size = min(7.5, 250 / columns, 180 / len(cells))
        for i, line in enumerate(cells):
            for j, value in enumerate(line):
                colour = "white" if norm(max(value, LEAST)) < DARK else "black"
                axes.text(j, i, percent(value), ha="center", va="center_baseline", color=colour, fontsize=size)
    return image


def percent(value: float) -> str:
    """A cell's number: 47, 4.7, <0.1, 0, or - where there is none."""
    if math.isnan(value):
        return "-"
    if value <= 100 * EXACT:
        return "0"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _in_order(cells: Iterable[Sequence[str]]) -> list[str]:
    """The layers of all cells as they run in the network; a cell, such as a plan's, may have some of them only."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for names in cells:
        own = list(dict.fromkeys(names))  # of several seeds
        for name, before in zip(own, [[], *([name] for name in own)], strict=False):
            order.add(name, *before)
    return list(order.static_order())
