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

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs.base import VariantConv2d, block_diagonal, diagonal_blocks, is_channels_last, row_blocks
from bgcbench.theory.leastsquares import check_second_moment, shrink_to_white

MAX_SWEEPS = 200  # of alternating least squares; some tens are needed
SETTLED = 1e-8  # relative fall of the error in one sweep at which they end


class TwoLevelGroupConv2d(VariantConv2d):
    """y = GC(x) + coarse(coarse_in(x)): a group convolution and one learnt map a group, sent to every output.

    x: (B, n, H, W); ``weight`` A: (m, n/N, kh, kw); ``weight_coarse_in`` r: (N, n/N, kh, kw), stride, padding and
    dilation of the layer; ``weight_coarse`` p: (m, N, 1, 1); one bias (m,); returns (B, m, H', W'). Parameters
    Kmn/N + Kn + Nm and D times as many MACs an image. It is smaller than BGC where Kn + Nm < Kmn/N, so on thin 1x1
    layers it is the bigger one. Every off-diagonal column panel of its dense kernel has rank 1. The p_{kk} are
    redundant with A^k and trained all the same, as the parameter count has them.

    He initialisation acts on each of the three kernels with its own fan (K n/N, K n/N, N).
    N = 1: the coarse level would only repeat A, so the layer holds A alone and is the standard convolution.
    Raises ShapeError if N does not divide n and m.
    """

    variant = "tlgc"
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

    def _weights(self) -> list[nn.Parameter]:
        return [w for w in (self.weight, self.weight_coarse_in, self.weight_coarse) if w is not None]

    def forward(self, x: Tensor) -> Tensor:
        own = self._convolve(x, self.weight, self.bias, self.groups)
        if self.weight_coarse_in is None or self.weight_coarse is None:
            return own
        representatives = self._convolve(x, self.weight_coarse_in, None, self.groups)  # (B, N, H', W')
        coarse = F.conv2d(representatives, self.weight_coarse)  # (B, m, H', W')
        total = own + coarse
        return total.contiguous(memory_format=torch.channels_last) if is_channels_last(own) else total

    def dense_weight(self) -> Tensor:
        if self.weight_coarse_in is None or self.weight_coarse is None:
            return self.weight
        return dense_kernel(self.weight, self.weight_coarse_in, self.weight_coarse)

    @classmethod
    def project(
        cls, weight: Tensor, groups: int, projection: str, second_moment: Tensor | None, ridge: float
    ) -> Mapping[str, Tensor]:
        """The white optimum ('white', and 'copy': the paper copies nothing into this variant), or least squares."""
        if groups == 1:
            return {"weight": weight}
        if projection == "least_squares" and second_moment is not None:
            a, r, p = least_squares(weight, groups, second_moment, ridge)
        else:
            a, r, p = white_optimum(weight, groups)
        return {"weight": a, "weight_coarse_in": r, "weight_coarse": p}


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


def least_squares(
    weight: Tensor, groups: int, second_moment: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(A, r, p) minimising E||Wu - Du||^2 for inputs with C = E[u u^T], by alternating least squares.

    A is eliminated: given the coarse level, A^k is the regression on u^k, so what is left to the coarse level in the
    rows of group k is weighted by S_k = C - C_{.k} C_kk^+ C_{k.} . Then p (given r) and r (given p) are linear
    problems, solved in turn from the white optimum until the error stops falling: a local minimum. ``ridge`` shrinks
    C towards its white part, so that a large one gives the white optimum. weight: (m, n, kh, kw); second_moment:
    (nK, nK), u in unfold order; shapes of the result as in :func:`white_optimum`.
    """
    moment = shrink_to_white(check_second_moment(second_moment, weight), ridge)
    size, rows = moment.shape[0] // groups, weight.shape[0] // groups
    target = weight.flatten(1).to(moment.dtype).reshape(groups, rows, groups * size)  # (N, m/N, nK)
    inverses = [torch.linalg.pinv(moment[_part(k, size), _part(k, size)], hermitian=True) for k in range(groups)]
    _, start, _ = white_optimum(weight.to(moment.dtype), groups)
    r = start.flatten(1)  # (N, p)
    p = torch.zeros(groups, rows, groups, dtype=moment.dtype, device=moment.device)
    previous: float | None = None
    best, momentum, last = r, 0, r
    for _ in range(MAX_SWEEPS):
        error = 0.0
        hessian, gradient = torch.zeros_like(moment), torch.zeros_like(r)
        for k in range(groups):
            left = _left_over(moment, inverses[k], k, size)  # S_k: (nK, nK)
            seen = target[k] @ left  # (m/N, nK)
            blocks = left.reshape(groups, size, groups, size)
            features = torch.einsum("la,lanb,nb->ln", r, blocks, r)
            cross = torch.einsum("inb,nb->in", seen.reshape(rows, groups, size), r)  # (m/N, N)
            p[k] = cross @ torch.linalg.pinv(features, hermitian=True)
            error += float((seen * target[k]).sum() - (p[k] * cross).sum())
            strength = p[k].T @ p[k]  # (N, N)
            hessian += (strength[:, None, :, None] * blocks).reshape(hessian.shape)
            gradient += torch.einsum("il,ila->la", p[k], seen.reshape(rows, groups, size))
        if previous is not None and error > previous and momentum:
            r, momentum = best, 0  # went too far: back to the last solution, without extrapolating
            continue
        if previous is not None and previous - error <= SETTLED * abs(previous):
            break
        previous = error
        # A step towards the last r costs nothing at the solution and keeps a singular system solvable.
        anchor = 1e-12 * hessian.diagonal().mean() + torch.finfo(moment.dtype).tiny
        hessian.diagonal().add_(anchor)
        best = torch.linalg.solve(hessian, gradient.flatten() + anchor * r.flatten()).reshape(groups, size)
        # Nesterov's extrapolation: plain alternation crawls along narrow valleys.
        momentum += 1
        r = best + (momentum - 1) / (momentum + 2) * (best - last)
        last = best
    a = []
    for k in range(groups):
        rest = target[k] - (p[k][:, :, None] * r).flatten(1)
        a.append(rest @ moment[:, _part(k, size)] @ inverses[k])
    m, n, height, width = weight.shape
    per_group = n // groups
    return (
        torch.cat(a).reshape(m, per_group, height, width),
        r.reshape(groups, per_group, height, width),
        p.reshape(m, groups, 1, 1),
    )


def _part(k: int, size: int) -> slice:
    """Where group k stands in the patch vector."""
    return slice(k * size, (k + 1) * size)


def _left_over(moment: Tensor, inverse: Tensor, k: int, size: int) -> Tensor:
    """S_k: the second moment of what a regression on group k leaves of every input."""
    column = moment[:, _part(k, size)]
    left = moment - column @ inverse @ column.T
    left[_part(k, size)] = 0.0  # exactly, not to rounding
    left[:, _part(k, size)] = 0.0
    return left
