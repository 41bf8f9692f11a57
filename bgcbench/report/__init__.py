"""Tables and sentences from a result document. Units are formatted here and nowhere else. No torch.

A report is built once from the document and then rendered as a rich table, Markdown or CSV, so a live run and the
file it wrote read alike.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bgcbench.errors import UsageError
from bgcbench.measure.counts import count
from bgcbench.measure.statistics import Interval, Ratio, Series, ratio_of_medians
from bgcbench.results import Json, dumps, measurement_warnings, printable
from bgcbench.specs import VARIANTS, ConvSpec, Preprocessing
from bgcbench.theory import paper
from bgcbench.theory.exact import white_error

PHASE_TITLES = {"fwd": "fwd", "bwd": "bwd", "fwd_bwd": "fwd+bwd", "train_step": "train step"}
MIB = 2**20


@dataclass(frozen=True)
class Column:
    """One column: its header, its cells as text, and whether it repeats in front of every part of a split table."""

    header: str
    cells: list[str]
    right: bool = True
    lead: bool = False

    @property
    def width(self) -> int:
        return max(cell_len(text) for text in (self.header, *self.cells))


@dataclass(frozen=True)
class Report:
    """A title, one table, lines under it, and further tables (``more``) before the notes.

    ``records`` is the same content for CSV and JSON.
    """

    title: list[str]
    columns: list[Column]
    sections: dict[str, list[str]] = field(default_factory=dict)
    records: list[Json] = field(default_factory=list)
    more: list[Report] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ numbers as text


def significant(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits, never in exponent form."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def scaled(value: float) -> str:
    """A count with k, M, G or T."""
    for factor, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return significant(value / factor) + letter
    return significant(value, 3) if value % 1 else f"{value:.0f}"


def time_unit(seconds: Sequence[float]) -> tuple[float, str]:
    """(factor, name) of the unit in which the largest of ``seconds`` reads best."""
    largest = max(seconds, default=1.0)
    for factor, name in ((1.0, "s"), (1e3, "ms")):
        if largest * factor >= 1:
            return factor, name
    return 1e6, "us"


def mebibytes(count_bytes: float | None) -> str:
    return "-" if count_bytes is None else f"{count_bytes / MIB:.2f}"


def bounds_text(interval: Interval | None, form: Callable[[float], str]) -> str:
    return "" if interval is None else f" [{form(interval.low)}, {form(interval.high)}]"


def ratio_text(value: float) -> str:
    return f"{value:.2f}" if value < 10 else significant(value, 3)


# --------------------------------------------------------------------------------------------------------- profile


def profile_report(document: Json) -> Report:
    """The table of a ``profile`` document with a verdict line a row."""
    rows: list[Json] = document["results"]
    reference = next((r for r in rows if r["params"]["variant"] == "standard" and r["phases"]), None)
    phases = [p for p in PHASE_TITLES if any(p in row["phases"] for row in rows)]
    columns = [
        Column("variant", [variant_name(row, rows) for row in rows], right=False, lead=True),
        Column("N", [str(row["params"]["groups"]) for row in rows], lead=True),
        Column("params", counted(rows, lambda r: scaled(executed_count(r, "params")))),
        Column("MACs", counted(rows, lambda r: scaled(executed_count(r, "macs")))),
        Column("white err", counted(rows, _white)),
    ]
    for phase in phases:
        factor, unit = time_unit([r["phases"][phase]["summary"]["median_s"] for r in rows if phase in r["phases"]])
        columns.append(Column(f"{PHASE_TITLES[phase]} {unit}", [time_text(row, phase, factor) for row in rows]))
        columns.append(Column(f"speed-up {PHASE_TITLES[phase]}", [speed_up(row, reference, phase) for row in rows]))
    columns += [
        Column("x+W MiB", counted(rows, lambda r: mebibytes(r["memory"]["paper_bytes"]))),
        Column("peak MiB", counted(rows, lambda r: mebibytes(peak(r)))),
        Column("roofline", [roofline(row, phases) for row in rows]),
    ]
    printed = any(row["paper"] for row in rows)
    if printed:
        columns += [
            Column("paper ms", [_paper(r, lambda p: f"{p['time_s'] * 1e3:.3f}") for r in rows]),
            Column("paper MiB", [_paper(r, lambda p: f"{p['memory_bytes'] / MIB:.2f}") for r in rows]),
            Column("paper err %", [_paper(r, lambda p: f"{p['error']:.2f}") for r in rows]),
        ]
    columns.append(Column("flags", [", ".join(flags(row, phases)) for row in rows], right=False))
    sections = {}
    if phases:
        primary = phases[-1]
        sections[f"Verdict ({PHASE_TITLES[primary]})"] = [
            verdict(row, reference, primary, rows) for row in rows if row is not reference
        ]
        beside = [line for row in rows if (line := _beside_gc(row, rows, primary))]
        if beside:
            sections[f"BGC beside GC ({PHASE_TITLES[primary]})"] = beside
    sections["Notes"] = _profile_notes(document, rows, printed)
    return Report(_profile_title(document), columns, sections, profile_records(document))


def counted(rows: Sequence[Json], text: Callable[[Json], str]) -> list[str]:
    return [text(row) if row["counts"] else "-" for row in rows]


def label_of(variant: str) -> str:
    """A variant's name in tables; one that a newer version has written is called what it is."""
    return VARIANTS[variant].label if variant in VARIANTS else variant


