"""Replace convolutions of any network by a cheaper variant, and say what was replaced, what was kept, and why.

    converted = bgcbench.convert(torchvision.models.resnet50(weights="DEFAULT"), "bgc", 4)
    converted.model     # the network with its 3x3 convolutions replaced; the original is untouched
    converted.record    # which ones, with shapes; which were kept, with the reason

No variant is known by name here: a variant is a class that can be built from a dense kernel.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import importlib
import json
import math
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.convs.base import PROJECTIONS, VariantConv2d, is_channels_last
from bgcbench.errors import BgcbenchError, ResultFileError, ShapeError, UsageError
from bgcbench.measure.trace import SHORTCUT_NAME, Call, Size, Trace, trace, without_numbers
from bgcbench.models import build_model, identify
from bgcbench.specs import VARIANTS, WHERE, NetSpec, as_pair, check_choice, check_positive, load_layer, unfit

INITS = (*(name for name in PROJECTIONS if name != "least_squares"), "scratch")
ON_INDIVISIBLE = ("raise", "skip", "gcd")
FORMAT = "bgcbench.converted/1"

_OTHER_CONVS = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


_OWN_ATTRIBUTES = set(vars(nn.Conv2d(1, 1, 1, device="meta")))


@dataclass(frozen=True)
class Replaced:
    """One convolution that was replaced: its name, where else it hangs, its shape, and the layer that took its place.

    groups: N of this layer, which 'gcd' may have lowered. height, width: of its input, and calls: how often one forward
    pass runs it; None where the network could not be run.
    """

    name: str
    also: tuple[str, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bias: bool
    padding_mode: str
    groups: int
    height: int | None
    width: int | None
    calls: int | None


@dataclass(frozen=True)
class Kept:
    """One convolution that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Record:
    """Everything that a conversion decided; with a network like the original it can be repeated (load_converted).

    source: how :func:`bgcbench.models.build_model` makes the original network, None where it cannot. size: the input
    (channels, height, width) on which the network was run to find shapes, order and roles; None where it could not be.
    functional: convolutions that are called as functions, which no module owns and nothing here replaces.
    """

    variant: str
    groups: int
    where: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    init: str
    on_indivisible: str
    algorithm: str
    source: dict[str, Any] | None
    size: Size | None
    replaced: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    functional: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """This as plain JSON; ``replaced`` holds the names and ``layers`` the shapes."""
        text = asdict(self)
        text["layers"] = text.pop("replaced")
        text["replaced"] = [layer.name for layer in self.replaced]
        plain: dict[str, Any] = json.loads(json.dumps(text))
        return plain

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        """The record that :meth:`to_json` wrote; raises ResultFileError for anything else."""
        try:
            values = {name: stored[name] for name in cls.__dataclass_fields__ if name != "replaced"}
            layers = [{k: _as_tuple(v) for k, v in layer.items()} for layer in stored["layers"]]
            return cls(
                **{
                    **{name: _as_tuple(value) for name, value in values.items()},
                    "kept": tuple(Kept(**kept) for kept in values["kept"]),
                    "replaced": tuple(Replaced(**layer) for layer in layers),
                }
            )
        except (KeyError, TypeError, AttributeError) as problem:
            raise ResultFileError(f"this is no record of a conversion: {problem!r}") from None


@dataclass(frozen=True)
class Converted:
    """A converted network and the record of what was done to it."""

    model: nn.Module
    record: Record


@dataclass
class _Conv:
    """A convolution of the network with what is known of it. ``reason`` says why it stays; None: it is replaced."""

    name: str
    module: nn.Module
    also: tuple[str, ...] = ()
    calls: list[Call] = field(default_factory=list)
    reason: str | None = None
    groups: int = 0


