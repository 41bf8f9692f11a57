"""What stands around the tables: under which conditions a document came to be, and what to know before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from bgcbench.report.format import listed, scaled
from bgcbench.results.document import Document
from bgcbench.results.rows import ProfileRow, Row, TrainRow, TransferRow
from bgcbench.specs import Preprocessing

R = TypeVar("R", ProfileRow, TrainRow, TransferRow)


def run_lines(document: Document) -> list[str]:
    """The conditions of a measurement, its device and that device's ceilings."""
    settings, environment, ceilings = document.settings, document.environment, document.ceilings
    memory = f", memory {settings.memory or 'unknown'}" if environment.device.type == "cpu" else ""
    lines = [
        f"{settings.precision}, {settings.layout}, {settings.mode or 'eager'}, {settings.cache or 'unknown'} cache"
        f"{memory}; {environment.where}"
    ]
    if ceilings:
        lines.append(f"measured ceilings: {scaled(ceilings.flops_per_s)}FLOP/s, {scaled(ceilings.bytes_per_s)}B/s")
    return lines


def notes(
    document: Document, facts: Sequence[str], failures: Sequence[str] | None = None, quick: str = ""
) -> list[str]:
    """The notes of a report, the most important first.

    facts: of the command itself. failures: why rows are not done, where it is told in another way than row by row.
    """
    lines = []
    if document.exit_reason in ("running", "interrupted", "error"):
        why = f": it broke off with {document.failure}" if document.failure else ""
        lines.append(f"this run is not complete ({document.exit_reason}){why}")
    if document.quality == "quick":
        lines.append(f"a quick look: {quick}, no claim; run without --quick")
    lines += failed_rows(document.results) if failures is None else failures
    lines += _warnings(document)
    if document.settings.preprocessing:
        lines.append(f"images: {_images(document.settings.preprocessing)}")
    lines += facts
    if document.settings.memory == "fresh":
        lines.append("memory fresh: each call takes large tensors from the system and clears their pages")
    return lines


def _images(stored: object) -> str:
    how = Preprocessing.from_json(msgspec.to_builtins(stored))
    return f"{how} ({Preprocessing.SOURCES[how.source]})"


def together(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """(name, reason) with the names of one reason in one line."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return [f"{listed(names)}: {reason}" for reason, names in found.items()]


def failed_rows(rows: Iterable[Row]) -> list[str]:
    return together((row.key, f"{row.status}: {row.reason}") for row in rows if row.status in ("oom", "error"))


def _warnings(document: Document) -> list[str]:
    keys = {row.key for row in document.results}
    plain, of_rows = [], []
    for warning in dict.fromkeys((*document.warnings, *document.measurement_warnings)):  # older files hold both
        key, _, text = warning.partition(": ")
        if key in keys:
            of_rows.append((key, text))
        else:
            plain.append(warning)
    return [f"warning: {warning}" for warning in (*plain, *together(of_rows))]


def kept_dense(rows: Iterable[R], name: Callable[[R], str]) -> list[str]:
    """The convolutions that stay dense because N does not divide their channels."""
    found = {name(row): row.convert.indivisible for row in rows if row.convert and row.convert.indivisible}
    return [f"{name}: N does not divide, kept dense: {', '.join(layers)}" for name, layers in found.items()]


def chosen_algorithms(rows: Iterable[R], name: Callable[[R], str]) -> list[str]:
    """One line on the algorithm that 'auto' found fastest in each row, where it had a choice."""
    told = []
    for row in rows:
        phases = []
        for phase, counts in row.forms.items():
            chosen = [algorithm if len(counts) == 1 else f"{algorithm} x{n}" for algorithm, n in counts.items()]
            phases.append(f"{phase} {', '.join(chosen)}")
        if phases:
            told.append(f"{name(row)}: {'; '.join(phases)}")
    return ["fastest algorithms, as measured: " + ". ".join(told)] if told else []
