"""The ImageNet network that the balanced-group paper calls WRN-34-2: ResNet-34 at twice the width."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from bgcbench.models.common import initialise


class WideResNet34(nn.Module):
    """Basic blocks {3, 4, 6, 3}, not pre-activation, widths 64, 128, 256, 512 times ``widen``; the 7x7 stem keeps 64.

    Zagoruyko & Komodakis' ImageNet form: max-pool after the stem, a 1x1 convolution and a norm as shortcut where the
    channels change (in the first block of the first stage too), mean, linear layer. (wrn_34_2 is another network, for
    images of 32 x 32.)
    """

    def __init__(self, widen: int = 2, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, channels = [], 64
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            outside, members = width * widen, []
            for block in range(blocks):
                step = stride if block == 0 else 1
                shortcut = None
                if channels != outside or step != 1:
                    projection = nn.Conv2d(channels, outside, 1, step, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(outside))
                members.append(BasicBlock(channels, outside, step, shortcut))
                channels = outside
            stages.append(nn.Sequential(*members))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.maxpool(self.bn1(self.conv1(x)).relu_()))
        scores: Tensor = self.fc(features.mean((2, 3)))
        return scores
