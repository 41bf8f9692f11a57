"""Columns, tables and reports, and how they are rendered: as a rich table, Markdown or CSV.

A command declares each of its columns once; what a terminal, Markdown and ``show --explain`` show of it is derived.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from bgcbench.results.document import Document, dumps, printable
from bgcbench.results.rows import Counts, Data, Row
from bgcbench.specs import PLAN

LATER = ("rank", "limit_relative_error", "modules")  # fields of records that a CSV file has where some row does
BAR, EIGHTHS = 8, " ▏▎▍▌▋▊▉"  # cells of a bar on a terminal, and what ends it
NOTES = 5  # lines under a report; show --explain prints all notes
EXPLAIN = "what the columns mean: bgcbench show FILE --explain"
R = TypeVar("R")


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column: its title, the value of a row (None shows as -), what it means, and the form of a value.

    name: under which it is explained, where the title also says a phase, a unit or an N. right: aligned to the right.
    lead: repeated in front of every part of a table that is split because the terminal is narrow. optional: left out
    where no row has a value. drop: left out, those with the highest number first, before a table is split. brief: the
    form of a value on a terminal, where that is another one. bar: whether a terminal with room draws the value, as a
    share of the largest of all such columns.
    """

    title: str
    value: Callable[[R], Any]
    meaning: str = ""
    form: Callable[[Any], str] = str
    name: str = ""
    right: bool = True
    lead: bool = False
    optional: bool = False
    drop: int = 0
    brief: Callable[[Any], str] | None = None
    bar: bool = False

    def cell(self, row: R) -> str:
        value = self.value(row)
        return "-" if value is None else self.form(value)


def words(title: str, value: Callable[[R], Any], meaning: str, **more: Any) -> Column[R]:
    """A column of text."""
    return Column(title, value, meaning, right=False, **more)


def label(title: str, value: Callable[[R], Any], meaning: str, **more: Any) -> Column[R]:
    """A column of text that says which row this is."""
    return words(title, value, meaning, lead=True, **more)


def group_columns(of: Callable[[R], Any]) -> list[Column[R]]:
    """N, and the rank where there is one; of: what has both. A rank may keep to no N above 1, or layers differ, as
    those of a plan do."""

    def groups(row: R) -> int | None:
        found: int = of(row).groups
        return None if found == 1 and (of(row).rank or of(row).variant == PLAN) else found

    ranks = (
        "Rank of LR where --ranks asks for it; N is the reduction that it keeps to (- for none, or if layers differ)."
    )
    return [
        Column("N", groups, "Groups.", lead=True),
        Column("rank", lambda row: of(row).rank, ranks, lead=True, optional=True),
    ]


@dataclass(frozen=True)
class Table:
    """A title, columns over rows, and lines under them by heading; a heading without lines is left out.

    caption: of the table alone, where the title is that of a whole report. full: a terminal shows it with --wide only.
    """

    title: Sequence[str]
    declared: Sequence[Column[Any]]
    rows: Sequence[Any]
    sections: Mapping[str, Sequence[str]] = field(default_factory=dict)
    caption: str = ""
    full: bool = False

    @property
    def lines(self) -> list[str]:
        """What stands above the table."""
        return [*self.title, *([self.caption] if self.caption else [])]

    @functools.cached_property
    def columns(self) -> list[Column[Any]]:
        """Those that are declared, without optional ones that no row has a value for."""
        return [
            column
            for column in self.declared
            if not column.optional or any(column.value(row) is not None for row in self.rows)
        ]

    @functools.cached_property
    def cells(self) -> list[list[str]]:
        """By column, then by row."""
        return [[printable(column.cell(row)) for row in self.rows] for column in self.columns]

    @property
    def by_title(self) -> dict[str, list[str]]:
        return dict(zip([column.title for column in self.columns], self.cells, strict=True))

    @property
    def widths(self) -> list[int]:
        """Of each column on a terminal, with the space behind it."""
        texts = ((column.title, *cells) for column, cells in zip(self.columns, self.cells, strict=True))
        return [max(map(cell_len, column)) + 2 for column in texts]


def with_all_columns(first: Sequence[Table], whole: Table) -> list[Table]:
    """``first``, with the lists of ``whole`` below, and every column for --wide; without a first table ``whole``."""
    if not first:
        return [whole]
    last = replace(first[-1], sections=whole.sections)
    return [*first[:-1], last, replace(whole, title=["All columns"], sections={}, full=True)]


@dataclass(frozen=True)
class Report:
    """Tables, then the notes on a result file, the most important first.

    records: the same for CSV, flat and in SI units.
    """

    tables: Sequence[Table]
    notes: Sequence[str] | None = None
    records: Sequence[Mapping[str, Any]] = ()

    @property
    def width(self) -> int:
        """Columns of a terminal on which no table is split."""
        return max(sum(table.widths) for table in self.tables)

    @property
    def shown_notes(self) -> list[str]:
        """At most ``NOTES`` lines, of which the last says where there is more."""
        if self.notes is None:
            return []
        rest = len(self.notes) - NOTES + 1
        return [*self.notes[: NOTES - 1], f"and {rest} more; {EXPLAIN}" if rest > 0 else EXPLAIN]


