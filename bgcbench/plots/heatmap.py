"""The share of each layer's output that is lost, by layer and N, a panel a variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.plots.style import NothingToDraw, Part, grid_of, label_of, legend, title, wrapped
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import CellKey, LayerRow
from bgcbench.theory.fits import EXACT

COLOURS, EMPTY = "cividis", "#e6e6e6"  # of the map, and of its cells without a number
DARK = 46.5  # percent, below which white reads better on the map's colours than black
ACROSS = 12  # cells side by side
NOTE = "Share of each layer's output energy that is lost on images held out, with calibrated weights."
HOLES = "-: N or the rank does not fit the layer's channels, or the layer was not computed."


def part(document: Document) -> Part:
    rows = [row for row in document.results if isinstance(row, LayerRow) and row.params.variant != "standard"]
    lost = {
        (row.params.cell, row.params.layer): row.output_relative_error.calibrated
        for row in rows
        if row.output_relative_error
    }
    if not lost:
        raise NothingToDraw("finished rows of a network's layers (approx --model); this result has none")
    layers = list(dict.fromkeys(row.params.layer for row in rows))
    panels = _panels(rows)
    places = wrapped(panels, max(1, ACROSS // max(len(cells) for _, _, cells in panels)))
    holes = len(lost) < len(layers) * sum(len(cells) for _, _, cells in panels)

    def paint(panel: SubFigure) -> None:
        p = rows[0].params
        weights = "untrained" if p.weights == "none" else f"weights {p.weights}"
        title(panel, document, f"Error of {p.model} ({weights}) by layer", f"{p.calibration_images} images of {p.data}")
        grid = grid_of(panel, places, "N", "", sharex=len({unit for _, unit, _ in panels}) < 2)
        for axes, (variant, unit, cells) in grid:
            image = _cells(axes, [[100 * lost.get((cell, layer), math.nan) for cell in cells] for layer in layers])
            axes.set_title(label_of(variant))
            axes.set_xticks(range(len(cells)), [str(rank or n) for _, n, rank in cells])
            axes.set_xlabel(unit if unit != "N" else axes.get_xlabel())
            axes.set_yticks(range(len(layers)), [printable(layer) for layer in layers])
        ending = "max" if max(lost.values()) > 1 else "neither"
        ax: Any = panel.axes
        bar = panel.colorbar(image, ax=ax, label="output error (%)", aspect=30, pad=0.02, extend=ending)
        outline: Any = bar.outline
        outline.set_visible(False)
        legend(panel, {}, [NOTE, HOLES if holes else ""])

    return Part(len(places) * (0.3 + max(len(layers), 5) / 12), paint)


def _panels(rows: Sequence[LayerRow]) -> list[tuple[str, str, list[CellKey]]]:
    """Variant, what its columns are, and those: every N of the rows, or the ranks."""
    panels = []
    every = {row.params.cell for row in rows}
    ranks = {at for at in every if at[2] is not None}
    for unit, some in (("N", every - ranks), ("rank", ranks)):
        asked = sorted({at[1:] for at in some})
        variants = sorted({at[0] for at in some}, key=variant_place)
        panels += [(variant, unit, [(variant, *numbers) for numbers in asked]) for variant in variants]
    return panels


def _cells(axes: Axes, cells: Sequence[Sequence[float]]) -> Any:
    """The cells (percent) of one panel, each with its number on it."""
    image = axes.imshow(cells, cmap=COLOURS, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.set_facecolor(EMPTY)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            colour = "white" if value < DARK else "black"
            axes.text(j, i, percent(value), ha="center", va="center", color=colour, fontsize=7.5)
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
