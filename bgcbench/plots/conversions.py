"""The test error of converted networks, before and after training, against their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import SubFigure

from bgcbench.plots import style
from bgcbench.results.aggregate import Conversions, Moment, Spread, Start, image_points, spread_of, variant_place
from bgcbench.results.document import Document

MOMENTS: tuple[Moment, ...] = ("initial", "final")
INITS = {"copy": "Copied", "white": "White", "calibrated": "Calibrated", "refit": "Refit", "scratch": "From scratch"}
HOLLOW: style.Look = {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "markeredgewidth": 0.9}
BEFORE = {"color": style.GREY, "marker": "o", "markersize": 6.0, "linewidth": 0.9, **HOLLOW}
LEVEL: style.Look = {"color": "black", "linewidth": 0.9}
LEVELS: dict[str, tuple[str, style.Look]] = {  # the untouched network's lines
    "initial": ("untouched network", {"linestyle": "-", **LEVEL}),
    "final": ("trained as long (control)", {"linestyle": ":", **LEVEL}),
}
CROSS: style.Look = {"marker": "x", "markersize": 5.0, "linestyle": "none"}


class Series(NamedTuple):
    """A variant's errors (percent) at one moment against parameters, in one panel."""

    start: Start
    variant: str
    moment: Moment
    points: list[tuple[float, Spread]]


def part(document: Document) -> style.Paint:
    run = Conversions.of(document)
    series = _series(run)
    if not series:
        raise style.NothingToDraw("conversions evaluated on real images; this result has none")
    variants = sorted({one.variant for one in series}, key=variant_place)
    trained = any(one.moment == "final" for one in series)
    dense = {moment: spread_of(run.standard.errors_at(moment).values()) for moment in MOMENTS} if run.standard else {}
    levels = {moment: spread.mean for moment, spread in dense.items() if spread}
    printed = [
        (cell.start, cell.variant, cell.params, cell.paper_error)
        for cell in run.converted
        if cell.paper_error is not None and cell.params is not None
    ]
    errors = [e for cell in run.cells for moment in MOMENTS for e in cell.errors_at(moment).values()]
    errors += [error for *_, error in printed]
    floor = image_points(run.rows) / 2 if min(errors) <= 0 else 0.0  # where an error of 0 stands
    spreads = [spread for one in series for _, spread in one.points]
    drawn = [start for start in run.starts if any(one.start == start for one in series)]
    # Copied weights as they are tell least.
    kept, gone = style.most(drawn[::-1], lambda start: f"{start.init}{' + rebn' * start.rebn}")
    places = _places(run, kept[::-1])

    def paint(panel: SubFigure) -> None:
        when = "before and after training" if trained else "before any training"
        style.training_title(panel, document, f"Test error {when}")
        grid = style.grid_of(panel, places, "parameters (millions)", "test error (%)")
        for axes, start in grid:
            axes.set_title(_title(run, start))
            for one in series:
                if one.start == start:
                    look = HOLLOW if trained and one.moment == "initial" else {}
                    style.spread_line(axes, one.variant, one.points, f"_{one.moment} {one.variant}", floor, **look)
            for at, variant, params, error in printed:
                if at == start:
                    cross = {"color": style.look_of(variant)["color"], "zorder": 5, **CROSS}
                    axes.plot([params], [error], label=f"_paper {variant}", **cross)
            for moment, level in levels.items():
                axes.axhline(max(level, floor), label=f"_{moment}", zorder=2, **LEVELS[moment][1])
        first, _ = grid[0]
        style.scale_params(first, [params for one in series for params, _ in one.points])
        style.scale_errors(first, errors, spreads, floor)
        looks = style.looks_of(variants) | ({"before training": BEFORE} if trained else {})
        looks |= dict(LEVELS[moment] for moment in levels)
        looks |= {"paper": {"color": style.GREY, **CROSS}} if printed else {}
        style.legend(panel, looks, [*_notes(run, variants, spreads, floor, trained=trained), gone])

    return paint


def _series(run: Conversions) -> list[Series]:
    """By start, variant and moment, ascending in parameters."""
    found: dict[tuple[Start, str, Moment], list[tuple[float, Spread]]] = {}
    for cell in sorted(run.converted, key=lambda cell: (cell.start.place, variant_place(cell.variant))):
        for moment in MOMENTS:
            spread = spread_of(cell.errors_at(moment).values())
            if spread and cell.params is not None:
                found.setdefault((cell.start, cell.variant, moment), []).append((cell.params, spread))
    return [Series(*at, sorted(points)) for at, points in found.items()]


def _places(run: Conversions, starts: Sequence[Start]) -> list[list[Start | None]]:
    """The panels: one below the other what differs in batch norm only, otherwise a few side by side."""
    if not run.norms_differ:
        return style.wrapped(starts)
    inits = dict.fromkeys(start.init for start in starts)
    return [[at if (at := Start(init, rebn)) in starts else None for init in inits] for rebn in (False, True)]


def _title(run: Conversions, start: Start) -> str:
    """A start, with its batch norm where both are there; nothing where it is the only one."""
    rebn = " + rebn" if start.rebn and run.norms_differ else ""
    return f"{INITS.get(start.init, start.init)}{rebn}" if len(run.starts) > 1 else ""


def _notes(
    run: Conversions, variants: Sequence[str], spreads: Sequence[Spread], floor: float, *, trained: bool
) -> list[str]:
    groups = {cell.groups for cell in run.converted if cell.rank is None and not cell.planned}
    numbers = ", ".join(map(str, sorted(groups)))
    ranks = ", ".join(map(str, sorted({cell.rank for cell in run.converted if cell.rank}, reverse=True)))
    both = {"gc", "bgc"} <= {*variants}
    return [
        f"From right to left N = {numbers}{'; GC at N has the parameters of BGC at 2N' * both}." if numbers else "",
        f"From right to left r = {ranks}." if ranks else "",
        "rebn: statistics of batch norm re-estimated." if run.norms_differ else "",
        "Dashed and hollow: before training; filled: after it." if trained else "",
        "Markers: mean over the seeds; bars: one standard deviation." if any(s.n > 1 for s in spreads) else "",
        f"An error of 0 stands at {floor:g} %, half an image." if floor else "",
    ]
