"""Checkpoints: tensors and text, whole or not at all, each named by its own contents.

    e0003-s000120-1f0c...pt   epoch 3 (from 0) has made 120 steps; the last two are kept
    best-e0007-93ab...pt      the weights of the epoch with the least test error so far
    final-e0020-77d0...pt     the weights of a training that is done

The digits are the beginning of the file's SHA-256, as torch.hub names files: a torn one is known by its name, and
``--weights`` checks them again. Nothing is ever read but with ``weights_only``: a file cannot bring code to run.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bgcbench.errors import ResultFileError
from bgcbench.results import Json, write_atomically

FORMAT = "bgcbench.checkpoint/1"
KEPT = 2  # of the running training's checkpoints
DIGITS = 12
DIAGNOSIS = "diagnosis.json"
_ANY_NAME = re.compile(r"(?:best-|final-)?e\d+(?:-s\d+)?-[0-9a-f]+\.pt")
# A training that is done may be asked for again, where it ended before the result file said so.
_NAME = re.compile(r"(?:final-)?e(\d+)(?:-s(\d+))?-[0-9a-f]+\.pt")
# What torch.load says of a file that asks for code.
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_CODE = re.compile(r"Unsupported (?:global|operand|class)|Can only (?:build|create)", re.IGNORECASE)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds. model: a state dict. extra: other tensors by name. meta: everything else.

    record: how the network was converted (see :class:`bgcbench.results.rows.Record`), None for a dense one; with it
    :func:`bgcbench.load_converted` reads the file.
    """

    model: State
    extra: State
    meta: Json
    record: Json | None = None


class Checkpoints:
    """The checkpoints of one training in one folder, which need not be there yet.

    ``problem``: why the last one could not be written (a full disk), None where it could; the training goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problem: str | None = None

    def save(self, stored: Stored, epoch: int, step: int) -> None:
        """Add a checkpoint of ``epoch`` (from 0) after ``step`` of its steps; older ones than the last two go."""
        if self._write(f"e{epoch:04d}-s{step:06d}", stored):
            for _, path in self._running()[KEPT:]:
                path.unlink(missing_ok=True)

    def save_best(self, stored: Stored, epoch: int) -> None:
        """Put the weights after ``epoch`` epochs in the place of the best so far."""
        self._replace("best", stored, epoch)

    def save_final(self, stored: Stored, epoch: int) -> None:
        """Put the weights that ``epoch`` epochs ended with in the place of what a resumed training would need."""
        if self._replace("final", stored, epoch):
            for _, path in self._running():
                if not path.name.startswith("final-"):
                    path.unlink(missing_ok=True)

    @property
    def names(self) -> list[str]:
        """The files of all checkpoints that are there."""
        return sorted(path.name for path in self.folder.glob("*.pt") if _ANY_NAME.fullmatch(path.name))

    def clear(self) -> None:
        """Remove every checkpoint of an earlier training, and nothing else."""
        for name in self.names:
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / DIAGNOSIS).unlink(missing_ok=True)

    def latest(self, warn: Callable[[str], None]) -> Stored | None:
        """The newest checkpoint that can be read, None where there is none.

        One that is torn or damaged is passed over, which ``warn`` is told. Raises ResultFileError for one that holds
        code, and where there are checkpoints and all of them are damaged.
        """
        found = [path for _, path in self._running()]
        for number, path in enumerate(found):
            stored = _read(path)
            if isinstance(stored, Stored):
                for damaged in found[:number]:  # or they would stand in the places of newer ones
                    with contextlib.suppress(OSError):
                        damaged.rename(f"{damaged}.damaged")
                return stored
            warn(f"{path} is passed over: {stored}")
        if found:
            raise ResultFileError(
                f"{self.folder}: all {len(found)} checkpoints are damaged; remove the folder to start this row again"
            )
        return None

    def _running(self) -> list[tuple[tuple[int, int], Path]]:
        """(epoch, step) and path of each checkpoint to go on from, the newest first."""
        if not self.folder.is_dir():
            return []
        named = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return sorted((((int(m[1]), int(m[2] or 0)), path) for m, path in named), reverse=True)

    def _replace(self, kind: str, stored: Stored, epoch: int) -> bool:
        """Write the only file of this kind; whether it could be written."""
        older = list(self.folder.glob(f"{kind}-e*.pt"))
        written = self._write(f"{kind}-e{epoch:04d}", stored)
        for path in older if written else ():
            if path != written:
                path.unlink(missing_ok=True)
        return written is not None

    def _write(self, name: str, stored: Stored) -> Path | None:
        """The file's path; None, and ``problem``, where the disk refuses it."""
        buffer = io.BytesIO()
        content = {"format": FORMAT, "meta": json.dumps(stored.meta), "model": stored.model, "extra": stored.extra}
        if stored.record is not None:
            content["record"] = json.dumps(stored.record)
        torch.save(content, buffer)
        data = buffer.getvalue()
        path = self.folder / f"{name}-{hashlib.sha256(data).hexdigest()[:DIGITS]}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
            if (size := path.stat().st_size) != len(data):
                raise OSError(f"{size} of {len(data)} bytes are there")
        except OSError as error:
            self.problem = f"{path} could not be written ({error.strerror or error})"
            return None
        self.problem = None
        return path