def variant_name(row: Json, rows: Sequence[Json]) -> str:
    """The variant's label, with its algorithm where several are in the table."""
    variant = row["params"]["variant"]
    forms = {r["params"]["algorithm"] for r in rows if r["params"]["variant"] == variant}
    label = label_of(variant)
    return label if len(forms) < 2 else f"{label} {row['params']['algorithm']}"


def executed_count(row: Json, name: str) -> int:
    """``params`` or ``macs`` of the form that ran: a masked one trains dense kernels."""
    counts: dict[str, int] = row["counts"]
    return counts.get(f"{name}_training", counts[name]) if row["params"]["algorithm"] == "masked" else counts[name]


def _white_error(row: Json) -> float | None:
    return (row["approximability"] or {}).get("white_error")


def _white(row: Json) -> str:
    error = _white_error(row)
    return "-" if error is None else f"{error:.3f}"


def peak(row: Json) -> int | None:
    """Layer (or network, with its momentum) and input, and the most that a step held beyond them."""
    memory = row["memory"]
    if memory["peak_delta_bytes"] is None:
        return None
    held: int = memory["params_bytes"] + memory["input_bytes"] + memory.get("optimizer_bytes", 0)
    return held + int(memory["peak_delta_bytes"])


def time_text(row: Json, phase: str, factor: float) -> str:
    if phase not in row["phases"]:
        return "-"
    summary = row["phases"][phase]["summary"]
    digits = max(0, 3 - math.floor(math.log10(summary["median_s"] * factor)))

    def form(seconds: float) -> str:
        return f"{seconds * factor:.{min(digits, 4)}f}"

    interval = Interval(*summary["ci95_s"]) if summary["ci95_s"] else None
    return form(summary["median_s"]) + bounds_text(interval, form)


def _series(row: Json, phase: str) -> Series:
    measured = row["phases"][phase]
    return Series(measured["samples_s"], measured["rounds"])


def row_ratio(over: Json | None, under: Json | None, phase: str) -> Ratio | None:
    """Time of ``over`` divided by time of ``under``; None where one of them was not measured."""
    if over is None or under is None or phase not in over["phases"] or phase not in under["phases"]:
        return None
    paired = over.get("interleaved") is not None and over.get("interleaved") == under.get("interleaved")
    top, bottom = _series(over, phase), _series(under, phase)
    return _ratio(tuple(top.samples), tuple(top.rounds), tuple(bottom.samples), tuple(bottom.rounds), paired)


@functools.lru_cache(maxsize=2048)
def _ratio(
    top: tuple[float, ...], rounds: tuple[int, ...], bottom: tuple[float, ...], others: tuple[int, ...], paired: bool
) -> Ratio:
    """The ratio, bootstrapped once: the table, the verdict and the records all ask for it."""
    return ratio_of_medians(Series(top, rounds), Series(bottom, others), paired=paired)


def speed_up(row: Json, reference: Json | None, phase: str) -> str:
    if row is reference:
        return "1"
    ratio = row_ratio(reference, row, phase)
    return "-" if ratio is None else ratio_text(ratio.value) + bounds_text(ratio.ci95, ratio_text)


