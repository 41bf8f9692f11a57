"""What each convolution of a network loses as a variant, on the inputs that the network really gives it.

    for layer in bgcbench.approximability(model, loader, variants=("gc", "bgc"), groups=(2, 4, 8)):
        print(layer.name, layer.variant, layer.groups, layer.calibrated)

The network is run in eval mode over calibration images. At every convolution that :func:`bgcbench.convert` would
replace, the second moment of the input patches is added up; what any kernel V in place of W does to the output energy
follows from it: E||Wu - Vu||^2 / E||Wu||^2 = tr((W - V) C (W - V)^T) / tr(W C W^T). One image in four is held out: the
calibrated weights are solved for on the others, and all errors are those on the images held out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convert import Replaced, candidates
from bgcbench.convs import CONVS
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.counts import count
from bgcbench.measure.trace import Size
from bgcbench.specs import VARIANTS, ConvSpec, check_choice, check_positive, unfit
from bgcbench.theory.fits import EXACT
from bgcbench.theory.moments import PatchMoments

HELD_OUT = 4  # of so many images one is held out
LEAST_IMAGES = HELD_OUT
ROWS_AN_ENTRY = 20  # positions that are enough for a moment, for each entry of the patch vector
LEAST_ROWS = 2**14  # positions that are taken in any case, where there are as many
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the least squares, in units of the mean power of the regressors
SEARCH_RIDGE = 1e-2  # of the variants that are no linear space: solving each of them four times is not worth it
LINEAR = ("gc", "shuffle", "bgc")
MOMENT_BYTES = 8  # float64


@dataclass(frozen=True)
class LayerMoments:
    """Patch moments at one convolution: ``fit`` for solving, ``held_out`` for judging."""

    fit: PatchMoments
    held_out: PatchMoments


@dataclass(frozen=True)
class LayerError:
    """What one convolution loses as one variant: shares of its output's energy on images held out.

    copied: the weights that the paper would copy; white: the closed-form optimum for uncorrelated inputs; calibrated:
    least squares on the activations (never worse than white on the images held out: where it would be, ``ridge`` is
    None and white is taken). All None, with a ``reason``, where N does not fit the channels.
    ridge: its pull towards white, chosen on the images held out. rows: positions that it was solved on; scarce: fewer
    than ten of them for each number an output has. params, macs: of this layer in this form; share: of its standard
    convolution in the multiply-adds of all that would be replaced.
    """

    name: str
    layer: Replaced
    variant: str
    groups: int
    copied: float | None
    white: float | None
    calibrated: float | None
    ridge: float | None
    rows: int
    held_out_rows: int
    scarce: bool
    params: int | None
    macs: int | None
    share: float | None
    reason: str | None = None


def approximability(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    variants: Sequence[str] = ("gc", "bgc"),
    groups: Sequence[int] = (2, 4, 8, 16),
    images: int = 256,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Tensor | Size | None = None,
    memory_bytes: int = 4 * 2**30,
    seed: int = 0,
) -> list[LayerError]:
    """The loss of every convolution that ``convert`` would replace, for each variant and N; in execution order.

    batches: anything that yields inputs (B, C, H, W), or tuples that begin with one, more than once if it is asked to
    (a list, a DataLoader; a generator serves where one pass is enough). images: how many of them are used, at least 4.
    memory_bytes: what the moments may take; where all layers need more, the images are run through the network several
    times. The network's weights, mode, hooks and random state are left as they were. Raises UsageError for too few
    images and for a layer whose moments alone exceed the memory.
    """
    for name in variants:
        check_choice("variant", name, VARIANTS)
    first, batches = _first(batches)
    found = candidates(
        model,
        where=where,
        include=include,
        exclude=exclude,
        example_input=example_input if example_input is not None else first[:1],
    )
    errors: list[LayerError] = []
    for layer, moments in stream(model, found.chosen, batches, images=images, memory_bytes=memory_bytes, seed=seed):
        judge = Judge(layer, kernel_of(model, layer), moments, shares(found.chosen).get(layer.name))
        errors += [judge.judge(variant, n) for n in groups for variant in variants if variant != "standard"]
    return errors


def kernel_of(model: nn.Module, layer: Replaced) -> Tensor:
    """The dense kernel of a layer (m, n, kh, kw)."""
    weight: Tensor = model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return weight


def _first(batches: Iterable[Any]) -> tuple[Tensor, Iterable[Any]]:
    """The first input, and the batches with it back in front where they can be gone through once only."""
    iterator = iter(batches)
    try:
        head = next(iterator)
    except StopIteration:
        raise UsageError("there are no calibration images; pass batches of them") from None
    return _input(head), itertools.chain([head], iterator) if iterator is batches else batches


def _input(batch: Any) -> Tensor:
    """The images of a batch: itself, or the first of a tuple (with labels behind it)."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise UsageError(
            f"a calibration batch is a {type(batch).__name__}; pass tensors (B, C, H, W), or tuples that begin with one"
        )
    return images


