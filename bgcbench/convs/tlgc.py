"""Two-level group convolution (Lee & Park; compared in Lee, Park & Lee, Table 1 and section 5), as reconstructed here.

    y^k = A^k x^k + sum_l p_{kl} (r_l * x^l),    groups k, l = 1..N contiguous

A group convolution is block Jacobi; the coarse level lets the groups exchange one learnt map each.

What is known and what is reconstruction: the abstract of the two-level paper and the balanced-group paper's text,
parameter count Kmn/N + Kn + Nm and cost D times that. The only structure found that matches all of them exactly is the
one here: each group is reduced to one map r_l * x^l by a convolution with the layer's own kernel size (Kn numbers),
and the N maps go to all m outputs pointwise (Nm numbers). That the kernel sits on the reducing side, and that nothing
(no norm, no activation) stands between the two, is inference; for 1x1 layers the first makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.blocks import block_diagonal, diagonal_blocks, row_blocks
from bgcbench.convs.layouts import like_layout_of
from bgcbench.convs.plain import Added, fixed
from bgcbench.theory.leastsquares import Fit, shrunk
from bgcbench.theory.residual import explained

MAX_SWEEPS = 200  # of alternating least squares; some tens are needed
MAX_STEPS = 50  # of conjugate gradients in a sweep


class TwoLevelGroupConv2d(VariantConv2d):
    """y = GC(x) + coarse(coarse_in(x)): a group convolution and one learnt map a group, sent to every output.

    x: (B, n, H, W); ``weight_group`` A: (m, n/N, kh, kw); ``weight_coarse_in`` r: (N, n/N, kh, kw), stride, padding and
    dilation of the layer; ``weight_coarse`` p: (m, N, 1, 1); one bias (m,); returns (B, m, H', W'). Parameters
    Kmn/N + Kn + Nm and D times as many MACs an image. It is smaller than BGC where Kn + Nm < Kmn/N, so on thin 1x1
    layers it is the bigger one. Every off-diagonal column panel of its dense kernel has rank 1. The p_{kk} are
    redundant with A^k and trained all the same, as the parameter count has them.

    He initialisation acts on each of the three kernels with its own fan (K n/N, K n/N, N).
    N = 1: the coarse level would only repeat A, so the layer holds A alone and is the standard convolution.
    Raises ShapeError if N does not divide n and m.

    Where bgcbench is not (:meth:`plain`): 'stock' as here, 'matrix' with the N maps by a standard convolution, whose
    kernel is r in its diagonal blocks and 0 elsewhere, 'dense'.
    """

    variant = "tlgc"
    kernel_name = "weight_group"
    weight_group: nn.Parameter
    weight_coarse_in: nn.Parameter | None
    weight_coarse: nn.Parameter | None

    def _create_weights(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super()._create_weights(device, dtype)
        self.weight_coarse_in = self.weight_coarse = None
        if self.groups > 1:
            shape = (self.groups, self.in_channels // self.groups, *self.kernel_size)
            self.weight_coarse_in = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            shape = (self.out_channels, self.groups, 1, 1)
            self.weight_coarse = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        own = self._convolve(input, self.weight_group, self.bias, self.groups)
        if self.weight_coarse_in is None or self.weight_coarse is None:
            return own
        representatives = self._convolve(input, self.weight_coarse_in, None, self.groups)  # (B, N, H', W')
        return like_layout_of(own, own + F.conv2d(representatives, self.weight_coarse))  # (B, m, H', W')

    def _scale_outputs(self, scale: Tensor) -> None:
        for kernel in (self.weight_group, self.weight_coarse):
            if kernel is not None:
                kernel.mul_(scale[:, None, None, None])

    def dense_weight(self) -> Tensor:
        if self.weight_coarse_in is None or self.weight_coarse is None:
            return self.weight_group
        return dense_kernel(self.weight_group, self.weight_coarse_in, self.weight_coarse)

    def _plain(self, algorithm: str) -> nn.Module:
        reduce: Any = self.weight_coarse_in
        coarse: Any = self.weight_coarse
        if algorithm == "stock":
            to_maps = self._stock(reduce, None, self.groups)
        else:
            to_maps = self._stock(block_diagonal(reduce, self.groups))
        own = self._stock(self.weight_group, self.bias, self.groups)
        return Added(own, nn.Sequential(to_maps, fixed(coarse[:, :, 0, 0])))

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The white optimum ('white', and 'copy': the paper copies nothing into this variant), or least squares."""
        if self.groups == 1:
            return {"weight_group": weight}
        if fit is not None:
            a, r, p = least_squares(weight, self.groups, fit)
        else:
            a, r, p = white_optimum(weight, self.groups)
        return {"weight_group": a, "weight_coarse_in": r, "weight_coarse": p}


