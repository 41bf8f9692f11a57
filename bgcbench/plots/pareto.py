"""The share of the output's energy that is lost against the parameters, with the Pareto front; a panel an input."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import EngFormatter

from bgcbench.plots import style
from bgcbench.plots.sampled import finished, sampled_title, series_of
from bgcbench.plots.style import Look, NothingToDraw, Paint
from bgcbench.results.aggregate import front_of
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import SampledRow

counted = EngFormatter()  # a count at a tick: 500, 20 k, 5 M
NOTE = (
    "Filled: on the Pareto front (nothing cheaper on it is as good within three standard errors). Numbers: N. MACs "
    "grow as parameters do."
)


def part(document: Document) -> Paint:
    """The front of each input."""
    rows = [row for row in finished(document) if row.counts and row.output_relative_error is not None]
    if all(row.params.variant == "standard" for row in rows):
        raise NothingToDraw("finished rows of sampled convolutions; this result has none")
    inputs, gone = style.most(list(dict.fromkeys(row.params.input for row in rows)), str)
    series = [found for found in series_of(rows) if found.input in inputs]

    def paint(panel: SubFigure) -> None:
        sampled_title(panel, document, "What is lost against what it costs")
        places = style.wrapped(inputs)
        errors = [100 * (row.output_relative_error or 0.0) for found in series for row in found.rows]
        costs = [row.counts.params for found in series for row in found.rows if row.counts]
        grid = style.grid_of(panel, places, "parameters", "output error (% of its energy)")
        for axes, name in grid:
            _front_panel(axes, [row for found in series if found.input == name for row in found.rows])
            axes.set_title(f"input: {printable(name)}")
            style.log_ticks(axes.xaxis, costs, counted, len(places[0]))
        room = max(max(errors) - min(errors), 10.0)
        grid[0][0].set_ylim(min(0.0, min(errors) - 0.15 * room), max(errors) + 0.08 * room)
        variants = dict.fromkeys(found.variant for found in series)
        looks = {style.label_of(variant): style.look_of(variant, linestyle="none") for variant in variants}
        looks["Pareto front"] = style.FRONT
        style.legend(panel, looks, [NOTE, "SC: the standard convolution." if "standard" in variants else "", gone])

    return paint


def _front_panel(axes: Axes, rows: Sequence[SampledRow]) -> None:
    points = [(float(row.counts.params), 100 * (row.output_relative_error or 0.0), row) for row in rows if row.counts]
    on_front = front_of(rows, lambda counts: counts.params)
    at: dict[float, list[SampledRow]] = {}
    best: dict[float, float] = {}
    for x, y, row in sorted(points, key=lambda point: point[0]):
        look, place = style.look_of(row.params.variant, linestyle="none", fillstyle="none"), "off"
        if row in on_front:
            at.setdefault(x, []).append(row)
            best[x] = min(y, best.get(x, y))
            look |= {**style.ON_FRONT, "zorder": 1 + look["zorder"]}
            place = "front"
        axes.plot([x], [y], label=f"_{place} {row.key}", **look)
    axes.step([*best], [*best.values()], where="post", zorder=1.5, label="_front", **style.FRONT)
    axes.set_xscale("log")
    axes.margins(x=0.14)
    beside: Look = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right", "va": "top", "linespacing": 1.0}
    for x in sorted(at, reverse=True):
        axes.annotate(_label(at[x]), (x, best[x]), zorder=5, fontsize=7, **beside)


def _label(rows: Sequence[SampledRow]) -> str:
    """Of one place on the front: N or the rank, and of which variant it is where several stand there."""
    cells = [row.params.cell for row in rows]
    numbers = {(groups, rank) for _, groups, rank in cells}
    if len(numbers) == 1 and numbers != {(1, None)}:
        return style.asked_of(*numbers.pop()).removeprefix("N = ")
    return "\n".join(style.label_of(*cell).replace(" N =", "") for cell in cells)
