"""The 1,797 handwritten digits that come with scikit-learn: real images that need no download.

They are 8 x 8 px with 17 levels of grey, and the order of their file is the same in all versions of scikit-learn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bgcbench.data.base import Images
from bgcbench.data.labelled import ResidentData
from bgcbench.errors import import_extra
from bgcbench.specs import Pair, Preprocessing, as_pair

DEFAULT_SIZE = (16, 16)
CLASSES = 10
TEST_IMAGES = 500
PAD = 2  # px to crop from; a mirrored digit is another digit
# Of all pixels of the 1,297 training images at 8 x 8 px, 0 as black and 1 as white; the same whatever the size.
MEAN = 0.306178
STD = 0.376571

_LEVELS = 16  # the brightest pixel in the file


@dataclass(frozen=True, eq=False)
class Digits(Images):
    """The digits at one size.

    pixels: all of them, (1797, 3, h, w) in uint8, the three channels being equal (and one memory). labels: (1797,).
    train, test: the numbers, ascending, of the 1,297 images to train with and the 500 to test with.
    """

    pixels: Tensor
    labels: Tensor
    train: tuple[int, ...]
    test: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.train)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.pixels[:, 0].contiguous().numpy().tobytes()).hexdigest()[:16]

    def read(self, chosen: Sequence[int]) -> Tensor:
        return self.pixels[[self.train[number] for number in chosen]]

    def labels_of(self, chosen: Sequence[int]) -> Tensor:
        return self.labels[[self.train[number] for number in chosen]]

    @property
    def test_split(self) -> Digits:
        return replace(self, train=self.test)


def open_digits(size: Pair | None = None) -> Digits:
    """The digits, resized bilinearly to ``size`` (height, width) in px; raises UsageError without scikit-learn."""
    height, width = as_pair("size", size or DEFAULT_SIZE)
    missing = "the digits data set needs scikit-learn; pip install 'bgcbench[digits]'"
    file = import_extra("sklearn.datasets", missing).load_digits()
    native = torch.tensor(file.images, dtype=torch.float32).unsqueeze(1) * (255 / _LEVELS)
    resized = interpolate(native, (height, width), mode="bilinear", align_corners=False).round_().to(torch.uint8)
    labels = torch.tensor(file.target, dtype=torch.int64)
    train, test = split(labels.tolist())
    how = Preprocessing((height, width), (MEAN,) * 3, (STD,) * 3)
    return Digits("digits", how, CLASSES, resized.expand(-1, 3, -1, -1), labels, train, test)


def open_labelled_digits(size: Pair | None = None) -> ResidentData:
    """The digits with their labels, 1,297 to train with and 500 to test with; raises as ``open_digits``."""
    digits = open_digits(size)
    train, test = list(digits.train), list(digits.test)
    return ResidentData(
        name=digits.name,
        preprocessing=digits.preprocessing,
        num_classes=CLASSES,
        train_labels=digits.labels[train],
        test_labels=digits.labels[test],
        train_images=digits.pixels[train],
        test_images=digits.pixels[test],
        pad=PAD,
        flip=False,
    )


def split(labels: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the training and of the test images, each ascending.

    Of every class as many are for testing as its share of TEST_IMAGES, rounded down; the images that rounding leaves
    over go one each to the classes with the largest remainders, of equal ones to the lower class. Within a class the
    images with the lowest SHA-256 of "bgcbench digits NUMBER" are for testing: no library's random numbers are in it.
    """
    members = {label: [n for n, other in enumerate(labels) if other == label] for label in sorted(set(labels))}
    shares = {label: divmod(TEST_IMAGES * len(numbers), len(labels)) for label, numbers in members.items()}
    over = TEST_IMAGES - sum(whole for whole, _ in shares.values())
    rounded_up = sorted(shares, key=lambda label: -shares[label][1])[:over]
    test: set[int] = set()
    for label, numbers in members.items():
        quota = shares[label][0] + (label in rounded_up)
        test.update(sorted(numbers, key=_rank)[:quota])
    return tuple(n for n in range(len(labels)) if n not in test), tuple(sorted(test))


def _rank(number: int) -> str:
    return hashlib.sha256(f"bgcbench digits {number}".encode()).hexdigest()
