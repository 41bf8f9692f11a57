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
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from msgspec import structs
from torch import Tensor, nn

from bgcbench.conversion.convert import candidates
from bgcbench.conversion.layer_moments import (
    Holding,
    Part,
    Pictures,
    Sampler,
    Visit,
    first_of,
    moments_device,
    parts_of,
    patch_length,
    watching,
)
from bgcbench.conversion.record import spec_of
from bgcbench.conversion.solve import best_of, is_scarce
from bgcbench.errors import UsageError
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.batches import Forward, Passing, count_images, device_of, first_image
from bgcbench.measure.counts import Counts, count
from bgcbench.measure.undisturbed import first_not_finite, random_state_kept, undisturbed
from bgcbench.results.rows import Replaced
from bgcbench.specs import RANKED, Choice, check_positive, load_layer
from bgcbench.theory.moments import PatchMoments

DEFAULT_IMAGES = 256
WORKING = 3  # moments' worth of memory that solving for the largest layer takes besides
MOMENT_BYTES = 8  # float64


@dataclass(frozen=True)
class LayerMoments:
    """Patch moments at a convolution: ``fit`` to solve with, ``held_out`` to evaluate on; problem: why of no use."""

    fit: PatchMoments
    held_out: PatchMoments
    problem: str | None = None


@dataclass(frozen=True)
class LayerError:
    """What one convolution loses as one variant: shares of its output's energy on images held out.

    copied: the weights that the paper would copy; white: the closed-form optimum for uncorrelated inputs; calibrated:
    least squares on the activations (never worse than white on the images held out: where it would be, ``ridge`` is
    None and white is taken). All None, with a ``reason``, where N or the rank does not fit the
    channels. rank: where that was asked for; groups is then the reduction that it keeps to.
    ridge: its pull towards white, chosen on the images held out. rows: positions that it was solved on; scarce: fewer
    than ten of them for each number an output has. params, macs: of this layer as that variant; share: of its standard
    convolution in the multiply-adds of all that would be replaced.
    """

    name: str
    layer: Replaced
    variant: str
    groups: int
    rows: int
    held_out_rows: int
    share: float | None
    copied: float | None = None
    white: float | None = None
    calibrated: float | None = None
    ridge: float | None = None
    scarce: bool = False
    params: int | None = None
    macs: int | None = None
    reason: str | None = None
    rank: int | None = None


@memory_state("kept")
def approximability(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    variants: Sequence[str] = ("gc", "bgc"),
    groups: Sequence[int] = (2, 4, 8, 16),
    ranks: Sequence[int] = (),
    images: int | None = None,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Any = None,
    forward_fn: Forward | None = None,
    pictures: Pictures = None,
    memory_bytes: int = 4 * 2**30,
    seed: int = 0,
) -> list[LayerError]:
    """The loss of every convolution that ``convert`` would replace, for each variant and N, and as low rank for each
    of ``ranks``; in execution order.

    batches, forward_fn: as calibration and forward_fn of :func:`bgcbench.convert`; gone through more than once where it
    is needed (a list, a DataLoader; a generator serves where one pass is enough, and one that shuffles gives each pass
    other images). pictures: as calibration_pictures there. images: how many of them are used, at least 4; None for all
    there are, or 256 where that cannot be told.
    memory_bytes: what the moments and the solving may take; where all layers need more, the images are run through the
    network several times. The network's weights, mode, hooks and the random states are left as they were. Warns of what
    the user should know, such as random numbers in eval mode. Raises UsageError for too few images, for inputs that are
    not finite and for a layer whose moments exceed the memory.
    """
    others = [name for name in variants if name != "standard"]
    choices = [Choice(name, n) for n in groups for name in others] + [Choice(n, rank=r) for r in ranks for n in RANKED]
    if not choices:
        raise UsageError("nothing to look at: name a variant besides standard, and at least one N")
    with random_state_kept(model):
        pictures = pictures or getattr(batches, "pictures", None)
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
        options["pictures"] = pictures
        for layer, moments in stream(model, found.chosen, batches, **options):
            evaluator = Evaluator(layer, kernel_of(model, layer), moments, share_of.get(layer.name))
            errors += map(evaluator.evaluate, choices)
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
    counts = {layer.name: _counts(layer, Choice()) for layer in layers}
    macs = {layer.name: found.macs * (layer.calls or 1) if (found := counts[layer.name]) else 0 for layer in layers}
    total = sum(macs.values())
    return {name: value / total for name, value in macs.items()} if total else {}


def shape_of(layer: Replaced) -> tuple[int, int, int]:
    """n, m and K."""
    return layer.in_channels, layer.out_channels, math.prod(layer.kernel)