def shares(layers: Sequence[Replaced]) -> dict[str, float]:
    """Each layer's share of the multiply-adds of all of them."""
    macs = {layer.name: (_macs(layer) or 0) * (layer.calls or 1) for layer in layers}
    total = sum(macs.values())
    return {name: value / total for name, value in macs.items()} if total else {}


def _macs(layer: Replaced) -> int | None:
    if layer.height is None or layer.width is None:
        return None
    return count(_spec(layer, "standard", 1), layer.height, layer.width).macs


def _spec(layer: Replaced, variant: str, groups: int) -> ConvSpec:
    geometry = layer.kernel, layer.stride, layer.padding, layer.dilation
    return ConvSpec(variant, layer.in_channels, layer.out_channels, *geometry, groups, layer.bias)


# --------------------------------------------------------------------------------------------------------- collecting


def moment_bytes(layer: Replaced) -> int:
    """Memory of one layer's moments, both of them."""
    return 2 * MOMENT_BYTES * patch_length(layer) ** 2


def patch_length(layer: Replaced) -> int:
    """nK, the length of a patch vector."""
    return layer.in_channels * math.prod(layer.kernel)


def passes(layers: Sequence[Replaced], memory_bytes: int) -> list[list[Replaced]]:
    """The layers in as few portions, in order, as fit ``memory_bytes``; raises UsageError for one that does not."""
    portions: list[list[Replaced]] = []
    left = 0
    for layer in layers:
        needed = moment_bytes(layer)
        if needed > memory_bytes:
            raise UsageError(
                f"the moments of {layer.name} ({layer.in_channels} channels, {patch_length(layer)} patch entries) take "
                f"{needed / 2**30:.2g} GiB, more than the {memory_bytes / 2**30:.2g} GiB allowed; raise --memory, or "
                f"leave it out with --exclude {layer.name}"
            )
        if not portions or needed > left:
            portions.append([])
            left = memory_bytes
        portions[-1].append(layer)
        left -= needed
    return portions


def stream(
    model: nn.Module,
    layers: Sequence[Replaced],
    batches: Iterable[Any],
    *,
    images: int,
    memory_bytes: int,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Replaced, LayerMoments]]:
    """Each layer with its moments, in order; one run over the images for every portion that fits the memory.

    stop: asked after every batch; where it returns True, the stream ends.
    """
    check_positive("calibration images", images)
    portions = passes(layers, memory_bytes)
    for number, portion in enumerate(portions):
        collected = _collect(model, portion, batches, images, seed, stop)
        if collected is None:
            return
        for layer in portion:
            # Popped, so that a layer's memory is free once it has been dealt with.
            yield layer, collected.pop(layer.name)
        if number + 1 < len(portions) and iter(batches) is batches:
            raise UsageError("the calibration images are needed more than once; pass a list or a DataLoader")


def _collect(
    model: nn.Module,
    layers: Sequence[Replaced],
    batches: Iterable[Any],
    images: int,
    seed: int,
    stop: Callable[[], bool],
) -> dict[str, LayerMoments] | None:
    """Run the images through the network and add up the moments of ``layers``; None where it was stopped."""
    reference = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))
    moments = {layer.name: LayerMoments(_fresh(layer, reference), _fresh(layer, reference)) for layer in layers}
    at_most = {layer.name: _positions(layer, images) for layer in layers}
    generator = torch.Generator(device="cpu").manual_seed(seed)
    held = torch.empty(0, dtype=torch.bool)

    def watch(layer: Replaced) -> Any:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = _padded(arguments[0].detach(), layer)
            own = moments[layer.name]
            for part, chosen in ((own.fit, ~held), (own.held_out, held)):
                if chosen.any():
                    part.add(x[chosen.to(x.device)], at_most[layer.name], generator)

        return add

    was_training = {name: module.training for name, module in model.named_modules()}
    handles = [model.get_submodule(layer.name).register_forward_pre_hook(watch(layer)) for layer in layers]
    seen = 0
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in batches:
                x = _input(batch)[: images - seen]
                held = (torch.arange(seen, seen + len(x)) % HELD_OUT) == HELD_OUT - 1
                model(x.to(device=reference.device, dtype=reference.dtype if x.is_floating_point() else None))
                seen += len(x)
                if stop():
                    return None
                if seen >= images:
                    break
    finally:
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():
            module.training = was_training[name]
    if seen < LEAST_IMAGES:
        raise UsageError(f"{seen} calibration images are too few; use at least {LEAST_IMAGES}: one in four is held out")
    for layer in layers:
        if not moments[layer.name].held_out.positions:
            raise UsageError(f"{layer.name} is not reached by a forward pass of the calibration images; exclude it")
    return moments


