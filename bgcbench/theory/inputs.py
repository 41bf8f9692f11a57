"""The random inputs on which approximability is asked for, by name. No torch here.

An input is a stack of channels x_1..x_n, each a row (or image) of values that are independent from position to
position. All the laws here have exchangeable channels: equal mean mu, equal variance v, and one correlation rho between
the values of two channels at one position. Three numbers therefore say everything that a second moment can see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bgcbench.errors import UsageError

LARGEST_MEAN = 1000  # its square is added to 1 in a second moment
NAMES = ("normal", "uniform", "normal:MU", "relu", "factor:RHO")


@dataclass(frozen=True)
class InputLaw:
    """One law of the input values; ``name`` is what the command line calls it.

        normal       N(0, 1)                               the paper's
        uniform      U(-1, 1)                              the paper's
        normal:MU    N(MU, 1)                              a mean that no variant but BGC carries between groups
        relu         max(0, N(0, 1))                       what follows a rectified norm
        factor:RHO   sqrt(RHO) f + sqrt(1 - RHO) e_j       one common factor f a position, 0 <= RHO <= 1

    Raises UsageError for any other name and for a parameter out of its range.
    """

    name: str
    kind: str
    parameter: float | None = None

    @classmethod
    def parse(cls, text: str) -> InputLaw:
        """The law called ``text``."""
        kind, colon, given = text.partition(":")
        if kind in ("normal", "uniform", "relu") and not colon:
            return cls(text, kind)
        if kind not in ("normal", "factor") or not colon:
            raise UsageError(f"unknown input '{text}': choose from {', '.join(NAMES)}")
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if kind == "factor" and not 0.0 <= value <= 1.0:
            raise UsageError(f"input '{text}': RHO is the share of a common factor, a number from 0 to 1")
        if kind == "normal" and not abs(value) <= LARGEST_MEAN:
            raise UsageError(
                f"input '{text}': MU is a mean in standard deviations, a number from -{LARGEST_MEAN} to "
                f"{LARGEST_MEAN}; beyond that rounding hides what the channels do not share"
            )
        if kind == "normal" and value == 0.0:
            return cls("normal", kind)
        return cls(f"{kind}:{repr(value).removesuffix('.0')}", kind, value)

    @property
    def mean(self) -> float:
        """mu = E[x_j]."""
        if self.kind == "relu":
            return 1 / math.sqrt(2 * math.pi)
        return self.parameter or 0.0 if self.kind == "normal" else 0.0

    @property
    def variance(self) -> float:
        """v = Var[x_j]."""
        return {"uniform": 1 / 3, "relu": 0.5 - 0.5 / math.pi}.get(self.kind, 1.0)

    @property
    def correlation(self) -> float:
        """rho = Corr[x_i, x_j] of two channels at one position."""
        return self.parameter or 0.0 if self.kind == "factor" else 0.0

    @property
    def is_white(self) -> bool:
        """Whether its values are uncorrelated and have mean 0."""
        return self.mean == self.correlation == 0

    @property
    def independent(self) -> bool:
        """Whether the channels are independent, as Assumption 3.1 (ii) asks."""
        return self.correlation == 0.0
