"""Every error bgcbench raises on purpose, and the exit code each one ends the command with.

    BgcbenchError            1   the run itself failed
    ├── UsageError           2   a wrong option, an invalid combination
    │   ├── ShapeError       2   sizes, strides and groups that do not fit together (also a ValueError)
    │   └── ResultFileError  2   a file that is not a bgcbench result, or one that cannot be continued
    ├── DeviceError          3   the device asked for is not there
    └── OutputError          4   the result cannot be written

A message is one line: the value, the rule it breaks and the way out.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any, ClassVar


class BgcbenchError(Exception):
    """Base of all deliberate errors; ``exit_code`` is what the command line ends with."""

    exit_code: ClassVar[int] = 1


class UsageError(BgcbenchError):
    """A wrong value or a combination of options that has no meaning."""

    exit_code = 2


class ShapeError(UsageError, ValueError):
    """Channels, kernel, stride or groups that do not fit together."""


class ResultFileError(UsageError):
    """A result file that is unreadable, foreign, newer than this version, or not continuable."""


class DeviceError(BgcbenchError):
    """The device asked for is not there, or cannot do what was asked."""

    exit_code = 3


class OutputError(BgcbenchError):
    """The result cannot be written where it was asked to go."""

    exit_code = 4


def reason_of(problem: object) -> str:
    """Why something failed, for the brackets of a message: the system's own words, or its first line."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return str(text).splitlines()[0][:120]


def did_you_mean(value: str, names: Sequence[str]) -> str:
    """A question with the nearest of ``names`` for the middle of a message; nothing where none is near."""
    near = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'? " if near else ""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def import_extra(module: str, without: str) -> Any:
    """A module of a package that is not always installed; raises UsageError with the message ``without`` it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(without) from None
