"""The tables of a ``profile`` document: a layer's variants; or a network's, and with --layers its convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bgcbench.report.compare import PHASE_TITLES, Comparison, speed_up
from bgcbench.report.format import (
    NAMED,
    bounds_text,
    fixed,
    label_of,
    mebibytes,
    ratio_text,
    scaled,
    share_words,
    significant,
    time_unit,
)
from bgcbench.report.notes import chosen_algorithms, kept_dense, notes, run_lines
from bgcbench.report.table import Column, Report, Table, flat
from bgcbench.results.document import Document
from bgcbench.results.rows import Counts, Derived, Memory, Phase, ProfileParams, ProfileRow, White
from bgcbench.theory import paper

DENSE = "the dense network"
NETWORK_PHASES = {"fwd": "fwd", "fwd_bwd": "train_step"}  # the network's phase that goes with a layer's
Rows = Sequence[ProfileRow]


def profile_report(document: Document) -> Report:
    """The table of one layer's variants, with a verdict on each row."""
    rows: Rows = document.results
    if any(row.params.model for row in rows) or document.asked.model:
        return network_report(document)
    reference, phases = reference_of(rows), measured_phases(rows)
    sections = {}
    if phases:
        title = PHASE_TITLES[phases[-1]]
        sections[f"Verdict ({title})"] = [
            _verdict(row, reference, phases[-1], rows) for row in rows if row is not reference
        ]
        beside = [line for row in rows if (line := _versus_gc(row, rows, phases[-1]))]
        if beside:
            sections[f"BGC beside GC ({title})"] = beside
    table = Table(_layer_title(document), layer_columns(rows, phases, reference), rows, sections)
    facts = chosen_algorithms(rows, lambda row: numbered(row, rows))
    return Report([table], notes(document, facts), profile_records(rows))


def layer_columns(rows: Rows, phases: Sequence[str], reference: ProfileRow | None) -> list[Column[ProfileRow]]:
    columns = [
        Column("variant", lambda row: variant_name(row, rows), meaning=VARIANT, right=False, lead=True),
        Column("N", lambda row: row.params.groups, meaning="Groups.", lead=True),
        *count_columns(),
        Column("white err", white_error, fixed(3), WHITE_ERROR),
    ]
    for phase in phases:
        columns += [time_column(rows, phase), speed_up_column(phase, reference)]
    columns += [
        Column("x+W MiB", lambda row: row.counts and _paper_bytes(row), mebibytes, PAPER_BYTES),
        peak_column(),
        roofline_column(phases),
    ]
    if any(row.paper for row in rows):
        columns += [
            Column("paper ms", lambda row: row.paper and row.paper.time_s * 1e3, fixed(3), f"Table 4's {PRINTED}."),
            Column("paper MiB", lambda row: row.paper and row.paper.memory_bytes, mebibytes, PAPER_MIB),
            Column("paper err %", lambda row: row.paper and row.paper.error, fixed(2), PAPER_ERROR),
        ]
    return [*columns, flags_column(phases)]


# --------------------------------------------------------------------------------------- what the columns mean, and say

VARIANT = (
    "SC is the standard convolution. masked: the algorithm that is trained, with a dense kernel; deployed: what runs "
    "afterwards."
)
PARAMS = "Parameters of the algorithm that ran."
MACS = "Multiply-accumulate operations of one image, forward, in convolutions and fully connected layers."
WHITE_ERROR = "Smallest share of the output's energy that the variant loses on white input (closed form)."
TIME = "Median time of a batch, with its 95 % confidence interval."
SPEED_UP = (
    "Time of the standard convolution, or of the dense network, over the row's, with its 95 % confidence interval."
)
PAPER_BYTES = "Input, weights and, for BGC, the mean: what the paper calls memory."
PEAK = (
    "Weights, momentum and input, and the most that one step held beyond them: by CUDA's allocator, or on the CPU by "
    "sampled resident memory."
)
ROOFLINE = (
    "Share of what the measured ceilings allow for the row's own work in the last phase: C compute-bound, M "
    "memory-bound. It exceeds 100 % where padding is skipped or the convolution beats the matrix product."
)
PRINTED = f"time of Lee, Park & Lee on an {paper.DEVICE}, forward and backward"
PAPER_MIB = "Table 4's memory, which is input, weights and mean, printed as Mb, and no peak."
PAPER_ERROR = "Error of ResNet-50 after transfer (Table 3), not of this layer."
FLAGS = (
    "n=: samples, where the median is not known to the aim of 0.5 %. uneven, noisy: the middle half of the samples "
    "spreads over more than 3 %, 10 % of the median. launch-bound: the host is the limit. page faults: memory came "
    "anew from the system although it was to be kept, which takes over 1 % of the time. kept dense: convolutions whose "
    "channels N does not divide."
)


