"""The pictures of ``approx`` documents."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.errors import UsageError
from bgcbench.plots import (
    GREY,
    SMALL,
    WIDTH,
    NothingToDraw,
    Part,
    counted,
    groups_of,
    label_of,
    legend,
    legend_height,
    log_ticks,
    state_of,
)
from bgcbench.results import Json
from bgcbench.specs import LINEAR, VARIANTS
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER
from bgcbench.theory.fits import EXACT
from bgcbench.theory.inputs import InputLaw
from bgcbench.theory.pareto import front, uncertainty_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import SubFigure

NOTHING = "the result has no finished row with an error above 0; run approx first"
# By input: how a marker is filled, how lines are dashed, how much larger markers are.
INPUT_LOOKS: tuple[tuple[str, Any, float], ...] = (
    ("full", "-", 1.0),
    ("none", "--", 1.35),
    ("left", ":", 1.0),
    ("top", "-.", 1.0),
    ("right", (0, (8, 2)), 1.0),
    ("bottom", (0, (4, 1, 1, 1, 1, 1)), 1.0),
)
SMOOTH = 100  # points of a curve
COLOURS, EMPTY = "cividis", "#e6e6e6"  # of the heat map, and of its cells without a number
LEGIBLE = 0.179  # relative luminance (WCAG) above which black reads better than white


def makers(document: Json) -> dict[str, Callable[[Json], Part]]:
    """What is drawn where no picture is named; the front of the first input, where there is more than gc and bgc."""
    chosen = dict(MAKERS)
    if {row["params"]["variant"] for row in _sampled(document)} - {"standard", "gc", "bgc"}:
        chosen["pareto"] = lambda document: _pareto(document, all_inputs=False)
    else:
        del chosen["pareto"]
    return chosen


def _sampled(document: Json) -> list[Json]:
    """The finished rows of sampled convolutions."""
    return [row for row in document["results"] if row["params"]["input"] != "activations" and row["status"] == "ok"]


def _lossy(rows: Sequence[Json]) -> list[Json]:
    """Those with an error to take the logarithm of, as in :mod:`bgcbench.theory.fits`."""
    return [row for row in rows if row["params"]["groups"] > 1 and row["relative_error"] > EXACT]


def _series(rows: Sequence[Json]) -> dict[tuple[str, str], list[Json]]:
    """Rows by (variant, input), ascending in N; inputs in order of appearance, variants in the registered order."""
    names = list(dict.fromkeys(row["params"]["input"] for row in rows))
    found: dict[tuple[str, str], list[Json]] = {}
    for name in names:
        for variant in VARIANTS:
            mine = [r for r in rows if (r["params"]["variant"], r["params"]["input"]) == (variant, name)]
            if mine:
                found[variant, name] = sorted(mine, key=lambda row: int(row["params"]["groups"]))
    return found


def _shape(document: Json, rows: Sequence[Json]) -> str:
    """The convolutions and their number, for a title."""
    p = rows[0]["params"]
    size = f"length {p['length']}" if p["dims"] == 1 else f"{p['length']} x {p['length']} px"
    stride = f", stride {p['stride']}" if p["stride"] != 1 else ""
    return (
        f"{p['dims']}-D convolutions, {p['in_channels']} to {p['out_channels']} channels, k = {p['kernel']}{stride}, "
        f"{size}; S = {p['samples']}{state_of(document)}"
    )


def _look(variant: str, name: str, names: Sequence[str]) -> dict[str, Any]:
    """Marker options of a variant on an input."""
    colour, marker, size = VARIANTS[variant].look
    fill, _, larger = INPUT_LOOKS[names.index(name) % len(INPUT_LOOKS)]
    return {
        "color": colour,
        "marker": marker,
        "markersize": size * larger,
        "fillstyle": fill,
        "markerfacecoloralt": "white",
        "markeredgewidth": 1.0,
        "linestyle": "none",
        "zorder": 3 + 1 / size,
    }


def _exact_line(axes: Axes, x: Sequence[float], y: Sequence[float], at: tuple[str, str], names: Sequence[str]) -> None:
    """Exact values of a variant on an input, ``at``, as a thin line; a single one as a dash."""
    axes.plot(
        x,
        y,
        label=f"_exact {at[0]}, {at[1]}",
        color=_look(*at, names)["color"],
        linestyle=INPUT_LOOKS[names.index(at[1]) % len(INPUT_LOOKS)][1],
        linewidth=0.9,
        marker="_" if len(x) == 1 else "",
        markersize=14,
        zorder=2,
    )


def _columns(labels: Sequence[str], inputs: int) -> int:
    """Columns of a legend whose labels go by input: one an input if they fit side by side."""
    each = math.ceil(len(labels) / inputs)
    longest = [max(len(label) for label in labels[i : i + each]) for i in range(0, len(labels), each)]
    wide = [0.048 * length + 0.4 for length in longest]  # inches
    return inputs if sum(wide) <= WIDTH else max(1, min(inputs, int(WIDTH / max(wide))))


# ---------------------------------------------------------------------------------------- figures 1 and 2 of the paper


def _figure1(document: Json) -> Part:
    rows = _lossy(_sampled(document))
    if not rows:
        raise NothingToDraw("rows of sampled convolutions with N > 1 and an error above 0; this result has none")
    series = _series(rows)
    names = list(dict.fromkeys(name for _, name in series))
    slopes = {(fit["variant"], fit["input"]): fit for fit in document.get("fits", [])}
    labels = {at: f"{label_of(at[0])}, {at[1]}: {_slopes(slopes.get(at))}" for at in series}
    columns = _columns(list(labels.values()), len(names))

    def paint(panel: SubFigure) -> None:
        axes, handles = panel.subplots(), []
        axes.set_title(f"Error against 1 - 1/N\n{_shape(document, rows)}")
        for (variant, name), mine in series.items():
            x = [math.log(1 - 1 / row["params"]["groups"]) for row in mine]
            y = [math.log(row["error"]) for row in mine]
            look = _look(variant, name, names)
            handles += axes.plot(x, y, label=labels[variant, name], **look)
            numbers, curve = _exact_curve(variant, name, mine)
            unit = statistics.fmean(row["error"] / row["relative_error"] for row in mine)
            if numbers:
                lines = [math.log(1 - 1 / n) for n in numbers], [math.log(unit * error) for error in curve]
                _exact_line(axes, *lines, (variant, name), names)
            else:
                axes.plot(x, y, label=f"_join {variant}, {name}", color=look["color"], linewidth=0.6, alpha=0.4)
        groups = groups_of(rows)
        axes.set_xticks(*_apart(groups, [math.log(1 - 1 / n) for n in groups]))
        axes.set_xlabel("N, spaced as log(1 - 1/N)")
        axes.set_ylabel("log E   (natural; E: output energy an input)")
        legend(panel, handles, columns)

    height = 3.9 + legend_height(len(series), columns)
    return Part(WIDTH, height, paint, [*_lines_note(rows), *_left_out(document)])


def _slopes(fit: Json | None) -> str:
    if fit is None or fit["slope_mean"] is None:
        return "no slope"
    exact = "" if fit["exact_slope_mean"] is None else f" (exact {fit['exact_slope_mean']:.2f})"
    return f"slope {fit['slope_mean']:.2f}{exact}"


def _apart(groups: Sequence[int], at: Sequence[float]) -> tuple[list[float], list[str]]:
    """Places of ticks and their labels, N; the last, and before it those that do not touch the one after."""
    least = 0.035 * (at[-1] - at[0])
    shown = [len(at) - 1]
    for i in reversed(range(len(at) - 1)):
        if at[shown[-1]] - at[i] >= least:
            shown.append(i)
    return [at[i] for i in reversed(shown)], [str(groups[i]) for i in reversed(shown)]


def _exact_curve(variant: str, name: str, rows: Sequence[Json]) -> tuple[list[float], list[float]]:
    """(N, exact relative error) between the smallest and the largest N of ``rows``; empty where none is known.

    A curve through real N where the closed form is c (1 - 1/N), or c (1 - 2/N) for BGC, which has that on every input
    (theory.exchangeable); otherwise the values at the measured N.
    """
    known = {
        row["params"]["groups"]: row["exact_relative_error"]
        for row in rows
        if row["exact_relative_error"] is not None and row["exact_relative_error"] > EXACT
    }
    kept = VARIANTS[variant].unknowns(1, 1) if variant in LINEAR else None
    if len(known) < 2 or kept is None or not (variant == "bgc" or _white(name)):
        return [float(n) for n in known], list(known.values())
    constant = statistics.fmean(error / (1 - kept / n) for n, error in known.items())
    first, last = min(known), max(known)
    numbers = [first * (last / first) ** (i / (SMOOTH - 1)) for i in range(SMOOTH)]
    return numbers, [constant * (1 - kept / n) for n in numbers]


def _white(name: str) -> bool:
    """Whether the law's values are uncorrelated and have mean 0."""
    try:
        law = InputLaw.parse(name)
    except UsageError:  # a law of a newer version
        return False
    return law.mean == 0 and law.correlation == 0


