"""What each convolution of a network loses as each choice, and how much the network's output feels of it.

One pass of the network over the images serves all choices: what any kernel V in place of W does to a layer's output
follows from the second moments of its inputs. A layer's loss is the share of its output's variance that calibrated
weights leave, on pictures held out. What the network makes of that differs by orders of magnitude from layer to layer,
so each layer is put into the network once for each variant, as one of its choices, and the error of the outputs is
measured: the network's sensitivity to that layer is that error over the layer's loss. The predicted loss of a plan is
the sum of loss times sensitivity over its layers: the share of the logits' variance that is expected to be wrong, as
long as errors are small and have nothing to do with one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.conversion.approximability import LayerMoments, stream
from bgcbench.conversion.layer_moments import Part, Pictures, moments_device, on_input
from bgcbench.conversion.norms import NormMoments
from bgcbench.conversion.solve import SETTLED, best_calibrated
from bgcbench.conversion.survey import is_norm, survey
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing, tensors_of
from bgcbench.measure.undisturbed import seed_everything, undisturbed
from bgcbench.results.rows import Replaced
from bgcbench.specs import Choice, load_layer
from bgcbench.theory.fits import EXACT
from bgcbench.theory.leastsquares import Fit
from bgcbench.theory.moments import PatchMoments

NO_ROWS = "the network puts out no tensors with a row of numbers for each image"
SENSITIVITY_IMAGES = 64  # to put layers into the network with, at most


@dataclass(frozen=True)
class ChoiceLoss:
    """What a layer loses as a choice: the share of its output's variance, with calibrated weights, on images held out.

    kernel: the dense kernel (m, n, kh, kw) of these weights, in the network's precision. ridge: see best_of.
    """

    choice: Choice
    loss: float
    ridge: float | None
    kernel: Tensor


@dataclass(frozen=True)
class _Inputs:
    """Second moments C of a layer's input patches, about their mean where what follows makes up for a constant."""

    moment: Tensor

    @classmethod
    def of(cls, moments: PatchMoments, *, centred: bool) -> _Inputs:
        mean = moments.mean
        return cls(moments.moment - torch.outer(mean, mean) if centred else moments.moment)

    def energy(self, kernel: Tensor) -> float:
        """tr(D C D^T), what an output with that kernel has."""
        flat = kernel.flatten(1)
        return max(0.0, float(((flat @ self.moment) * flat).sum()))


def absorbed(model: nn.Module, layers: Sequence[Replaced], run: Callable[[], Any]) -> set[str]:
    """Those of ``layers`` for whose outputs a constant makes no difference: they have a bias, or norms take it away."""
    found = survey(model, [layer.name for layer in layers], run).absorbed
    return {layer.name for layer in layers if layer.bias or layer.name in found}


def choice_losses(
    model: nn.Module,
    layers: Sequence[Replaced],
    choices: Mapping[str, Sequence[Choice]],
    batches: Iterable[Any],
    *,
    centred: set[str],
    images: int,
    memory_bytes: int,
    seed: int = 0,
    passing: Passing | None = None,
    pictures: Pictures = None,
    settled: float = SETTLED,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Replaced, list[ChoiceLoss]]]:
    """Each of ``layers`` with what it loses as each of its ``choices`` (by name), in the order of execution.

    centred: see :func:`absorbed`; settled: see :class:`bgcbench.theory.leastsquares.Fit`; the others as in
    :func:`bgcbench.approximability`. Ends early where stop() says so. Raises UsageError for inputs that are not finite.
    """
    options: dict[str, Any] = {"images": images, "memory_bytes": memory_bytes, "seed": seed, "passing": passing}
    for layer, moments in stream(model, layers, batches, pictures=pictures, stop=stop, **options):
        if moments.problem is not None:
            raise UsageError(moments.problem)
        weight: Any = model.get_submodule(layer.name).weight
        found = []
        for each in _losses(weight.detach(), moments, choices[layer.name], settled, centred=layer.name in centred):
            if stop():
                return
            found.append(each)
        yield layer, found


