"""The parts of one plan (``--shard K/M``), joined into the document that one run would have written."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from bgcbench.errors import ResultFileError, UsageError
from bgcbench.results.document import Document
from bgcbench.results.rows import Group, ProfileRow, Row
from bgcbench.specs import FINGERPRINT_FIELDS, shard_of


def merged(parts: Sequence[tuple[str, Document]]) -> Document:
    """The document of ``parts``, each with its file's name: their rows in the order of the plan.

    It is complete if all M parts are there and complete. Raises UsageError for fewer than two files, ResultFileError
    for what is no part, one that is there twice, and parts of other plans, settings or machines.
    """
    if len(parts) < 2:
        raise UsageError("merge joins the parts of one plan; name two files or more")
    found: dict[int, tuple[str, Document]] = {}
    first_name, first = parts[0]
    for name, document in parts:
        shard = document.config.get("shard")
        if not isinstance(shard, str):
            raise ResultFileError(
                f"{name} is no part of a plan: it was made without --shard; merge joins only such parts"
            )
        number, _ = shard_of(shard)
        if number in found:
            raise ResultFileError(f"{name} is part {shard}, and so is {found[number][0]}; leave one of them out")
        if differing := _difference(first, document):
            what, one, other = differing
            raise ResultFileError(f"{name} is a part of another plan: its {what} is {other}, and in {first_name} {one}")
        found[number] = name, document
    _, of = shard_of(first.config["shard"])
    return _joined([document for _, (_, document) in sorted(found.items())], [name for name, _ in parts], of)


def _difference(one: Document, other: Document) -> tuple[str, Any, Any] | None:
    """The first thing that two parts of one plan have in common and these have not, and what it is in each."""

    def about(document: Document) -> dict[str, Any]:
        config = {name: value for name, value in document.config.items() if name != "shard"}
        config["number of parts"] = shard_of(str(document.config.get("shard")))[1]
        environment = {name: getattr(document.environment, name) for name in FINGERPRINT_FIELDS}
        settings = msgspec.structs.asdict(document.settings)
        return {"command": document.command, "quality": document.quality, **config, **settings, **environment}

    ours, theirs = about(one), about(other)
    for name in dict.fromkeys((*ours, *theirs)):
        if ours.get(name) != theirs.get(name):
            values = (msgspec.to_builtins(values.get(name)) for values in (ours, theirs))
            return name.replace("_", " "), *values
    return None


def _joined(documents: Sequence[Document], names: Sequence[str], of: int) -> Document:
    rows: list[list[Row]] = []
    groups: list[Group] = []
    for document in documents:
        # Groups were numbered in each part by itself.
        shift = max((group.id for group in groups), default=0)
        groups += [msgspec.structs.replace(group, id=group.id + shift) for group in document.interleaved]
        rows.append([_shifted(row, shift) for row in document.results])
    there = [row for line in itertools.zip_longest(*rows) for row in line if row is not None]
    complete = len(documents) == of and all(document.complete for document in documents)
    first = documents[0]
    return msgspec.structs.replace(
        first,
        argv=("merge", *names),
        config={**first.config, "shard": None},
        started_at=min(document.started_at for document in documents),
        finished_at=max(document.finished_at or document.started_at for document in documents),
        complete=complete,
        exit_reason="ok" if complete else "partial",
        interleaved=tuple(groups),
        results=tuple(there),
        warnings=tuple(dict.fromkeys(warning for document in documents for warning in document.warnings)),
    )


def _shifted(row: Row, shift: int) -> Row:
    if isinstance(row, ProfileRow) and row.interleaved is not None:
        return msgspec.structs.replace(row, interleaved=row.interleaved + shift)
    return row