def convert(
    model: nn.Module,
    variant: str,
    groups: int,
    *,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = "white",
    on_indivisible: str = "raise",
    algorithm: str = "auto",
    example_input: Tensor | Size | None = None,
    inplace: bool = False,
) -> Converted:
    """Replace convolutions of ``model`` by ``variant`` with ``groups`` groups N.

    where:
        'auto'  every convolution with groups=1, except the first one executed and what else reads the image, those
                with 1x1 pixels of input (squeeze-and-excitation), shortcuts and downsampling, a convolution that
                serves as classifier (1x1, nothing but resizing after it) or writes the image (3 channels at most), and
                what a forward pass does not reach. In the networks that the paper names
                this is what it replaces; two of its families take a rule more: of a ResNet's bottlenecks only the
                3x3, and of MobileNetV2 and EfficientNet not the last convolution, which stands outside of the blocks
        '3x3'   those of them (without the two rules) that have a 3x3 kernel
        '1x1'   the same with 1x1 kernels
        'all'   the same and shortcuts, whatever the kernel
        'none'  only what ``include`` names
    include, exclude: patterns (``layer4.*``) of module names to add to that, or to keep. A pattern that matches no
        convolution is an error; so is including one by its full name that cannot be replaced.
    init: 'copy' (the paper: weights are copied), 'white' (the closed-form optimum for uncorrelated inputs), 'scratch'
        (He initialisation).
    on_indivisible: what to do where N does not divide the channels: 'raise' a ShapeError that names each of them,
        'skip' (keep it dense) or 'gcd' (the largest N that does).
    algorithm: the form of the layers that have a choice, such as 'deployed'.
    example_input: a batch of one, or (channels, height, width), to run the network on once without numbers, which is
        how order, shapes, shortcuts and functional convolutions are found. By default a size that works.

    Replaced are ``torch.nn.Conv2d`` with groups=1. Kept with a reason: subclasses with a forward of their own,
    parametrised or tied weights, convolutions with tensors or tensor hooks of their own, those that something outside
    of the module tree refers to (a list of layers), grouped ones, everything the policy names. A module used twice is
    converted once. Training mode, device, dtype, memory format, module hooks, attributes and requires_grad are taken
    over; the global random state is left alone unless ``init='scratch'``. ``model`` is untouched unless ``inplace``.
    N = 1 is the standard convolution: nothing is replaced.

    Returns the network and the record. Raises UsageError for an unknown option or where nothing can be replaced,
    ShapeError for an N that does not divide.
    """
    _check_options(variant, groups, where, init, on_indivisible, algorithm)
    _check_wrapper(model)
    example = _checked_example(example_input)
    source = identify(model)
    found, notes = _look(model, example)
    convs = _collect(model, found)
    patterns = _patterns(include), _patterns(exclude)
    _decide(model, convs, found, where, *patterns)
    if groups == 1 or variant == "standard":
        for conv in convs:
            conv.reason = conv.reason or "N = 1 is the standard convolution"
    _divide(convs, variant, groups, on_indivisible)
    chosen = [conv for conv in convs if conv.reason is None]
    if not chosen and groups > 1 and variant != "standard":
        raise UsageError(_nothing(convs, where))

    def recorded() -> Record:
        return Record(
            variant,
            groups,
            where,
            *patterns,
            init,
            on_indivisible,
            algorithm,
            source,
            found.size if found else None,
            tuple(_describe(conv) for conv in convs if conv.reason is None),
            tuple(Kept(conv.name, conv.reason) for conv in convs if conv.reason is not None),
            tuple(f"in {call.owner or 'the network'}: {_shape(call)}" for call in found.functional) if found else (),
            tuple(notes),
        )

    record = recorded()
    if found is not None and chosen:
        for name in _still_dense(model, record, found, example):
            next(conv for conv in chosen if conv.name == name).reason = "called from outside of the module tree"
        record = recorded()
    target = model if inplace else _copied(model)
    return Converted(replay(target, record), record)


@dataclass(frozen=True)
class Candidates:
    """The convolutions of a network that :func:`convert` would replace, in the order of execution, and the others."""

    chosen: tuple[Replaced, ...]
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]


def candidates(
    model: nn.Module,
    *,
    where: str = "auto",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_input: Tensor | Size | None = None,
) -> Candidates:
    """What :func:`convert` with these options would replace, before any N is asked for (``groups`` is 1 in each).

    Raises UsageError for an unknown option or pattern and where nothing can be replaced.
    """
    check_choice("where", where, WHERE)
    _check_wrapper(model)
    found, notes = _look(model, _checked_example(example_input))
    convs = _collect(model, found)
    _decide(model, convs, found, where, _patterns(include), _patterns(exclude))
    chosen = [conv for conv in convs if conv.reason is None]
    if not chosen:
        raise UsageError(_nothing(convs, where))
    for conv in chosen:
        conv.groups = 1
    kept = tuple(Kept(conv.name, conv.reason) for conv in convs if conv.reason is not None)
    return Candidates(tuple(_describe(conv) for conv in chosen), kept, tuple(notes))


def _nothing(convs: Sequence[_Conv], where: str) -> str:
    reasons = ", ".join(f"{conv.name}: {conv.reason}" for conv in convs[:8]) or "it has no convolution"
    more = f", and {len(convs) - 8} more" if len(convs) > 8 else ""
    return f"nothing to replace with where='{where}' ({reasons}{more}); name convolutions with include"