def dense_kernel(a: Tensor, r: Tensor, p: Tensor) -> Tensor:
    """D[k, l] = [k = l] A^k + p_{kl} r_l. a: (m, n/N, kh, kw); r: (N, n/N, kh, kw); p: (m, N, 1, 1)."""
    groups = r.shape[0]
    panels = torch.einsum("ml,lchw->mlchw", p.flatten(1), r)  # (m, N, n/N, kh, kw)
    return block_diagonal(a, groups) + panels.flatten(1, 2)


def white_optimum(weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The optimum for uncorrelated inputs of equal power, in closed form: A^k = W^{kk}; r_l, p_{.l} of rank one.

    For each input group l the blocks W^{kl}, k != l, stacked into (m - m/N, K n/N), are approximated by their first
    singular pair (Eckart & Young); p_{ll} = 0. The error is the sum of the other sigma^2. weight: (m, n, kh, kw);
    returns A (m, n/N, kh, kw), r (N, n/N, kh, kw), p (m, N, 1, 1); the singular value is shared evenly by r and p.
    """
    m, n, height, width = weight.shape
    blocks = row_blocks(weight, groups).flatten(3)  # (N, m/N, N, p)
    others = [[k for k in range(groups) if k != column] for column in range(groups)]
    panels = torch.stack([blocks[others[column], :, column].flatten(0, 1) for column in range(groups)])
    u, sigma, vh = torch.linalg.svd(panels, full_matrices=False)  # panels: (N, m - m/N, p)
    root = sigma[:, :1].sqrt()  # (N, 1)
    r = root * vh[:, 0]  # (N, p)
    p = weight.new_zeros(groups, m // groups, groups)
    for column in range(groups):
        p[others[column], :, column] = (root[column] * u[column, :, 0]).reshape(groups - 1, m // groups)
    return diagonal_blocks(weight, groups), r.reshape(groups, n // groups, height, width), p.reshape(m, groups, 1, 1)


def least_squares(weight: Tensor, groups: int, fit: Fit) -> tuple[Tensor, Tensor, Tensor]:
    """(A, r, p) minimising E||Wu - Du||^2 for inputs with C = E[u u^T], by alternating least squares.

    A is eliminated: given the coarse level, A^k is the regression on u^k, so what is left to the coarse level in the
    rows of group k is weighted by S_k = C - C_{.k} C_kk^+ C_{k.} . Then p (given r) and r (given p) are linear
    problems, solved in turn from the white optimum until the error falls by less than ``fit.settled`` of itself: a
    local minimum. A ridge shrinks C towards its white part, so that a large one gives the white optimum. Where outputs
    are wanted W gives way to the best dense kernel for them (see ``shrunk``). weight: (m, n, kh, kw); shapes of the
    result as in :func:`white_optimum`.
    """
    weight, moment, _ = shrunk(weight, fit)
    problem = _CoarseLevel(weight, groups, moment)
    _, start, _ = white_optimum(weight, groups)
    r = last = best = start.flatten(1)  # (N, p)
    previous: float | None = None
    momentum = 0
    for _ in range(MAX_SWEEPS):
        p, error = problem.best_outputs(r)
        if previous is not None and error > previous and momentum:
            r, momentum = best, 0  # went too far: back to the last solution, without extrapolating
            continue
        if previous is not None and previous - error <= fit.settled * abs(previous):
            break
        previous = error
        best = problem.best_inputs(p, r, fit.settled)
        # Nesterov's extrapolation: plain alternation crawls along narrow valleys.
        momentum += 1
        r = best + (momentum - 1) / (momentum + 2) * (best - last)
        last = best
    p, _ = problem.best_outputs(r)
    m, n, height, width = weight.shape
    return (
        problem.own_level(p, r).reshape(m, n // groups, height, width),
        r.reshape(groups, n // groups, height, width),
        p.reshape(m, groups, 1, 1),
    )


class _CoarseLevel:
    """The coarse level's two linear problems, A being eliminated, without ever forming an S_k.

    S_k = C - H_k^T H_k, with its rows and columns of group k set to 0; H_k: (p, nK), all of them as large as C.
    """

    def __init__(self, weight: Tensor, groups: int, moment: Tensor) -> None:
        size, rows = moment.shape[0] // groups, weight.shape[0] // groups
        self.groups, self.size, self.moment = groups, size, moment
        self.target = weight.flatten(1).to(moment.dtype).reshape(groups, rows, groups * size)  # (N, m/N, nK)
        factors = moment.new_zeros(groups, size, groups * size)  # (k, p, nK); fewer rows where C_kk is singular
        seen = []
        for k in range(groups):
            own = explained(moment, k, groups, with_mean=False).own
            factors[k, : len(own)] = own
            left = self.target[k] @ moment - (self.target[k] @ own.T) @ own  # W^k S_k
            left[:, k * size : (k + 1) * size] = 0.0
            seen.append(left)
        self.seen = torch.stack(seen)  # (N, m/N, nK)
        self.whole = float((self.seen * self.target).sum())
        # By input group, so that one product serves all k: (l, k p, p). They are gone through a group at a time: a
        # batched product of matrices with single columns takes three times as long.
        self.factors = factors.reshape(groups * size, groups, size).transpose(0, 1).contiguous()
        self.squares = torch.stack([f.square().reshape(groups, size, size).sum(1) for f in self.factors])  # (l, k, a)
        self.others = 1.0 - torch.eye(groups, dtype=moment.dtype, device=moment.device)  # [k != l]

    def _through(self, r: Tensor) -> Tensor:
        """H_k r_l for every k and l: (l, k, p)."""
        products = [factor @ v for factor, v in zip(self.factors, r, strict=True)]
        return torch.stack(products).reshape(self.groups, self.groups, self.size)

    def _moment_times(self, r: Tensor) -> Tensor:
        """C^{nl} r_l for every n and l: (n, p, l)."""
        columns = self.moment.reshape(-1, self.groups, self.size)  # (nK, l, p)
        products = [columns[:, group] @ v for group, v in enumerate(r)]
        return torch.stack(products, dim=-1).reshape(self.groups, self.size, self.groups)

    def best_outputs(self, r: Tensor) -> tuple[Tensor, float]:
        """p (N, m/N, N) given r (N, p), and the error that is left."""
        inner = torch.einsum("la,lan->ln", r, self._moment_times(r))  # r_l^T C^{ln} r_n
        through = self._through(r)  # (l, k, p)
        features = inner - torch.einsum("lkp,nkp->kln", through, through)
        features = features * self.others[:, :, None] * self.others[:, None, :]  # row and column k of S_k are 0
        blocks = self.seen.reshape(self.groups, -1, self.groups, self.size)  # (k, m/N, l, p)
        cross = torch.einsum("kila,la->kil", blocks, r)
        p = cross @ torch.linalg.pinv(features, hermitian=True)
        return p, self.whole - float((p * cross).sum())

    def best_inputs(self, p: Tensor, start: Tensor, precision: float) -> Tensor:
        """r (N, p) given p (N, m/N, N), by conjugate gradients from ``start``: never worse than that.

        precision: of the equations, relative; more than the sweeps are to gain (``settled``) would be lost in the next.
        """
        strength = torch.einsum("kil,kin->kln", p, p)  # (k, l, n)
        summed = strength.sum(0)  # (l, n)
        blocks = self.seen.reshape(self.groups, -1, self.groups, self.size)
        gradient = torch.einsum("kil,kila->la", p, blocks)

        def apply(v: Tensor) -> Tensor:
            direct = torch.einsum("ln,lan->la", summed, self._moment_times(v))
            weighed = torch.einsum("kln,nkp->lkp", strength, self._through(v)).flatten(1)  # (l, k p)
            return direct - torch.stack([factor.T @ w for factor, w in zip(self.factors, weighed, strict=True)])

        own = self.moment.diagonal().reshape(self.groups, self.size)  # the diagonal, to precondition with
        diagonal = summed.diagonal()[:, None] * own - torch.einsum("kll,lka->la", strength, self.squares)
        scale = diagonal.clamp_min(1e-12 * float(diagonal.max()) + torch.finfo(diagonal.dtype).tiny)
        return _conjugate_gradients(apply, gradient, start, scale, precision)

    def own_level(self, p: Tensor, r: Tensor) -> Tensor:
        """A (m, p) given the coarse level: the regression of what it leaves on the group's own input."""
        solved = []
        for k in range(self.groups):
            at = slice(k * self.size, (k + 1) * self.size)
            rest = self.target[k] - (p[k][:, :, None] * r).flatten(1)
            inverse = torch.linalg.pinv(self.moment[at, at], hermitian=True)
            solved.append(rest @ self.moment[:, at] @ inverse)
        return torch.cat(solved)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], right: Tensor, x: Tensor, scale: Tensor, precision: float
) -> Tensor:
    """x with apply(x) = right to ``precision``; apply: symmetric positive semidefinite, ``scale`` near its diagonal."""
    residual = right - apply(x)
    goal = precision**2 * float((right * right / scale).sum())
    step = residual / scale
    direction, size = step, float((residual * step).sum())
    for _ in range(MAX_STEPS):
        if size <= goal:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0.0:
            break  # a direction that changes nothing
        x = x + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        step = residual / scale
        before, size = size, float((residual * step).sum())
        direction = step + (size / before) * direction
    return x