def count_columns() -> list[Column[ProfileRow]]:
    return [
        Column("params", lambda row: executed(row, "params"), scaled, PARAMS),
        Column("MACs", lambda row: executed(row, "macs"), scaled, MACS),
    ]


def time_column(rows: Rows, phase: str) -> Column[ProfileRow]:
    factor, unit = time_unit(row.phases[phase].summary.median_s for row in rows if phase in row.phases)

    def time(measured: Phase) -> str:
        summary = measured.summary
        digits = max(0, 3 - math.floor(math.log10(summary.median_s * factor)))

        def form(seconds: float) -> str:
            return f"{seconds * factor:.{min(digits, 4)}f}"

        return form(summary.median_s) + bounds_text(summary.ci95_s, form)

    return Column(f"{PHASE_TITLES[phase]} {unit}", lambda row: row.phases.get(phase), time, TIME, "time")


def speed_up_column(phase: str, reference: ProfileRow | None) -> Column[ProfileRow]:
    def text(row: ProfileRow) -> str | None:
        if row is reference:
            return "1"
        compared = speed_up(row, reference, phase)
        return compared.text if compared else None

    return Column(f"speed-up {PHASE_TITLES[phase]}", text, meaning=SPEED_UP, name="speed-up")


def peak_column() -> Column[ProfileRow]:
    return Column("peak MiB", peak, mebibytes, PEAK)


def roofline_column(phases: Sequence[str]) -> Column[ProfileRow]:
    def text(row: ProfileRow) -> str | None:
        measured = row.phases.get(phases[-1]) if phases else None
        if measured is None or measured.derived.roofline_fraction is None:
            return None
        letter = {"compute": "C", "memory": "M"}.get(measured.derived.bound or "", "")
        return f"{measured.derived.roofline_fraction:.0%} {letter}"

    return Column("roofline", text, meaning=ROOFLINE)


def flags_column(phases: Sequence[str]) -> Column[ProfileRow]:
    return Column("flags", lambda row: ", ".join(flags(row, phases)), meaning=FLAGS, right=False)


# ---------------------------------------------------------------------------------------------------- what a row holds


def reference_of(rows: Rows) -> ProfileRow | None:
    """The standard convolution's row, or the dense network's."""
    return next((row for row in rows if row.params.variant == "standard" and row.phases), None)


def measured_phases(rows: Rows, among: Iterable[str] = PHASE_TITLES) -> list[str]:
    return [phase for phase in among if any(phase in row.phases for row in rows)]


def variant_name(row: ProfileRow, rows: Rows) -> str:
    """The variant's label, with its algorithm where several are in the table; a network without one is dense."""
    variant = row.params.variant
    if row.params.model and variant == "standard":
        return "dense"
    algorithms = {other.params.algorithm for other in rows if other.params.variant == variant}
    return label_of(variant) if len(algorithms) < 2 else f"{label_of(variant)} {row.params.algorithm}"


def numbered(row: ProfileRow, rows: Rows) -> str:
    return f"{variant_name(row, rows)} N={row.params.groups}"


