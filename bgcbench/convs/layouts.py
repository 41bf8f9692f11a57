"""How images (B, C, H, W) lie in memory: channels-last (nhwc), or not."""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.convs.followed import is_symbolic


def is_channels_last(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is known to be stored channels-last and not also contiguous."""
    if is_symbolic(x) or x.dim() != 4 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def format_of(x: Tensor) -> torch.memory_format:
    """The memory format in which what is computed from x belongs."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def like_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y (B, m, H', W'), stored as x is where that is known."""
    return y if is_symbolic(x) else y.contiguous(memory_format=format_of(x))
