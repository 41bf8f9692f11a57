"""Documents as the plain dicts that json reads, for what does not read typed rows yet."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bgcbench
from bgcbench.errors import ResultFileError
from bgcbench.results.document import (
    SCHEMA_NAME,
    TOLD_BY_ROWS,
    Json,
    check_command,
    check_rounds,
    checked,
    git_state,
    loaded,
    place,
    stage_of,
    utc_now,
)
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
    return upgraded(check_document(loaded(path), str(path)))


def upgraded(document: Json) -> Json:
    """``document`` with the codes that files of older versions have only in words, and without those words' doubles."""
    kept = [kept for row in document["results"] for kept in (row.get("convert") or {}).get("kept", ())]
    for reason in kept:
        reason.setdefault("code", "indivisible" if "does not divide" in reason["reason"] else "")
    for row in document["results"] if document["command"] in ("train", "transfer") else ():
        row.setdefault("stage", stage_of(row))
    document["warnings"] = [text for text in document["warnings"] if not TOLD_BY_ROWS.match(text)]
    return document


def check_document(found: object, name: str) -> Json:
    """What a file holds; raises ResultFileError unless it is a result that this version can read and show."""
    document = checked(found, name)
    import jsonschema  # here, because only reading needs it

    validator = jsonschema.Draft202012Validator(schema())
    problem = jsonschema.exceptions.best_match(validator.iter_errors(document))
    if problem is not None:
        raise ResultFileError(f"{name} is damaged: {place(problem.absolute_path)}: {problem.message[:160]}")
    for number, row in enumerate(document["results"]):
        for phase, measured in row.get("phases", {}).items():
            check_rounds(measured["samples_s"], measured["rounds"], (number, phase), name)
    return document


def check_resumable(document: Json, command: str, settings: Json, environment: Json, name: str) -> None:
    """Raise ResultFileError unless a run with these settings on this device may continue ``document``."""
    check_command(document["command"], command, name)
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