def executed(row: ProfileRow, name: str) -> int | None:
    """``params`` or ``macs`` of the algorithm that ran: a masked one trains dense kernels."""
    trained = getattr(row.counts, f"{name}_training", None) if row.params.algorithm == "masked" else None
    count: int | None = getattr(row.counts, name, None) if trained is None else trained
    return count


def white_error(row: ProfileRow) -> float | None:
    return row.approximability.white_error if row.approximability else None


def _paper_bytes(row: ProfileRow) -> int | None:
    return row.memory.paper_bytes if row.memory else None


def peak(row: ProfileRow) -> int | None:
    """Layer (or network, with its momentum) and input, and the most that a step held beyond them."""
    memory = row.memory
    if memory is None or memory.peak_delta_bytes is None:
        return None
    return memory.params_bytes + memory.input_bytes + memory.optimizer_bytes + memory.peak_delta_bytes


def flags(row: ProfileRow, phases: Sequence[str]) -> list[str]:
    """What to know before a row's numbers are used."""
    dense = row.convert.indivisible if row.convert else []
    return _measured_flags(row, phases) + ([f"{len(dense)} kept dense"] if dense else [])


def _measured_flags(row: ProfileRow, phases: Sequence[str]) -> list[str]:
    if row.status != "ok":
        failed = [f"{PHASE_TITLES.get(phase, phase)} {failure.status}" for phase, failure in row.failures.items()]
        whole = all(_ending(row, phase) == row.status for phase in row.phases)
        return [row.status] if whole else failed
    by_phase = {PHASE_TITLES[phase]: _phase_flags(row.phases[phase]) for phase in phases if phase in row.phases}
    shared = list(by_phase.values())
    if shared and all(found == shared[0] for found in shared):
        return shared[0]
    return [f"{title} {flag}" for title, found in by_phase.items() for flag in found]


def _phase_flags(measured: Phase) -> list[str]:
    summary = measured.summary
    spread = (summary.q3_s - summary.q1_s) / summary.median_s
    found = []
    if spread > 0.03:
        found.append("noisy" if spread > 0.10 else "uneven")
    if not measured.converged:
        found.append(f"n={summary.n}")
    if measured.derived.launch_bound:
        found.append("launch-bound")
    if measured.derived.page_faults:
        found.append("page faults")
    return found


def _ending(row: ProfileRow, phase: str) -> str:
    """The status that ``phase`` ended with: the row's, unless only others of its phases have failed."""
    if not row.failures or row.status == "interrupted":
        return row.status
    return row.failures[phase].status if phase in row.failures else "ok"


def _ending_words(row: ProfileRow, phase: str) -> str:
    """ " [error]", and nothing where all is well."""
    how = _ending(row, phase)
    return "" if how == "ok" else f" [{how}]"


# -------------------------------------------------------------------------------------------------- verdicts on a layer


def _layer_title(document: Document) -> list[str]:
    lines = run_lines(document)
    if document.results:
        p = document.results[0].params
        lines.insert(
            0,
            f"{p.kernel}x{p.kernel} convolution, {p.in_channels} -> {p.out_channels} channels, stride {p.stride}, "
            f"input {p.batch} x {p.in_channels} x {p.height} x {p.width}",
        )
    return lines


def _size(row: ProfileRow, other: ProfileRow) -> str:
    ours, theirs = executed(row, "params"), executed(other, "params")
    return share_words(ours / theirs) if ours and theirs else "unknown parameters"


def _verdict(row: ProfileRow, reference: ProfileRow | None, phase: str, rows: Rows) -> str:
    """One row in plain words: how much faster than the standard convolution, how large, what it loses."""
    name = numbered(row, rows)
    if row.status != "ok" and phase not in row.phases:
        return f"{name}: {row.status}: {row.reason}"
    error = white_error(row)
    loss = "" if error is None else f"; white error {error:.3g}"
    compared = speed_up(row, reference, phase)
    if compared is None or reference is None:
        return f"{name} has {scaled(executed(row, 'params') or 0)} parameters{loss} (no reference was measured)"
    return f"{name} is {compared.versus('standard')} with {_size(row, reference)}{loss}{_ending_words(row, phase)}"