def roofline(row: Json, phases: Sequence[str]) -> str:
    measured = row["phases"].get(phases[-1]) if phases else None
    if measured is None or measured["derived"]["roofline_fraction"] is None:
        return "-"
    letter = {"compute": "C", "memory": "M"}.get(measured["derived"]["bound"], "")
    return f"{measured['derived']['roofline_fraction']:.0%} {letter}"


def _paper(row: Json, text: Callable[[Json], str]) -> str:
    return text(row["paper"]) if row["paper"] else "-"


def flags(row: Json, phases: Sequence[str]) -> list[str]:
    """What to know before a row's numbers are used."""
    if row["status"] != "ok":
        failed = [f"{PHASE_TITLES.get(p, p)} {found['status']}" for p, found in row.get("failures", {}).items()]
        whole = all(ending(row, phase) == row["status"] for phase in row["phases"])
        return [row["status"]] if whole else failed
    by_phase = {PHASE_TITLES[p]: _phase_flags(row["phases"][p]) for p in phases if p in row["phases"]}
    shared = list(by_phase.values())
    if shared and all(found == shared[0] for found in shared):
        return shared[0]
    return [f"{title} {flag}" for title, found in by_phase.items() for flag in found]


def ending(row: Json, phase: str) -> str:
    """The status that ``phase`` ended with: the row's, unless only others of its phases have failed."""
    failures: Json = row.get("failures", {})
    if not failures or row["status"] == "interrupted":
        return str(row["status"])
    return str(failures[phase]["status"]) if phase in failures else "ok"


def ending_words(row: Json, phase: str) -> str:
    """ " [error]", and nothing where all is well."""
    how = ending(row, phase)
    return "" if how == "ok" else f" [{how}]"


def _phase_flags(measured: Json) -> list[str]:
    summary = measured["summary"]
    spread = (summary["q3_s"] - summary["q1_s"]) / summary["median_s"]
    found = []
    if spread > 0.03:
        found.append("noisy" if spread > 0.10 else "uneven")
    if not measured["converged"]:
        found.append(f"n={summary['n']}")
    if measured["derived"].get("launch_bound"):
        found.append("launch-bound")
    if measured["derived"].get("page_faults"):
        found.append("page faults")
    return found


def share_words(fraction: float) -> str:
    """A share of the parameters in words where English has one."""
    words = {1.0: "the same number of", 0.5: "half the", 0.25: "a quarter of the", 2.0: "twice the"}
    named = words.get(round(fraction, 6))
    return f"{named} parameters" if named else f"{significant(100 * fraction)} % of the parameters"


def compare_words(ratio: Ratio, other: str) -> str:
    """ "2.9x faster than standard (95% CI 2.8-3.0)", from ratio = time of the other / time of this row."""
    interval = ratio.ci95
    if interval is None:
        how = "faster" if ratio.value >= 1 else "slower"
        value = max(ratio.value, 1 / ratio.value)
        return f"about {ratio_text(value)}x {how} than {other} (no interval)"
    apart = "" if ratio.paired else ", measured apart"
    if not ratio.is_significant:
        bound = max(abs(interval.low - 1), abs(interval.high - 1))
        if bound > 0.1:
            span = f"{ratio_text(interval.low)}-{ratio_text(interval.high)}"
            return f"not told apart from {other} (95% CI of the speed-up {span}{apart})"
        return f"as fast as {other}: no detectable difference (< {significant(100 * bound, 2)} %{apart})"
    value, low, high, how = ratio.value, interval.low, interval.high, "faster"
    if value < 1:
        value, low, high, how = 1 / value, 1 / high, 1 / low, "slower"
    digits = 2 if value < 1.95 or high - low < 0.1 else 1
    return f"{value:.{digits}f}x {how} than {other} (95% CI {low:.{digits}f}-{high:.{digits}f}{apart})"


def verdict(row: Json, reference: Json | None, phase: str, rows: Sequence[Json]) -> str:
    """One row in plain words: how much faster than the standard convolution, how large, what it loses."""
    name = f"{variant_name(row, rows)} N={row['params']['groups']}"
    if row["status"] != "ok" and phase not in row["phases"]:
        return f"{name}: {row['status']}: {row['reason']}"
    error = _white_error(row)
    loss = "" if error is None else f"; white error {error:.3g}"
    ratio = row_ratio(reference, row, phase)
    if ratio is None or reference is None:
        return f"{name} has {scaled(executed_count(row, 'params'))} parameters{loss} (no reference was measured)"
    size = share_words(executed_count(row, "params") / executed_count(reference, "params"))
    return f"{name} is {compare_words(ratio, 'standard')} with {size}{loss}{ending_words(row, phase)}"


