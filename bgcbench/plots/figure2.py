"""The relative error over (1 - 1/N)^p against N, of GC and BGC: Figure 2 of Lee, Park & Lee."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bgcbench.plots.sampled import (
    exact_curve,
    exact_line,
    finished,
    inputs_of,
    look_on,
    lossy,
    notes_of,
    sampled_title,
    series_of,
)
from bgcbench.plots.style import NothingToDraw, Part, label_of, legend
from bgcbench.results.document import Document, printable
from bgcbench.theory import paper
from bgcbench.theory.bounds import SCALING_POWER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

CONSTRUCTION = "the proof's construction"


def part(document: Document) -> Part:
    every = [row for row in finished(document) if row.params.variant in ("gc", "bgc")]
    rows = lossy(every)
    if not rows:
        raise NothingToDraw("rows of gc or bgc on sampled convolutions with N > 1; this result has none")
    names, built = inputs_of(rows), [row for row in every if row.params.variant == "bgc" and row.params.groups > 1]

    def paint(panel: SubFigure) -> None:
        axes, handles = panel.subplots(), []
        sampled_title(panel, document, "Error over a power of 1 - 1/N")
        measured = series_of(rows)
        for at, found in series_of([*rows, *built]).items():
            label, look = f"{label_of(at[0])}, {printable(at[1])}", look_on(at, names)
            if mine := measured.get(at, []):
                x, y = [row.params.groups for row in mine], [1e3 * (row.scaled_error or 0.0) for row in mine]
                handles += axes.plot(x, y, label=label, **look)
                bars = [1e3 * (row.relative_error_se or 0.0) / _power(at[0], row.params.groups) for row in mine]
                axes.errorbar(x, y, bars, color=look["color"], linewidth=0.8, linestyle="none", zorder=2.5)
                numbers, curve = exact_curve(at, mine)
                exact = [1e3 * error / _power(at[0], n) for n, error in zip(numbers, curve, strict=True)]
                exact_line(axes, numbers, exact, at, names)
            proofs = {r.params.groups: r.construction_relative_error for r in found if at[0] == "bgc"}
            known = {n: 1e3 * error / _power(at[0], n) for n, error in proofs.items() if error is not None}
            if known:
                faint = {**look, "marker": "x", "markersize": 5.0, "alpha": 0.6, "zorder": 5}
                handles += axes.plot([*known], [*known.values()], label=f"{label}: {CONSTRUCTION}", **faint)
        p = rows[0].params
        if (p.in_channels, p.out_channels, p.kernel) == (paper.FIGURE_CHANNELS, paper.FIGURE_CHANNELS, 3):
            _ceiling(axes)
        axes.margins(y=0.13)
        axes.set_xscale("log", base=2)
        groups = sorted({row.params.groups for row in [*rows, *built]})
        axes.set_xticks(groups, [str(n) for n in groups])
        axes.minorticks_off()
        axes.set_xlabel("N")
        powers = ", ".join(f"{SCALING_POWER[v]} for {label_of(v)}" for v in dict.fromkeys(v for v, _ in measured))
        axes.set_ylabel(f"1000 Rel. E / (1 - 1/N)^p,   p = {powers}")
        legend(panel, handles, notes_of(every), columns=min(len(names), 3))

    return Part(4.8, paint)


def _power(variant: str, groups: float) -> float:
    return float((1 - 1 / groups) ** SCALING_POWER[variant])


def _ceiling(axes: Axes) -> None:
    """The line that the paper reads from its figure."""
    ceiling = 1e3 * paper.FIGURE_CEILING
    axes.axhline(ceiling, color="black", linestyle=":", linewidth=1, label="_ceiling")
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 8), "textcoords": "offset points"}
    axes.annotate(f"paper: all below {ceiling:.2f}e-3", (1, ceiling), ha="right", fontsize=7.5, **place)