def _counts(layer: Replaced, choice: Choice) -> Counts | None:
    """None where the size of its input is not known."""
    if layer.height is None or layer.width is None:
        return None
    return count(spec_of(structs.replace(layer, **asdict(choice))), layer.height, layer.width)


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
    pictures: Pictures = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Replaced, LayerMoments]]:
    """Each layer with its moments, in order; one run over the images for every portion that fits the memory.

    stop: asked after every batch; where it returns True, the stream ends.
    """
    check_positive("calibration images", images)
    portions = passes(layers, memory_bytes)
    pictures = pictures or getattr(batches, "pictures", None)
    for number, portion in enumerate(portions):
        holding = Holding(pictures)
        collected = _collect(model, portion, batches, images, seed, passing or Passing(), holding, stop)
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
    holding: Holding,
    stop: Callable[[], bool],
) -> dict[str, LayerMoments] | None:
    """Run the images through the network and add up the moments of ``layers``; None where it was stopped.

    The images held out go through by themselves, so that nothing has to be known of how the network stacks them.
    """
    device = moments_device(device_of(model))

    def empty(layer: Replaced) -> PatchMoments:
        return PatchMoments(layer.in_channels, layer.kernel, device=device)

    moments = {layer.name: LayerMoments(empty(layer), empty(layer)) for layer in layers}
    adders = {
        model.get_submodule(layer.name): _adder(Sampler(layer, images, seed), moments[layer.name]) for layer in layers
    }
    with undisturbed(model), watching(model, passing, inputs=adders) as run:
        for part in parts_of(batches, images, passing, model, holding):
            run(part)
            if stop():
                return None
    holding.check_enough()
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


def _adder(sampler: Sampler, moments: LayerMoments) -> Visit:
    """What adds the input of a convolution to its moments."""

    def add(part: Part, call: int, x: Tensor) -> None:
        into = moments.held_out if part.held_out else moments.fit
        for patches in sampler.patches(x, part, call):
            into.count(patches)

    return add


# ---------------------------------------------------------------------------------------------------------- evaluating


class Evaluator:
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

    def evaluate(self, choice: Choice) -> LayerError:
        """What the layer loses as ``choice``; raises UsageError for damaged inputs or weights."""
        if self._problem is not None:
            raise UsageError(self._problem)
        layer, unknown = self.layer, self.unknown(choice)
        if reason := choice.unfit(*shape_of(layer)):
            return replace(unknown, reason=reason)
        devices = [self.weight.device] if self.weight.is_cuda else []
        with torch.random.fork_rng(devices=devices):  # a layer is initialised before it takes the projection
            losses = best_of(choice.variant, partial(self._lost, choice))
        counts = _counts(layer, choice)
        return replace(
            unknown,
            **vars(losses),
            scarce=is_scarce(choice.variant, patch_length(layer), unknown.groups, self.rows),
            params=None if counts is None else counts.params,
            macs=None if counts is None else counts.macs,
        )

    def unknown(self, choice: Choice, reason: str | None = None) -> LayerError:
        """The same without numbers, and why."""
        layer, known = self.layer, (self.rows, self.held_out_rows, self.share)
        groups = choice.reduction(*shape_of(layer))
        return LayerError(layer.name, layer, choice.variant, groups, *known, reason=reason, rank=choice.rank)

    @torch.no_grad()
    def _lost(self, choice: Choice, projection: str, ridge: float) -> float:
        options: dict[str, Any] = {}
        if projection == "least_squares":
            options = {"second_moment": self._fit, "ridge": ridge}
        kind, options["rank"] = load_layer(choice.variant), choice.rank
        solved = kind.from_dense(self.weight, choice.groups, projection=projection, **options)
        lost = self._energy(self.weight - solved.dense_weight())
        return lost / self._whole if self._whole > 0 else 0.0

    def _energy(self, kernel: Tensor) -> float:
        flat = kernel.detach().flatten(1)
        return max(0.0, float(((flat @ self._held_out) * flat).sum()))


def misfits(layers: Sequence[Replaced], choices: Sequence[Choice]) -> list[str]:
    """A sentence for each N or rank that does not fit some of the layers, naming them and what would fit all."""
    offenders: dict[str, list[str]] = {}
    for choice, layer in itertools.product(choices, layers):
        if choice.unfit(*shape_of(layer)):
            name = f"{layer.name} ({layer.in_channels} -> {layer.out_channels})"
            offenders.setdefault(choice.misfit, []).append(name)
    fitting = {choice.misfit: choice.fitting(map(shape_of, layers)) for choice in choices if choice.misfit in offenders}
    return [f"{misfit} {', '.join(dict.fromkeys(names))}; {fitting[misfit]}" for misfit, names in offenders.items()]
