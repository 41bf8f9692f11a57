"""Calibrated conversion: every layer solved by least squares on the network's own activations, without training.

Layer by layer in the order of execution: the inputs are those that the network makes with all layers before already
converted, the outputs to be met are the original network's, on the same images. So a layer also makes up for what
those before it have lost. Batch norm's statistics are re-estimated in the same pass, each from all images, so that a
norm's output has the mean and the variance that it had in the original network on these images. The whole takes one
forward pass of the original network and one of the converted one (see :mod:`bgcbench.calibration.lockstep`), whatever
the number of layers.

At a position a layer is y = V u with u the patch vector. It minimises E|y - V u|^2 with y of the original network.
Where the layer has a bias, or norms take a constant of each channel away from its output, all is about the means:
y - E y, u - E u, and E y - V E u goes into the bias (or into the mean of the norm that follows at once).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.calibration.images import (
    Part,
    batched,
    check_enough,
    first_of,
    for_network,
    moments_device,
    padded,
    parts_of,
    patch_length,
    positions_an_image,
    positions_of,
    undisturbed,
    zero_padding,
)
from bgcbench.calibration.lockstep import Stop, Stopped, run_in_step
from bgcbench.calibration.norms import NormMoments
from bgcbench.calibration.solve import Solution, solve_layer
from bgcbench.calibration.survey import Survey, is_norm, survey
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.record import Record, Replaced
from bgcbench.specs import HELD_OUT, check_positive, output_length
from bgcbench.theory.moments import CHUNK_NUMBERS, Patches, RegressionMoments

__all__ = ["DEFAULT_IMAGES", "MEMORY_BYTES", "Calibration", "Stopped", "Wanted", "reestimate_norms"]

DEFAULT_IMAGES = 512
MEMORY_BYTES = 8 * 2**30
BATCH = 32  # images that go through the network together, at most
WORKING = 6  # matrices as large as a layer's moment that are held while it is solved
DOUBLE = 8  # bytes


class Wanted:
    """What the original network puts out at each layer to be replaced, on the images and positions that are used."""

    def __init__(self, looked: Survey, weights: dict[str, Tensor]) -> None:
        self.survey, self.weights = looked, weights
        self.outputs: dict[str, dict[int, Tensor]] = {name: {} for name in weights}  # layer -> part -> (m, positions)
        self.norms: dict[str, NormMoments] = {}  # of the inputs of each norm


class Calibration:
    """The images of one conversion, where they are run through the network, and what is done with them.

    notes: what the user should know. Raises UsageError for images that are too few or no images.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        images: int = DEFAULT_IMAGES,
        rebn: bool = True,
        memory_bytes: int = MEMORY_BYTES,
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_positive("calibration images", images)
        self.rebn, self.memory_bytes, self.seed, self.stop = rebn, memory_bytes, seed, stop
        first, batches = first_of(batches)
        self.example = for_network(first[:1], model)
        self.parts = list(parts_of(batches, images, BATCH))
        check_enough(self.images)
        self.notes: list[str] = []
        self.begun = time.perf_counter()
        self.in_flight_bytes = self.moment_bytes = 0

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(len(part.numbers) for part in self.parts)

    # ------------------------------------------------------------------------------------------- the original network

    def observe(self, model: nn.Module, layers: Sequence[Replaced]) -> Wanted:
        """Run the original network over the images and keep what is wanted of each of ``layers``, and of the norms.

        Raises UsageError where the memory is too little for a layer, and Stopped.
        """
        weights = {layer.name: _weight(model, layer.name).detach().clone() for layer in layers}
        with undisturbed(model):
            looked = survey(model, set(weights), self.example)
            self._fit_into_memory(layers, looked)
            wanted = Wanted(looked, weights)
            layer_watchers = {layer.name: _Watcher(layer, self, wanted) for layer in layers}
            norm_watchers = {
                name: _NormWatcher(name, self, wanted)
                for name, module in (model.named_modules() if self.rebn else ())
                if is_norm(module)
            }
            handles = [
                model.get_submodule(name).register_forward_hook(watcher, prepend=True)
                for name, watcher in layer_watchers.items()
            ]
            handles += [
                model.get_submodule(name).register_forward_pre_hook(watcher, with_kwargs=True)
                for name, watcher in norm_watchers.items()
            ]
            watchers: list[_Watcher | _NormWatcher] = [*layer_watchers.values(), *norm_watchers.values()]
            try:
                for number, part in enumerate(self.parts):
                    if self.stop():
                        raise Stopped
                    for watcher in watchers:
                        watcher.expect(number, part)
                    model(for_network(part.images, model))
            finally:
                for handle in handles:
                    handle.remove()
        return wanted

    def _fit_into_memory(self, layers: Sequence[Replaced], looked: Survey) -> None:
        """Leave out images until what is held at a time fits, and say so."""
        asked = images = self.images
        item = self.example.element_size()
        each = looked.live_bytes + self.example.numel() * item
        solving = max((_solving_bytes(layer) for layer in layers), default=0)
        while True:
            outputs = sum(_outputs_bytes(layer, images, item) for layer in layers)
            needed = images * each + solving + outputs
            if needed <= self.memory_bytes:
                break
            images = int(images * 0.9)
            if images < HELD_OUT:
                raise UsageError(
                    f"calibration takes {needed / 2**30:.2g} GiB even with a few images, more than the "
                    f"{self.memory_bytes / 2**30:.2g} GiB allowed; allow more memory"
                )
        if images < asked:
            self.parts = [kept for part in self.parts if (kept := part.below(images)) is not None]
            self.notes.append(
                f"calibrated on {images} of the {asked} images: more would not fit into "
                f"{self.memory_bytes / 2**30:.2g} GiB"
            )
        self.in_flight_bytes, self.moment_bytes = images * each, solving + outputs

    # ------------------------------------------------------------------------------------------ the converted network

    def settle(self, network: nn.Module, record: Record, wanted: Wanted) -> dict[str, Any]:
        """Solve the layers of the converted ``network`` of which is known what is ``wanted``, and estimate its norms.

        Returns what was done as plain JSON: images, held_out, seed, rebn, norms (how many were re-estimated), seconds,
        moment_bytes and in_flight_bytes (what was held at most), and for each layer that was solved name, groups,
        copied, before, after, rows, held_out_rows, condition, ridge, centred and scarce (see
        :class:`bgcbench.calibration.solve.Solution`). Raises UsageError for inputs that are not finite, and Stopped.
        """
        solved: dict[str, Solution] = {}
        estimated: list[str] = []
        modules = dict(network.named_modules())
        changed = [modules[layer.name] for layer in record.replaced]
        with undisturbed(network):
            stops = self._layer_stops(modules, record, wanted, solved) if wanted.weights else []
            stops += self._norm_stops(modules, estimated, wanted.norms) if self.rebn else []
            if stops:
                batches = [for_network(part.images, network) for part in self.parts]
                run_in_step(network, batches, stops, changed=changed, asked_to_stop=self.stop)
        missed = [layer.name for layer in record.replaced if layer.name in wanted.weights and layer.name not in solved]
        if missed:
            self.notes.append(f"never reached by the calibration images: {', '.join(missed)}; white weights are taken")
            for name in missed:
                layer = _variant(modules[name])
                layer.load_projected(layer.project(wanted.weights[name].double(), layer.groups, "white", None))
        return {
            "images": self.images,
            "held_out": sum(len(part.numbers) for part in self.parts if part.held_out),
            "seed": self.seed,
            "rebn": self.rebn,
            "norms": len(estimated),
            "seconds": time.perf_counter() - self.begun,
            "moment_bytes": self.moment_bytes,
            "in_flight_bytes": self.in_flight_bytes,
            "layers": [_as_json(layer, solved[layer.name]) for layer in record.replaced if layer.name in solved],
        }

    def _layer_stops(
        self, modules: dict[str, nn.Module], record: Record, wanted: Wanted, solved: dict[str, Solution]
    ) -> list[Stop]:
        """A stop at each replaced layer, where it is solved and gets its weights."""
        stops = []
        for replaced in record.replaced:
            layer, name = _variant(modules[replaced.name]), replaced.name
            norm = modules[wanted.survey.norms[name]] if name in wanted.survey.norms else None
            absorbed = name in wanted.survey.absorbed if self.rebn else norm is not None

            def settle(
                come: list[tuple[int, Tensor]],
                layer: VariantConv2d = layer,
                replaced: Replaced = replaced,
                norm: nn.Module | None = norm,
                absorbed: bool = absorbed,
            ) -> None:
                fit, held_out = self._moments(come, replaced, wanted)
                if not fit.positions:
                    return
                found = solve_layer(
                    layer,
                    wanted.weights[replaced.name],
                    fit,
                    held_out,
                    centred=layer.bias is not None or absorbed,
                )
                layer.load_projected(found.values)
                solved[replaced.name] = found
                if not found.centred:
                    return
                if layer.bias is not None:
                    layer.bias.add_(found.shift.to(layer.bias))
                elif norm is not None and not self.rebn and isinstance(norm.running_mean, Tensor):
                    norm.running_mean.sub_(found.shift.to(norm.running_mean))

            stops.append(Stop(layer, settle))
        return stops

    def _moments(
        self, come: list[tuple[int, Tensor]], layer: Replaced, wanted: Wanted
    ) -> tuple[RegressionMoments, RegressionMoments]:
        """The moments of what has come to a layer and the outputs wanted there: to solve with, and held out."""
        found: dict[bool, RegressionMoments] = {}
        outputs = wanted.outputs.pop(layer.name)
        device = moments_device(self.example.device)
        for number, x in come:
            part = self.parts[number]
            for patches, kept in self._pairs(x, outputs.pop(number, None), part, layer):
                u, y = patches.to(device, torch.float64), kept.to(device, torch.float64)
                if not found:
                    origins = u.mean(1), y.mean(1)
                    found = {held_out: RegressionMoments(*origins) for held_out in (False, True)}
                found[part.held_out].add(u, y)
        if not found:
            nothing = torch.zeros(0, dtype=torch.float64, device=device)
            return RegressionMoments(nothing, nothing), RegressionMoments(nothing, nothing)
        for moments in found.values():
            if moments.positions and not moments.is_finite:
                raise UsageError(
                    f"the inputs or outputs of {layer.name} are not finite: the network's weights, or the images, are "
                    "damaged; check them, or exclude what comes after the damage"
                )
        return found[False], found[True]

    def _pairs(self, x: Tensor, outputs: Tensor | None, part: Part, layer: Replaced) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches (nK, P) of x at the positions of ``outputs`` (m, all positions), with these, some at a time."""
        if outputs is None:
            return
        x = padded(batched(x), layer)
        patches = Patches(layer.kernel, stride=layer.stride, padding=zero_padding(layer), dilation=layer.dilation)
        height, width = patches.output_size(x)
        at_once = max(1, CHUNK_NUMBERS // patch_length(layer))
        waiting: list[Tensor] = []
        begin = end = 0
        for place, image in enumerate(x.split(1)):
            chosen = self._chosen(layer, part, place, height * width)
            cut = patches.all(image) if chosen is None else patches.at(image[0], chosen // width, chosen % width)
            waiting.append(cut)
            end += cut.shape[1]
            if end - begin >= at_once or place == len(x) - 1:
                yield torch.cat(waiting, dim=1), outputs[:, begin:end]
                waiting, begin = [], end

    def _chosen(self, layer: Replaced, part: Part, place: int, count: int) -> Tensor | None:
        """The positions of the image at ``place`` of a batch that are looked at; None for all ``count`` of them."""
        at_most = positions_an_image(layer, self.images)
        if count <= at_most:
            return None
        copy, at = divmod(place, len(part.numbers))
        return positions_of(layer.name, self.seed, part.numbers[at], count, at_most, copy=copy)

    def _norm_stops(
        self, modules: dict[str, nn.Module], estimated: list[str], before: dict[str, NormMoments]
    ) -> list[Stop]:
        """A stop at each norm, where it gets its statistics from everything that has come to it.

        before: what came to the norms of the original network, where that is known.
        """
        stops = []
        for name, module in modules.items():
            if not is_norm(module):
                continue

            def settle(come: list[tuple[int, Tensor]], name: str = name, module: nn.Module = module) -> None:
                moments = NormMoments(come[0][1].shape[1], moments_device(self.example.device))
                for _, x in come:
                    moments.add(x.to(moments.mean.device))
                if not bool(torch.isfinite(moments.mean).all()):
                    raise UsageError(f"the inputs of {name} are not finite: the network's weights are damaged")
                moments.put_into(module, before.get(name))
                estimated.append(name)

            stops.append(Stop(module, settle, only_changed=True))
        return stops


class _Watcher:
    """A hook on a layer of the original network that keeps what it puts out at the positions that are used."""

    def __init__(self, layer: Replaced, owner: Calibration, wanted: Wanted) -> None:
        self.layer, self.owner, self.wanted = layer, owner, wanted
        self.number, self.part = 0, owner.parts[0]
        self.seen = False

    def expect(self, number: int, part: Part) -> None:
        """Part ``number`` is about to be run."""
        self.number, self.part, self.seen = number, part, False

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        if self.seen:  # a layer that runs more than once is solved for the first time
            return
        self.seen = True
        y = batched(output.detach())
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            y = y - bias[:, None, None]
        height, width = y.shape[-2:]
        kept = []
        for place, image in enumerate(y.flatten(2)):
            chosen = self.owner._chosen(self.layer, self.part, place, height * width)
            kept.append(image if chosen is None else image[:, chosen.to(image.device)])
        self.wanted.outputs[self.layer.name][self.number] = torch.cat(kept, dim=1)


class _NormWatcher:
    """A hook on a norm of the original network that adds what comes to it to its moments."""

    def __init__(self, name: str, owner: Calibration, wanted: Wanted) -> None:
        self.name, self.owner, self.wanted = name, owner, wanted
        self.seen = False

    def expect(self, number: int, part: Part) -> None:
        """Another part is about to be run."""
        self.seen = False

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if self.seen:  # as with layers, the first time counts
            return
        self.seen = True
        x = (arguments[0] if arguments else options["input"]).detach()
        device = moments_device(x.device)
        moments = self.wanted.norms.setdefault(self.name, NormMoments(x.shape[1], device))
        moments.add(x.to(device))


def reestimate_norms(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    images: int = DEFAULT_IMAGES,
    memory_bytes: int = MEMORY_BYTES,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Re-estimate the statistics of every batch norm of ``model``, in place, on all ``images``; how many there are.

    One norm after the other in the order of execution, each on what the network in eval mode gives it with those before
    it already re-estimated: the statistics of the whole set, whatever the batches. Raises as :class:`Calibration`.
    """
    found = Calibration(model, calibration, images=images, memory_bytes=memory_bytes, stop=stop)
    estimated: list[str] = []
    with undisturbed(model):
        found._fit_into_memory((), survey(model, (), found.example))
        stops = found._norm_stops(dict(model.named_modules()), estimated, {})
        for each in stops:
            each.only_changed = False
        run_in_step(model, [for_network(part.images, model) for part in found.parts], stops, asked_to_stop=stop)
    return len(estimated)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
    return weight


def _variant(module: nn.Module) -> VariantConv2d:
    if not isinstance(module, VariantConv2d):
        raise TypeError(f"{type(module).__name__} is no variant")
    return module


def _solving_bytes(layer: Replaced) -> int:
    """What the moments of a layer and solving with them take."""
    size = patch_length(layer)
    return DOUBLE * (WORKING * size * size + 4 * layer.out_channels * size)


def _outputs_bytes(layer: Replaced, images: int, item: int) -> int:
    """What is kept of the outputs of a layer of the original network."""
    positions = positions_an_image(layer, images)
    if layer.height is not None and layer.width is not None:
        sides = zip((layer.height, layer.width), layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
        positions = min(positions, math.prod(output_length(*side) for side in sides))
    return images * positions * layer.out_channels * item


def _as_json(layer: Replaced, found: Solution) -> dict[str, Any]:
    names = ("copied", "before", "after", "rows", "held_out_rows", "condition", "ridge", "centred", "scarce")
    return {"name": layer.name, "groups": layer.groups, **{name: getattr(found, name) for name in names}}