def _left_out(document: Json, variants: Sequence[str] = tuple(VARIANTS)) -> list[str]:
    """A note on the rows without a logarithm."""
    rows = [row for row in _sampled(document) if row["params"]["variant"] in variants]
    there = _lossy(rows)
    gone = [row["params"] for row in rows if row not in there]
    named = dict.fromkeys(f"{label_of(p['variant'])} N = {p['groups']}" for p in gone)
    return [f"Not drawn, because nothing is lost: {', '.join(named)}."] if named else []


def _lines_note(rows: Sequence[Json]) -> list[str]:
    """What markers and thin lines are, and how far apart they have to be."""
    exact = [row for row in rows if row["exact_relative_error"] is not None]
    lowest = 1 - min(row["in_sample_factor"] for row in exact or rows)
    below = f", which is lower by up to {100 * lowest:.2g} %" if lowest > 0.001 else ""
    lines = " Thin lines: exact." if exact else ""
    return [f"Markers: measured, least squares within the sample{below}.{lines}"]


CONSTRUCTION = "the proof's construction"


def _figure2(document: Json) -> Part:
    variants = ("gc", "bgc")
    rows = [row for row in _lossy(_sampled(document)) if row["params"]["variant"] in variants]
    if not rows:
        raise NothingToDraw("rows of gc or bgc on sampled convolutions with N > 1; this result has none")
    every = [row for row in _sampled(document) if row["params"]["variant"] == "bgc" and row["params"]["groups"] > 1]
    series, built = _series(rows), _series([r for r in every if r["construction_relative_error"] is not None])
    names = list(dict.fromkeys(row["params"]["input"] for row in rows))
    p = rows[0]["params"]
    ceiling = (p["in_channels"], p["out_channels"], p["kernel"]) == (*[paper.FIGURE_CHANNELS] * 2, 3)
    columns = _columns([f"{label_of('bgc')}, {name}: {CONSTRUCTION}" for name in names], len(names))
    inner = 2.9

    def paint(panel: SubFigure) -> None:
        axes, handles = panel.subplots(), []
        axes.set_title(f"Error over a power of 1 - 1/N\n{_shape(document, rows)}")
        axes.set_xscale("log", base=2)
        for variant, name in dict.fromkeys([*series, *built]):
            mine, look = series.get((variant, name), []), _look(variant, name, names)
            x, y = [row["params"]["groups"] for row in mine], [1e3 * row["scaled_error"] for row in mine]
            if mine:
                handles += axes.plot(x, y, label=f"{label_of(variant)}, {name}", **look)
            numbers, curve = _exact_curve(variant, name, mine)
            if numbers:
                scaled = [1e3 * e / _power(variant, n) for n, e in zip(numbers, curve, strict=True)]
                _exact_line(axes, numbers, scaled, (variant, name), names)
            if mine := built.get((variant, name), []):
                x = [row["params"]["groups"] for row in mine]
                y = [1e3 * r["construction_relative_error"] / _power(variant, r["params"]["groups"]) for r in mine]
                faint = {**look, "marker": "x", "markersize": 5 * look["markersize"] / 6, "alpha": 0.6, "zorder": 5}
                handles += axes.plot(x, y, label=f"{label_of(variant)}, {name}: {CONSTRUCTION}", **faint)
        if ceiling:
            axes.axhline(1e3 * paper.FIGURE_CEILING, color="black", linestyle=":", linewidth=1, label="_ceiling")
            axes.annotate(
                f"paper: all below {1e3 * paper.FIGURE_CEILING:.2f}e-3",
                (1, 1e3 * paper.FIGURE_CEILING),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 8),
                textcoords="offset points",
                ha="right",
                fontsize=SMALL + 0.5,
            )
        axes.margins(y=0.13)
        _error_bars(axes, series, names, inner)
        groups = groups_of([*rows, *every])
        ticks, texts = _apart(groups, [math.log2(n) for n in groups])
        axes.set_xticks([2**at for at in ticks], texts)
        axes.minorticks_off()
        axes.set_xlabel("N")
        axes.set_ylabel("1000 Rel. E / (1 - 1/N)^p,   p = " + _powers(series))
        legend(panel, handles, columns)

    height = inner + 0.9 + legend_height(len(series) + len(built), columns)
    return Part(WIDTH, height, paint, [*_lines_note(rows), *_left_out(document, variants)])