def _versus_gc(row: ProfileRow, rows: Rows, phase: str) -> str | None:
    """BGC at N versus GC at the same N, and versus GC of the same number of parameters (N/2)."""
    if row.params.variant != "bgc" or phase not in row.phases:
        return None
    gc: dict[float, ProfileRow] = {other.params.groups: other for other in rows if other.params.variant == "gc"}
    parts = []
    for groups, why in (
        (row.params.groups, "with twice its parameters"),
        (row.params.groups / 2, "with as many parameters"),
    ):
        compared = speed_up(row, gc.get(int(groups)) if groups % 1 == 0 else None, phase)
        if compared is not None:
            parts.append(f"{compared.versus(f'GC N={groups:.0f}')} {why}")
    return f"{numbered(row, rows)} is " + "; ".join(parts) if parts else None


# ------------------------------------------------------------------------------------------------------------- networks


def network_report(document: Document) -> Report:
    """The table of a network with a verdict line a row, the best row, and the table of its layers."""
    rows = [row for row in document.results if row.params.layer is None]
    layers = [row for row in document.results if row.params.layer is not None]
    reference, phases = reference_of(rows), measured_phases(rows)
    columns = [
        Column("network", lambda row: variant_name(row, rows), meaning=NETWORK, right=False, lead=True),
        Column("N", lambda row: row.params.groups, meaning="Groups.", lead=True),
        Column("replaced", lambda row: row.convert and len(row.convert.replaced), meaning="Convolutions replaced."),
        *count_columns(),
    ]
    for phase in phases:
        title = f"{PHASE_TITLES[phase]} images/s"
        columns += [
            time_column(rows, phase),
            Column(title, partial(_images, phase=phase), meaning="Images a second.", name="images/s"),
            speed_up_column(phase, reference),
        ]
    columns += [peak_column(), roofline_column(phases), flags_column(phases)]
    sections = {
        f"Verdict ({PHASE_TITLES[phase]})": [
            _network_verdict(row, reference, phase, rows) for row in rows if row is not reference
        ]
        for phase in phases
    }
    best = [line for phase in phases if (line := _best(rows, reference, phase))]
    if best:
        sections["Best"] = best
    facts = kept_dense(rows, lambda row: numbered(row, rows)) + chosen_algorithms(rows, lambda row: numbered(row, rows))
    tables = [Table(_network_title(document), columns, rows, sections)]
    tables += [_layers_table(layers, reference)] if layers else []
    return Report(tables, notes(document, facts), profile_records(document.results))


NETWORK = f"dense is the network as it is. {VARIANT.partition('. ')[2]}"


def _network_title(document: Document) -> list[str]:
    asked = document.asked
    if asked.model is None:
        return run_lines(document)
    stem = f", stem stride {asked.stem_stride}" if asked.stem_stride else ""
    size = f"{asked.batch} x 3 x {asked.height} x {asked.width}"
    about = f"{asked.model}, {asked.num_classes} classes{stem}, input {size}; replaced: {asked.where}"
    return [about, *run_lines(document)]


def _images(row: ProfileRow, phase: str) -> str | None:
    return significant(row.phases[phase].derived.images_per_s, 4) if phase in row.phases else None


def _network_verdict(row: ProfileRow, reference: ProfileRow | None, phase: str, rows: Rows) -> str:
    """One row in plain words: how much faster than the dense network, how large, how many images a second."""
    name = numbered(row, rows)
    if phase not in row.phases:
        failure = row.failures.get(phase, row)
        return f"{name}: {failure.status}: {failure.reason}"
    speed = f"{_images(row, phase)} images/s"
    compared = speed_up(row, reference, phase)
    if compared is None or reference is None:
        return f"{name} has {scaled(executed(row, 'params') or 0)} parameters and runs {speed} (no reference)"
    return f"{name} is {compared.versus(DENSE)} with {_size(row, reference)}; {speed}{_ending_words(row, phase)}"


