"""CIFAR-10: 60,000 labelled photographs of 32 x 32 px (Krizhevsky, 2009), from the files that its Python version has.

They are pickles, which can run any code when they are opened: none is, before its MD5 is that of the published file.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5, download_url

from bgcbench.data.labelled import DATA_DIR, ResidentData, search
from bgcbench.errors import UsageError, reason_of
from bgcbench.specs import Pair, Preprocessing, as_pair

SIZE = (32, 32)
CLASSES = 10
# Of the channels of the 50,000 training images, 0 as black and 1 as white.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
PAD = 4  # px to crop from

# What a folder has that holds one of the other versions.
_OTHER_VERSIONS = {
    "binary": ("cifar-10-binary.tar.gz", "cifar-10-batches-bin", "data_batch_1.bin"),
    "MATLAB": ("cifar-10-matlab.tar.gz", "cifar-10-batches-mat", "data_batch_1.mat"),
}
_COLUMNS = 3 * SIZE[0] * SIZE[1]


@dataclass(frozen=True)
class CifarFiles:
    """What the data set consists of: the archive and the folder in it, and the splits' files, each with its MD5.

    train_images, test_images: how many there are in each split's files together.
    """

    folder: str
    archive: str
    archive_md5: str
    url: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]
    train_images: int
    test_images: int


PUBLISHED = CifarFiles(
    folder=CIFAR10.base_folder,
    archive=CIFAR10.filename,
    archive_md5=CIFAR10.tgz_md5,
    url=CIFAR10.url,
    train=tuple(map(tuple, CIFAR10.train_list)),
    test=tuple(map(tuple, CIFAR10.test_list)),
    train_images=50_000,
    test_images=10_000,
)


def open_cifar10(
    size: Pair | None, dirs: Sequence[Path], *, download: bool = False, files: CifarFiles | None = None
) -> ResidentData:
    """CIFAR-10 from the first of ``dirs`` that has it: as a folder, inside one, or as the archive, which stays packed.

    size: None or (32, 32). download: fetch the archive into the first of ``dirs`` where none has it. files: by default
    PUBLISHED. Raises UsageError for another size, where nothing is found, for a file that is missing or has another
    MD5, and for a download that fails.
    """
    files = files or PUBLISHED
    if as_pair("size", size or SIZE) != SIZE:
        raise UsageError(f"size {size} is not that of cifar10, whose images have 32 x 32 px; leave it out")
    if not dirs:
        raise UsageError(
            f"cifar10 needs {DATA_DIR}: the folder that has {files.folder} or {files.archive}, or that --download is "
            "to fetch it into"
        )
    source = _source(files, dirs, download=download)
    md5s = dict(files.train + files.test)
    read = {name: _decoded(source / name, content, md5s[name]) for name, content in _contents(source, files)}
    if missing := [name for name in md5s if name not in read]:
        raise UsageError(f"{source} has no {' and no '.join(missing)}; copy it again or use --download")
    train, train_labels = _joined(source, [read[name] for name, _ in files.train], files.train_images)
    test, test_labels = _joined(source, [read[name] for name, _ in files.test], files.test_images)
    return ResidentData(
        name="cifar10",
        preprocessing=Preprocessing(SIZE, MEAN, STD),
        num_classes=CLASSES,
        train_labels=train_labels,
        test_labels=test_labels,
        train_images=train,
        test_images=test,
        pad=PAD,
        flip=True,
    )


def _source(files: CifarFiles, dirs: Sequence[Path], *, download: bool) -> Path:
    """The archive or the folder with the batches."""

    def look(directory: Path, names: set[str]) -> Path | str:
        if directory.is_file():
            return _other_version(directory, {directory.name}, files) or directory
        places = {files.folder: directory / files.folder}
        places |= {name: directory for name, _ in files.train + files.test}
        places[files.archive] = directory / files.archive
        found = next((place for name, place in places.items() if name in names), None)
        neither = f"{directory} has neither {files.folder} nor {files.archive}"
        return found or _other_version(directory, names, files) or neither

    source = search(dirs, look)
    if isinstance(source, Path):
        return source
    if download:
        return _downloaded(files, dirs[0])
    raise UsageError(f"cifar10 was not found: {source}; give another {DATA_DIR}, or add --download to fetch it")


def _other_version(place: Path, names: set[str], files: CifarFiles) -> str | None:
    """Which of the other versions ``place`` is or has, as a sentence; None where it is and has none."""
    for version, others in _OTHER_VERSIONS.items():
        for name in names.intersection(others):
            path = place if place.name == name else place / name
            return f"{path} is of the {version} version, and the Python version is needed, {files.archive}"
    return None


def _downloaded(files: CifarFiles, folder: Path) -> Path:
    """The archive, complete or not there at all."""
    target, part = folder / files.archive, folder / f"{files.archive}.part"
    try:
        download_url(files.url, str(folder), part.name, files.archive_md5)
        os.replace(part, target)
    except (OSError, RuntimeError) as problem:  # torchvision's for a wrong MD5 is a RuntimeError
        reason = reason_of(getattr(problem, "reason", problem))
        raise UsageError(
            f"{files.archive} could not be downloaded from {urlsplit(files.url).netloc} ({reason}); get it elsewhere "
            f"and put it into {folder}"
        ) from problem
    finally:
        with suppress(OSError):
            part.unlink()
    return target


def _contents(source: Path, files: CifarFiles) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the batches that are there. Nothing of an archive with another MD5 is read."""
    names = [name for name, _ in files.train + files.test]
    try:
        if source.is_dir():
            for name in names:
                if (source / name).exists():
                    yield name, (source / name).read_bytes()
            return
        _check_md5(source, calculate_md5(source), files.archive_md5)
        batches = {f"{files.folder}/{name}": name for name in names}
        with tarfile.open(source, "r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.name in batches else None
                if stream is not None:
                    yield batches[member.name], stream.read()
    except (OSError, tarfile.TarError) as problem:
        raise UsageError(f"{source} cannot be read ({problem}); copy it again or use --download") from problem


def _decoded(path: Path, content: bytes, md5: str) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) and labels (count,) of one batch, its MD5 checked before it is unpickled."""
    _check_md5(path, hashlib.md5(content, usedforsecurity=False).hexdigest(), md5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's about the spelling of a type in pickles this old
        batch = pickle.loads(content, encoding="latin1")
    images, labels = torch.tensor(batch["data"]), torch.tensor(batch["labels"], dtype=torch.int64)
    right = images.dtype == torch.uint8 and images.shape == (len(labels), _COLUMNS)
    if not right or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UsageError(f"{path} has not {_COLUMNS:,} bytes and a label from 0 to 9 an image; copy it again")
    return images.view(-1, 3, *SIZE), labels


def _joined(source: Path, batches: Sequence[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if len(labels) != count:
        raise UsageError(f"{source} has {len(labels):,} images in a split that has {count:,}; copy it again")
    return images, labels


def _check_md5(path: Path, found: str, published: str) -> None:
    if found != published:
        raise UsageError(
            f"{path} has the MD5 {found}, not {published}: it is truncated, damaged or another file; remove it, then "
            "copy it again or use --download"
        )
