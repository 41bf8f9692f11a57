"""The table of a network's convolutions by themselves (``profile --model --layers``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from bgcbench.report.compare import PHASE_TITLES, Comparison, speed_up
from bgcbench.report.format import listed, ratio_text, significant
from bgcbench.report.measured import Rows, flags_column, measured_phases, numbered, time_column
from bgcbench.report.table import Column, Table
from bgcbench.results.rows import ProfileRow

NETWORK_PHASES = {"fwd": "fwd", "fwd_bwd": "train_step"}  # the network's phase that goes with a layer's
SHARE = (
    "Time of all convolutions of this shape, each by itself, over the dense network's: an estimate, because nothing is "
    "fused with a convolution by itself and its input lies where the last call left it."
)
FASTEST = (
    "The fastest variant in its place, and its speed-up; itself: none is significantly faster; kept: not replaced."
)


def layers_table(rows: Rows, network: ProfileRow | None) -> Table:
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
        line += f"; not in {listed(rest)}"
    return line
