"""Which convolutions of a network are replaced, and why the others stay.

No variant is known by name here: all that is asked of one is whether N fits the channels.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import ShapeError, UsageError, some
from bgcbench.measure.batches import Images, Passing
from bgcbench.measure.trace import SHORTCUT_NAME, Call, Trace, trace
from bgcbench.results.rows import Kept, Replaced
from bgcbench.specs import Choice, as_pair

_OTHER_CONVS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# Codes of what may be solved anew where it stays: nothing is in its way, and what comes to it may change.
BY_CHOICE = {"classifier", "writes_image", "squeeze", "shortcut", "kernel", "last", "not_included", "standard",
             "indivisible", "budget"}  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """Why a convolution stays: a code that programs can rely on, and a text.

    The network does what a variant cannot follow: 'variant' (is one already), 'kind', 'own_forward', 'lazy',
    'parametrised', 'shared', 'hooked', 'extra_state', 'weight_used', 'shape_read', 'grouped', 'padding', 'bypassed',
    'type_read'. Its place speaks against it: 'first', 'reads_image', 'classifier', 'writes_image', 'squeeze',
    'shortcut', 'kernel', 'last', 'not_reached'. As asked: 'excluded', 'not_included', 'standard', 'indivisible',
    'budget'.
    """

    code: str
    text: str


class Indivisible(ShapeError):
    """N does not divide the channels of some convolutions; ``fact`` names them, and each N that would do."""

    def __init__(self, fact: str) -> None:
        self.fact = fact
        super().__init__(f"{fact}; keep them dense with on_indivisible='skip' (--skip-invalid), or use 'gcd'")


@dataclass
class Conv:
    """A convolution of the network with what is known of it. ``reason`` says why it stays; None: it is replaced."""

    name: str
    module: nn.Module
    also: tuple[str, ...] = ()
    calls: list[Call] = field(default_factory=list)
    reason: Reason | None = None
    choice: Choice = field(default_factory=Choice)


def kept_of(convs: Iterable[Conv]) -> tuple[Kept, ...]:
    """Those of ``convs`` that stay."""
    return tuple(
        Kept(name=conv.name, reason=conv.reason.text, code=conv.reason.code)
        for conv in convs
        if conv.reason is not None
    )


def nothing_to_replace(convs: Sequence[Conv], where: str) -> str:
    reasons = ", ".join(f"{kept.name}: {kept.reason}" for kept in kept_of(convs[:8])) or "it has no convolution"
    more = f", and {len(convs) - 8} more" if len(convs) > 8 else ""
    return f"nothing to replace with where='{where}' ({reasons}{more}); name convolutions with include"


def check_wrapper(model: nn.Module) -> None:
    """Refuse wrappers around a network, with what to do instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("a scripted network cannot be changed any more; convert it before torch.jit.script")
    if hasattr(model, "_orig_mod"):
        raise UsageError("this is a compiled network; convert the original one, then compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(f"this is a {type(model).__name__}; convert its .module, then wrap the result")


def checked_example(example: Any) -> Any:
    """A size as a tuple of numbers; an input as what the network is called with (see Passing.of).

    Raises UsageError for what is neither.
    """
    if isinstance(example, (list, tuple)) and len(example) == 3 and all(isinstance(side, int) for side in example):
        return tuple(example)
    if example is None or isinstance(example, dict):
        return example
    if isinstance(example, list):
        return (Images(example),)
    inputs = example if isinstance(example, tuple) else (example,)
    if any(isinstance(part, (Tensor, Images)) for part in inputs):
        return inputs
    raise UsageError(
        f"example_input is a {type(example).__name__}; pass (channels, height, width), a tensor, a tuple of the "
        "network's arguments with a tensor among them, a dict of its keywords, or a list of images"
    )


def _is_size(example: Any) -> bool:
    return isinstance(example, tuple) and all(isinstance(side, int) for side in example)


def look(model: nn.Module, example: Any, passing: Passing) -> tuple[Trace | None, list[str]]:
    """Run the network once; where it cannot be run, None and a note that says so."""
    try:
        if example is None or _is_size(example):
            return trace(model, size=example), []
        return trace(model, example=example, passing=passing), []
    except Exception as problem:
        if example is not None:
            if isinstance(problem, UsageError):
                raise
            raise does_not_run(problem) from problem
        first = first_line(problem)
        return None, [
            "the network could not be run, so shapes are unknown and shortcuts are told by their names only: "
            f"{first} (pass example_input)"
        ]


def what_to_run(found: Trace, example: Any, passing: Passing) -> tuple[Any, Passing]:
    """What the network can be run on, and how: ``example``, or random numbers of the size that it was traced with."""
    if example is not None and not _is_size(example):
        return example, passing
    return (torch.randn(1, *found.size, generator=torch.Generator().manual_seed(0)),), Passing()


def does_not_run(problem: Exception) -> UsageError:
    """What to raise where a network does not run on the input that the user gave."""
    return UsageError(f"the network does not run on its input (in eval mode): {first_line(problem)}")


def first_line(problem: BaseException) -> str:
    """What an exception says, in one line."""
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def collect(model: nn.Module, found: Trace | None) -> list[Conv]:
    """Every convolution module, in the order of execution where that is known; each once, under its first name."""
    convs: dict[int, Conv] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Conv2d, VariantConv2d, *_OTHER_CONVS)):
            continue
        if id(module) in convs:
            convs[id(module)].also += (name,)
        else:
            convs[id(module)] = Conv(name, module)
    if found is None:
        return list(convs.values())
    order: dict[str, int] = {}
    by_name = {conv.name: conv for conv in convs.values()}
    for number, call in enumerate(found.convs):
        if call.module is not None and call.module in by_name:
            order.setdefault(call.module, number)
            by_name[call.module].calls.append(call)
    return sorted(convs.values(), key=lambda conv: order.get(conv.name, len(found.convs)))


