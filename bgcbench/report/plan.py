"""The tables of a ``plan`` document: the networks compared, what each convolution becomes, and the curve."""

from __future__ import annotations

from collections.abc import Sequence

from bgcbench.report.format import bounds_text, named, ratio_text
from bgcbench.report.notes import notes, together
from bgcbench.report.table import Column, Report, Table, label, row_record, words
from bgcbench.results.document import Document
from bgcbench.results.rows import CurvePoint, PlanFacts, PlanRow
from bgcbench.specs import BUDGETS, PHASE_TITLES, cost_kind


def plan_report(document: Document) -> Report:
    rows: list[PlanRow] = list(document.results)
    plan, asked, runtime = document.plan, document.asked, document.settings.runtime
    every = [row for row in rows if row.params.stage == "proof"]
    proof = [row for row in every if row.status != "invalid"]
    chosen = [row for row in rows if row.params.stage == "choice"]
    about = rows[0].params if rows else None
    title = [f"{about.model} (weights {about.weights}) on {about.data}"] if about else ["plan"]
    title.append(document.environment.where)
    if (asked.mode or "eager", asked.phase or "fwd") != ("eager", "fwd"):
        title.append(f"timed in {runtime or asked.mode}, {PHASE_TITLES[asked.phase or 'fwd']}")
    tables = []
    if proof:
        sections = {"In words": _said(plan, proof) if plan else []}
        tables.append(Table(title, PROOF, proof, sections, "The networks, on images never planned on"))
    if trials := [row for row in rows if row.params.stage == "trial" and row.status == "ok"]:
        tables.append(Table(["What was tried out, on images held out of calibration"], TRIALS, trials))
    if chosen or not proof:
        tables.append(Table([] if proof else title, CHOICES, chosen, caption="What each convolution becomes"))
    if plan and plan.curve:
        tables.append(Table([f"The best plans, by {BUDGETS[cost_kind(plan.kind)]}"], CURVE, plan.curve))
    facts = ["predicted loss ranks plans; what a plan really loses is in the table of networks"] if chosen else []
    missing = together((row.params.subject or "", row.reason or "") for row in every if row.status == "invalid")
    facts += [f"not among the networks: {line}" for line in missing]
    return Report(tables, notes(document, facts), [row_record(row, ("params", "macs")) for row in rows])


def _choice(row: PlanRow) -> str:
    params = row.params
    return "dense" if params.variant == "standard" else named(params.variant, params.groups, params.rank)


def _subject(row: PlanRow) -> str:
    return row.params.subject or "" if row.params.variant == "standard" else _choice(row)


def _time(row: PlanRow) -> str | None:
    return None if row.time_ratio is None else f"{row.time_ratio:.3f}{bounds_text(row.time_ratio_ci95, ratio_text)}"


def _better(row: PlanRow) -> str:
    more = "" if row.better_cost is None else f" +{row.better_cost:.2%}"
    return f"{row.better}{more}" if row.better else "-"


