"""The ImageNet network that the balanced-group paper calls WRN-34-2: ResNet-34 at twice the width."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bgcbench.models.common import initialise, stages


def _block(channels_in: int, channels: int, stride: int) -> BasicBlock:
    shortcut = None
    if channels_in != channels or stride != 1:
        projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
    return BasicBlock(channels_in, channels, stride, shortcut)


class WideResNet34(nn.Module):
    """Basic blocks {3, 4, 6, 3}, not pre-activation, widths 64, 128, 256, 512 times ``widen``; the 7x7 stem keeps 64.

    Zagoruyko & Komodakis' network for ImageNet: max-pool after the stem, a 1x1 convolution and a norm as shortcut where
    the channels change (in the first block of the first stage too), mean, linear layer. (wrn_34_2 is another network,
    for images of 32 x 32.)
    """

    def __init__(self, widen: int = 2, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        plan = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
        self.stages = stages(_block, 64, [(width * widen, blocks, stride) for width, blocks, stride in plan])
        self.fc = nn.Linear(512 * widen, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.maxpool(self.bn1(self.conv1(x)).relu_()))
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores
