"""Least squares in second moments: the best kernel of a given structure, without the data matrix.

A convolution at one position is y = W u, with u the patch vector (im2col order: channel-major, then kernel
positions; length nK) and W the kernel flattened to (m, nK). If a structured kernel sees only z = T u, its best
coefficients for inputs with C = E[u u^T] solve the normal equations  X (T C T^T) = W C T^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.errors import ShapeError, UsageError


def check_second_moment(second_moment: Tensor, weight: Tensor) -> Tensor:
    """``second_moment`` in float64 on the weight's device; raises unless it is (nK, nK) for ``weight``."""
    size = weight[0].numel()
    if second_moment.shape != (size, size):
        raise ShapeError(
            f"second_moment has shape {tuple(second_moment.shape)}, but a weight of shape {tuple(weight.shape)} "
            f"needs ({size}, {size}): in_channels x kernel positions on each side"
        )
    return second_moment.to(device=weight.device, dtype=torch.float64)


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
        least: Tensor = cross @ torch.linalg.pinv(gram, hermitian=True)
        return least
    size = gram.shape[-1]
    # Where z is 0 throughout (a dead group of inputs) the prior remains.
    least = torch.finfo(gram.dtype).tiny ** 0.5
    lam = (ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]).clamp_min(least)  # (..., 1, 1)
    anchored = cross if prior is None else cross + lam * prior
    damped = gram + lam * torch.eye(size, dtype=gram.dtype, device=gram.device)
    solved: Tensor = torch.linalg.solve(damped, anchored.mT)
    return solved.mT


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
