"""The test error of converted networks, before and after training, against their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.plots.style import (
    GREY,
    NothingToDraw,
    Part,
    bar,
    ends_of,
    handle,
    label_of,
    legend,
    look_of,
    scale_errors,
    scale_params,
    training_title,
)
from bgcbench.results.aggregate import Conversions, Moment, Spread, Start, spread_of, variant_place
from bgcbench.results.document import Document

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

ACROSS = 3  # panels side by side
MOMENTS: tuple[Moment, ...] = ("initial", "final")
INITS = {"copy": "Copied", "white": "White", "calibrated": "Calibrated", "scratch": "From scratch"}
# The untouched network's lines: their names, and how they are dashed.
LEVELS = {"initial": ("untouched network", "-"), "final": ("trained as long (control)", ":")}
HOLLOW: dict[str, Any] = {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "markeredgewidth": 0.9}

Points = list[tuple[float, Spread]]  # parameters, and errors (percent) over the seeds
Series = dict[tuple[Start, str, Moment], Points]


def part(document: Document) -> Part:
    run = Conversions.of(document)
    series = _series(run)
    if not series:
        raise NothingToDraw("conversions judged on real images; this result has none")
    variants = sorted({variant for _, variant, _ in series}, key=variant_place)
    trained = any(moment == "final" for *_, moment in series)
    dense = {moment: spread_of(run.standard.errors_at(moment).values()) for moment in MOMENTS} if run.standard else {}
    levels = {moment: spread.mean for moment, spread in dense.items() if spread}
    printed = [cell for cell in run.converted if cell.paper_error is not None]
    errors = [e for cell in run.cells for moment in MOMENTS for e in cell.errors_at(moment).values()]
    errors += [cell.paper_error for cell in printed if cell.paper_error is not None]
    floor = _floor(run, errors)
    places = _grid(run, [start for start in run.starts if any(at == start for at, _, _ in series)])

    def paint(panel: SubFigure) -> None:
        grid = panel.subplots(len(places), len(places[0]), squeeze=False, sharex=True, sharey=True)
        when = "before and after training" if trained else "before any training"
        training_title(panel, document, f"Test error {when}")
        drawn = []
        for axes, start in zip(grid.flat, [start for line in places for start in line], strict=True):
            if start is None:
                axes.set_axis_off()
                continue
            drawn.append(axes)
            axes.set_title(_title(run, start))
            for (at, variant, moment), points in series.items():
                if at == start:
                    _line(axes, variant, moment, points, floor, hollow=trained and moment == "initial")
            for cell in printed:
                if cell.start == start:
                    cross = {"color": look_of(cell.variant)["color"], "marker": "x", "markersize": 5.0}
                    place = [cell.params or math.nan], [cell.paper_error or math.nan]
                    axes.plot(*place, label=f"_paper {cell.variant}", linestyle="none", zorder=5, **cross)
            for moment, level in levels.items():
                dashes = LEVELS[moment][1]
                axes.axhline(max(level, floor), color="black", ls=dashes, lw=0.9, zorder=2, label=f"_{moment}")
        scale_params(drawn[0], [params for points in series.values() for params, _ in points])
        ends = ends_of(spread for points in series.values() for _, spread in points)
        scale_errors(drawn[0], [max(error, floor) for error in errors], [max(end, floor) for end in ends])
        for axes in drawn:
            axes.set(xlabel="parameters (millions)", ylabel="test error (%)")
            axes.label_outer()
        handles = [handle(drawn[0], label_of(variant), **look_of(variant)) for variant in variants]
        if trained:
            look = {"color": GREY, "marker": "o", "markersize": 6.0, "linewidth": 0.9, **HOLLOW}
            handles.append(handle(drawn[0], "before training", **look))
        for moment in levels:
            label, dashes = LEVELS[moment]
            handles.append(handle(drawn[0], label, color="black", linestyle=dashes, linewidth=0.9))
        if printed:
            handles.append(handle(drawn[0], "paper", color=GREY, marker="x", markersize=5.0, linestyle="none"))
        legend(panel, handles, _notes(run, series, floor, trained=trained))

    return Part(4.2 if len(places) == 1 else 2.5 * len(places) + 0.9, paint)


def _series(run: Conversions) -> Series:
    """By start, variant and moment, ascending in parameters."""
    found: Series = {}
    for cell in sorted(run.converted, key=lambda cell: (cell.start.place, variant_place(cell.variant))):
        for moment in MOMENTS:
            spread = spread_of(cell.errors_at(moment).values())
            if spread and cell.params is not None:
                found.setdefault((cell.start, cell.variant, moment), []).append((cell.params, spread))
    return {at: sorted(points) for at, points in found.items()}


def _floor(run: Conversions, errors: Sequence[float]) -> float:
    """Where an error of 0 stands on a logarithmic axis: half an image; 0 where there is none."""
    images = next((row.test_images for row in run.rows if row.test_images), None)
    return 50 / images if images and min(errors) <= 0 else 0.0


def _grid(run: Conversions, starts: Sequence[Start]) -> list[list[Start | None]]:
    """The panels: one below the other what differs in batch norm only, otherwise a few side by side."""
    if run.norms_differ:
        inits = list(dict.fromkeys(start.init for start in starts))
        return [[at if (at := Start(i, rebn)) in starts else None for i in inits] for rebn in (False, True)]
    down = math.ceil(len(starts) / ACROSS)
    across = math.ceil(len(starts) / down)
    padded = [*starts, *[None] * (down * across - len(starts))]
    return [padded[across * line : across * (line + 1)] for line in range(down)]


def _title(run: Conversions, start: Start) -> str:
    """A start, with its batch norm where both are there; nothing where it is the only one."""
    rebn = " + rebn" if start.rebn and run.norms_differ else ""
    return f"{INITS.get(start.init, start.init)}{rebn}" if len(run.starts) > 1 else ""


def _notes(run: Conversions, series: Series, floor: float, *, trained: bool) -> list[str]:
    numbers = ", ".join(str(n) for n in sorted({cell.groups for cell in run.converted}))
    both = {"gc", "bgc"} <= {variant for _, variant, _ in series}
    return [
        f"From right to left N = {numbers}" + ("; GC at N has the parameters of BGC at 2N." if both else "."),
        "rebn: statistics of batch norm re-estimated." if run.norms_differ else "",
        "Dashed and hollow: before training; filled: after it." if trained else "",
        "Markers: mean over the seeds; bars: one standard deviation."
        if any(spread.n > 1 for points in series.values() for _, spread in points)
        else "",
        f"An error of 0 stands at {floor:g} %, half an image." if floor else "",
    ]


def _line(axes: Axes, variant: str, moment: Moment, points: Points, floor: float, *, hollow: bool) -> None:
    """A variant along its parameters at one moment, with its spread over the seeds."""
    means = [max(spread.mean, floor) for _, spread in points]
    look = look_of(variant, **(HOLLOW if hollow else {}))
    axes.plot([params for params, _ in points], means, label=f"_{moment} {variant}", **look)
    for params, spread in points:
        bar(axes, params, spread, variant, floor)
