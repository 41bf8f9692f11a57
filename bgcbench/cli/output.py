"""Where a result goes, and what is printed of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.plots import check_plot
from bgcbench.results import Document, ResultWriter, default_path, printable, read
from bgcbench.results.files import check_free

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from bgcbench.experiments.options import Asked
    from bgcbench.interrupts import Interrupts
    from bgcbench.report import Report
    from bgcbench.results.rows import Device


@dataclasses.dataclass(frozen=True)
class Said:
    """What is shown of an update of a run: ``text`` and ``share`` (0 to 1, None where unknown) by a bar; ``warnings``
    by both, and so is a ``table``, of which a bar shows the last; ``line``, where there is one, by a log."""

    text: str
    share: float | None = None
    line: str | None = None
    warnings: tuple[str, ...] = ()
    table: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """What a log is to hold of it."""
        table = ("so far, and it goes on:", *self.table, "") if self.table else ()
        return (*self.warnings, *table, *(() if self.line is None else (self.line,)))


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a result goes and how it is shown."""

    path: Path | None
    to_stdout: bool
    replace: bool
    form: str
    quiet: bool
    plot: Path | None = None
    wide: bool = False

    @classmethod
    def asked(cls, asked: Asked, resumed: Path | None, *, saves: bool) -> Output:
        """What was asked for; resumed: the file to go on with. saves: --force may be about the files of --save alone.

        Raises UsageError for contradictions.
        """
        out = None if resumed else asked.out
        force = asked.force and not (asked.is_auto and resumed)
        if resumed and force:
            raise UsageError("--resume writes to the file it continues; leave --out and --force out")
        if force and not saves and out in (None, "-") and asked.plot is None:
            raise UsageError("--force replaces an existing --out file; name one with --out, or leave --force out")
        if out == "-" and asked.form not in ("auto", "json"):
            raise UsageError(f"--out - prints JSON, not {asked.form}; leave --format out, or write to a file")
        return cls(
            path=resumed or (Path(out) if out not in (None, "-") else None),
            to_stdout=out == "-",
            replace=force or resumed is not None,
            form="json" if out == "-" else asked.form,
            wide=asked.wide,
            quiet=asked.quiet,
            plot=asked.plot,
        )

    def probe(self, *, dry_run: bool) -> None:
        """Raise OutputError now where a file could not be written in the end; a dry run writes none."""
        if self.plot is not None:
            check_plot(self.plot, replace=self.replace)
        if self.path is not None and dry_run:
            check_free(self.path, "--out", replace=self.replace)
        elif self.path is not None:
            writer = ResultWriter(self.path)
            writer.claim(replace=self.replace)
            writer.release()  # it is claimed for the run once that is ready

    @contextlib.contextmanager
    def claimed(self, stored: Document | None, interrupts: Interrupts) -> Iterator[ResultWriter | None]:
        """The writer of the result file, where no other run writes meanwhile; None for stdout.

        stored: what the run goes on with. Raises OutputError for a file that cannot be written, or is not to be.
        """
        if self.path is None:
            yield None
            return
        writer = ResultWriter(self.path)
        unsure = writer.claim(replace=self.replace)
        interrupts.leaving = writer.release
        try:
            if stored is not None and read(self.path) != stored:
                raise OutputError(f"{self.path} was written by another run while this one began; resume it again")
            if unsure and not self.quiet:
                say(unsure)
            yield writer
        finally:
            writer.release()

    @property
    def destination(self) -> str:
        """Where the result goes, in words."""
        return f"result file: {self.path}" if self.path else "result: stdout"

    def named(self, command: str, what: str, device: Device) -> Output:
        """This with a path of our own making where none was given; it needs the device's name."""
        if self.path is not None or self.to_stdout:
            return self
        name = "cpu" if device.type == "cpu" else device.name
        return dataclasses.replace(self, path=default_path(command, what, name))


def print_document(
    document: Document, form: str, *, explain: bool = False, wide: bool = False, answer_first: bool = False
) -> None:
    """Print a result document on stdout, or what the columns of its tables mean."""
    from bgcbench.report import document_report, explained

    report = document_report(document)
    shown = explained(report) if explain else report
    emit(shown, form, None if explain else document, wide=wide, answer_first=answer_first and not explain)


