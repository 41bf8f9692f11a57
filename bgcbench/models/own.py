"""A network of the user's own, by the function that makes it: ``net.py:make`` or ``package.module:make``."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from bgcbench.errors import UsageError, did_you_mean, reason_of
from bgcbench.specs import FACTORY, NetSpec, may_run


def build_own(spec: NetSpec) -> nn.Module:
    """What the function that ``spec`` names returns, called without arguments; a copy, as it may return one twice.

    A network that is :func:`held` is copied. Raises UsageError for a file, module or function that is not there, fails,
    or returns anything but a network whose convolutions can be replaced.
    """
    if spec.name in _held:
        return copy.deepcopy(_held[spec.name])
    home, _, name = spec.name.rpartition(":")
    folder = str(Path(home).resolve().parent) if home.endswith(".py") else os.getcwd()
    with _importing_from(folder):
        try:
            module = _file(Path(home).resolve()) if home.endswith(".py") else importlib.import_module(home)
        except Exception as problem:  # whatever the user's code raises
            raise UsageError(f"MODEL {spec.name}: importing {home} failed: {_said(problem)}") from problem
        make = getattr(module, name, None)
        if not callable(make):
            hint = did_you_mean(name, [each for each in vars(module) if callable(getattr(module, each))])
            raise UsageError(f"MODEL {spec.name}: {hint}{home} has no function '{name}'")
        try:
            made = make()
        except Exception as problem:
            raise UsageError(f"MODEL {spec.name}: calling it without arguments failed: {_said(problem)}") from problem
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


@functools.cache
def _file(path: Path) -> ModuleType:
    """The module that a file is, imported once."""
    found = importlib.util.spec_from_file_location(f"_bgcbench_own_{path.stem}", path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # where dataclasses and pickle look for what is defined in it
    found.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """What stands in ``folder`` can be imported, as from a script in it."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {reason_of(problem)}"


def is_own(name: str) -> bool:
    """Whether ``name`` is a function that makes a network, and not a network's name."""
    return FACTORY.fullmatch(name) is not None
