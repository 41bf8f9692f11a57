"""What low rank loses of a standard convolution whose kernel has independent entries, on white input.

W is (m, p), p = Kn, with i.i.d. entries of mean 0 and variance s^2; sigma_1 >= sigma_2 >= ... are its singular values.
On white input a kernel D loses ||W - D||^2 of the output's energy, and by Eckart & Young (1936) the best D of rank r
loses sum_{i > r} sigma_i^2. The share of that in the expected energy m p s^2 depends on m, p and r alone.
"""

from __future__ import annotations

import math

from bgcbench.specs import VARIANTS, ConvSpec, Pair, check_positive, rank_of
from bgcbench.theory.exchangeable import border_factor, coverage
from bgcbench.theory.inputs import InputLaw


def marchenko_pastur_tail(rows: int, columns: int, rank: int) -> float:
    """Limit of E[sum_{i > r} sigma_i^2] / (m p s^2) for m = ``rows``, p = ``columns`` and r = ``rank`` that grow alike.

    With a = min(m, p), b = max(m, p), y = a/b, the a eigenvalues sigma_i^2 / (b s^2) get the density

        f(x) = sqrt((x+ - x)(x - x-)) / (2 pi y x),   x+- = (1 +- sqrt(y))^2                (Marchenko & Pastur, 1967)

    x = 1 + y + 2 sqrt(y) cos t makes both integrals elementary. The share of eigenvalues above x, which is r/a, is

        F(t) = (2/pi) int_0^t sin^2 u / (1 + y + 2 sqrt(y) cos u) du
             = [(1 + y) t - 2 sqrt(y) sin t - 2 (1 - y) arctan((1 - sqrt(y)) / (1 + sqrt(y)) tan(t/2))] / (2 pi y)

    and the energy of those below it, with x f(x) a semicircle, is

        (2/pi) int_t^pi sin^2 u du = (pi - t + sin t cos t) / pi

    t is found by bisection. The expectation of a finite kernel is O(1/a) away. Raises ShapeError for sizes below 1 and
    for a rank below 0; a rank above a loses nothing.
    """
    few, many = sorted((rows, columns))
    check_positive("rows and columns", few)
    check_positive("rank", rank, 0)
    if rank >= few:
        return 0.0
    y, root = few / many, math.sqrt(few / many)
    low, high = 0.0, math.pi
    while low < (t := (low + high) / 2) < high:
        turned = math.atan2((1 - root) * math.sin(t / 2), (1 + root) * math.cos(t / 2))
        above = ((1 + y) * t - 2 * root * math.sin(t) - 2 * (1 - y) * turned) / (2 * math.pi * y)
        low, high = (t, high) if above < rank / few else (low, t)
    return (math.pi - t + math.sin(t) * math.cos(t)) / math.pi


def limit_relative_error(spec: ConvSpec, size: Pair, law: InputLaw) -> float | None:
    """Least error of low rank over E||W||_par^2 E||x||^2 on white input, in the limit; None for all else.

    Taps that only meet padding are left out. Those that meet it at the border count as the mean of all: what that is
    off by is of second order in how much they differ.
    """
    if VARIANTS[spec.variant].solver != "svd" or spec.is_dense or not law.is_white:
        return None
    n, m, k = spec.in_channels, spec.out_channels, spec.kernel_positions
    used = int((coverage(spec, *size).diagonal() > 0).sum())
    rank = spec.rank or rank_of(n, m, spec.groups, k)
    return marchenko_pastur_tail(m, used * n, rank) * border_factor(spec, *size) / n
