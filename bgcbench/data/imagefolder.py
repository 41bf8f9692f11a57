"""Folders with a subfolder for each class, to train on: ImageNet, and anybody's own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bgcbench.data.folder import IMAGENET_EVALUATION, folder_name, image_files, is_image
from bgcbench.data.labelled import DATA_DIR, FolderData, search
from bgcbench.errors import UsageError, some
from bgcbench.specs import TEST_SPLITS, TRAIN_SPLIT, Pair

VAL_ALONE = 8  # of a split by itself one image in so many calibrates, and the others are evaluated

UNLABELLED_TEST = 4  # without splits and labels one image in so many is evaluated, and the others calibrate and train

_IMAGENET_FILE = "ILSVRC2012_val_"  # what the names of ImageNet's validation images begin with


@dataclass(frozen=True)
class Expected:
    """How much a data set has: classes, and images to train with and to test with."""

    classes: int
    train: int
    test: int


IMAGENET = Expected(1000, 1_281_167, 50_000)


def open_imagenet(
    size: Pair | None, dirs: Sequence[Path], *, val_alone: bool = False, expected: Expected | None = None
) -> FolderData:
    """ImageNet (ILSVRC 2012) from the first of ``dirs`` that has a folder ``train``, with ``val`` next to it.

    size, val_alone: as in ``open_imagefolder``. expected: by default IMAGENET. Raises UsageError as
    ``open_imagefolder``, and for other numbers of classes or images.
    """
    expected = expected or IMAGENET
    data = _opened("imagenet", size, dirs, TEST_SPLITS[:1], val_alone=val_alone)
    train, test = len(data.train_labels), len(data.test_labels)
    found = [(data.train_root, train, expected.train), (data.test_root, test, expected.test)]
    for root, images, wanted in found if not val_alone else [(data.test_root, train + test, expected.test)]:
        for count, whole, what in ((data.num_classes, expected.classes, "classes"), (images, wanted, "images")):
            if count != whole:
                raise UsageError(
                    f"{root} has {count:,} {what}, and imagenet has {whole:,}; complete it, or train on a part of "
                    "imagenet with --data folder"
                )
    return data


def open_imagefolder(size: Pair | None, dirs: Sequence[Path], *, val_alone: bool = False) -> FolderData:
    """The images of the first of ``dirs`` that has a folder ``train``, with one of TEST_SPLITS next to it.

    Each split has a folder for each class, and the labels are the numbers of their sorted names, as in torchvision's
    ImageFolder. size: (height, width) in px, by default 224 x 224. val_alone: there need be no ``train``; one image in
    VAL_ALONE of the other split takes its place, to calibrate with, and is not evaluated. Raises UsageError where
    nothing is found, and for a split that is missing, has no or other classes, only one, or one without images, or
    cannot be listed.
    """
    return _opened("folder", size, dirs, TEST_SPLITS, val_alone=val_alone)


def open_unlabelled(size: Pair | None, dirs: Sequence[Path], classes: int) -> FolderData:
    """Images without labels, for a network that tells ``classes`` apart: those of the first of ``dirs``.

    Of its folders TRAIN_SPLIT and TEST_SPLITS the first trains and calibrates, the second is evaluated; where there are
    not two, one image in UNLABELLED_TEST of all is evaluated. Raises UsageError where either would have no image.
    """
    top, how = dirs[0], IMAGENET_EVALUATION.at(size or IMAGENET_EVALUATION.size)
    splits = [top / name for name in (TRAIN_SPLIT, *TEST_SPLITS) if (top / name).is_dir()]
    train_root, test_root = splits[:2] if len(splits) > 1 else 2 * (splits or [top])
    train, test = image_files(train_root), image_files(test_root)
    note = f"{top} has images without labels, which are evaluated by agreement with the original network"
    if train_root == test_root:
        train, test = tuple(each for n, each in enumerate(train) if n % UNLABELLED_TEST), train[::UNLABELLED_TEST]
        note += f"; one in {UNLABELLED_TEST} is, and the others train and calibrate"
    for root, files in ((train_root, train), (test_root, test)):
        if not files:
            raise UsageError(f"{root} has too few images: there must be some to calibrate with, and others to evaluate")
    return FolderData(
        folder_name(top),
        how,
        classes,
        train_labels=torch.zeros(len(train), dtype=torch.int64),
        test_labels=torch.zeros(len(test), dtype=torch.int64),
        meaningful=False,
        labelled=False,
        notes=(note,),
        train_root=train_root,
        test_root=test_root,
        train_files=train,
        test_files=test,
    )


def _opened(name: str, size: Pair | None, dirs: Sequence[Path], tests: Sequence[str], *, val_alone: bool) -> FolderData:
    how = IMAGENET_EVALUATION.at(size or IMAGENET_EVALUATION.size)
    top = _top(name, dirs, tests, (TRAIN_SPLIT,) if not val_alone else tests)
    test_root = next((top / split for split in tests if (top / split).is_dir()), None)
    if test_root is None:
        wanted = f"{' or '.join(tests)} beside {TRAIN_SPLIT}"
        raise UsageError(f"{top} has no folder {wanted}; put the images to test with there")
    test = _read(test_root)  # first: it is the smaller one, and the one that is flat where one is
    if val_alone:
        _check_classes(test)
        notes = test.notes
        told = f"one image in {VAL_ALONE} of {test_root} calibrates and is not evaluated"
        notes += (f"{top} has no {TRAIN_SPLIT}: {told}",)
        mine = torch.arange(len(test.files)) % VAL_ALONE == 0
        train, test = test.part(mine), test.part(~mine)
    else:
        train = _read(top / TRAIN_SPLIT)
        _check_same(train, test)
        for split in (train, test):
            _check_classes(split)
        notes = train.notes + test.notes
    return FolderData(
        name if name != "folder" else folder_name(top),
        how,
        len(test.classes),
        train_labels=train.labels,
        test_labels=test.labels,
        notes=notes,
        train_root=train.root,
        test_root=test.root,
        train_files=train.files,
        test_files=test.files,
    )


def _top(name: str, dirs: Sequence[Path], tests: Sequence[str], needed: Sequence[str]) -> Path:
    """The folder that has the splits, known by one of the folders ``needed``."""
    wanted = f"{TRAIN_SPLIT} and {' or '.join(tests)}"
    if not dirs:
        path = "; or give its path as --data" if name == "folder" else ""
        raise UsageError(f"{name} needs {DATA_DIR}: the folder that has {wanted}{path}")

    def look(directory: Path, names: set[str]) -> Path | str:
        if directory.is_file():
            return f"{directory} is a file, not a folder"
        if any((directory / split).is_dir() for split in needed):
            return directory
        own = Path(os.path.abspath(directory))
        if own.name in (TRAIN_SPLIT, *TEST_SPLITS):
            return f"{directory} is one of the splits: give the folder above it, {own.parent}"
        there = some(sorted(entry for entry in names if not entry.startswith(".")))
        return f"{directory} has no folder {' or '.join(needed)}, it has {there or 'nothing'}"

    top = search(dirs, look)
    if isinstance(top, str):
        raise UsageError(f"{name} was not found: {top}; give {DATA_DIR} the folder that has {wanted}")
    return top


@dataclass(frozen=True, eq=False)
class _Split:
    """classes: their folders' names, sorted. labels: of ``files``. notes: on images that are in no class's folder."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: Tensor
    notes: tuple[str, ...]

    def part(self, chosen: Tensor) -> _Split:
        """Those of its images that ``chosen`` is true for."""
        files = tuple(itertools.compress(self.files, chosen.tolist()))
        return replace(self, files=files, labels=self.labels[chosen])


