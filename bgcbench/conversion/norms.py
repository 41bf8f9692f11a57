"""Statistics of batch norm over all images at once, as a network in eval mode will meet them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NormMoments:
    """Mean and variance of each channel over everything added, without losing digits to large means: those of a part in
    its own precision (of half precision in float32), of all parts together in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)  # of the differences to the mean

    def add(self, x: Tensor) -> None:
        """Count x (B, C, ...) in."""
        count = x.numel() // x.shape[1]
        if not count:
            return
        exact = x if x.dtype in (torch.float32, torch.float64) else x.float()
        # What batch norm itself does in training, three times as fast as the formulas.
        mean, variance = (one.to(self.mean) for one in torch.batch_norm_update_stats(exact, None, None, 0.0))
        squares = variance * count
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

    def put_into(self, norm: nn.Module, before: NormMoments | None = None) -> None:
        """Make these the running statistics of ``norm``.

        before: what came to it when its running statistics were right (m, v; now m', v'). Then they become

            mean' = m' + (mean - m) s    var' + eps = (var + eps) s^2    s^2 = (v' + eps) / (v + eps)

        with which the norm's output has the mean and (but for eps) the variance that it had before on the same images.
        So what these images have by chance, or by not being augmented, does not get into the statistics, and where
        nothing has changed nothing does; where the images are the whole training set, it is plain re-estimation.
        """
        mean, variance = norm.running_mean, norm.running_var
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return
        if before is None:
            mean.copy_(self.mean)
            variance.copy_(self.variance)
            return
        eps: Any = norm.eps
        own, then = self.variance + eps, before.variance + eps
        scale = own / then  # s^2
        mean.copy_(self.mean + (mean.to(self.mean) - before.mean) * scale.sqrt())
        variance.copy_(((variance.to(self.mean) + eps) * scale - eps).clamp_min(0.0))
