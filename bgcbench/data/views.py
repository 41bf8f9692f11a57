"""Several views of each calibration picture: what few pictures can still say about the inputs of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as image_ops

from bgcbench.data.feeds import stream_seed
from bgcbench.errors import UsageError
from bgcbench.specs import check_positive

AREA, ASPECT = [0.25, 1.0], [3 / 4, 4 / 3]  # of an image, as a crop has them


class Views:
    """``batches`` of images, ``views`` of each: the image, and random crops of it at its size, half of them mirrored.

    batches: tensors (B, C, H, W), or tuples and lists that begin with one; anything else in these is left out. A crop
    has a quarter of the image's area or more, and a ratio of its sides between 3:4 and 4:3. The views of an image come
    one after the other; ``pictures`` says so to what holds images out, which then holds out all views of a picture or
    none. What is drawn follows from ``seed`` and the image's number alone. Raises UsageError for other batches.
    """

    def __init__(self, batches: Iterable[Any], views: int, *, seed: int = 0) -> None:
        self.batches, self.views, self.seed = batches, check_positive("views", views), seed

    def pictures(self, number: int) -> int:
        """Which picture the image of that number shows."""
        return number // self.views

    def __iter__(self) -> Iterator[Tensor]:
        picture = 0
        for batch in self.batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(images, Tensor) or images.dim() != 4:
                raise UsageError("views are of batches of images: tensors (B, C, H, W), or tuples that begin with one")
            yield torch.cat([self._views(image, picture + place) for place, image in enumerate(images)])
            picture += len(images)

    def _views(self, image: Tensor, picture: int) -> Tensor:
        """(views, C, H, W), the image itself first."""
        made = [image]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stream_seed("view", self.seed, picture))
            for _ in range(self.views - 1):
                box = RandomResizedCrop.get_params(image, AREA, ASPECT)
                view = image_ops.resized_crop(image, *box, size=list(image.shape[1:]), antialias=True)
                made.append(view.flip(-1) if torch.rand(()).item() < 0.5 else view)
        return torch.stack(made)