def _losses(
    weight: Tensor, moments: LayerMoments, choices: Sequence[Choice], settled: float, *, centred: bool
) -> Iterator[ChoiceLoss]:
    inputs, unseen = (_Inputs.of(each, centred=centred) for each in (moments.fit, moments.held_out))
    exact = weight.to(unseen.moment)
    whole = unseen.energy(exact)
    for choice in choices:
        kernels: dict[tuple[str, float], Tensor] = {}

        def lost(
            projection: str, ridge: float, choice: Choice = choice, kernels: dict[tuple[str, float], Tensor] = kernels
        ) -> float:
            fit = Fit(inputs.moment, ridge=ridge, settled=settled) if projection == "least_squares" else None
            kernel = _solved(choice, exact, projection, fit)
            kernels[projection, ridge] = kernel.to(weight)
            return unseen.energy(exact - kernel) / whole if whole > 0 else 0.0

        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad():
            _, loss, chosen = best_calibrated(choice.variant, lost)
        kernel = kernels["white", 0.0] if chosen is None else kernels["least_squares", chosen]
        yield ChoiceLoss(choice, loss, chosen, kernel)


def _solved(choice: Choice, weight: Tensor, projection: str, fit: Fit | None) -> Tensor:
    """The dense kernel of the choice that stands in for ``weight``."""
    kind: type[VariantConv2d] = load_layer(choice.variant)
    out_channels, in_channels, height, width = weight.shape
    own: Any = {"groups": choice.groups, "rank": choice.rank, "device": weight.device, "dtype": weight.dtype}
    layer = kind(in_channels, out_channels, (height, width), bias=False, **own)
    layer.load_projected(layer.project(weight, projection, fit))
    return layer.dense_weight()


# -------------------------------------------------------------------------------------------------------- sensitivity


@contextmanager
def _put_in(model: nn.Module, layer: Replaced, kernel: Tensor, *, centred: bool) -> Iterator[None]:
    """Meanwhile that convolution computes with ``kernel``, its mean output made up for where something does that."""
    conv: Any = model.get_submodule(layer.name)

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor:
        x: Tensor = given[0] if given else named["input"]
        wrong: Tensor = conv._conv_forward(x, conv.weight - kernel, None)
        return y - (wrong - wrong.mean((0, -2, -1), keepdim=True) if centred else wrong)

    handle = conv.register_forward_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


