"""A result document: how it begins and ends, and how a file of this or an older version is read.

A result is one JSON document (SI units; unknown is null), described by :mod:`bgcbench.results.rows`. Schema history:

    1.0  first version
    1.1  a conversion's record holds each layer's variant, N, algorithm and initialisation; what is kept has a code, a
         row of train and transfer a stage, a profile's failure a phase; the settings say preprocessing and memory
"""

from __future__ import annotations

import codecs
import datetime
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import msgspec

import bgcbench
from bgcbench.errors import ResultFileError
from bgcbench.results.rows import (
    COMMANDS,
    Ceilings,
    Config,
    Environment,
    Fit,
    Group,
    NetworkFacts,
    PlanFacts,
    ProfileRow,
    Row,
    Schema,
    Settings,
    Tool,
    upgraded_record,
)
from bgcbench.specs import FINGERPRINT_FIELDS

SCHEMA_NAME, SCHEMA_VERSION = "bgcbench.result", "1.1"

Json = dict[str, Any]

# What a number in a file may be but 0, far beyond anything that is measured: ratios of any two are finite. A NaN is
# neither above nor below.
LEAST, MOST = 1e-60, 1e30

# What a terminal or an editor acts on instead of showing it: control characters, marks that change the direction of
# text, halves of characters.
_ACTED_ON = r"\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNPRINTABLE, _BEYOND_ASCII = re.compile(rf"[\x00-\x1f{_ACTED_ON}]"), re.compile(f"[{_ACTED_ON}]")

# What older files say in words; a report says it of the rows themselves.
TOLD_BY_ROWS = re.compile(r".+: N=\d+ does not divide, kept dense: ")

# An array of numbers that json.dumps spread over lines: samples are put back on one.
_NUMBER_ARRAY = re.compile(r"\[\n\s*(-?[\d.eE+-]+(?:,\n\s*-?[\d.eE+-]+)*)\n\s*\]")


class Document(msgspec.Struct, kw_only=True):
    """A run and its results; filled while it runs.

    command: one of COMMANDS, which has the types of its ``results``. argv: as typed. failure: the error that ended the
    run. quality: 'quick' makes no claim. config: the experiment's configuration, from which it can be run again.
    interleaved: groups of rows measured in turn. fits, network: of approx. plan: of plan.
    """

    schema: Schema = Schema(name=SCHEMA_NAME, version=SCHEMA_VERSION)
    command: str
    argv: tuple[str, ...]
    started_at: str
    finished_at: str | None = None
    complete: bool = False
    exit_reason: Literal["running", "ok", "partial", "interrupted", "error"] = "running"
    failure: str | None = None
    quality: Literal["full", "quick"] = "full"
    tool: Tool
    environment: Environment
    settings: Settings
    config: Json = {}
    ceilings: Ceilings | None = None
    interleaved: tuple[Group, ...] = ()
    results: tuple[Any, ...] = ()
    fits: tuple[Fit, ...] = ()
    network: NetworkFacts | None = None
    plan: PlanFacts | None = None
    warnings: tuple[str, ...] = ()

    def row(self, key: str) -> Row | None:
        """The row ``key``, if it is there."""
        return next((row for row in self.results if row.key == key), None)

    @property
    def done(self) -> dict[str, Row]:
        """The rows that a resumed run keeps, by key."""
        return {row.key: row for row in self.results if row.is_done}

    @property
    def measured(self) -> int:
        """How many rows are done, or were stopped and hold times."""
        return sum(row.is_done or (isinstance(row, ProfileRow) and bool(row.phases)) for row in self.results)

    @property
    def asked(self) -> Config:
        """The part of ``config`` that is told beside the results."""
        return msgspec.convert(self.config, Config)

    def finish(self, planned: int, *, interrupted: bool = False, failed: str | None = None) -> None:
        """Set the closing fields from the rows: ok, partial (a row failed), interrupted, or error (``failed``)."""
        self.finished_at, self.failure = utc_now(), failed
        self.complete = len(self.done) == planned and not failed
        ended: Literal["ok", "partial"] = "ok" if self.complete else "partial"
        self.exit_reason = "error" if failed else "interrupted" if interrupted else ended

    @property
    def measurement_warnings(self) -> list[str]:
        """What the groups and memory passes of a profile say against its numbers; of rows measured again, the last."""
        there = {row.interleaved for row in self.results if isinstance(row, ProfileRow)}
        groups = [group for group in self.interleaved if group.id in there]
        slow = sum(len(group.canary.slow_rounds) for group in groups if group.canary)
        lines = []
        if slow:
            limit = self.settings.timing.canary_tolerance if self.settings.timing else 0.02
            rounds = sum(group.rounds for group in groups)
            lines.append(f"{slow} of {rounds} rounds ran on a clock over {limit:.0%} slower than at the start")
        if any(group.alone for group in groups):
            lines.append("the rows do not fit into memory together: measured one after the other, not paired")
        differ = [row.key for row in self.results if isinstance(row, ProfileRow) and row.memory
                  and row.memory.agreed is False]  # fmt: skip
        return lines + [f"{key}: two memory passes differ" for key in differ]


