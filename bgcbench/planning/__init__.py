"""Which convolution of a network becomes what: costs, losses, and the choice that is best for a budget.

No torch here: what the command line and the function ``bgcbench.plan`` share before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping

from bgcbench.errors import UsageError

TRIED = ("gc", "shuffle", "tlgc", "bgc", "lowrank")  # the variants, where none are named


def asked_for(budgets: Mapping[str, float | None], dashes: str = "") -> tuple[str, float]:
    """The kind of budget that is asked for, and how much; all MACs where there is none. Raises UsageError for two.

    dashes: before a kind's name as it is typed.
    """
    asked = {kind: value for kind, value in budgets.items() if value is not None}
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(dashes + kind for kind in asked)} are two budgets; give one")
    return next(iter(asked.items()), ("macs", 1.0))