def _best(rows: Rows, reference: ProfileRow | None, phase: str) -> str | None:
    """The row with the shortest time in ``phase``, versus the dense network and versus the next one."""
    there = [row for row in rows if phase in row.phases and row is not reference]
    if not there or any(row.status == "interrupted" for row in rows):
        return None
    there.sort(key=lambda row: row.phases[phase].summary.median_s)
    first = there[0]
    compared = speed_up(first, reference, phase)
    if compared is None:
        return None
    title = PHASE_TITLES[phase]
    if not compared.faster:
        return f"{title}: none is surely faster than {DENSE}; the shortest time is {numbered(first, rows)}'s"
    text = f"{title}: {numbered(first, rows)}, {compared.versus(DENSE)}"
    if len(there) > 1:
        ahead = speed_up(first, there[1], phase)
        alike = ahead is not None and ahead.significant is False
        after = numbered(there[1], rows)
        text += f"; {after} cannot be told apart from it" if alike else f"; next is {after}"
    return text


# --------------------------------------------------------------------------------------------- a network's convolutions

SHARE = (
    "Time of all convolutions of this shape, each by itself, over the dense network's: an estimate, because nothing is "
    "fused with a convolution by itself and its input lies where the last call left it."
)
FASTEST = (
    "The fastest variant in its place, and its speed-up; itself: none is significantly faster; kept: not replaced."
)


def _layers_table(rows: Rows, network: ProfileRow | None) -> Table:
    """Each distinct convolution: how often it runs, its share of the network's time, and what is faster there."""
    phases = measured_phases(rows, NETWORK_PHASES)
    own = [row for row in rows if row.params.variant == "standard" and row.layer]
    by_layer: dict[int | None, list[ProfileRow]] = {}
    for row in rows:
        by_layer.setdefault(row.params.layer, []).append(row)
    if phases:
        own.sort(key=lambda row: -_total(row, phases[-1]))
    columns: list[Column[ProfileRow]] = [
        Column("convolution", _shape, meaning="Channels, kernel and input of a shape.", right=False, lead=True),
        Column("times", _times, meaning="How often the network has it."),
    ]
    for phase in phases:
        title = PHASE_TITLES[phase]
        columns += [
            time_column(own, phase),
            Column(f"share {title}", partial(_share, network=network, phase=phase), meaning=SHARE, name="share"),
            Column(
                f"fastest {title}",
                partial(_fastest, by_layer=by_layer, phase=phase),
                meaning=FASTEST,
                name="fastest",
                right=False,
            ),
        ]
    columns.append(flags_column(phases))
    sections = {}
    for phase in phases:
        lines = _where_time_goes(own, network, phase) + _sped_up(own, by_layer, phase)
        if lines:
            sections[f"Where the time goes ({PHASE_TITLES[phase]})"] = lines
    return Table(["Convolutions by themselves"], columns, own, sections)


def _shape(row: ProfileRow) -> str:
    return row.layer.label if row.layer else ""


def _times(row: ProfileRow) -> int:
    return row.layer.count if row.layer else 0


def _total(row: ProfileRow, phase: str) -> float:
    """Seconds that all convolutions of this shape take in one pass."""
    return row.phases[phase].summary.median_s * _times(row) if phase in row.phases else 0.0


def _network_s(network: ProfileRow | None, phase: str) -> float | None:
    """Seconds of the dense network in the phase that goes with a layer's."""
    measured = network.phases.get(NETWORK_PHASES[phase]) if network else None
    return measured.summary.median_s if measured else None


def _share(row: ProfileRow, network: ProfileRow | None, phase: str) -> str | None:
    whole = _network_s(network, phase)
    return None if whole is None or phase not in row.phases else f"{_total(row, phase) / whole:.1%}"


