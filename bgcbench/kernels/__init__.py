"""Triton kernels of group convolution and balanced group convolution, behind operators that run anywhere.

    bgc.py       bgc_conv2d
    gc.py        gc_conv2d, the same without the mean
    operators.py the three operators of each, closed under differentiation
    programs.py  the kernels, implicit matrix products; the one module that imports triton
    implicit.py  their launches
    stock.py     the same maps by stock convolutions: the CPU's way, and the way of what the kernels cannot do
    common.py    shapes, layouts, casts and the choice between the two
    tiles.py     block sizes: candidates, and the tuner that picks one per shape
    clock.py     what timings of the device share

Importing this package imports no triton.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
LEAST_CAPABILITY = (8, 0)  # bf16 and tf32 tensor cores, asynchronous copies


def constant_result(function: FunctionT) -> FunctionT:
    """What torch.compiler.assume_constant_result does, without its import of Dynamo: 2 s of every command's start."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def usable(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> bool:
    """Whether the kernels can run this convolution: x (B, n, H, W) with the kernel ``weight`` (m, n/N, kh, kw).

    True on a CUDA device of compute capability 8.0 or newer with triton installed, and on a CPU under triton's
    interpreter (TRITON_INTERPRET=1 set before the kernels were imported), for fp32, fp16 and bf16, dilation 1 and
    any kernel size, stride and padding. Where it says no, take the stock convolutions. Never raises: shapes that
    do not fit are a no. It does not say that the kernels are the faster choice.
    """
    if x.dim() != 4 or weight.dim() != 4 or any(d != 1 for d in dilation) or any(s < 1 for s in stride):
        return False
    if any(p < 0 for p in padding) or groups < 1 or weight.shape[0] % groups or weight.shape[1] * groups != x.shape[1]:
        return False
    for size, taps, pad in zip(x.shape[2:], weight.shape[2:], padding, strict=True):
        if size < 1 or taps < 1 or size + 2 * pad < taps:
            return False
    if x.device != weight.device or x.dtype not in DTYPES or weight.dtype not in DTYPES:
        return False
    if x.dtype != weight.dtype and not autocast_on(x.device.type):
        return False
    return in_range(x, weight) and device_ready(x.device.type, x.device.index or 0)


def autocast_on(kind: str) -> bool:
    """Whether autocast is on for devices of this type; others than these two (meta) may have none."""
    if not torch._C._is_any_autocast_enabled():  # every call of a layer asks
        return False
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def in_range(x: Tensor, weight: Tensor) -> bool:
    """Whether offsets inside one image and inside one kernel fit into 32 bits (a batch may be larger)."""
    return weight.numel() < 2**31 and math.prod(x.shape[1:]) < 2**31


@constant_result
def device_ready(kind: str, index: int) -> bool:
    """Whether the kernels can be launched on the device ``kind``:``index``."""
    if kind == "cpu":
        return _interpreted()
    return kind == "cuda" and _capable(index)


@functools.cache
def _capable(index: int) -> bool:
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= LEAST_CAPABILITY


def _interpreted() -> bool:
    """Whether the kernels are, or would be, functions of triton's interpreter: fixed when they are imported."""
    loaded = sys.modules.get("bgcbench.kernels.programs")
    if loaded is not None:
        return bool(loaded.INTERPRETED)
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
