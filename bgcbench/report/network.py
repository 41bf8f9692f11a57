"""Tables and sentences from a ``profile --model`` document: the network, and with --layers its convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from bgcbench.measure.statistics import Ratio
from bgcbench.report import (
    PHASE_TITLES,
    Column,
    Report,
    chosen_forms,
    compare_words,
    counted,
    ending_words,
    executed_count,
    flags,
    mebibytes,
    notes,
    peak,
    profile_records,
    ratio_text,
    roofline,
    row_ratio,
    run_lines,
    scaled,
    share_words,
    significant,
    speed_up,
    time_text,
    time_unit,
    variant_name,
)
from bgcbench.results import Json

DENSE = "the dense network"
NAMED = 4  # shapes that a line names; the table has them all


def network_report(document: Json) -> Report:
    """The table of a network's document with a verdict line a row, the best row, and the table of its layers."""
    rows = [row for row in document["results"] if "layer" not in row["params"]]
    layers = [row for row in document["results"] if "layer" in row["params"]]
    reference = next((row for row in rows if row["params"]["variant"] == "standard" and row["phases"]), None)
    phases = [phase for phase in PHASE_TITLES if any(phase in row["phases"] for row in rows)]
    columns = [
        Column("network", [_name(row, rows) for row in rows], right=False, lead=True),
        Column("N", [str(row["params"]["groups"]) for row in rows], lead=True),
        Column("replaced", [_replaced(row) for row in rows]),
        Column("params", counted(rows, lambda row: scaled(executed_count(row, "params")))),
        Column("MACs", counted(rows, lambda row: scaled(executed_count(row, "macs")))),
    ]
    for phase in phases:
        title = PHASE_TITLES[phase]
        factor, unit = time_unit([r["phases"][phase]["summary"]["median_s"] for r in rows if phase in r["phases"]])
        columns += [
            Column(f"{title} {unit}", [time_text(row, phase, factor) for row in rows]),
            Column(f"{title} images/s", [_images(row, phase) for row in rows]),
            Column(f"speed-up {title}", [speed_up(row, reference, phase) for row in rows]),
        ]
    columns += [
        Column("peak MiB", counted(rows, lambda row: mebibytes(peak(row)))),
        Column("roofline", [roofline(row, phases) for row in rows]),
        Column("flags", [", ".join(_flags(row, phases)) for row in rows], right=False),
    ]
    sections = {
        f"Verdict ({PHASE_TITLES[phase]})": [
            _verdict(row, reference, phase, rows) for row in rows if row is not reference
        ]
        for phase in phases
    }
    best = [line for phase in phases if (line := _best(rows, reference, phase))]
    if best:
        sections["Best"] = best
    more = [_layers_report(layers, reference)] if layers else []
    sections["Notes"] = _notes(document, rows, layers)
    return Report(_title(document), columns, sections, profile_records(document), more)


def _name(row: Json, rows: Sequence[Json]) -> str:
    return "dense" if row["params"]["variant"] == "standard" else variant_name(row, rows)


def _numbered(row: Json, rows: Sequence[Json]) -> str:
    return f"{_name(row, rows)} N={row['params']['groups']}"


def _replaced(row: Json) -> str:
    record = row.get("convert")
    return "-" if not record else str(len(record["replaced"]))


def _images(row: Json, phase: str) -> str:
    return significant(row["phases"][phase]["derived"]["images_per_s"], 4) if phase in row["phases"] else "-"


def _flags(row: Json, phases: Sequence[str]) -> list[str]:
    dense = _indivisible(row)
    return [*flags(row, phases), *([f"{len(dense)} kept dense"] if dense else [])]


def _indivisible(row: Json) -> list[str]:
    """Convolutions that stayed dense only because N does not divide their channels."""
    record = row.get("convert") or {"kept": []}
    return [kept["name"] for kept in record["kept"] if kept.get("code") == "indivisible"]


def _verdict(row: Json, reference: Json | None, phase: str, rows: Sequence[Json]) -> str:
    """One row in plain words: how much faster than the dense network, how large, how many images a second."""
    name = _numbered(row, rows)
    if phase not in row["phases"]:
        failure = row.get("failures", {}).get(phase, row)
        return f"{name}: {failure['status']}: {failure['reason']}"
    speed = f"{_images(row, phase)} images/s"
    ratio = row_ratio(reference, row, phase)
    if ratio is None or reference is None:
        return f"{name} has {scaled(executed_count(row, 'params'))} parameters and runs {speed} (no reference)"
    size = share_words(executed_count(row, "params") / executed_count(reference, "params"))
    return f"{name} is {compare_words(ratio, DENSE)} with {size}; {speed}{ending_words(row, phase)}"


