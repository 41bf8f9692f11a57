"""The tables of a ``profile`` document: a layer's variants, or a network's."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bgcbench.report.compare import ratio_record, speed_up
from bgcbench.report.format import scaled, share_words
from bgcbench.report.layers import layers_table
from bgcbench.report.measured import (
    Rows,
    ending,
    measured_phases,
    network_speed,
    numbered,
    profile_columns,
    reference_of,
    white_error,
)
from bgcbench.report.notes import chosen_algorithms, kept_dense, notes, replaced_lines, run_lines
from bgcbench.report.side_by_side import comparison_table
from bgcbench.report.table import Report, Table, flat, row_record, with_all_columns
from bgcbench.results.aggregate import at_equal_n, at_equal_params
from bgcbench.results.document import Document
from bgcbench.results.rows import Derived, Memory, ProfileRow, White
from bgcbench.results.times import is_doubtful
from bgcbench.specs import PHASE_TITLES

DENSE = "the dense network"


def profile_report(document: Document) -> Report:
    """The table of a layer or a network with verdicts on its rows, and of a network's convolutions (--layers).

    Of several modes each has its own, versus the standard convolution in that mode, and the modes are compared.
    """
    by_mode: dict[str, list[ProfileRow]] = {}
    for row in document.results:
        by_mode.setdefault(row.params.mode, []).append(row)
    several = len(by_mode) > 1
    tables: list[Table] = []
    for mode, rows in (by_mode or {"": []}).items():
        title = [*([] if tables else _title(document, rows)), *([f"mode: {mode}"] if several else [])]
        made = _tables(document, rows, title)
        tables += [replace(table, caption=f"{mode}, {table.caption}") if several and table.caption else table
                   for table in made]  # fmt: skip
    if several:
        last = max(number for number, table in enumerate(tables) if not table.full)  # that a terminal shows
        tables[last] = replace(tables[last], sections={**tables[last].sections, **_modes_compared(by_mode)})

    def name(row: Any) -> str:
        return numbered(row, by_mode[row.params.mode]) + (f" in {row.params.mode}" if several else "")

    whole = [row for row in document.results if row.params.layer is None]
    facts = kept_dense((name(row), row.params, row.convert.indivisible) for row in whole if row.convert)
    facts += chosen_algorithms(whole, name)
    return Report(tables, notes(document, facts), profile_records(document.results))


def _tables(document: Document, every: Rows, title: list[str]) -> list[Table]:
    """Those of one mode."""
    rows = [row for row in every if row.params.layer is None]
    layers = [row for row in every if row.params.layer is not None]
    reference, phases, network = reference_of(rows), measured_phases(rows), _is_network(document, rows)
    shown = phases if network else phases[-1:]
    best = [line for phase in phases if (line := _best(rows, reference, phase))] if network else []
    sections = {"Best": best}
    for phase in shown:
        verdicts = [_verdict(row, reference, phase, rows) for row in rows if row is not reference]
        sections[f"Verdict ({PHASE_TITLES[phase]})"] = verdicts
        lines = [] if network else [line for row in rows if (line := _versus_gc(row, rows, phase))]
        sections[f"BGC versus GC ({PHASE_TITLES[phase]})"] = lines
    columns = profile_columns("network" if network else "variant", rows, phases, reference)
    made = [comparison_table(title if phase == shown[0] else [], rows, reference, phase) for phase in shown]
    made = with_all_columns(made, Table(title, columns, rows, sections))
    return [*made, *([layers_table(layers, reference)] if layers else [])]


def _modes_compared(by_mode: Mapping[str, Rows]) -> dict[str, list[str]]:
    """Each row of the first mode versus the same in the others, by the heading of its phase."""
    (first, own), *others = ((mode, [row for row in rows if not row.layer]) for mode, rows in by_mode.items())
    found: dict[str, list[str]] = {}
    for phase in measured_phases(own):
        found[f"Modes ({PHASE_TITLES[phase]})"] = lines = []
        for base, (mode, rows) in itertools.product(own, others):
            for row in (each for each in rows if each.params.cell == base.params.cell):
                if compared := speed_up(row, base, phase):
                    versus = compared.versus(f"{numbered(base, own)} in {first}")
                    lines.append(f"{numbered(row, rows)} in {mode} is {versus}")
    return found


def _is_network(document: Document, rows: Rows) -> bool:
    return document.asked.model is not None or any(row.params.model for row in rows)


def _title(document: Document, rows: Rows) -> list[str]:
    asked, lines, network = document.asked, run_lines(document), _is_network(document, rows)
    if network and asked.model:
        stem = f", stem stride {asked.stem_stride}" if asked.stem_stride else ""
        size = f"{asked.batch} x 3 x {asked.height} x {asked.width}"
        where, planned = replaced_lines([row for row in rows if row.params.layer is None], asked.where)
        about = f"{asked.model}, {asked.num_classes} classes{stem}, input {size}; replaced: {where}"
        return [about, *planned, *lines]
    if not document.results or network:
        return lines
    p = document.results[0].params
    about = f"{p.kernel}x{p.kernel} convolution, {p.in_channels} -> {p.out_channels} channels, stride {p.stride}"
    return [f"{about}, input {p.batch} x {p.in_channels} x {p.height} x {p.width}", *lines]


# ------------------------------------------------------------------------------------------------------------- verdicts


def _verdict(row: ProfileRow, reference: ProfileRow | None, phase: str, rows: Rows) -> str:
    """One row in plain words: how much faster than the reference and how large; what it loses, or images a second."""
    name, error, speed = numbered(row, rows), white_error(row), network_speed(row, phase)
    how = ending(row, phase)
    if row.status != "ok" and phase not in row.phases:
        failure = row.failures.get(phase, row)
        return f"{name}: {failure.status}: {failure.reason}"
    more = f"; {speed} images/s" if speed else "" if error is None else f"; white error {error:.3g}"
    if is_doubtful(row, phase, reference):
        return f"{name} is doubtful ({row.phases[phase].summary.n} samples): measure again, on a quiet machine"
    ours, theirs = (counted.ran.params if counted and counted.ran else 0 for counted in (row, reference))
    compared = speed_up(row, reference, phase)
    if compared is None:
        return f"{name} has {scaled(ours)} parameters{more} (no reference was measured)"
    size = share_words(ours / theirs) if ours and theirs else "unknown parameters"
    other = DENSE if row.params.model else "standard"
    joined = " with" if compared.ci95 else "; it has"
    return f"{name} is {compared.versus(other)}{joined} {size}{more}" + ("" if how == "ok" else f" [{how}]")


def _versus_gc(row: ProfileRow, rows: Rows, phase: str) -> str | None:
    """BGC at N versus GC at the same N, and versus GC of the same number of parameters (N/2)."""
    if row.params.variant != "bgc" or phase not in row.phases:
        return None
    at = {("gc", other.params.groups): other for other in rows if other.params.variant == "gc"}
    at["bgc", row.params.groups] = row
    parts = []
    for pairs, why in ((at_equal_n(at), "with twice its parameters"), (at_equal_params(at), "with as many parameters")):
        for _, gc in pairs:
            if (compared := speed_up(row, gc, phase)) and compared.ci95:
                parts.append(f"{compared.versus(f'GC N={gc.params.groups}')} {why}")
    return f"{numbered(row, rows)} is " + "; ".join(parts) if parts else None


def _best(rows: Rows, reference: ProfileRow | None, phase: str) -> str | None:
    """The row with the shortest time in ``phase``, versus the dense network and versus the next one."""
    there = [row for row in rows if phase in row.phases and row is not reference]
    there = [row for row in there if not is_doubtful(row, phase, reference)]
    if not there or any(ending(row, phase) == "interrupted" for row in rows):
        return None
    first, *others = sorted(there, key=lambda row: row.median_s(phase) or 0.0)
    title, name, compared = PHASE_TITLES[phase], numbered(first, rows), speed_up(first, reference, phase)
    if compared is None:
        return None
    if compared.is_significant is None:
        return f"{title}: not known yet, from too few rounds for an interval"
    if not compared.faster:
        return f"{title}: none is significantly faster than {DENSE}; the shortest time is {name}'s"
    text = f"{title}: {name}, {compared.versus(DENSE)}"
    if not others:
        return text
    ahead, after = speed_up(first, others[0], phase), numbered(others[0], rows)
    alike = ahead is not None and ahead.is_significant is not True
    return f"{text}; {after} is not significantly slower" if alike else f"{text}; next is {after}"


# -------------------------------------------------------------------------------------------------------------- records


def profile_records(rows: Rows) -> list[dict[str, Any]]:
    """One flat record a row and phase, in SI units, for CSV.

    Each is held against its own reference: the standard convolution, the dense network, or the network's own layer.
    """
    references: dict[tuple[int | None, str], ProfileRow] = {}
    records: list[dict[str, Any]] = []
    for row in rows:
        if row.params.variant == "standard" and row.phases:
            references.setdefault((row.params.layer, row.params.mode), row)
    for row in rows:
        about = row_record(row, without=ProfileRow.__struct_fields__)
        about.pop("kernel_width")  # of a network's few kernels that are not square: in the file alone
        about |= flat(row.approximability, White) | flat(row.memory, Memory)
        about |= {"modules": ", ".join(row.layer.names) if row.layer else None}
        reference = references.get((row.params.layer, row.params.mode))
        records += [about | _measured(row, reference, phase) for phase in row.phases] or [about | {"phase": None}]
    return records


def _measured(row: ProfileRow, reference: ProfileRow | None, phase: str) -> dict[str, Any]:
    measured, compared = row.phases[phase], speed_up(row, reference, phase)
    low, high = measured.summary.ci95_s or (None, None)
    return {
        "phase": phase,
        "n": measured.summary.n,
        "median_s": measured.summary.median_s,
        "ci95_low_s": low,
        "ci95_high_s": high,
        "converged": measured.converged,
        "minor_faults_per_call": measured.minor_faults_per_call,
        **ratio_record(compared, "speed_up"),
        **flat(measured.derived, Derived),
    }
