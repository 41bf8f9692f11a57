"""The pictures of ``train`` documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.plots import (
    GREY,
    WIDTH,
    NothingToDraw,
    Part,
    label_of,
    legend,
    legend_height,
    log_ticks,
    look_of,
    scale_errors,
    state_of,
)
from bgcbench.results import Json
from bgcbench.specs import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure
    from matplotlib.lines import Line2D

NOTHING = "the result has no test error, which only finished trainings on real images have"
SYNTHETIC = "synthetic"
DODGE = 0.1  # octaves of N between two variants of one N, which would hide each other
BESIDE = 4.5  # points between a marker and the dots of its seeds
ACROSS = 3  # panels of curves side by side
FINE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # ticks of a decade where less than one is shown
MARKS = 6  # markers along a curve, about

Cells = dict[tuple[str, int], list[Json]]


def makers(_: Json) -> dict[str, Callable[[Json], Part]]:
    """What is drawn where no picture is named: all."""
    return MAKERS


def _cells(rows: Sequence[Json]) -> Cells:
    """Rows by (variant, N), variants in the registered order, ascending in N."""
    places = {(row["params"]["variant"], row["params"]["groups"]) for row in rows}
    order = list(VARIANTS)
    return {
        at: [row for row in rows if (row["params"]["variant"], row["params"]["groups"]) == at]
        for at in sorted(places, key=lambda at: (order.index(at[0]), at[1]))
    }


def _real(document: Json) -> list[Json]:
    """The rows of images that something can be right about."""
    return [row for row in document["results"] if row["params"]["dataset"] != SYNTHETIC]


def _what(document: Json, rows: Sequence[Json]) -> str:
    """The network, the data and the trainings, for a title."""
    p = rows[0]["params"]
    seeds = len({row["params"]["seed"] for row in document["results"]})
    many = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return f"{p['model']} on {p['dataset']}, {p['epochs']} epochs, {many}{state_of(document)}"


def _unfinished(document: Json) -> list[str]:
    """A note on the cells of which not every seed has finished."""
    gone = []
    for (variant, n), rows in _cells(_real(document)).items():
        done = sum(row["status"] == "ok" for row in rows)
        if done < len(rows):
            gone.append(f"{_name(variant, n)} ({done} of {len(rows)} seeds)")
    return [f"Not all finished: {', '.join(gone)}."] if gone else []


def _name(variant: str, groups: int) -> str:
    return label_of(variant) + ("" if variant == "standard" else f" N = {groups}")


def _variants(cells: Cells) -> list[str]:
    return list(dict.fromkeys(variant for variant, _ in cells))


# --------------------------------------------------------------------------------------------------------------- errors


def _errors(document: Json) -> Part:
    rows = [row for row in _real(document) if row["status"] == "ok" and row["error_final"] is not None]
    if not rows:
        raise NothingToDraw("finished trainings on real images; this result has none")
    cells = _cells(rows)
    variants = _variants(cells)
    printed = any(_paper(mine) is not None for mine in cells.values())
    repeated = any(len(mine) > 1 for mine in cells.values())
    notes = []
    if repeated:
        notes.append("Markers: mean over the seeds, which are the dots; bars and band: one standard deviation.")
    notes += ["Hollow: what Lee, Park & Lee print."] if printed else []
    notes += ["Left: variants of one N stand side by side."] if len({*variants} - {"standard"}) > 1 else []
    notes += ["Right: N grows to the left."] if len(cells) > 1 else []

    def paint(panel: SubFigure) -> None:
        by_groups, by_params = panel.subplots(1, 2, sharey=True, width_ratios=(1.2, 1))
        panel.suptitle(f"Test error after the last epoch\n{_what(document, rows)}", fontsize=9)
        _error_panel(by_groups, {at: _place(at, variants) for at in cells}, cells, seeds=True)
        groups = sorted({n for _, n in cells})
        by_groups.set_xscale("log", base=2)
        by_groups.set_xlim(groups[0] / 2**0.4, groups[-1] * 2**0.4)
        by_groups.set_xticks(groups, [str(n) for n in groups])
        by_groups.minorticks_off()
        by_groups.set_xlabel("N")
        by_groups.set_ylabel("test error (%)")
        params = {at: statistics.fmean(counts) for at, mine in cells.items() if (counts := _params(mine))}
        _error_panel(by_params, params, {at: cells[at] for at in params}, seeds=False)
        if params:
            by_params.set_xscale("log")
            by_params.margins(x=0.1)
            known = list(params.values())
            narrow = max(known) < 5 * min(known)
            log_ticks(by_params.xaxis, known, lambda value: f"{value / 1e6:g}", FINE if narrow else None)
        by_params.set_xlabel("parameters (millions)")
        scale_errors(by_groups, _drawn(cells), _ends(cells))
        handles = [by_groups.plot([], [], label=label_of(v), **look_of(v))[0] for v in variants]
        if printed:
            hollow = {"color": GREY, "marker": "o", "markersize": 6.0, "markerfacecolor": "none", "linestyle": "none"}
            handles += by_groups.plot([], [], label="paper", **hollow)
        legend(panel, handles, len(handles))

    return Part(WIDTH, 3.5 + legend_height(1, 1), paint, [" ".join(notes), *_unfinished(document)])


def _place(at: tuple[str, int], variants: Sequence[str]) -> float:
    """Where a cell stands on the axis of N: beside the others of its N."""
    others = [variant for variant in variants if variant != "standard"]
    if at[0] == "standard":
        return float(at[1])
    return float(at[1] * 2 ** (DODGE * (others.index(at[0]) - (len(others) - 1) / 2)))


def _error_panel(axes: Axes, places: dict[tuple[str, int], float], cells: Cells, *, seeds: bool) -> None:
    """The cells at their places: means joined by variant, with their spread and what the paper prints."""
    for variant in _variants(cells):
        mine = [(places[at], rows) for at, rows in cells.items() if at[0] == variant]
        mine.sort(key=lambda pair: pair[0])
        look, means = look_of(variant), [statistics.fmean(_last(rows)) for _, rows in mine]
        axes.plot([x for x, _ in mine], means, label=f"_mean {variant}", **look)
        for x, rows in mine:
            errors = _last(rows)
            if len(errors) > 1:
                mean, spread = statistics.fmean(errors), statistics.stdev(errors)
                axes.errorbar(x, mean, spread, color=look["color"], linewidth=0.9, capsize=2.5)
                if seeds:
                    _dots(axes, x, errors, variant)
            if (printed := _paper(rows)) is not None:
                hollow = {**look, "markerfacecolor": "none", "linestyle": "none", "markeredgewidth": 0.9}
                axes.plot([x], [printed], label=f"_paper {variant}", **hollow)
        if variant == "standard":
            errors = _last(mine[0][1])
            axes.axhline(means[0], color=look["color"], linewidth=0.9, label="_standard", zorder=2)
            if len(errors) > 1:
                spread = statistics.stdev(errors)
                axes.axhspan(means[0] - spread, means[0] + spread, color=GREY, alpha=0.15, linewidth=0, zorder=1.5)


def _dots(axes: Axes, x: float, errors: Sequence[float], variant: str) -> None:
    """The seeds of a cell, beside its marker."""
    from matplotlib.transforms import offset_copy

    whole: Any = axes.get_figure()
    look = {"color": look_of(variant)["color"], "marker": "o", "markersize": 2.2, "alpha": 0.6, "linestyle": "none"}
    beside = offset_copy(axes.transData, whole, x=BESIDE, units="points")
    axes.plot([x] * len(errors), errors, label=f"_seeds {variant}", transform=beside, zorder=2.5, **look)


def _last(rows: Sequence[Json]) -> list[float]:
    return [float(row["error_final"]) for row in rows]


def _params(rows: Sequence[Json]) -> list[int]:
    return [row["counts"]["params"] for row in rows if row["counts"]]


def _paper(rows: Sequence[Json]) -> float | None:
    return next((float(row["paper"]["error"]) for row in rows if row.get("paper")), None)


def _drawn(cells: Cells) -> list[float]:
    """Every error that is drawn."""
    errors = [error for rows in cells.values() for error in _last(rows)]
    return errors + [printed for rows in cells.values() if (printed := _paper(rows)) is not None]


def _ends(cells: Cells) -> list[float]:
    """Where the bars end."""
    found = [errors for rows in cells.values() if len(errors := _last(rows)) > 1]
    return [statistics.fmean(e) + sign * statistics.stdev(e) for e in found for sign in (-1, 1)]


# --------------------------------------------------------------------------------------------------------------- curves


def _curves(document: Json) -> Part:
    series = {at: found for at, rows in _cells(_real(document)).items() if (found := _curve(rows))}
    if not series:
        raise NothingToDraw("test errors by epoch; this result has none")
    groups = sorted({n for variant, n in series if variant != "standard"}) or [1]
    variants = list(dict.fromkeys(variant for variant, _ in series))
    down = math.ceil(len(groups) / ACROSS)
    across = math.ceil(len(groups) / down)
    every = [error for curve in series.values() for errors in curve.values() for error in errors]
    notes = []
    if any(len(errors) > 1 for curve in series.values() for errors in curve.values()):
        notes.append("Lines: mean over the seeds; bands: from the lowest to the highest of them.")

    def paint(panel: SubFigure) -> None:
        from matplotlib.ticker import MaxNLocator

        grid = panel.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        panel.suptitle(f"Test error by epoch\n{_what(document, _real(document))}", fontsize=9)
        flat = [axes for line in grid for axes in line]
        for axes, n in zip(flat, groups, strict=False):
            for (variant, k), curve in series.items():
                if k == n or variant == "standard":
                    _curve_panel(axes, variant, curve, variants.index(variant))
            axes.set_title(f"N = {n}")
        scale_errors(flat[0], every)
        for axes in flat[len(groups) :]:
            axes.set_axis_off()
        for line in grid:
            line[0].set_ylabel("test error (%)")
        for axes in flat[max(0, len(groups) - across) : len(groups)]:  # with no panel below
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        legend(panel, [_curve_handle(flat[0], variant) for variant in variants], len(variants))

    return Part(WIDTH, 2.5 * down + 0.6 + legend_height(1, 1), paint, [*notes, *_unfinished(document)])


def _curve(rows: Sequence[Json]) -> dict[int, list[float]]:
    """Test errors of all seeds by epoch, of the finished rows or, where there are none, of those that began.

    Only epochs that every one of them has: a mean over fewer would jump where one ends.
    """
    began = [row for row in rows if any(epoch["test_error"] is not None for epoch in row["epochs"])]
    chosen = [row for row in began if row["status"] == "ok"] or began
    each = [{e["epoch"]: e["test_error"] for e in row["epochs"] if e["test_error"] is not None} for row in chosen]
    if not each:
        return {}
    common = sorted(set.intersection(*({*errors} for errors in each)))
    return {epoch: [float(errors[epoch]) for errors in each] for epoch in common}


def _curve_look(variant: str) -> dict[str, Any]:
    look = look_of(variant)
    return {**look, "markersize": 0.65 * look["markersize"], "linewidth": 1.1}


def _curve_panel(axes: Axes, variant: str, curve: dict[int, list[float]], number: int) -> None:
    """The mean over the seeds with a marker now and then, and the band from the lowest to the highest seed."""
    epochs, look = list(curve), _curve_look(variant)
    step = max(1, len(epochs) // MARKS)
    means = [statistics.fmean(errors) for errors in curve.values()]
    axes.plot(epochs, means, label=f"_curve {variant}", markevery=(number * step // len(VARIANTS), step), **look)
    if any(len(errors) > 1 for errors in curve.values()):
        low, high = ([bound(errors) for errors in curve.values()] for bound in (min, max))
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1.5)


def _curve_handle(axes: Axes, variant: str) -> Line2D:
    return axes.plot([], [], label=label_of(variant), **_curve_look(variant))[0]


MAKERS: dict[str, Callable[[Json], Part]] = {"errors": _errors, "curves": _curves}
