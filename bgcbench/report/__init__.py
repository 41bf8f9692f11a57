"""Tables and sentences from a result document, for a terminal, Markdown and CSV. No torch.

A report is built from typed rows alone, so a live run and the file that it wrote read alike.
"""

from __future__ import annotations

from bgcbench.report.compare import Comparison, compare_report, settings_that_differ, speed_up
from bgcbench.report.conversion import conversion_report
from bgcbench.report.machine import doctor_report
from bgcbench.report.measured import flags
from bgcbench.report.table import Column, Report, Table, as_csv, as_markdown, emit, explained
from bgcbench.report.table1 import table1_report
from bgcbench.results.document import Document
from bgcbench.results.rows import COMMANDS
from bgcbench.specs import load

__all__ = [
    "Column",
    "Comparison",
    "Report",
    "Table",
    "as_csv",
    "as_markdown",
    "compare_report",
    "conversion_report",
    "doctor_report",
    "document_report",
    "emit",
    "explained",
    "flags",
    "settings_that_differ",
    "speed_up",
    "table1_report",
]


def document_report(document: Document) -> Report:
    """The report of any result document."""
    report: Report = load(COMMANDS[document.command].report)(document)
    return report
