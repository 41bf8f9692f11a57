"""Images by name, or from any folder: to calibrate networks with, and with labels to train them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from bgcbench.data.base import Images
from bgcbench.data.cifar10 import open_cifar10
from bgcbench.data.digits import open_digits, open_labelled_digits
from bgcbench.data.feeds import Batch, Feed, epoch_order
from bgcbench.data.folder import open_folder
from bgcbench.data.imagefolder import open_imagefolder, open_imagenet, open_unlabelled
from bgcbench.data.labelled import LabelledData
from bgcbench.data.own import open_labelled_own, open_own
from bgcbench.data.synthetic import open_synthetic
from bgcbench.errors import UsageError
from bgcbench.specs import UNLABELLED, Pair, check_choice, is_own

__all__ = ["DATASETS", "LABELLED", "Batch", "Feed", "Images", "LabelledData", "epoch_order", "open_images",
           "open_labelled"]  # fmt: skip

# The one registration of the data sets. A new one is its file here and its line.
DATASETS: dict[str, Callable[[Pair | None], Images]] = {"digits": open_digits}


# The one registration of the data sets to train on: from the arguments of ``open_labelled``.
LABELLED: dict[str, Callable[..., LabelledData]] = {
    "digits": lambda size, dirs, **_: open_labelled_digits(size),
    "cifar10": lambda size, dirs, *, download, **_: open_cifar10(size, dirs, download=download),
    "imagenet": lambda size, dirs, *, val_alone, **_: open_imagenet(size, dirs, val_alone=val_alone),
    "folder": lambda size, dirs, *, val_alone, **_: open_imagefolder(size, dirs, val_alone=val_alone),
    UNLABELLED: lambda size, dirs, *, classes, **_: open_unlabelled(size, dirs, classes),
    "synthetic": lambda size, dirs, *, classes, counts, **_: open_synthetic(size, classes, counts),
}


def open_images(data: str, size: Pair | None = None) -> Images:
    """The images that ``data`` names: one of DATASETS or, where it is none of these names, the path of a folder or a
    function of the user's own (:mod:`bgcbench.data.own`).

    size: (height, width) in px, None for the source's own: 16 x 16 for digits, 224 x 224 for a folder. Raises
    UsageError for what is neither name nor folder, for a folder without images and for a package that is missing.
    """
    if is_own(data):
        return open_own(data, size)
    if _is_path(data, DATASETS):
        return open_folder(data, size)
    return DATASETS[_known(data, DATASETS, "a folder of images")](size)


def open_labelled(
    name: str,
    size: Pair | None,
    dirs: Sequence[Path],
    *,
    download: bool = False,
    classes: int | None = None,
    counts: tuple[int, int] | None = None,
    val_alone: bool = False,
) -> LabelledData:
    """The data set that ``name`` names: one of LABELLED or, where it is none of these, the path of a folder of splits.

    size: (height, width) in px, None for the data set's own. dirs: folders (or CIFAR-10's archive) searched in order
    by those that are in files. download: for cifar10, where it is in none of them. classes: of synthetic, and of the
    network for unlabelled images. counts: of synthetic, images to train with and to test with. val_alone: of folders,
    see ``open_imagefolder``. Raises UsageError for an unknown name, for an option that is not the data set's, and for
    files that are missing, incomplete, damaged or not in their places.
    """
    if is_own(name):
        return open_labelled_own(name, size)
    if _is_path(name, LABELLED):
        name, dirs = "folder", (Path(name),)
    _known(name, LABELLED, "a folder with the folders train and val")
    if download and name != "cifar10":
        raise UsageError(f"--download is for cifar10, not for {name}; leave it out")
    if name not in ("synthetic", UNLABELLED) and (classes is not None or counts is not None):
        raise UsageError(f"numbers of classes and images are for synthetic, and {name} has its own; leave them out")
    return LABELLED[name](size, dirs, download=download, classes=classes, counts=counts, val_alone=val_alone)


def _is_path(data: str, names: Collection[str]) -> bool:
    return data not in names and (os.path.exists(data) or os.path.dirname(data) != "")


def _known(name: str, names: Collection[str], folder: str) -> str:
    try:
        return check_choice("data set", name, names)
    except UsageError as unknown:
        raise UsageError(f"{unknown}, or give the path of {folder}") from None