def _check_options(variant: str, groups: int, where: str, init: str, on_indivisible: str, algorithm: str) -> None:
    check_choice("variant", variant, VARIANTS)
    check_positive("groups", groups)
    check_choice("where", where, WHERE)
    check_choice("init", init, INITS)
    check_choice("on_indivisible", on_indivisible, ON_INDIVISIBLE)
    if algorithm != "auto":
        check_choice(f"algorithm of {variant}", algorithm, VARIANTS[variant].algorithms)
    if variant == "standard" and groups != 1:
        raise ShapeError(f"a standard convolution has groups=1, not {groups}; variant 'gc' has groups")


def _check_wrapper(model: nn.Module) -> None:
    """Refuse wrappers around a network, with what to do instead."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError("a scripted network cannot be changed any more; convert it before torch.jit.script")
    if hasattr(model, "_orig_mod"):
        raise UsageError("this is a compiled network; convert the original one, then compile the result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(f"this is a {type(model).__name__}; convert its .module, then wrap the result")


def _checked_example(example: Any) -> Any:
    """A size as a tuple, an input as it is; raises UsageError for what is neither."""
    if isinstance(example, (list, tuple)) and len(example) == 3 and all(isinstance(side, int) for side in example):
        return tuple(example)
    inputs = example if isinstance(example, tuple) else (example,)
    if example is None or any(isinstance(part, Tensor) for part in inputs):
        return example
    raise UsageError(
        f"example_input is a {type(example).__name__}; pass (channels, height, width), a tensor, or a tuple of the "
        "network's arguments with a tensor among them"
    )


def _still_dense(model: nn.Module, record: Record, found: Trace, example: Any) -> list[str]:
    """Names of convolutions that the converted network does not run, because something else refers to the old ones.

    Found by converting a copy without numbers and running that (with numbers where the network needs them).
    """
    try:
        with torch.random.fork_rng(devices=[]):
            probe = copy.deepcopy(model) if found.numbers else without_numbers(model)
            again = _traced(replay(probe, replace(record, init="scratch")), example, found.size)
    except Exception:  # noqa: BLE001 - a network that only runs as it was: nothing can be said
        return []
    called = {call.module for call in again.convs if call.variant}
    names = {layer.name for layer in record.replaced if layer.calls}
    return sorted(names - called)


def _traced(model: nn.Module, example: Any, size: Size | None = None) -> Trace:
    if isinstance(example, tuple) and all(isinstance(side, int) for side in example):
        return trace(model, size=example)
    return trace(model, size=size) if example is None else trace(model, example=example)


def _look(model: nn.Module, example: Any) -> tuple[Trace | None, list[str]]:
    """Run the network once; where it cannot be run, None and a note that says so."""
    try:
        return _traced(model, example), []
    except Exception as problem:
        if example is not None:
            reason = str(problem) or type(problem).__name__
            raise UsageError(f"the network does not run on example_input (in eval mode): {reason}") from problem
        first = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        return None, [
            "the network could not be run, so shapes are unknown and shortcuts are told by their names only: "
            f"{first} (pass example_input)"
        ]


def _collect(model: nn.Module, found: Trace | None) -> list[_Conv]:
    """Every convolution module, in the order of execution where that is known; each once, under its first name."""
    convs: dict[int, _Conv] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (nn.Conv2d, VariantConv2d, *_OTHER_CONVS)):
            continue
        if id(module) in convs:
            convs[id(module)].also += (name,)
        else:
            convs[id(module)] = _Conv(name, module)
    if found is None:
        return list(convs.values())
    order: dict[str, int] = {}
    by_name = {conv.name: conv for conv in convs.values()}
    for number, call in enumerate(found.convs):
        if call.module is not None and call.module in by_name:
            order.setdefault(call.module, number)
            by_name[call.module].calls.append(call)
    return sorted(convs.values(), key=lambda conv: order.get(conv.name, len(found.convs)))


def _decide(
    model: nn.Module,
    convs: list[_Conv],
    found: Trace | None,
    where: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Give each convolution that stays its reason."""
    for pattern in (*include, *exclude):
        if not any(_matches(conv, [pattern]) for conv in convs):
            near = difflib.get_close_matches(pattern, [conv.name for conv in convs], n=3, cutoff=0.3)
            hint = f"; there are {', '.join(near)}" if near else ""
            raise UsageError(f"no convolution of the network is called '{pattern}'{hint}")
    owners: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(name)
    policy = _policy(model, convs, found, where)
    for conv in convs:
        hard = _cannot(conv, owners, found)
        if _matches(conv, exclude):
            conv.reason = hard or "excluded"
        elif _matches(conv, include):
            named = any(name in include for name in (conv.name, *conv.also))
            if hard is not None and named:
                raise UsageError(f"{conv.name} cannot be replaced: {hard}; leave it out of include")
            conv.reason = hard
        else:
            conv.reason = hard or policy.get(conv.name)