def meanings(report: Report) -> dict[str, str]:
    """What the columns of a report mean, by the name under which each is explained."""
    return {column.name or column.title: column.meaning for table in report.tables for column in table.columns}


def explained(report: Report) -> Report:
    """What each column of a report means, and all of its notes."""
    columns = meanings(report)
    shown: list[Column[tuple[str, str]]] = [
        label("column", lambda of: of[0], ""),
        words("meaning", lambda of: of[1], ""),
    ]
    table = Table(report.tables[0].title, shown, list(columns.items()), {"Notes": report.notes or ["none"]})
    return Report([table], records=[{"column": name, "meaning": meaning} for name, meaning in columns.items()])


# ------------------------------------------------------------------------------------------------------------ Markdown

# What GitHub-flavoured Markdown acts on inside a line, but for an underscore within a word and a bracket that nothing
# makes a link of.
_MARKUP = re.compile(r"[\\`*~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
# What makes a heading, a quotation or a list of a line that begins with it.
_BLOCK = re.compile(r"^(?:(\d+)(?=[.)](?!\S))|(?=[#>+=-]))")


def _escaped(text: str) -> str:
    """``text`` as Markdown that shows it as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(text))


def _escaped_line(text: str) -> str:
    """``text`` as a line of its own, which begins no heading, quotation or list."""
    return _BLOCK.sub(r"\1\\", _escaped(text).lstrip())


def as_markdown(report: Report) -> str:
    """GitHub-flavoured Markdown at full width."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    def section(heading: str, entries: Sequence[str]) -> list[str]:
        above = ["", f"{_escaped(heading)}:", ""] if entries else []
        return above + [f"- {_escaped_line(entry)}" for entry in entries]

    lines: list[str] = []
    for table in report.tables:
        lines += [*([""] if lines else []), *(_escaped_line(text).replace("|", "\\|") for text in table.lines), ""]
        lines.append(line(_escaped(column.title) for column in table.columns))
        lines.append(line("---:" if column.right else "---" for column in table.columns))
        lines += [line(map(_escaped, texts)) for texts in zip(*table.cells, strict=True)]
        for heading, entries in table.sections.items():
            lines += section(heading, entries)
    return "\n".join([*lines, *section("Notes", report.shown_notes)]) + "\n"


# ----------------------------------------------------------------------------------------------------------------- CSV


def flat(data: Data | None, kind: type[Data], without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of ``data`` for a record; where there is none, None for each, so that all records have the same."""
    return {name: getattr(data, name, None) for name in kind.__struct_fields__ if name not in without}


def row_record(
    row: Any, counts: Sequence[str] = Counts.__struct_fields__, without: Sequence[str] = ()
) -> dict[str, Any]:
    """A row, which has ``params`` and ``counts``: which it is, how it ended, those ``counts``, and its other fields."""
    record = {"key": row.key, **flat(row.params, type(row.params)), "status": row.status, "reason": row.reason}
    record |= {name: getattr(row.counts, name, None) for name in counts}
    return record | flat(row, type(row), (*Row.__struct_fields__, "params", "counts", *without))


def as_csv(report: Report) -> str:
    """The report's records; the header is the union of their fields in order of appearance, but for those of LATER that
    no record knows."""
    fields = list(dict.fromkeys(name for record in report.records for name in record))
    unused = [name for name in LATER if all(record.get(name) is None for record in report.records)]
    fields = [name for name in fields if name not in unused]
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


# ------------------------------------------------------------------------------------------------------------ terminal


def as_rich(
    report: Report, width: int, *, wide: bool = False, answer_first: bool = False, bars: bool = True
) -> RenderableType:
    """Rich tables that fit ``width``: columns that find no room go into a further table below, led by the same rows.

    Without ``wide``, full tables are not shown, and columns that may be dropped are, with a line that names them.
    answer_first: what follows from the tables, and the notes, stand before them. bars: where cells have room for them.
    """
    shown = [table for table in report.tables if wide or not table.full]
    notes = {"Notes": report.shown_notes}
    blocks: list[tuple[Sequence[str], Table | None, Mapping[str, Sequence[str]]]]  # lines, what they are of, lists
    if answer_first:
        first, *others = shown
        blocks = [(first.title, None, first.sections)]
        blocks += [(table.title, None, table.sections) for table in others if any(table.sections.values())]
        blocks += [((), None, notes), (first.lines[len(first.title) :], first, {})]
        blocks += [(table.lines, table, {}) for table in others]
    else:
        blocks = [(table.lines, table, table.sections) for table in shown]
    parts: list[RenderableType] = []
    for lines, table, sections in blocks:
        parts += [*([Text("")] if parts and lines else []), *map(_text, lines)]
        parts += _tables(table, width, wide=wide, bars=bars) if table else []
        parts += _lists(sections)
    if len(shown) < len(report.tables):
        parts += [Text(""), _text("all columns: bgcbench show FILE --wide, or --format csv", "dim")]
    return Group(*parts, *_lists({} if answer_first else notes))


def _text(content: str, style: str = "") -> Text:
    return Text(printable(content), style=style)


def _lists(sections: Mapping[str, Sequence[str]]) -> Iterator[RenderableType]:
    """Each heading over its list."""
    for heading, entries in sections.items():
        yield from (Text(""), _text(heading, "bold")) if entries else ()
        for entry in entries:
            item = RichTable.grid(padding=(0, 1, 0, 0))
            item.add_row(Text("-"), _text(entry))
            yield item


def _tables(whole: Table, width: int, *, wide: bool, bars: bool) -> Iterator[RenderableType]:
    """A table in parts that fit ``width``, and a line on the columns that are left out."""
    brief = replace(whole, declared=[replace(each, form=each.brief or each.form) for each in whole.declared])
    table, dropped = (whole, []) if wide else fitted(brief, width)
    barred = with_bars(table)
    if bars and not dropped and sum(barred.widths) - 2 <= width:
        table = barred
    for chosen in split_columns(table, width):
        drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for number in chosen:
            column = table.columns[number]
            drawn.add_column(_text(column.title), justify="right" if column.right else "left", overflow="fold")
        for texts in zip(*(table.cells[number] for number in chosen), strict=True):
            drawn.add_row(*map(_text, texts))
        yield from (Text(""), drawn)
    if dropped:
        yield _text(f"without {', '.join(dropped)}, for which there is no room; all columns: --wide", "dim")


def with_bars(table: Table) -> Table:
    """``table`` with a bar behind each value of a column that has bars, all on one scale."""
    longest = max((column.value(row) or 0.0 for column in table.columns if column.bar for row in table.rows), default=0)

    def barred(column: Column[Any]) -> Column[Any]:
        width = max(len(text) for text in (column.title, *map(column.cell, table.rows)))

        def cell(row: Any) -> str:
            eighths = round(8 * BAR * (column.value(row) or 0.0) / longest)
            return f"{column.cell(row):>{width}} {'█' * (eighths // 8)}{EIGHTHS[eighths % 8]}".rstrip()

        return replace(column, title=f"{column.title:>{width}}", value=cell, form=str, right=False)

    declared = [barred(column) if column.bar and longest else column for column in table.columns]
    return replace(table, declared=declared)


def fitted(table: Table, width: int) -> tuple[Table, list[str]]:
    """``table`` without as many of the columns that may be dropped as it takes to fit ``width``, and their titles."""
    dropped: list[str] = []
    for drop in sorted({column.drop for column in table.columns} - {0}, reverse=True):
        if sum(table.widths) - 2 <= width:
            break
        dropped += [column.title for column in table.columns if column.drop == drop]
        table = replace(table, declared=[column for column in table.declared if column.drop != drop])
    return table, list(dict.fromkeys(dropped))


def split_columns(table: Table, width: int) -> list[list[int]]:
    """Numbers of the columns in as few tables as fit ``width``, in order; lead columns stand in front of each."""
    lead = [number for number, column in enumerate(table.columns) if column.lead]
    room = width - sum(table.widths[number] for number in lead)
    parts: list[list[int]] = []
    left = 0
    for number, cells in enumerate(table.cells):
        if number in lead or not any(cells):
            continue
        needed = table.widths[number]
        if not parts or needed - 2 > left:
            parts.append(list(lead))
            left = room
        parts[-1].append(number)
        left -= needed
    return parts or [lead]


def emit(
    report: Report,
    form: str,
    console: Console,
    document: Document | None = None,
    *,
    wide: bool = False,
    answer_first: bool = False,
) -> None:
    """Print ``report`` on ``console`` in ``form``; 'auto' is a table on a terminal and Markdown elsewhere.

    wide, answer_first: see :func:`as_rich`.
    """
    if form == "auto":
        form = "table" if console.is_terminal else "markdown"
    if form == "table":
        with console.capture() as captured:  # rich would end the process where the reader of a pipe has gone
            bars = console.encoding.startswith("utf")
            console.print(as_rich(report, console.width, wide=wide, answer_first=answer_first, bars=bars))
        text = captured.get()
    elif form == "json":
        text = dumps(document) if document is not None else json.dumps(report.records, indent=1) + "\n"
    else:
        text = as_markdown(report) if form == "markdown" else as_csv(report)
    console.file.write(text)
    console.file.flush()