def _best(rows: Sequence[Json], reference: Json | None, phase: str) -> str | None:
    """The row with the shortest time in ``phase``, against the dense network and against the next one."""
    there = [row for row in rows if phase in row["phases"] and row is not reference]
    if not there or reference is None or any(row["status"] == "interrupted" for row in rows):
        return None
    there.sort(key=lambda row: float(row["phases"][phase]["summary"]["median_s"]))
    first = there[0]
    ratio = row_ratio(reference, first, phase)
    if ratio is None:
        return None
    title = PHASE_TITLES[phase]
    if ratio.value <= 1 or (ratio.ci95 is not None and not ratio.is_significant):
        return f"{title}: none is surely faster than {DENSE}; the shortest time is {_numbered(first, rows)}'s"
    text = f"{title}: {_numbered(first, rows)}, {compare_words(ratio, DENSE)}"
    if len(there) > 1:
        ahead = row_ratio(there[1], first, phase)
        if ahead is not None and ahead.ci95 is not None and not ahead.is_significant:
            text += f"; {_numbered(there[1], rows)} cannot be told apart from it"
        else:
            text += f"; next is {_numbered(there[1], rows)}"
    return text


# ----------------------------------------------------------------------------------------------------------- layers


def _layers_report(rows: Sequence[Json], network: Json | None) -> Report:
    """Each distinct convolution: how often it runs, its share of the network's time, and what is faster there."""
    phases = [phase for phase in ("fwd", "fwd_bwd") if any(phase in row["phases"] for row in rows)]
    own = [row for row in rows if row["params"]["variant"] == "standard" and row.get("layer")]
    by_layer: dict[int, list[Json]] = {}
    for row in rows:
        by_layer.setdefault(row["params"]["layer"], []).append(row)
    if phases:
        own.sort(key=lambda row: -_total(row, phases[-1]))
    columns = [
        Column("convolution", [row["layer"]["label"] for row in own], right=False, lead=True),
        Column("times", [str(row["layer"]["count"]) for row in own]),
    ]
    for phase in phases:
        title = PHASE_TITLES[phase]
        factor, unit = time_unit([r["phases"][phase]["summary"]["median_s"] for r in own if phase in r["phases"]])
        columns += [
            Column(f"{title} {unit}", [time_text(row, phase, factor) for row in own]),
            Column(f"share {title}", [_share(row, network, phase) for row in own]),
            Column(
                f"fastest {title}",
                [_fastest(row, by_layer[row["params"]["layer"]], phase) for row in own],
                right=False,
            ),
        ]
    columns.append(Column("flags", [", ".join(flags(row, phases)) for row in own], right=False))
    sections: dict[str, list[str]] = {}
    for phase in phases:
        lines = _where_time_goes(own, network, phase) + _sped_up(own, by_layer, phase)
        if lines:
            sections[f"Where the time goes ({PHASE_TITLES[phase]})"] = lines
    return Report(["Convolutions by themselves"], columns, sections)


def _total(row: Json, phase: str) -> float:
    """Seconds that all convolutions of this shape take in one pass."""
    if phase not in row["phases"]:
        return 0.0
    return float(row["phases"][phase]["summary"]["median_s"]) * int(row["layer"]["count"])


def _network_s(network: Json | None, phase: str) -> float | None:
    """Seconds of the dense network in the phase that goes with a layer's."""
    name = {"fwd": "fwd", "fwd_bwd": "train_step"}[phase]
    if network is None or name not in network["phases"]:
        return None
    return float(network["phases"][name]["summary"]["median_s"])


def _share(row: Json, network: Json | None, phase: str) -> str:
    whole = _network_s(network, phase)
    return "-" if whole is None or phase not in row["phases"] else f"{_total(row, phase) / whole:.1%}"


def _ratios(row: Json, members: Sequence[Json], phase: str) -> list[tuple[Ratio, Json]]:
    """Time of the network's own convolution over that of each variant in its place, the fastest first."""
    pairs = [(row_ratio(row, other, phase), other) for other in members if other is not row]
    return sorted(((ratio, other) for ratio, other in pairs if ratio is not None), key=lambda pair: -pair[0].value)


