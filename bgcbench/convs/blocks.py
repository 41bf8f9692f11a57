"""Dense kernels (m, n, kh, kw) as the paper's N x N blocks, and grouped kernels (m, n/N, kh, kw) as their diagonal."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def row_blocks(weight: Tensor, groups: int) -> Tensor:
    """A dense kernel (m, n, kh, kw) as the paper's blocks W^{kl} (eq. 2.2): (N, m/N, N, n/N, kh, kw)."""
    m, n, height, width = weight.shape
    return weight.reshape(groups, m // groups, groups, n // groups, height, width)


def diagonal_blocks(weight: Tensor, groups: int) -> Tensor:
    """The blocks W^{kk} stacked as a grouped kernel: (m, n/N, kh, kw)."""
    blocks = row_blocks(weight, groups)  # (N, m/N, N, n/N, kh, kw)
    return torch.stack([blocks[k, :, k] for k in range(groups)]).flatten(0, 1)  # (m, n/N, kh, kw)


def block_diagonal(weight: Tensor, groups: int) -> Tensor:
    """A grouped kernel (m, n/N, kh, kw) as the dense kernel (m, n, kh, kw) it stands for (eq. 2.3)."""
    blocks = weight.unflatten(0, (groups, 1, -1))  # (N, 1, m/N, n/N, kh, kw)
    # A^k and N blocks of zeros, over and over: every (N + 1)th of N x N blocks in a row is one of the diagonal.
    padded = F.pad(blocks, (0, 0) * 4 + (0, groups)).flatten(0, 1)[: groups * groups]
    dense: Tensor = padded.unflatten(0, (groups, groups)).transpose(1, 2)  # (N, m/N, N, n/N, kh, kw)
    return dense.flatten(2, 3).flatten(0, 1)
