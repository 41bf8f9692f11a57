"""Images of the user's own, by the function that loads them: ``data.py:load`` or ``package.module:load``.

It returns images as (count, 3, height, width) in uint8, 0 to 255, or four arrays: images and labels to train with, and
images and labels to test with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bgcbench.data.base import Images
from bgcbench.data.labelled import Resident, ResidentData
from bgcbench.errors import UsageError
from bgcbench.factories import made_by
from bgcbench.specs import Pair, Preprocessing, check_named

_WANTED = "uint8 images (count, 3, height, width), or four arrays: images, labels to train with, and to test with"


def open_own(data: str, size: Pair | None) -> Images:
    """The images of the function ``data`` (of four arrays the first), to calibrate with; raises UsageError."""
    made = _made(data)
    images = _images(data, made[0] if isinstance(made, (tuple, list)) and made else made)
    return Resident(data, _as_they_are(data, images, size), None, images)


def open_labelled_own(data: str, size: Pair | None) -> ResidentData:
    """The four arrays of the function ``data``, neither cropped nor mirrored; raises UsageError."""
    made = _made(data)
    if not isinstance(made, (tuple, list)) or len(made) != 4:
        raise UsageError(f"--data {data} must return four arrays: images, labels to train with, and to test with")
    train_images, test_images = (_images(data, images) for images in made[::2])
    train_labels, test_labels = (
        _labels(data, labels, len(images)) for labels, images in ((made[1], train_images), (made[3], test_images))
    )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UsageError(
            f"--data {data} returns images of {_px(train_images)} px to train and {_px(test_images)} to test"
        )
    return ResidentData(
        name=data,
        preprocessing=_as_they_are(data, train_images, size),
        num_classes=1 + int(max(train_labels.max(), test_labels.max())),
        train_labels=train_labels,
        test_labels=test_labels,
        train_images=train_images,
        test_images=test_images,
        pad=0,
        flip=False,
    )


def _made(data: str) -> Any:
    return made_by(check_named(data), "--data")


def _images(data: str, made: Any) -> Tensor:
    images = _tensor(made)
    if images is None or images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not len(images):
        found = type(made).__name__ if images is None else f"{images.dtype} of shape {tuple(images.shape)}"
        raise UsageError(f"--data {data} must return {_WANTED}; it is {found}")
    return images


def _labels(data: str, made: Any, count: int) -> Tensor:
    labels = _tensor(made)
    whole = labels is not None and not labels.is_floating_point() and not labels.is_complex()
    if labels is None or not whole or labels.shape != (count,) or int(labels.min()) < 0:
        raise UsageError(f"--data {data} must return a label from 0 up, a whole number, for each of {count} images")
    return labels.to(torch.int64)


def _tensor(made: Any) -> Tensor | None:
    try:
        return torch.as_tensor(made)
    except (TypeError, ValueError, RuntimeError):
        return None


def _as_they_are(data: str, images: Tensor, size: Pair | None) -> Preprocessing:
    """0 as black and 1 as white where nothing else is said; raises UsageError where another size is asked for."""
    height, width = images.shape[2:]
    if size not in (None, (height, width)):
        raise UsageError(
            f"--data {data} has images of {_px(images)} px, and {size[0]}x{size[1]} are needed: --size {_px(images)}"
        )
    return Preprocessing((height, width), (0.0,) * 3, (1.0,) * 3)


def _px(images: Tensor) -> str:
    return "x".join(map(str, images.shape[2:]))
