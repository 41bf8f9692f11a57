"""What a plan gives: the curve of the best plans with the networks that were measured, and each layer's cost."""

from __future__ import annotations

from matplotlib.figure import SubFigure

from bgcbench.plots import style
from bgcbench.plots.style import Look, NothingToDraw, Paint
from bgcbench.results.document import Document
from bgcbench.results.rows import PlanFacts, PlanRow
from bgcbench.specs import BUDGETS, cost_kind

PLANNED: Look = {"color": "#0072B2", "marker": "*", "markersize": 11.0, "markeredgecolor": "black", "zorder": 6,
                 "linestyle": "none"}  # fmt: skip
CURVE: Look = {"color": "#0072B2", "linewidth": 1.2, "zorder": 2}
# By the kind of cost: its words and unit.
UNITS = {
    "params": ("parameters (thousands)", 1e-3),
    "macs": ("MACs of an image (millions)", 1e-6),
    "time": ("milliseconds a call, as in the network", 1e3),
}
SHARED = "Line: predicted for the best plans. Marks: measured on images never planned on."


def curve(document: Document) -> Paint:
    """Predicted loss of the best plans against their cost, and what the planned and the uniform networks lose."""
    facts, kind = _facts(document)
    measured = [row for row in _rows(document, "proof") if row.params.subject != "dense" and row.logit_error]
    shown = [(x, row.logit_error or 0.0, row) for row in measured if (x := _share(row, kind)) is not None]
    points = [point for point in facts.curve if point.loss > 0]
    if not points or not shown:
        raise NothingToDraw("a finished plan with networks that were compared")

    def paint(panel: SubFigure) -> None:
        style.title(panel, document, "The best plans, and the same choice for all layers", _about(document))
        x, y = f"share of the {BUDGETS[kind]} kept", "error of the outputs (of variance)"
        ((axes, _),) = style.grid_of(panel, [[True]], x, y)
        axes.plot([point.cost for point in points], [point.loss for point in points], label="_curve", **CURVE)
        looks = {"best plans": CURVE, "plan": PLANNED}
        for at, loss, row in shown:
            look = PLANNED if row.params.subject == "plan" else style.look_of(variant_of(row), linestyle="none")
            axes.plot([at], [loss], label=f"_{row.key}", **look)
            looks[row.params.subject or ""] = look
        axes.set_yscale("log")
        style.log_ticks(axes.yaxis, [*(point.loss for point in points), *(loss for _, loss, _ in shown)], "{:g}".format)
        style.legend(panel, looks, [SHARED])

    return paint


def cost(document: Document) -> Paint:
    """What every layer costs before and after, coloured by what it becomes."""
    _, kind = _facts(document)
    words, unit = UNITS[kind]
    chosen = _rows(document, "choice")
    dense = {row.params.layer: _cost(row, kind) for row in _rows(document, "cost") if row.params.variant == "standard"}
    if not chosen or any(_cost(row, kind) is None or dense.get(row.params.layer) is None for row in chosen):
        raise NothingToDraw("the costs of all layers")
    names = [row.params.layer or "" for row in chosen]
    variants = [variant_of(row) for row in chosen]

    def paint(panel: SubFigure) -> None:
        style.title(panel, document, "What each layer costs, before and after")
        ((axes, _),) = style.grid_of(panel, [[True]], "", words)
        before = [unit * (dense[name] or 0.0) for name in names]
        after = [unit * (_cost(row, kind) or 0.0) for row in chosen]
        axes.bar(range(len(names)), before, color=style.BEFORE, label="_before")
        axes.bar(range(len(names)), after, 0.5, color=list(map(style.bar_colour, variants)), label="_after")
        order = style.layer_axis(axes, names)
        axes.set_xlim(-0.7, len(names) - 0.3)
        style.legend(panel, style.bar_looks(variants), [order])

    return paint


def _cost(row: PlanRow, kind: str) -> float | None:
    if kind == "time" or row.counts is None:
        return row.seconds if kind == "time" else None
    return row.counts.params if kind == "params" else row.counts.macs


def _share(row: PlanRow, kind: str) -> float | None:
    """Of the cost, what is kept."""
    return {"params": row.params_ratio, "macs": row.macs_ratio, "time": row.time_ratio}[kind]


def _facts(document: Document) -> tuple[PlanFacts, str]:
    if document.plan is None:
        raise NothingToDraw("a plan")
    return document.plan, cost_kind(document.plan.kind)


def _rows(document: Document, stage: str) -> list[PlanRow]:
    return [row for row in document.results if row.params.stage == stage and row.status == "ok"]


def variant_of(row: PlanRow) -> str:
    """Of a layer what it becomes, of a network what all of its layers are."""
    return row.params.variant if row.params.stage != "proof" else row.key.removeprefix("proof-")


def _about(document: Document) -> str:
    params = document.results[0].params
    return f"{params.model} (weights {params.weights}) on {params.data}"
