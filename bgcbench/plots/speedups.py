"""How much faster each variant is than the standard convolution, or the dense network, against its parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import SubFigure

from bgcbench.plots import style
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import ProfileRow
from bgcbench.results.times import is_doubtful, time_ratio
from bgcbench.specs import PHASE_TITLES

NARROW = 2.5  # how often the least the largest value is up to which an axis is linear
LOOKS = (("-", "full"), ("--", "none"), (":", "left"), ("-.", "top"))  # lines and markers of a variant's algorithms


class Point(NamedTuple):
    """One row in one phase. share: of the reference's parameters, in percent; low, high: of the 95 % interval."""

    share: float
    speed_up: float
    low: float
    high: float
    name: str


class Series(NamedTuple):
    """The rows of a variant in one algorithm, and how they are drawn; name: of what is drawn."""

    label: str
    name: str
    look: style.Look
    rows: list[ProfileRow]


def part(document: Document) -> style.Paint:
    rows = [row for row in document.results if row.params.layer is None]
    reference = next((row for row in rows if row.params.variant == "standard" and row.phases), None)
    others = [row for row in rows if row is not reference and row.params.variant != "standard"]
    series = _series(others)
    found = {
        phase: drawn
        for phase in PHASE_TITLES
        if (drawn := [(one, points) for one in series if (points := _points(one.rows, reference, phase))])
    }
    if reference is None or not found:
        raise style.NothingToDraw("rows with an interval beside the standard convolution's; this result has none")
    dense = "dense network" if reference.params.model else "standard convolution"
    every = [point for drawn in found.values() for _, points in drawn for point in points]
    left = len(found) * len(others) - len(every)

    def paint(panel: SubFigure) -> None:
        style.title(panel, document, f"Speed-up over the {dense}", workload(reference), document.environment.where)
        grid = style.grid_of(panel, [[*found]], f"parameters (% of the {dense}'s)", "speed-up")
        for axes, phase in grid:
            axes.set_title(PHASE_TITLES[phase])
            axes.axhline(1.0, color="black", linewidth=0.9, label="_standard", zorder=2)
            for one, points in found[phase]:
                _draw(axes, one, points)
        first, _ = grid[0]
        _scale(first.yaxis, first.set_yscale, [1.0, *(end for point in every for end in (point.low, point.high))])
        for axes, _ in grid:  # which share the axis, but not its ticks
            _scale(axes.xaxis, axes.set_xscale, [100.0, *(point.share for point in every)])
        gone = f"Not drawn, for too few rounds or doubt: {left}." if left else ""
        style.legend(panel, {one.label: one.look for one in series}, ["Bars: 95 % intervals. Numbers: N.", gone])

    return paint


def _scale(axis: Axis, scale: Callable[[str], None], values: Sequence[float]) -> None:
    """Logarithmic where there is room for ticks of that kind."""
    if max(values) / min(values) > NARROW:
        scale("log")
        style.log_ticks(axis, values, "{:g}".format)


def workload(row: ProfileRow) -> str:
    """What was measured, in a line of a title."""
    params = row.params
    size = f"{params.batch} images of {params.height}x{params.width} px, {params.precision}, {params.layout}"
    if params.model:
        return f"{printable(params.model)}, {size}"
    return f"{params.kernel}x{params.kernel}, {params.in_channels} to {params.out_channels} channels, {size}"


def _series(rows: Sequence[ProfileRow]) -> list[Series]:
    by_variant: dict[str, dict[str, list[ProfileRow]]] = {}
    for row in sorted(rows, key=lambda row: variant_place(row.params.variant)):
        by_variant.setdefault(row.params.variant, {}).setdefault(row.params.algorithm, []).append(row)
    found = []
    for variant, algorithms in by_variant.items():
        for (algorithm, mine), (dashes, fill) in zip(algorithms.items(), itertools.cycle(LOOKS), strict=False):
            look = style.look_of(variant, linestyle=dashes, fillstyle=fill, markerfacecoloralt="white")
            label = style.label_of(variant) + f" {algorithm}" * (len(algorithms) > 1)
            found.append(Series(label, f"{variant} {algorithm}", look, mine))
    return found


def _points(rows: Sequence[ProfileRow], reference: ProfileRow | None, phase: str) -> list[Point]:
    """What is known of ``rows`` in ``phase``, by parameters."""
    found = []
    for row in rows:
        ratio = time_ratio(row, reference, phase)
        if not ratio or not ratio.ci95 or is_doubtful(row, phase, reference):
            continue
        if row.ran and reference and reference.ran:
            share, name = 100 * row.ran.params / reference.ran.params, style.name_of(*row.params.cell)
            found.append(Point(share, ratio.value, ratio.ci95.low, ratio.ci95.high, name))
    return sorted(found)


def _draw(axes: Axes, one: Series, points: Sequence[Point]) -> None:
    shares, values = [point.share for point in points], [point.speed_up for point in points]
    ends = [[point.speed_up - point.low for point in points], [point.high - point.speed_up for point in points]]
    axes.errorbar(shares, values, ends, capsize=2, label=f"_speed-up {one.name}", **one.look)
    for point in points:
        style.mark(axes, point.share, point.speed_up, point.name, one.look["color"])