def _power(variant: str, groups: float) -> float:
    return float((1 - 1 / groups) ** SCALING_POWER[variant])


def _powers(series: dict[tuple[str, str], list[Json]]) -> str:
    variants = dict.fromkeys(variant for variant, _ in series)
    return ", ".join(f"{SCALING_POWER[variant]} for {label_of(variant)}" for variant in variants)


def _error_bars(axes: Axes, series: dict[tuple[str, str], list[Json]], names: Sequence[str], height: float) -> None:
    """One standard error up and down, where it is longer than the marker hides."""
    low, high = axes.get_ylim()
    for (variant, name), mine in series.items():
        look = _look(variant, name, names)
        for row in mine:
            n = row["params"]["groups"]
            bar = 1e3 * (row["relative_error_se"] or 0.0) / _power(variant, n)
            if bar / (high - low) * height * 72 > look["markersize"] / 2:
                axes.errorbar(n, 1e3 * row["scaled_error"], bar, color=look["color"], linewidth=0.8, capsize=2)


# -------------------------------------------------------------------------------------------------------------- pareto

COSTS = {"params": "parameters", "macs": "multiply-adds an input"}
PANEL = (3.1, 2.2)  # inches of a panel's axes, nearly


def _pareto(document: Json, *, all_inputs: bool = True) -> Part:
    rows = [row for row in _sampled(document) if row["counts"] and row["output_relative_error"] is not None]
    if not rows:
        raise NothingToDraw("finished rows of sampled convolutions; this result has none")
    series = _series(rows)
    names = list(dict.fromkeys(name for _, name in series))[: None if all_inputs else 1]
    variants = list(dict.fromkeys(variant for variant, name in series if name in names))
    notes = [
        "Filled: on the Pareto front (nothing cheaper on it is as good within three standard errors). Numbers: N."
        + (" SC: the standard convolution." if "standard" in variants else "")
    ]

    def paint(panel: SubFigure) -> None:
        grid = panel.subplots(len(names), 2, squeeze=False, sharex="col", sharey="row")
        panel.suptitle(f"What is lost against what it costs\n{_shape(document, rows)}", fontsize=9)
        for name, line in zip(names, grid, strict=True):
            mine = [row for (_, at), found in series.items() if at == name for row in found]
            for axes, (cost, words) in zip(line, COSTS.items(), strict=True):
                _front_panel(axes, mine, cost)
                if name == names[-1]:
                    axes.set_xlabel(words)
            line[0].set_ylabel("output error (% of its energy)")
            line[0].set_title(f"input: {name}", loc="left", fontsize=8)
        handles = [grid[0, 0].plot([], [], label=label_of(v), **_look(v, names[0], names[:1]))[0] for v in variants]
        handles += grid[0, 0].plot([], [], color=GREY, linewidth=1, label="Pareto front")
        legend(panel, handles, len(handles))

    return Part(WIDTH, 2.7 * len(names) + 0.9 + legend_height(1, 1), paint, notes)


