"""What layers are made of where bgcbench is not: convolutions of torch.nn, slices, sums and permutations.

Each module here does one thing with standard operations only and can be followed by torch.fx, torch.export and both
ONNX exporters; a runtime that has convolutions runs it. Layers of a variant become such modules by
:meth:`bgcbench.convs.base.VariantConv2d.plain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def fixed(kernel: Tensor) -> nn.Conv2d:
    """The 1x1 convolution with ``kernel`` (m, n): a linear map of the channels."""
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, bias=False, device=kernel.device, dtype=kernel.dtype)
    with torch.no_grad():
        conv.weight.copy_(kernel[:, :, None, None])
    return conv


class Added(nn.Module):
    """first(x) + second(x)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.first(x) + self.second(x)
        return total


class GroupSum(nn.Module):
    """sum_k x^k over N contiguous groups of channels: (..., n, H, W) to (..., n/N, H, W), by slices."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups, self.size = groups, channels // groups

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = x.split(self.size, dim=-3)
        total: Tensor = parts[0]
        for k in range(1, self.groups):
            total = total + parts[k]
        return total


class Shuffled(nn.Module):
    """The channel shuffle over N groups: ``torch.nn.ChannelShuffle``, which the older ONNX exporter cannot write."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = x.unflatten(-3, (self.groups, -1))  # (..., N, m/N, H, W)
        shuffled: Tensor = maps.transpose(-4, -3).flatten(-4, -3)
        return shuffled


class Taken(nn.Module):
    """x[..., index, :, :]: channels in another order, some of them twice or not at all."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-3, self.index)


class Sliced(nn.Module):
    """Contiguous parts of the channels, each through a convolution of its own, and their outputs side by side.

    starts: the first channel of each part, which has as many as its convolution reads.
    """

    def __init__(self, convs: Sequence[nn.Conv2d], starts: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.parts = [(at, conv.in_channels) for at, conv in zip(starts, convs, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        seen = [x.narrow(-3, at, count) for at, count in self.parts]
        return torch.cat([conv(part) for conv, part in zip(self.convs, seen, strict=True)], dim=-3)
