"""What a plan gives: the curve of the best plans with the networks that were measured, and each layer's cost."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import SubFigure

from bgcbench.plots.style import (
    GREY,
    Look,
    NothingToDraw,
    Paint,
    grid_of,
    label_of,
    layer_axis,
    legend,
    log_ticks,
    look_of,
    title,
)
from bgcbench.plots.times import BEFORE, ENDS
from bgcbench.results.document import Document
from bgcbench.results.rows import PlanFacts, PlanRow
from bgcbench.specs import BUDGETS, VARIANTS, cost_kind

PLANNED: Look = {"color": "#0072B2", "marker": "*", "markersize": 11.0, "markeredgecolor": "black", "zorder": 6}
CURVE: Look = {"color": "#0072B2", "linewidth": 1.2, "zorder": 2}
Cost = Callable[[PlanRow], float | None]
# By the kind of cost its words and unit, what a row costs, and the share of it that is kept.
COSTS: dict[str, tuple[str, float, Cost, Cost]] = {
    "params": (
        "parameters (thousands)",
        1e-3,
        lambda row: row.counts.params if row.counts else None,
        lambda row: row.params_ratio,
    ),
    "macs": (
        "MACs of an image (millions)",
        1e-6,
        lambda row: row.counts.macs if row.counts else None,
        lambda row: row.macs_ratio,
    ),
    "time": ("milliseconds a call, as in the network", 1e3, lambda row: row.seconds, lambda row: row.time_ratio),
}
SHARED = "Line: predicted for the best plans. Marks: measured on images never planned on."


def curve(document: Document) -> Paint:
    """Predicted loss of the best plans against their cost, and what the planned and the uniform networks lose."""
    facts, kind = _facts(document)
    measured = [row for row in _rows(document, "proof") if row.params.subject != "dense" and row.logit_error]
    *_, share = COSTS[kind]
    at = {row.key: x for row in measured if (x := share(row)) is not None}
    points = [point for point in facts.curve if point.loss > 0]
    if not points or not at:
        raise NothingToDraw("a finished plan with networks that were compared")
    shown = [row for row in measured if row.key in at]

    def paint(panel: SubFigure) -> None:
        title(panel, document, "The best plans, and the same choice for all layers", _about(document))
        ((axes, _),) = grid_of(
            panel, [[True]], f"share of the {BUDGETS[kind]} kept", "error of the outputs (of variance)"
        )
        axes.plot([point.cost for point in points], [point.loss for point in points], label="_curve", **CURVE)
        for row in shown:
            look = PLANNED if row.params.subject == "plan" else look_of(variant_of(row))
            axes.plot([at[row.key]], [row.logit_error or 0.0], label=f"_{row.key}", **{**look, "linestyle": "none"})
        axes.set_yscale("log")
        losses = [point.loss for point in points] + [row.logit_error or 0.0 for row in shown]
        log_ticks(axes.yaxis, losses, lambda value: f"{value:g}")
        looks = {"best plans": CURVE, "plan": {**PLANNED, "linestyle": "none"}}
        looks |= {
            row.params.subject or "": look_of(variant_of(row), linestyle="none")
            for row in shown
            if row.params.subject != "plan"
        }
        legend(panel, looks, [SHARED])

    return paint


def cost(document: Document) -> Paint:
    """What every layer costs before and after, coloured by what it becomes."""
    _, kind = _facts(document)
    words, unit, cost_of, _ = COSTS[kind]
    chosen, dense = _rows(document, "choice"), {}
    for row in _rows(document, "cost"):
        if row.params.variant == "standard":
            dense[row.params.layer] = cost_of(row)
    if not chosen or any(cost_of(row) is None or dense.get(row.params.layer) is None for row in chosen):
        raise NothingToDraw("the costs of all layers")
    names = [row.params.layer or "" for row in chosen]

    def paint(panel: SubFigure) -> None:
        title(panel, document, "What each layer costs, before and after")
        ((axes, _),) = grid_of(panel, [[True]], "", words)
        places = range(len(chosen))
        axes.bar(places, [unit * (dense[name] or 0.0) for name in names], color=BEFORE, label="_before")
        after = [unit * (cost_of(row) or 0.0) for row in chosen]
        colours = [_colour(row) for row in chosen]
        axes.bar(places, after, width=0.5, color=colours, label="_after")
        order = layer_axis(axes, names)
        axes.set_xlim(-0.7, len(names) - 0.3)
        looks: dict[str, Look] = {"before": {"color": BEFORE, "linewidth": 7.0, **ENDS}}
        for row in chosen:
            variant = variant_of(row)
            label = "stays" if variant == "standard" else label_of(variant)
            looks[label] = {"color": _colour(row), "linewidth": 4.0, **ENDS}
        legend(panel, looks, [order])

    return paint


def _facts(document: Document) -> tuple[PlanFacts, str]:
    if document.plan is None:
        raise NothingToDraw("a plan")
    return document.plan, cost_kind(document.plan.kind)


def _rows(document: Document, stage: str) -> list[PlanRow]:
    return [row for row in document.results if row.params.stage == stage and row.status == "ok"]


def variant_of(row: PlanRow) -> str:
    """Of a layer what it becomes, of a network what all of its layers are."""
    return row.params.variant if row.params.stage != "proof" else row.key.removeprefix("proof-")


def _colour(row: PlanRow) -> str:
    variant = variant_of(row)
    return GREY if variant == "standard" else VARIANTS[variant].look[0]


def _about(document: Document) -> str:
    params = document.results[0].params
    return f"{params.model} (weights {params.weights}) on {params.data}"