def _front_panel(axes: Axes, rows: Sequence[Json], cost: str) -> None:
    costs = [row["counts"][cost] for row in rows]
    errors = [row["output_relative_error"] for row in rows]
    chosen = front(costs, errors, [uncertainty_of(row) for row in rows])
    for row, x, error, on in zip(rows, costs, errors, chosen, strict=True):
        look = _look(row["params"]["variant"], "", [""])
        if on:
            look |= {"markeredgecolor": "black", "markeredgewidth": 0.8, "zorder": 4 + 1 / look["markersize"]}
        else:
            look["fillstyle"] = "none"
        axes.plot([x], [100 * error], label=f"_{'front' if on else 'off'} {row['key']}", **look)
    along = [(x, 100 * error, row) for x, error, row, on in zip(costs, errors, rows, chosen, strict=True) if on]
    best = {x: min(y for at, y, _ in along if at == x) for x, _, _ in sorted(along, key=lambda point: point[0])}
    axes.step(list(best), list(best.values()), where="post", color=GREY, linewidth=1, zorder=1.5, label="_front")
    axes.set_xscale("log")
    axes.margins(x=0.14)
    low, high = 100 * min(errors), 100 * max(errors)
    room = max(high - low, 10.0)
    axes.set_ylim(min(0.0, low - 0.15 * room), high + 0.08 * room)
    texts = {x: _along([row["params"] for at, _, row in along if at == x]) for x in best}
    for x in _clear(axes, texts, best):
        axes.annotate(
            texts[x],
            (x, best[x]),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SMALL,
            linespacing=1.0,
            zorder=5,
        )
    log_ticks(axes.xaxis, costs, counted)


