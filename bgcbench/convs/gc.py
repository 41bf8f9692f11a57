"""Group convolution (Krizhevsky et al., 2012; Lee, Park & Lee, eq. 2.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.blocks import block_diagonal, diagonal_blocks, row_blocks
from bgcbench.convs.followed import is_recorded, is_transformed
from bgcbench.convs.layouts import like_layout_of
from bgcbench.theory.leastsquares import Fit, check_cross_moment, check_second_moment, solve_normal


class GroupConv2d(VariantConv2d):
    """y^k = W^{kk} x^k for each of N contiguous groups k: no communication between groups.

    x: (B, n, H, W); weight: (m, n/N, kh, kw); returns (B, m, H', W'). Parameters Kmn/N, MACs DKmn/N an image.
    Raises ShapeError if N does not divide n and m. State dict as ``torch.nn.Conv2d(groups=N)``. N = n is the
    depthwise convolution; N = 1 the standard one. algorithm: 'stock' (also 'auto') is PyTorch's; 'triton' the kernel of
    our own that BGC has too, on channels_last data (CUDA), so that the two can be compared like with like.
    """

    variant = "gc"
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        is_own = self.algorithm == "triton" and not is_recorded(input)
        if is_own and input.dim() == 4 and self.dilation == (1, 1) and not is_transformed():
            from bgcbench.kernels.gc import gc_conv2d

            padded, padding = self._padded(input)
            y = gc_conv2d(padded, self.weight, self.bias, self.stride, padding, self.groups)
            return like_layout_of(input, y)
        return self._convolve(input, self.weight, self.bias, self.groups)

    def dense_weight(self) -> Tensor:
        return block_diagonal(self.weight, self.groups)

    def _plain(self, algorithm: str) -> nn.Module:
        return self._stock(self.weight, self.bias, self.groups)

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """Diagonal blocks ('copy', which is the white optimum too: error 1 - 1/N), or least squares."""
        return {"weight": best_kernel(weight, self.groups, fit)}


def best_kernel(weight: Tensor, groups: int, fit: Fit | None) -> Tensor:
    """The grouped kernel (m, n/N, kh, kw) closest to ``weight`` (m, n, kh, kw): its diagonal blocks, or for ``fit``."""
    return diagonal_blocks(weight, groups) if fit is None else least_squares(weight, groups, fit)


def group_moments(weight: Tensor, groups: int, fit: Fit) -> tuple[Tensor, Tensor]:
    """C and E[y u^T] of ``fit`` for the kernel ``weight`` (m, n, kh, kw) as group blocks.

    Returns (N, p, N, p) and (N, m/N, N, p), p = K n/N.
    """
    moment = check_second_moment(fit.second_moment, weight)
    cross = check_cross_moment(fit.cross_moment, weight, moment)
    size = len(moment) // groups
    return moment.reshape(groups, size, groups, size), cross.reshape(groups, -1, groups, size)


def least_squares(weight: Tensor, groups: int, fit: Fit) -> Tensor:
    """The grouped kernel that minimises E||Wu - Vu||^2 for the inputs of ``fit``, or E||y - Vu||^2 for its outputs y.

    A^k = W^{k,:} C E_k^T (E_k C E_k^T)^+ , E_k selecting group k of the patch vector, and E[y u^T] in the place of W C;
    a ridge pulls it towards the diagonal blocks (see :func:`bgcbench.theory.leastsquares.solve_normal`).
    weight: (m, n, kh, kw); returns (m, n/N, kh, kw).
    """
    moment, cross = group_moments(weight, groups, fit)
    prior = row_blocks(weight, groups).flatten(3)  # (N, m/N, N, p)
    solved = torch.stack(
        [solve_normal(moment[k, :, k], cross[k, :, k], ridge=fit.ridge, prior=prior[k, :, k]) for k in range(groups)]
    )  # (N, m/N, p)
    return solved.reshape(weight.shape[0], weight.shape[1] // groups, *weight.shape[2:])
