"""Group convolution as one operator: y^k = A^k x^k + bias. It runs the kernels of bgc.py without the mean's part."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bgcbench.kernels.common import as_pair, autocast, tf32_allowed
from bgcbench.kernels.operators import Operators

_conv2d = Operators("gc_conv2d", 1).f


def gc_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """y^k = A^k x^k + bias; ``weight`` = A: what ``conv2d(x, weight, bias, stride, padding, groups=N)`` computes.

    Shapes, layout, types and where it runs: as :func:`bgcbench.kernels.bgc.bgc_conv2d`.
    """
    tensors = autocast(x, weight, bias)
    y: Tensor = _conv2d(*tensors, as_pair(stride), as_pair(padding), groups, tf32_allowed())
    return y
