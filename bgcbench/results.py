"""The result file: its fields, how it is written so that it is never broken, and how it is read.

A result is one JSON document (SI units; unknown is null). ``result.schema.json`` beside this module is its full
description. Schema history:

    1.0  first version
"""

from __future__ import annotations

import codecs
import contextlib
import datetime
import importlib.resources
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bgcbench
from bgcbench.errors import OutputError, ResultFileError
from bgcbench.locks import FileLock
from bgcbench.specs import FINGERPRINT_FIELDS

SCHEMA_NAME = "bgcbench.result"
SCHEMA_VERSION = "1.0"
DONE = ("ok", "invalid")  # statuses that a resumed run keeps

Json = dict[str, Any]

# What a number in a file may be but 0, far beyond anything that is measured: ratios of any two are finite. A NaN is
# neither above nor below.
LEAST, MOST = 1e-60, 1e30

# What a terminal or an editor acts on instead of showing it: control characters, marks that change the direction of
# text, halves of characters.
_ACTED_ON = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE, _BEYOND_ASCII = re.compile(rf"[\x00-\x1f{_ACTED_ON}]"), re.compile(f"[{_ACTED_ON}]")

# An array of numbers that json.dumps spread over lines: samples are put back on one.
_NUMBER_ARRAY = re.compile(r"\[\n\s*(-?[\d.eE+-]+(?:,\n\s*-?[\d.eE+-]+)*)\n\s*\]")


