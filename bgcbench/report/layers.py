"""The table of a network's convolutions by themselves (``profile --model --layers``)."""

from __future__ import annotations

from collections.abc import Sequence

from bgcbench.report.compare import Comparison, speed_up
from bgcbench.report.format import listed, ratio_text, significant
from bgcbench.report.measured import Rows, flags_column, measured_phases, numbered, time_column
from bgcbench.report.table import Column, Table, label, words
from bgcbench.results.document import shortened
from bgcbench.results.rows import ProfileRow
from bgcbench.results.times import LAYER_PHASES, POSSIBLE, fastest_in_place
from bgcbench.specs import PHASE_TITLES

SHARE = (
    "Time of all convolutions of this shape, each by itself, over the dense network's: an estimate, because nothing is "
    "fused with a convolution by itself and its input lies where the last call left it."
)
FASTEST = (
    "The fastest variant in its place, and its speed-up; itself: none is significantly faster; kept: not replaced."
)
MODULES = "The convolutions of this shape; a terminal shows the first."
MODULE_LETTERS = 32  # of the names in a terminal's table


def layers_table(rows: Rows, network: ProfileRow | None) -> Table:
    """Each distinct convolution: how often it runs, its share of the network's time, and what is faster there."""
    phases = measured_phases(rows, LAYER_PHASES)
    own = [row for row in rows if row.params.variant == "standard" and row.layer]
    own.sort(key=lambda row: -_total(row, phases[-1]) if phases else 0)
    columns: list[Column[ProfileRow]] = [
        label("convolution", _shape, "Channels, kernel and input of a shape."),
        Column("times", _times, "How often the network has it."),
        words("modules", lambda row: row.layer and row.layer.names, MODULES, form=", ".join, brief=_first, drop=4),
    ]
    sections = {}
    for phase in phases:
        whole = network.median_s(LAYER_PHASES[phase]) if network else None
        columns += _phase_columns(own, rows, phase, whole, drop=int(phase != phases[-1]))
        heading = f"Where the time goes ({PHASE_TITLES[phase]})"
        sections[heading] = _where_time_goes(own, whole, phase) + _sped_up(own, rows, phase)
    columns.append(flags_column(phases, None, network, drop=5))
    return Table(["Convolutions by themselves"], columns, own, sections)


def _phase_columns(own: Rows, rows: Rows, phase: str, whole: float | None, drop: int) -> list[Column[ProfileRow]]:
    def share(row: ProfileRow) -> str | None:
        return None if whole is None or phase not in row.phases else f"{_total(row, phase) / whole:.1%}"

    def fastest(row: ProfileRow) -> str | None:
        if row.layer and not row.layer.replaced:
            return "kept"
        found = fastest_in_place(row, rows, phase)
        if found is None:
            return None
        first, compared = found[0], Comparison.of(found[1])
        return f"{numbered(first, _members(row, rows))} {ratio_text(compared.value)}x" if compared.faster else "itself"

    title = PHASE_TITLES[phase]
    return [
        time_column(own, phase, drop=3),
        Column(f"share {title}", share, SHARE, name="share", drop=2 * drop),
        words(f"fastest {title}", fastest, FASTEST, name="fastest", drop=drop),
    ]


def _members(row: ProfileRow, rows: Rows) -> list[ProfileRow]:
    """All that was measured of the shape of ``row``."""
    return [other for other in rows if other.params.layer == row.params.layer]


def _shape(row: ProfileRow) -> str:
    return row.layer.label if row.layer else ""


def _first(names: Sequence[str]) -> str:
    return shortened(listed(names, 1), MODULE_LETTERS)


def _times(row: ProfileRow) -> int:
    return row.layer.count if row.layer else 0


def _total(row: ProfileRow, phase: str) -> float:
    """Seconds that all convolutions of this shape take in one pass."""
    return (row.median_s(phase) or 0.0) * _times(row)


def _where_time_goes(own: Rows, whole: float | None, phase: str) -> list[str]:
    measured = sorted((row for row in own if phase in row.phases), key=lambda row: -_total(row, phase))
    if whole is None or not measured:
        return []

    def share(rows: Sequence[ProfileRow]) -> float:
        return sum(_total(row, phase) for row in rows) / whole

    replaced = share([row for row in measured if row.layer and row.layer.replaced])
    if share(measured) > POSSIBLE:
        return [
            f"not known: all convolutions, each by itself, take {share(measured):.0%} of the network's time, which "
            "cannot be; something disturbed the measurement"
        ]
    top = ", ".join(f"{_shape(row)} ({_times(row)}x, {share([row]):.1%})" for row in measured[:3])
    return [
        f"all convolutions, each by itself, take {share(measured):.0%} of the network's time; those that are replaced "
        f"{replaced:.0%}",
        f"most of it: {top}",
    ]


def _sped_up(own: Rows, rows: Rows, phase: str) -> list[str]:
    """For each variant and N: in how many of the replaced shapes it is significantly faster, and where it is not."""
    compared: dict[str, list[tuple[ProfileRow, Comparison]]] = {}
    for row in own:
        members = _members(row, rows)
        for other in members:
            if other is not row and (found := speed_up(other, row, phase)):
                compared.setdefault(numbered(other, members), []).append((row, found))
    lines = []
    for name, every in compared.items():
        mine = [(row, found) for row, found in every if found.ci95]
        if not mine:
            lines.append(f"{name}: not known, from too few rounds for an interval")
            continue
        saved = [_total(row, phase) * (1 - 1 / found.value) for row, found in mine if found.faster]
        rest = [f"{_shape(row)} ({ratio_text(found.value)}x)" for row, found in mine if not found.faster]
        line = f"{name} is faster in {len(saved)} of {len(mine)} replaced shapes"
        line += f", saving {significant(sum(saved) * 1e3)} ms a call there" if saved else ""
        lines.append(line + (f"; not in {listed(rest)}" if saved and rest else ""))
    return lines
