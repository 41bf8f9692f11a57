"""Documents as the plain dicts that json reads, for what does not read typed rows yet."""

from __future__ import annotations

import importlib.resources
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bgcbench
from bgcbench.errors import ResultFileError
from bgcbench.results.document import LEAST, MOST, SCHEMA_NAME, Json, git_state, loaded, numbers, utc_now
from bgcbench.results.rows import DONE
from bgcbench.specs import FINGERPRINT_FIELDS

SCHEMA_VERSION = "1.0"


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
        "tool": {"version": bgcbench.__version__, **git_state()},
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


def schema() -> Json:
    """The JSON Schema of a result file."""
    text = importlib.resources.files("bgcbench").joinpath("result.schema.json").read_text(encoding="utf-8")
    loaded: Json = json.loads(text)
    return loaded


def read(path: Path) -> Json:
    """The document in ``path``; raises ResultFileError for a file that is missing, torn, foreign or too new."""
    found = loaded(path)
    check_document(found, str(path))
    document: Json = found  # type: ignore[assignment]  # it is one
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
    for path, value in numbers(document):
        asked = path[0] == "config" and abs(value) <= sys.float_info.max  # a user may ask for any number
        if not (asked or value == 0 or LEAST < abs(value) < MOST):
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
