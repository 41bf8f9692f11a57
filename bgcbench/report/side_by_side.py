"""What was asked for, as the paper's Table 4 is laid out: a row for each N, the variants side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from bgcbench.report.compare import speed_up
from bgcbench.report.format import MIB, label_of, scaled, significant, size_text
from bgcbench.report.measured import PARAMS, PEAK, SPEED_UP, Rows, ending, peak, time_form, variant_name
from bgcbench.report.table import Column, Table, label
from bgcbench.results.aggregate import Cell, Start, variant_place
from bgcbench.results.rows import CellKey, ProfileRow
from bgcbench.specs import PHASE_TITLES, PLAN

MANY = 2  # variants, beyond which a terminal may have no room for their times
ALIKE = 0.01  # up to this share of a difference, two numbers of parameters are equal
YES = {True: "yes", False: "no"}
EVERYWHERE = ("standard", PLAN)  # N = 1 of all variants, and what has no N
T = TypeVar("T")


@dataclass(frozen=True)
class Line(Generic[T]):
    """What there is of one N, or of one rank, and start, by column. Of EVERYWHERE it stands in all columns."""

    name: str
    start: Start | None
    at: dict[str, T]


def lines_of(placed: Iterable[tuple[str, Start | None, str, T]], columns: Sequence[str]) -> list[Line[T]]:
    """The lines of what is ``placed`` at a line's name, a start and a column; in all where it is none of them."""
    lines: dict[tuple[str, Start | None], dict[str, T]] = {}
    for name, start, column, each in placed:
        lines.setdefault((name, start), {}).update(dict.fromkeys([column] if column in columns else columns, each))
    return [Line(*place, at) for place, at in lines.items()]


def _line_of(cell: CellKey) -> str:
    """ "4", "r=8" """
    return size_text(*cell[1:]).removeprefix("N=")


GROUPS = "Groups, or the rank (r=) of LR; plan: as --plan has it, which is the same in all columns."
N: Column[Line[Any]] = label("N", lambda line: line.name, GROUPS, name="N, by N")
TIME = "Median time of a batch, forward and backward where both were measured."
FASTER = " *: significantly faster than every other variant here that has as many parameters."


def comparison_table(title: Sequence[str], rows: Rows, reference: ProfileRow | None, phase: str) -> Table:
    """Time, speed-up, parameters and memory in ``phase``. On a narrow terminal memory and parameters go first."""
    called = {row.key: variant_name(row, rows) for row in rows}
    names = list(dict.fromkeys(called[row.key] for row in rows if row.params.variant not in EVERYWHERE))
    names = names or [PLAN if any(row.params.variant == PLAN for row in rows) else "SC"]
    placed = [
        (called[row.key] if row.params.variant == PLAN else _line_of(row.params.cell), None, called[row.key], row)
        for row in rows
    ]
    unit, form = time_form(rows, phase)
    columns = [N]
    for name in names:
        # Where the time of several may have to go, the speed-up says whose it is.
        titles = f"{name} {unit}", f"{name} speed-up" if len(names) > MANY else "speed-up"
        columns += _variant_columns(name, rows, reference, phase, titles, form)
    return Table(title, columns, lines_of(placed, names), caption=f"{PHASE_TITLES[phase]}, by N:")


def _variant_columns(
    name: str, rows: Rows, reference: ProfileRow | None, phase: str, titles: tuple[str, str], form: Callable[[Any], str]
) -> Iterator[Column[Line[ProfileRow]]]:
    def column(title: str, value: Callable[[ProfileRow], Any], *about: Any, **more: Any) -> Column[Line[ProfileRow]]:
        return Column(title, lambda line: value(line.at[name]) if name in line.at else None, *about, **more)

    def faster(row: ProfileRow) -> str | None:
        if row is reference:
            return "1"
        compared = speed_up(row, reference, phase)
        if compared is None:
            return None if phase in row.phases else ending(row, phase)
        return compared.text + "*" * is_fastest_of_its_size(row, rows, phase)

    def memory(row: ProfileRow) -> float | None:
        found = peak(row)
        return None if found is None else found / MIB

    drop = int(titles[1] != "speed-up")
    yield column(titles[0], lambda row: row.median_s(phase), TIME, form, name="time, by N", drop=drop, bar=True)
    yield column(titles[1], faster, SPEED_UP + FASTER, name="speed-up, by N")
    yield column("params", lambda row: row.ran and row.ran.params, PARAMS, scaled, name="params, by N", drop=2)
    yield column("MiB", memory, PEAK, significant, name="MiB", drop=3)


def is_fastest_of_its_size(row: ProfileRow, rows: Rows, phase: str) -> bool:
    """Whether ``row`` is significantly faster than all others that have as many parameters, of which there are some."""
    if row.ran is None or phase not in row.phases:
        return False
    size, others = row.ran.params, [other for other in rows if other is not row]
    alike = [other for other in others if other.ran and abs(other.ran.params / size - 1) <= ALIKE]
    compared = [found for other in alike if (found := speed_up(row, other, phase))]
    return bool(compared) and all(found.faster for found in compared)


# ------------------------------------------------------------------------------------------------ trained and converted


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
    variants = {cell.variant for cell in cells}
    columns = sorted(variants - {*EVERYWHERE}, key=variant_place) or [PLAN if PLAN in variants else "standard"]
    placed = [
        (PLAN if cell.planned else _line_of(cell.asked), None if cell.dense else cell.start, cell.variant, cell)
        for cell in cells
    ]
    lines = [line for line in lines_of(placed, columns) if any(errors(cell) is not None for cell in line.at.values())]
    starts = {line.start for line in lines if line.start}
    inits: Column[Line[Any]] = label("init", lambda line: line.start and line.start.init, INIT, name="init, by N")
    rebns: Column[Line[Any]] = label("rebn", lambda line: line.start and YES[line.start.rebn], REBN, name="rebn, by N")
    shown: list[Column[Line[Any]]] = [
        N,
        *([inits] if len({start.init for start in starts}) > 1 else []),
        *([rebns] if len({start.rebn for start in starts}) > 1 else []),
        *(_errors_column(variant, errors) for variant in columns),
    ]
    return Table(title, shown, lines, caption=caption)


def _errors_column(variant: str, errors: Callable[[Cell], str | None]) -> Column[Line[Cell]]:
    def error(line: Line[Cell]) -> str | None:
        return errors(line.at[variant]) if variant in line.at else None

    return Column(label_of(variant), error, ERROR, name="error %, by N")
