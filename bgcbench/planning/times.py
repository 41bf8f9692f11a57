"""What each convolution of a network takes as each choice, measured on a device, and what that comes to in the network.

Every distinct convolution is measured by itself, on an input of the size that it has in the network, interleaved with
all its choices (:mod:`bgcbench.measure.timing`). A layer inside of a network is not what it is alone: memory is warm or
cold, what follows is fused or not. So the dense network and the uniformly converted ones are measured in turn, too, and
what the layers save by themselves is scaled, variant by variant, to what those networks really save.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from bgcbench.conversion.record import put_in, spec_of
from bgcbench.convs import build_conv
from bgcbench.convs.layouts import is_channels_last
from bgcbench.measure import timing
from bgcbench.measure.batches import Passing
from bgcbench.measure.device import current, describe_failure, make_stopwatch
from bgcbench.measure.statistics import Series, median_interval, ratio_of_medians, round_medians
from bgcbench.measure.workload import Cell
from bgcbench.planning.execution import Execution, Makers
from bgcbench.results.rows import Replaced
from bgcbench.specs import RUNTIME, Choice

EAGER = Execution()
NOISE = 0.02  # of a network's time
FAR = 2.5  # times that savings in a network may differ from those of its layers alone


@dataclass(frozen=True)
class Timed:
    """Samples of one thing, in seconds, each with the round that it was taken in; median_s: their median."""

    samples_s: tuple[float, ...]
    rounds: tuple[int, ...]
    median_s: float

    def ratio_to(self, other: Timed) -> tuple[float, tuple[float, float] | None]:
        """This time over the other's, with a 95 % confidence interval, round by round."""
        found = ratio_of_medians(
            Series(self.samples_s, self.rounds), Series(other.samples_s, other.rounds), paired=True
        )
        return found.value, None if found.ci95 is None else (found.ci95.low, found.ci95.high)

    def differs_from(self, other: Timed) -> bool:
        """Whether the median of the rounds' ratios is known to be another one than 1, with 95 % confidence."""
        ours, theirs = (round_medians(each.samples_s, each.rounds) for each in (self, other))
        found = median_interval([ours[number] / theirs[number] for number in ours.keys() & theirs.keys()])
        return found is not None and not found.low <= 1 <= found.high


@dataclass
class Measured:
    """What was measured, by name, and of what could not be, why."""

    times: dict[str, Timed] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleaved(
    makers: Makers,
    device: torch.device,
    rules: timing.Rules,
    *,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Make everything ready and measure it in turn, until all ratios to the first are known (see measure.timing).

    What was never reached, because of ``stop``, is left out.
    """
    found, tracks = Measured(), []
    with torch.enable_grad(), current(device):  # inference turns gradients off for itself
        for name, make in makers.items():
            if stop():
                return found
            try:
                tracks.append(timing.Track(name, make(), label=name))
            except Exception as problem:  # noqa: BLE001 - whatever it is, the others are worth having
                found.failures[name] = describe_failure(problem, device).reason
        for track in tracks:
            track.reference = tracks[0]
        stopwatch = make_stopwatch(device, cold=device.type == "cuda")
        for _ in timing.Group(tracks, stopwatch, rules, random.Random(seed), stop).run():
            pass
    for track in tracks:
        if track.failure is not None:
            found.failures[track.row] = describe_failure(track.failure, device).reason
        elif track.samples:
            found.times[track.row] = Timed(tuple(track.samples), tuple(track.rounds), track.summary().median_s)
    return found


@dataclass(frozen=True)
class _Shape:
    """What decides a layer's time: the layer without its name, and its input."""

    layer: Replaced
    size: tuple[int, ...]
    channels_last: bool
    dtype: torch.dtype
    has_gradient: bool


def _shapes(
    model: nn.Module, layers: Sequence[Replaced], run: Callable[[], object], *, trains: bool
) -> dict[str, _Shape]:
    """The shape of each layer, by name, as ``run`` runs ``model``."""
    found: dict[str, _Shape] = {}

    def hook(layer: Replaced) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x: Tensor = given[0] if given else named["input"]
            bare = replace(layer, name="", also=(), calls=None)
            found[layer.name] = _Shape(bare, tuple(x.shape), is_channels_last(x), x.dtype, x.requires_grad)

        return see

    with contextlib.ExitStack() as hooks, torch.set_grad_enabled(trains):
        for layer in layers:
            conv = model.get_submodule(layer.name)
            hooks.enter_context(conv.register_forward_pre_hook(hook(layer), with_kwargs=True))
        run()
    return found


@dataclass(frozen=True)
class LayerTimes:
    """A layer's times, the dense choice among them, and why there are none of other choices."""

    times: Mapping[Choice, Timed]
    failures: Mapping[Choice, str]

    def seconds(self, calls: int = 1, *, surely: bool = False) -> dict[Choice, float]:
        """Of so many calls as each choice. surely: a choice that is not known to take another time than the dense layer
        takes that time, so that no plan is made of noise."""
        dense = self.times.get(Choice())
        taken = {
            choice: dense if surely and dense is not None and not timed.differs_from(dense) else timed
            for choice, timed in self.times.items()
        }
        return {choice: timed.median_s * calls for choice, timed in taken.items()}


def layer_times(
    model: nn.Module,
    layers: Sequence[Replaced],
    choices: Mapping[str, Sequence[Choice]],
    run: Callable[[], object],
    device: torch.device,
    rules: timing.Rules,
    *,
    execution: Execution = EAGER,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, LayerTimes]]:
    """Of each of ``layers`` the time of one call as it is (the dense choice) and as each of its ``choices``.

    run: runs ``model``, in eval mode, on what it is to be measured with. Layers of the same shape are measured once.
    """
    known: dict[_Shape, LayerTimes] = {}
    shapes = _shapes(model, layers, run, trains=execution.trains)
    for layer in layers:
        shape = shapes[layer.name]
        if shape not in known:
            tried = [Choice(), *choices[layer.name]]
            known[shape] = _measured(shape, tried, device, rules, execution, seed, stop)
        if stop():
            return
        yield layer.name, known[shape]


