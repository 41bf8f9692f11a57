"""The bounds that Lee, Park & Lee prove (Theorems 3.5 and 3.6), as shares of E||W||_par^2 E||x||^2. No torch here.

Both theorems bound E_W inf E_x ||Wx - Vx||^2 over the kernels V of a variant. Under Assumption 3.1 (the W_ij
identically distributed; the x_j i.i.d.; W and x independent):

    gc    K (1 - 1/N)^2        bgc   K (1 - 1/N)^3

and, if also the W_ij are i.i.d. with zero mean (Assumption 3.2):

    gc    (K/n) (1 - 1/N)      bgc   (K/n) (1 - 1/N)^2

(The display of the second bound of Theorem 3.5 prints W_bal where W_gp is meant.) Neither is attained here: K/n in
place of 1/n (times the border's factor) is lost wherever neighbouring values are not fully correlated, and the weights
in the proof of Theorem 3.6 are not the best ones, (1 - 1/N)^2 against 1 - 2/N.
"""

from __future__ import annotations

from dataclasses import dataclass

from bgcbench.theory.inputs import InputLaw

# p, the power of (1 - 1/N) in the second bounds: what scales the errors of Figure 2 (its text says 1 and 2; its
# caption, 2 and 3, does not fit the figure).
SCALING_POWER = {"gc": 1, "shuffle": 1, "bgc": 2}


@dataclass(frozen=True)
class Bound:
    """A bound's value, or why there is none."""

    value: float | None
    reason: str | None = None


def bounds(variant: str, groups: int, kernel_positions: int, in_channels: int, law: InputLaw) -> tuple[Bound, Bound]:
    """(general, zero-mean) bounds for weights that are i.i.d. with zero mean and inputs of ``law``."""
    if variant not in ("standard", "gc", "bgc"):
        missing = Bound(None, f"the paper has no bound for {variant}")
        return missing, missing
    if groups == 1:
        return Bound(0.0), Bound(0.0)
    if not law.independent:
        failed = Bound(None, f"Assumption 3.1 (ii) fails: the channels of '{law.name}' are not independent")
        return failed, failed
    lost = 1.0 - 1.0 / groups
    power = SCALING_POWER[variant]
    general = kernel_positions * lost ** (power + 1)
    return Bound(general), Bound(kernel_positions / in_channels * lost**power)