def _beside_gc(row: Json, rows: Sequence[Json], phase: str) -> str | None:
    """BGC at N against GC at the same N, and against GC of the same number of parameters (N/2)."""
    if row["params"]["variant"] != "bgc" or phase not in row["phases"]:
        return None
    groups = row["params"]["groups"]
    gc = {r["params"]["groups"]: r for r in rows if r["params"]["variant"] == "gc"}
    parts = []
    for other, why in ((groups, "with twice its parameters"), (groups / 2, "with as many parameters")):
        ratio = row_ratio(gc.get(other), row, phase)
        if ratio is not None:
            parts.append(f"{compare_words(ratio, f'GC N={other:.0f}')} {why}")
    return f"{variant_name(row, rows)} N={groups} is " + "; ".join(parts) if parts else None


def _profile_title(document: Json) -> list[str]:
    config = document.get("config", {})
    lines = []
    if config:
        size = f"{config['batch']} x {config['in_channels']} x {config['height']} x {config['width']}"
        lines.append(
            f"{config['kernel']}x{config['kernel']} convolution, {config['in_channels']} -> {config['out_channels']} "
            f"channels, stride {config['stride']}, input {size}"
        )
    return lines + run_lines(document)


def where_line(document: Json) -> str:
    """On what a document was measured or computed."""
    environment = document["environment"]
    device = environment["device"]
    where = device["name"] if device["type"] == "cuda" else f"{device['name']}, {environment['cpu']['threads']} threads"
    return f"{where}; torch {environment['torch']}"


def run_lines(document: Json) -> list[str]:
    """Under which conditions and where a document was measured."""
    settings, ceilings = document["settings"], document.get("ceilings")
    on_cpu = document["environment"]["device"]["type"] == "cpu"
    memory = f", memory {settings.get('memory') or 'unknown'}" if on_cpu else ""
    lines = [
        f"{settings['precision']}, {settings['layout']}, {settings.get('mode', 'eager')}, "
        f"{settings.get('cache', 'unknown')} cache{memory}; {where_line(document)}"
    ]
    if ceilings:
        lines.append(
            f"measured ceilings: {scaled(ceilings['flops_per_s'])}FLOP/s, {scaled(ceilings['bytes_per_s'])}B/s"
        )
    return lines


def _profile_notes(document: Json, rows: Sequence[Json], printed: bool) -> list[str]:
    lines = [
        "time: median [95% CI]; speed-up: time of standard / time of the row. roofline: share of what the measured "
        "ceilings allow for the row's own work in the last phase (C compute-bound, M memory-bound); above 100 % where "
        "padding is skipped or the convolution beats the matrix product",
        "white err: least share of the output's energy lost on white input (closed form). x+W: input, weights and "
        "mean. peak: layer and input, and the most that one step held beyond them "
        f"({', '.join(sorted({r['memory']['method'] for r in rows if r['memory']})) or 'not measured'})",
    ]
    if any(row["params"]["algorithm"] == "masked" for row in rows):
        lines.append("masked: the form that is trained, with a dense kernel; deployed: what is run afterwards")
    lines += chosen_forms(rows, lambda row: f"{variant_name(row, rows)} N={row['params']['groups']}")
    if printed:
        lines.append(
            f"paper: Table 4 of Lee, Park & Lee, {paper.DEVICE}, forward and backward; its memory is input + weights "
            "(+ mean), printed 'Mb' for MiB, and no peak; its error is ResNet-50's after transfer (Table 3), not this "
            "layer's"
        )
    return lines + notes(document, rows)


def chosen_forms(rows: Sequence[Json], name: Callable[[Json], str]) -> list[str]:
    """One line on what 'auto' found to be the fastest form of each row, where it had a choice."""
    told = []
    for row in rows:
        phases = []
        for phase, counted in row.get("forms", {}).items():
            forms = [form if len(counted) == 1 else f"{form} x{number}" for form, number in counted.items()]
            phases.append(f"{phase} {', '.join(forms)}")
        told += [f"{name(row)}: {'; '.join(phases)}"] if phases else []
    return ["fastest forms, as measured: " + ". ".join(told)] if told else []