def _fastest(row: ProfileRow, by_layer: Mapping[int | None, Rows], phase: str) -> str | None:
    """Of the variants in place of the network's own convolution ``row``."""
    members = by_layer[row.params.layer]
    if row.layer and not row.layer.replaced:
        return "kept"
    compared = [(found, other) for other in members if other is not row and (found := speed_up(other, row, phase))]
    if not compared:
        return None
    first, other = max(compared, key=lambda pair: pair[0].value)
    return f"{numbered(other, members)} {ratio_text(first.value)}x" if first.faster else "itself"


def _where_time_goes(own: Rows, network: ProfileRow | None, phase: str) -> list[str]:
    whole = _network_s(network, phase)
    measured = sorted((row for row in own if phase in row.phases), key=lambda row: -_total(row, phase))
    if whole is None or not measured:
        return []
    convolutions = sum(_total(row, phase) for row in measured)
    replaced = sum(_total(row, phase) for row in measured if row.layer and row.layer.replaced)
    top = ", ".join(f"{_shape(row)} ({_times(row)}x, {_share(row, network, phase)})" for row in measured[:3])
    return [
        f"all convolutions, each by itself, take {convolutions / whole:.0%} of the network's time; those that are "
        f"replaced {replaced / whole:.0%}",
        f"most of it: {top}",
    ]


def _sped_up(own: Rows, by_layer: Mapping[int | None, Rows], phase: str) -> list[str]:
    """For each variant and N: in how many of the replaced shapes it is significantly faster, and where it is not."""
    outcomes: dict[str, list[tuple[ProfileRow, Comparison]]] = {}
    for row in own:
        members = by_layer[row.params.layer]
        for other in members:
            if other is not row and (compared := speed_up(other, row, phase)):
                outcomes.setdefault(numbered(other, members), []).append((row, compared))
    return [_sped_up_line(name, found, phase) for name, found in outcomes.items()]


def _sped_up_line(name: str, found: Sequence[tuple[ProfileRow, Comparison]], phase: str) -> str:
    saved = [_total(row, phase) * (1 - 1 / compared.value) for row, compared in found if compared.faster]
    rest = [f"{_shape(row)} ({ratio_text(compared.value)}x)" for row, compared in found if not compared.faster]
    line = f"{name} is faster in {len(saved)} of {len(found)} replaced shapes"
    if saved:
        line += f", saving {significant(sum(saved) * 1e3)} ms a call there"
    if saved and rest:
        line += f"; not in {', '.join(rest[:NAMED])}" + (f" and {len(rest) - NAMED} more" * (len(rest) > NAMED))
    return line


# -------------------------------------------------------------------------------------------------------------- records


def profile_records(rows: Rows) -> list[dict[str, Any]]:
    """One flat record a row and phase, in SI units, for CSV.

    Each is held against its own reference: the standard convolution, the dense network, or the network's own layer.
    """
    references: dict[int | None, ProfileRow] = {}
    for row in rows:
        if row.params.variant == "standard" and row.phases:
            references.setdefault(row.params.layer, row)
    records = []
    for row in rows:
        about = {"key": row.key, **flat(row.params, ProfileParams), "status": row.status, "reason": row.reason}
        about |= flat(row.counts, Counts) | flat(row.approximability, White) | flat(row.memory, Memory)
        for phase in row.phases or (None,):
            records.append(about | _measured_record(row, references.get(row.params.layer), phase))
    return records


def _measured_record(row: ProfileRow, reference: ProfileRow | None, phase: str | None) -> dict[str, Any]:
    if phase is None:
        return {"phase": None}
    measured, compared = row.phases[phase], speed_up(row, reference, phase)
    low, high = measured.summary.ci95_s or (None, None)
    ends = compared.interval if compared else None
    return {
        "phase": phase,
        "n": measured.summary.n,
        "median_s": measured.summary.median_s,
        "ci95_low_s": low,
        "ci95_high_s": high,
        "converged": measured.converged,
        "minor_faults_per_call": measured.minor_faults_per_call,
        "speed_up": compared.value if compared else None,
        "speed_up_low": ends.low if ends else None,
        "speed_up_high": ends.high if ends else None,
        **flat(measured.derived, Derived),
    }
