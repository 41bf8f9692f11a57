"""A network's time by layer, before and after: each shape of convolution, and what stands in its place."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.plots import style
from bgcbench.plots.speedups import workload
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document, printable, shortened
from bgcbench.results.times import LAYER_PHASES, LayerTime, layer_times
from bgcbench.specs import PHASE_TITLES, PLAN

SHAPES, LETTERS = 15, 34  # shapes with a bar of their own; letters of one's name
NOTE = (
    "Each convolution by itself, which is an estimate: in the network some of it is fused. Names: N of the variant in "
    "its place."
)


def part(document: Document) -> style.Paint:
    found = {phase: times for phase in LAYER_PHASES if (times := layer_times(document.results, phase))}
    if not found:
        raise style.NothingToDraw("convolutions measured by themselves (--layers); this result has none")
    *_, last = found.values()
    shown = [one.own.params.layer for one in sorted(last, key=lambda one: -one.before_s)[:SHAPES]]
    variants = {row.params.variant for times in found.values() for one in times for row, _ in one.parts}
    planned = any(row.params.variant == PLAN for row in document.results)

    def paint(panel: SubFigure) -> None:
        after = "as planned" if planned else "with the fastest variant in place"
        about = workload(document.results[0]), document.environment.where
        style.title(panel, document, f"Convolutions of the network: time before, and {after}", *about)
        for axes, phase in style.grid_of(panel, [[*found]], "milliseconds a call", "", sharex=False):
            by_layer = {one.own.params.layer: one for one in found[phase]}
            own = [[by_layer[layer]] for layer in shown if layer in by_layer]
            others = [one for layer, one in by_layer.items() if layer not in shown]
            _bars(axes, own + [others] * bool(others))
            before_s, after_s = sum(one.before_s for one in found[phase]), sum(one.after_s for one in found[phase])
            axes.set_title(f"{PHASE_TITLES[phase]}: {1e3 * before_s:.3g} ms, then {1e3 * after_s:.3g} ms")
        style.legend(panel, style.bar_looks(sorted(variants, key=variant_place)), [NOTE])

    return paint


def _bars(axes: Axes, lines: Sequence[Sequence[LayerTime]]) -> None:
    """A wide bar of the time before under a narrow one of what stands there afterwards, downwards from the longest."""
    names, longest = [], 1e3 * max(sum(one.before_s for one in line) for line in lines)
    for place, line in enumerate(lines):
        first = line[0].own.layer
        label = f"{first.label} (x{first.count})" if first and len(line) == 1 else f"{len(line)} other shapes"
        names.append(shortened(printable(label), LETTERS))
        at, before = 0.0, 1e3 * sum(one.before_s for one in line)
        axes.barh(place, before, 0.8, color=style.BEFORE, label="_before")
        parts = [pair for one in line for pair in one.parts]
        for row, seconds in parts:
            axes.barh(place, 1e3 * seconds, 0.4, left=at, color=style.bar_colour(row.params.variant), label="_after")
            at += 1e3 * seconds
        chosen = dict.fromkeys(row.params.cell for row, _ in parts if row.params.variant != "standard")
        text = ", ".join(style.label_of(*cell).replace("N = ", "") for cell in chosen)
        axes.text(max(before, at) + 0.01 * longest, place, text, va="center", fontsize=6.5)
    axes.set_yticks(range(len(names)), names, fontsize=6.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * longest)
    axes.grid(visible=False, axis="y")
