"""Trace a network on one image: its convolutions in the order in which they run, with shapes, counts and roles.

The network is run once as a copy without numbers (on the meta device), so that nothing of it changes, and in eval
mode. A TorchFunctionMode sees every operation: convolutions called as functions too, and the additions that tell a
shortcut from a branch.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bgcbench.measure.batches import Passing, copied_to, reference_of, tensors_of
from bgcbench.measure.counts import count
from bgcbench.specs import ConvSpec

Size = tuple[int, int, int]  # (channels, height, width)
IMAGE_CHANNELS = 4  # RGB and one more
FALLBACK_SIDES = (224, 32, 299, 64)  # input sizes to try where the network does not say its own

_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_POOLS = {
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean", "amax", "sum", "logsumexp",
}  # fmt: skip
_GATES = {"mul", "__mul__", "__imul__", "mul_", "__rmul__", "cat", "concat", "concatenate"}
# What may be asked of a weight without computing with it, and what of that a variant answers differently.
_METADATA = {
    "__get__", "size", "dim", "numel", "nelement", "stride", "is_contiguous", "data_ptr", "element_size", "type",
}  # fmt: skip
_SHAPE = {"size", "numel", "nelement", "stride"}
_SHAPE_PROPERTY = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm"}
_UNCOUNTED = {
    "matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    "multi_head_attention_forward", "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "bilinear",
}  # fmt: skip
SHORTCUT_NAME = re.compile(r"(^|[._])(downsample|shortcut|skip|identity)([._]|$)")


class _History(NamedTuple):
    """What a tensor has come through, kept on the tensor itself, as long as it lives.

    passed: the convolutions. pooled: whether it has one value a channel that speaks for the whole image; None where
    nothing is known. heads: the convolutions of which the output is only reshaped, pooled, resized or activated so far.
    """

    passed: frozenset[str] = frozenset()
    pooled: bool | None = None
    heads: frozenset[str] = frozenset()


def _history(tensor: Tensor) -> _History:
    found: _History = getattr(tensor, "_bgcbench_history", _History())
    return found


@dataclass(frozen=True)
class Call:
    """One convolution or fully connected layer as it ran, for one image.

    module: its name, or None where a function was called; owner: the innermost module around it. size: input (height,
    width) of a convolution, None of a linear layer. pooled: whether its input has been pooled over all of its pixels.
    reads_image: whether nothing has been convolved before it and its input has an image's few channels. weights:
    numbers of its kernel and bias. variant: whether it is one of this package's layers.
    """

    kind: str  # "conv" or "linear"
    module: str | None
    owner: str
    in_channels: int
    out_channels: int
    macs: int
    weights: int
    values_in: int
    values_out: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    size: tuple[int, int] | None = None
    pooled: bool = False
    reads_image: bool = False
    variant: bool = False


@dataclass
class Trace:
    """A network's calls in order, on an input of ``size``, and what they say about its convolutions.

    shortcuts: convolutions that are one whole side of a residual addition, or named so. heads: those whose output
    leaves the network with no norm, product, addition or other layer after it. borrowed: those whose weight is used
    outside of their own forward. measured: those whose weight's shape is read there. uncounted: operations with
    products that are in no count, by name. numbers: whether the network had to be run with numbers.
    """

    size: Size
    calls: list[Call] = field(default_factory=list)
    shortcuts: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    borrowed: set[str] = field(default_factory=set)
    measured: set[str] = field(default_factory=set)
    uncounted: Counter[str] = field(default_factory=Counter)
    numbers: bool = False

    @property
    def convs(self) -> list[Call]:
        return [call for call in self.calls if call.kind == "conv"]

    @property
    def functional(self) -> list[Call]:
        """Convolutions that no module owns."""
        return [call for call in self.convs if call.module is None]

    @property
    def macs(self) -> int:
        """Multiply-adds of one image in convolutions and fully connected layers, as executed."""
        return sum(call.macs for call in self.calls)

    @property
    def outputs(self) -> int:
        """Values that these layers put out for one image: what a training step at least holds."""
        return sum(call.values_out for call in self.calls)

    @property
    def values_moved(self) -> int:
        """Values that these layers at least read and write for one image, weights apart."""
        return sum(call.values_in + call.values_out for call in self.calls)


def is_variant(module: nn.Module) -> bool:
    """Whether ``module`` is one of this package's layers (told by its spec; layers stand above this module)."""
    return isinstance(getattr(module, "spec", None), ConvSpec)


