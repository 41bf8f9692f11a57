"""What each layer of a converted network loses with copied, white and calibrated weights, a panel a variant and N."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.plots.style import NothingToDraw, Part, handle, label_of, legend, scale_errors, training_title
from bgcbench.results.aggregate import Conversion, Conversions, variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import CalibratedLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# What a layer's weights are, the share that it loses with them, and how its line looks.
WEIGHTS: dict[str, tuple[Callable[[CalibratedLayer], float | None], dict[str, Any]]] = {
    "copied": (
        lambda layer: layer.copied,
        {"color": "#888888", "marker": "s", "markersize": 5.6, "markerfacecolor": "none", "zorder": 3},
    ),
    "white": (lambda layer: layer.before, {"color": "#E69F00", "marker": "D", "markersize": 4.0, "zorder": 3}),
    "calibrated": (lambda layer: layer.after, {"color": "#0072B2", "marker": "o", "markersize": 3.0, "zorder": 4}),
}
LEAST = 0.1  # percent of a layer's output; what loses less stands there
NAMES = 60  # of layers, that have room side by side
NOTE = "Share of each layer's output energy that is lost on images held out, on what the converted network gives it."


def part(document: Document) -> Part:
    cells = [cell for cell in Conversions.of(document).converted if cell.layers]
    cells = [cell for cell in cells if cell.start == cells[-1].start]
    if not cells:
        raise NothingToDraw("calibrated conversions; this result has none")
    at = {(cell.variant, cell.groups): cell for cell in cells}
    variants = sorted({cell.variant for cell in cells}, key=variant_place)
    groups = sorted({cell.groups for cell in cells})
    every = [layer for cell in cells for layer in cell.layers]
    names = list(dict.fromkeys(layer.name for layer in every))
    shares = [share(layer) for layer in every for share, _ in WEIGHTS.values()]
    losses = [_percent(share) for share in shares if share is not None]
    spelt = len(names) * len(variants) <= NAMES
    notes = [
        NOTE,
        "Mean over the seeds." if any(len(cell.calibrations) > 1 for cell in cells) else "",
        "Hollow: calibrated on few images for as many weights." if any(layer.scarce for layer in every) else "",
        f"Less than {LEAST:g} % stands at {LEAST:g} %." if min(losses) <= LEAST else "",
        "" if spelt else f"Layers in the order in which they run, from {names[0]} to {names[-1]}.",
    ]

    def paint(panel: SubFigure) -> None:
        grid = panel.subplots(len(groups), len(variants), squeeze=False, sharex=True, sharey=True)
        training_title(panel, document, "What a layer loses when it is converted")
        for line, n in zip(grid, groups, strict=True):
            for axes, variant in zip(line, variants, strict=True):
                axes.set_title(f"{label_of(variant)}, N = {n}")
                if (variant, n) in at:
                    _panel(axes, names, at[variant, n], 1.0 if spelt else 0.6)
                else:
                    axes.set_axis_off()
            line[0].set_ylabel("output lost (%)")
        scale_errors(grid[0, 0], losses)
        grid[0, 0].set_xlim(0.3, len(names) + 0.7)
        for axes in grid[-1]:
            if spelt:
                texts = [printable(name) for name in names]
                axes.set_xticks(range(1, len(names) + 1), texts, rotation=90, fontsize=6.5)
            else:
                axes.set_xlabel("layer")
        legend(panel, [handle(grid[0, 0], name, linewidth=1.0, **look) for name, (_, look) in WEIGHTS.items()], notes)

    return Part(1.5 * len(groups) + (2.2 if spelt else 1.3), paint)


def _percent(share: float) -> float:
    return max(100 * share, LEAST)


def _panel(axes: Axes, names: Sequence[str], cell: Conversion, size: float) -> None:
    """The layers of a cell along the network, means over the seeds, with markers ``size`` times as large."""
    for weights, (share, usual) in WEIGHTS.items():
        look = {**usual, "markersize": size * usual["markersize"], "linewidth": 1.0}
        known = [(layer.name, share(layer), layer.scarce) for layer in cell.layers]
        means: dict[int, float] = {}
        for place, name in enumerate(names, start=1):
            if shares := [lost for at, lost, _ in known if at == name and lost is not None]:
                means[place] = _percent(statistics.fmean(shares))
        axes.plot([*means], [*means.values()], label=f"_{weights}", **look)
        if weights == "calibrated":
            scarce = {names.index(name) + 1 for name, _, few in known if few}
            few = [place for place in means if place in scarce]
            hollow = {**look, "linestyle": "none", "markerfacecolor": "white", "zorder": 5}
            axes.plot(few, [means[place] for place in few], label="_scarce", **hollow)
