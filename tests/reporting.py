"""What the tests of tables share: a report of a document, which may still be a dict, and its rendering."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from bgcbench import report
from bgcbench.results import document_of
from bgcbench.results.document import Document
from bgcbench.results.rows import ProfileRow

Json = dict[str, Any]


def typed(document: Json | Document) -> Document:
    return document if isinstance(document, Document) else document_of(document, "the example")


def report_of(document: Json | Document) -> report.Report:
    return report.document_report(typed(document))


def render(document: Json | Document, form: str, width: int = 80, *, wide: bool = False) -> str:
    out, found = io.StringIO(), typed(document)
    console = Console(file=out, width=width, no_color=True, highlight=False)
    report.emit(report_of(found), form, console, found, wide=wide)
    return out.getvalue()


def profile_rows(document: Json) -> tuple[ProfileRow, ...]:
    return document_of(document, "the example").results


def check_width(document: Json, width: int) -> None:
    """No line is wider than the terminal, and with every column no cell is cut."""
    for wide in (False, True):
        text = render(document, "table", width, wide=wide)
        assert max(len(line) for line in text.splitlines()) <= width
    for table in report_of(document).tables:
        for cells in table.cells:
            assert all(cell in text for cell in cells)


widths = pytest.mark.parametrize("width", [60, 80, 140, 250])
