"""Calibrated conversion: every layer solved by least squares on the network's own activations, without training.

Layer by layer in the order of execution: the inputs are those that the network makes with all layers before already
converted, the outputs to be met are the original network's, on the same images. So a layer also makes up for what
those before it have lost. Batch norm's statistics are re-estimated in the same pass, each from all images, so that a
norm's output has the mean and the variance that it had in the original network on these images. The whole takes one
forward pass of the original network and one of the converted one (see :mod:`bgcbench.conversion.lockstep`), whatever
the number of layers.

At a position a layer is y = V u with u the patch vector. It minimises E|y - V u|^2 with y of the original network.
Where the layer has a bias, or norms take a constant of each channel away from its output, all is about the means:
y - E y, u - E u, and E y - V E u goes into the bias (or into the mean of the norm that follows at once).

A layer or norm that runs several times in a forward pass (a head shared by the levels of a pyramid, a recurrent block)
is settled at its first call with what comes to all of its calls: another pass of the converted network, in which the
layers that are not solved yet compute what they did in the original, shows it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bgcbench.conversion.layer_moments import (
    Part,
    Sampler,
    check_enough,
    first_of,
    moments_device,
    parts_of,
    patch_length,
    positions_an_image,
)
from bgcbench.conversion.lockstep import Stop, Stopped, run_in_step
from bgcbench.conversion.norms import NormMoments
from bgcbench.conversion.solve import Solution, solve_layer
from bgcbench.conversion.survey import Survey, is_norm, survey
from bgcbench.conversion.trial import Kernel, standing_in
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Forward, Passing, device_of, first_image, input_bytes, reference_of
from bgcbench.measure.undisturbed import RandomState, first_not_finite, seed_everything, undisturbed
from bgcbench.results.rows import CalibratedLayer, Calibration, Record, Replaced
from bgcbench.specs import HELD_OUT, check_positive, output_length
from bgcbench.theory.moments import RegressionMoments

__all__ = ["DEFAULT_IMAGES", "MEMORY_BYTES", "Calibrator", "Stopped", "Wanted", "reestimate_norms"]

DEFAULT_IMAGES = 512
MEMORY_BYTES = 8 * 2**30
BATCH = 32  # images that go through the network together, at most
WORKING = 6  # matrices as large as a layer's moment that are held while it is solved
DOUBLE = 8  # bytes


class Wanted:
    """What the original network puts out at each layer to be replaced, on the images and positions that are used.

    kernels: weight and bias of each layer's standard convolution. outputs: by layer, part and call, (m, positions).
    norms: moments of the inputs of each norm.
    """

    def __init__(self, looked: Survey, kernels: dict[str, Kernel]) -> None:
        self.survey, self.kernels = looked, kernels
        self.outputs: dict[str, dict[int, list[Tensor]]] = {name: {} for name in kernels}
        self.norms: dict[str, NormMoments] = {}


Visit = Callable[[int, int, Tensor], None]  # number of a part, call in it, what comes to the module then


class Calibrator:
    """The images of one conversion, where they are run through the network, and what is done with them.

    batches: anything that ``passing`` can pass on. notes: what the user should know. Raises UsageError for images that
    are too few or no images.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        passing: Passing | None = None,
        images: int = DEFAULT_IMAGES,
        rebn: bool = True,
        memory_bytes: int = MEMORY_BYTES,
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_positive("calibration images", images)
        self.passing = passing or Passing()
        self.rebn, self.memory_bytes, self.seed, self.stop = rebn, memory_bytes, seed, stop
        first, batches = first_of(batches)
        self.example = first_image(self.passing.of(first, model))
        self.device, self.item = device_of(model), reference_of(model).element_size()
        self.parts = list(parts_of(batches, images, self.passing, model, BATCH))
        check_enough(self.images)
        self.notes = list(self.passing.notes)
        self.begun = time.perf_counter()
        self.in_flight_bytes = self.moment_bytes = 0

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(len(part.numbers) for part in self.parts)

    def _run(self, model: nn.Module, part: Part) -> None:
        seed_everything(part.seed)
        self.passing(model, part.batch)

    # ------------------------------------------------------------------------------------------- the original network

    def observe(self, model: nn.Module, layers: Sequence[Replaced]) -> Wanted:
        """Run the original network over the images and keep what is wanted of each of ``layers``, and of the norms.

        Raises UsageError where the memory is too little for a layer, and Stopped.
        """
        kernels = {layer.name: _kernel(model, layer.name) for layer in layers}
        with undisturbed(model):
            self._fit_into_memory(layers, looked := self._survey(model, kernels))
            wanted = Wanted(looked, kernels)
            watchers: list[_Watcher] = [_LayerWatcher(layer, self, wanted) for layer in layers]
            watchers += [
                _NormWatcher(name, self, wanted)
                for name, module in (model.named_modules() if self.rebn else ())
                if is_norm(module)
            ]
            handles = [watcher.attach(model.get_submodule(watcher.name)) for watcher in watchers]
            try:
                for number, part in enumerate(self.parts):
                    if self.stop():
                        raise Stopped
                    for watcher in watchers:
                        watcher.expect(number, part)
                    self._run(model, part)
            finally:
                for handle in handles:
                    handle.remove()
        return wanted

    def _survey(self, model: nn.Module, convs: Collection[str]) -> Survey:
        return survey(model, convs, lambda: self.passing(model, self.example))

    def _fit_into_memory(self, layers: Sequence[Replaced], looked: Survey) -> None:
        """Leave out images until what is held at a time fits, and say so."""
        asked = images = self.images
        each = looked.live_bytes + input_bytes(self.example)
        solving = max((_solving_bytes(layer) for layer in layers), default=0)
        while True:
            outputs = sum(_outputs_bytes(layer, images, self.item) for layer in layers)
            needed = images * each + solving + outputs
            if needed <= self.memory_bytes:
                break
            images = int(images * 0.9)
            if images < HELD_OUT:
                raise UsageError(self._too_little(needed, layers))
        if images < asked:
            self.parts = [kept for part in self.parts if (kept := part.below(images)) is not None]
            self.notes.append(
                f"calibrated on {images} of the {asked} images: more would not fit into "
                f"{self.memory_bytes / 2**30:.2g} GiB"
            )
        self.in_flight_bytes, self.moment_bytes = images * each, solving + outputs

    def _too_little(self, needed: float, layers: Sequence[Replaced]) -> str:
        largest = sorted(layers, key=_solving_bytes, reverse=True)[:4]
        sizes = ", ".join(f"{layer.name} {_solving_bytes(layer) / 2**30:.2g} GiB" for layer in largest)
        return (
            f"calibration takes {needed / 2**30:.2g} GiB even with a few images, more than the "
            f"{self.memory_bytes / 2**30:.2g} GiB allowed; allow more memory"
            + (f", or exclude the layers that take most ({sizes})" if largest else "")
        )

    # ------------------------------------------------------------------------------------------ the converted network

    def settle(self, network: nn.Module, record: Record, wanted: Wanted) -> Calibration:
        """Solve the layers of the converted ``network`` of which is known what is ``wanted``, and estimate its norms.

        Returns what was done. Raises UsageError for inputs that are not finite, and Stopped.
        """
        solved: dict[str, Solution] = {}
        estimated: list[str] = []
        modules = dict(network.named_modules())
        changed = [modules[layer.name] for layer in record.layers]

        def pass_again(module: nn.Module, visit: Visit) -> None:
            """Visit everything that comes to ``module`` in a pass as the network is now."""
            unsolved = {_variant(modules[name]): own for name, own in wanted.kernels.items() if name not in solved}
            with standing_in(unsolved):
                self._pass(network, module, visit)

        with undisturbed(network):
            stops = self._layer_stops(modules, record, wanted, solved, pass_again) if wanted.kernels else []
            stops += self._norm_stops(modules, estimated, wanted.norms, wanted.survey, pass_again) if self.rebn else []
            if stops:
                run_in_step(self._runs(network), stops, device=self.device, changed=changed, asked_to_stop=self.stop)
        missed = [layer.name for layer in record.layers if layer.name in wanted.kernels and layer.name not in solved]
        if missed:
            self.notes.append(f"never reached by the calibration images: {', '.join(missed)}; white weights are taken")
            for name in missed:
                layer = _variant(modules[name])
                layer.load_projected(layer.project(wanted.kernels[name][0].double(), layer.groups, "white", None))
        return Calibration(
            images=self.images,
            held_out=sum(len(part.numbers) for part in self.parts if part.held_out),
            seed=self.seed,
            rebn=self.rebn,
            norms=len(estimated),
            seconds=time.perf_counter() - self.begun,
            moment_bytes=self.moment_bytes,
            in_flight_bytes=self.in_flight_bytes,
            layers=tuple(_told(layer, solved[layer.name]) for layer in record.layers if layer.name in solved),
        )

    def _runs(self, network: nn.Module) -> list[tuple[Callable[[], object], RandomState]]:
        return [
            (functools.partial(self.passing, network, part.batch), RandomState.seeded(network, part.seed))
            for part in self.parts
        ]

    def _pass(self, network: nn.Module, module: nn.Module, visit: Visit) -> None:
        """Run the network on every part and visit what comes to ``module`` at each of its calls."""
        at = [0, 0]

        def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            visit(at[0], at[1], (arguments[0] if arguments else options["input"]).detach())
            at[1] += 1

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            for number, part in enumerate(self.parts):
                if self.stop():
                    raise Stopped
                at[:] = number, 0
                self._run(network, part)
        finally:
            handle.remove()

    def _layer_stops(
        self,
        modules: dict[str, nn.Module],
        record: Record,
        wanted: Wanted,
        solved: dict[str, Solution],
        pass_again: Callable[[nn.Module, Visit], None],
    ) -> list[Stop]:
        """A stop at each replaced layer, where it is solved and gets its weights."""
        stops = []
        for replaced in record.layers:
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
                moments = _Moments(self, replaced, wanted.outputs.pop(replaced.name))
                if wanted.survey.calls[replaced.name] > 1:
                    pass_again(layer, moments.visit)
                else:
                    for number, x in come:
                        moments.visit(number, 0, x)
                if not moments.fit.positions:
                    return
                if not (moments.fit.is_finite and moments.held_out.is_finite):
                    raise UsageError(self._not_finite(modules[""], f"the inputs or outputs of {replaced.name}"))
                found = solve_layer(
                    layer,
                    wanted.kernels[replaced.name][0],
                    moments.fit,
                    moments.held_out,
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

    def _not_finite(self, network: nn.Module, what: str) -> str:
        where = first_not_finite(network, lambda: self._run(network, self.parts[0]))
        return (
            f"{what} are not finite{f': {where}' if where else ''}; check the network's weights and the images, or "
            "exclude what comes after the damage"
        )

    def _norm_stops(
        self,
        modules: dict[str, nn.Module],
        estimated: list[str],
        before: dict[str, NormMoments],
        looked: Survey,
        pass_again: Callable[[nn.Module, Visit], None],
    ) -> list[Stop]:
        """A stop at each norm, where it gets its statistics from everything that has come to it.

        before: what came to the norms of the original network, where that is known.
        """
        stops = []
        for name, module in modules.items():
            if not is_norm(module):
                continue

            def settle(come: list[tuple[int, Tensor]], name: str = name, module: nn.Module = module) -> None:
                moments = NormMoments(come[0][1].shape[1], moments_device(self.device))
                if looked.calls[name] > 1:
                    pass_again(module, lambda number, call, x: moments.add(x.to(moments.mean.device)))
                else:
                    for _, x in come:
                        moments.add(x.to(moments.mean.device))
                if not bool(torch.isfinite(moments.mean).all()):
                    raise UsageError(self._not_finite(modules[""], f"the inputs of {name}"))
                moments.put_into(module, before.get(name))
                estimated.append(name)

            stops.append(Stop(module, settle, only_changed=True))
        return stops

    def sampler(self, layer: Replaced) -> Sampler:
        """Where ``layer`` is looked at."""
        return Sampler(layer, self.images, self.seed)


class _Moments:
    """The moments of what comes to a layer and of the outputs wanted there: ``fit`` to solve with, and ``held_out``.

    outputs: by part and call, (m, positions).
    """

    def __init__(self, owner: Calibrator, layer: Replaced, outputs: dict[int, list[Tensor]]) -> None:
        self.owner, self.sampler, self.outputs = owner, owner.sampler(layer), outputs
        self.device = moments_device(owner.device)
        nothing = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.fit, self.held_out = (RegressionMoments(nothing, nothing) for _ in range(2))

    def visit(self, number: int, call: int, x: Tensor) -> None:
        """Count in what has come to the layer in that call; nothing where the original network had no such call."""
        part, outputs = self.owner.parts[number], self.outputs.get(number, [])
        if call >= len(outputs):
            return
        end = 0
        for patches in self.sampler.patches(x, part, call):
            begin, end = end, end + patches.shape[1]
            u, y = (pairs.to(self.device, torch.float64) for pairs in (patches, outputs[call][:, begin:end]))
            if not self.fit.positions and not self.held_out.positions:
                origins = u.mean(1), y.mean(1)
                self.fit, self.held_out = (RegressionMoments(*origins) for _ in range(2))
            (self.held_out if part.held_out else self.fit).add(u, y)


class _Watcher:
    """A hook on a module of the original network, told which part is run."""

    def __init__(self, name: str, owner: Calibrator, wanted: Wanted) -> None:
        self.name, self.owner, self.wanted = name, owner, wanted
        self.number, self.part = 0, owner.parts[0]

    def expect(self, number: int, part: Part) -> None:
        """Part ``number`` is about to be run."""
        self.number, self.part = number, part

    def attach(self, module: nn.Module) -> RemovableHandle:
        raise NotImplementedError


class _LayerWatcher(_Watcher):
    """Keeps what a layer puts out at the positions that are used, of each call."""

    def __init__(self, layer: Replaced, owner: Calibrator, wanted: Wanted) -> None:
        super().__init__(layer.name, owner, wanted)
        self.sampler = owner.sampler(layer)

    def attach(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(self._left, prepend=True)

    def _left(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        calls = self.wanted.outputs[self.name].setdefault(self.number, [])
        y = output.detach()
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            y = y - bias[:, None, None]
        calls.append(self.sampler.outputs(y, self.part, len(calls)))


class _NormWatcher(_Watcher):
    """Adds what comes to a norm to its moments."""

    def attach(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self._entered, with_kwargs=True)

    def _entered(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        x = (arguments[0] if arguments else options["input"]).detach()
        device = moments_device(x.device)
        moments = self.wanted.norms.setdefault(self.name, NormMoments(x.shape[1], device))
        moments.add(x.to(device))


def reestimate_norms(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    forward_fn: Forward | None = None,
    images: int = DEFAULT_IMAGES,
    memory_bytes: int = MEMORY_BYTES,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Re-estimate the statistics of every batch norm of ``model``, in place, on all ``images``; how many there are.

    One norm after the other in the order of execution, each on what the network in eval mode gives it with those before
    it already re-estimated: the statistics of the whole set and of all its calls, whatever the batches. calibration,
    forward_fn: as in :func:`bgcbench.convert`. Raises as :class:`Calibrator`.
    """
    found = Calibrator(
        model, calibration, passing=Passing(forward_fn), images=images, memory_bytes=memory_bytes, stop=stop
    )
    estimated: list[str] = []
    with undisturbed(model):
        found._fit_into_memory((), looked := found._survey(model, ()))
        again = functools.partial(found._pass, model)
        stops = found._norm_stops(dict(model.named_modules()), estimated, {}, looked, again)
        for each in stops:
            each.only_changed = False
        run_in_step(found._runs(model), stops, device=found.device, asked_to_stop=stop)
    return len(estimated)


def _kernel(model: nn.Module, name: str) -> Kernel:
    """Weight and bias of a convolution, kept whatever becomes of it."""
    conv: Any = model.get_submodule(name)
    return conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()


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
    return images * positions * layer.out_channels * item * (layer.calls or 1)


def _told(layer: Replaced, found: Solution) -> CalibratedLayer:
    return CalibratedLayer(
        name=layer.name,
        groups=layer.groups,
        copied=found.copied,
        before=found.before,
        after=found.after,
        rows=found.rows,
        held_out_rows=found.held_out_rows,
        condition=found.condition,
        ridge=found.ridge,
        centred=found.centred,
        scarce=found.scarce,
    )