def network_in(path: Path) -> Json:
    """Which dense network a checkpoint holds: its ``model``, ``num_classes``, ``height``, ``width``, ``stem_stride``.

    The name that the file once had does not matter. Raises ResultFileError for any other file, with what to do.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of a file that is refused then
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ResultFileError(f"{path} cannot be read ({error.strerror or error}); give another file") from error
    except Exception as problem:
        raise ResultFileError(
            f"{path} is no checkpoint of bgcbench: it is damaged, or holds more than tensors and text (which is not "
            "run); give another file"
        ) from problem
    if isinstance(content, Mapping) and "record" in content:
        raise ResultFileError(
            f"{path} holds a converted network, and only a dense one is converted: give the checkpoint of a standard "
            "row; bgcbench.load_converted reads this one"
        )
    stored = _checked(content)
    identity = stored.meta.get("identity", {}) if isinstance(stored, Stored) else {}
    fields = ("model", "num_classes", "height", "width", "stem_stride")
    if any(name not in identity for name in fields):
        raise ResultFileError(
            f"{path} does not say which network it holds, as a checkpoint of bgcbench train does; name the network, "
            f"and give the file with --weights {path}"
        )
    return {name: identity[name] for name in fields}


def _read(path: Path) -> Stored | str:
    """What the checkpoint holds, or why it cannot be used; raises ResultFileError for one that holds code."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    intact = hashlib.sha256(data).hexdigest().startswith(path.stem.rpartition("-")[2])
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as problem:
        if code := _code_asked_for(str(problem), intact=intact):
            raise ResultFileError(
                f"{path} holds pickled code ({code}), which is not run; it is no checkpoint of bgcbench: remove it"
            ) from problem
        return "it is torn or damaged"
    return _checked(content) if intact else "its contents are not those that its name was made from"


def _code_asked_for(refusal: str, *, intact: bool) -> str | None:
    """What torch.load has refused to run; None where it has only met damage.

    A flipped bit may turn a name that a checkpoint has into another one, but hardly into that of a standard module.
    """
    found = _GLOBAL.search(refusal)
    if found is None:
        return "a call" if intact and _CODE.search(refusal) else None
    name = found[1]
    module = name.split(".")[0]
    standard = module in sys.stdlib_module_names or module == "__builtin__" or hasattr(builtins, name)
    return name if intact or (standard and module != "collections") else None


def _checked(content: Any) -> Stored | str:
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return f"it is no {FORMAT}"
    try:
        record = json.loads(content["record"]) if "record" in content else None
        return Stored(dict(content["model"]), dict(content["extra"]), dict(json.loads(content["meta"])), record)
    except (KeyError, TypeError, ValueError) as problem:
        return f"it is incomplete ({problem})"