def utc_now() -> str:
    """The time as in every result file: 2026-01-01T00:00:00Z."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_document(
    command: str, argv: Sequence[str], config: Json, environment: Json, settings: Json, quality: str
) -> Json:
    """A result document with nothing measured yet."""
    return {
        "schema": {"name": SCHEMA_NAME, "version": SCHEMA_VERSION},
        "command": command,
        "argv": list(argv),
        "started_at": utc_now(),
        "finished_at": None,
        "complete": False,
        "exit_reason": "running",
        "failure": None,
        "quality": quality,
        "tool": {"version": bgcbench.__version__, **_git_state()},
        "environment": environment,
        "settings": settings,
        "config": config,
        "ceilings": None,
        "interleaved": [],
        "results": [],
        "warnings": [],
    }


def reopened(document: Json, config: Json) -> Json:
    """``document`` as a run that goes on with it begins, which has not ended in any way."""
    running = {"config": config, "finished_at": None, "complete": False, "exit_reason": "running", "failure": None}
    return {**document, **running}


def finish(document: Json, planned: int, *, interrupted: bool = False, failed: str | None = None) -> None:
    """Set the closing fields from the rows: ok, partial (a row failed), interrupted, or error (``failed``: which)."""
    statuses = [row["status"] for row in document["results"]]
    done = sum(status in DONE for status in statuses)
    document["finished_at"] = utc_now()
    document["complete"] = done == planned and not failed
    document["failure"] = failed
    if failed:
        document["exit_reason"] = "error"
    elif interrupted:
        document["exit_reason"] = "interrupted"
    else:
        document["exit_reason"] = "ok" if document["complete"] else "partial"


def measurement_warnings(document: Mapping[str, Any]) -> list[str]:
    """What the rows' groups and memory passes say against their numbers; what was measured again is left out.

    Reads ``results``, ``interleaved`` and ``settings`` of a profile document.
    """
    rows = document["results"]
    there = {row.get("interleaved") for row in rows}
    groups = [group for group in document.get("interleaved", ()) if group["id"] in there]
    slow = sum(len(group.get("canary", {}).get("slow_rounds", ())) for group in groups)
    rounds = sum(group.get("rounds", 0) for group in groups)
    lines = []
    if slow:
        limit = document["settings"].get("timing", {}).get("canary_tolerance", 0.02)
        lines.append(f"{slow} of {rounds} rounds ran on a clock over {limit:.0%} slower than at the start")
    if any(group.get("alone") for group in groups):
        lines.append("the rows do not fit into memory together: measured one after the other, not paired")
    differ = [row["key"] for row in rows if (row.get("memory") or {}).get("agreed") is False]
    return lines + [f"{key}: two memory passes differ" for key in differ]


def _git_state() -> Json:
    """Commit of the checkout this package runs from; null where it runs from an installation."""
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return {"git_commit": None, "git_dirty": None}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=folder, check=False, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # The files under results/ are what a run writes; they do not make the code that wrote them another one.
    changed = git("status", "--porcelain", "--", "bgcbench", "pyproject.toml")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changed is None else bool(changed)}


def schema() -> Json:
    """The JSON Schema of a result file."""
    text = importlib.resources.files("bgcbench").joinpath("result.schema.json").read_text(encoding="utf-8")
    loaded: Json = json.loads(text)
    return loaded


def printable(text: str) -> str:
    """``text`` in one line that no terminal acts on: control characters as \\xNN or \\uNNNN, line ends as spaces."""
    return _UNPRINTABLE.sub(lambda found: " " if found[0] in "\r\n\t" else ascii(found[0])[1:-1], text)


def dumps(document: Mapping[str, Any]) -> str:
    """The document as JSON text, arrays of numbers on one line. NaN and infinity raise ValueError."""
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    # JSON escapes control characters below 0x20 and leaves the others to us.
    text = _BEYOND_ASCII.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return _NUMBER_ARRAY.sub(lambda match: "[" + re.sub(r",\n\s*", ", ", match[1]) + "]", text) + "\n"


def default_path(command: str, what: str, device: str) -> Path:
    """results/COMMAND-WHAT-DEVICE-UTCTIME.json under the current folder."""
    return Path("results") / f"{command}-{_slug(what)}-{_slug(device)}-{_stamp()}.json"


def _stamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


Identity = tuple[int, int, int, int]


def _identity(found: os.stat_result) -> Identity:
    """What changes when another program writes a file, in place or anew."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class ResultWriter:
    """Writes one document to one path, whole or not at all, and never over what somebody else has written meanwhile.

    Each write goes to a temporary file in the same folder, is synced and then renamed over the target, so an older
    file survives until a valid newer one exists. When a write fails in the middle of a run (a full disk), or finds a
    file that is neither this writer's nor the one it began with, ``problem`` says why and the document goes beside it,
    or to the system's temporary folder (``rescued_to``); the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rescued_to: Path | None = None
        self.problem: str | None = None
        self._lock = FileLock(path.parent / f".{path.name.removesuffix('.json')}.lock")
        self._seen = self._there()

    def claim(self, *, replace: bool, stored: Json | None = None) -> str | None:
        """Keep other runs from writing here until :meth:`release`; what cannot be locked is told, None where it can.

        stored: what this run has read here to go on with. Raises OutputError if another run writes here, if the file
        exists (unless ``replace``) or is no longer ``stored``, or if its folder cannot be written.
        """
        try:
            if self.path.is_dir():
                raise OutputError(f"--out {self.path} is a folder; name a file in it")
            if self.path.parent.exists() and not self.path.parent.is_dir():
                raise OutputError(f"--out {self.path} cannot be written: {self.path.parent} is no folder; choose one")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise OutputError(
                f"--out {self.path} cannot be written ({error.strerror or error}); choose another folder"
            ) from error
        unsure = self._locked()
        self._seen = self._there()
        if self._seen is not None and not replace:
            self.release()
            raise OutputError(
                f"--out {self.path} exists; use --force to replace it, --resume {self.path} to continue it, "
                "or another name"
            )
        if stored is not None and read(self.path) != stored:
            self.release()
            raise OutputError(f"{self.path} was written by another run while this one began; resume it again")
        return unsure

    def _locked(self) -> str | None:
        try:
            self._lock.acquire()
        except BlockingIOError as held:
            raise OutputError(
                f"--out {self.path} is being written by another run ({held.strerror}); wait for its end, or give "
                "another name"
            ) from held
        except OSError as error:
            return (
                f"{self.path.parent} cannot lock files ({error.strerror or error}): see to it that no other run writes "
                f"{self.path.name} meanwhile"
            )
        return None

    def release(self) -> None:
        """Let other runs write here."""
        self._lock.release()

    def _there(self) -> Identity | None:
        try:
            return _identity(os.stat(self.path))
        except OSError:
            return None

    def write(self, document: Mapping[str, Any]) -> None:
        """Write now. Never raises for a file system that refuses: measuring must not end for that."""
        if self.problem is None:
            if self._there() in (None, self._seen):
                try:
                    self._seen = _identity(write_atomically(self.path, dumps(document).encode()))
                except OSError as error:
                    self.problem = error.strerror or str(error)
                else:
                    return
            else:
                self.problem = "another program has written it meanwhile"
        self.rescued_to = rescue(document, self.path.name, self.path.parent, self.rescued_to)


def rescue(document: Mapping[str, Any], name: str, folder: Path = Path(), earlier: Path | None = None) -> Path | None:
    """Write a document that cannot go where it should to ``earlier``, else into ``folder``, else where temporary files
    go; returns where it is, None where it could not be written at all."""
    stem = f"bgcbench-rescued-{_stamp()}-{os.getpid()}-{name}"
    for path in (earlier, folder / stem, Path(tempfile.gettempdir()) / stem):
        with contextlib.suppress(OSError):
            if path is not None:
                write_atomically(path, dumps(document).encode())
                return path
    return None


def write_atomically(path: Path, content: bytes) -> os.stat_result:
    """Write a file whole or not at all: an older one survives until this one is on the disk. Raises OSError.

    Returns the file's status, which a later one tells apart from what others write.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        written = os.stat(name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return written