def utc_now() -> str:
    """The time as in every result file: 2026-01-01T00:00:00Z."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_document(
    command: str, argv: Sequence[str], config: Json, environment: Environment, settings: Settings, *, quick: bool
) -> Document:
    """A document with nothing measured yet."""
    return Document(
        command=command,
        argv=tuple(argv),
        started_at=utc_now(),
        quality="quick" if quick else "full",
        tool=Tool(version=bgcbench.__version__, **git_state()),
        environment=environment,
        settings=settings,
        config=config,
    )


def reopened(stored: Document, config: Json) -> Document:
    """``stored`` as a run that goes on with it begins, which has not ended in any way."""
    return msgspec.structs.replace(
        stored, config=config, finished_at=None, complete=False, exit_reason="running", failure=None
    )


def git_state() -> Json:
    """Commit of the checkout this package runs from; null where it runs from an installation."""
    folder = Path(__file__).resolve().parent.parent.parent
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

    status = git("status", "--porcelain")
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def printable(text: str) -> str:
    """``text`` without what a terminal acts on."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def shortened(text: str, letters: int) -> str:
    """``text`` in at most so many ``letters`` (5 or more), with ... in the place of its middle."""
    if len(text) <= letters:
        return text
    last = (letters - 3) // 2
    return f"{text[: letters - 3 - last]}...{text[-last:]}"


def dumps(document: Document) -> str:
    """The document as JSON text, arrays of numbers on one line. NaN and infinity raise ValueError."""
    text = json.dumps(msgspec.to_builtins(document), indent=1, allow_nan=False, ensure_ascii=False)
    # JSON escapes control characters below 0x20 and leaves the others to us.
    text = _BEYOND_ASCII.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return _NUMBER_ARRAY.sub(lambda match: "[" + re.sub(r",\n\s*", ", ", match[1]) + "]", text) + "\n"


# ----------------------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Document:
    """The document in ``path``; raises ResultFileError for a file that is missing, torn, foreign or too new."""
    return document_of(loaded(path), str(path))


