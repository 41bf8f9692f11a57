"""What the operators share: shapes, the channels-last layout, casts, and the choice between kernels and stock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench import kernels

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """The sizes of one convolution: x (B, n, H, W), kernel (m, n/N, kh, kw), y (B, m, H', W')."""

    batch: int
    in_channels: int
    out_channels: int
    size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    groups: int

    @classmethod
    def of(
        cls, x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
    ) -> Geometry:
        """From the shapes of x (B, n, H, W) and of the kernel (m, n/N, kh, kw)."""
        batch, channels, *size = x
        return cls(batch, channels, weight[0], _two(size), _two(weight[2:]), _two(stride), _two(padding), groups)

    @classmethod
    def of_gradient(
        cls,
        dy: Sequence[int],
        weight: Sequence[int],
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        groups: int,
    ) -> Geometry:
        """From the shapes of dy (B, m, H', W') and of the kernel, and ``size`` (H, W) of x, which they leave open."""
        return cls.of((dy[0], weight[1] * groups, *size), weight, stride, padding, groups)

    @property
    def out_size(self) -> Pair:
        """H', W'."""
        height, width = (
            (size + 2 * pad - taps) // step + 1
            for size, taps, step, pad in zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        )
        return height, width

    @property
    def c(self) -> int:
        """Input channels of a group, n/N."""
        return self.in_channels // self.groups

    @property
    def o(self) -> int:
        """Output channels of a group, m/N."""
        return self.out_channels // self.groups

    @property
    def macs(self) -> int:
        """Multiply-adds of the grouped convolution for the whole batch, padding counted: B D K m n/N."""
        return self.batch * math.prod(self.out_size) * math.prod(self.kernel) * self.out_channels * self.c


def _two(values: Sequence[int]) -> Pair:
    first, second = values
    return first, second


def as_pair(value: int | Sequence[int]) -> Pair:
    """Conv2d's numbers: one for both directions, or two."""
    return (value, value) if isinstance(value, int) else _two(value)


def empty_nhwc(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor of ``shape`` (B, C, H, W) with exactly channels-last strides, on the device of ``like``."""
    batch, channels, height, width = shape
    return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """x in channels-last memory; no copy where it is already."""
    return x.contiguous(memory_format=torch.channels_last)


def exact(value: Tensor) -> Tensor:
    """A fresh ``value`` with exactly the strides of :func:`empty_nhwc`, those of directions of size 1 too."""
    out = empty_nhwc(value, value.shape)
    return value if value.stride() == out.stride() else out.copy_(value)


@kernels.constant_result
def tf32_allowed() -> bool:
    """Whether PyTorch's setting lets convolutions of fp32 tensors multiply in TF32.

    Compiled code keeps the answer of its compilation, as torch.compile cannot read this setting; it does compile
    anew when the setting for matrix products changes, which nearly everybody changes together with this one.
    """
    newer = getattr(torch.backends.cudnn, "conv", None)
    # After the newer setting has been written, reading the older one raises.
    return bool(newer.fp32_precision == "tf32" if newer is not None else torch.backends.cudnn.allow_tf32)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in autocast's dtype where autocast is on: what it does to a convolution (fp64 is left alone)."""
    kind = next(t.device.type for t in tensors if t is not None)
    if not kernels.autocast_on(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def launchable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors, whose shapes fit: dtype, device, range."""
    first = tensors[0]
    return (
        all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and first.dtype in kernels.DTYPES
        and all(math.prod(t.shape[1:]) < 2**31 for t in tensors)
        and kernels.device_ready(first.device.type, first.device.index or 0)
    )
