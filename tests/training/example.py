"""A data set and networks small enough to train thousands of steps of in a test."""

from __future__ import annotations

import torch
from torch import nn

from bgcbench.convs import build_conv
from bgcbench.data.labelled import ResidentData
from bgcbench.specs import ConvSpec, Preprocessing
from bgcbench.training.recipes import Recipe

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


def tiny_data(train: int = 26, test: int = 11, classes: int = 4, *, pad: int = 1, flip: bool = True) -> ResidentData:
    """Random images of 6 x 5 px whose brightness depends on their class."""
    generator = torch.Generator().manual_seed(7)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % classes
        images = torch.randint(0, 100, (count, 3, 6, 5), generator=generator) + (40 * labels % 155).view(-1, 1, 1, 1)
        return images.to(torch.uint8), labels

    images, labels = split(train)
    test_images, test_labels = split(test)
    return ResidentData(
        "tiny", Preprocessing((6, 5), MEAN, STD), classes, labels, test_labels,
        train_images=images, test_images=test_images, pad=pad, flip=flip,
    )  # fmt: skip


def tiny_network(
    variant: str = "standard", groups: int = 1, *, norm: bool = True, dropout: float = 0.0, classes: int = 4
) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        build_conv(ConvSpec(variant, 8, 8, 3, padding=1, groups=groups)),
        nn.Dropout(dropout),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def tiny_recipe(**changed: object) -> Recipe:
    values: dict[str, object] = {
        "epochs": 3, "batch_size": 6, "lr": 0.05, "schedule": "onecycle", "milestones": (), "precision": "fp64",
    }  # fmt: skip
    return Recipe("digits", **{**values, **changed})  # type: ignore[arg-type]
