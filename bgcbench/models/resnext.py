"""ResNeXt-29 for images of 32 x 32 (Xie et al., 2017)."""

from __future__ import annotations

from torch import Tensor, nn

from bgcbench.models.common import initialise, stages


class Block(nn.Module):
    """1x1, 3x3 in ``cardinality`` groups, 1x1, a batch norm after each, added to the shortcut before the last ReLU."""

    def __init__(self, channels_in: int, inside: int, channels: int, cardinality: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, 1, groups=cardinality, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn1(self.conv1(x)).relu_()
        branch = self.bn2(self.conv2(branch)).relu_()
        branch = self.bn3(self.conv3(branch))
        total: Tensor = self.shortcut(x) + branch
        return total.relu_()


class ResNeXt29(nn.Module):
    """ResNeXt-29 (C x W d): a 3x3 stem of 64 channels and three stages of three blocks, C W times 1, 2, 4 channels
    inside and 256, 512, 1024 outside, strides 1, 2, 2; then the mean and a linear layer."""

    def __init__(self, cardinality: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)

        def block(channels_in: int, channels: int, stride: int) -> Block:
            return Block(channels_in, cardinality * width * channels // 256, channels, cardinality, stride)

        self.stages = stages(block, 64, [(256, 3, 1), (512, 3, 2), (1024, 3, 2)])
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.bn1(self.conv1(x)).relu_())
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores
