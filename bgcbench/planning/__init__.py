"""Which convolution of a network becomes what: costs, losses, and the choice that is best for a budget.

No torch here: what the command line and the function ``bgcbench.plan`` share before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from bgcbench.errors import ResultFileError, UsageError, reason_of
from bgcbench.specs import RUNTIME, Choice

TRIED = ("gc", "shuffle", "tlgc", "bgc", "lowrank")  # the variants, where none are named
FORMAT = "bgcbench.plan/1"
PLAN_MODES = ("eager", "compile", RUNTIME)  # of bgcbench.specs.MODES, in which a plan's times may be measured


def asked_for(budgets: Mapping[str, float | None], dashes: str = "") -> tuple[str, float]:
    """The kind of budget that is asked for, and how much; all MACs where there is none. Raises UsageError for two.

    dashes: before a kind's name as it is typed.
    """
    asked = {kind: value for kind, value in budgets.items() if value is not None}
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(dashes + kind for kind in asked)} are two budgets; give one")
    return next(iter(asked.items()), ("macs", 1.0))


def read_plan(path: str | PathLike[str]) -> tuple[dict[str, Choice], dict[str, Any]]:
    """What a file says each convolution becomes, by name, and the budget: kind, asked, and cost and loss as predicted.

    path: what ``Plan.save`` and ``bgcbench plan --save`` write, a result file of ``bgcbench plan``, or the choices
    alone, which have no budget. Raises ResultFileError for any other file.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
        choices, budget = _choices_in(stored)
        return {name: _choice(name, choice) for name, choice in choices.items()}, budget
    except OSError as problem:
        raise ResultFileError(f"{path} cannot be read ({problem.strerror})") from problem
    except UsageError as problem:
        raise ResultFileError(f"{path} is no plan: {problem}") from None
    except (ValueError, RecursionError) as problem:
        raise ResultFileError(f"{path} is no plan: {reason_of(problem)}") from problem


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises UsageError for a name that it has twice, as after a copied line was edited."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UsageError(f"it has {next(name for name in names if names.count(name) > 1)} twice; keep one")
    return found


def _choices_in(stored: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The choices and the budget, of which nothing is checked yet; raises UsageError where there are none."""
    found, budget = stored, {}
    if isinstance(stored, dict) and "schema" in stored:
        if stored.get("command") != "plan":
            raise UsageError(f"it is a result of bgcbench {stored.get('command')}; give one of bgcbench plan")
        facts = stored.get("plan") or {}
        found = facts.get("choices")
        budget = {ours: facts.get(name) for ours, name in _BUDGET.items()}
        if not found:
            raise UsageError("its run has not come to the choice yet; bgcbench plan --resume goes on with it")
    elif isinstance(stored, dict) and "choices" in stored:
        written = stored.get("format", FORMAT)
        if written != FORMAT:
            raise UsageError(f"its format is {written}, and this version reads {FORMAT}")
        found, budget = stored["choices"], stored.get("budget", {})
        if not isinstance(budget, dict) or not budget.keys() <= _BUDGET.keys():
            raise UsageError(f"its budget may have {', '.join(_BUDGET)}")
    if not isinstance(found, dict) or not found:
        raise UsageError("it must be {name of a convolution: {variant, groups}}, with one at least")
    return found, budget


_BUDGET = {"kind": "kind", "asked": "asked", "cost": "predicted", "loss": "loss"}  # by name: that in a result file


def _choice(name: str, given: Any) -> Choice:
    try:
        return Choice.of(given)
    except (UsageError, TypeError) as problem:
        raise UsageError(f"{name}: {problem}") from None