def _identity(parameter: Tensor) -> Any:
    """What two tied parameters have in common: where their numbers are, or the object where they have none."""
    if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter) or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _cannot(conv: _Conv, owners: Mapping[Any, Sequence[str]], found: Trace | None) -> str | None:
    """Why this convolution cannot be replaced, whatever is asked for; None if it can."""
    module = conv.module
    kind = type(module).__name__
    if isinstance(module, VariantConv2d):
        return f"already a {kind}"
    if not isinstance(module, nn.Conv2d):
        return f"a {kind}; only Conv2d has these variants"
    reasons: list[str | None] = [
        f"{kind} has a forward of its own" if _own_forward(module) else None,
        f"{kind} has no weight yet; run the network once"
        if isinstance(module, nn.modules.lazy.LazyModuleMixin)
        else None,
    ]
    for name in ("weight", "bias"):
        if name == "bias" and getattr(module, name, None) is None:
            continue
        parameter = module._parameters.get(name)
        if parameter is None or nn.utils.parametrize.is_parametrized(module, name):
            reasons.append(f"its {name} is computed (parametrised), not stored")
            continue
        others = [other for other in owners.get(_identity(parameter), ()) if other != conv.name]
        reasons.append(f"its {name} is shared with {', '.join(others)}" if others else None)
        reasons.append(f"its {name} has a hook" if getattr(parameter, "_backward_hooks", None) else None)
    extra = [*(set(module._parameters) - {"weight", "bias"}), *module._buffers, *module._modules]
    reasons.append(f"it holds more than a weight and a bias ({', '.join(sorted(extra))})" if extra else None)
    if found is not None and conv.name in found.borrowed:
        reasons.append("its weight is used outside of it")
    if module.groups != 1:
        depthwise = module.groups == module.in_channels
        reasons.append(f"already grouped ({'depthwise' if depthwise else f'groups={module.groups}'})")
    if _padding(module) is None:
        reasons.append(f"padding='{module.padding}' is uneven for its kernel")
    return next((reason for reason in reasons if reason is not None), None)


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


def _policy(model: nn.Module, convs: Sequence[_Conv], found: Trace | None, where: str) -> dict[str, str]:
    """Why the policy keeps a convolution, by name; what is not in it is replaced."""
    if where == "none":
        return {conv.name: "not included" for conv in convs}
    reasons: dict[str, str] = {}
    kernel = {"3x3": (3, 3), "1x1": (1, 1)}.get(where)
    families = _families(model, convs, found) if where == "auto" else {}
    usable = [conv for conv in convs if isinstance(conv.module, (nn.Conv2d, VariantConv2d))]
    first = found.convs[0].module if found and found.convs else usable[0].name if usable else ""
    for conv in usable:
        name, size = conv.name, conv.module.kernel_size
        role = "the first convolution" if name == first else _role(conv, found, shortcuts=where == "all")
        role = role or families.get(name)
        if role is not None:
            reasons[name] = role
        elif kernel is not None and size != kernel:
            reasons[name] = f"a {_by(size)} kernel, not {_by(kernel)}"
    return reasons


def _families(model: nn.Module, convs: Sequence[_Conv], found: Trace | None) -> dict[str, str]:
    """Why the paper keeps convolutions of the families that it names, wherever such a network stands in ``model``.

    Families are told by class name (torchvision's and timm's, and subclasses): of a ResNet of bottlenecks whose 3x3 are
    not grouped only the 3x3 are replaced; MobileNetV2 and EfficientNet keep their last convolution.
    """
    reasons: dict[str, str] = {}
    for root, module in model.named_modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        if not names & {"ResNet", "MobileNetV2", "EfficientNet"}:
            continue
        prefix = f"{root}." if root else ""
        mine = [c for c in convs if c.name.startswith(prefix) and isinstance(c.module, (nn.Conv2d, VariantConv2d))]
        if "ResNet" not in names:
            last = [conv.name for conv in mine if conv.calls]
            reasons |= {name: "the last convolution, outside of the blocks" for name in last[-1:] if found}
            continue
        middle = [c.module for c in mine if isinstance(c.module, nn.Conv2d) and c.module.kernel_size == (3, 3)]
        bottlenecks = any(type(m).__name__ == "Bottleneck" for m in module.modules())
        if bottlenecks and middle and all(conv.groups == 1 for conv in middle):
            others = [conv for conv in mine if conv.module.kernel_size != (3, 3)]
            reasons |= {conv.name: f"a {_by(conv.module.kernel_size)} kernel, not 3x3" for conv in others}
    return reasons


