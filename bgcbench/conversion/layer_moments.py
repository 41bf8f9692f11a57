"""What comes to the layers of a network on calibration images: which images, and which positions of each.

The engine under both :mod:`bgcbench.conversion.calibration` and :mod:`bgcbench.conversion.approximability`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing, count_images, take
from bgcbench.measure.undisturbed import seed_everything
from bgcbench.results.rows import Replaced
from bgcbench.specs import HELD_OUT
from bgcbench.theory.moments import CHUNK_NUMBERS, Patches, some_positions

ROWS_AN_ENTRY = 20  # positions sampled for each entry of the patch vector
LEAST_ROWS = 2**14  # and at least so many, where there are as many


@dataclass(frozen=True, eq=False)
class Part:
    """Images that go through the network together, their numbers, and whether they are held out.

    batch: what the network is called with (see Passing.of).
    """

    batch: Any
    numbers: list[int]
    held_out: bool

    @property
    def seed(self) -> int:
        """Of the random numbers that a network draws while it runs on these images."""
        return self.numbers[0]

    def below(self, images: int) -> Part | None:
        """Those of the images whose numbers are below ``images``; None where there are none."""
        count = sum(number < images for number in self.numbers)
        if count in (0, len(self.numbers)):
            return self if count else None
        return Part(take(self.batch, range(count)), self.numbers[:count], self.held_out)


Pictures = Sequence[Hashable] | Callable[[int], Hashable] | None  # which picture an image shows, by its number


class Holding:
    """Which images are held out: all those of one picture in four, so that none is like one that is fitted.

    pictures: see Pictures; without, each image is a picture of its own.
    """

    def __init__(self, pictures: Pictures = None) -> None:
        self._pictures = pictures
        self._seen: dict[Hashable, int] = {}

    def __call__(self, number: int) -> bool:
        """Whether the image of that number is held out; asked in ascending order first."""
        picture: Hashable = number
        if callable(self._pictures):
            picture = self._pictures(number)
        elif self._pictures is not None:
            if number >= len(self._pictures):
                raise UsageError(f"pictures are named for {len(self._pictures)} calibration images, and there are more")
            picture = self._pictures[number]
        return self._seen.setdefault(picture, len(self._seen)) % HELD_OUT == HELD_OUT - 1

    def check_enough(self) -> None:
        """Raise UsageError for fewer pictures than one held out needs."""
        if len(self._seen) < HELD_OUT:
            what = "calibration images" if self._pictures is None else "pictures to calibrate on"
            raise UsageError(f"{len(self._seen)} {what} are too few; use at least {HELD_OUT}: one in four is held out")


def parts_of(
    batches: Iterable[Any],
    images: int,
    passing: Passing,
    model: nn.Module,
    holding: Holding,
    at_most: int | None = None,
) -> Iterator[Part]:
    """The first ``images`` of ``batches``, those held out by themselves, up to ``at_most`` in a part.

    They go apart so that nothing has to be known of how a network stacks the images of a batch. A batch that cannot be
    taken apart counts as one image.
    """
    seen = 0
    for batch in batches:
        if seen >= images:
            return
        given = passing.of(batch, model)
        count = count_images(given)
        if count is None:
            yield Part(given, [seen], holding(seen))
            seen += 1
            continue
        places = range(min(count, images - seen))
        is_held_out = [holding(seen + place) for place in places]
        for held_out in (False, True):
            chosen = [place for place in places if is_held_out[place] is held_out]
            step = at_most or max(1, count)
            for begin in range(0, len(chosen), step):
                some = chosen[begin : begin + step]
                yield Part(take(given, some), [seen + place for place in some], held_out)
        seen += len(places)


def first_of(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and the batches with it back in front where they can be gone through once only."""
    iterator = iter(batches)
    try:
        head = next(iterator)
    except StopIteration:
        raise UsageError("there are no calibration images; pass batches of them") from None
    return head, itertools.chain([head], iterator) if iterator is batches else batches


