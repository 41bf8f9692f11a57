"""How every picture looks: sizes, colours, grids of panels, scales, titles and legends."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bgcbench.results.aggregate import Spread, variant_place
from bgcbench.results.document import Document, printable, shortened
from bgcbench.specs import PLAN, VARIANTS, Variant

DPI, SLIDE = 150, (8.0, 4.5)  # inches of a picture, whatever it shows: a slide of 1200 by 675 pixels
PANELS, ACROSS = 6, 3  # of a picture, and side by side, at most
NOTE_LETTERS, BESIDE_LETTERS = 150, 42  # of a note, in a line below a picture or beside it
LAYERS, NAME_LETTERS = 60, 22  # names of layers that have room side by side; letters of one
GREY, BEFORE = "#666666", "#d9d9d9"  # of lines that are no variant's; of bars of what was before
WIDE = 10.0  # how often the least the largest error is from which on their axis is logarithmic
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "figure.titlesize": 9.0,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 7.0,
    "legend.title_fontsize": 7.0,
    "legend.numpoints": 1,
    "legend.handlelength": 1.6,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.2,
    "svg.hashsalt": "bgcbench",
    "text.parse_math": False,  # a folder's name may have $ in it
}

T = TypeVar("T")
Look = dict[str, Any]  # matplotlib's names for how a line and its markers look
Points = Sequence[tuple[float, Spread]]  # a place on the x axis, and what is known there over the seeds


class NothingToDraw(Exception):
    """What a picture needs and the document does not have."""


Paint = Callable[[SubFigure], None]  # what paints a picture, for which all that it needs has been found


def styled() -> AbstractContextManager[None]:
    """matplotlib's own defaults and ours, whatever the user's settings are, for as long as something is drawn."""
    return matplotlib.style.context(STYLE, after_reset=True)


# ------------------------------------------------------------------------------------------------------------ variants


def label_of(variant: str, groups: int = 1, rank: int | None = None) -> str:
    """A variant in legends and titles, with N if it is not 1, or with the rank that was asked for."""
    label = VARIANTS[variant].label if variant in VARIANTS else printable(variant)
    return label if (groups, rank) == (1, None) else f"{label} {asked_of(groups, rank)}"


def asked_of(groups: int, rank: int | None) -> str:
    return f"N = {groups}" if rank is None else f"r = {rank}"


def name_of(variant: str, groups: int, rank: int | None) -> str:
    """What stands at a point: "4", "r=8", "plan"."""
    return PLAN if variant == PLAN else str(groups) if rank is None else f"r={rank}"


FRONT: Look = {"color": GREY, "linewidth": 1}  # the line through what is on it
ON_FRONT: Look = {"fillstyle": "full", "markeredgecolor": "black", "markeredgewidth": 0.8}
PLAN_LOOK = "#882255", "d", 7.0


def look_of(variant: str, **more: Any) -> Look:
    """How a variant's line and markers look in every picture, but for what is given."""
    other = PLAN_LOOK if variant == PLAN else Variant.look
    colour, marker, size = VARIANTS[variant].look if variant in VARIANTS else other
    return {"color": colour, "marker": marker, "markersize": size, "linewidth": 0.9, "zorder": 3 + 1 / size, **more}


def looks_of(variants: Iterable[str], **more: Any) -> dict[str, Look]:
    """For a legend: the looks of ``variants`` by label, in the order of registration."""
    return {label_of(variant): look_of(variant, **more) for variant in sorted({*variants}, key=variant_place)}


def bar_colour(variant: str) -> str:
    """Of a bar for what a convolution becomes; grey where it stays."""
    colour: str = look_of(variant)["color"]
    return GREY if variant == "standard" else colour


def bar_looks(variants: Iterable[str]) -> dict[str, Look]:
    """For a legend: the wide bars of what was before, and the narrow ones of what stands there afterwards."""
    looks: dict[str, Look] = {"before": {"color": BEFORE, "linewidth": 7.0, "solid_capstyle": "butt"}}
    for variant in variants:
        label = "stays" if variant == "standard" else label_of(variant)
        looks[label] = {"color": bar_colour(variant), "linewidth": 4.0, "solid_capstyle": "butt"}
    return looks


# --------------------------------------------------------------------------------------------- panels, titles, legends


def most(items: Sequence[T], name: Callable[[T], str]) -> tuple[list[T], str]:
    """As many of ``items`` as have panels, and a note that names the others."""
    gone = items[PANELS:]
    return [*items[:PANELS]], f"No room for {', '.join(map(name, gone))}: see the table." if gone else ""


def wrapped(items: Sequence[T]) -> list[list[T | None]]:
    """``items`` in lines of equal length, at most ``ACROSS``; the last is filled up with None."""
    down = math.ceil(len(items) / ACROSS)
    length = math.ceil(len(items) / down)
    padded = [*items, *[None] * (down * length - len(items))]
    return [padded[length * line : length * (line + 1)] for line in range(down)]


def grid_of(
    panel: SubFigure, places: Sequence[Sequence[T | None]], x: str, y: str, **options: Any
) -> list[tuple[Axes, T]]:
    """A grid of axes, each with its place; where that is None, nothing is.

    x and y name the outermost axes of each column and line. Axes are shared, but for what ``options`` say.
    """
    grid = panel.subplots(len(places), len(places[0]), squeeze=False, **{"sharex": True, "sharey": True, **options})
    pairs = list(zip(grid.flat, itertools.chain(*places), strict=True))
    for axes, place in pairs:
        axes.axison = place is not None
    for line in grid:
        for axes in [axes for axes in line if axes.axison][:1]:
            axes.set_ylabel(y)
            axes.tick_params(labelleft=True)
    for column in grid.T:
        for axes in [axes for axes in column if axes.axison][-1:]:
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)
    return [(axes, place) for axes, place in pairs if place is not None]


