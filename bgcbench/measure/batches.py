"""What a network is given: batches of any kind, passed as its forward takes them, copied for every run.

A loader's batch may be a tensor, a tuple or list (inputs, then labels), a dict, or a list of images of different sizes.
``Passing`` turns one into what the network is called with; ``take`` picks images out of that.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bgcbench.errors import UsageError

Forward = Callable[[nn.Module, Any], Any]


class Images(list[Tensor]):
    """Images (C, H, W), perhaps of different sizes: the one argument of networks for detection."""


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Passing:
    """How the batches of one loader reach a network.

    forward: called as forward(model, batch) with each batch as the loader made it, on the network's device; by default
    the network is called with the batch: a tensor as its argument, the elements of a tuple or list as its positional
    arguments, as many as its forward requires (what follows are labels), a mapping as its keywords, those that its
    forward has. A list of images (C, H, W) is one argument. notes: what the user should know of that.
    """

    def __init__(self, forward: Forward | None = None) -> None:
        self.forward = forward
        self.notes: list[str] = []

    def of(self, batch: Any, model: nn.Module) -> Any:
        """What of ``batch`` the network is called with: positional arguments as a tuple, keywords as a dict.

        With a forward of the user's the batch itself. Raises UsageError for what is no batch.
        """
        if self.forward is not None:
            return batch
        if isinstance(batch, Tensor):
            return (batch,)
        if isinstance(batch, Mapping):
            return self._keywords(batch, model)
        if isinstance(batch, (tuple, list)) and batch:
            return (Images(batch),) if _are_images(batch) else self._arguments(batch, model)
        raise UsageError(
            f"a batch is a {type(batch).__name__}; pass tensors (B, C, H, W), tuples that begin with the network's "
            "inputs, dicts of its keywords, or forward_fn=lambda model, batch: model(...)"
        )

    def _arguments(self, batch: Sequence[Any], model: nn.Module) -> tuple[Any, ...]:
        taken = max(1, _required(model))
        left = [part for part in batch[taken:] if isinstance(part, Tensor) and part.dim() > 1 and not _is_label(part)]
        if left:
            self._note(
                f"of each batch the first {taken} of {len(batch)} parts went into the network, as many as its forward "
                "requires; pass forward_fn to give it more"
            )
        return tuple(Images(part) if _are_images(part) else part for part in batch[:taken])

    def _keywords(self, batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return dict(batch)
        names = [parameter.name for parameter in parameters]
        chosen = {key: value for key, value in batch.items() if key in names}
        if not chosen:
            raise UsageError(
                f"a batch has {', '.join(map(str, batch))}, and the network's forward takes {', '.join(names)}; pass "
                "forward_fn=lambda model, batch: model(...)"
            )
        if left := sorted(set(batch) - set(names)):
            self._note(f"not an argument of the network's forward, and left out: {', '.join(left)}")
        return chosen

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Run ``model`` on a copy of what :meth:`of` made of a batch, on its device and in its floating-point type.

        Copied, because a network may work in place on its input. Raises UsageError where the call does not fit.
        """
        return self.call(model, copied_to(batch, model))

    def call(self, model: nn.Module, given: Any) -> Any:
        """Run ``model`` on ``given`` itself."""
        try:
            if self.forward is not None:
                return self.forward(model, given)
            return model(**given) if isinstance(given, dict) else model(*given)
        except TypeError as problem:
            how = "forward_fn" if self.forward is not None else "a batch of this kind"
            raise UsageError(
                f"the network cannot be called with {how} ({str(problem).splitlines()[0]}); pass "
                "forward_fn=lambda model, batch: model(...)"
            ) from problem


def count_images(batch: Any) -> int | None:
    """How many images there are in what :meth:`Passing.of` made; None where it cannot be taken apart safely.

    It can where it is made of tensors that agree in their first dimension, and of ``Images``.
    """
    lengths = set(_lengths(batch))
    return lengths.pop() if len(lengths) == 1 else None


def take(batch: Any, images: Sequence[int]) -> Any:
    """Those of the images of a batch with these numbers; it must be one that count_images can count."""

    def taken(value: Any) -> Any:
        if isinstance(value, Images):
            return Images(value[number] for number in images)
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[torch.as_tensor(images, device=value.device)]

    return tree_map(taken, batch)


def first_image(batch: Any) -> Any:
    """A batch of the first image alone, or the whole where it cannot be divided."""
    return take(batch, [0]) if count_images(batch) else batch


def copied_to(batch: Any, model: nn.Module) -> Any:
    """A copy of ``batch`` where the network is, its floating-point tensors in the network's type."""
    reference = reference_of(model)

    def copied(value: Any) -> Any:
        if isinstance(value, Images):
            return Images(copied(image) for image in value)
        if not isinstance(value, Tensor):
            own = copy.deepcopy(value)
            return own.to(reference.device) if hasattr(own, "to") else own  # what libraries wrap tensors in
        floats = value.is_floating_point() and reference.is_floating_point()
        return value.to(reference.device, reference.dtype if floats else None, copy=True)

    return tree_map(copied, batch)


def reference_of(model: nn.Module) -> Tensor:
    """A tensor of the network, for its device and type; an empty one where it has none."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    return reference_of(model).device


def tensors_of(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and transformers' outputs, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors_of(list(values.values()))
    elif hasattr(values, "to_tuple"):
        yield from tensors_of(values.to_tuple())
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_of(value)


def input_bytes(batch: Any) -> int:
    """Memory of all tensors of a batch."""
    return sum(tensor.nbytes for tensor in tensors_of(batch))


def _required(model: nn.Module) -> int:
    """How many positional arguments the network's forward cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in _POSITIONAL and p.default is inspect.Parameter.empty for p in parameters)


def _are_images(values: Any) -> bool:
    """Whether these are images (C, H, W), as networks for detection take them."""
    several = isinstance(values, (tuple, list)) and bool(values)
    return several and all(isinstance(value, Tensor) and value.dim() == 3 for value in values)


def _is_label(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dtype != torch.bool


def _lengths(batch: Any) -> Iterator[int | None]:
    """The numbers of images of the parts of a batch; None for a part of which that cannot be told."""
    if isinstance(batch, Images):
        yield len(batch)
    elif isinstance(batch, Tensor):
        if batch.dim():
            yield len(batch)
    elif _are_images(batch) or (isinstance(batch, Mapping) and not isinstance(batch, dict)):
        yield None
    elif isinstance(batch, dict):
        yield from itertools.chain(*map(_lengths, batch.values()))
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            if isinstance(value, (Mapping, str)):
                yield None
            yield from _lengths(value)
