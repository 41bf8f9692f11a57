"""The pictures of ``transfer`` documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.plots import (
    GREY,
    SMALL,
    WIDTH,
    NothingToDraw,
    Part,
    groups_of,
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

NOTHING = "the result has neither a test error, which only conversions judged on real images have, nor a calibration"
SYNTHETIC = "synthetic"
INITS = {"copy": "copied", "white": "white", "calibrated": "calibrated", "scratch": "from scratch"}
MOMENTS = {"before": "error_initial", "after": "error_final"}
ACROSS = 3  # panels of starts side by side
FINE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # ticks of a decade where less than one is shown

Start = tuple[str, bool]  # init, and whether batch norm was estimated again


def makers(_: Json) -> dict[str, Callable[[Json], Part]]:
    """What is drawn where no picture is named: all."""
    return MAKERS


def _starts(rows: Sequence[Json]) -> list[Start]:
    found = {(row["params"]["init"], bool(row["params"]["rebn"])) for row in rows}
    order = list(INITS)
    return sorted(found, key=lambda start: (order.index(start[0]), start[1]))


def _norms_differ(starts: Sequence[Start]) -> bool:
    """Whether batch norm was estimated again in some conversions only."""
    return len({rebn for _, rebn in starts}) > 1


def _grid(starts: Sequence[Start]) -> list[list[Start | None]]:
    """The panels: one below the other what differs in batch norm only, otherwise a few side by side."""
    if _norms_differ(starts):
        inits = list(dict.fromkeys(init for init, _ in starts))
        return [[(init, rebn) if (init, rebn) in starts else None for init in inits] for rebn in (False, True)]
    down = math.ceil(len(starts) / ACROSS)
    across = math.ceil(len(starts) / down)
    padded: list[Start | None] = [*starts, *[None] * (down * across - len(starts))]
    return [padded[across * line : across * (line + 1)] for line in range(down)]


def _converted(document: Json) -> list[Json]:
    return [row for row in document["results"] if row["params"]["variant"] != "standard"]


def _variants(rows: Sequence[Json]) -> list[str]:
    """In the registered order."""
    there = {row["params"]["variant"] for row in rows}
    return [variant for variant in VARIANTS if variant in there]


def _what(document: Json) -> str:
    """The network, the data and how much was trained, for a title."""
    rows = document["results"]
    p, epochs = rows[0]["params"], max(row["params"]["epochs"] for row in rows)
    seeds = len({row["params"]["seed"] for row in _converted(document)})
    trained = f", {epochs} epoch{'s' * (epochs > 1)}" if epochs else ", no training"
    return f"{p['model']} on {p['dataset']}{trained}, {seeds} seed{'s' * (seeds > 1)}{state_of(document)}"


# --------------------------------------------------------------------------------------------------------------- errors

# The untouched network's lines: their names, and how they are dashed.
LEVELS = {"before": ("untouched network", "-"), "after": ("trained as long (control)", ":")}
HOLLOW: dict[str, Any] = {"linestyle": (0, (4, 2)), "markerfacecolor": "white", "markeredgewidth": 0.9}

# One variant at one N, start and moment: its parameters, and its errors (percent) over the seeds.
Point = tuple[float, list[float]]


def _errors(document: Json) -> Part:
    rows = [row for row in _converted(document) if row["params"]["dataset"] != SYNTHETIC and row["counts"]]
    series = {
        (start, variant, moment): points
        for start in _starts(rows)
        for variant in _variants(rows)
        for moment in MOMENTS
        if (points := _points([row for row in rows if _start(row) == start], variant, moment))
    }
    if not series:
        raise NothingToDraw("conversions judged on real images; this result has none")
    starts = list(dict.fromkeys(start for start, _, _ in series))
    variants = [v for v in VARIANTS if any(variant == v for _, variant, _ in series)]
    trained = any(moment == "after" for *_, moment in series)
    dense = [row for row in document["results"] if row["params"]["variant"] == "standard"]
    levels = {moment: errors for moment in MOMENTS if (errors := _all(dense, moment))}
    printed = [row for row in rows if row.get("paper")]
    every = [error for points in series.values() for _, errors in points for error in errors]
    every += [error for errors in levels.values() for error in errors]
    every += [row["paper"]["error"] for row in printed]
    floor = _floor(every, document)
    places = _grid(starts)
    numbers = ", ".join(map(str, groups_of(rows)))
    notes = [f"From right to left N = {numbers}."]
    if {"gc", "bgc"} <= {*variants}:
        notes = [f"From right to left N = {numbers}; GC at N has the parameters of BGC at 2N."]
    notes += ["rebn: statistics of batch norm estimated again."] if _norms_differ(starts) else []
    notes += ["Dashed and hollow: before training; filled: after it."] if trained else []
    if any(len(errors) > 1 for points in series.values() for _, errors in points):
        notes.append("Markers: mean over the seeds; bars: one standard deviation.")
    notes += [f"An error of 0 stands at {floor:g} %, half an image."] if floor else []

    def paint(panel: SubFigure) -> None:
        grid = panel.subplots(len(places), len(places[0]), squeeze=False, sharex=True, sharey=True)
        when = "before and after training" if trained else "before any training"
        panel.suptitle(f"Test error {when}\n{_what(document)}", fontsize=9)
        drawn = []
        for line, beside in zip(grid, places, strict=True):
            for axes, start in zip(line, beside, strict=True):
                if start is None:
                    axes.set_axis_off()
                    continue
                drawn.append(axes)
                axes.set_title(_title(start, starts))
                for (at, variant, moment), points in series.items():
                    if at == start:
                        _line(axes, variant, moment, points, floor, hollow=trained and moment == "before")
                for row in printed:
                    if _start(row) == start:
                        _printed(axes, row)
                _untouched(axes, levels, floor)
        _scale(drawn[0], series, every, floor)
        _label(grid, places)
        handles = _handles(drawn[0], variants, levels, trained=trained, printed=bool(printed))
        legend(panel, handles, len(handles))

    height = 3.4 if len(places) == 1 else 2.5 * len(places)
    return Part(WIDTH, height + 0.5 + legend_height(1, 1), paint, [" ".join(notes)])


def _title(start: Start, starts: Sequence[Start]) -> str:
    """A start, with its batch norm where both are there; nothing where it is the only one."""
    rebn = " + rebn" if start[1] and _norms_differ(starts) else ""
    return f"{INITS[start[0]]}{rebn}".capitalize() if len(starts) > 1 else ""


def _label(grid: Any, places: Sequence[Sequence[Start | None]]) -> None:
    """The names of the axes, at the outermost panels of each line and column."""
    for line, beside in zip(grid, places, strict=True):
        first = next((axes for axes, start in zip(line, beside, strict=True) if start is not None), None)
        if first is not None:
            first.set_ylabel("test error (%)")
            first.tick_params(labelleft=True)
    for column in range(len(places[0])):
        last = [line[column] for line, beside in zip(grid, places, strict=True) if beside[column] is not None]
        for axes in last[-1:]:
            axes.set_xlabel("parameters (millions)")
            axes.tick_params(labelbottom=True)


def _start(row: Json) -> Start:
    return row["params"]["init"], bool(row["params"]["rebn"])


def _all(rows: Sequence[Json], moment: str) -> list[float]:
    """Errors at a moment: of every conversion that was judged, or of every training that has ended."""
    done = [row for row in rows if moment == "before" or row["status"] == "ok"]
    return [float(row[MOMENTS[moment]]) for row in done if row[MOMENTS[moment]] is not None]


def _points(rows: Sequence[Json], variant: str, moment: str) -> list[Point]:
    """Ascending in parameters."""
    points = []
    for n in groups_of(rows):
        mine = [row for row in rows if (row["params"]["variant"], row["params"]["groups"]) == (variant, n)]
        if errors := _all(mine, moment):
            points.append((statistics.fmean(row["counts"]["params"] for row in mine), errors))
    return sorted(points)


def _floor(errors: Sequence[float], document: Json) -> float:
    """Where an error of 0 stands on a logarithmic axis: half an image; 0 where there is none."""
    images = next((row["test_images"] for row in document["results"] if row.get("test_images")), None)
    return 50 / images if images and min(errors) <= 0 else 0.0


def _line(axes: Axes, variant: str, moment: str, points: Sequence[Point], floor: float, *, hollow: bool) -> None:
    """A variant along its parameters at one moment, with its spread over the seeds."""
    look = look_of(variant)
    look |= HOLLOW if hollow else {}
    means = [max(statistics.fmean(errors), floor) for _, errors in points]
    axes.plot([x for x, _ in points], means, label=f"_{moment} {variant}", **look)
    for (x, errors), mean in zip(points, means, strict=True):
        if len(errors) > 1 and (spread := statistics.stdev(errors)) > 0:
            below = min(spread, mean - floor) if floor else spread
            axes.errorbar(x, mean, [[below], [spread]], color=look["color"], linewidth=0.9, capsize=2, zorder=2.5)


def _printed(axes: Axes, row: Json) -> None:
    look = {"color": look_of(row["params"]["variant"])["color"], "marker": "x", "markersize": 5.0, "linestyle": "none"}
    place = [row["counts"]["params"]], [row["paper"]["error"]]
    axes.plot(*place, label=f"_paper {row['params']['variant']}", zorder=5, **look)


def _untouched(axes: Axes, levels: dict[str, list[float]], floor: float) -> None:
    """The network as it was, and once it is trained for as long."""
    for moment, errors in levels.items():
        level = max(statistics.fmean(errors), floor)
        axes.axhline(level, color="black", linestyle=LEVELS[moment][1], linewidth=0.9, zorder=2, label=f"_{moment}")


def _scale(axes: Axes, series: dict[Any, list[Point]], every: Sequence[float], floor: float) -> None:
    """The axes, which all panels share."""
    params = [x for points in series.values() for x, _ in points]
    axes.set_xscale("log")
    room = (max(params) / min(params)) ** 0.08 * 1.02
    axes.set_xlim(min(params) / room, max(params) * room)
    narrow = max(params) < 5 * min(params)
    log_ticks(axes.xaxis, params, lambda value: f"{value / 1e6:g}", FINE if narrow else None)
    found = [errors for points in series.values() for _, errors in points if len(errors) > 1]
    ends = [statistics.fmean(errors) + sign * statistics.stdev(errors) for errors in found for sign in (-1, 1)]
    scale_errors(axes, [max(error, floor) for error in every], [max(end, floor) for end in ends])


def _handles(
    axes: Axes, variants: Sequence[str], levels: dict[str, list[float]], *, trained: bool, printed: bool
) -> list[Line2D]:
    handles = [axes.plot([], [], label=label_of(variant), **look_of(variant))[0] for variant in variants]
    if trained:
        hollow = {**HOLLOW, "marker": "o", "markersize": 6.0, "linewidth": 0.9}
        handles += axes.plot([], [], color=GREY, label="before training", **hollow)
    for moment in levels:
        label, style = LEVELS[moment]
        handles += axes.plot([], [], color="black", linestyle=style, linewidth=0.9, label=label)
    if printed:
        handles += axes.plot([], [], color=GREY, marker="x", markersize=5.0, linestyle="none", label="paper")
    return handles


# --------------------------------------------------------------------------------------------------------------- layers

# What a layer's weights are: the field of the record, and how its line looks.
WEIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "copied": ("copied", {"color": "#888888", "marker": "s", "markersize": 5.6, "markerfacecolor": "none"}),
    "white": ("before", {"color": "#E69F00", "marker": "D", "markersize": 4.0}),
    "calibrated": ("after", {"color": "#0072B2", "marker": "o", "markersize": 3.0}),
}
LEAST = 0.1  # percent of a layer's output; what loses less stands there
BESIDE = 4  # panels side by side in a figure of the usual width
EACH = 0.115  # inches that a layer's name needs
CROWDED = 0.6  # size of markers where there is no room for names


def _layers(document: Json) -> Part:
    rows = [row for row in _converted(document) if _calibration(row)]
    rows = [row for row in rows if row["params"]["rebn"] == rows[-1]["params"]["rebn"]]
    if not rows:
        raise NothingToDraw("calibrated conversions; this result has none")
    variants, groups = _variants(rows), groups_of(rows)
    names = list(dict.fromkeys(layer["name"] for row in rows for layer in _calibration(row)))
    lost = {
        (variant, n): found
        for variant in variants
        for n in groups
        if (found := [_calibration(row) for row in rows if _at(row) == (variant, n)])
    }
    width = max(WIDTH, WIDTH / BESIDE * len(variants))
    spelt = len(names) * EACH <= (width - 0.7) / len(variants)
    below = 0.062 * max(map(len, names)) if spelt else 0.25
    every_layer = [layer for each in lost.values() for layers in each for layer in layers]
    every = [_percent(layer[field]) for layer in every_layer for field, _ in WEIGHTS.values()]
    scarce = any(layer["scarce"] for layer in every_layer)
    notes = [
        "Share of the energy of each layer's output that is lost on the images held out, on what the converted network "
        "before it gives."
    ]
    notes += ["Mean over the seeds."] if any(len(each) > 1 for each in lost.values()) else []
    notes += ["Hollow: calibrated on few images for as many weights."] if scarce else []
    notes += [f"Less than {LEAST:g} % stands at {LEAST:g} %."] if min(every) <= LEAST else []
    if not spelt:
        notes.append(f"Layers in the order in which they run, from {names[0]} to {names[-1]}.")

    def paint(panel: SubFigure) -> None:
        grid = panel.subplots(len(groups), len(variants), squeeze=False, sharex=True, sharey=True)
        panel.suptitle(f"What a layer loses when it is converted\n{_what(document)}", fontsize=9)
        for line, n in zip(grid, groups, strict=True):
            for axes, variant in zip(line, variants, strict=True):
                axes.set_title(f"{label_of(variant)}, N = {n}")
                if (variant, n) in lost:
                    _layer_panel(axes, names, lost[variant, n], 1.0 if spelt else CROWDED)
                else:
                    axes.set_axis_off()
            line[0].set_ylabel("output lost (%)")
        first = grid[0, 0]
        scale_errors(first, every)
        first.set_xlim(0.3, len(names) + 0.7)
        for axes in grid[-1]:
            if spelt:
                axes.set_xticks(range(1, len(names) + 1), names, rotation=90, fontsize=SMALL - 0.5)
            else:
                axes.set_xlabel("layer")
        handles = [first.plot([], [], label=name, **_weights_look(name))[0] for name in WEIGHTS]
        legend(panel, handles, len(handles))

    return Part(width, 1.45 * len(groups) + below + 0.7 + legend_height(1, 1), paint, [" ".join(notes)])


def _calibration(row: Json) -> list[Json]:
    """What the calibration of a row says of each layer, in the order in which they run."""
    found: Json = (row.get("convert") or {}).get("calibration") or {}
    layers: list[Json] = found.get("layers", [])
    return layers


def _at(row: Json) -> tuple[str, int]:
    return row["params"]["variant"], row["params"]["groups"]


def _percent(share: float) -> float:
    return max(100 * share, LEAST)


def _weights_look(name: str, size: float = 1.0) -> dict[str, Any]:
    """How the line of a set of weights looks, with markers of ``size`` times the usual."""
    look = WEIGHTS[name][1]
    return {**look, "markersize": size * look["markersize"], "linewidth": 1.0, "zorder": 3 + (name == "calibrated")}


def _layer_panel(axes: Axes, names: Sequence[str], each: Sequence[list[Json]], size: float) -> None:
    """The layers of one variant and N along the network, with the three sets of weights; markers of that ``size``."""
    by_name = {name: [layer for layers in each for layer in layers if layer["name"] == name] for name in names}
    places = [(place, by_name[name]) for place, name in enumerate(names, start=1) if by_name[name]]
    for name, (field, _) in WEIGHTS.items():
        look = _weights_look(name, size)
        y = [_percent(statistics.fmean(layer[field] for layer in layers)) for _, layers in places]
        axes.plot([place for place, _ in places], y, label=f"_{name}", **look)
    few = {place: layers for place, layers in places if any(layer["scarce"] for layer in layers)}
    hollow = {**_weights_look("calibrated", size), "linestyle": "none", "markerfacecolor": "white", "zorder": 5}
    heights = [_percent(statistics.fmean(layer["after"] for layer in layers)) for layers in few.values()]
    axes.plot(list(few), heights, label="_scarce", **hollow)


MAKERS: dict[str, Callable[[Json], Part]] = {"errors": _errors, "layers": _layers}
