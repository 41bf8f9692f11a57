"""Numbers as text. Units are formatted here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from bgcbench.specs import PLAN, VARIANTS

MIB = 2**20
NAMED = 4  # of layers, rows or warnings that one line names


def significant(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits, never in exponent form."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def scaled(value: float) -> str:
    """A count with k, M, G or T."""
    for factor, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return significant(value / factor) + letter
    return significant(value, 3) if value % 1 else f"{value:.0f}"


def time_unit(seconds: Iterable[float]) -> tuple[float, str]:
    """(factor, name) of the unit in which the largest of ``seconds`` reads best."""
    largest = max(seconds, default=1.0)
    for factor, name in ((1.0, "s"), (1e3, "ms")):
        if largest * factor >= 1:
            return factor, name
    return 1e6, "us"


def mebibytes(value: float) -> str:
    return f"{value / MIB:.2f}"


def ratio_text(value: float) -> str:
    return f"{value:.2f}" if value < 10 else significant(value, 3)


def bounds_text(ends: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    """ " [0.98, 1.02]" """
    return "" if ends is None else f" [{form(ends[0])}, {form(ends[1])}]"


def milli(value: float) -> str:
    """In thousandths, as the column's title says."""
    return f"{value * 1e3:.4f}"


def loss_text(share: float) -> str:
    """A share as a percentage without its sign: 31, 3.1, 0.3, <0.1, 0."""
    value = 100 * share
    if 1e-9 < value < 0.05:
        return "<0.1"
    return f"{value:.1f}" if 1e-9 < value < 9.95 else f"{value:.0f}"


def share_words(fraction: float) -> str:
    """A share of the parameters in words where English has one."""
    words = {1.0: "the same number of", 0.5: "half the", 0.25: "a quarter of the", 2.0: "twice the"}
    named = words.get(round(fraction, 6))
    return f"{named} parameters" if named else f"{significant(100 * fraction)} % of the parameters"


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """The first names, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def shape_text(kernel: Sequence[int], in_channels: int, out_channels: int, stride: int) -> str:
    """ "3x3 64->128 /2" """
    return f"{'x'.join(map(str, kernel))} {in_channels}->{out_channels}" + (f" /{stride}" if stride > 1 else "")


def label_of(variant: str) -> str:
    """A variant's name in tables; one that a newer version has written is called what it is."""
    return VARIANTS[variant].label if variant in VARIANTS else variant


def named(variant: str, groups: int, rank: int | None = None) -> str:
    """ "GC N=4", "LR r=16", "plan" """
    return PLAN if variant == PLAN else f"{label_of(variant)} {size_text(groups, rank)}"


def size_text(groups: int, rank: int | None) -> str:
    return f"N={groups}" if rank is None else f"r={rank}"