class _Norms:
    """Meanwhile every batch norm of ``model`` has the statistics that it would get if they were re-estimated.

    As of a calibrated conversion (NormMoments.put_into): relative to what comes to it in the unchanged network, which
    must be what runs first.
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms: list[Any] = [module for module in model.modules() if is_norm(module)]
        self.own = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in self.norms]
        self.before: list[list[NormMoments]] = [[] for _ in self.norms]
        self.calls = [0 for _ in self.norms]
        self.unchanged = False

    @contextmanager
    def estimated(self, *, observe: bool, behind: nn.Module | None = None) -> Iterator[None]:
        """observe: the network is unchanged, and what comes to its norms is to be remembered. behind: the one module
        that is changed, before which norms have nothing to see."""
        self.calls = [0 for _ in self.norms]
        handles = [on_input(norm, partial(self._see, number, observe)) for number, norm in enumerate(self.norms)]
        if behind is not None:
            handles.append(behind.register_forward_pre_hook(lambda *_: setattr(self, "unchanged", False)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for number in range(len(self.norms)):
                self._reset(number)

    def _reset(self, number: int) -> None:
        norm, (mean, variance) = self.norms[number], self.own[number]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    def _see(self, number: int, observe: bool, x: Tensor) -> None:
        if self.unchanged:
            self.calls[number] += 1
            self._reset(number)
            return
        moments = NormMoments(x.shape[1], moments_device(x.device))
        moments.add(x.to(moments.mean.device))
        if observe:
            self.before[number].append(moments)
            return
        call, self.calls[number] = self.calls[number], self.calls[number] + 1
        if call < len(self.before[number]):
            self._reset(number)
            moments.put_into(self.norms[number], self.before[number][call])


class Outputs:
    """What a network puts out on some images, and how far off a changed one is.

    model: run in eval mode, unchanged for now. parts: of the images (see parts_of); images of one size go through
    together, so that norms see enough of them.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part], passing: Passing) -> None:
        self.model, self.parts, self.passing = model, _together(parts), passing
        self.norms = _Norms(model)
        self.original = self._run(observe=True)
        alike = len({values.shape[1] for values in self.original}) == 1
        groups = [torch.cat(self.original)] if alike else self.original
        self.variance = sum(float((values - values.mean(0)).double().square().sum()) for values in groups)

    @torch.no_grad()
    def _run(
        self, other: nn.Module | None = None, *, observe: bool = False, behind: nn.Module | None = None
    ) -> list[Tensor]:
        """The outputs of each part, (images, numbers)."""
        found = []
        model = other or self.model
        norms = contextlib.nullcontext() if other else self.norms.estimated(observe=observe, behind=behind)
        with undisturbed(model), norms:
            for part in self.parts:
                seed_everything(part.seed)
                self.norms.unchanged = behind is not None
                output = self.passing(model, part.batch)
                values = [value for value in tensors_of(output) if value.is_floating_point() and value.dim() > 1]
                if not values or len({len(value) for value in values}) > 1:
                    raise UsageError(f"{NO_ROWS}; give a forward_fn that returns such a tensor")
                found.append(torch.cat([value.flatten(1).float() for value in values], 1))
        return found

    def error(self, other: nn.Module | None = None, *, behind: nn.Module | None = None) -> float:
        """The squared error of the outputs, as a share of their variance over the images (1 at most where that is 0).

        Of the network as it is now, its norms estimated anew (those ``behind`` the one module that is changed); or of
        ``other``, in which that has been done.
        """
        found = list(zip(self._run(other, behind=behind), self.original, strict=True))
        if any(a.shape != b.shape for a, b in found):
            raise UsageError(
                "the outputs have other sizes with other weights, so they cannot be compared; give a forward_fn that "
                "returns what has the same size in any case, such as the scores of all classes"
            )
        off = sum(float((a - b).double().square().sum()) for a, b in found)
        return off / self.variance if self.variance > 0 else float(off > 0)


def _together(parts: Sequence[Part]) -> Sequence[Part]:
    """One part where all are tensors of images of one size."""
    tensors = [part.batch[0] for part in parts if isinstance(part.batch, tuple) and len(part.batch) == 1]
    alike = len(tensors) == len(parts) and all(isinstance(each, Tensor) for each in tensors)
    if not alike or len({each.shape[1:] for each in tensors}) != 1:
        return parts
    numbers = [number for part in parts for number in part.numbers]
    return [Part((torch.cat(tensors),), numbers, parts[0].held_out)]


def felt_losses(
    outputs: Outputs, layer: Replaced, losses: Sequence[ChoiceLoss], *, centred: bool
) -> dict[Choice, float]:
    """What the network's outputs feel of the layer as each choice: its loss times the network's sensitivity to it.

    Sensitivity is the error of the outputs for each unit of loss, by variant: the layer is put in once as the one of
    its choices whose loss is in the middle. It is 1 where the outputs are the same for all images, as of some untrained
    networks: then the layers' losses are all there is to go by.
    """
    felt: dict[Choice, float] = {}
    for variant in dict.fromkeys(each.choice.variant for each in losses):
        own = sorted((each for each in losses if each.choice.variant == variant), key=lambda each: each.loss)
        some = [each for each in own if each.loss > EXACT]
        weight = 1.0 if outputs.variance == 0 else 0.0
        if some and outputs.variance > 0:
            middle = some[len(some) // 2]
            with _put_in(outputs.model, layer, middle.kernel, centred=centred):
                weight = outputs.error(behind=outputs.model.get_submodule(layer.name)) / middle.loss
        felt |= {each.choice: each.loss * weight for each in own}
    return felt
