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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.conversion.convert import candidates
from bgcbench.conversion.layer_moments import (
    Part,
    Sampler,
    check_enough,
    first_of,
    moments_device,
    parts_of,
    patch_length,
)
from bgcbench.conversion.solve import RIDGES, SEARCH_RIDGE
from bgcbench.convs import CONVS
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.batches import Forward, Passing, count_images, device_of, first_image
from bgcbench.measure.counts import count
from bgcbench.measure.undisturbed import first_not_finite, random_state_kept, seed_everything, undisturbed
from bgcbench.results.rows import Replaced
from bgcbench.specs import LINEAR, VARIANTS, ConvSpec, check_choice, check_positive, unfit
from bgcbench.theory.fits import EXACT
from bgcbench.theory.leastsquares import best_ridge
from bgcbench.theory.moments import PatchMoments

DEFAULT_IMAGES = 256
WORKING = 3  # moments' worth of memory that solving for the largest layer takes besides
MOMENT_BYTES = 8  # float64


@dataclass(frozen=True)
class LayerMoments:
    """Patch moments at one convolution: ``fit`` for solving, ``held_out`` for judging; ``problem``: why of no use."""

    fit: PatchMoments
    held_out: PatchMoments
    problem: str | None = None


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
    images: int | None = None,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Any = None,
    forward_fn: Forward | None = None,
    memory_bytes: int = 4 * 2**30,
    seed: int = 0,
) -> list[LayerError]:
    """The loss of every convolution that ``convert`` would replace, for each variant and N; in execution order.

    batches, forward_fn: as calibration and forward_fn of :func:`bgcbench.convert`; gone through more than once where it
    is needed (a list, a DataLoader; a generator serves where one pass is enough, and one that shuffles gives each pass
    other images). images: how many of them are used, at least 4; None for all there are, or 256 where that cannot be
    told.
    memory_bytes: what the moments and the solving may take; where all layers need more, the images are run through the
    network several times. The network's weights, mode, hooks and the random states are left as they were. Warns of what
    the user should know, such as random numbers in eval mode. Raises UsageError for too few images, for inputs that are
    not finite and for a layer whose moments exceed the memory.
    """
    for name in variants:
        check_choice("variant", name, VARIANTS)
    for number in groups:
        check_positive("groups", number)
    if not groups or not set(variants) - {"standard"}:
        raise UsageError("nothing to look at: name a variant besides standard, and at least one N")
    with random_state_kept(model):
        first, batches = first_of(batches)
        passing = Passing(forward_fn)
        if images is None:
            images = _counted(batches, passing, model)
        found = candidates(
            model,
            where=where,
            include=include,
            exclude=exclude,
            example_input=first_image(passing.of(first, model)) if example_input is None else example_input,
            passing=passing,
        )
        for note in (*found.notes, *passing.notes):
            warnings.warn(note, stacklevel=2)
        share_of = shares(found.chosen)
        errors: list[LayerError] = []
        options: dict[str, Any] = {"images": images, "memory_bytes": memory_bytes, "seed": seed, "passing": passing}
        for layer, moments in stream(model, found.chosen, batches, **options):
            judge = Judge(layer, kernel_of(model, layer), moments, share_of.get(layer.name))
            errors += [judge.judge(variant, n) for n in groups for variant in variants if variant != "standard"]
    return errors


def _counted(batches: Iterable[Any], passing: Passing, model: nn.Module) -> int:
    """How many images there are."""
    if isinstance(batches, (list, tuple)):
        return sum(count_images(passing.of(batch, model)) or 1 for batch in batches)
    dataset: Any = getattr(batches, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else DEFAULT_IMAGES


def kernel_of(model: nn.Module, layer: Replaced) -> Tensor:
    """The dense kernel of a layer (m, n, kh, kw)."""
    weight: Tensor = model.get_submodule(layer.name).weight  # type: ignore[assignment]
    return weight


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


def passes(layers: Sequence[Replaced], memory_bytes: int) -> list[list[Replaced]]:
    """The layers in as few portions, in order, as fit ``memory_bytes`` besides what solving for the largest takes.

    Raises UsageError where the memory is too little for some layer alone.
    """
    largest = max(layers, key=moment_bytes)
    room = memory_bytes - WORKING * moment_bytes(largest)
    if room < moment_bytes(largest):
        needed = (1 + WORKING) * moment_bytes(largest)
        raise UsageError(
            f"the second moments of {largest.name} ({largest.in_channels} channels, {patch_length(largest)} patch "
            f"entries) and solving with them take {needed / 2**30:.2g} GiB, more than the "
            f"{memory_bytes / 2**30:.2g} GiB allowed; raise --memory, or leave it out with --exclude {largest.name}"
        )
    portions: list[list[Replaced]] = []
    left = 0
    for layer in layers:
        needed = moment_bytes(layer)
        if not portions or needed > left:
            portions.append([])
            left = room
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
    passing: Passing | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Replaced, LayerMoments]]:
    """Each layer with its moments, in order; one run over the images for every portion that fits the memory.

    stop: asked after every batch; where it returns True, the stream ends.
    """
    check_positive("calibration images", images)
    portions = passes(layers, memory_bytes)
    for number, portion in enumerate(portions):
        collected = _collect(model, portion, batches, images, seed, passing or Passing(), stop)
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
    passing: Passing,
    stop: Callable[[], bool],
) -> dict[str, LayerMoments] | None:
    """Run the images through the network and add up the moments of ``layers``; None where it was stopped.

    The images held out go through by themselves, so that nothing has to be known of how the network stacks them.
    """
    moments = {layer.name: LayerMoments(_fresh(layer, model), _fresh(layer, model)) for layer in layers}
    watchers = [_Watcher(layer, moments[layer.name], images, seed) for layer in layers]
    handles = [
        model.get_submodule(watcher.layer.name).register_forward_pre_hook(watcher, with_kwargs=True)
        for watcher in watchers
    ]
    seen = 0
    try:
        with undisturbed(model):
            for part in parts_of(batches, images, passing, model):
                for watcher in watchers:
                    watcher.expect(part)
                seed_everything(part.seed)
                passing(model, part.batch)
                seen += len(part.numbers)
                if stop():
                    return None
    finally:
        for handle in handles:
            handle.remove()
    check_enough(seen)
    for layer in layers:
        if not moments[layer.name].fit.positions or not moments[layer.name].held_out.positions:
            raise UsageError(f"{layer.name} is not reached by a forward pass of the calibration images; exclude it")
    damaged = [name for name, both in moments.items() if not (both.fit.is_finite and both.held_out.is_finite)]
    where = first_not_finite(model, lambda: passing(model, part.batch)) if damaged else None
    for name in damaged:
        problem = (
            f"the inputs of {name} are not finite{f': {where}' if where else ''}; check the network's weights and the "
            "images, or exclude what comes after the damage"
        )
        moments[name] = replace(moments[name], problem=problem)
    return moments