def notes(
    document: Json, rows: Sequence[Json], quick: str = "few samples, no claim; run without --quick for intervals"
) -> list[str]:
    """What to know of any document: its flags, whether it is quick or incomplete, what failed, its warnings."""
    lines = []
    if any(_phase_flags(measured) for row in rows for measured in row["phases"].values()):
        lines.append(
            "flags: n= samples where the median is not known to the aim of 0.5 %; uneven, noisy: the middle half of "
            "the samples spreads over more than 3 %, 10 % of the median; launch-bound: the host is the limit; page "
            "faults: memory came anew from the system although it was to be kept, which takes over 1 % of the time"
        )
    if document["settings"].get("memory") == "fresh":
        lines.append(
            "memory fresh: large tensors come anew from the system at each call, and clearing their pages is part of "
            "each time; with --memory kept, as in whole networks, cheap layers gain more"
        )
    if document.get("quality") == "quick":
        lines.append(f"a quick look: {quick}")
    if stored := document["settings"].get("preprocessing"):
        how = Preprocessing.from_json(stored)
        lines.append(f"images: {how} ({Preprocessing.SOURCES[how.source]})")
    if document["exit_reason"] in ("running", "interrupted", "error"):
        why = f": it broke off with {document['failure']}" if document.get("failure") else ""
        lines.append(f"this run is not complete ({document['exit_reason']}){why}")
    # The fields of a row tell which rows failed; a reason longer than a flag stands here.
    lines += [f"{row['key']}: {row['status']}: {row['reason']}" for row in rows if row["status"] in ("oom", "error")]
    warnings = dict.fromkeys((*document["warnings"], *measurement_warnings(document)))  # older files hold both
    return lines + [f"warning: {warning}" for warning in warnings]


def profile_records(document: Json) -> list[Json]:
    """One flat record a row and phase, in SI units, for CSV.

    Each is held against its own reference: the standard convolution, the dense network, or the network's own layer.
    """
    records = []
    references: dict[int | None, Json] = {}
    for row in document["results"]:
        if row["params"]["variant"] == "standard" and row["phases"]:
            references.setdefault(row["params"].get("layer"), row)
    for row in document["results"]:
        reference = references.get(row["params"].get("layer"))
        base = {"key": row["key"], **row["params"], "status": row["status"], "reason": row["reason"]}
        base |= row["counts"] or {}
        base |= row["approximability"] or {}
        base |= row["memory"] or {}
        if not row["phases"]:
            records.append({**base, "phase": None})
        for phase, measured in row["phases"].items():
            summary = measured["summary"]
            low, high = summary["ci95_s"] or (None, None)
            ratio = row_ratio(reference, row, phase)
            record = {
                **base,
                "phase": phase,
                "n": summary["n"],
                "median_s": summary["median_s"],
                "ci95_low_s": low,
                "ci95_high_s": high,
                "converged": measured["converged"],
                "minor_faults_per_call": measured.get("minor_faults_per_call"),
                "speed_up": ratio.value if ratio else None,
                "speed_up_low": ratio.ci95.low if ratio and ratio.ci95 else None,
                "speed_up_high": ratio.ci95.high if ratio and ratio.ci95 else None,
                **measured["derived"],
            }
            records.append(record)
    return records


# --------------------------------------------------------------------------------------------- Table 1, other tables