def on_input(module: nn.Module, visit: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``visit`` with the input of ``module`` before each of its calls."""

    def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        visit(arguments[0] if arguments else options["input"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


Visit = Callable[[Part, int, Tensor], None]  # the images, which call of the module on them, what it takes or puts out


@contextmanager
def watching(
    model: nn.Module,
    passing: Passing,
    *,
    inputs: Mapping[nn.Module, Visit],
    outputs: Mapping[nn.Module, Visit] | None = None,
) -> Iterator[Callable[[Part], None]]:
    """Yield a function that runs ``model`` on a part and visits what modules take (``inputs``) and put out."""
    part: Part | None = None
    calls: Counter[Visit] = Counter()

    def see(visit: Visit, x: Tensor) -> None:
        if part is not None:
            visit(part, calls[visit], x.detach())
            calls[visit] += 1

    def run(next_part: Part) -> None:
        nonlocal part
        part = next_part
        calls.clear()
        seed_everything(part.seed)
        passing(model, part.batch)

    with ExitStack() as hooks:
        for module, visit in inputs.items():
            hooks.enter_context(on_input(module, partial(see, visit)))
        for module, visit in (outputs or {}).items():
            hook = module.register_forward_hook(lambda _, __, y, visit=visit: see(visit, y), prepend=True)
            hooks.enter_context(hook)
        yield run


def patch_length(layer: Replaced) -> int:
    """nK, the length of a patch vector."""
    return layer.in_channels * math.prod(layer.kernel)


def positions_an_image(layer: Replaced, images: int) -> int:
    """Positions of an image that are enough: together some twenty for each entry of the patch vector."""
    return math.ceil(max(LEAST_ROWS, ROWS_AN_ENTRY * patch_length(layer)) / images)


class Sampler:
    """The positions of one layer's outputs that are looked at, and what is there.

    Which ones of an image depends on the seed, the layer, the image and the call only: not on how the images are
    batched, nor on which other layers are looked at.
    """

    def __init__(self, layer: Replaced, images: int, seed: int) -> None:
        self.layer, self.seed = layer, seed
        self.at_most = positions_an_image(layer, images)
        zeros = layer.padding if layer.padding_mode == "zeros" else (0, 0)
        self._cut = Patches(layer.kernel, stride=layer.stride, padding=zeros, dilation=layer.dilation)

    def positions(self, part: Part, call: int, place: int, count: int) -> Tensor | None:
        """Those of the ``count`` positions of the image at ``place`` of a batch, ascending; None for all of them."""
        if count <= self.at_most:
            return None
        copy, at = divmod(place, len(part.numbers))
        key = f"{self.seed}:{self.layer.name}:{part.numbers[at]}:{call}:{copy}"
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big")
        return some_positions(count, self.at_most, torch.Generator(device="cpu").manual_seed(number))

    def patches(self, x: Tensor, part: Part, call: int) -> Iterator[Tensor]:
        """The patches (nK, P) of the layer's input x at these positions, image by image, some at a time."""
        x = padded(batched(x), self.layer)
        height, width = self._cut.output_size(x)
        at_once = max(1, CHUNK_NUMBERS // patch_length(self.layer))
        waiting: list[Tensor] = []
        for place, image in enumerate(x.split(1)):
            chosen = self.positions(part, call, place, height * width)
            waiting.append(
                self._cut.all(image) if chosen is None else self._cut.at(image[0], chosen // width, chosen % width)
            )
            if sum(cut.shape[1] for cut in waiting) >= at_once or place == len(x) - 1:
                yield torch.cat(waiting, dim=1)
                waiting = []

    def outputs(self, y: Tensor, part: Part, call: int) -> Tensor:
        """The layer's outputs y at these positions: (m, positions)."""
        flat = batched(y).flatten(2)
        kept = []
        for place, image in enumerate(flat):
            chosen = self.positions(part, call, place, flat.shape[-1])
            kept.append(image if chosen is None else image[:, chosen.to(image.device)])
        return torch.cat(kept, dim=1)


def batched(x: Tensor) -> Tensor:
    """x (B, C, H, W), also where a single image (C, H, W) was given."""
    return x if x.dim() == 4 else x[None]


def padded(x: Tensor, layer: Replaced) -> Tensor:
    """x with the layer's padding around it where that is not zeros, which the cutting of patches adds by itself."""
    if layer.padding_mode == "zeros":
        return x
    rows, columns = layer.padding
    return F.pad(x, (columns, columns, rows, rows), mode=layer.padding_mode)


def moments_device(device: torch.device) -> torch.device:
    """Where moments are added up: Apple's GPUs have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
