"""The images that a network is run on for calibration, and the positions that are looked at in each."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.errors import UsageError
from bgcbench.record import Replaced
from bgcbench.specs import HELD_OUT
from bgcbench.theory.moments import some_positions

ROWS_AN_ENTRY = 20  # positions that are enough for a moment, for each entry of the patch vector
LEAST_ROWS = 2**14  # positions that are taken in any case, where there are as many


@dataclass(frozen=True, eq=False)
class Part:
    """Images (B, C, H, W) that go through the network together, their numbers, and whether they are held out."""

    images: Tensor
    numbers: list[int]
    held_out: bool

    def below(self, images: int) -> Part | None:
        """Those of the images whose numbers are below ``images``; None where there are none."""
        count = sum(number < images for number in self.numbers)
        return Part(self.images[:count], self.numbers[:count], self.held_out) if count else None


def parts_of(batches: Iterable[Any], images: int, at_most: int | None = None) -> Iterator[Part]:
    """The first ``images`` of ``batches``, those held out (one in four) by themselves, up to ``at_most`` in a part.

    They go apart so that nothing has to be known of how a network stacks the images of a batch.
    """
    seen = 0
    for batch in batches:
        x = input_of(batch)[: images - seen]
        numbers = torch.arange(seen, seen + len(x))
        held = numbers % HELD_OUT == HELD_OUT - 1
        for part in (~held, held):
            chosen = x[part.to(x.device)]
            for some, of in zip(chosen.split(at_most or max(1, len(chosen))), numbers[part].split(at_most or len(x)),
                                strict=False):  # fmt: skip
                if len(some):
                    yield Part(some, of.tolist(), part is held)
        seen += len(x)
        if seen >= images:
            return


def check_enough(images: int) -> None:
    """Raise UsageError for fewer images than one held out needs."""
    if images < HELD_OUT:
        raise UsageError(f"{images} calibration images are too few; use at least {HELD_OUT}: one in four is held out")


def input_of(batch: Any) -> Tensor:
    """The images of a batch: itself, or the first of a tuple (with labels behind it)."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise UsageError(
            f"a calibration batch is a {type(batch).__name__}; pass tensors (B, C, H, W), or tuples that begin with one"
        )
    return images


def first_of(batches: Iterable[Any]) -> tuple[Tensor, Iterable[Any]]:
    """The first input, and the batches with it back in front where they can be gone through once only."""
    iterator = iter(batches)
    try:
        head = next(iterator)
    except StopIteration:
        raise UsageError("there are no calibration images; pass batches of them") from None
    return input_of(head), itertools.chain([head], iterator) if iterator is batches else batches


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device


def for_network(x: Tensor, model: nn.Module) -> Tensor:
    """x where the network is, in its floating-point type."""
    reference = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    return x.to(device=reference.device, dtype=reference.dtype if reference.is_floating_point() else None)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The network in eval mode and without gradients; its mode and torch's random state are put back afterwards."""
    was_training = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.no_grad(), random_state_kept(model):
            model.eval()
            yield
    finally:
        for name, module in model.named_modules():
            module.training = was_training.get(name, module.training)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """torch's random state, on the CPU and where the network is, as it was before the block."""
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
        yield


def patch_length(layer: Replaced) -> int:
    """nK, the length of a patch vector."""
    return layer.in_channels * math.prod(layer.kernel)


def positions_an_image(layer: Replaced, images: int) -> int:
    """Positions of an image that are enough: together some twenty for each entry of the patch vector."""
    return math.ceil(max(LEAST_ROWS, ROWS_AN_ENTRY * patch_length(layer)) / images)


def positions_of(
    layer: str, seed: int, image: int, count: int, at_most: int, *, call: int = 0, copy: int = 0
) -> Tensor:
    """Which of ``count`` positions of an image are taken, ascending: (at_most,) on the CPU.

    It depends on the seed, the layer, the image and the call only: not on how the images are batched or which other
    layers are looked at.
    """
    return some_positions(count, at_most, position_stream(layer, seed, image, call=call, copy=copy))


def position_stream(layer: str, seed: int, image: int, *, call: int = 0, copy: int = 0) -> torch.Generator:
    """The random numbers behind :func:`positions_of`."""
    key = f"{seed}:{layer}:{image}:{call}:{copy}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
    return torch.Generator(device="cpu").manual_seed(number)


def batched(x: Tensor) -> Tensor:
    """x (B, C, H, W), also where a single image (C, H, W) was given."""
    return x if x.dim() == 4 else x[None]


def padded(x: Tensor, layer: Replaced) -> Tensor:
    """x with the layer's padding around it where that is not zeros, which the cutting of patches adds by itself."""
    if layer.padding_mode == "zeros":
        return x
    rows, columns = layer.padding
    return F.pad(x, (columns, columns, rows, rows), mode=layer.padding_mode)


def zero_padding(layer: Replaced) -> tuple[int, int]:
    """The zeros that cutting patches adds."""
    return layer.padding if layer.padding_mode == "zeros" else (0, 0)


def moments_device(device: torch.device) -> torch.device:
    """Where moments are added up: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
