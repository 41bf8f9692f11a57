"""Batches of images with labels on a device, the training images augmented.

What is done to an image follows from (seed, epoch, its number) alone: not from the order, the batches, the workers or
how many processes share an epoch. So a run that goes on in the middle of an epoch goes on as if it had never stopped.
"""

from __future__ import annotations

import atexit
import hashlib
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as image_ops

from bgcbench.data.folder import load_image, open_rgb
from bgcbench.errors import BgcbenchError, UsageError
from bgcbench.specs import Pair, Preprocessing, check_positive

Batch = tuple[Tensor, Tensor]  # images (B, 3, h, w) in uint8, channels last in memory, and labels (B,) in int64

CROP_AREA = [0.08, 1.0]  # of the image's
CROP_ASPECT = [3 / 4, 4 / 3]  # width / height

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Feed(ABC):
    """Batches of a data set's images, on one device. Closing an iterator early frees what it holds."""

    @abstractmethod
    def train(self, batches: Sequence[Tensor], seed: int, epoch: int) -> Iterator[Batch]:
        """The training images numbered in each of ``batches`` (int64 on the CPU), augmented by (seed, epoch, number).

        Raises UsageError (while iterating) for an image that cannot be read.
        """

    @abstractmethod
    def test(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """The test images numbered in each of ``batches`` (int64 on the CPU), as they are; raises as ``train``."""


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of range(count), int64 on the CPU, that follows from the seed and the epoch alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(stream_seed("order", seed, epoch)))


