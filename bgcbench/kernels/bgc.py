"""Balanced group convolution as one operator: y^k = A^k x^k + B^k xbar + bias, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bgcbench.kernels.common import as_pair, autocast, tf32_allowed
from bgcbench.kernels.operators import Operators

_conv2d = Operators("bgc_conv2d", 2).f


def bgc_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_mean: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """y^k = A^k x^k + B^k xbar + bias with xbar = (1/N) sum_k x^k; ``weight`` = A, ``weight_mean`` = B.

    x: (B, n, H, W); A, B: (m, n/N, kh, kw); bias: (m,). Returns (B, m, H', W'), channels-last in memory whatever the
    layout of x. Runs Triton kernels where :func:`bgcbench.kernels.usable` says so and stock convolutions elsewhere.
    Autocast's dtype and PyTorch's TF32 setting for convolutions are those of the call, in the backward pass too.
    """
    tensors = autocast(x, weight, weight_mean, bias)
    y: Tensor = _conv2d(*tensors, as_pair(stride), as_pair(padding), groups, tf32_allowed())
    return y
