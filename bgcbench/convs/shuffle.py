"""Group convolution followed by a channel shuffle (ShuffleNet, Zhang et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.blocks import block_diagonal
from bgcbench.convs.gc import best_kernel
from bgcbench.convs.layouts import is_channels_last
from bgcbench.convs.plain import Shuffled, fixed
from bgcbench.theory.leastsquares import Fit


class ShuffleGroupConv2d(VariantConv2d):
    """y_p = (GC x)_{pi(p)} with pi(p) = (p mod N) m/N + p // N, the permutation of ``torch.nn.ChannelShuffle``.

    x: (B, n, H, W); ``weight_group``: (m, n/N, kh, kw) in the order before the shuffle; bias: (m,) in that of the
    output; returns (B, m, H', W'). Parameters Kmn/N, MACs DKmn/N an image. Raises ShapeError if N does not divide n
    and m. The next grouped layer mixes evenly only if N divides m/N. (The authors' own code applies the inverse
    permutation; both mix, but their checkpoints are not interchangeable with these.)

    Where bgcbench is not (:meth:`plain`): 'stock' as here, 'matrix' with the shuffle as a 1x1 convolution, 'dense'.
    """

    variant = "shuffle"
    kernel_name = "weight_group"
    weight_group: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        # The bias goes through the convolution, which adds it for free, so it is brought into pre-shuffle order.
        bias = None if self.bias is None else before_shuffle(self.bias, self.groups)
        return shuffle_channels(self._convolve(input, self.weight_group, bias, self.groups), self.groups)

    def dense_weight(self) -> Tensor:
        order = shuffle_order(self.out_channels, self.groups, self.weight_group.device)
        return block_diagonal(self.weight_group, self.groups)[order]

    def _plain(self, algorithm: str) -> nn.Module:
        bias = None if self.bias is None else before_shuffle(self.bias, self.groups)
        conv = self._stock(self.weight_group, bias, self.groups)
        if algorithm == "stock":
            return nn.Sequential(conv, Shuffled(self.groups))
        identity = torch.eye(self.out_channels, device=self.weight_group.device, dtype=self.weight_group.dtype)
        order = shuffle_order(self.out_channels, self.groups, self.weight_group.device)
        return nn.Sequential(conv, fixed(identity[order]))

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """GC's projection of the rows in pre-shuffle order: row pi(p) stands in for W's row p.

        Input and output orders of the standard convolution are kept, so residual additions stay aligned.
        """
        # Undoing a shuffle over N groups is the shuffle over m/N groups.
        undo = shuffle_order(weight.shape[0], weight.shape[0] // self.groups, weight.device)
        if fit is not None and fit.cross_moment is not None:
            fit = replace(fit, cross_moment=fit.cross_moment[undo])
        return {"weight_group": best_kernel(weight[undo], self.groups, fit)}

    def _scale_outputs(self, scale: Tensor) -> None:
        super()._scale_outputs(before_shuffle(scale, self.groups))


def shuffle_channels(y: Tensor, groups: int) -> Tensor:
    """The shuffle of y (B, m, H, W) or (m, H, W): channel p of the result is channel pi(p) of y, in y's layout."""
    if is_channels_last(y):
        # On the NHWC view the shuffle is one copy that stays channels_last.
        rows: Tensor = y.permute(0, 2, 3, 1).unflatten(-1, (groups, -1))  # (B, H, W, N, m/N)
        return rows.transpose(-2, -1).flatten(-2).permute(0, 3, 1, 2)
    maps: Tensor = y.unflatten(-3, (groups, -1))  # (..., N, m/N, H, W)
    return maps.transpose(-4, -3).flatten(-4, -3)


def before_shuffle(values: Tensor, groups: int) -> Tensor:
    """Rows (m, ...) in output order brought into the order before the shuffle: the inverse permutation."""
    rows: Tensor = values.unflatten(0, (-1, groups))  # (m/N, N, ...)
    return rows.transpose(0, 1).flatten(0, 1)


def shuffle_order(channels: int, groups: int, device: torch.device | None = None) -> Tensor:
    """pi as an index tensor (m,): final channel p comes from pre-shuffle channel pi[p]."""
    return torch.arange(channels, device=device).reshape(groups, channels // groups).T.flatten()