def _read(root: Path) -> _Split:
    """One listing of each folder, and no look at a file: there may be a million on a network disk."""
    try:
        with os.scandir(root) as entries:
            there = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as problem:
        raise UsageError(f"{root} cannot be listed ({problem.strerror}); make it readable") from problem
    classes = sorted(name for name, is_folder in there if is_folder)
    loose = [name for name, is_folder in there if not is_folder and is_image(name)]
    if not classes:
        raise UsageError(_without_classes(root, loose))
    files = [[f"{name}/{file}" for file in image_files(root / name)] for name in classes]
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(part) for part in files]))
    note = f"{root} has {len(loose):,} images outside the folders of the classes, which are not used"
    return _Split(root, tuple(classes), tuple(itertools.chain(*files)), labels, (note,) * bool(loose))


def _without_classes(root: Path, images: Sequence[str]) -> str:
    if images and images[0].startswith(_IMAGENET_FILE):
        return (
            f"{root} has {len(images):,} images and no folders of classes; sort them into a folder for each class with "
            "the script valprep.sh (soumith/imagenetloader.torch), or by ILSVRC2012_validation_ground_truth.txt"
        )
    there = f"{len(images):,} images and " if images else ""
    return f"{root} has {there}no folders of classes; put the images of each class into a folder of its own"


def _check_same(train: _Split, test: _Split) -> None:
    only_train, only_test = (sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train)))
    if only_train or only_test:
        parts = [
            f"{len(names):,} only in {split.root} ({some(names)})"
            for names, split in ((only_train, train), (only_test, test))
            if names
        ]
        raise UsageError(f"the splits have different classes, {' and '.join(parts)}; give both the same folders")


def _check_classes(split: _Split) -> None:
    if len(split.classes) == 1:
        raise UsageError(f"{split.root} has one class, {split.classes[0]}, and a network needs two to tell apart")
    counts = torch.bincount(split.labels, minlength=len(split.classes)).tolist()
    if empty := [name for name, count in zip(split.classes, counts, strict=True) if not count]:
        raise UsageError(
            f"{split.root} has no image in {len(empty):,} of its {len(split.classes):,} classes ({some(empty)}); fill "
            "their folders, or remove them from both splits"
        )
