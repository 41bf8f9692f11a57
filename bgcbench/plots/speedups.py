"""How much faster each variant is than the standard convolution, or the dense network, against its parameters."""

from __future__ import annotations

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
from bgcbench.specs import PHASE_TITLES, PLAN

NARROW = 2.5  # how often the least the largest value is up to which an axis is linear
LOOKS = (("-", "full"), ("--", "none"), (":", "left"), ("-.", "top"))  # lines and markers of a variant's algorithms


class Point(NamedTuple):
    """One row in one phase. share: of the reference's parameters, in percent; low, high: of the 95 % interval."""

    share: float
    speed_up: float
    low: float
    high: float
    name: str


def part(document: Document) -> style.Paint:
    rows = [row for row in document.results if row.params.layer is None]
    reference = next((row for row in rows if row.params.variant == "standard" and row.phases), None)
    others = [row for row in rows if row is not reference and row.params.variant != "standard"]
    series: dict[tuple[str, str], list[ProfileRow]] = {}
    for row in sorted(others, key=lambda row: variant_place(row.params.variant)):
        series.setdefault((row.params.variant, row.params.algorithm), []).append(row)
    phases = [phase for phase in PHASE_TITLES if any(_points(series, reference, phase).values())]
    if reference is None or not phases:
        raise style.NothingToDraw("rows with an interval beside the standard convolution's; this result has none")
    found = {phase: _points(series, reference, phase) for phase in phases}
    dense = "dense network" if reference.params.model else "standard convolution"
    left = len(phases) * len(others) - sum(len(points) for each in found.values() for points in each.values())

    def paint(panel: SubFigure) -> None:
        style.title(panel, document, f"Speed-up over the {dense}", workload(reference), document.environment.where)
        grid = style.grid_of(panel, [phases], f"parameters (% of the {dense}'s)", "speed-up")
        drawn = [point for each in found.values() for points in each.values() for point in points]
        for axes, phase in grid:
            axes.set_title(PHASE_TITLES[phase])
            axes.axhline(1.0, color="black", linewidth=0.9, label="_standard", zorder=2)
            for key, points in found[phase].items():
                _draw(axes, key, points, _look(key, series))
        first, _ = grid[0]
        _scale(first.yaxis, first.set_yscale, [1.0, *(end for point in drawn for end in (point.low, point.high))])
        for axes, _ in grid:  # which share the axis, but not its ticks
            _scale(axes.xaxis, axes.set_xscale, [100.0, *(point.share for point in drawn)])
        looks = {_label(key, series): _look(key, series) for key in series}
        notes = [
            "Bars: 95 % intervals. Numbers: N.",
            f"Not drawn, for too few rounds or doubt: {left}." if left else "",
        ]
        style.legend(panel, looks, notes)

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


def _points(
    series: dict[tuple[str, str], list[ProfileRow]], reference: ProfileRow | None, phase: str
) -> dict[tuple[str, str], list[Point]]:
    """What is known of each series in ``phase``, by parameters."""
    found: dict[tuple[str, str], list[Point]] = {}
    for key, rows in series.items():
        for row in rows:
            ratio = time_ratio(row, reference, phase)
            known = ratio is not None and ratio.ci95 is not None and not is_doubtful(row, phase, reference)
            if known and ratio and ratio.ci95 and row.ran and reference and reference.ran:
                share = 100 * row.ran.params / reference.ran.params
                variant, groups, rank = row.params.cell
                name = PLAN if variant == PLAN else str(groups) if rank is None else f"r={rank}"
                found.setdefault(key, []).append(Point(share, ratio.value, ratio.ci95.low, ratio.ci95.high, name))
    return {key: sorted(points) for key, points in found.items()}


def _draw(axes: Axes, key: tuple[str, str], points: Sequence[Point], look: style.Look) -> None:
    shares, values = [point.share for point in points], [point.speed_up for point in points]
    ends = [[point.speed_up - point.low for point in points], [point.high - point.speed_up for point in points]]
    axes.errorbar(shares, values, ends, capsize=2, label=f"_speed-up {' '.join(key)}", **look)
    for point in points:
        style.mark(axes, point.share, point.speed_up, point.name, look["color"])


def _several(variant: str, series: dict[tuple[str, str], list[ProfileRow]]) -> list[str]:
    return [algorithm for other, algorithm in series if other == variant]


def _look(key: tuple[str, str], series: dict[tuple[str, str], list[ProfileRow]]) -> style.Look:
    dashes, fill = LOOKS[_several(key[0], series).index(key[1]) % len(LOOKS)]
    return style.look_of(key[0], linestyle=dashes, fillstyle=fill, markerfacecoloralt="white")


def _label(key: tuple[str, str], series: dict[tuple[str, str], list[ProfileRow]]) -> str:
    label = style.label_of(key[0])
    return f"{label} {key[1]}" if len(_several(key[0], series)) > 1 else label