def title(panel: SubFigure, document: Document, *lines: str) -> None:
    """The title of a picture, and whether the run was quick or did not end."""
    quick = ", a quick run" if document.quality == "quick" else ""
    state = quick + ("" if document.complete else ", not complete")
    folded = [line for text in lines for line in textwrap.wrap(printable(text), 90, break_long_words=True)]
    panel.suptitle("\n".join(folded) + state)


def training_title(panel: SubFigure, document: Document, what: str) -> None:
    """The network, the data and the trainings under ``what``."""
    rows, params = document.results, document.results[0].params
    epochs = max(row.params.epochs for row in rows)
    # The untouched network has one seed without --control, whatever the conversions have.
    seeds = len({row.params.seed for row in rows if row.params.variant != "standard"} or {r.params.seed for r in rows})
    trained = f"{epochs} epoch{'s' * (epochs > 1)}" if epochs else "no training"
    title(panel, document, what, f"{params.model} on {params.dataset}, {trained}, {seeds} seed{'s' * (seeds > 1)}")


def legend(panel: SubFigure, looks: Mapping[str, Look], notes: Iterable[str], *, beside: bool = False) -> None:
    """The looks by their labels below the axes, or ``beside`` them, under small notes on what is drawn."""
    handles = [Line2D([], [], label=label, **look) for label, look in looks.items()]
    letters = BESIDE_LETTERS if beside else NOTE_LETTERS
    text = "\n".join(textwrap.wrap(printable(" ".join(filter(None, notes))), letters))
    columns = 1 if beside else len(handles) or 1
    place: Any = "outside right lower" if beside else "outside lower center"
    box = panel.legend(handles=handles, loc=place, ncols=columns, title=text)
    box.get_title().set(color=GREY, multialignment="left" if beside else "center")


# --------------------------------------------------------------------------------------------------- lines and scales

# Where the name of a point may stand, in points from it.
MARKED = ((5, 5, "left"), (-5, 5, "right"), (5, -10, "left"), (-5, -10, "right"), (7, -3, "left"), (-7, -3, "right"))


def mark(axes: Axes, x: float, y: float, name: str, colour: str) -> None:
    """The name of a point, at that of its corners where it lies on nothing else (see pictures.lay_out)."""
    dx, dy, side = MARKED[0]
    place: Look = {"xytext": (dx, dy), "textcoords": "offset points", "ha": side}
    axes.annotate(name, (x, y), fontsize=7, color=colour, zorder=5, **place)


def layer_axis(axes: Axes, names: Sequence[str], panels: int = 1) -> str:
    """The layers, at 0, 1, ... along x: their names where all panels have room, or a note on their order."""
    if len(names) * panels <= LAYERS:
        shown = [shortened(printable(name), NAME_LETTERS) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=6.5)
        return ""
    axes.set_xlabel("layer")
    return f"Layers in the order in which they run, from {names[0]} to {names[-1]}."


def spread_line(axes: Axes, variant: str, points: Points, label: str, floor: float = 0.0, **look: Any) -> None:
    """Means joined by a line, each with one standard deviation up and down; nothing is drawn below ``floor``."""
    means = [max(spread.mean, floor) for _, spread in points]
    axes.plot([x for x, _ in points], means, label=label, **look_of(variant, **look))
    for (x, spread), mean in zip(points, means, strict=True):
        if spread.sd:
            ends = [[min(spread.sd, mean - floor) if floor else spread.sd], [spread.sd]]
            axes.errorbar(x, mean, ends, color=look_of(variant)["color"], linewidth=0.9, capsize=2, zorder=2.5)


def scale_errors(axes: Axes, errors: Iterable[float], spreads: Iterable[Spread] = (), floor: float = 0.0) -> None:
    """The axis of errors (percent) and the bars of ``spreads``, none below ``floor``.

    Logarithmic if errors span more than ``WIDE``.
    """
    shown = [max(error, floor) for error in errors]
    bars = [spread.mean + sign * spread.sd for spread in spreads if spread.sd is not None for sign in (-1, 1)]
    ends = [max(end, floor) for end in bars]
    low, high = min(shown), max([*shown, *ends])
    if low > 0 and max(shown) / low > WIDE:
        low = min([low, *(end for end in ends if end > low / 2)])
        axes.set_yscale("log")
        room = (high / low) ** 0.06
        axes.set_ylim(low / room, high * room)
        log_ticks(axes.yaxis, [low, high], lambda value: f"{value:g}")
    else:
        low = min([low, *ends])
        room = max(0.08 * (high - low), 0.02 * high, 0.05)
        axes.set_ylim(max(0.0, low - room), high + room)


def scale_params(axes: Axes, params: Sequence[float]) -> None:
    """The axis of parameters, in millions."""
    axes.set_xscale("log")
    room = (max(params) / min(params)) ** 0.08 * 1.02
    axes.set_xlim(min(params) / room, max(params) * room)
    log_ticks(axes.xaxis, params, lambda value: f"{value / 1e6:g}")


def scale_groups(axes: Axes, groups: Iterable[int]) -> None:
    """The axis of N: a tick for each of ``groups``, equal steps for equal factors."""
    shown = sorted(groups)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [str(n) for n in shown])
    axes.minorticks_off()


def log_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str], across: int = 1) -> None:
    """As many ticks of a logarithmic ``axis`` as ``values`` have room for; across: panels side by side."""
    decades = across * math.log10(max(values) / min(values))
    fine, coarse = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5)), ((1, 3), (1,))
    subs = fine[decades >= 0.7] if decades < 2 else coarse[decades >= 6]
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