class _Watcher:
    """A hook that adds what comes to one convolution to its moments."""

    def __init__(self, layer: Replaced, moments: LayerMoments, images: int, seed: int) -> None:
        self.layer, self.moments = layer, moments
        self.sampler = Sampler(layer, images, seed)
        self.part: Part | None = None
        self.call = 0

    def expect(self, part: Part) -> None:
        """The images of ``part`` are about to be run."""
        self.part, self.call = part, 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.part is None:
            return
        x = (arguments[0] if arguments else options["input"]).detach()
        into = self.moments.held_out if self.part.held_out else self.moments.fit
        for patches in self.sampler.patches(x, self.part, self.call):
            into.count(patches)
        self.call += 1


def _fresh(layer: Replaced, model: nn.Module) -> PatchMoments:
    return PatchMoments(layer.in_channels, layer.kernel, device=moments_device(device_of(model)))


# ------------------------------------------------------------------------------------------------------------- judging


class Judge:
    """Errors of one layer's projections on the images held out. weight: its kernel (m, n, kh, kw)."""

    def __init__(self, layer: Replaced, weight: Tensor, moments: LayerMoments, share: float | None = None) -> None:
        self.layer, self.share = layer, share
        self.weight = weight.detach().to(device=moments.fit.total.device, dtype=torch.float64)
        self.rows, self.held_out_rows = moments.fit.positions, moments.held_out.positions
        # Sums serve as well as means, for a solution and for a share, and need no second copy.
        self._fit, self._held_out = moments.fit.total, moments.held_out.total
        self._problem = moments.problem
        if not bool(torch.isfinite(self.weight).all()):
            self._problem = f"the weights of {layer.name} are not finite; check the file they come from"
        self._whole = self._energy(self.weight)

    def judge(self, variant: str, groups: int) -> LayerError:
        """What the layer loses as ``variant`` with N = ``groups``; raises UsageError for damaged inputs or weights."""
        if self._problem is not None:
            raise UsageError(self._problem)
        devices = [self.weight.device] if self.weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a layer is initialised before it takes the projection
            return self._judged(variant, groups)

    def unknown(self, variant: str, groups: int, reason: str) -> LayerError:
        """The same without numbers, and why."""
        return LayerError(
            name=self.layer.name,
            layer=self.layer,
            variant=variant,
            groups=groups,
            copied=None,
            white=None,
            calibrated=None,
            ridge=None,
            rows=self.rows,
            held_out_rows=self.held_out_rows,
            scarce=False,
            params=None,
            macs=None,
            share=self.share,
            reason=reason,
        )

    def _judged(self, variant: str, groups: int) -> LayerError:
        layer = self.layer
        reason = unfit(variant, layer.in_channels, layer.out_channels, groups)
        if reason is not None:
            return self.unknown(variant, groups, reason)
        copied, white = (self._error(variant, groups, projection) for projection in ("copy", "white"))
        calibrated, ridge = self._calibrate(variant, groups, white)
        found = self.unknown(variant, groups, "")
        known = layer.height is not None and layer.width is not None
        counts = count(_spec(layer, variant, groups), layer.height or 0, layer.width or 0) if known else None
        free = (2 if variant == "bgc" else 1) * patch_length(layer) // groups
        return replace(
            found,
            copied=copied,
            white=white,
            calibrated=calibrated,
            ridge=ridge,
            scarce=self.rows < 10 * free,
            params=None if counts is None else counts.params,
            macs=None if counts is None else counts.macs,
            reason=None,
        )

    def _calibrate(self, variant: str, groups: int, white: float) -> tuple[float, float | None]:
        """The error with calibrated weights and their ridge: from the middle of RIDGES as far as it falls."""
        if white <= EXACT:
            return white, None
        ridges = RIDGES if variant in LINEAR else (SEARCH_RIDGE,)
        return best_ridge(ridges, lambda ridge: self._error(variant, groups, "least_squares", ridge), white)

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
