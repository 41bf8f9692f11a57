"""The time that a converted or planned network saves against the accuracy that it loses, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import SubFigure

from bgcbench.plots import style
from bgcbench.plots.plan import variant_of
from bgcbench.results.aggregate import Conversions, Spread, spread_of, variant_place
from bgcbench.results.document import Document
from bgcbench.results.rows import CellKey
from bgcbench.specs import PHASE_TITLES
from bgcbench.theory.pareto import front

LOST, UNLIKE = "error less the original's (percentage points)", "first guess not the original's (% of images)"
NOTE = "Filled: on the Pareto front (nothing that saves more on it loses as little"
NUMBERS = "Numbers: N. Bars: of time 95 % intervals, of error one standard deviation. SC: the original network."


class Point(NamedTuple):
    """A network. saved: percent of the original's time, with the ends of its 95 % interval; lost: percent or points."""

    variant: str
    name: str
    saved: float
    low: float
    high: float
    lost: Spread


def of_transfer(document: Document) -> style.Paint:
    """Conversions, each from the start that loses least, after the last epoch where they were trained."""
    run = Conversions.of(document)
    moment, untouched = run.moments[-1], run.untouched or 0.0
    points: dict[CellKey, Point] = {}
    phase = next(iter(run.phases), "")
    for cell in run.converted if run.untouched is not None else []:
        errors = spread_of(error - untouched for error in cell.errors_at(moment).values())
        ratio = run.speed_up(cell, run.standard, phase) if phase and run.standard else None
        if errors is None or ratio is None:
            continue
        ends = (ratio.ci95.low, ratio.ci95.high) if ratio.ci95 else (ratio.value, ratio.value)
        if cell.asked not in points or errors.mean < points[cell.asked].lost.mean:
            saved, low, high = (100 * (1 - 1 / times) for times in (ratio.value, *ends))
            points[cell.asked] = Point(cell.variant, style.name_of(*cell.asked), saved, low, high, errors)
    starts = "Of several starts the one that loses least." if len(run.starts) > 1 else ""
    when = "after training" if moment == "final" else "before any training"
    rows = document.results
    what = f"{rows[0].params.model} on {rows[0].params.dataset}, {when}; {PHASE_TITLES.get(phase, '')}" if rows else ""
    return _picture(document, [*points.values()], LOST, what, starts)


def of_plan(document: Document) -> style.Paint:
    """The planned network and one choice for all layers: the error where images have labels, otherwise agreement."""
    rows = [row for row in document.results if row.params.stage == "proof" and row.status == "ok"]
    original = next((row.error for row in rows if row.params.subject == "dense"), None)
    points = []
    for row in rows:
        measured = row.agreement if original is None else row.error
        if row.params.subject == "dense" or row.time_ratio is None or measured is None:
            continue
        shares = row.time_ratio, *(row.time_ratio_ci95 or 2 * (row.time_ratio,))
        saved, high, low = (100 * (1 - share) for share in shares)
        lost = 100 - measured if original is None else measured - original
        name = (row.params.subject or "").rpartition(" ")[2].removeprefix("N=")  # "GC N=4", "LR r=8", "plan"
        points.append(Point(variant_of(row), name, saved, low, high, Spread(lost, None, 1)))
    about = f"{rows[0].params.model} on {rows[0].params.data}, images never planned on" if rows else ""
    return _picture(document, points, UNLIKE if original is None else LOST, about)


def _picture(document: Document, points: Sequence[Point], lost: str, about: str, note: str = "") -> style.Paint:
    if not points:
        raise style.NothingToDraw("networks whose time and whose accuracy are both known; this result has none")
    original = Point("standard", "", 0.0, 0.0, 0.0, Spread(0.0, None, 1))
    every = [*points, original]
    errors = [(point.lost.sd or 0.0) / math.sqrt(point.lost.n) / 100 for point in every]
    on_front = front([1 - point.saved / 100 for point in every], [point.lost.mean / 100 for point in every], errors)
    best = sorted((point for point, on in zip(every, on_front, strict=True) if on), key=lambda point: point.saved)

    def paint(panel: SubFigure) -> None:
        style.title(panel, document, "Time saved against accuracy lost", about, document.environment.where)
        ((axes, _),) = style.grid_of(panel, [[True]], "time saved (% of the original's)", lost)
        for point in sorted(every, key=lambda point: variant_place(point.variant)):
            look = style.look_of(point.variant, linestyle="none")
            look |= style.ON_FRONT if point in best else {"fillstyle": "none"}
            ends = [[point.saved - point.low], [point.high - point.saved]]
            up = [[point.lost.sd], [point.lost.sd]] if point.lost.sd else None
            at = [point.saved], [point.lost.mean]
            axes.plot(*at, label=f"_{point.variant} {point.name}", **look)
            axes.errorbar(*at, up, ends, fmt="none", ecolor=look["color"], elinewidth=0.9, capsize=2, zorder=2.5)
            style.mark(axes, point.saved, point.lost.mean, point.name, look["color"])
        saved, lost_there = [point.saved for point in best], [point.lost.mean for point in best]
        axes.step(saved, lost_there, where="pre", zorder=1.5, label="_front", **style.FRONT)
        looks = style.looks_of((point.variant for point in every), linestyle="none") | {"Pareto front": style.FRONT}
        within = " within three standard errors over the seeds" if any(errors) else ""
        style.legend(panel, looks, [f"{NOTE}{within}).", NUMBERS, note])

    return paint