def trace(model: nn.Module, size: Size | None = None, example: Any = None, passing: Passing | None = None) -> Trace:
    """Run ``model`` once and record its calls.

    size: (channels, height, width) of its input; or ``example``, what ``passing`` runs it on. Without either the size
    is the one a timm model names, or the first that works of 224, 32, 299 and 64 pixels, with the channels of the first
    convolution. Without numbers where possible, else on a real copy. Raises the last error if nothing worked.
    """
    passing = passing or Passing()
    failure: Exception = RuntimeError("the network has no convolution to find the input's channels by")
    inputs = [example] if example is not None else [torch.Size((1, *shape)) for shape in _sizes(model, size)]
    # Hooks of the user's are left out, unless the network does not run without them.
    ways = ((without_numbers, False), (copy.deepcopy, False), (without_numbers, True))
    for make_copy, hooks in ways:
        for given in inputs:
            try:
                found = _run(make_copy(model), given, passing, hooks=hooks)
                found.numbers = make_copy is copy.deepcopy
                return found
            except Exception as error:  # noqa: BLE001 - whatever a network's forward raises: the next way is tried
                failure = error
    raise failure


def _sizes(model: nn.Module, size: Size | None) -> Iterator[Size]:
    if size is not None:
        yield size
        return
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)  # timm's
    if isinstance(config, dict) and len(config.get("input_size", ())) == 3:
        yield tuple(config["input_size"])
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d) or is_variant(m)), None)
    if first is not None:
        channels = int(first.in_channels)  # type: ignore[arg-type]
        yield from ((channels, side, side) for side in FALLBACK_SIDES)


def without_numbers(model: nn.Module) -> nn.Module:
    """A copy with the same structure and no numbers; the memory of the original is not doubled."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for module in model.modules():
        plain = (value for value in vars(module).values() if isinstance(value, Tensor))  # weight_norm's, and people's
        for tensor in (*module._buffers.values(), *plain):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta", requires_grad=False)
    return copy.deepcopy(model, memo)


def _run(model: nn.Module, given: Any, passing: Passing, *, hooks: bool) -> Trace:
    if not hooks:
        clear_hooks(model)
    model.eval()
    batch = (torch.zeros(given),) if isinstance(given, torch.Size) else given
    shapes = (value.shape for value in tensors_of(batch))
    shape = next((shape for shape in shapes if len(shape) >= 3), reference_of(model).shape)
    recorder, given = _Recorder(model, tuple(shape[-3:])), copied_to(batch, model)
    with torch.no_grad(), warnings.catch_warnings(), recorder:
        warnings.simplefilter("ignore")  # the network warns its user when its user runs it
        output = passing.call(model, given)
    return recorder.finished(output)


def clear_hooks(model: nn.Module) -> None:
    """Take the user's hooks off a copy, but not those that its own forward needs."""
    for module in model.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if not _computes_weight(module, kind):
                getattr(module, kind).clear()


def _computes_weight(module: nn.Module, kind: str) -> bool:
    """Whether the module's own forward needs the hook: weight_norm, spectral_norm and pruning do."""
    return kind == "_forward_pre_hooks" and "weight" not in module._parameters and hasattr(module, "weight")