SUBJECT = "The original (dense), the plan, or one choice for every convolution that it fits."
OF_ALL = "Of all convolutions that may be replaced, to the original's."
OF_NETWORK = "Of the whole network, to the original's, with a 95 % confidence interval."
OF_LAYER = "To the layer's own."
AGREES = "Images on which the first guess is the original's. Labels are not needed."
WRONG = "Labelled images on which the first guess is wrong."
TOP5 = "The original's first guess is among the first five."
KL = "Mean of KL(original || network) over the images, in nats."
TRIED_OUT = (
    "The plan by what the network feels of each layer, by the layers' own losses, by its real losses, and the best "
    "choice of each variant for all layers."
)
HELD_OUT = "Squared error of the class scores on images held out of calibration, as a share of their variance."
LOGITS = "Squared error of the class scores, as a share of their variance over the images."
FELT = (
    "Predicted share of the variance of the network's outputs: the loss times the sensitivity to the layer, less what "
    "the convolutions behind it make up for."
)
BETTER = "The least costly choice that loses less, and what it would cost more, of what the network costs."
SHARE = "{:.3f}".format
THREE_DIGITS = "{:.3g}".format
COSTS: list[Column[PlanRow]] = [
    Column("params", lambda row: row.params_ratio, OF_ALL, SHARE, "params, network"),
    Column("MACs", lambda row: row.macs_ratio, OF_ALL, SHARE, "MACs, network"),
]
PROOF: list[Column[PlanRow]] = [
    label("network", _subject, SUBJECT),
    *COSTS,
    Column("time", _time, OF_NETWORK, name="time, network"),
    Column("error %", lambda row: row.error, WRONG, "{:.2f}".format, optional=True),
    Column("agrees %", lambda row: row.agreement, AGREES, "{:.1f}".format),
    Column("top-5 %", lambda row: row.top5, TOP5, "{:.1f}".format, drop=2),
    Column("KL", lambda row: row.kl, KL, THREE_DIGITS, drop=3),
    Column("logit error", lambda row: row.logit_error, LOGITS, THREE_DIGITS, drop=1),
]
TRIALS: list[Column[PlanRow]] = [
    label("tried out", _subject, TRIED_OUT),
    *COSTS,
    Column("error of outputs", lambda row: row.logit_error, HELD_OUT, THREE_DIGITS),
]
CHOICES: list[Column[PlanRow]] = [
    label("layer", lambda row: row.params.layer, "A convolution, in the order of execution."),
    words("convolution", lambda row: row.params.shape, "Channels and kernel.", drop=3),
    words("becomes", _choice, "Its choice; dense: it stays."),
    Column("params", lambda row: row.params_ratio, OF_LAYER, SHARE),
    Column("MACs", lambda row: row.macs_ratio, OF_LAYER, SHARE),
    Column("time", lambda row: row.time_ratio, f"{OF_LAYER} As it shows in the network.", SHARE, optional=True),
    Column("loss", lambda row: row.loss, "Share of the output's variance, on images held out.", "{:.2%}".format),
    Column("felt", lambda row: row.felt, FELT, "{:.2%}".format, drop=1),
    words("better", _better, BETTER, drop=2),
]
CURVE: list[Column[CurvePoint]] = [
    Column("cost", lambda point: point.cost, "Share of the original's.", SHARE),
    Column("predicted loss", lambda point: point.loss, "Of the variance of the network's outputs.", THREE_DIGITS),
]


def _said(plan: PlanFacts, proof: Sequence[PlanRow]) -> list[str]:
    """What was asked, what is measured, and how the plan compares with the best single choice."""
    own = next((row for row in proof if row.params.subject == "plan"), None)
    if own is None or own.agreement is None:
        return []
    lines = []
    if plan.asked < 1 and plan.measured is not None:
        bounds = own.time_ratio_ci95 if plan.kind == "time" else None
        ends = f" (95% CI {bounds[0]:.2f}-{bounds[1]:.2f})" if bounds else ""
        measured = "is measured" if plan.kind in ("time", "loss") else "is kept"
        lines.append(f"{plan.asked:g} of the {BUDGETS[plan.kind]} was asked, {plan.measured:.3g}{ends} {measured}")
    dense = next((row for row in proof if row.params.subject == "dense"), None)
    lines.append(f"the first guess agrees with the original's on {own.agreement:.1f} % of {own.test_images} images")
    if own.error is not None and dense is not None and dense.error is not None:
        lines[-1] += f", and is wrong on {own.error:.1f} % (the original's: {dense.error:.1f} %)"
    others = [row for row in proof if row.params.subject not in ("dense", "plan") and row.agreement is not None]
    if others:
        best = max(others, key=lambda row: row.agreement or 0.0)
        lines.append(f"the best single choice at that budget, {_subject(best)}, on {best.agreement:.1f} %")
    return lines