def _role(conv: _Conv, found: Trace | None, *, shortcuts: bool) -> str | None:
    """What this convolution is in its network that speaks for keeping it; ``shortcuts``: those do not count."""
    if found is None:
        return "a shortcut" if SHORTCUT_NAME.search(conv.name) and not shortcuts else None
    if not conv.calls:
        return "not reached by a forward pass"
    if all(call.reads_image for call in conv.calls):
        return "reads the image"
    pointwise, few = conv.module.kernel_size == (1, 1), _channels(conv.module)[1] <= 3
    if conv.name in found.heads and (pointwise or few):
        return "the classifier" if pointwise else "writes the image"
    if all(call.size == (1, 1) and call.pooled for call in conv.calls):
        return "1x1 pixels of input (squeeze-and-excitation)"
    return "a shortcut" if conv.name in found.shortcuts and not shortcuts else None


def _divide(convs: Iterable[_Conv], variant: str, groups: int, on_indivisible: str) -> None:
    """Set each chosen convolution's N, or its reason; raises one ShapeError that names all that N does not divide."""
    offenders = []
    for conv in convs:
        if conv.reason is not None:
            continue
        n, m = _channels(conv.module)
        conv.groups = groups
        if unfit(variant, n, m, groups) is None:
            continue
        if on_indivisible == "gcd":
            conv.groups = math.gcd(groups, n, m)
        if on_indivisible == "raise":
            offenders.append(f"{conv.name} ({n} -> {m})")
        elif conv.groups == 1 or unfit(variant, n, m, conv.groups):
            conv.reason = f"N={groups} does not divide {n} -> {m} channels"
    if offenders:
        count = f"{len(offenders)} convolutions" if len(offenders) > 1 else "a convolution"
        raise ShapeError(
            f"groups={groups} does not divide the channels of {count}: {', '.join(offenders)}; keep them dense with "
            "on_indivisible='skip' (--skip-invalid), or use 'gcd', or fewer groups"
        )


def _channels(module: nn.Module) -> tuple[int, int]:
    return int(module.in_channels), int(module.out_channels)  # type: ignore[arg-type]


def _describe(conv: _Conv) -> Replaced:
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
        conv.groups,
        height,
        width,
        len(conv.calls) if conv.calls else None,
    )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as problem:
        raise BgcbenchError(f"the network cannot be copied ({problem}); convert it with inplace=True") from problem


