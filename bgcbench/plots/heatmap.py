"""The share of each layer's output that is lost, by layer and N, a panel a variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.plots.style import NothingToDraw, Part, label_of, legend, title
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import LayerRow
from bgcbench.theory.fits import EXACT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import SubFigure

COLOURS, EMPTY = "cividis", "#e6e6e6"  # of the map, and of its cells without a number
LEGIBLE = 0.179  # relative luminance (WCAG) above which black reads better than white
ACROSS = 12  # cells side by side
NOTE = "Share of each layer's output energy that is lost on images held out, with calibrated weights."
HOLES = "-: N does not fit the layer's channels, or the layer was not computed."


def part(document: Document) -> Part:
    rows = [row for row in document.results if isinstance(row, LayerRow) and row.params.variant != "standard"]
    lost = {
        (row.params.variant, row.params.layer, row.params.groups): row.output_relative_error.calibrated
        for row in rows
        if row.output_relative_error
    }
    if not lost:
        raise NothingToDraw("finished rows of a network's layers (approx --model); this result has none")
    layers = list(dict.fromkeys(row.params.layer for row in rows))
    groups = sorted({row.params.groups for row in rows})
    variants = sorted({row.params.variant for row in rows}, key=variant_place)
    across = max(1, min(len(variants), ACROSS // len(groups)))
    down = math.ceil(len(variants) / across)

    def paint(panel: SubFigure) -> None:
        from matplotlib import colormaps

        grid = panel.subplots(down, across, squeeze=False)
        p = rows[0].params
        weights = "untrained" if p.weights == "none" else f"weights {p.weights}"
        title(panel, document, f"Error of {p.model} ({weights}) by layer", f"{p.calibration_images} images of {p.data}")
        for axes, variant in zip(grid.flat, variants, strict=False):
            cells = [[100 * lost.get((variant, layer, n), math.nan) for n in groups] for layer in layers]
            image = _cells(axes, cells, colormaps[COLOURS])
            axes.set_title(label_of(variant))
            axes.set_xlabel("N")
            axes.set_xticks(range(len(groups)), [str(n) for n in groups])
            names = [printable(layer) for layer in layers] if axes in grid[:, 0] else [""] * len(layers)
            axes.set_yticks(range(len(layers)), names)
        for axes in grid.flat[len(variants) :]:
            axes.set_axis_off()
        ending = "max" if max(lost.values()) > 1 else "neither"
        bar = panel.colorbar(image, ax=grid, label="output error (%)", aspect=30, pad=0.02, extend=ending)
        outline: Any = bar.outline
        outline.set_visible(False)
        legend(panel, [], [NOTE, HOLES if len(lost) < len(layers) * len(groups) * len(variants) else ""])

    return Part(down * (max(0.21 * len(layers), 1.1) + 0.7) + 0.9, paint)


def _cells(axes: Axes, cells: Sequence[Sequence[float]], colours: Colormap) -> Any:
    """The cells (percent) of one panel, each with its number on it."""
    from matplotlib.patches import Rectangle

    image = axes.imshow(cells, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for i, line in enumerate(cells):
        for j, value in enumerate(line):
            colour = "black"
            if math.isnan(value):
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=EMPTY, edgecolor="white"))
            elif luminance(colours(min(value, 100) / 100)) < LEGIBLE:
                colour = "white"
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


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): 0 for black to 1 for white."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