def stream_seed(what: str, *numbers: int) -> int:
    """A seed below 2^63; another ``what`` or other numbers give a stream that has nothing to do with it."""
    text = f"bgcbench {what} {' '.join(map(str, numbers))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class ResidentFeed(Feed):
    """Images that live on the device: zeros around them, random crops and mirrored images, in one gather a batch.

    The padded images are stored row by row, three bytes a pixel, and behind them (with ``flip``) all of them mirrored.
    A crop is then h runs of 3 w bytes, and a mirrored crop is one too.
    """

    def __init__(self, train: Batch, test: Batch, device: torch.device, *, pad: int = 0, flip: bool = False) -> None:
        """train, test: images (count, 3, h, w) in uint8 and labels. pad: px of zeros on each side to crop from."""
        images, labels = train
        self.pad, self.flip, self.device = check_positive("pad", pad, 0), flip, device
        self.count, _, self.height, self.width = images.shape
        self.padded_height, self.padded_width = self.height + 2 * pad, self.width + 2 * pad
        shape = (1 + flip, self.count, self.padded_height, self.padded_width, 3)
        stored = torch.zeros(shape, dtype=torch.uint8, device=device)
        inside = stored[0, :, pad : pad + self.height, pad : pad + self.width]
        inside.copy_(images.permute(0, 2, 3, 1))
        if flip:
            stored[1] = stored[0].flip(2)
        # A run of w pixels from each pixel on: they overlap, and the last begins w - 1 before the end.
        runs = stored.numel() // 3 - self.width + 1
        self._runs = stored.view(-1).as_strided((runs, 3 * self.width), (3, 1))
        self._labels = labels
        self._test = test[0].to(device).permute(0, 2, 3, 1).contiguous(), test[1].to(device)  # (count, h, w, 3)

    def train(self, batches: Sequence[Tensor], seed: int, epoch: int) -> Iterator[Batch]:
        if not batches:
            return
        # All the numbers go to the device at once, so that no batch waits for a copy.
        lengths, numbers = [len(batch) for batch in batches], torch.cat(list(batches))
        starts = self._starts(seed, epoch)[numbers].to(self.device, non_blocking=True)
        labels = self._labels[numbers].to(self.device, non_blocking=True)
        rows = torch.arange(self.height, device=self.device) * self.padded_width
        for first, classes in zip(starts.split(lengths), labels.split(lengths), strict=True):
            chosen = self._runs.index_select(0, (first.view(-1, 1) + rows).view(-1))  # (B h, 3 w)
            yield chosen.view(len(first), self.height, self.width, 3).permute(0, 3, 1, 2), classes

    def draws(self, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """(count,) in int64 each: how far down and right of the padded corner each image is cut, and 1 to mirror it."""
        random = torch.Generator().manual_seed(stream_seed("crops", seed, epoch))
        down, right = (torch.randint(0, 2 * self.pad + 1, (self.count,), generator=random) for _ in range(2))
        return down, right, torch.randint(0, 1 + self.flip, (self.count,), generator=random)

    def _starts(self, seed: int, epoch: int) -> Tensor:
        """(count,) in int64: the run that each training image's crop of this epoch begins with."""
        down, right, mirrored = self.draws(seed, epoch)
        right = torch.where(mirrored.bool(), self.padded_width - self.width - right, right)
        image = torch.arange(self.count) + self.count * mirrored
        return (image * self.padded_height + down) * self.padded_width + right

    def test(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        images, labels = self._test
        for numbers in batches:
            chosen = numbers.to(self.device, non_blocking=True)
            yield images.index_select(0, chosen).permute(0, 3, 1, 2), labels.index_select(0, chosen)


@dataclass(frozen=True, eq=False)
class LabelledFiles:
    """Image files: their paths relative to ``root``, and their labels (count,) in int64 on the CPU."""

    root: Path
    files: tuple[str, ...]
    labels: Tensor


class FolderFeed(Feed):
    """Images that are read from files: random resized crops and flips to train with, the centre to test with.

    workers: processes that read; 0 reads in this one. They leave Ctrl-C and SIGTERM to this one, and read bytes: the
    device normalises.
    """

    def __init__(
        self, train: LabelledFiles, test: LabelledFiles, how: Preprocessing, device: torch.device, *, workers: int = 0
    ) -> None:
        self._train, self._test, self.how, self.device = train, test, how, device
        self.workers = check_positive("workers", workers, 0)

    def train(self, batches: Sequence[Tensor], seed: int, epoch: int) -> Iterator[Batch]:
        return self._read(self._train, batches, (seed, epoch))

    def test(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        return self._read(self._test, batches, None)

    def _read(self, split: LabelledFiles, batches: Sequence[Tensor], draw: Pair | None) -> Iterator[Batch]:
        if not batches:
            return
        reader = _Reader(split.root, self.how, draw)
        # The paths travel with the batches: a worker with all of them would hold its own copy of a million names.
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_sampler=([(n, split.files[n]) for n in numbers.tolist()] for numbers in batches),
            num_workers=min(self.workers, len(batches)),
            collate_fn=reader.stacked,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),  # or it takes a number from the global one
        )
        with _signals_kept_from_children():
            reading = iter(loader)
        # Without workers there is nothing to end. With them, waiting for the last reference to go is not enough: a
        # traceback may keep it, and at exit Python waits for processes that do not listen to SIGTERM.
        end = getattr(reading, "_shutdown_workers", lambda: None)
        atexit.register(end)
        try:
            for numbers in batches:
                images = _next(reading)  # (B, h, w, 3)
                labels = split.labels[numbers].to(self.device, non_blocking=True)
                yield images.to(self.device, non_blocking=True).permute(0, 3, 1, 2), labels
        finally:
            atexit.unregister(end)
            end()


def random_crop(path: Path, how: Preprocessing, seed: int) -> Tensor:
    """The image as (3, height, width) in uint8: torchvision's RandomResizedCrop to its size, a flip half the time.

    Both follow from ``seed``; the global random state is left as it was. Interpolated as for testing, with
    antialiasing; raises as ``load_image``.
    """
    rgb = open_rgb(path)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the devices too
        top, left, height, width = RandomResizedCrop.get_params(rgb, CROP_AREA, CROP_ASPECT)
        mirrored = torch.rand(()).item() < 0.5
    box = top, left, height, width
    cut = image_ops.resized_crop(
        rgb, *box, list(how.size), interpolation=InterpolationMode(how.interpolation), antialias=True
    )
    pixels: Tensor = image_ops.pil_to_tensor(image_ops.horizontal_flip(cut) if mirrored else cut)
    return pixels


@dataclass(frozen=True)
class _Reader(Dataset[Tensor | str]):
    """One image as (h, w, 3), or why it cannot be read: an exception would come out of a worker as a traceback."""

    root: Path
    how: Preprocessing
    draw: Pair | None  # (seed, epoch); None: not augmented

    def __getitem__(self, item: tuple[int, str]) -> Tensor | str:
        number, file = item
        try:
            if self.draw is None:
                image = load_image(self.root / file, self.how)
            else:
                image = random_crop(self.root / file, self.how, stream_seed("crop", *self.draw, number))
        except UsageError as refused:
            return str(refused)
        return image.permute(1, 2, 0)

    def stacked(self, images: list[Tensor | str]) -> Tensor | str:
        """(B, h, w, 3), B may be 0; or why the first of those that cannot be read cannot."""
        read: list[Tensor] = []
        for image in images:
            if isinstance(image, str):
                return image
            read.append(image)
        return torch.stack(read) if read else torch.empty(0, *self.how.size, 3, dtype=torch.uint8)


def _next(reading: Iterator[Tensor | str]) -> Tensor:
    try:
        images = next(reading)
    except RuntimeError as problem:
        if "DataLoader worker" not in str(problem):
            raise
        reason = str(problem).splitlines()[0].rstrip(". ")
        raise BgcbenchError(
            f"a process that reads images was lost ({reason}); give it more memory or shared memory (/dev/shm), or "
            "use fewer --workers"
        ) from problem
    if isinstance(images, str):
        raise UsageError(images)
    return images


@contextmanager
def _signals_kept_from_children() -> Iterator[None]:
    """A process that starts in this block never gets SIGINT and SIGTERM.

    It begins with this one's handlers, and would count a Ctrl-C a second time into the wake-up pipe that they share.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(_: int) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
