"""What every source of images offers: a number of them, and seeded batches of them as a network takes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from bgcbench.errors import UsageError
from bgcbench.specs import Channels, Pair, Preprocessing, check_positive


@dataclass(frozen=True)
class Source:
    """What has images of one size. name: for tables and file names. preprocessing: how they are read and normalised."""

    name: str
    preprocessing: Preprocessing

    @property
    def size(self) -> Pair:
        """(height, width) in px of what a network gets."""
        return self.preprocessing.size

    @property
    def mean(self) -> Channels:
        return self.preprocessing.mean

    @property
    def std(self) -> Channels:
        return self.preprocessing.std


SourceT = TypeVar("SourceT", bound=Source)


def prepared_as(images: SourceT, wanted: Preprocessing) -> SourceT:
    """``images``, read and normalised as ``wanted``; those in memory are only normalised, and must have its size."""
    own = images.preprocessing
    if own.resize is None:
        if wanted.size != own.size:
            raise UsageError(f"{images.name} is in memory with {own.size} px, and {wanted.size} are asked for")
        wanted = replace(wanted, resize=None, interpolation=None, crop=own.crop)
    return replace(images, preprocessing=wanted)


@dataclass(frozen=True)
class Images(Source, ABC):
    """Images to calibrate with. num_classes: None where they have no labels.

    ``len`` is the number of images that may be drawn: those of the training split where there is one.
    """

    num_classes: int | None

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images do: a result must not mix two sets of them."""

    @abstractmethod
    def read(self, chosen: Sequence[int]) -> Tensor:
        """The images numbered ``chosen`` (each below ``len``) as (B, 3, h, w) in uint8, 0 to 255, on the CPU."""

    def batches(self, count: int, batch: int, seed: int) -> Iterator[Tensor]:
        """``count`` images (all where there are fewer), none twice, in batches of at most ``batch`` images.

        Each batch is (B, 3, h, w) in fp32, normalised, on the CPU. Which images come, and in which order, follows from
        ``seed`` and ``len`` alone; fewer images with the same seed are the first of more. The global random state is
        not touched. Raises ShapeError for a count or batch below 1, UsageError (while iterating) for an image that
        cannot be read.
        """
        check_positive("batch", batch)
        order = self.order(count, seed)
        return (self.normalised(order[start : start + batch]) for start in range(0, len(order), batch))

    def order(self, count: int, seed: int) -> list[int]:
        """The numbers of ``count`` images (all where there are fewer) as ``batches`` has them."""
        check_positive("count", count)
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].tolist()

    def labels_of(self, chosen: Sequence[int]) -> Tensor | None:
        """The classes (B,) of these images; None where they are not known."""
        return None

    @property
    def test_split(self) -> Images | None:
        """The images of another split, to test with; None where there is none."""
        return None

    def normalised(self, chosen: Sequence[int]) -> Tensor:
        """These images as a network takes them: (B, 3, h, w) in fp32 on the CPU."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return self.read(chosen).to(torch.float32).div_(255).sub_(mean).div_(std)
