"""Wide residual networks for images of 32 x 32 (Zagoruyko & Komodakis, 2016), pre-activation."""

from __future__ import annotations

from torch import Tensor, nn

from bgcbench.models.common import initialise, stages


class Unit(nn.Module):
    """x + conv(ReLU(BN(conv(ReLU(BN(x)))))): two 3x3 convolutions; the first takes the stride.

    Where the channels change, the shortcut is a 1x1 convolution of ReLU(BN(x)), else x itself.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if channels_in != channels else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu_()
        kept = x if self.shortcut is None else self.shortcut(active)
        branch: Tensor = self.conv2(self.bn2(self.conv1(active)).relu_())
        return kept + branch


class WideResNet(nn.Module):
    """WRN-depth-widen: a 3x3 stem of 16 channels and three stages of (depth - 4) / 6 units, widths 16, 32, 64 times
    ``widen``, strides 1, 2, 2; then BN, ReLU, mean and a linear layer. Convolutions have no bias."""

    def __init__(self, depth: int, widen: int, num_classes: int = 10) -> None:
        super().__init__()
        units = (depth - 4) // 6
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.stages = stages(Unit, 16, [(16 * widen, units, 1), (32 * widen, units, 2), (64 * widen, units, 2)])
        self.bn = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.bn(self.stages(self.stem(x))).relu_()
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores
