"""What each layer of a converted network loses with copied, white and calibrated weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from graphlib import TopologicalSorter

from matplotlib.figure import SubFigure

from bgcbench.plots.heatmap import draw
from bgcbench.plots.style import NothingToDraw, Paint, training_title
from bgcbench.results.aggregate import Conversions
from bgcbench.results.document import Document
from bgcbench.results.rows import CalibratedLayer, CellKey

WEIGHTS: dict[str, Callable[[CalibratedLayer], float | None]] = {
    "copied": lambda layer: layer.copied,
    "white": lambda layer: layer.before,
    "calibrated": lambda layer: layer.after,
}
NOTE = "Share of each layer's output energy that is lost on images held out, on what the converted network gives it."


def part(document: Document) -> Paint:
    cells = [cell for cell in Conversions.of(document).converted if cell.layers]
    at: dict[CellKey, list[CalibratedLayer]] = {c.asked: c.layers for c in cells if c.start == cells[-1].start}
    if not at:
        raise NothingToDraw("calibrated conversions; this result has none")
    names = _in_order([layer.name for layer in layers] for layers in at.values())
    few = any(layer.scarce for layers in at.values() for layer in layers)
    notes = [
        NOTE,
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


def _in_order(cells: Iterable[Sequence[str]]) -> list[str]:
    """The layers of all cells as they run in the network; a cell, such as a plan's, may have some of them only."""
    order: TopologicalSorter[str] = TopologicalSorter()
    for names in cells:
        own = list(dict.fromkeys(names))  # of several seeds
        for name, before in zip(own, [[], *([name] for name in own)], strict=False):
            order.add(name, *before)
    return list(order.static_order())
