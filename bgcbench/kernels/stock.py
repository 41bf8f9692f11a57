"""The maps of implicit.py by stock convolutions: on a CPU, and for what the kernels cannot do (fp64, other devices).

``tf32`` is for the kernels only: PyTorch's own setting decides here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as gradients

from bgcbench.kernels.common import Geometry, exact


def mean(x: Tensor, groups: int) -> Tensor:
    """xbar = (1/N) sum_k x^k. x: (B, n, H, W); returns (B, n/N, H, W)."""
    grouped: Tensor = x.unflatten(1, (groups, x.shape[1] // groups))
    return grouped.mean(1)


def forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, geometry: Geometry, tf32: bool) -> Tensor:
    """y^k = A^k x^k + B^k xbar + bias; without the second term where ``weights`` is A alone."""
    g = geometry
    with torch.autocast(x.device.type, enabled=False):  # the operands have been cast
        y = F.conv2d(x, weights[0], bias, g.stride, g.padding, 1, g.groups)
        for weight_mean in weights[1:]:
            y = y + F.conv2d(mean(x, g.groups), weight_mean, None, g.stride, g.padding)
    return exact(y)


def input_gradient(dy: Tensor, weights: Sequence[Tensor], geometry: Geometry, tf32: bool) -> Tensor:
    """dx^k = A^kT dy^k + (1/N) sum_j B^jT dy^j."""
    g = geometry
    with torch.autocast(dy.device.type, enabled=False):
        own = gradients.conv2d_input(
            (g.batch, g.in_channels, *g.size), weights[0], dy, g.stride, g.padding, 1, g.groups
        )  # fmt: skip
        for weight_mean in weights[1:]:
            shared = gradients.conv2d_input((g.batch, g.c, *g.size), weight_mean, dy, g.stride, g.padding)
            own = own + (shared / g.groups).repeat(1, g.groups, 1, 1)
    return exact(own)


def weight_gradients(x: Tensor, dy: Tensor, with_mean: bool, geometry: Geometry, tf32: bool) -> list[Tensor]:
    """dA and, with the mean, dB, both (m, n/N, kh, kw)."""
    g = geometry
    shape = (g.out_channels, g.c, *g.kernel)
    with torch.autocast(x.device.type, enabled=False):
        found = [gradients.conv2d_weight(x, shape, dy, g.stride, g.padding, 1, g.groups)]
        if with_mean:
            found.append(gradients.conv2d_weight(mean(x, g.groups), shape, dy, g.stride, g.padding))
    return [exact(one) for one in found]
