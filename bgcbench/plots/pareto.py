"""The share of the output's energy that is lost against what a convolution costs, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import EngFormatter

from bgcbench.plots.sampled import finished, sampled_title, series_of
from bgcbench.plots.style import GREY, NothingToDraw, Part, asked_of, grid_of, label_of, legend, log_ticks, look_of
from bgcbench.results.aggregate import front_of
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import Counts, SampledRow

counted = EngFormatter()  # a count at a tick: 500, 20 k, 5 M
Cost = Callable[[Counts], float]
COSTS: dict[str, Cost] = {"parameters": lambda counts: counts.params, "MACs an input": lambda counts: counts.macs}
FILLED = {"fillstyle": "full", "markeredgecolor": "black", "markeredgewidth": 0.8}
NOTE = "Filled: on the Pareto front (nothing cheaper on it is as good within three standard errors). Numbers: N."


def short(document: Document) -> Part:
    """The front of the first input, where there is more to it than GC and BGC."""
    if {row.params.variant for row in finished(document)} <= {"standard", "gc", "bgc"}:
        raise NothingToDraw("another variant than gc and bgc")
    return part(document, inputs=1)


def part(document: Document, inputs: int | None = None) -> Part:
    """The fronts of all inputs, or of the first ``inputs``."""
    rows = [row for row in finished(document) if row.counts and row.output_relative_error is not None]
    if not rows:
        raise NothingToDraw("finished rows of sampled convolutions; this result has none")
    names = list(dict.fromkeys(row.params.input for row in rows))[:inputs]
    series = [found for found in series_of(rows) if found.input in names]

    def paint(panel: SubFigure) -> None:
        sampled_title(panel, document, "What is lost against what it costs")
        places = [[(name, cost) for cost in COSTS] for name in names]
        grid = grid_of(panel, places, list(COSTS), "output error (% of its energy)", sharex="col", sharey="row")
        for axes, (name, cost) in grid:
            _front_panel(axes, [row for found in series if found.input == name for row in found.rows], COSTS[cost])
            if cost == "parameters":
                axes.set_title(f"input: {printable(name)}", loc="left", fontsize=8)
        variants = dict.fromkeys(found.variant for found in series)
        looks = {label_of(variant): look_of(variant, linestyle="none") for variant in variants}
        looks["Pareto front"] = {"color": GREY, "linewidth": 1}
        legend(panel, looks, [NOTE, "SC: the standard convolution." if "standard" in variants else ""])

    return Part(1.1 * len(names), paint)


def _front_panel(axes: Axes, rows: Sequence[SampledRow], cost: Cost) -> None:
    points = [(cost(row.counts), 100 * (row.output_relative_error or 0.0), row) for row in rows if row.counts]
    costs, errors = [x for x, *_ in points], [y for _, y, _ in points]
    on_front = front_of(rows, cost)
    at: dict[float, list[SampledRow]] = {}
    best: dict[float, float] = {}
    for x, y, row in sorted(points, key=lambda point: point[0]):
        look, place = look_of(row.params.variant, linestyle="none", fillstyle="none"), "off"
        if row in on_front:
            at.setdefault(x, []).append(row)
            best[x] = min(y, best.get(x, y))
            look |= {**FILLED, "zorder": 1 + look["zorder"]}
            place = "front"
        axes.plot([x], [y], label=f"_{place} {row.key}", **look)
    axes.step([*best], [*best.values()], where="post", color=GREY, linewidth=1, zorder=1.5, label="_front")
    axes.set_xscale("log")
    axes.margins(x=0.14)
    room = max(max(errors) - min(errors), 10.0)
    axes.set_ylim(min(0.0, min(errors) - 0.15 * room), max(errors) + 0.08 * room)
    for x in sorted(at, reverse=True):
        axes.annotate(
            _label(at[x]), (x, best[x]), xytext=(-4, -3), textcoords="offset points", ha="right", va="top", zorder=5,
            fontsize=7, linespacing=1.0,
        )  # fmt: skip
    log_ticks(axes.xaxis, costs, counted)


def _label(rows: Sequence[SampledRow]) -> str:
    """Of one place on the front: N or the rank, and of which variant it is where several stand there."""
    cells = [row.params.cell for row in rows]
    numbers = {(groups, rank) for _, groups, rank in cells}
    if len(numbers) == 1 and numbers != {(1, None)}:
        return asked_of(*numbers.pop()).removeprefix("N = ")
    return "\n".join(label_of(*cell).replace(" N =", "") for cell in cells)
