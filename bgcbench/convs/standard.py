"""The standard convolution (Lee, Park & Lee, eq. 2.1): the reference that every variant is held against."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.theory.leastsquares import Fit, shrunk


class StandardConv2d(VariantConv2d):
    """y_i = sum_j W_ij x_j.

    x: (B, n, H, W); weight: (m, n, kh, kw); returns (B, m, H', W'). Parameters Kmn, MACs DKmn an image.
    ``groups`` must be 1 (ShapeError). State dict as ``torch.nn.Conv2d``.
    """

    variant = "standard"
    weight: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._convolve(input, self.weight, self.bias, groups=1)

    def dense_weight(self) -> Tensor:
        return self.weight

    def project(self, weight: Tensor, projection: str, fit: Fit | None) -> Mapping[str, Tensor]:
        """The kernel itself; by least squares for outputs that are not its own, the best one for these."""
        return {"weight": shrunk(weight, fit)[0] if projection == "least_squares" and fit is not None else weight}
