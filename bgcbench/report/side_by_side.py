"""What was asked for, as the paper's Table 4 is laid out: a row for each N, the variants side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bgcbench.report.compare import speed_up
from bgcbench.report.format import MIB, label_of, scaled, significant
from bgcbench.report.measured import PEAK, SPEED_UP, Rows, ending, peak, time_form, variant_name
from bgcbench.report.table import Column, Table, label
from bgcbench.results.aggregate import Cell, Start, variant_place
from bgcbench.results.rows import ProfileRow
from bgcbench.specs import PHASE_TITLES, PLAN

MANY = 2  # variants, beyond which a terminal may have no room for their times
ALIKE = 0.01  # up to this share of a difference, two numbers of parameters are equal
GROUPS = "Groups, or the rank (r=) of LR; plan: as --plan has it, which is the same in all columns."
TIME = "Median time of a batch, forward and backward where both were measured."
PARAMS = "Parameters of the algorithm that ran."
FASTER = " *: significantly faster than every other variant here that has as many parameters."


@dataclass(frozen=True)
class Line:
    """The rows of one N, or of one rank, by variant. The standard convolution is N = 1 of all of them, and a planned
    network, which has neither, a line of its own in all of them."""

    name: str
    at: dict[str, ProfileRow]


def comparison_table(title: Sequence[str], rows: Rows, reference: ProfileRow | None, phase: str) -> Table:
    """Time, speed-up, parameters and memory in ``phase``. On a narrow terminal memory and parameters go first."""
    others = [row for row in rows if row.params.variant not in ("standard", PLAN)]
    planned = [PLAN] if any(row.params.variant == PLAN for row in rows) else ["SC"]
    names = list(dict.fromkeys(variant_name(row, rows) for row in others)) or planned
    lines: dict[str, dict[str, ProfileRow]] = {}
    for row in rows:
        variant, groups, rank = row.params.cell
        line = variant_name(row, rows) if variant == PLAN else _line(groups, rank)
        at = lines.setdefault(line, {})
        at |= {variant_name(row, rows): row} if row in others else dict.fromkeys(names, row)
    shown = [Line(name, at) for name, at in lines.items()]
    unit, form = time_form(rows, phase)
    columns: list[Column[Line]] = [label("N", lambda line: line.name, GROUPS, name="N, by N")]
    for name in names:
        # Where the time of several may have to go, the speed-up says whose it is.
        titles = f"{name} {unit}", f"{name} speed-up" if len(names) > MANY else "speed-up"
        columns += _variant_columns(name, rows, reference, phase, titles, form)
    return Table(title, columns, shown, caption=f"{PHASE_TITLES[phase]}, by N:")


def _line(groups: int, rank: int | None) -> str:
    return str(groups) if rank is None else f"r={rank}"


def _variant_columns(
    name: str, rows: Rows, reference: ProfileRow | None, phase: str, titles: tuple[str, str], form: Callable[[Any], str]
) -> Iterator[Column[Line]]:
    def of(line: Line) -> ProfileRow | None:
        return line.at.get(name)

    def time(line: Line) -> float | None:
        row = of(line)
        return row.median_s(phase) if row else None

    def faster(line: Line) -> str | None:
        row = of(line)
        if row is None or row is reference:
            return "1" if row else None
        compared = speed_up(row, reference, phase)
        if compared is None:
            return None if phase in row.phases else ending(row, phase)
        return compared.text + "*" * is_fastest_of_its_size(row, rows, phase)

    def params(line: Line) -> int | None:
        row = of(line)
        return row.ran.params if row and row.ran else None

    def memory(line: Line) -> float | None:
        row = of(line)
        found = peak(row) if row else None
        return None if found is None else found / MIB

    drop = int(titles[1] != "speed-up")
    yield Column(titles[0], time, TIME, form, name="time, by N", drop=drop, bar=time)
    yield Column(titles[1], faster, SPEED_UP + FASTER, name="speed-up, by N")
    yield Column("params", params, PARAMS, scaled, name="params, by N", drop=2)
    yield Column("MiB", memory, PEAK, significant, name="MiB", drop=3)


def is_fastest_of_its_size(row: ProfileRow, rows: Rows, phase: str) -> bool:
    """Whether ``row`` is significantly faster than all others that have as many parameters, of which there are some."""
    if row.ran is None or phase not in row.phases:
        return False
    alike = [
        other
        for other in rows
        if other is not row and other.ran and abs(other.ran.params / row.ran.params - 1) <= ALIKE
    ]
    compared = [found for other in alike if (found := speed_up(row, other, phase))]
    return bool(compared) and all(found.faster for found in compared)


# ------------------------------------------------------------------------------------------------ trained and converted


@dataclass(frozen=True)
class ErrorLine:
    """The cells of one N, or rank, and start, by variant; the standard convolution and a plan as in a Line."""

    name: str
    start: Start | None
    at: dict[str, Cell]


ERROR = "Test error in percent, mean ± standard deviation over the seeds."
INIT, REBN = "The weights that a conversion starts from.", "Whether batch norm's statistics were estimated again."


def errors_table(
    title: Sequence[str], caption: str, cells: Sequence[Cell], errors: Callable[[Cell], str | None]
) -> Table | None:
    """The test errors of trainings or conversions: a row for each N and start, the variants side by side.

    None where there are fewer than two errors, which a table would not compare.
    """
    if sum(errors(cell) is not None for cell in cells) < 2:
        return None
    uniform = {cell.variant for cell in cells if not cell.dense and not cell.planned}
    variants = sorted(uniform or {cell.variant for cell in cells if cell.planned}, key=variant_place) or ["standard"]
    lines: dict[tuple[str, Start | None], dict[str, Cell]] = {}
    for cell in cells:
        name = PLAN if cell.planned else _line(cell.groups, cell.rank)
        at = lines.setdefault((name, None if cell.dense else cell.start), {})
        at |= {cell.variant: cell} if cell.variant in uniform else dict.fromkeys(variants, cell)
    shown = [
        ErrorLine(name, start, at)
        for (name, start), at in lines.items()
        if any(errors(cell) is not None for cell in at.values())
    ]
    starts = {line.start for line in shown if line.start}
    columns: list[Column[ErrorLine]] = [label("N", lambda line: line.name, GROUPS, name="N, by N")]
    if len({start.init for start in starts}) > 1:
        columns.append(label("init", lambda line: line.start and line.start.init, INIT, name="init, by N"))
    if len({start.rebn for start in starts}) > 1:
        columns.append(
            label("rebn", lambda line: line.start and ("no", "yes")[line.start.rebn], REBN, name="rebn, by N")
        )
    columns += [_errors_column(variant, errors) for variant in variants]
    return Table(title, columns, shown, caption=caption)


def _rebn(line: ErrorLine) -> str | None:
    return line.start and ("yes" if line.start.rebn else "no")


def _errors_column(variant: str, errors: Callable[[Cell], str | None]) -> Column[ErrorLine]:
    def error(line: ErrorLine) -> str | None:
        cell = line.at.get(variant)
        return errors(cell) if cell else None

    return Column(label_of(variant), error, ERROR, name="error %, by N")
