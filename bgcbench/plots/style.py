"""How every picture looks: sizes, colours, scales, titles and legends."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bgcbench.results.aggregate import Spread
from bgcbench.results.document import Document, printable
from bgcbench.specs import VARIANTS, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

DPI, WIDTH = 150, 7.5  # inches: a page's width, and about 900 px of a README
Points = Sequence[tuple[float, Spread]]  # a place on the x axis, and what is known there over the seeds
NOTE_LETTERS = 140  # of a note, in a line
GREY = "#666666"
WIDE = 10.0  # how often the least the largest error is from which on their axis is logarithmic
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "figure.titlesize": 9.0,
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


@dataclass(frozen=True)
class Part:
    """One picture: its height (inches), and what paints it."""

    height: float
    paint: Callable[[SubFigure], None]


class NothingToDraw(Exception):
    """What a picture needs and the document does not have."""


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's settings are, for as long as something is drawn."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update(STYLE)
        yield


def lay_out(drawn: Figure) -> None:
    """Place everything once, to a millionth: the solver adds up in an order that differs from run to run.

    Annotations that would then touch an earlier one are hidden.
    """
    from matplotlib.text import Annotation

    layout: Any = drawn.get_layout_engine()
    layout.set(w_pad=0.06, h_pad=0.06)
    layout.execute(drawn)
    drawn.set_layout_engine("none")
    for axes in drawn.axes:
        place = axes.get_position(original=True)
        place.set_points(place.get_points().round(6))
        axes.set_position(place)
        shown: list[Any] = []
        for text in axes.texts:
            if isinstance(text, Annotation):
                box = text.get_window_extent()
                text.set_visible(not any(box.overlaps(other) for other in shown))
                shown += [box] if text.get_visible() else []


def label_of(variant: str, groups: int = 1) -> str:
    """A variant in legends and titles, with N if it is not 1."""
    label = VARIANTS[variant].label if variant in VARIANTS else printable(variant)
    return label if groups == 1 else f"{label} N = {groups}"


def look_of(variant: str, **more: Any) -> dict[str, Any]:
    """How a variant's line and markers look in every picture, but for what is given."""
    colour, marker, size = VARIANTS[variant].look if variant in VARIANTS else Variant.look
    return {"color": colour, "marker": marker, "markersize": size, "linewidth": 0.9, "zorder": 3 + 1 / size, **more}


def title(panel: SubFigure, document: Document, *lines: str) -> None:
    """The title of a picture, and whether the run was quick or did not end."""
    quick = ", a quick run" if document.quality == "quick" else ""
    state = quick + ("" if document.complete else ", not complete")
    wrapped = [line for text in lines for line in textwrap.wrap(printable(text), 90, break_long_words=True)]
    panel.suptitle("\n".join(wrapped) + state)


def training_title(panel: SubFigure, document: Document, what: str) -> None:
    """The network, the data and the trainings under ``what``."""
    rows, params = document.results, document.results[0].params
    epochs = max(row.params.epochs for row in rows)
    # The untouched network has one seed without --control, whatever the conversions have.
    seeds = len({row.params.seed for row in rows if row.params.variant != "standard"} or {r.params.seed for r in rows})
    trained = f"{epochs} epoch{'s' * (epochs > 1)}" if epochs else "no training"
    ran = f"{params.model} on {params.dataset}, {trained}, {seeds} seed{'s' * (seeds > 1)}"
    title(panel, document, what, ran)


def name_axes(grid: Any, x: str, y: str) -> None:
    """The names and numbers of the axes, at the outermost panels of each line and column that are on."""
    for line in grid:
        for axes in [axes for axes in line if axes.axison][:1]:
            axes.set_ylabel(y)
            axes.tick_params(labelleft=True)
    for column in grid.T:
        for axes in [axes for axes in column if axes.axison][-1:]:
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)


def legend(panel: SubFigure, handles: Sequence[Line2D], notes: Iterable[str], columns: int | None = None) -> None:
    """A legend below the axes, filled by columns, under small notes on what is drawn."""
    text = "\n".join(textwrap.wrap(printable(" ".join(filter(None, notes))), NOTE_LETTERS))
    box = panel.legend(handles=handles, loc="outside lower center", ncols=columns or len(handles) or 1, title=text)
    box.get_title().set(color=GREY, multialignment="center")


def handle(axes: Axes, label: str, **look: Any) -> Line2D:
    """An entry of a legend."""
    return axes.plot([], [], label=label, **look)[0]


def log_ticks(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """As many ticks of a logarithmic ``axis`` as ``values`` have room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    fine, coarse = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5)), ((1, 3), (1,))
    subs = fine[decades >= 0.7] if decades < 2 else coarse[decades >= 4]
    axis.set_major_locator(LogLocator(10, subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def spread_line(axes: Axes, variant: str, points: Points, label: str, floor: float = 0.0, **look: Any) -> None:
    """Means joined by a line, each with one standard deviation up and down; nothing is drawn below ``floor``."""
    means = [max(spread.mean, floor) for _, spread in points]
    axes.plot([x for x, _ in points], means, label=label, **look_of(variant, **look))
    for (x, spread), mean in zip(points, means, strict=True):
        if spread.sd:
            ends = [[min(spread.sd, mean - floor) if floor else spread.sd], [spread.sd]]
            axes.errorbar(x, mean, ends, color=look_of(variant)["color"], linewidth=0.9, capsize=2, zorder=2.5)


def ends_of(spreads: Iterable[Spread]) -> list[float]:
    """Where the bars end."""
    return [spread.mean + sign * spread.sd for spread in spreads if spread.sd is not None for sign in (-1, 1)]


def scale_errors(axes: Axes, errors: Sequence[float], ends: Sequence[float] = ()) -> None:
    """The axis of ``errors`` (percent) and of what bars end at; logarithmic if errors span more than ``WIDE``."""
    low, high = min(errors), max([*errors, *ends])
    if low > 0 and max(errors) / low > WIDE:
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


def counted(value: float) -> str:
    """A count at a tick: 500, 20 k, 5 M."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