def _clear(axes: Axes, texts: dict[float, str], best: dict[float, float]) -> list[float]:
    """Which of ``texts``, each below and to the left of its place, can stand without touching one to the right."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = PANEL[0] / math.log(right / left), PANEL[1] / (high - low)
    shown: list[tuple[float, float, float, float, float]] = []
    for x in sorted(texts, reverse=True):
        lines = texts[x].splitlines()
        end, top = width * math.log(x / left), height * best[x]
        start, bottom = end - 0.05 * max(len(line) for line in lines), top - 0.1 * len(lines)
        if all(end <= s or start >= e or top <= b or bottom >= t for _, s, e, b, t in shown):
            shown.append((x, start, end, bottom, top))
    return [place[0] for place in shown]


def _along(params: Sequence[Json]) -> str:
    """The label of one place on the front: N, and of which variant it is where several stand there."""
    numbers = list(dict.fromkeys(p["groups"] for p in params))
    if len(numbers) == 1 and numbers != [1]:
        return str(numbers[0])
    return "\n".join(label_of(p["variant"]) + (f" {p['groups']}" if p["groups"] > 1 else "") for p in params)


# ------------------------------------------------------------------------------------------------------------ heat map

# Inches. Panels stand side by side until their cells would be narrower than the least.
LEAST_CELL, CELL, CELL_HEIGHT = 0.44, 0.6, 0.21
PANELS = 6.2


def _heatmap(document: Json) -> Part:
    rows = [row for row in document["results"] if row["params"]["input"] == "activations"]
    rows = [row for row in rows if row["params"]["variant"] != "standard"]
    if not any(_calibrated(row) is not None for row in rows):
        raise NothingToDraw("finished rows of a network's layers (approx --model); this result has none")
    layers = list(dict.fromkeys(row["params"]["layer"] for row in rows))
    groups = groups_of(rows)
    variants = [variant for variant in VARIANTS if any(row["params"]["variant"] == variant for row in rows)]
    values = {
        (row["params"]["variant"], row["params"]["layer"], row["params"]["groups"]): _calibrated(row) for row in rows
    }
    p = rows[0]["params"]
    across = max(1, min(len(variants), int(PANELS / (LEAST_CELL * len(groups) + 0.25))))
    down = math.ceil(len(variants) / across)
    least, wanted = (
        0.075 * max(len(name) for name in layers) + across * (cell * len(groups) + 0.25) + 1.1
        for cell in (LEAST_CELL, CELL)
    )
    width = max(least, min(WIDTH, max(wanted, 5.0)))
    notes = [
        "Share of each layer's output energy that is lost on images held out, with weights solved for on the "
        "activations of the others."
    ]
    if None in values.values() or len(values) < len(layers) * len(groups) * len(variants):
        notes.append("-: N does not fit the layer's channels, or the layer was not computed.")
    unfinished = "" if document.get("complete", True) else "; not complete"
    title = [
        f"Error of {p['model']} ({'untrained' if p['weights'] == 'none' else 'weights ' + p['weights']}) by layer",
        f"{p['calibration_images']} images of {p['data']}{unfinished}",
    ]
    title = [line for text in title for line in textwrap.wrap(text, int(11 * width), break_long_words=True)]

    def paint(panel: SubFigure) -> None:
        from matplotlib import colormaps

        colours = colormaps[COLOURS]
        grid = panel.subplots(down, across, squeeze=False)
        panel.suptitle("\n".join(title), fontsize=9)
        flat = [axes for line in grid for axes in line]
        for axes, variant in zip(flat, variants, strict=False):
            cells = [[values.get((variant, layer, n)) for n in groups] for layer in layers]
            image = _cells(axes, cells, colours)
            axes.set_title(label_of(variant))
            axes.set_xticks(range(len(groups)), [str(n) for n in groups])
            axes.set_xlabel("N")
            axes.set_yticks(range(len(layers)), layers if axes in grid[:, 0] else [""] * len(layers))
        for axes in flat[len(variants) :]:
            axes.set_axis_off()
        more = any(value is not None and value > 1 for value in values.values())
        ending = "max" if more else "neither"
        bar = panel.colorbar(image, ax=flat, label="output error (%)", aspect=30, pad=0.02, extend=ending)
        outline: Any = bar.outline
        outline.set_visible(False)

    height = down * (max(CELL_HEIGHT * len(layers), 1.1) + 0.75) + 0.2 * len(title) + 0.2
    return Part(width, height, paint, notes)


def _calibrated(row: Json) -> float | None:
    errors = row.get("output_relative_error")
    return errors["calibrated"] if errors else None


def _cells(axes: Axes, cells: Sequence[Sequence[float | None]], colours: Colormap) -> Any:
    """The cells of one panel, each with its number (percent) on it."""
    from matplotlib.patches import Rectangle

    percent = [[math.nan if value is None else 100 * value for value in line] for line in cells]
    image = axes.imshow(percent, cmap=colours, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for i, line in enumerate(percent):
        for j, value in enumerate(line):
            colour = "black"
            if math.isnan(value):
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=EMPTY, edgecolor="white"))
            elif _luminance(colours(min(value, 100) / 100)) < LEGIBLE:
                colour = "white"
            axes.text(j, i, _percent(value), ha="center", va="center", color=colour, fontsize=SMALL + 0.5)
    return image


def _percent(value: float) -> str:
    """A cell's number: 47, 4.7, <0.1, 0, or - where there is none."""
    if math.isnan(value):
        return "-"
    if value <= 100 * EXACT:
        return "0"
    if value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): 0 for black to 1 for white."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


MAKERS: dict[str, Callable[[Json], Part]] = {
    "figure1": _figure1,
    "figure2": _figure2,
    "pareto": _pareto,
    "heatmap": _heatmap,
}
