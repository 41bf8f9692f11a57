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

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
    positions_an_image,
    watching,
)
from bgcbench.conversion.lockstep import Stop, Stopped, run_in_step
from bgcbench.conversion.norms import NormMoments
from bgcbench.conversion.record import spec_of
from bgcbench.conversion.solve import overfitted, solve_layer
from bgcbench.conversion.survey import Survey, is_norm, survey
from bgcbench.conversion.trial import Kernel, standing_in
from bgcbench.convs import build_conv
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

Come = list[tuple[int, Tensor]]  # what waits at a module: the number of a part, and the module's input


class Wanted:
    """What the original network puts out at each layer to be replaced, on the images and positions that are used.

    kernels: weight and bias of each layer's standard convolution. outputs: by layer, part and call, (m, positions).
    norms: moments of the inputs of each norm.
    """

    def __init__(self, surveyed: Survey, kernels: dict[str, Kernel]) -> None:
        self.survey, self.kernels = surveyed, kernels
        self.outputs: dict[str, dict[Part, list[Tensor]]] = {name: defaultdict(list) for name in kernels}
        self.norms: dict[str, NormMoments] = {}

    def keep_only(self, layers: Iterable[Replaced]) -> None:
        """Want nothing of other layers any more: they stay as they are."""
        names = {layer.name for layer in layers}
        self.kernels = {name: kernel for name, kernel in self.kernels.items() if name in names}
        self.outputs = {name: outputs for name, outputs in self.outputs.items() if name in names}