def emit(report: Report, form: str, document: Document | None = None, **shown: bool) -> None:
    """Print a report on stdout; ``document`` is what JSON prints in its place. shown: as of bgcbench.report.emit."""
    from bgcbench.report import emit as emit_report

    emit_report(report, form, stdout(report), document, **shown)


def stdout(report: Report) -> Console:
    """stdout; where it is no terminal a table gets the width it needs instead of rich's 80 columns."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=max(80, report.width))
    return console


def say(message: str) -> None:
    """Print a line on stderr, where there is one; it may hold whatever a file or a network is called."""
    with contextlib.suppress(OSError, AttributeError):  # a full disk or a closed stderr ends no measurement
        sys.stderr.write(f"{printable(message)}\n")
        sys.stderr.flush()


EVERY_S = 15.0  # of a log


def look(document: Document) -> tuple[str, ...]:
    """The first table of a run that goes on, in lines for stderr."""
    from rich.console import Console

    from bgcbench import report

    text = io.StringIO()
    console = Console(file=text, width=Console(stderr=True).width, no_color=True, highlight=False)
    table = dataclasses.replace(report.document_report(document).tables[0], sections={})
    report.emit(report.Report([table]), "table", console)
    return tuple(text.getvalue().splitlines())


@dataclasses.dataclass
class Looks:
    """When to draw the table of a run that goes on: for a log once, for a terminal as often as costs it little."""

    _due_s: float = 0.0

    def of(self, document: Document, *, quick: bool) -> tuple[str, ...]:
        """The table as it stands, or nothing where it is not due. quick: the run's end is near, which a log awaits."""
        from rich.console import Console

        began = time.monotonic()
        live = Console(stderr=True).is_terminal
        if began < self._due_s or (quick and not live):
            return ()
        drawn = look(document)
        now = time.monotonic()
        self._due_s = now + max(2.0, 20 * (now - began)) if live else math.inf
        return drawn


def with_progress(updates: Iterator[Said], *, quiet: bool) -> None:
    """Go through a run with a bar on a terminal, above the table as it grows, and elsewhere with what a log is to
    hold: at least a line each EVERY_S."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        told = time.monotonic()
        for said in updates:
            lines = said.lines or ((said.text,) if time.monotonic() - told >= EVERY_S else ())
            for line in lines if not quiet else ():
                say(line)
                told = time.monotonic()
        return
    bar = _bar(console)
    task = bar.add_task("starting", total=None)
    with Live(bar, console=console, transient=True) as live:
        for said in updates:
            for line in said.warnings:
                console.print(printable(line), markup=False, highlight=False)
            if said.table:
                live.update(Group(bar, Text("\n".join(map(printable, said.table)))))
            share = said.share
            bar.update(task, description=said.text, total=None if share is None else 1.0, completed=share or 0.0)


@contextlib.contextmanager
def waiting(doing: str, *, quiet: bool) -> Iterator[None]:
    """Meanwhile a bar that moves on a terminal, and elsewhere a line each EVERY_S: with what is done."""
    from rich.console import Console

    console, over = Console(stderr=True), threading.Event()

    def tell() -> None:
        while not over.wait(EVERY_S):
            say(doing)

    if quiet:
        yield
    elif console.is_terminal:
        with _bar(console) as bar:
            bar.add_task(doing, total=None)
            yield
    else:
        threading.Thread(target=tell, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), TimeElapsedColumn()
    return Progress(*columns, console=console, transient=True)


def closing(
    writer: ResultWriter | None, interrupts: Interrupts, document: Document, planned: int, *, quiet: bool
) -> int:
    """The last line on stderr, and the exit code."""
    done = len(document.done)
    where = "" if writer is None else f" to {writer.path}"
    if writer is not None and writer.problem is not None:
        kept = f"the result was rescued to {writer.rescued_to}" if writer.rescued_to else "only stdout has the result"
        say(f"bgcbench: {writer.path} could not be written ({writer.problem}); {kept}")
        return OutputError.exit_code
    if interrupts.requested():
        again = "" if writer is None else f"; resume with --resume {writer.path}"
        say(f"saved {document.measured}/{planned}{where}{again}")
        return interrupts.exit_code
    if not quiet:
        say(f"saved {done}/{planned}{where}" if where else f"measured {done}/{planned}")
    return 0 if done == planned else BgcbenchError.exit_code
