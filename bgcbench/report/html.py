"""One page of any number of result documents, to be read without bgcbench: nothing on it comes from elsewhere.

The page is a template (``page/page.html``) over the same reports, columns and cells as a terminal's tables. Every text
is escaped, and the page's own policy lets a browser run its one script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import bgcbench
from bgcbench.report.table import NOTES, Report, Table, meanings
from bgcbench.results.document import Document, printable

STATES = {"ok": "complete", "partial": "some rows failed", "running": "not ended"}


@dataclass(frozen=True)
class Part:
    """A result file on the page.

    number: its place, from 1. pictures: (name, SVG element with its alternative text) of what is drawn of it.
    """

    number: int
    name: str
    document: Document
    report: Report
    pictures: Sequence[tuple[str, str]]

    @property
    def state(self) -> str:
        quick = "quick, " if self.document.quality == "quick" else ""
        return quick + STATES.get(self.document.exit_reason, self.document.exit_reason)

    def drawn_by(self, picture: str) -> str:
        target = f"{PurePath(self.name).stem}-{picture}.svg"
        return shlex.join(["bgcbench", "show", self.name, "--plot", target, "--picture", picture])


def sortable(table: Table) -> Iterator[list[tuple[bool, bool, str, str | None]]]:
    """By row, the cells: whether it says which row this is, whether it stands on the right, its text, and the number
    that it is sorted by, where its text does not begin with that."""
    for row, texts in zip(table.rows, zip(*table.cells, strict=True), strict=True):
        cells = []
        for column, text in zip(table.columns, texts, strict=True):
            value = column.value(row)
            number = f"{value:.6g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else None
            cells.append((column.lead, column.right, text, None if number == text else number))
        yield cells


def page(parts: Sequence[Part], no_pictures: str = "") -> str:
    """The HTML of the page. no_pictures: why it has none, where they could have been drawn."""
    folder = resources.files("bgcbench.report") / "page"
    template, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
                       finalize=lambda value: printable(value) if type(value) is str else value)  # fmt: skip
    script = f"\n{script}"
    return made.from_string(template).render(
        parts=parts,
        no_pictures=no_pictures,
        sortable=sortable,
        meanings=meanings,
        command_line=shlex.join,
        most=NOTES,
        version=bgcbench.__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        drawn=Markup,
    )
