"""What every data set to train on offers: two splits with labels, and a feed of them to a device."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bgcbench.data.base import Images, Source
from bgcbench.data.feeds import Feed, FolderFeed, LabelledFiles, ResidentFeed
from bgcbench.data.folder import Folder, file_size

DATA_DIR = "--data-dir (or BGCBENCH_DATA_DIR)"
SIZES_UP_TO = 200_000  # files; above, a look at each takes a minute on a network disk


@dataclass(frozen=True, eq=False)
class LabelledData(Source, ABC):
    """A training and a test split with labels.

    train_labels, test_labels: (count,) in int64 on the CPU. meaningful: False where the labels are random and an error
    rate says nothing. labelled: False where there are none (all 0), nor any errors; what a network says of the images
    may be compared with what another one does. notes: what the user should be told.
    """

    num_classes: int
    train_labels: Tensor
    test_labels: Tensor
    meaningful: bool = True
    labelled: bool = True
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when images or labels do: a run must not go on with other ones."""

    @abstractmethod
    def feed(self, device: torch.device, *, workers: int = 0) -> Feed:
        """The images on ``device``, read by ``workers`` processes (0: this one) where they are in files."""

    @abstractmethod
    def calibration(self) -> Images:
        """The training images as those to test with are: not augmented. To calibrate a network with."""


@dataclass(frozen=True, eq=False)
class Resident(Images):
    """Images in memory: ``pixels`` (count, 3, h, w) in uint8 on the CPU."""

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def fingerprint(self) -> str:
        """Of all pixels."""
        return _digest(self.pixels)

    def read(self, chosen: Sequence[int]) -> Tensor:
        return self.pixels[list(chosen)]


@dataclass(frozen=True, eq=False, kw_only=True)
class ResidentData(LabelledData):
    """Images that fit into memory: (count, 3, h, w) in uint8 on the CPU.

    Augmented by a crop out of ``pad`` px of zeros on each side and, with ``flip``, by mirroring half of them.
    """

    train_images: Tensor
    test_images: Tensor
    pad: int
    flip: bool

    @cached_property
    def fingerprint(self) -> str:
        """Of all pixels and labels."""
        return _digest(self.train_images, self.train_labels, self.test_images, self.test_labels)

    def feed(self, device: torch.device, *, workers: int = 0) -> ResidentFeed:
        train, test = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
        return ResidentFeed(train, test, device, pad=self.pad, flip=self.flip)

    def calibration(self) -> Images:
        return Resident(self.name, self.preprocessing, self.num_classes, self.train_images)


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderData(LabelledData):
    """Images in files: their paths relative to each split's root, with forward slashes, in the order of the labels."""

    train_root: Path
    test_root: Path
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names, which their labels follow from, and of their sizes up to 200,000 files.

        Reading them would take as long as using them, and above 200,000 even a look at each is slow on a network disk.
        Raises UsageError for a file that is gone.
        """
        sizes = len(self.train_files) + len(self.test_files) <= SIZES_UP_TO
        digest = hashlib.sha256(f"{self.size}\n".encode())
        splits = ("train", self.train_root, self.train_files), ("test", self.test_root, self.test_files)
        for split, root, files in splits:
            for name in sorted(files):
                size = f" {file_size(root / name)}" if sizes else ""
                digest.update(f"{split}/{name}{size}\n".encode())
        return digest.hexdigest()[:16]

    def feed(self, device: torch.device, *, workers: int = 0) -> FolderFeed:
        train = LabelledFiles(self.train_root, self.train_files, self.train_labels)
        test = LabelledFiles(self.test_root, self.test_files, self.test_labels)
        return FolderFeed(train, test, self.preprocessing, device, workers=workers)

    def calibration(self) -> Images:
        return Folder(self.name, self.preprocessing, self.num_classes, self.train_root, self.train_files)


def _digest(*parts: Tensor) -> str:
    """16 hexadecimal digits of the contents of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{list(part.shape)}".encode())
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def search(dirs: Sequence[Path], look: Callable[[Path, set[str]], Path | str]) -> Path | str:
    """What ``look`` finds in the first of ``dirs`` that has it; where none has, the reasons, joined.

    look: given one of ``dirs`` and the names in it (none where it is a file), returns the place or why it is not there.
    """
    reasons = []
    for directory in dirs:
        try:
            names = set(os.listdir(directory)) if not os.path.isfile(directory) else set()
        except FileNotFoundError:
            reasons.append(f"{directory} is not there")
            continue
        except OSError as problem:
            reasons.append(f"{directory} cannot be listed ({problem.strerror})")
            continue
        place = look(directory, names)
        if isinstance(place, Path):
            return place
        reasons.append(place)
    return "; ".join(reasons)