def _fresh(layer: Replaced, reference: Tensor) -> PatchMoments:
    padding = layer.padding if layer.padding_mode == "zeros" else (0, 0)  # others are padded before
    return PatchMoments(
        layer.in_channels,
        layer.kernel,
        stride=layer.stride,
        padding=padding,
        dilation=layer.dilation,
        device=reference.device,
    )


def _padded(x: Tensor, layer: Replaced) -> Tensor:
    if layer.padding_mode == "zeros":
        return x
    rows, columns = layer.padding
    return F.pad(x, (columns, columns, rows, rows), mode=layer.padding_mode)


def _positions(layer: Replaced, images: int) -> int:
    """Positions of an image that are enough: together some twenty for each entry of the patch vector."""
    return math.ceil(max(LEAST_ROWS, ROWS_AN_ENTRY * patch_length(layer)) / images)


# ------------------------------------------------------------------------------------------------------------- judging


class Judge:
    """Errors of one layer's projections on the images held out. weight: its kernel (m, n, kh, kw)."""

    def __init__(self, layer: Replaced, weight: Tensor, moments: LayerMoments, share: float | None = None) -> None:
        self.layer, self.share = layer, share
        self.weight = weight.detach().double()
        self.rows, self.held_out_rows = moments.fit.positions, moments.held_out.positions
        # Sums serve as well as means, for a solution and for a share, and need no second copy.
        self._fit, self._held_out = moments.fit.total, moments.held_out.total
        self._whole = self._energy(self.weight)

    def judge(self, variant: str, groups: int) -> LayerError:
        """What the layer loses as ``variant`` with N = ``groups``."""
        with torch.random.fork_rng(devices=[]):  # a layer is initialised before it takes the projection
            return self._judged(variant, groups)

    def _judged(self, variant: str, groups: int) -> LayerError:
        layer = self.layer
        reason = unfit(variant, layer.in_channels, layer.out_channels, groups)
        copied = white = calibrated = ridge = counts = None
        if reason is None:
            copied, white = (self._error(variant, groups, projection) for projection in ("copy", "white"))
            calibrated, ridge = self._calibrate(variant, groups, white)
            if layer.height is not None and layer.width is not None:
                counts = count(_spec(layer, variant, groups), layer.height, layer.width)
        free = (2 if variant == "bgc" else 1) * patch_length(layer) // groups
        return LayerError(
            name=layer.name,
            layer=layer,
            variant=variant,
            groups=groups,
            copied=copied,
            white=white,
            calibrated=calibrated,
            ridge=ridge,
            rows=self.rows,
            held_out_rows=self.held_out_rows,
            scarce=self.rows < 10 * free,
            params=None if counts is None else counts.params,
            macs=None if counts is None else counts.macs,
            share=self.share,
            reason=reason,
        )

    def _calibrate(self, variant: str, groups: int, white: float) -> tuple[float, float | None]:
        """The error with calibrated weights and their ridge: from the middle of RIDGES as far as it falls."""
        best: tuple[float, float | None] = (white, None)
        if white <= EXACT:
            return best
        if variant not in LINEAR:
            tried = self._error(variant, groups, "least_squares", SEARCH_RIDGE)
            return (tried, SEARCH_RIDGE) if tried < white else best
        start = len(RIDGES) // 2
        for way in (range(start, -1, -1), range(start + 1, len(RIDGES))):
            for place in way:
                tried = self._error(variant, groups, "least_squares", RIDGES[place])
                if tried >= best[0]:
                    break
                best = (tried, RIDGES[place])
            if best[1] is not None and best[1] < RIDGES[start]:
                break  # it fell towards less ridge
        return best

    @torch.no_grad()
    def _error(self, variant: str, groups: int, projection: str, ridge: float = 0.0) -> float:
        options: dict[str, Any] = {}
        if projection == "least_squares":
            options = {"second_moment": self._fit, "ridge": ridge}
        solved = CONVS[variant].from_dense(self.weight, groups, projection=projection, **options)
        lost = self._energy(self.weight - solved.dense_weight())
        return lost / self._whole if self._whole > 0 else 0.0

    def _energy(self, kernel: Tensor) -> float:
        flat = kernel.detach().flatten(1)
        return max(0.0, float(((flat @ self._held_out) * flat).sum()))


def check_divisible(layers: Sequence[Replaced], variants: Sequence[str], groups: Sequence[int]) -> None:
    """Raise one ShapeError that names every layer which some N does not divide."""
    offenders: dict[int, list[str]] = {}
    for n, variant, layer in itertools.product(groups, variants, layers):
        if unfit(variant, layer.in_channels, layer.out_channels, n):
            offenders.setdefault(n, []).append(f"{layer.name} ({layer.in_channels} -> {layer.out_channels})")
    if offenders:
        lines = [f"groups={n} does not divide {', '.join(dict.fromkeys(names))}" for n, names in offenders.items()]
        raise ShapeError("; ".join(lines) + "; drop these groups, or use --skip-invalid")