def read(path: Path) -> Json:
    """The document in ``path``; raises ResultFileError for a file that is missing, torn, foreign or too new."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultFileError(f"{path} cannot be read: {error.strerror or error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ResultFileError(
            f"{path} is UTF-16, as PowerShell's > writes what a program prints: name the file with --out FILE instead, "
            "or convert it to UTF-8"
        )
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ResultFileError(f"{path} is not a bgcbench result: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ResultFileError(f"{path} is not complete JSON{where}: truncated, or not a bgcbench result") from error
    check_document(document, str(path))
    return upgraded(document)


def upgraded(document: Json) -> Json:
    """``document`` with the codes that files of older versions have only in words, and without those words' doubles."""
    kept = [kept for row in document["results"] for kept in (row.get("convert") or {}).get("kept", ())]
    for reason in kept:
        reason.setdefault("code", "indivisible" if "does not divide" in reason["reason"] else "")
    for row in document["results"] if document["command"] in ("train", "transfer") else ():
        row.setdefault("stage", stage_of(row))
    # A report says it of the rows themselves.
    told = re.compile(r".+: N=\d+ does not divide, kept dense: ")
    document["warnings"] = [text for text in document["warnings"] if not told.match(text)]
    return document


def stage_of(row: Json) -> str | None:
    """How far a row of ``train`` or ``transfer`` has come: 'converted', 'evaluated' or 'trained'; None before."""
    if row["status"] == "ok" and row["params"]["epochs"]:
        return "trained"
    if row.get("judged") or row["epochs"] or row["error_initial"] is not None:
        return "evaluated"
    return "converted" if row.get("convert_seconds") is not None else None


def check_document(document: object, name: str) -> None:
    """Raise ResultFileError unless ``document`` is a result that this version can read and show."""
    head = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(head, dict) or head.get("name") != SCHEMA_NAME:
        raise ResultFileError(f"{name} is not a bgcbench result: its schema name is not '{SCHEMA_NAME}'")
    version = str(head.get("version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ResultFileError(
            f"{name} has schema version {version}; this bgcbench reads {SCHEMA_VERSION.split('.')[0]}.x: "
            "use the version that wrote it"
        )
    for path, value in _numbers(document):
        if not (value == 0 or LEAST < abs(value) < MOST):
            raise ResultFileError(f"{name} is damaged: {_place(path)}: no measurement has a number such as this one")
    import jsonschema  # here, because only reading needs it

    validator = jsonschema.Draft202012Validator(schema())
    problem = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if problem is not None:
        raise ResultFileError(f"{name} is damaged: {_place(problem.absolute_path)}: {problem.message[:160]}")
    for number, row in enumerate(document["results"] if isinstance(document, dict) else ()):
        for phase, measured in row.get("phases", {}).items():
            if len(measured["samples_s"]) != len(measured["rounds"]):
                where = _place(("results", number, "phases", phase))
                raise ResultFileError(f"{name} is damaged: {where}: samples_s and rounds are not of equal length")


def _place(path: Iterable[str | int]) -> str:
    return "/".join(map(str, path)) or "the document"


def _numbers(document: object) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """Every number in a document and where it stands."""
    left: list[tuple[tuple[str | int, ...], object]] = [((), document)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, key), entry) for key, entry in value.items()]
        elif isinstance(value, list):
            left += [((*path, index), entry) for index, entry in enumerate(value)]
        elif isinstance(value, (int, float)):
            yield path, value


def check_command(document: Json, command: str, name: str) -> None:
    """Raise ResultFileError unless ``document`` is a run of ``command``."""
    if document["command"] != command:
        raise ResultFileError(f"{name} holds a '{document['command']}' run, not '{command}'; give another file")


def check_resumable(document: Json, command: str, settings: Json, environment: Json, name: str) -> None:
    """Raise ResultFileError unless a run with these settings on this device may continue ``document``."""
    check_command(document, command, name)
    compared: list[tuple[Json, Json, Iterable[str]]] = [
        (document["settings"], settings, settings),
        (document["environment"], environment, FINGERPRINT_FIELDS),
    ]
    for old, new, fields in compared:
        for field in fields:
            if old.get(field) != new[field]:
                raise ResultFileError(
                    f"{name} cannot be resumed: its {field} was {_short(old.get(field))} and is {_short(new[field])} "
                    "now; start a new file with --out"
                )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
