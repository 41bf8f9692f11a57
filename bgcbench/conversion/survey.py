"""What one image shows of a network: which constants its norms take away, and how much is held at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bgcbench.conversion.layer_moments import on_input
from bgcbench.measure.batches import tensors_of

Norm = nn.modules.batchnorm._BatchNorm

# Operations after which a constant in each channel is still a constant in each channel, and of no other effect.
_KEEPS = {
    "add", "add_", "alias", "cat", "clone", "contiguous", "detach", "_to_copy", "max_pool2d_with_indices", "slice",
    "split", "split_with_sizes", "narrow",
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """absorbed: convolutions of whose outputs a constant in each channel is taken away by norms, wherever it goes.
    norms: for those whose output goes into one norm and nowhere else, that norm. live_bytes: the most that is held at
    any time when a module with numbers begins, for each image. calls: how often the convolutions and norms have run."""

    absorbed: frozenset[str]
    norms: dict[str, str]
    live_bytes: int
    calls: Counter[str]


def is_norm(module: nn.Module) -> bool:
    """Whether this is batch norm with running statistics."""
    return isinstance(module, Norm) and module.running_mean is not None and module.running_var is not None


def survey(model: nn.Module, convs: Collection[str], run: Callable[[], Any]) -> Survey:
    """Watch the outputs of the modules named ``convs`` while ``run`` runs ``model``, in eval mode, on one image."""
    watch = _Watch()
    handles = []
    for name, module in model.named_modules():
        if name in convs:
            handles.append(module.register_forward_hook(watch.begins(name), prepend=True))
        if is_norm(module):
            handles.append(on_input(module, partial(watch.enters, name)))
            handles.append(module.register_forward_hook(watch.leaves))
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(watch.weighs))
    try:
        with torch.no_grad(), watch:
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    for value in tensors_of(output):
        watch.fails |= watch.labels.get(value, set())
    seen = watch.begun - watch.fails
    norms = {name: next(iter(users)) for name, users in watch.users.items() if name in seen and len(users) == 1}
    taken = list(norms.values())
    single = {name: norm for name, norm in norms.items() if norm and taken.count(norm) == 1}
    return Survey(frozenset(seen), single, watch.most, watch.calls)


class _Watch(TorchDispatchMode):
    """Follows the outputs of convolutions through the operations of one forward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels: Any = WeakIdKeyDictionary()  # tensor -> names of the convolutions whose constants are in it
        self.sizes: Any = WeakIdKeyDictionary()  # storage -> bytes
        self.begun: set[str] = set()
        self.fails: set[str] = set()
        self.users: dict[str, set[str]] = {}  # convolution -> norms that take its output as it is; "" is anything else
        self.own: Any = WeakIdKeyDictionary()  # tensor -> the convolution whose very output it is
        self.norm: tuple[str, Tensor] | None = None
        self.most = 0
        self.calls: Counter[str] = Counter()

    def begins(self, name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.calls[name] += 1
            if name in self.begun:  # called again: its output has gone two ways
                self.users.setdefault(name, set()).add("")
            self.begun.add(name)
            self.labels[output] = {name}
            self.own[output] = name

        return hook

    def enters(self, name: str, x: Tensor) -> None:
        self.calls[name] += 1
        self.norm = name, x

    def leaves(self, *_: Any) -> None:
        self.norm = None

    def weighs(self, *_: Any) -> None:
        self.most = max(self.most, sum(self.sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        output = func(*args, **kwargs)
        made = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        for value in made:
            storage = value.untyped_storage()
            self.sizes[storage] = storage.nbytes()
        operation = func._schema.name.removeprefix("aten::")
        norm = self.norm if "batch_norm" in operation else None
        carried: set[str] = set()
        for value in given:
            labels = self.labels.get(value, set())
            taken = norm is not None and value is norm[1]
            if (source := self.own.get(value)) is not None:
                self.users.setdefault(source, set()).add(norm[0] if taken and norm is not None else "")
            if operation in _KEEPS:
                carried |= labels
            elif not taken:
                self.fails |= labels
        for value in made if carried else ():
            self.labels[value] = carried
        return output
