"""The error of a linear variant on given inputs, as a quadratic form in the standard convolution's weights.

A variant that is a linear space of kernels sees only z = T u of a patch u in the rows of group k. With the second
moment M = sum u u^T, the least error of one row w of W is w S w^T with the Schur complement

    S = M - M T^T (T M T^T)^+ T M = M - H^T H

which does not depend on W. Over many convolutions the errors add up to <S, G> = <M, G> - <H G, H>, G = sum w^T w over
their rows in group k: the convolutions enter through their own second moment alone.

    gc, shuffle   z_k = u^k               (shuffle: for other rows)
    bgc           z_k = [u^k ; ubar]; here [u^k ; t], t = sum over l != k of u^l: the same span, better conditioned

so the factor H of bgc is that of gc with more rows below. Moments: (nK, nK), u in unfold order, groups contiguous in
the channels; p = nK/N.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bgcbench.specs import LINEAR, VARIANTS

SEES_MEAN = {name: VARIANTS[name].sees_mean for name in LINEAR}

# A Gram matrix whose pivots' squares spread further than this is not trusted to Cholesky.
_SINGULAR = {torch.float64: 1e-12, torch.float32: 1e-5}


@dataclass(frozen=True)
class Explained:
    """H for one group: ``own`` (at most p, nK), from u^k, and ``mean`` (at most p, nK), what t adds; None if not asked.

    The rows are orthonormal combinations of the regressors, times M.
    """

    own: Tensor
    mean: Tensor | None

    @property
    def factor(self) -> Tensor:
        """All rows: those of own, then those of mean."""
        return self.own if self.mean is None else torch.cat([self.own, self.mean])


def explained(moment: Tensor, group: int, groups: int, *, with_mean: bool) -> Explained:
    """H of group ``group`` of N = ``groups``, for gc and, ``with_mean``, for bgc too."""
    size = len(moment) // groups
    at = slice(group * size, (group + 1) * size)
    rows = moment[at]  # E[u^k u^T]: (p, nK)
    own = _half(rows[:, at], rows, rows[:, at])
    if not with_mean or groups == 1:
        return Explained(own, None)
    rest = moment.unflatten(0, (groups, size)).sum(0) - rows  # E[t u^T]: (p, nK)
    scale = _others(rest, groups, at)  # E[t t^T]: (p, p)
    rest = rest - _others(own, groups, at).T @ own
    gram = _others(rest, groups, at)
    return Explained(own, _half(gram, rest, scale))


def _others(rows: Tensor, groups: int, at: slice) -> Tensor:
    """The columns of ``rows`` (r, nK) summed over the groups but one: (r, p)."""
    summed: Tensor = rows.unflatten(1, (groups, -1)).sum(1)
    return summed - rows[:, at]


def _half(gram: Tensor, rows: Tensor, scale: Tensor) -> Any:
    """H with H^T H = rows^T gram^+ rows. gram: (p, p), what is left of ``scale``; rows: (p, nK)."""
    lower, info = torch.linalg.cholesky_ex(gram)
    least = float(lower.diagonal().min()) ** 2
    if int(info) == 0 and least > _SINGULAR[gram.dtype] * float(scale.diagonal().max()):
        return torch.linalg.solve_triangular(lower, rows, upper=False)
    values, vectors = torch.linalg.eigh(gram)
    cutoff = float(scale.diagonal().max()) * 10 * len(gram) * torch.finfo(gram.dtype).eps
    kept = values > cutoff
    return (vectors[:, kept] / values[kept].sqrt()).T @ rows


def squared_norms(moment: Tensor, factors: Explained) -> tuple[float, float]:
    """tr(S^2) without and with the mean: the spread of w S w^T over Gaussian rows w (see the SE in experiments).

    S is formed: from the norms of its parts the large ones would have to cancel.
    """
    left = torch.addmm(moment, factors.own.T, factors.own, alpha=-1)
    own = float(left.square().sum())
    if factors.mean is None:
        return own, own
    return own, float(left.addmm_(factors.mean.T, factors.mean, alpha=-1).square().sum())


def centred(moment: Tensor, groups: int) -> Tensor:
    """sum (u - ubar)(u - ubar)^T, ubar being subtracted from every group: what the proof of Theorem 3.6 looks at."""
    blocks: Tensor = moment.unflatten(0, (groups, -1))  # (N, p, nK)
    blocks = (blocks - blocks.mean(0, keepdim=True)).flatten(0, 1).unflatten(1, (groups, -1))  # (nK, N, p)
    return (blocks - blocks.mean(1, keepdim=True)).flatten(1)


def outside(form: Tensor, rows: Tensor, group: int, groups: int, whole: float | None = None) -> float:
    """<form, rows> over the entries outside of the group's rows and columns; both (nK, nK), symmetric.

    whole: <form, rows> over all entries, where it is known already.
    With form = M it is the error of the diagonal blocks (the proof of Theorem 3.5), with form = centred(M) that of A^k
    = W^kk, B^k = sum over l != k of W^kl (the proof of Theorem 3.6), for rows = G.
    """
    size = len(form) // groups
    at = slice(group * size, (group + 1) * size)
    stripe = float((form[at] * rows[at]).sum())
    corner = float((form[at, at] * rows[at, at]).sum())
    return (inner_product(form, rows) if whole is None else whole) - 2 * stripe + corner


def inner_product(left: Tensor, right: Tensor) -> float:
    """<left, right> = sum of the products of all entries."""
    return float(torch.dot(left.reshape(-1), right.reshape(-1)))