def decide(
    model: nn.Module,
    convs: list[Conv],
    found: Trace | None,
    where: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Give each convolution that stays its reason."""
    for pattern in (*include, *exclude):
        if not any(_matches(conv, [pattern]) for conv in convs):
            raise UsageError(f"no convolution of the network is called '{pattern}'{_near(pattern, convs)}")
    owners: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(name)
    selected = _kept_by_selection(model, convs, found, where)
    for conv in convs:
        hard = next(_obstacles(conv, owners, found), None)
        if _matches(conv, exclude):
            conv.reason = hard or Reason("excluded", "excluded")
        elif _matches(conv, include):
            named = any(name in include for name in (conv.name, *conv.also))
            if hard is not None and named:
                raise UsageError(f"{conv.name} cannot be replaced: {hard.text}; leave it out")
            conv.reason = hard
        else:
            conv.reason = hard or selected.get(conv.name)


def _near(name: str, convs: Iterable[Conv]) -> str:
    """What convolutions are called that are called almost so, to follow a message; nothing where none is."""
    near = difflib.get_close_matches(name, [conv.name for conv in convs], n=3, cutoff=0.3)
    return f"; there are {', '.join(near)}" if near else ""


def _identity(parameter: Tensor) -> Any:
    """What two tied parameters have in common: where their numbers are, or the object where they have none."""
    if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _obstacles(conv: Conv, owners: Mapping[Any, Sequence[str]], found: Trace | None) -> Iterator[Reason]:
    """What is in the way of replacing this convolution at all, the most fundamental first."""
    module = conv.module
    kind = type(module).__name__
    if isinstance(module, VariantConv2d):
        yield Reason("variant", f"already a {kind}")
        return
    if not isinstance(module, nn.Conv2d):
        yield Reason("kind", f"a {kind}; only Conv2d has these variants")
        return
    if _own_forward(module):
        yield Reason("own_forward", f"{kind} has a forward of its own")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        yield Reason("lazy", f"{kind} has no weight yet; run the network once")
    yield from _odd_parameters(conv, module, owners)
    extra = [*(set(module._parameters) - {"weight", "bias"}), *module._buffers, *module._modules]
    if extra:
        yield Reason("extra_state", f"it holds more than a weight and a bias ({', '.join(sorted(extra))})")
    if found is not None and conv.name in found.borrowed:
        yield Reason("weight_used", "its weight is used outside of it")
    if found is not None and conv.name in found.measured:
        yield Reason("shape_read", "its weight's shape is read outside of it")
    if module.groups != 1:
        what = "depthwise" if module.groups == module.in_channels else f"groups={module.groups}"
        yield Reason("grouped", f"already grouped ({what})")
    if _padding(module) is None:
        yield Reason("padding", f"padding='{module.padding}' is uneven for its kernel")


def _odd_parameters(conv: Conv, module: nn.Conv2d, owners: Mapping[Any, Sequence[str]]) -> Iterator[Reason]:
    for name in ("weight", "bias"):
        if name == "bias" and getattr(module, name, None) is None:
            continue
        parameter = module._parameters.get(name)
        if parameter is None or nn.utils.parametrize.is_parametrized(module, name):
            yield Reason("parametrised", f"its {name} is computed (parametrised), not stored")
            continue
        if others := [other for other in owners.get(_identity(parameter), ()) if other != conv.name]:
            yield Reason("shared", f"its {name} is shared with {', '.join(others)}")
        if getattr(parameter, "_backward_hooks", None):
            yield Reason("hooked", f"its {name} has a hook")


def _own_forward(module: nn.Conv2d) -> bool:
    kind = type(module)
    names = ("forward", "_conv_forward", "__call__", "_call_impl", "_wrapped_call_impl")
    changed = any(getattr(kind, name) is not getattr(nn.Conv2d, name) for name in names)
    return changed or any(name in vars(module) for name in names)


def _padding(module: nn.Conv2d) -> tuple[int, int] | None:
    """Padding in pixels; None where 'same' needs more on one side than on the other."""
    if module.padding == "valid":
        return (0, 0)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(side % 2 for side in total) else (total[0] // 2, total[1] // 2)
    return as_pair("padding", module.padding, 0)  # type: ignore[arg-type]  # no string any more


def _kept_by_selection(model: nn.Module, convs: Sequence[Conv], found: Trace | None, where: str) -> dict[str, Reason]:
    """Why the selection ``where`` keeps a convolution, by name; the others are replaced."""
    if where == "none":
        return {conv.name: Reason("not_included", "not included") for conv in convs}
    reasons: dict[str, Reason] = {}
    kernel = {"3x3": (3, 3), "1x1": (1, 1)}.get(where)
    families = _families(model, convs, found) if where == "auto" else {}
    usable = [conv for conv in convs if isinstance(conv.module, (nn.Conv2d, VariantConv2d))]
    first = found.convs[0].module if found and found.convs else usable[0].name if usable else ""
    for conv in usable:
        name = conv.name
        is_first = Reason("first", "the first convolution") if name == first else None
        role = next(_roles(conv, found, shortcuts=where == "all"), None)
        reason = is_first or role or families.get(name)
        if reason is None and kernel is not None and conv.module.kernel_size != kernel:
            reason = _other_kernel(conv, kernel)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _other_kernel(conv: Conv, kernel: tuple[int, int]) -> Reason:
    return Reason("kernel", f"a {_by(conv.module.kernel_size)} kernel, not {_by(kernel)}")


def _families(model: nn.Module, convs: Sequence[Conv], found: Trace | None) -> dict[str, Reason]:
    """Why the paper keeps convolutions of the families that it names, wherever such a network stands in ``model``.

    Families are told by class name (torchvision's and timm's, and subclasses): of a ResNet of bottlenecks whose 3x3 are
    not grouped only the 3x3 are replaced; MobileNetV2 and EfficientNet keep their last convolution.
    """
    reasons: dict[str, Reason] = {}
    for root, module in model.named_modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if not names & {"ResNet", "MobileNetV2", "EfficientNet"}:
            continue
        prefix = f"{root}." if root else ""
        mine = [c for c in convs if c.name.startswith(prefix) and isinstance(c.module, (nn.Conv2d, VariantConv2d))]
        if "ResNet" not in names:
            last = [conv.name for conv in mine if conv.calls]
            outside = Reason("last", "the last convolution, outside of the blocks")
            reasons |= dict.fromkeys(last[-1:] if found else (), outside)
            continue
        middle = [c.module for c in mine if isinstance(c.module, nn.Conv2d) and c.module.kernel_size == (3, 3)]
        bottlenecks = any(type(m).__name__ == "Bottleneck" for m in module.modules())
        if bottlenecks and middle and all(conv.groups == 1 for conv in middle):
            reasons |= {c.name: _other_kernel(c, (3, 3)) for c in mine if c.module.kernel_size != (3, 3)}
    return reasons


def _roles(conv: Conv, found: Trace | None, *, shortcuts: bool) -> Iterator[Reason]:
    """What this convolution is in its network that speaks for keeping it; ``shortcuts``: those do not count."""
    if found is None:
        if SHORTCUT_NAME.search(conv.name) and not shortcuts:
            yield Reason("shortcut", "a shortcut")
        return
    if not conv.calls:
        yield Reason("not_reached", "not reached by a forward pass")
    if all(call.reads_image for call in conv.calls):
        yield Reason("reads_image", "reads the image")
    if conv.name in found.heads and conv.module.kernel_size == (1, 1):
        yield Reason("classifier", "the classifier")
    if conv.name in found.heads and channels(conv.module)[1] <= 3:
        yield Reason("writes_image", "writes the image")
    if all(call.size == (1, 1) and call.pooled for call in conv.calls):
        yield Reason("squeeze", "1x1 pixels of input (squeeze-and-excitation)")
    if conv.name in found.shortcuts and not shortcuts:
        yield Reason("shortcut", "a shortcut")


def choose(convs: Iterable[Conv], choice: Choice, on_indivisible: str) -> None:
    """Make ``choice`` that of each chosen convolution, or give it its reason; raises one ShapeError that names all
    that it does not fit."""
    if choice.is_dense:
        for conv in convs:
            conv.reason = conv.reason or Reason("standard", "N = 1 is the standard convolution")
    offenders, shapes, said = [], [], choice.misfit
    for conv in convs:
        if conv.reason is not None:
            continue
        n, m = channels(conv.module)
        conv.choice = choice
        shapes.append((n, m, positions_of(conv.module)))
        if choice.unfit(*shapes[-1]) is None:
            continue
        if on_indivisible == "gcd" and choice.rank is None:
            conv.choice = replace(choice, groups=math.gcd(choice.groups, n, m))
        if on_indivisible == "raise":
            offenders.append(f"{conv.name} ({n} -> {m})")
        elif conv.choice.is_dense or conv.choice.unfit(n, m, positions_of(conv.module)):
            conv.reason = Reason("indivisible", f"{said.replace('groups', 'N')} {n} -> {m} channels")
    if offenders:
        count = f"{len(offenders)} convolutions" if len(offenders) > 1 else "a convolution"
        raise Indivisible(f"{said} the channels of {count}: {', '.join(offenders)}; {choice.fitting(shapes)}")


def follow(
    model: nn.Module, convs: list[Conv], found: Trace | None, plan: Mapping[str, Choice], exclude: tuple[str, ...]
) -> None:
    """Give each convolution the choice of ``plan``, or its reason to stay.

    Raises UsageError for names that are not there, and for what cannot be replaced; one ShapeError that names all that
    it does not fit.
    """
    known = {name for conv in convs for name in (conv.name, *conv.also)}
    if unknown := [name for name in plan if name not in known]:
        near = _near(unknown[0], convs)
        raise UsageError(f"the plan is for another network: it names {some(unknown)}, which is not there{near}")
    decide(model, convs, found, "none", tuple(name for name, each in plan.items() if not each.is_dense), exclude)
    offenders = []
    for conv in convs:
        choice = next((plan[name] for name in (conv.name, *conv.also) if name in plan), None)
        if choice is not None and choice.is_dense:
            conv.reason = Reason("standard", "the plan keeps it")
        elif choice is not None and conv.reason is None:
            conv.choice = choice
            if why := choice.unfit(*channels(conv.module), positions_of(conv.module)):
                offenders.append(f"{conv.name} as {choice.label}: {why}")
    if offenders:
        raise ShapeError(f"the plan does not fit the network: {'; '.join(offenders)}")


def stay(convs: Iterable[Conv], layers: Collection[str]) -> None:
    """Keep those that a budget leaves dense: all but ``layers``."""
    for conv in convs:
        if conv.name not in layers:
            conv.reason = Reason("budget", "no rank is worth its loss")


def refittable(convs: Sequence[Conv]) -> list[Conv]:
    """Those behind the first replaced one that stay though nothing is in their way: what comes to them may change."""
    first = next((number for number, conv in enumerate(convs) if conv.reason is None), len(convs))
    return [conv for conv in convs[first:] if conv.reason is not None and conv.reason.code in BY_CHOICE]


def positions_of(module: nn.Module) -> int:
    """K."""
    return math.prod(as_pair("kernel_size", module.kernel_size))  # type: ignore[arg-type]


def channels(module: nn.Module) -> tuple[int, int]:
    """n and m."""
    return int(module.in_channels), int(module.out_channels)  # type: ignore[arg-type]


def describe(conv: Conv) -> Replaced:
    module = conv.module
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"{conv.name} is no Conv2d")
    height, width = conv.calls[0].size if conv.calls and conv.calls[0].size else (None, None)
    padding = _padding(module) or (0, 0)
    if module.padding_mode != "zeros" and height is not None and width is not None:
        # Other paddings are an operation of their own, and what was seen to run has them in its input.
        height, width = height - 2 * padding[0], width - 2 * padding[1]
    return Replaced(
        conv.name,
        conv.also,
        module.in_channels,
        module.out_channels,
        (module.kernel_size[0], module.kernel_size[1]),
        (module.stride[0], module.stride[1]),
        padding,
        (module.dilation[0], module.dilation[1]),
        module.bias is not None,
        module.padding_mode,
        conv.choice.reduction(module.in_channels, module.out_channels, positions_of(module)),
        height,
        width,
        len(conv.calls) if conv.calls else None,
        variant=conv.choice.variant,
        rank=conv.choice.rank,
    )


def patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _matches(conv: Conv, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in (conv.name, *conv.also))


def _by(sides: Any) -> str:
    return "x".join(str(side) for side in sides)


def call_shape(call: Call) -> str:
    grouped = f", groups={call.groups}" if call.groups > 1 else ""
    return f"{call.in_channels} -> {call.out_channels}, {_by(call.kernel)}{grouped}"
