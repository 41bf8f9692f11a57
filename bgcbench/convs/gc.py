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

    @classmethod
    def project(cls, weight: Tensor, groups: int, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """Diagonal blocks ('copy', which is the white optimum too: error 1 - 1/N), or least squares."""
        if fit is not None:
            return {"weight": least_squares(weight, groups, fit.second_moment, fit.ridge, fit.cross_moment)}
        return {"weight": diagonal_blocks(weight, groups)}


def group_cross_moments(
    weight: Tensor, groups: int, second_moment: Tensor, cross_moment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """C as group blocks, and every output's cross moments E[y u^T], by output group and input group.

    weight: (m, n, kh, kw); second_moment C: (nK, nK); cross_moment: (m, nK), None for W C. Returns (N, p, N, p) and
    (N, m/N, N, p), p = K n/N.
    """
    moment = check_second_moment(second_moment, weight)
    per_group = moment.shape[0] // groups
    cross = check_cross_moment(cross_moment, weight, moment)
    rows = weight.shape[0] // groups
    return moment.reshape(groups, per_group, groups, per_group), cross.reshape(groups, rows, groups, per_group)


def least_squares(
    weight: Tensor, groups: int, second_moment: Tensor, ridge: float = 0.0, cross_moment: Tensor | None = None
) -> Tensor:
    """The grouped kernel that minimises E||Wu - Vu||^2 for inputs with E[u u^T] = ``second_moment``.

    A^k = W^{k,:} C E_k^T (E_k C E_k^T)^+ , E_k selecting group k of the patch vector; with ``ridge`` pulled towards
    the diagonal blocks (see :func:`bgcbench.theory.leastsquares.solve_normal`). With ``cross_moment`` E[y u^T] in the
    place of W C it is E||y - Vu||^2. weight: (m, n, kh, kw); returns (m, n/N, kh, kw).
    """
    moment, cross = group_cross_moments(weight, groups, second_moment, cross_moment)
    prior = row_blocks(weight, groups).flatten(3)  # (N, m/N, N, p)
    solved = torch.stack(
        [solve_normal(moment[k, :, k], cross[k, :, k], ridge=ridge, prior=prior[k, :, k]) for k in range(groups)]
    )  # (N, m/N, p)
    return solved.reshape(weight.shape[0], weight.shape[1] // groups, *weight.shape[2:])