def _fastest(row: Json, members: Sequence[Json], phase: str) -> str:
    if not row["layer"]["replaced"]:
        return "kept"
    found = _ratios(row, members, phase)
    if not found:
        return "-"
    ratio, other = found[0]
    if ratio.value <= 1 or (ratio.ci95 is not None and not ratio.is_significant):
        return "itself"
    return f"{_numbered(other, members)} {ratio_text(ratio.value)}x"


def _where_time_goes(own: Sequence[Json], network: Json | None, phase: str) -> list[str]:
    whole = _network_s(network, phase)
    measured = [row for row in own if phase in row["phases"]]
    if whole is None or not measured:
        return []
    measured.sort(key=lambda row: -_total(row, phase))
    convs = sum(_total(row, phase) for row in measured)
    replaced = sum(_total(row, phase) for row in measured if row["layer"]["replaced"])
    top = ", ".join(
        f"{r['layer']['label']} ({r['layer']['count']}x, {_share(r, network, phase)})" for r in measured[:3]
    )
    return [
        f"all convolutions, each by itself, take {convs / whole:.0%} of the network's time; those that are replaced "
        f"{replaced / whole:.0%}",
        f"most of it: {top}",
    ]


def _sped_up(own: Sequence[Json], by_layer: dict[int, list[Json]], phase: str) -> list[str]:
    """For each variant and N: in how many of the replaced shapes it is surely faster, and where it is not."""
    outcomes: dict[str, list[tuple[Json, Ratio]]] = {}
    for row in own:
        members = by_layer[row["params"]["layer"]]
        for other in members:
            if other is not row and (ratio := row_ratio(row, other, phase)) is not None:
                outcomes.setdefault(_numbered(other, members), []).append((row, ratio))
    lines = []
    for name, found in outcomes.items():
        faster = [row for row, ratio in found if ratio.value > 1 and (ratio.ci95 is None or ratio.is_significant)]
        saved = sum(_total(row, phase) * (1 - 1 / ratio.value) for row, ratio in found if row in faster)
        rest = [f"{row['layer']['label']} ({ratio_text(ratio.value)}x)" for row, ratio in found if row not in faster]
        line = f"{name} is faster in {len(faster)} of {len(found)} replaced shapes"
        line += f", saving {significant(saved * 1e3)} ms a call there" if faster else ""
        if faster and rest:
            line += f"; not in {', '.join(rest[:NAMED])}" + (f" and {len(rest) - NAMED} more" * (len(rest) > NAMED))
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------- title and notes


def _title(document: Json) -> list[str]:
    config = document.get("config", {})
    lines = []
    if config:
        stem = f", stem stride {config['stem_stride']}" if config.get("stem_stride") else ""
        lines.append(
            f"{config['model']}, {config['num_classes']} classes{stem}, input {config['batch']} x 3 x "
            f"{config['height']} x {config['width']}; replaced: {config['where']}"
        )
    return lines + run_lines(document)


def _notes(document: Json, rows: Sequence[Json], layers: Sequence[Json]) -> list[str]:
    lines = [
        "time: median [95% CI] of a whole batch; speed-up: time of the dense network / time of the row. train_step: "
        "zero_grad, forward, cross-entropy, backward, SGD with momentum (learning rate 0). MACs: an image's, forward, "
        "in convolutions and fully connected layers",
        "peak: weights, momentum and input, and the most that one step held beyond them "
        f"({', '.join(sorted({r['memory']['method'] for r in rows if r['memory']})) or 'not measured'})",
    ]
    for row in rows:
        dense = _indivisible(row)
        if dense:
            lines.append(f"{_numbered(row, rows)}: N does not divide, kept dense: {', '.join(dense)}")
    if any(row["params"]["algorithm"] == "masked" for row in rows):
        lines.append("masked: the form that is trained, with dense kernels; deployed: what is run afterwards")
    lines += chosen_forms(rows, lambda row: _numbered(row, rows))
    if layers:
        lines.append(
            "a convolution by itself finds its input where the last call left it, and nothing is fused with it: its "
            "share of the network's time is an estimate, and the shares need not add up"
        )
    return lines + notes(document, [*rows, *layers])
