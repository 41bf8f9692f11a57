"""Any folder of images, prepared as the networks trained on ImageNet expect them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as image_ops

from bgcbench.data.base import Images
from bgcbench.errors import UsageError, reason_of
from bgcbench.specs import Pair, Preprocessing

# What most networks were trained on ImageNet with; a folder's own where the network does not say another one.
IMAGENET_EVALUATION = Preprocessing((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (256, 256), "bilinear")

OTHER_SPLITS = ("val", "valid", "validation", "test", "testing")

_DEEP_MODES = ("I", "F")  # Pillow's modes of more than 8 bits a channel, which it clips instead of scaling


@dataclass(frozen=True)
class Folder(Images):
    """The images below ``root``. files: their paths relative to it, with forward slashes, sorted."""

    root: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Of the files' names and sizes: reading them all would take as long as using them."""
        listed = "\n".join(f"{name} {file_size(self.root / name)}" for name in self.files)
        return hashlib.sha256(f"{self.size}\n{listed}".encode()).hexdigest()[:16]

    def read(self, chosen: Sequence[int]) -> Tensor:
        return torch.stack([load_image(self.root / self.files[number], self.preprocessing) for number in chosen])

    def labels_of(self, chosen: Sequence[int]) -> Tensor | None:
        """Where every image is in a folder of ``root``, that folder's place among them by name."""
        if self.num_classes is None:
            return None
        classes = _classes(self.files)
        return torch.tensor([classes.index(self.files[number].split("/")[0]) for number in chosen])

    @cached_property
    def test_split(self) -> Folder | None:
        """The validation split beside the training one; None where there is none, or none with the same classes."""
        if self.root.name != "train" or not _is_split(self.root.parent):
            return None
        for name in OTHER_SPLITS:
            files = image_files(self.root.parent / name) if (self.root.parent / name).is_dir() else ()
            if files and _classes(files) == _classes(self.files):
                return replace(self, root=self.root.parent / name, files=files)
        return None


def open_folder(path: str, size: Pair | None = None) -> Folder:
    """The images in ``path`` and its subfolders, or in its subfolder ``train`` where it has that and no other splits.

    size: (height, width) in px, by default 224 x 224. Raises UsageError for a path that is no folder, or that has no
    images or cannot be listed.
    """
    given = Path(path)
    if not os.path.exists(given):
        raise UsageError(f"{path} is not there; give the path of a folder of images")
    if not os.path.isdir(given):
        raise UsageError(f"{path} is a file, not a folder of images; give the folder it is in")
    root = given / "train" if _is_split(given) else given
    files = image_files(root)
    if not files:
        raise UsageError(
            f"{root} has no images, in its subfolders neither; looked for files ending in {', '.join(IMG_EXTENSIONS)}"
        )
    how = IMAGENET_EVALUATION.at(size or IMAGENET_EVALUATION.size)
    return Folder(folder_name(given), how, len(_classes(files)) or None, root, files)


def _classes(files: Sequence[str]) -> list[str]:
    """The folders that the images are in, by name; none where some image is in none."""
    parts = [name.split("/") for name in files]
    return sorted({part[0] for part in parts}) if all(len(part) > 1 for part in parts) else []


def folder_name(path: Path) -> str:
    """What the folder is called: '.' has no name of its own, and a symbolic link keeps its own."""
    return Path(os.path.abspath(path)).name or "root"


def _is_split(folder: Path) -> bool:
    """Whether the folder has a training split: a subfolder ``train``, and no other but further splits.

    A class may be called train too, and then stands among other classes.
    """
    try:
        inside = {name for name in os.listdir(folder) if not name.startswith(".") and os.path.isdir(folder / name)}
    except OSError:
        return False  # listing it again says why
    return "train" in inside and inside <= {"train", *OTHER_SPLITS}


def image_files(root: Path) -> tuple[str, ...]:
    """The images below ``root``: their paths relative to it, with forward slashes, sorted.

    What starts with a dot is skipped. Raises UsageError, naming it, for a folder that cannot be listed.
    """

    def refuse(problem: OSError) -> None:
        raise UsageError(f"{problem.filename} cannot be listed ({problem.strerror}); make it readable") from problem

    found: list[str] = []
    seen: set[str] = set()
    for folder, inside, files in os.walk(root, onerror=refuse, followlinks=True):
        # A link that leads back up would be followed for ever.
        real = os.path.realpath(folder)
        inside[:] = [] if real in seen else sorted(name for name in inside if not name.startswith("."))
        if real not in seen:
            below = Path(folder).relative_to(root).as_posix()
            prefix = "" if below == "." else f"{below}/"
            found += [prefix + name for name in files if is_image(name)]
        seen.add(real)
    return tuple(sorted(found))


def is_image(name: str) -> bool:
    """Whether a file of this name counts: one of torchvision's IMG_EXTENSIONS, in either case, and no leading dot."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def file_size(path: Path) -> int:
    """Bytes; raises UsageError for a file that is gone, or for a link to nothing."""
    try:
        return os.path.getsize(path)
    except OSError as problem:
        raise _unreadable(path, problem) from problem


def load_image(path: Path, how: Preprocessing) -> Tensor:
    """The image as (3, height, width) in uint8, 0 to 255, not yet normalised: resized, then its centre cut out.

    The pixels are those of torchvision's and timm's own evaluation: RGB without transparency, Pillow's resampling, no
    turning by EXIF. Raises as ``open_rgb``.
    """
    rgb = open_rgb(path)
    resized = image_ops.resize(
        rgb, _resized(rgb.height, rgb.width, how), interpolation=InterpolationMode(how.interpolation), antialias=True
    )
    pixels: Tensor = image_ops.pil_to_tensor(image_ops.center_crop(resized, list(how.size)))
    return pixels


def open_rgb(path: Path) -> Image.Image:
    """The image in 8-bit RGB, decoded.

    Raises UsageError, naming the file, for one that cannot be read, is truncated, or has more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # Pillow's about palettes and large images: neither changes the result
            deep = image.mode.split(";")[0] in _DEEP_MODES
            rgb: Image.Image = image.convert("RGB")
    except Exception as problem:  # Pillow's decoders raise anything on a damaged file
        raise _unreadable(path, problem) from problem
    if deep:
        raise UsageError(f"{path} has more than 8 bits a channel, which would be clipped; convert it to 8 bits")
    return rgb


def _resized(height: int, width: int, how: Preprocessing) -> list[int]:
    """[height, width] of an image before its centre is cut out."""
    high, wide = how.resize or how.size
    if how.crop == "squash":
        return [high, wide]
    # The long side: torchvision rounds down, timm (whose sizes need not be square) to the nearest.
    whole: Callable[[float], int] = int if high == wide else round
    if high * width >= wide * height:  # the height is what limits
        return [high, whole(high * width / height)]
    return [whole(wide * height / width), wide]


def _unreadable(path: Path, problem: Exception) -> UsageError:
    unknown = isinstance(problem, UnidentifiedImageError)
    reason = "no image format that Pillow knows" if unknown else reason_of(problem)
    return UsageError(f"{path} cannot be read as an image ({reason}); repair or remove it")
