"""What stands around the tables: under which conditions a document came to be, and what to know before it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from bgcbench.report.format import listed, named, scaled
from bgcbench.results.document import Document
from bgcbench.results.rows import ProfileRow, TrainRow
from bgcbench.specs import PLAN, VARIANTS, Preprocessing, Variant


def run_lines(document: Document) -> list[str]:
    """The conditions of a measurement, its device and that device's ceilings."""
    settings, environment, ceilings = document.settings, document.environment, document.ceilings
    memory = f", memory {settings.memory or 'unknown'}" if environment.device.type == "cpu" else ""
    lines = [
        f"{settings.precision}, {settings.layout}, {settings.mode or 'eager'}, {settings.cache or 'unknown'} cache"
        f"{memory}; {environment.where}{f', {settings.runtime}' if settings.runtime else ''}"
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
        what = f"a quick look: {quick}" if quick else "a quick look"
        lines.append(f"{what}, no claim; run without --quick")
    lines += failed_rows(document) if failures is None else failures
    lines += _warnings(document)
    if document.settings.preprocessing:
        how = Preprocessing.from_json(msgspec.to_builtins(document.settings.preprocessing))
        lines.append(f"images: {how} ({Preprocessing.SOURCES[how.source]})")
    lines += facts
    if document.settings.memory == "fresh":
        lines.append("memory fresh: each call takes large tensors from the system and clears their pages")
    return lines


def together(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """(name, reason) with the names of one reason in one line."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return [f"{listed(names)}: {reason}" for reason, names in found.items()]


def failed_rows(document: Document) -> list[str]:
    failed = [row for row in document.results if row.status in ("oom", "error")]
    return together((row.key, f"{row.status}: {row.reason}") for row in failed)


def _warnings(document: Document) -> list[str]:
    keys = {row.key for row in document.results}
    warnings = dict.fromkeys((*document.warnings, *document.measurement_warnings))  # older files hold both
    split = {warning: warning.partition(": ") for warning in warnings}
    plain = [warning for warning, (key, *_) in split.items() if key not in keys]
    of_rows = together((key, text) for key, _, text in split.values() if key in keys)
    return [f"warning: {warning}" for warning in (*plain, *of_rows)]


def replaced_lines(rows: Sequence[ProfileRow | TrainRow], where: str | None) -> tuple[str | None, list[str]]:
    """Which convolutions are replaced, for a title: of the variants, and in a line what a plan makes of them."""
    record = next((row.convert for row in rows if row.convert and row.convert.planned), None)
    if record is None:
        return where, []
    counted = Counter(named(layer.variant, layer.groups, layer.rank) for layer in record.layers)
    told = listed([f"{name} x{number}" for name, number in counted.most_common()])
    alone = all(row.params.variant in ("standard", PLAN) for row in rows)
    return "as planned" if alone else where, [f"plan: {len(record.layers)} convolutions replaced, {told}"]


def kept_dense(unfit: Iterable[tuple[str, Any, Sequence[str]]]) -> list[str]:
    """The convolutions that N or a rank does not fit and that stay dense, by the name of what they belong to, which has
    a variant and a rank."""
    lines = {}
    for name, of, layers in unfit:
        misfit = VARIANTS.get(of.variant, Variant).misfit if of.rank is None else "is too high for"
        said = f"{'N' if of.rank is None else 'the rank'} {misfit.removesuffix(' for')}"
        if layers:
            lines[name] = f"{name}: {said}, kept dense: {', '.join(layers)}"
    return list(lines.values())


def chosen_algorithms(rows: Iterable[ProfileRow | TrainRow], name: Callable[[ProfileRow | TrainRow], str]) -> list[str]:
    """One line on the algorithm that 'auto' found fastest in each row, where it had a choice."""

    def chosen(counts: dict[str, int]) -> str:
        return ", ".join(algorithm if len(counts) == 1 else f"{algorithm} x{n}" for algorithm, n in counts.items())

    told = [
        f"{name(row)}: {'; '.join(f'{phase} {chosen(counts)}' for phase, counts in row.forms.items())}"
        for row in rows
        if row.forms
    ]
    return ["fastest algorithms, as measured: " + ". ".join(told)] if told else []
