"""What each convolution of a network loses as each choice, and how much the network's output feels of it.

One pass of the network over the images serves all choices: what any kernel V in place of W does to a layer's output
follows from the second moments of its inputs. A layer's loss is the share of its output's variance that calibrated
weights leave, on pictures held out. What the network makes of that differs by orders of magnitude from layer to layer,
so each layer is put into the network once, as one of its choices, and the error of the outputs is measured: the
network's sensitivity to that layer is that error over the layer's loss. The predicted loss of a plan is the sum of loss
times sensitivity over its layers: the share of the logits' variance that is expected to be wrong, as long as errors are
small and have nothing to do with one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.conversion.approximability import LayerMoments, stream
from bgcbench.conversion.layer_moments import Part, Pictures, on_input
from bgcbench.conversion.solve import best_of
from bgcbench.conversion.survey import is_norm, survey
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing, tensors_of
from bgcbench.measure.undisturbed import seed_everything, undisturbed
from bgcbench.results.rows import Replaced
from bgcbench.specs import Choice, load_layer
from bgcbench.theory.fits import EXACT
from bgcbench.theory.moments import PatchMoments

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
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Replaced, list[ChoiceLoss]]]:
    """Each of ``layers`` with what it loses as each of its ``choices`` (by name), in the order of execution.

    centred: see :func:`absorbed`; the others as in :func:`bgcbench.approximability`. Ends early where stop() says so.
    Raises UsageError for inputs that are not finite.
    """
    options: dict[str, Any] = {"images": images, "memory_bytes": memory_bytes, "seed": seed, "passing": passing}
    for layer, moments in stream(model, layers, batches, pictures=pictures, stop=stop, **options):
        if moments.problem is not None:
            raise UsageError(moments.problem)
        weight: Any = model.get_submodule(layer.name).weight
        yield layer, _losses(layer, weight.detach(), moments, choices[layer.name], centred=layer.name in centred)


def _losses(
    layer: Replaced, weight: Tensor, moments: LayerMoments, choices: Sequence[Choice], *, centred: bool
) -> list[ChoiceLoss]:
    fit, unseen = (_Inputs.of(each, centred=centred) for each in (moments.fit, moments.held_out))
    exact = weight.to(unseen.moment)
    whole = unseen.energy(exact)
    found = []
    for choice in choices:
        kernels: dict[tuple[str, float], Tensor] = {}

        def lost(
            projection: str, ridge: float, choice: Choice = choice, kernels: dict[tuple[str, float], Tensor] = kernels
        ) -> float:
            given = {"second_moment": fit.moment, "ridge": ridge} if projection == "least_squares" else {}
            kernel = _solved(choice, exact, projection, **given)
            kernels[projection, ridge] = kernel.to(weight)
            return unseen.energy(exact - kernel) / whole if whole > 0 else 0.0

        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []), torch.no_grad():
            losses = best_of(choice.variant, lost)
        chosen = ("white", 0.0) if losses.ridge is None else ("least_squares", losses.ridge)
        found.append(ChoiceLoss(choice, losses.calibrated, losses.ridge, kernels[chosen]))
    return found


def _solved(choice: Choice, weight: Tensor, projection: str, **given: Any) -> Tensor:
    """The dense kernel of the choice that stands in for ``weight``."""
    kind: type[VariantConv2d] = load_layer(choice.variant)
    layer: VariantConv2d = kind.from_dense(weight, choice.groups, rank=choice.rank, projection=projection, **given)
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


@contextmanager
def _norms_of_the_batch(model: nn.Module) -> Iterator[None]:
    """Meanwhile every batch norm takes the statistics of what comes to it, as it will when they are re-estimated."""
    before: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def measure(norm: Any, x: Tensor) -> None:
        before.setdefault(norm, (norm.running_mean.clone(), norm.running_var.clone()))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        norm.running_mean.copy_(x.mean(axes))
        norm.running_var.copy_(x.var(axes, unbiased=False))

    handles = [on_input(module, partial(measure, module)) for module in model.modules() if is_norm(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, (mean, variance) in before.items():
            norm.running_mean.copy_(mean)  # type: ignore[operator]
            norm.running_var.copy_(variance)  # type: ignore[operator]


class Outputs:
    """What a network puts out on some images, and how far off a changed one is.

    model: run in eval mode. parts: of the images (see parts_of); images of one size go through together, so that norms
    see enough of them.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part], passing: Passing) -> None:
        self.model, self.parts, self.passing = model, _together(parts), passing
        self.original = self._run()
        alike = len({values.shape[1] for values in self.original}) == 1
        groups = [torch.cat(self.original)] if alike else self.original
        self.variance = sum(float((values - values.mean(0)).double().square().sum()) for values in groups)

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        """The outputs of each part, (images, numbers)."""
        found = []
        with undisturbed(self.model), _norms_of_the_batch(self.model):
            for part in self.parts:
                seed_everything(part.seed)
                output = self.passing(self.model, part.batch)
                values = [value for value in tensors_of(output) if value.is_floating_point() and value.dim() > 1]
                found.append(torch.cat([value.flatten(1).float() for value in values], 1))
        return found

    def error(self) -> float:
        """The squared error of the outputs now, as a share of their variance over the images."""
        off = sum(float((a - b).double().square().sum()) for a, b in zip(self._run(), self.original, strict=True))
        return off / self.variance


def _together(parts: Sequence[Part]) -> Sequence[Part]:
    """One part where all are tensors of images of one size."""
    tensors = [part.batch[0] for part in parts if isinstance(part.batch, tuple) and len(part.batch) == 1]
    alike = len(tensors) == len(parts) and all(isinstance(each, Tensor) for each in tensors)
    if not alike or len({each.shape[1:] for each in tensors}) != 1:
        return parts
    numbers = [number for part in parts for number in part.numbers]
    return [Part((torch.cat(tensors),), numbers, parts[0].held_out)]


def sensitivity(outputs: Outputs, layer: Replaced, losses: Sequence[ChoiceLoss], *, centred: bool) -> float:
    """The error of the network's outputs for each unit of the layer's loss; 0 where it loses nothing as any choice.

    It is put in as the choice whose loss is in the middle. 1 where the outputs are the same for all images, as of some
    untrained networks: then the layers' losses are all there is to go by.
    """
    if outputs.variance == 0:
        return 1.0
    some = sorted((each for each in losses if each.loss > EXACT), key=lambda each: each.loss)
    if not some:
        return 0.0
    middle = some[len(some) // 2]
    with _put_in(outputs.model, layer, middle.kernel, centred=centred):
        return outputs.error() / middle.loss
