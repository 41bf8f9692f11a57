"""Closed forms for how well a variant can stand in for a standard convolution."""

from __future__ import annotations

from bgcbench.specs import LINEAR, VARIANTS


def white_error(variant: str, groups: int, rank: int | None = None) -> float | None:
    """Least share of the output's energy lost, E||Wx - Vx||^2 / E||Wx||^2, on white input.

    White input: i.i.d. zero-mean channels. The expectation is over standard convolutions W with i.i.d. zero-mean
    entries; V runs over the variant's kernels with N = ``groups``:

        standard      0
        gc, shuffle   1 - 1/N    (one of N blocks in each row survives; the bound of Theorem 3.5 is attained)
        bgc           1 - 2/N    (N >= 2; the N - 1 shared blocks keep their mean, so N - 2 of N are lost)

    All three are 1 minus the share of dimensions that the linear space has. N = 1 is the standard convolution: 0. The
    construction in the proof of Theorem 3.6 (Lee, Park & Lee) reaches only (1 - 1/N)^2, which is 1/N^2 above BGC's
    optimum. Returns None where no closed form is known: searches, low rank (:mod:`bgcbench.theory.lowrank`).
    """
    if rank is None and (variant == "standard" or groups == 1):
        return 0.0
    if variant not in LINEAR:
        return None
    return 1.0 - VARIANTS[variant].unknowns(1, groups) / groups
