"""The user's own functions, as ``net.py:make`` or ``package.module:make``: imported and called without arguments.

Callers see to it that the user has named the function (:func:`bgcbench.specs.may_run`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bgcbench.errors import UsageError, did_you_mean, reason_of


def made_by(function: str, option: str) -> Any:
    """What ``function`` returns; ``option`` names it in messages, such as MODEL.

    Raises UsageError for a file, module or function that is not there, or that fails.
    """
    home, _, name = function.rpartition(":")
    folder = str(Path(home).resolve().parent) if home.endswith(".py") else os.getcwd()
    with _importing_from(folder):
        try:
            module = _file(Path(home).resolve()) if home.endswith(".py") else importlib.import_module(home)
        except Exception as problem:  # whatever the user's code raises
            raise UsageError(f"{option} {function}: importing {home} failed: {_said(problem)}") from problem
        make = getattr(module, name, None)
        if not callable(make):
            hint = did_you_mean(name, [each for each in vars(module) if callable(getattr(module, each))])
            raise UsageError(f"{option} {function}: {hint}{home} has no function '{name}'")
        try:
            return make()
        except Exception as problem:
            raise UsageError(f"{option} {function}: calling it without arguments failed: {_said(problem)}") from problem


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