class _Recorder(TorchFunctionMode):
    """Sees every torch function while the network runs."""

    def __init__(self, model: nn.Module, size: Any) -> None:
        super().__init__()
        self.found = Trace(size)
        self.stack: list[tuple[str, nn.Module]] = []
        self.owners: dict[int, str] = {}  # of each convolution's weight
        self.inputs_of: dict[str, frozenset[str]] = {}
        self.kernels: dict[str, tuple[int, int]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and "weight" in module._parameters:
                self.owners[id(module.weight)] = name
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(partial(self._leave, name), with_kwargs=True)

    def _enter(self, name: str, module: nn.Module, arguments: Any) -> None:
        self.stack.append((name, module))

    def _leave(self, name: str, module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        self.stack.pop()
        if is_variant(module) and isinstance(output, Tensor):
            self._variant(name, module, arguments[0] if arguments else options["input"], output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        name = getattr(func, "__name__", "")
        tensors = list(tensors_of((args, given)))
        passed = _passed(tensors)
        if self.stack and is_variant(self.stack[-1][1]):
            pass  # counted as a whole when it is left
        elif name == "conv2d":
            passed |= {self._conv(args, given, out, passed)}
        elif name == "linear":
            self._linear(args, given, out)
        elif name in _ADDITIONS and len(tensors) >= 2:
            self._addition(*(_passed([tensor]) for tensor in tensors[:2]))
        elif name in _UNCOUNTED:
            self.found.uncounted[name] += 1
        if name not in _METADATA:
            self.found.borrowed |= self._foreign(tensors)
        elif name in _SHAPE or func == _SHAPE_PROPERTY:
            self.found.measured |= self._foreign(tensors)
        history = _History(passed, self._pooled(name, tensors, out), self._heads(name, tensors))
        for tensor in tensors_of(out):
            tensor._bgcbench_history = history  # type: ignore[attr-defined]
        return out

    def _foreign(self, tensors: Sequence[Tensor]) -> set[str]:
        """The convolutions whose weight is among ``tensors`` although another module runs."""
        current = self.stack[-1][0] if self.stack else None
        return {o for tensor in tensors if (o := self.owners.get(id(tensor))) is not None and o != current}

    def _heads(self, name: str, tensors: Sequence[Tensor]) -> frozenset[str]:
        if name == "conv2d":
            last = self.found.calls[-1].module if self.found.calls else None
            return frozenset() if last is None else frozenset({last})
        if name == "linear" or name in _NORMS or name in _ADDITIONS or name in _GATES:
            return frozenset()
        return frozenset().union(*(_history(tensor).heads for tensor in tensors))

    def _pooled(self, name: str, tensors: Sequence[Tensor], out: Any) -> bool:
        if name in _POOLS and isinstance(out, Tensor) and tensors and tensors[0].dim() in (3, 4):
            return out.numel() == tensors[0].shape[0] * tensors[0].shape[1]
        seen = [_history(tensor).pooled for tensor in tensors]
        known = [value for value in seen if value is not None]  # weights and constants have no history
        return bool(known) and all(known)

    def _conv(self, args: Sequence[Any], given: dict[str, Any], out: Tensor, passed: frozenset[str]) -> str:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        values: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        values |= dict(zip(names, args, strict=False)) | given
        x, weight = values["input"], values["weight"]
        owner, module = self.stack[-1] if self.stack else ("", None)
        kernel, dilation, padding = weight.shape[2:], _pair(values["dilation"]), values["padding"]
        if isinstance(padding, str):
            same = padding == "same"
            padding = tuple(d * (k - 1) // 2 if same else 0 for d, k in zip(dilation, kernel, strict=True))
        images = _images(x, 4)
        call = Call(
            kind="conv",
            module=owner if isinstance(module, nn.Conv2d) else None,
            owner=owner,
            in_channels=x.shape[-3],
            out_channels=weight.shape[0],
            macs=out.numel() // images * weight[0].numel(),
            weights=weight.numel() + (0 if values["bias"] is None else weight.shape[0]),
            values_in=x.numel() // images,
            values_out=out.numel() // images,
            kernel=tuple(kernel),
            stride=_pair(values["stride"]),
            padding=_pair(padding),
            dilation=dilation,
            groups=values["groups"],
            bias=values["bias"] is not None,
            size=_pair(x.shape[-2:]),
            pooled=bool(_history(x).pooled),
            reads_image=not passed and x.shape[-3] <= IMAGE_CHANNELS,
        )
        return self._remember(call, passed)

    def _variant(self, name: str, module: Any, x: Tensor, out: Tensor) -> None:
        """A layer of this package, by its own formula; its groups, where learnt, are counted as balanced."""
        spec: ConvSpec = module.spec
        size, images = _pair(x.shape[-2:]), _images(x, 4)
        counts = count(spec, *size)
        call = Call(
            kind="conv",
            module=name,
            owner=name,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            macs=counts.macs,
            weights=counts.params,
            values_in=x.numel() // images,
            values_out=out.numel() // images,
            kernel=_pair(spec.kernel_size),
            stride=_pair(spec.stride),
            padding=_pair(spec.padding),
            dilation=_pair(spec.dilation),
            groups=spec.groups,
            bias=spec.bias,
            size=size,
            pooled=bool(_history(x).pooled),
            variant=True,
        )
        passed = _history(x).passed
        after = _history(out)._replace(passed=passed | {self._remember(call, passed)})
        out._bgcbench_history = after  # type: ignore[attr-defined]

    def _linear(self, args: Sequence[Any], given: dict[str, Any], out: Tensor) -> None:
        values: dict[str, Any] = dict(zip(("input", "weight", "bias"), args, strict=False)) | given
        x, weight, bias = values["input"], values["weight"], values.get("bias")
        owner = self.stack[-1][0] if self.stack else ""
        images = _images(x, 2)
        macs = out.numel() * weight.shape[-1] // images
        weights = weight.numel() + (0 if bias is None else bias.numel())
        sizes = x.numel() // images, out.numel() // images
        self.found.calls.append(Call("linear", owner, owner, weight.shape[-1], weight.shape[0], macs, weights, *sizes))

    def _remember(self, call: Call, passed: frozenset[str]) -> str:
        """What stands for the convolution in histories: its module's name, or its number where it has no module."""
        self.found.calls.append(call)
        token = f"function {len(self.found.calls)}" if call.module is None else call.module
        self.inputs_of[token], self.kernels[token] = passed, call.kernel
        return token

    def _addition(self, left: frozenset[str], right: frozenset[str]) -> None:
        """One 1x1 convolution on one side and a longer branch from the same place on the other: a shortcut."""
        for side, other in ((left - right, right - left), (right - left, left - right)):
            if len(side) != 1 or len(other) < 2:
                continue
            (token,) = side
            start = self.inputs_of.get(token)
            from_same = any(self.inputs_of.get(branch) == start for branch in other)
            if self.kernels.get(token) == (1, 1) and from_same and not token.startswith("function "):
                self.found.shortcuts.add(token)

    def finished(self, output: Any) -> Trace:
        found = self.found
        found.shortcuts |= {call.module for call in found.convs if call.module and SHORTCUT_NAME.search(call.module)}
        if len({call.module for call in found.convs}) > 1:  # a convolution alone is no head of anything
            found.heads = set().union(*(_history(tensor).heads for tensor in tensors_of(output)))
        return found


def _passed(tensors: Iterable[Tensor]) -> frozenset[str]:
    """The convolutions that any of ``tensors`` has come through."""
    return frozenset().union(*(_history(tensor).passed for tensor in tensors))


def _images(x: Tensor, batched: int) -> int:
    """Images in ``x``, which has ``batched`` dimensions or more where it is a batch; at least 1, to divide by."""
    return max(x.shape[0], 1) if x.dim() >= batched else 1


def _pair(value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    return (int(pair[0]), int(pair[-1]))
