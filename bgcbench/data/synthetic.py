"""Random images with random labels: to measure the speed of training without any files."""

from __future__ import annotations

import torch
from torch import Tensor

from bgcbench.data.cifar10 import MEAN, PAD, STD
from bgcbench.data.labelled import ResidentData
from bgcbench.specs import SMALL_IMAGE_PX, Pair, Preprocessing, as_pair, check_positive

DEFAULT_SIZE = (32, 32)
CLASSES = 10
SMALL_COUNTS = (2048, 512)  # to train with and to test with, of images of up to 64 px
LARGE_COUNTS = (512, 128)
NOTE = "the images and labels are random: the speed is measured, and an error rate says nothing"


def open_synthetic(
    size: Pair | None = None, classes: int | None = None, counts: tuple[int, int] | None = None
) -> ResidentData:
    """The same random images every time, augmented like CIFAR-10's up to 64 px and only mirrored above.

    size: (height, width) in px, by default 32 x 32. classes: by default 10. counts: images to train with and to test
    with, by default 2,048 and 512 up to 64 px and a quarter of it above. Raises ShapeError for a size or count below 1
    and for fewer than two classes.
    """
    height, width = as_pair("size", size or DEFAULT_SIZE)
    small = max(height, width) <= SMALL_IMAGE_PX
    classes = check_positive("classes", CLASSES if classes is None else classes, 2)
    draws = torch.Generator().manual_seed(0)

    def random(highest: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(0, highest, shape, generator=draws, dtype=dtype)

    train, test = (check_positive("images", count) for count in counts or (SMALL_COUNTS if small else LARGE_COUNTS))
    return ResidentData(
        name="synthetic",
        preprocessing=Preprocessing((height, width), MEAN, STD),
        num_classes=classes,
        train_labels=random(classes, train, dtype=torch.int64),
        test_labels=random(classes, test, dtype=torch.int64),
        meaningful=False,
        notes=(NOTE,),
        train_images=random(256, train, 3, height, width, dtype=torch.uint8),
        test_images=random(256, test, 3, height, width, dtype=torch.uint8),
        pad=PAD if small else 0,
        flip=True,
    )
