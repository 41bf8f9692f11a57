"""What a conversion did to a network, and doing it again.

A record names every convolution that gave way and the shape of what took its place; :func:`replay` does to a network
like the original what the record says. Which convolutions those are is decided in :mod:`bgcbench.conversion.selection`.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.layouts import is_channels_last
from bgcbench.errors import BgcbenchError, ResultFileError
from bgcbench.measure.counts import Counts, count
from bgcbench.measure.trace import without_numbers
from bgcbench.results.rows import Record, Replaced
from bgcbench.specs import SOLVED, Choice, ConvSpec, load_layer

NAMED = 5  # convolutions that are named for each reason to keep them
SCRATCH = "scratch"

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_TAKEN_OVER = ("stride", "padding", "dilation", "padding_mode", "algorithm", "rank")
_OWN_ATTRIBUTES = set(vars(nn.Conv2d(1, 1, 1, device="meta")))


@dataclass(frozen=True, repr=False)
class Converted:
    """A converted network and the record of what was done to it; printed, a summary of that."""

    model: nn.Module
    record: Record

    def __str__(self) -> str:
        layers, kept = self.record.layers, self.record.kept
        labels = Counter(own_choice(layer).label for layer in layers)
        shown = ", ".join(f"{times} as {label}" for label, times in labels.items())
        lines = [f"{len(layers)} of {len(layers) + len(kept)} convolutions replaced{': ' * bool(shown)}{shown}"]
        if layers:
            before, after = (
                [sum(numbers) for numbers in zip(*(counted(layer, choice(layer)) for layer in layers), strict=True)]
                for choice in (lambda _: Choice(), own_choice)
            )
            macs = all(layer.height and layer.width for layer in layers)
            said = [f"parameters {before[0]:,} -> {after[0]:,}", f"MACs of an image {before[1]:,} -> {after[1]:,}"]
            lines.append(f"of these: {', '.join(said[: 1 + macs])}")
        told: dict[str, list[str]] = {}
        for each in kept:
            told.setdefault(f"kept, {each.reason}", []).append(each.name)
        if (calibration := self.record.calibration) and calibration.refitted:
            told["of the kept, solved anew"] = [layer.name for layer in calibration.refitted]
        for what, names in told.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{what}: {', '.join(names[:NAMED])}{more}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.record.notes)])

    __repr__ = __str__


def own_choice(layer: Replaced) -> Choice:
    """What a convolution has become."""
    return Choice(layer.variant, rank=layer.rank) if layer.rank else Choice(layer.variant, layer.groups)


def counted(layer: Replaced, choice: Choice) -> tuple[int, int]:
    """Parameters (biases apart) and MACs of one image, of a convolution as ``choice``."""
    spec = spec_of(replace(layer, variant=choice.variant, groups=choice.groups, rank=choice.rank, bias=False))
    least = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel, strict=True)]  # where no size is known
    found: Counts = count(spec, layer.height or least[0], layer.width or least[1])
    return found.params, found.macs * (layer.calls or 1)


def copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as problem:
        raise BgcbenchError(f"the network cannot be copied ({problem}); convert it with inplace=True") from problem


def replay(model: nn.Module, record: Record, *, weights: bool = True) -> nn.Module:
    """Do to ``model``, in place, what ``record`` says was done to a network like it; returns the converted network.

    What earlier conversions did is done too, unless it is there already. See :func:`put_in`.
    """
    modules = dict(model.named_modules())
    missing = [layer for layer in record.earlier if origin_of(modules.get(layer.name)) is None]
    return put_in(model, [*missing, *record.layers], weights=weights)


def put_in(model: nn.Module, layers: Iterable[Replaced], *, weights: bool = True) -> nn.Module:
    """Put ``layers`` in the place of the convolutions of the same names, wherever these hang, in place.

    weights: whether they get theirs from the convolutions; without, they are to be loaded, and have random ones.
    Returns the network. Raises ResultFileError where ``model`` has no such convolution.
    """
    modules = dict(model.named_modules())
    fresh: dict[int, nn.Module] = {}
    for layer in layers:
        old = modules.get(layer.name)
        if not isinstance(old, nn.Conv2d):
            raise ResultFileError(
                f"the network has no Conv2d called '{layer.name}'; it is not the one that was converted"
            )
        shape = (old.in_channels, old.out_channels, tuple(old.kernel_size), tuple(old.stride), old.bias is not None)
        if shape != (layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.bias):
            raise ResultFileError(f"'{layer.name}' has another shape than the convolution that was converted")
        fresh[id(old)] = _layer(old, layer, weights=weights)
    return exchanged(model, fresh)


def exchanged(model: nn.Module, fresh: Mapping[int, nn.Module]) -> nn.Module:
    """``model`` with the modules that ``fresh`` has another for, by id, exchanged wherever they hang, in place."""
    if id(model) in fresh:
        return fresh[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in fresh:
                module._modules[name] = fresh[id(child)]
    return model


def spec_of(layer: Replaced) -> ConvSpec:
    """The layer that takes the place of the convolution."""
    geometry = layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias
    return ConvSpec(layer.variant, layer.in_channels, layer.out_channels, *geometry, layer.algorithm, layer.rank)


def origin_of(module: nn.Module | None) -> tuple[Replaced, nn.Conv2d] | None:
    """What a layer that a conversion made has replaced: the record and the convolution, without numbers."""
    return getattr(module, "_bgcbench_origin", None)


def reverted(model: nn.Module) -> nn.Module:
    """A copy without numbers in which what conversions have replaced is back in its place."""
    copy_ = without_numbers(model)
    origins = {id(module): origin for module in copy_.modules() if (origin := origin_of(module)) is not None}
    return exchanged(copy_, {number: conv for number, (_, conv) in origins.items()})


def _layer(old: nn.Conv2d, layer: Replaced, *, weights: bool) -> VariantConv2d:
    """The layer that takes the place of ``old``, with everything that was set on it."""
    kind: type[VariantConv2d] = load_layer(layer.variant)
    init = layer.init if weights else SCRATCH
    # Initialisation that is overwritten must not be seen in the random state.
    unseen = torch.random.fork_rng([old.weight.device] if old.weight.is_cuda else [])
    if init in (SCRATCH, *SOLVED) or old.weight.is_meta:
        with contextlib.nullcontext() if init == SCRATCH and weights else unseen:
            options: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = kind.of(spec_of(layer), padding_mode=layer.padding_mode, **options)
            if init in SOLVED and new.bias is not None and old.bias is not None:
                with torch.no_grad():  # the weights come later, and what is added to the bias with them
                    new.bias.copy_(old.bias)
    else:
        with unseen:
            options = {name: getattr(layer, name) for name in _TAKEN_OVER}
            new = kind.from_dense(old.weight.detach(), layer.groups, bias=old.bias, projection=init, **options)
    for name, parameter in new.named_parameters():
        like = old.bias if name == "bias" and old.bias is not None else old.weight
        parameter.requires_grad_(like.requires_grad)
    if is_channels_last(old.weight):
        new.to(memory_format=torch.channels_last)
    for hooks in _HOOKS:
        if hooks in vars(old):
            setattr(new, hooks, getattr(old, hooks))  # the same dictionary, so that a hook's handle still removes it
    for name, value in vars(old).items():  # what people hang onto a module
        if not name.startswith("_") and name not in _OWN_ATTRIBUTES:
            setattr(new, name, value)
    new._bgcbench_origin = layer, _bare(old)  # type: ignore[assignment]
    return new.train(old.training)


def _bare(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy without numbers and hooks."""
    bare = copy.copy(conv)
    bare._parameters = {
        name: None if value is None else nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        for name, value in conv._parameters.items()
    }
    fresh = vars(nn.Module())
    for hooks in _HOOKS:
        setattr(bare, hooks, fresh[hooks])
    return bare


def record_in(stored: Mapping[str, Any]) -> Record:
    """The record of a saved dict, in whichever of its forms."""
    record = stored["record"]
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except ValueError:
            raise ResultFileError("this is no record of a conversion: its text is no JSON") from None
    return record if isinstance(record, Record) else Record.from_json(record)
