"""Least squares in second moments: the best kernel of a given structure, without the data matrix.

A convolution at one position is y = W u, with u the patch vector (im2col order: channel-major, then kernel
positions; length nK) and W the kernel flattened to (m, nK). If a structured kernel sees only z = T u, its best
coefficients for inputs with C = E[u u^T] solve the normal equations  X (T C T^T) = W C T^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.errors import ShapeError, UsageError

# A pivot's square below this share of the largest power may be rounding: what it stands for is dependent.
_DEPENDENT = 1e-9


@dataclass(frozen=True)
class Regression:
    """The moments that least squares needs of outputs y (m,) to be made from inputs u (nK,).

    moment: E[u u^T] (nK, nK). cross: E[y u^T] (m, nK). power: E|y|^2. About zero, or all about means.
    """

    moment: Tensor
    cross: Tensor
    power: float

    def error(self, kernel: Tensor) -> float:
        """E|y - V u|^2 for V = ``kernel`` (m, nK) or (m, n, kh, kw); rounding leaves no negative number."""
        flat = kernel.detach().flatten(1)
        explained = 2 * float((flat * self.cross).sum()) - float(((flat @ self.moment) * flat).sum())
        return max(0.0, self.power - explained)


@dataclass(frozen=True)
class Fit:
    """What a projection by least squares is to fit: inputs with ``second_moment`` C = E[u u^T] (nK, nK).

    cross_moment: E[y u^T] (m, nK) of the outputs wanted, None for those of the standard kernel itself, W C. ridge: how
    far it is pulled towards the white optimum. settled: the relative fall of the error at which a search in turns
    (TLGC's) ends.
    """

    second_moment: Tensor
    cross_moment: Tensor | None = None
    ridge: float = 0.0
    settled: float = 1e-8


def check_second_moment(second_moment: Tensor, weight: Tensor) -> Tensor:
    """``second_moment`` in float64 on the weight's device; raises unless it is (nK, nK) for ``weight``."""
    size = weight[0].numel()
    if second_moment.shape != (size, size):
        raise ShapeError(
            f"second_moment has shape {tuple(second_moment.shape)}, but a weight of shape {tuple(weight.shape)} "
            f"needs ({size}, {size}): in_channels x kernel positions on each side"
        )
    return second_moment.to(device=weight.device, dtype=torch.float64)


def check_cross_moment(cross_moment: Tensor | None, weight: Tensor, moment: Tensor) -> Tensor:
    """E[y u^T] (m, nK) in float64 where ``moment`` is: as given, or W C for the outputs y = W u.

    Raises ShapeError unless what is given is (m, nK).
    """
    if cross_moment is None:
        return weight.flatten(1).to(moment.dtype) @ moment
    if cross_moment.shape != (len(weight), len(moment)):
        raise ShapeError(
            f"cross_moment has shape {tuple(cross_moment.shape)}, but a weight of shape {tuple(weight.shape)} needs "
            f"({len(weight)}, {len(moment)}): out_channels, and in_channels x kernel positions"
        )
    return cross_moment.to(moment)


def shrunk(weight: Tensor, fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """(W', C', K') of ``fit`` with white noise added to the inputs (see :func:`shrink_to_white`), all float64.

    C' = C + r I and K' = K + r W, r = ridge tr(C)/dim. W' (m, n, kh, kw) is the best dense kernel for it, K' C'^+, so
    that E|y - V u|^2 = tr((W' - V) C' (W' - V)^T) + a constant for every V: what searches for a structure looks at. It
    is W where there is no cross moment.
    """
    plain = check_second_moment(fit.second_moment, weight)
    moment = shrink_to_white(plain, fit.ridge)
    own = weight.to(moment.dtype)
    if fit.cross_moment is None:
        return own, moment, own.flatten(1) @ moment
    cross = check_cross_moment(fit.cross_moment, weight, moment)
    cross = cross + fit.ridge * plain.diagonal().mean() * own.flatten(1)
    return solve_normal(moment, cross).reshape(own.shape), moment, cross


def solve_normal(gram: Tensor, cross: Tensor, *, ridge: float = 0.0, prior: Tensor | None = None) -> Tensor:
    """X minimising E||y - X z||^2 + lam ||X - prior||^2, from gram = E[z z^T] and cross = E[y z^T].

    gram: (..., p, p) symmetric positive semidefinite; cross, prior, result: (..., q, p).
    lam = ridge * tr(gram) / p, so ``ridge`` has no unit. With ridge 0 the pseudo-inverse is used: z may be
    linearly dependent (for two groups the mean nearly repeats its parts), and X is then the one of least norm.
    Raises UsageError for a negative ridge.
    """
    if ridge < 0:
        raise UsageError(f"ridge={ridge} must be 0 or positive")
    if ridge == 0:
        return _least_norm(gram, cross)
    size = gram.shape[-1]
    # Where z is 0 throughout (a dead group of inputs) the prior remains.
    least = torch.finfo(gram.dtype).tiny ** 0.5
    lam = (ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]).clamp_min(least)  # (..., 1, 1)
    anchored = cross if prior is None else cross + lam * prior
    damped = gram + lam * torch.eye(size, dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(damped)
    # A ridge below rounding leaves a matrix that is not positive any more; the slower way does not mind.
    solved = torch.linalg.solve(damped, anchored.mT) if info.any() else torch.cholesky_solve(anchored.mT, lower)
    return solved.mT


def _least_norm(gram: Tensor, cross: Tensor) -> Tensor:
    """cross gram^+; by Cholesky, ten times faster, where the pivots show full rank.

    gram: (..., p, p); cross: (..., q, p).
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1) if gram.shape[-1] else pivots.sum(-1)
    if not info.any() and bool((pivots > _DEPENDENT * largest[..., None]).all()):
        solved: Tensor = torch.cholesky_solve(cross.mT, lower).mT
        return solved
    least: Tensor = cross @ torch.linalg.pinv(gram, hermitian=True)
    return least


def condition_number(gram: Tensor, steps: int = 20) -> float:
    """Largest over smallest eigenvalue of the symmetric ``gram`` (p, p), estimated; infinite where it is singular.

    Power iteration with ``gram`` and with its Cholesky factor: each eigenvalue is found from within the spectrum, so
    the estimate is never too large, and a matrix that is hard to solve is recognised all the same.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        return float("inf")
    start = torch.linspace(1.0, 2.0, len(gram), dtype=gram.dtype, device=gram.device).sin()[:, None]  # (p, 1)

    def largest(apply: Callable[[Tensor], Tensor]) -> float:
        vector, size = start / start.norm(), 0.0
        for _ in range(steps):
            image = apply(vector)
            size = float(image.norm())
            if not 0.0 < size < float("inf"):
                return size
            vector = image / size
        return size

    return largest(lambda v: gram @ v) * largest(lambda v: torch.cholesky_solve(v, lower))


def best_ridge(ridges: Sequence[float], error: Callable[[float], float], least: float) -> tuple[float, float | None]:
    """(error, ridge) of the best of ``ridges``: from the middle towards less, else towards more, as long as it falls.

    least: the error to be beaten; where no ridge does, it is returned with None.
    """
    best: tuple[float, float | None] = (least, None)
    middle = len(ridges) // 2
    ways: Iterable[range] = (range(middle, -1, -1), range(middle + 1, len(ridges)))
    for way in ways:
        for place in way:
            tried = error(ridges[place])
            if tried >= best[0]:
                break
            best = (tried, ridges[place])
        if best[1] is not None and best[1] < ridges[middle]:
            break  # it fell towards less ridge
    return best


def shrink_to_white(moment: Tensor, ridge: float) -> Tensor:
    """C + ridge * tr(C)/dim * I: the moment of inputs with white noise of ``ridge`` times their mean power added.

    What is optimal for it moves from the optimum for C to the white optimum as ``ridge`` grows, in any class of
    kernels, linear or not. Raises UsageError for a negative ridge.
    """
    if ridge < 0:
        raise UsageError(f"ridge={ridge} must be 0 or positive")
    if ridge == 0:
        return moment
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