class Calibrator:
    """The images of one conversion, where they are run through the network, and what is done with them.

    batches: anything that ``passing`` can pass on; pictures: see Holding, by default those that batches name. notes:
    what the user should know. Raises UsageError for images that are too few or no images.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        passing: Passing | None = None,
        pictures: Pictures = None,
        images: int = DEFAULT_IMAGES,
        rebn: bool = True,
        memory_bytes: int = MEMORY_BYTES,
        seed: int = 0,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        check_positive("calibration images", images)
        self.passing = passing or Passing()
        self.rebn, self.memory_bytes, self.seed, self.stop = rebn, memory_bytes, seed, stop
        holding = Holding(pictures or getattr(batches, "pictures", None))
        first, batches = first_of(batches)
        self.example = first_image(self.passing.of(first, model))
        self.device, self.item = device_of(model), reference_of(model).element_size()
        self.parts = list(parts_of(batches, images, self.passing, model, holding, BATCH))
        holding.check_enough()
        self.notes = list(self.passing.notes)
        self.begun = time.perf_counter()
        self.in_flight_bytes = self.moment_bytes = 0

    @property
    def images(self) -> int:
        """How many images there are."""
        return sum(len(part.numbers) for part in self.parts)

    def run(
        self, model: nn.Module, inputs: Mapping[nn.Module, Visit], outputs: Mapping[nn.Module, Visit] | None = None
    ) -> None:
        """Run ``model`` over the images and visit what modules take and put out. Raises Stopped."""
        with watching(model, self.passing, inputs=inputs, outputs=outputs) as run:
            for part in self.parts:
                if self.stop():
                    raise Stopped
                run(part)

    # ------------------------------------------------------------------------------------------- the original network

    def observe(self, model: nn.Module, layers: Sequence[Replaced]) -> Wanted:
        """Run the original network over the images and keep what is wanted of each of ``layers``, and of the norms.

        Raises UsageError where the memory is too little for a layer, and Stopped.
        """
        kernels = {layer.name: _kernel(model, layer.name) for layer in layers}
        with undisturbed(model):
            wanted = self.survey(model, layers, kernels)
            norms = {name: module for name, module in model.named_modules() if self.rebn and is_norm(module)}
            self.run(
                model,
                {module: partial(_add_to_norm, wanted, name) for name, module in norms.items()},
                {(conv := model.get_submodule(layer.name)): self._keeper(wanted, layer, conv) for layer in layers},
            )
        return wanted

    def survey(self, model: nn.Module, layers: Sequence[Replaced], kernels: dict[str, Kernel]) -> Wanted:
        """See how ``layers`` hang together, and leave out images until what is held at a time fits the memory."""
        surveyed = survey(model, kernels, lambda: self.passing(model, self.example))
        self._fit_into_memory(layers, surveyed)
        return Wanted(surveyed, kernels)

    def _keeper(self, wanted: Wanted, layer: Replaced, conv: nn.Module) -> Visit:
        """What keeps the output of a layer, without its bias, at the positions that are used."""
        sampler, outputs = self.sampler(layer), wanted.outputs[layer.name]

        def keep(part: Part, call: int, y: Tensor) -> None:
            if isinstance(bias := getattr(conv, "bias", None), Tensor):
                y = y - bias[:, None, None]
            outputs[part].append(sampler.outputs(y, part, call))

        return keep

    def _fit_into_memory(self, layers: Sequence[Replaced], surveyed: Survey) -> None:
        """Leave out images until what is held at a time fits, and say so."""
        asked = images = self.images
        each = surveyed.live_bytes + input_bytes(self.example)
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
            if not any(part.held_out for part in self.parts):
                raise UsageError(self._too_little(needed, layers))
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

    def settle(
        self, network: nn.Module, record: Record, wanted: Wanted, refitted: Sequence[Replaced] = ()
    ) -> Calibration:
        """Solve the layers of the converted ``network`` of which is known what is ``wanted``, and estimate its norms.

        refitted: convolutions that were not replaced and are solved anew. Returns what was done. Raises UsageError for
        inputs that are not finite, and Stopped.
        """
        settling = _Settling(self, network, wanted, refitted)
        solvable = [layer for layer in record.layers if layer.name in wanted.kernels]
        with undisturbed(network):
            stops = settling.layer_stops([*solvable, *refitted])
            stops += settling.norm_stops(only_changed=True) if self.rebn else []
            settling.run_in_step(stops, [settling.modules[layer.name] for layer in record.layers])
        if missed := [layer.name for layer in solvable if layer.name not in settling.solved]:
            self.notes.append(f"never reached by the calibration images: {', '.join(missed)}; white weights are taken")
            for name in missed:
                layer = settling.modules[name]
                layer.load_projected(layer.project(wanted.kernels[name][0].double(), "white", None))
        layers, anew = (
            tuple(settling.solved[layer.name] for layer in each if layer.name in settling.solved)
            for each in (record.layers, refitted)
        )
        self.notes += overfitted(layers)
        return Calibration(
            images=self.images,
            held_out=sum(len(part.numbers) for part in self.parts if part.held_out),
            seed=self.seed,
            rebn=self.rebn,
            norms=settling.norms,
            seconds=time.perf_counter() - self.begun,
            moment_bytes=self.moment_bytes,
            in_flight_bytes=self.in_flight_bytes,
            layers=layers,
            refitted=anew,
        )

    def sampler(self, layer: Replaced) -> Sampler:
        """Where ``layer`` is looked at."""
        return Sampler(layer, self.images, self.seed)


class _Settling:
    """A converted ``network`` whose layers are solved and whose norms are estimated, each where a pass comes to it.

    solved: the layers so far, with what they lose. norms: how many norms have been estimated.
    """

    def __init__(
        self, images: Calibrator, network: nn.Module, wanted: Wanted, refitted: Sequence[Replaced] = ()
    ) -> None:
        self.images, self.network, self.wanted = images, network, wanted
        self.modules: dict[str, Any] = dict(network.named_modules())
        self.solvers = {layer.name: _standard(self.modules[layer.name], layer) for layer in refitted}
        self.solved: dict[str, CalibratedLayer] = {}
        self.norms = 0

    def run_in_step(self, stops: Sequence[Stop], changed: Sequence[nn.Module] = ()) -> None:
        """One pass over all images that waits at every one of ``stops``."""
        if not stops:
            return
        runs = [
            (partial(self.images.passing, self.network, part.batch), RandomState.seeded(self.network, part.seed))
            for part in self.images.parts
        ]
        run_in_step(runs, stops, device=self.images.device, changed=changed, asked_to_stop=self.images.stop)

    def layer_stops(self, layers: Sequence[Replaced]) -> list[Stop]:
        """A stop at each of the replaced ``layers``, where it is solved and gets its weights."""
        return [Stop(self.modules[layer.name], partial(self._solve, layer)) for layer in layers]

    def norm_stops(self, *, only_changed: bool) -> list[Stop]:
        """A stop at each norm, where it gets its statistics from everything that has come to it."""
        norms = {name: module for name, module in self.modules.items() if is_norm(module)}
        return [Stop(module, partial(self._estimate, name), only_changed) for name, module in norms.items()]

    def _visit(self, name: str, come: Come, visit: Visit) -> None:
        """Visit what comes to a module in all of its calls, as the network is now; ``come``: at the first one."""
        if self.wanted.survey.calls[name] <= 1:
            for number, x in come:
                visit(self.images.parts[number], 0, x)
            return
        unsolved = {self.modules[own]: it for own, it in self.wanted.kernels.items() if own not in self.solved}
        with standing_in(unsolved):
            self.images.run(self.network, {self.modules[name]: visit})

    def _solve(self, replaced: Replaced, come: Come) -> None:
        name, surveyed = replaced.name, self.wanted.survey
        layer: VariantConv2d = self.solvers.get(name, self.modules[name])
        norm = self.modules[surveyed.norms[name]] if name in surveyed.norms else None
        absorbed = name in surveyed.absorbed if self.images.rebn else norm is not None
        moments = _Moments(self.images, replaced, self.wanted.outputs.pop(name))
        self._visit(name, come, moments.visit)
        if not moments.fit.positions:
            return
        if not (moments.fit.is_finite and moments.held_out.is_finite):
            raise UsageError(self._not_finite(f"the inputs or outputs of {name}"))
        centred = layer.bias is not None or absorbed
        kernel = self.wanted.kernels[name][0]
        found = solve_layer(name, layer, kernel, moments.fit, moments.held_out, centred=centred)
        layer.load_projected(found.values)
        self.solved[name] = found.told
        if not centred:
            return
        if layer.bias is not None:
            layer.bias.add_(found.shift.to(layer.bias))
        elif norm is not None and not self.images.rebn:
            norm.running_mean.sub_(found.shift.to(norm.running_mean))

    def _estimate(self, name: str, come: Come) -> None:
        moments = NormMoments(come[0][1].shape[1], moments_device(self.images.device))
        self._visit(name, come, lambda part, call, x: moments.add(x.to(moments.mean.device)))
        if not bool(torch.isfinite(moments.mean).all()):
            raise UsageError(self._not_finite(f"the inputs of {name}"))
        moments.put_into(self.modules[name], self.wanted.norms.get(name))
        self.norms += 1

    def _not_finite(self, what: str) -> str:
        first, images = self.images.parts[0], self.images

        def run() -> None:
            seed_everything(first.seed)
            images.passing(self.network, first.batch)

        where = first_not_finite(self.network, run)
        return (
            f"{what} are not finite{f': {where}' if where else ''}; check the network's weights and the images, or "
            "exclude what comes after the damage"
        )


class _Moments:
    """The moments of what comes to a layer and of the outputs wanted there: ``fit`` to solve with, and ``held_out``.

    outputs: by part and call, (m, positions).
    """

    def __init__(self, images: Calibrator, layer: Replaced, outputs: dict[Part, list[Tensor]]) -> None:
        self.sampler, self.outputs = images.sampler(layer), outputs
        self.device = moments_device(images.device)
        nothing = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.fit, self.held_out = (RegressionMoments(nothing, nothing) for _ in range(2))

    def visit(self, part: Part, call: int, x: Tensor) -> None:
        """Count in what has come to the layer in that call; nothing where the original network had no such call."""
        if call >= len(outputs := self.outputs.get(part, [])):
            return
        end = 0
        for patches in self.sampler.patches(x, part, call):
            begin, end = end, end + patches.shape[1]
            u, y = (pairs.to(self.device, torch.float64) for pairs in (patches, outputs[call][:, begin:end]))
            if not self.fit.positions and not self.held_out.positions:
                origins = u.mean(1), y.mean(1)
                self.fit, self.held_out = (RegressionMoments(*origins) for _ in range(2))
            (self.held_out if part.held_out else self.fit).add(u, y)


def _add_to_norm(wanted: Wanted, name: str, part: Part, call: int, x: Tensor) -> None:
    """Add what comes to a norm of the original network to its moments."""
    device = moments_device(x.device)
    wanted.norms.setdefault(name, NormMoments(x.shape[1], device)).add(x.to(device))


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
    with undisturbed(model):
        settling = _Settling(found, model, found.survey(model, (), {}))
        settling.run_in_step(settling.norm_stops(only_changed=False))
    return settling.norms


def _standard(conv: nn.Conv2d, layer: Replaced) -> VariantConv2d:
    """A standard layer with the parameters of ``conv``, which can be solved for."""
    made = build_conv(spec_of(layer), padding_mode=layer.padding_mode, device="meta")
    made._parameters.update(conv._parameters)
    return made


def _kernel(model: nn.Module, name: str) -> Kernel:
    """Weight and bias of a convolution, kept whatever becomes of it."""
    conv: Any = model.get_submodule(name)
    return conv.weight.detach().clone(), None if conv.bias is None else conv.bias.detach().clone()


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