def replay(model: nn.Module, record: Record) -> nn.Module:
    """Do to ``model``, in place, what ``record`` says was done to a network like it; returns the converted network.

    Every replaced convolution gives way in every place where it hangs. Raises ResultFileError where ``model`` has no
    such convolution.
    """
    modules = dict(model.named_modules())
    fresh: dict[int, nn.Module] = {}
    for layer in record.replaced:
        old = modules.get(layer.name)
        if not isinstance(old, nn.Conv2d):
            raise ResultFileError(
                f"the network has no Conv2d called '{layer.name}'; it is not the one that was converted"
            )
        shape = (old.in_channels, old.out_channels, tuple(old.kernel_size), tuple(old.stride), old.bias is not None)
        if shape != (layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.bias):
            raise ResultFileError(f"'{layer.name}' has another shape than the convolution that was converted")
        fresh[id(old)] = _layer(old, layer, record)
    if id(model) in fresh:
        return fresh[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in fresh:
                module._modules[name] = fresh[id(child)]
    return model


def _layer(old: nn.Conv2d, layer: Replaced, record: Record) -> VariantConv2d:
    """The layer that takes the place of ``old``, with everything that was set on it."""
    kind: type[VariantConv2d] = load_layer(record.variant)
    options: dict[str, Any] = {"padding_mode": layer.padding_mode, "algorithm": record.algorithm}
    options |= {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if record.init == "scratch" or old.weight.is_meta:
        new = kind(
            layer.in_channels,
            layer.out_channels,
            layer.kernel,
            groups=layer.groups,
            bias=layer.bias,
            device=old.weight.device,
            dtype=old.weight.dtype,
            **options,
        )
    else:
        # Its own initialisation is overwritten, so it must not be seen in the random state.
        with torch.random.fork_rng([old.weight.device] if old.weight.is_cuda else []):
            new = kind.from_dense(old.weight.detach(), layer.groups, bias=old.bias, projection=record.init, **options)
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
    return new.train(old.training)


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _matches(conv: _Conv, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in (conv.name, *conv.also))


def _by(sides: Any) -> str:
    return "x".join(str(side) for side in sides)


def _shape(call: Call) -> str:
    grouped = f", groups={call.groups}" if call.groups > 1 else ""
    return f"{call.in_channels} -> {call.out_channels}, {_by(call.kernel)}{grouped}"


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(part) for part in value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------ saved and loaded


def save_converted(converted: Converted, path: str | PathLike[str]) -> None:
    """Write the weights, the record and the names of frozen parameters to ``path`` for :func:`load_converted`.

    The file is a ``torch.save`` of tensors and text, so it loads with ``weights_only=True``.
    """
    state = converted.model.state_dict()
    state = {name: value.detach() if isinstance(value, Tensor) else value for name, value in state.items()}
    frozen = [name for name, parameter in converted.model.named_parameters() if not parameter.requires_grad]
    record = json.dumps(converted.record.to_json())
    torch.save({"format": FORMAT, "record": record, "state_dict": state, "frozen": frozen}, path)


def load_converted(
    path: str | PathLike[str], model: nn.Module | None = None, *, map_location: Any = "cpu"
) -> nn.Module:
    """The network that :func:`save_converted` wrote, in eval mode.

    The original network is rebuilt from the record where :mod:`bgcbench.models` knows it (the paper's, torchvision's,
    timm's); for any other pass a dense one as ``model``, which is left untouched. Files made with ``torch.save`` of a
    dict with ``record`` (the Record, its ``to_json()`` or that as text) and ``state_dict`` load too.

    Only tensors and plain values are read from the file (``weights_only``), never code. Raises ResultFileError where
    the file is none of these or ``model`` is not the network that was converted.
    """
    try:
        with torch.serialization.safe_globals([Record, Replaced, Kept]):
            stored = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise ResultFileError(f"{path} is not there") from None
    except Exception as problem:  # whatever a damaged file makes the reader raise
        raise ResultFileError(f"{path} is no saved network: {str(problem).splitlines()[0][:160]}") from problem
    if not isinstance(stored, dict) or "record" not in stored:
        raise ResultFileError(f"{path} holds no 'record' of a conversion; write it with save_converted")
    state = next((stored[key] for key in ("state_dict", "state", "model") if isinstance(stored.get(key), dict)), None)
    if state is None:
        raise ResultFileError(f"{path} holds no 'state_dict'; write it with save_converted")
    record = _record_in(stored)
    if model is not None:
        base = _copied(model)
    elif record.source is not None:
        try:
            base = build_model(NetSpec(**record.source))
        except TypeError as problem:
            raise ResultFileError(f"{path} names a network that this version does not know: {problem}") from None
    else:
        raise ResultFileError(
            f"bgcbench cannot build the network of {path} by itself; pass a dense one: load_converted(path, model)"
        )
    # The weights come from the file, so nothing needs to be solved for.
    rebuilt = replay(base, replace(record, init="scratch"))
    try:
        rebuilt.load_state_dict(state, assign=True)  # with the dtypes and memory formats that were saved
    except RuntimeError as problem:
        first = " ".join(str(problem).split())[:200]
        raise ResultFileError(f"{path} does not fit the network: {first}") from None
    frozen = set(stored.get("frozen", ()))
    for name, parameter in rebuilt.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return rebuilt.to(map_location).eval() if isinstance(map_location, (str, torch.device)) else rebuilt.eval()


def _record_in(stored: Mapping[str, Any]) -> Record:
    """The record of a saved dict, in whichever of its forms."""
    record = stored["record"]
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except ValueError:
            raise ResultFileError("this is no record of a conversion: its text is no JSON") from None
    return record if isinstance(record, Record) else Record.from_json(record)


class _Callable(types.ModuleType):
    """``bgcbench.convert`` is this module's name and the public function's; it answers to both."""

    def __call__(self, *arguments: Any, **options: Any) -> Converted:
        return convert(*arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
