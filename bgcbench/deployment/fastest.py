"""Which exact algorithms make a network the fastest in ONNX Runtime: measured layer by layer, then as networks.

A layer's time depends on what stands around it: ONNX Runtime keeps channels in blocks between convolutions, and what
does not compute in blocks costs a reorder before and one behind it. So a layer is measured between two depthwise
convolutions. What wins by itself need not win together, so the network made of the winners is measured against the
one that multiplies least and the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.convs.autotune import measured
from bgcbench.convs.base import VariantConv2d
from bgcbench.deployment import onnx_file
from bgcbench.deployment.plain import chosen_algorithms, variants_in
from bgcbench.deployment.targets import OnnxTarget
from bgcbench.measure.runtime import Session

LAYERS = "layer by layer"
LEAST = "least work"
DENSE = "dense"
# One convolution is fused with what follows it in the network, which a layer by itself does not show: an algorithm of
# several nodes must take less than this share of its time.
WORTH = 0.9


def fastest_algorithms(
    model: nn.Module, args: tuple[Tensor, ...], write: Callable[[Mapping[str, str]], bytes], target: OnnxTarget
) -> tuple[dict[str, str], dict[str, float]]:
    """An algorithm for every layer of a variant in ``model``, by name, and the seconds of the networks compared.

    args: the network's inputs, whose sizes the layers are measured at. write: the ONNX file of ``model`` with the
    algorithms that it is given. The seconds are the least of several calls on ``args``.
    """
    layers = variants_in(model)
    offered = dict.fromkeys(name for layer in layers.values() for name in layer.spec.plain)
    least = chosen_algorithms(model, "auto")
    if len(offered) < 2:
        return least, {}
    if len(layers) == 1:
        candidates = {name: chosen_algorithms(model, name) for name in offered}
    else:
        mixed = _by_layer(model, layers, args, target)
        candidates = {LAYERS: mixed, LEAST: least, DENSE: chosen_algorithms(model, DENSE)}
    calls: dict[str, Callable[[], object]] = {}
    for name, algorithms in candidates.items():
        if algorithms not in [candidates[other] for other in calls]:
            session = Session(write(algorithms), target.device)
            calls[name] = session.bound({k: x.to(target.device) for k, x in zip(session.inputs, args, strict=True)})
    found = measured(lambda: calls, target.device)
    return candidates[found.form], dict(found.seconds)


def _by_layer(
    model: nn.Module, layers: Mapping[str, VariantConv2d], args: tuple[Tensor, ...], target: OnnxTarget
) -> dict[str, str]:
    """The fastest algorithm of each layer by itself; layers that are alike share a measurement."""
    inputs = _inputs(model, layers, args)
    alike: dict[Hashable, list[str]] = {}
    for name, layer in layers.items():
        sizes = tuple(tuple(weight.shape) for weight in layer.plain(layer.spec.plain[0]).parameters())
        alike.setdefault((layer.spec, layer.padding_mode, sizes, tuple(inputs[name].shape)), []).append(name)
    # Between two depthwise convolutions that leave outputs as they compute.
    ways: dict[str, dict[str, nn.Module]] = {
        names[0]: {
            algorithm: nn.Sequential(
                _pointwise(layer.in_channels), layer.plain(algorithm), _pointwise(layer.out_channels)
            )
            for algorithm in layer.spec.plain
        }
        for names in alike.values()
        for layer in (layers[names[0]],)
    }
    found: dict[str, str] = {}
    for name, sessions in _opened(ways, inputs, target):
        seconds = measured(partial(_bound, sessions, inputs[name]), target.device).seconds
        best = min(seconds, key=seconds.__getitem__)
        found[name] = best if seconds[best] < WORTH * seconds[DENSE] else DENSE
    return {name: found[names[0]] for names in alike.values() for name in names}


def fastest_layers(layers: Mapping[str, VariantConv2d], x: Tensor, target: OnnxTarget) -> Iterator[tuple[str, Session]]:
    """Each of ``layers`` in ONNX Runtime by the fastest of its algorithms on ``x``; of several ``dense`` is none.

    What ``dense`` takes is what the dense convolution takes, whatever its kernel is the kernel of.
    """
    ways = {
        name: {each: layer.plain(each) for each in layer.spec.plain if each != DENSE or len(layer.spec.plain) == 1}
        for name, layer in layers.items()
    }
    for name, sessions in _opened(ways, dict.fromkeys(ways, x), target):
        yield name, sessions[measured(partial(_bound, sessions, x), target.device).form]


def _opened(
    ways: Mapping[str, Mapping[str, nn.Module]], inputs: Mapping[str, Tensor], target: OnnxTarget
) -> Iterator[tuple[str, dict[str, Session]]]:
    """Of each layer (by name) every way to compute it on its input, in ONNX Runtime.

    All are of one export, because each takes a second however little is in it.
    """
    given = tuple(inputs[name] for name in ways)
    content = onnx_file.written(
        _Apart([list(own.values()) for own in ways.values()]),
        given,
        (
            [f"x{number}" for number in range(len(given))],
            [f"{name} {way}" for name, own in ways.items() for way in own],
        ),
        [False] * len(given),
        exporter=target.exporter,
        opset=target.opset,
    )
    for name, own in ways.items():
        yield name, {way: Session(onnx_file.part_of(content, f"{name} {way}"), target.device) for way in own}


def _bound(sessions: Mapping[str, Session], x: Tensor) -> dict[str, Callable[[], object]]:
    return {name: session.bound({session.inputs[0]: x.to(session.device)}) for name, session in sessions.items()}


class _Apart(nn.Module):
    """Modules side by side: those of each list on an input of their own."""

    def __init__(self, made: list[list[nn.Module]]) -> None:
        super().__init__()
        self.made = nn.ModuleList(map(nn.ModuleList, made))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        made: Any = self.made
        return [way(x) for ways, x in zip(made, inputs, strict=True) for way in ways]


def _pointwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 1, groups=channels, bias=False)


def _inputs(model: nn.Module, layers: Mapping[str, nn.Module], args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What each layer is called with first."""
    found: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(name, (given[0] if given else named["input"]).clone())

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(see, name), with_kwargs=True))
        model(*(arg.clone() for arg in args))
    return found