def _measured(
    shape: _Shape,
    choices: Sequence[Choice],
    device: torch.device,
    rules: timing.Rules,
    execution: Execution,
    seed: int,
    stop: Callable[[], bool],
) -> LayerTimes:
    by_label = {choice.label: choice for choice in choices}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        x = torch.randn(shape.size, dtype=shape.dtype).to(device)
        x = x.to(memory_format=torch.channels_last) if shape.channels_last else x
        options: dict[str, Any] = {"padding_mode": shape.layer.padding_mode, "dtype": shape.dtype, "device": device}
        modules = {}
        for label, choice in by_label.items():
            given = as_choice(shape.layer, choice, execution)
            module = build_conv(spec_of(given), **options).train(execution.trains)
            modules[label] = module.to(memory_format=torch.channels_last) if shape.channels_last else module
    makers = execution.layers(modules, x.requires_grad_(shape.has_gradient))
    found = interleaved(makers, device, rules, seed=seed, stop=stop)
    times = {by_label[label]: timed for label, timed in found.times.items()}
    if execution.mode == RUNTIME and Choice() in times:  # where the dense kernel runs (see runtime_layers)
        times = {choice: min(timed, times[Choice()], key=lambda one: one.median_s) for choice, timed in times.items()}
    return LayerTimes(times, {by_label[label]: reason for label, reason in found.failures.items()})


def as_choice(layer: Replaced, choice: Choice, execution: Execution) -> Replaced:
    """``layer`` as it is timed as ``choice``."""
    algorithm = execution.algorithm(choice.variant)
    return replace(layer, variant=choice.variant, groups=choice.groups, rank=choice.rank, algorithm=algorithm)


def network_times(
    model: nn.Module,
    networks: Mapping[str, Sequence[Replaced]],
    passing: Passing,
    example: Any,
    device: torch.device,
    rules: timing.Rules,
    *,
    execution: Execution = EAGER,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Measured:
    """Times of ``model`` with these layers in it (none: as it is), in turn, on ``example``, by the networks' names."""

    def ready(layers: Sequence[Replaced]) -> Cell:
        network = put_in(_shared(model), layers, weights=False) if layers else model
        return execution.network(network, passing, example)

    makers = {name: partial(ready, layers) for name, layers in networks.items()}
    return interleaved(makers, device, rules, seed=seed, stop=stop)


def _shared(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


# ------------------------------------------------------------------------------------------------------- in the network


def corrections(
    dense_s: float,
    uniform_s: Mapping[Choice, float],
    alone_s: Mapping[str, Mapping[Choice, float]],
) -> dict[str, float]:
    """By variant, how much of what its layers save alone a network saves: least squares over the uniform networks.

    dense_s: seconds of the network as it is; uniform_s: with every layer that it fits as that choice. alone_s: of each
    layer (by name) as each choice, the dense one among them. 1 for a variant of which no network is known, and nearer
    to it the less there is to save: savings are taken to be known to NOISE of the network's time.
    """
    noise = (NOISE * dense_s) ** 2
    products: dict[str, float] = defaultdict(float)
    squares: dict[str, float] = defaultdict(float)
    for choice, seconds in uniform_s.items():
        alone = sum(times[Choice()] - times[choice] for times in alone_s.values() if choice in times)
        products[choice.variant] += alone * (dense_s - seconds)
        squares[choice.variant] += alone**2
    return {variant: (products[variant] + noise) / (squares[variant] + noise) for variant in squares}


def scaling(saved: float, predicted: float) -> float:
    """How many times what was predicted is saved, both as shares of the network's time; nearer to 1 the less that was
    (savings are taken to be known to NOISE), and from 1 / FAR to FAR."""
    return min(FAR, max(1 / FAR, (saved * predicted + NOISE**2) / (predicted**2 + NOISE**2)))


def doubtful(dense_s: float, layers_s: float, factors: Mapping[str, float]) -> str | None:
    """Why these times cannot be trusted; None where nothing speaks against them.

    layers_s: what all of the dense convolutions take by themselves.
    """
    odd = [f"{variant} {factor:.2g}" for variant, factor in factors.items() if not 1 / FAR < factor < FAR]
    if layers_s > 1.1 * dense_s:
        odd.append(f"the convolutions alone take {layers_s / dense_s:.2g} times the network's time")
    if not odd:
        return None
    return (
        f"times are doubtful (what networks save of what their layers save alone: {', '.join(odd)}): the device does "
        "other work, or they are too few; measure again when it is quiet, without --quick"
    )


def in_network(alone_s: Mapping[Choice, float], factors: Mapping[str, float]) -> dict[Choice, float]:
    """Seconds of a layer as each choice such that its saving is what the network saves; never below none at all, and no
    saving counts more than FAR times, whatever a busy machine makes of the factors (see :func:`doubtful`)."""
    dense = alone_s[Choice()]
    kept = {variant: min(FAR, max(-FAR, factor)) for variant, factor in factors.items()}
    return {
        choice: max(0.0, dense - (dense - seconds) * kept.get(choice.variant, 1.0))
        for choice, seconds in alone_s.items()
        if math.isfinite(seconds)
    }