def table1_report(
    in_channels: int, out_channels: int, kernel: int, size: tuple[int, int], groups: Sequence[int]
) -> Report:
    """Table 1 of the paper evaluated for one layer: all variants at every N. Nothing is measured.

    Raises ShapeError for an N that does not divide the channels.
    """
    wanted = [("standard", 1)]
    wanted += [(name, number) for number in sorted(set(groups) - {1}) for name in VARIANTS if name != "standard"]
    records: list[Json] = []
    for name, number in wanted:
        spec = ConvSpec(name, in_channels, out_channels, kernel, padding=(kernel - 1) // 2, groups=number, bias=False)
        records.append(_table1_record(name, number, spec, size))
    dense_ops = records[0]["paper_ops"]
    columns = [
        Column("method", [label_of(r["variant"]) for r in records], right=False, lead=True),
        Column("N", [str(r["groups"]) for r in records], lead=True),
        Column("intergroup", [r["intergroup"] for r in records], right=False),
        Column("channels", [r["channels_per_group"] for r in records], right=False),
        Column("grouping", [r["grouping"] for r in records], right=False),
        Column("params (Table 1)", [f"{r['paper_params']:,}" for r in records]),
        Column("params deployed", [f"{r['params']:,}" for r in records]),
        Column("MACs deployed", [f"{r['macs']:,}" for r in records]),
        Column("ops (paper)", [f"{r['paper_ops']:,}" for r in records]),
        Column("ops / SC", [significant(r["paper_ops"] / dense_ops) for r in records]),
        Column("white err", ["-" if r["white_error"] is None else f"{r['white_error']:.3f}" for r in records]),
    ]
    notes = [
        "per image, forward; MACs are multiply-adds; channels: input channels that one output sees directly",
        "params (Table 1) is the paper's count: LGC's includes its 0/1 mask, FLGC's its assignments; both train dense "
        "and deploy Kmn/N. LGC is taken at condensation N, FLGC with balanced groups",
        "ops (paper): (3.14) and section 4 as printed; LGC's and FLGC's set-up terms happen once, not every forward",
    ]
    title = [
        f"Table 1 for a {kernel}x{kernel} convolution, {in_channels} -> {out_channels} channels, "
        f"input {size[0]} x {size[1]}"
    ]
    return Report(title, columns, {"Notes": notes}, records)


def _table1_record(name: str, groups: int, spec: ConvSpec, size: tuple[int, int]) -> Json:
    intergroup, channels, grouping = VARIANTS[name].table1
    counts = dataclasses.asdict(count(spec, *size))
    return {
        "variant": name,
        "groups": groups,
        "intergroup": intergroup,
        "channels_per_group": channels,
        "grouping": grouping,
        **counts,
        "white_error": white_error(name, groups),
    }


def doctor_report(environment: Json, findings: Sequence[tuple[str, str, str | None]]) -> Report:
    """What this machine is, and what on it could spoil a measurement."""
    device = environment["device"]
    lines: list[tuple[str, str, str | None]] = [("device", f"{device['name']} ({device['type']})", None)]
    for names in (("python", "torch", "torchvision"), ("cuda", "cudnn", "triton", "driver")):
        lines.append((" / ".join(names), " / ".join(environment[name] or "-" for name in names), None))
    lines += findings
    columns = [
        Column("what", [line[0] for line in lines], right=False, lead=True),
        Column("how it stands", [line[1] for line in lines], right=False),
        Column("advice", [line[2] or "ok" for line in lines], right=False),
    ]
    concerns = sum(line[2] is not None for line in lines)
    summary = f"{concerns} thing{'s' if concerns != 1 else ''} could spoil a measurement" if concerns else "all clear"
    records = [{"what": what, "state": state, "advice": advice} for what, state, advice in lines]
    return Report(["bgcbench doctor"], columns, {"Summary": [summary]}, records)


def settings_that_differ(before: Json, after: Json) -> list[tuple[str, str, str]]:
    """(name, before, after) of every setting that makes two files' times different things."""
    names = ("precision", "layout", "mode", "cache", "memory", "input_grad", "tf32", "cudnn_benchmark")
    pairs = [(name, before["settings"].get(name), after["settings"].get(name)) for name in names]
    pairs.append(("quality", before.get("quality", "full"), after.get("quality", "full")))
    return [(name, json.dumps(one), json.dumps(other)) for name, one, other in pairs if one != other]


def compare_report(before: Json, after: Json, names: tuple[str, str], limit: float | None) -> tuple[Report, bool]:
    """Two profile documents row by row, and whether any row is surely slower by more than ``limit`` (a fraction)."""
    old = {row["key"]: row for row in before["results"]}
    new = {row["key"]: row for row in after["results"]}
    records: list[Json] = []
    gone = [
        f"{PHASE_TITLES[phase]} of {key}: {new[key]['status'] if key in new else 'not in the file'}"
        for key, row in old.items()
        for phase in row["phases"]
        if phase not in new.get(key, {"phases": {}})["phases"]
    ]
    tripped = limit is not None and bool(gone)
    for row in after["results"]:
        earlier = old.get(row["key"])
        for phase in row["phases"]:
            ratio = row_ratio(row, earlier, phase) if earlier else None
            if earlier is None or ratio is None:
                continue
            # Two files were never measured in one interleaved run, whatever their group numbers say.
            ratio = ratio_of_medians(_series(row, phase), _series(earlier, phase), paired=False)
            slower = limit is not None and ratio.ci95 is not None and ratio.ci95.low > 1 + limit
            tripped |= slower
            records.append(
                {
                    "key": row["key"],
                    "phase": phase,
                    "before_s": earlier["phases"][phase]["summary"]["median_s"],
                    "after_s": row["phases"][phase]["summary"]["median_s"],
                    "ratio": ratio.value,
                    "ratio_low": ratio.ci95.low if ratio.ci95 else None,
                    "ratio_high": ratio.ci95.high if ratio.ci95 else None,
                    "verdict": _change_words(ratio) + (" (over the limit)" if slower else ""),
                }
            )
    factor, unit = time_unit([max(r["before_s"], r["after_s"]) for r in records])
    columns = [
        Column("row", [r["key"] for r in records], right=False, lead=True),
        Column("phase", [PHASE_TITLES[r["phase"]] for r in records], right=False, lead=True),
        Column(f"before {unit}", [significant(r["before_s"] * factor, 4) for r in records]),
        Column(f"after {unit}", [significant(r["after_s"] * factor, 4) for r in records]),
        Column("difference", [f"{(r['after_s'] - r['before_s']) * factor:+.3g}" for r in records]),
        Column("verdict", [r["verdict"] for r in records], right=False),
    ]
    notes = ["before: " + names[0] + "; after: " + names[1]]
    notes += [f"measured before and no longer: {text}" for text in gone]
    added = sorted(new.keys() - old.keys())
    notes += [f"new: {', '.join(added)}"] if added else []
    if before["environment"]["fingerprint"] != after["environment"]["fingerprint"]:
        notes.append("warning: the two files come from different machines or software")
    if not records:
        raise UsageError(f"{names[0]} and {names[1]} have no measured row in common; compare runs of one workload")
    notes += [f"warning: {name} was {one} and is {other}" for name, one, other in settings_that_differ(before, after)]
    return Report(["bgcbench compare"], columns, {"Notes": notes}, records), tripped


def _change_words(ratio: Ratio) -> str:
    if ratio.ci95 is None:
        return f"about {ratio.value:.2f}x the time (too few rounds for an interval)"
    if not ratio.is_significant:
        bound = max(abs(ratio.ci95.low - 1), abs(ratio.ci95.high - 1))
        return f"no detectable difference (< {significant(100 * bound, 2)} %)"
    return f"{ratio.value:.2f}x the time (95% CI {ratio.ci95.low:.2f}-{ratio.ci95.high:.2f})"


# ------------------------------------------------------------------------------------------------------- rendering


def document_report(document: Json) -> Report:
    """The report of any result document."""
    if document["command"] == "approx":
        from bgcbench.report.approx import approx_report

        return approx_report(document)
    if document["command"] == "train":
        from bgcbench.report.train import train_report

        return train_report(document)
    if document["command"] == "transfer":
        from bgcbench.report.transfer import transfer_report

        return transfer_report(document)
    if any("model" in row["params"] for row in document["results"]) or "model" in document.get("config", {}):
        from bgcbench.report.network import network_report

        return network_report(document)
    return {"profile": profile_report}[document["command"]](document)


def rewritten(report: Report, change: Callable[[str], str]) -> Report:
    """``report`` with ``change`` made to every text of it: titles, headers, cells and lines."""
    columns = [
        dataclasses.replace(column, header=change(column.header), cells=[change(text) for text in column.cells])
        for column in report.columns
    ]
    return dataclasses.replace(
        report,
        title=[change(text) for text in report.title],
        columns=columns,
        sections={heading: [change(text) for text in lines] for heading, lines in report.sections.items()},
        more=[rewritten(part, change) for part in report.more],
    )


# What GitHub-flavoured Markdown acts on inside a line, but for an underscore within a word and a bracket that nothing
# makes a link of.
_MARKUP = re.compile(r"[\\`*~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
# What makes a heading, a quotation or a list of a line that begins with it.
_BLOCK = re.compile(r"^(?:(?P<sign>[#>+=-])|(?P<number>\d+)(?P<end>[.)])(?!\S))")


def _markdown(text: str) -> str:
    """``text`` as Markdown that shows it as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def _markdown_line(text: str) -> str:
    """``text`` that is escaped as a line of its own."""
    return _BLOCK.sub(
        lambda found: f"\\{found['sign']}" if found["sign"] else f"{found['number']}\\{found['end']}", text.lstrip()
    )


def as_markdown(report: Report) -> str:
    """GitHub-flavoured Markdown at full width."""
    report = rewritten(report, _markdown)

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    lines: list[str] = []
    for part in (report, *report.more):
        lines += [*([""] if lines else []), *(_markdown_line(text).replace("|", "\\|") for text in part.title), ""]
        lines.append(line([column.header for column in part.columns]))
        lines.append(line(["---:" if column.right else "---" for column in part.columns]))
        lines += [line(texts) for texts in zip(*(column.cells for column in part.columns), strict=True)]
        for heading, entries in ordered_sections(part):
            lines += ["", f"{heading}:", "", *(f"- {_markdown_line(entry)}" for entry in entries)]
    for heading, entries in closing_sections(report):
        lines += ["", f"{heading}:", "", *(f"- {_markdown_line(entry)}" for entry in entries)]
    return "\n".join(lines) + "\n"


def ordered_sections(report: Report) -> list[tuple[str, list[str]]]:
    """The sections that stand under their own table; the notes close a report that has further tables."""
    return [(heading, lines) for heading, lines in report.sections.items() if not (report.more and heading == "Notes")]


def closing_sections(report: Report) -> list[tuple[str, list[str]]]:
    """The sections after the last table."""
    return [("Notes", report.sections["Notes"])] if report.more and "Notes" in report.sections else []


def as_csv(report: Report) -> str:
    """The report's records; the header is the union of their fields in order of appearance."""
    fields = list(dict.fromkeys(name for record in report.records for name in record))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_csv_cell, fields))
    writer.writerows([_csv_cell(record.get(name)) for name in fields] for record in report.records)
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    """A value in one line; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(value, (str, list, dict)):
        return value
    text = printable(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def as_rich(report: Report, width: int) -> RenderableType:
    """Rich tables that fit ``width``: columns that find no room go into a further table below, led by the same rows."""
    report = rewritten(report, printable)
    parts: list[RenderableType] = []
    for part in (report, *report.more):
        parts += [*([Text("")] if parts else []), *(Text(text) for text in part.title)]
        for columns in split_columns(part.columns, width):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
            for column in columns:
                table.add_column(Text(column.header), justify="right" if column.right else "left", overflow="fold")
            for texts in zip(*(column.cells for column in columns), strict=True):
                table.add_row(*(Text(text) for text in texts))
            parts += [Text(""), table]
        for section in ordered_sections(part):
            parts += _section(*section)
    for section in closing_sections(report):
        parts += _section(*section)
    return Group(*parts)


def _section(heading: str, entries: Sequence[str]) -> list[RenderableType]:
    parts: list[RenderableType] = [Text(""), Text(heading, style="bold")]
    for entry in entries:
        item = Table.grid(padding=(0, 1, 0, 0))
        item.add_row(Text("-"), Text(entry))
        parts.append(item)
    return parts


def split_columns(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Columns in as few tables as fit ``width``, in order; lead columns stand in front of each."""
    lead = [column for column in columns if column.lead]
    room = width - sum(column.width + 2 for column in lead)
    tables: list[list[Column]] = []
    left = 0
    for column in columns:
        if column.lead or not any(column.cells):
            continue
        if not tables or column.width > left:
            tables.append(list(lead))
            left = room
        tables[-1].append(column)
        left -= column.width + 2
    return tables or [lead]


def emit(report: Report, form: str, console: Console, document: Mapping[str, Any] | None = None) -> None:
    """Print ``report`` on ``console`` in ``form``; 'auto' is a table on a terminal and Markdown elsewhere."""
    if form == "auto":
        form = "table" if console.is_terminal else "markdown"
    if form == "table":
        with console.capture() as captured:  # rich would end the process where the reader of a pipe has gone
            console.print(as_rich(report, console.width))
        text = captured.get()
    elif form == "json":
        text = dumps(document) if document is not None else json.dumps(report.records, indent=1) + "\n"
    else:
        text = as_markdown(report) if form == "markdown" else as_csv(report)
    console.file.write(text)
    console.file.flush()
