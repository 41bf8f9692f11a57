"""A network of the user's own, by the function that makes it: ``net.py:make`` or ``package.module:make``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from bgcbench.errors import UsageError
from bgcbench.factories import made_by
from bgcbench.specs import NetSpec, may_run


def build_own(spec: NetSpec) -> nn.Module:
    """What the function that ``spec`` names returns, called without arguments; a copy, as it may return one twice.

    A network that is :func:`held` is copied. Raises UsageError for a file, module or function that is not there, fails,
    or returns anything but a network whose convolutions can be replaced.
    """
    if spec.name in _held:
        return copy.deepcopy(_held[spec.name])
    made = made_by(spec.name, "MODEL")
    if isinstance(made, torch.jit.ScriptModule):
        raise UsageError(f"MODEL {spec.name} returns TorchScript, which cannot be changed; {_WANTED}")
    if not isinstance(made, nn.Module):
        raise UsageError(f"MODEL {spec.name} returns a {type(made).__name__}; {_WANTED}")
    if isinstance(getattr(made, "_orig_mod", None), nn.Module):
        raise UsageError(f"MODEL {spec.name} returns a compiled network; {_WANTED}, and bgcbench compiles it")
    return copy.deepcopy(made)


_held: dict[str, nn.Module] = {}


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[str]:
    """A name under which :func:`build_own` finds ``model`` meanwhile."""
    name = may_run(f"memory:{type(model).__name__}")
    _held[name] = model
    try:
        yield name
    finally:
        del _held[name]


_WANTED = "return the torch.nn.Module itself"


def class_count(model: nn.Module, spec: NetSpec) -> int:
    """How many scores an image the network of the user's own gives; raises UsageError where it gives anything else."""
    with torch.no_grad():
        scores = copy.deepcopy(model).eval()(torch.zeros(1, *spec.size))
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
        found = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise UsageError(f"MODEL {spec.name} must return a tensor of (images, classes); for one image it is {found}")
    if spec.num_classes not in (None, scores.shape[1]):
        raise UsageError(f"MODEL {spec.name} tells {scores.shape[1]} classes apart, and {spec.num_classes} are needed")
    return int(scores.shape[1])
