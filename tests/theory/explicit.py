"""Independent truth for the theory: the matrices that the package never forms, and the laws' numbers by hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# mean, variance and the correlation of two channels at one position.
LAWS: dict[str, tuple[float, float, float]] = {
    "normal": (0.0, 1.0, 0.0),
    "uniform": (0.0, 1 / 3, 0.0),
    "normal:0.7": (0.7, 1.0, 0.0),
    "relu": (1 / math.sqrt(2 * math.pi), (math.pi - 1) / (2 * math.pi), 0.0),
    "factor:0.4": (0.0, 1.0, 0.4),
    "factor:1": (0.0, 1.0, 1.0),
}


def moment_of_inputs(name: str, channels: int, positions: int) -> Tensor:
    """E[x x^T] of an input, entry by entry: values are independent from position to position."""
    mean, variance, correlation = LAWS[name]
    size = channels * positions
    moment = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            same_channel, same_position = i // positions == j // positions, i % positions == j % positions
            covariance = (variance if same_channel else correlation * variance) if same_position else 0.0
            moment[i, j] = covariance + mean**2
    return moment


def moment_of_patches(
    name: str,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """sum over the positions of E[u u^T]: every patch is a matrix of zeros and ones times the input."""
    numbers = channels * size[0] * size[1]
    basis = torch.eye(numbers, dtype=torch.float64).reshape(numbers, channels, *size)
    picks = F.unfold(basis, kernel, dilation, padding, stride)  # (numbers, nK, D)
    inputs = moment_of_inputs(name, channels, size[0] * size[1])
    return torch.stack([pick.T @ inputs @ pick for pick in picks.unbind(2)]).sum(0)


def regressors(variant: str, group: int, groups: int, size: int) -> Tensor:
    """T with z = T u, what the rows of ``group`` see of a patch u of ``size`` numbers: u^k, for bgc above ubar."""
    part = size // groups
    own = torch.eye(size, dtype=torch.float64)[group * part : (group + 1) * part]
    if variant != "bgc":
        return own
    return torch.cat([own, torch.eye(part, dtype=torch.float64).repeat(1, groups) / groups])


def left_over(moment: Tensor, seen: Tensor) -> Tensor:
    """S = M - M T^T (T M T^T)^+ T M, so that w S w^T is the least error of the row w."""
    cross = seen @ moment
    return moment - cross.T @ torch.linalg.pinv(cross @ seen.T, hermitian=True, rtol=1e-11) @ cross


def residual_forms(variant: str, moment: Tensor, groups: int) -> list[Tensor]:
    """S of every group."""
    return [left_over(moment, regressors(variant, k, groups, len(moment))) for k in range(groups)]