def loaded(path: Path) -> object:
    """What the JSON file ``path`` holds; raises ResultFileError for one that is missing, torn or no JSON."""
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
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ResultFileError(f"{path} is not a bgcbench result: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise ResultFileError(f"{path} is not complete JSON{where}: truncated, or not a bgcbench result") from error


def document_of(found: object, name: str) -> Document:
    """The document of what a file holds, as json reads it; raises ResultFileError, beginning with ``name``."""
    return typed(checked(found, name), name)


def checked(found: object, name: str) -> Json:
    """What a file holds if it says that it is a result of this version, with numbers that can have been measured."""
    head = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(head, dict) or head.get("name") != SCHEMA_NAME or not isinstance(found, dict):
        raise ResultFileError(f"{name} is not a bgcbench result: its schema name is not '{SCHEMA_NAME}'")
    version = str(head.get("version"))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ResultFileError(
            f"{name} has schema version {version}; this bgcbench reads {SCHEMA_VERSION.split('.')[0]}.x: "
            "use the version that wrote it"
        )
    for path, value in _numbers(found):
        if not (value == 0 or LEAST < abs(value) < MOST):
            raise ResultFileError(f"{name} is damaged: {place(path)}: no measurement has a number such as this one")
    return found


def typed(found: Json, name: str) -> Document:
    """The document of a run's dict, which stays as it is; raises ResultFileError where something has another type."""
    document: Document = _converted(found, Document, name)
    _converted(document.config, Config, name, "config/")
    if document.command not in COMMANDS:
        raise ResultFileError(f"{name} is damaged: command: Invalid enum value '{document.command}'")
    row_type = COMMANDS[document.command].row_type
    document.results = tuple(
        _converted(_upgraded(row), row_type(row), name, f"results/{number}/")
        for number, row in enumerate(document.results)
    )
    document.warnings = tuple(text for text in document.warnings if not TOLD_BY_ROWS.match(text))
    for number, row in enumerate(document.results):
        for phase, measured in row.phases.items() if isinstance(row, ProfileRow) else ():
            check_rounds(measured.samples_s, measured.rounds, (number, phase), name)
    return document


def check_rounds(samples: Sized, rounds: Sized, at: tuple[int, str], name: str) -> None:
    """Raise ResultFileError unless each sample ``at`` (row, phase) has its round."""
    if len(samples) != len(rounds):
        where = place(("results", at[0], "phases", at[1]))
        raise ResultFileError(f"{name} is damaged: {where}: samples_s and rounds are not of equal length")


def _converted(found: object, kind: type[Any], name: str, within: str = "") -> Any:
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as problem:
        said, _, place = str(problem).partition(" - at `$")
        place = re.sub(r"[.\[\]`']+", "/", place).strip("/")
        raise ResultFileError(f"{name} is damaged: {within}{place or 'the document'}: {said[:160]}") from None
    except UnicodeEncodeError:
        raise ResultFileError(f"{name} is damaged: {within or 'the document'}: half of a character") from None


def _upgraded(row: Any) -> Any:
    """A row of any version 1 with the codes that older ones have only in words."""
    if not isinstance(row, dict):
        return row
    record = row.get("convert")
    added: Json = {"convert": upgraded_record(record)} if isinstance(record, dict) else {}
    if "epochs" in row and "stage" not in row:
        added["stage"] = stage_of(row)
    return row | added


def stage_of(row: Json) -> str | None:
    """How far a row of ``train`` or ``transfer`` has come: 'converted', 'evaluated' or 'trained'; None before."""
    params = row.get("params")
    if row.get("status") == "ok" and isinstance(params, dict) and params.get("epochs"):
        return "trained"
    if row.get("judged") or row.get("epochs") or row.get("error_initial") is not None:
        return "evaluated"
    return "converted" if row.get("convert_seconds") is not None else None


def place(path: Iterable[str | int]) -> str:
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


# ---------------------------------------------------------------------------------------------------------- resuming


def check_command(document: Document, command: str, name: str) -> None:
    """Raise ResultFileError unless ``document``, from file ``name``, is a run of ``command``."""
    if document.command != command:
        raise ResultFileError(f"{name} holds a '{document.command}' run, not '{command}'; give another file")


def check_resumable(document: Document, settings: Settings, environment: Environment, name: str) -> None:
    """Raise ResultFileError unless a run with these settings on this device may continue ``document``."""
    compared: list[tuple[Any, Any, Iterable[str]]] = [
        (document.settings, settings, settings.__struct_fields__),
        (document.environment, environment, FINGERPRINT_FIELDS),
    ]
    for old, new, fields in compared:
        for field in fields:
            was, now = (msgspec.to_builtins(getattr(one, field)) for one in (old, new))
            if was != now:
                raise ResultFileError(
                    f"{name} cannot be resumed: its {field} was {_short(was)} and is {_short(now)} now; start a new "
                    "file with --out"
                )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
