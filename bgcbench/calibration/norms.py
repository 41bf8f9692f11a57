"""Statistics of batch norm over all images at once, as a network in eval mode will meet them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NormMoments:
    """Mean and variance of each channel over everything added, in float64, without losing digits to large means."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # of the differences to the mean

    def add(self, x: Tensor) -> None:
        """Count x (B, C, ...) in."""
        rows = x.transpose(0, 1).flatten(1).to(self.mean)  # (C, B ...)
        count = rows.shape[1]
        if not count:
            return
        mean = rows.mean(1)
        squares = (rows - mean[:, None]).square().sum(1)
        # Chan, Golub & LeVeque (1979): the parts' own squares, and what their means lie apart.
        apart = mean - self.mean
        total = self.count + count
        self._squares += squares + apart.square() * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Of each channel (C,), divided by count - 1 as running_var is."""
        return self._squares / max(1, self.count - 1)

    def put_into(self, norm: nn.Module) -> None:
        """Make these the running statistics of ``norm``."""
        if isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.variance)
