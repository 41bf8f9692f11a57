"""What several commands share: the application, options, how their values are read, and what they print."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.specs import VARIANTS

if TYPE_CHECKING:
    from rich.console import Console

    from bgcbench.experiments.config import RunConfig
    from bgcbench.experiments.session import Session
    from bgcbench.interrupts import Interrupts
    from bgcbench.report import Report
    from bgcbench.results import ResultWriter


class _PlainHelp(TyperGroup):
    """The top-level help without rich panels, whose Markdown machinery doubles the time to the first line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)


app = typer.Typer(
    name="bgcbench",
    cls=_PlainHelp,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Which convolutions of a network can be made cheaper, with which variant, how much time that saves on this "
    "device, and what it loses. Variants: "
    + ", ".join(f"{variant.name} ({variant.summary})" for variant in VARIANTS.values())
    + ".",
    epilog="Start with: bgcbench profile --quick. Exit codes: 0 done, 1 some rows failed, 2 usage, 3 no such device, "
    "4 output not writable, 5 compare --fail-on, 130/143 interrupted (the file is valid and resumable).",
)

# The panels of a command's --help.
WORKLOAD = "Workload"
NETWORK = "A whole network"
GRID = "What is compared"
MEASURE = "How it is measured"
OUTPUT = "Output"

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (a table on a terminal, Markdown elsewhere), table, markdown, csv, json.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.", rich_help_panel=OUTPUT)]
Where = Annotated[
    str | None,
    typer.Option(
        help="Which of its convolutions: auto (what the paper replaces), 3x3, 1x1, all, none.",
        show_default="auto",
        rich_help_panel=NETWORK,
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(help="These too (GLOB of module names; repeatable).", rich_help_panel=NETWORK)
]
Exclude = Annotated[list[str] | None, typer.Option(help="Not these (GLOB; repeatable).", rich_help_panel=NETWORK)]
StemStride = Annotated[
    int | None,
    typer.Option(
        help="Stride of the first convolution of efficientnet_* and mobilenet_v*.",
        show_default="2, and 1 up to 64 px",
        rich_help_panel=NETWORK,
    ),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        help="Which of a file's weights: the key that leads to them, nested ones joined by dots, such as model_ema.",
        show_default="the first that fits",
        rich_help_panel=WORKLOAD,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Of the channels, 0 black, 1 white, where the weights come from a file: 0.5 or 0.485,0.456,0.406.",
        show_default="the weights'",
        rich_help_panel=WORKLOAD,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(help="Their standard deviations.", show_default="the weights'", rich_help_panel=WORKLOAD),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="Short side of an image file before its centre of --size is cut out, or HEIGHTxWIDTH to cover.",
        show_default="the weights'",
        rich_help_panel=WORKLOAD,
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(
        help="Of image files: bilinear, bicubic, nearest, box, hamming, lanczos.",
        show_default="the weights'",
        rich_help_panel=WORKLOAD,
    ),
]
NoReference = Annotated[
    bool, typer.Option("--no-reference", help="Leave the standard convolution out.", rich_help_panel=GRID)
]
SkipInvalid = Annotated[
    bool,
    typer.Option(
        "--skip-invalid",
        help="Go on when N does not divide the channels; the row says so.",
        rich_help_panel=GRID,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:K.", show_default="auto", rich_help_panel=MEASURE)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's", rich_help_panel=MEASURE)]
Seed = Annotated[int | None, typer.Option(show_default="0", rich_help_panel=MEASURE)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.", rich_help_panel=OUTPUT)
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw the result: a .png, .svg or .pdf file (extra: plot).", rich_help_panel=OUTPUT),
]
Out = Annotated[
    str | None,
    typer.Option(
        help="Result file; - is stdout (JSON).",
        show_default="results/COMMAND-WHAT-DEVICE-TIME.json",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace existing --out and --plot files.", rich_help_panel=OUTPUT)
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Continue this result file: keep what it holds, do the rest. Its settings are used.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a result goes and how it is shown."""

    path: Path | None
    to_stdout: bool
    replace: bool
    form: str
    quiet: bool
    resumes: bool = False
    plot: Path | None = None

    @classmethod
    def asked(
        cls, out: str | None, form: str, *, force: bool, resume: Path | None, quiet: bool, plot: Path | None = None
    ) -> Output:
        """What --out, --format, --force, --resume, --quiet and --plot ask for; raises UsageError for contradictions."""
        check_format(form)
        if resume is not None and (out is not None or force):
            raise UsageError("--resume writes to the file it continues; leave --out and --force out")
        if force and out in (None, "-") and plot is None:
            raise UsageError("--force replaces an existing --out file; name one with --out, or leave --force out")
        if out == "-" and form not in ("auto", "json"):
            raise UsageError(f"--out - prints JSON, not {form}; leave --format out, or write to a file")
        path = resume or (Path(out) if out not in (None, "-") else None)
        shown = "json" if out == "-" else form
        return cls(path, out == "-", force or resume is not None, shown, quiet, resume is not None, plot)

    def stored(self) -> dict[str, Any] | None:
        """The document that a run is to continue, or None."""
        from bgcbench.results import read

        return read(self.path) if self.resumes and self.path is not None else None

    def probe(self, *, dry_run: bool) -> None:
        """Raise OutputError now where a file could not be written in the end; a dry run writes none."""
        from bgcbench.results import ResultWriter

        if self.plot is not None:
            from bgcbench.plots import check_plot

            check_plot(self.plot, replace=self.replace or dry_run)
        if self.path is not None and not dry_run:
            writer = ResultWriter(self.path)
            writer.claim(replace=self.replace)
            writer.release()  # it is claimed for the run once that is ready

    @contextlib.contextmanager
    def claimed(self, stored: dict[str, Any] | None, interrupts: Interrupts) -> Iterator[ResultWriter | None]:
        """The writer of the result file, where no other run writes meanwhile; None for stdout.

        stored: what the run goes on with. Raises OutputError for a file that cannot be written, or is not to be.
        """
        from bgcbench.results import ResultWriter, read

        if self.path is None:
            yield None
            return
        writer = ResultWriter(self.path)
        unsure = writer.claim(replace=self.replace)
        interrupts.leaving = writer.release
        if stored is not None and read(self.path) != stored:
            writer.release()
            raise OutputError(f"{self.path} was written by another run while this one began; resume it again")
        if unsure and not self.quiet:
            say(unsure)
        try:
            yield writer
        finally:
            writer.release()

    @property
    def destination(self) -> str:
        """Where the result goes, in words."""
        return f"result file: {self.path}" if self.path else "result: stdout"

    def named(self, command: str, what: str, environment: Mapping[str, Any]) -> Output:
        """This with a path of our own making where none was given; it needs the device's name."""
        from bgcbench.results import default_path

        if self.path is not None or self.to_stdout:
            return self
        device = environment["device"]
        name = "cpu" if device["type"] == "cpu" else device["name"]
        return dataclasses.replace(self, path=default_path(command, what, name))


def check_format(form: str) -> None:
    """Raise UsageError unless ``form`` is a format to print in."""
    from bgcbench.specs import FORMATS, check_choice

    check_choice("format", form, FORMATS)


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """'2,4,8' as numbers; raises UsageError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} must be whole numbers separated by commas, such as 2,4,8") from None
    return tuple(dict.fromkeys(values))


def names(text: str | None) -> tuple[str, ...] | None:
    """'gc, bgc' as words, each once."""
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def variants(text: str | None) -> tuple[str, ...] | None:
    """``names``, where all is every variant."""
    return tuple(VARIANTS) if text == "all" else names(text)


def size(text: str, option: str = "--size") -> tuple[int, int]:
    """'7' or '7x14' as height and width; raises UsageError for anything else."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]+", part) for part in parts):
        raise UsageError(f"{option} {text} must be a number of pixels or HEIGHTxWIDTH, such as 7 or 7x14")
    return int(parts[0]), int(parts[-1])


def images(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`bgcbench.experiments.config.ImageChoice` from the options of their names."""
    given: dict[str, Any] = {name: options[name] for name in ("interpolation", "weights_key")}
    given["resize"] = None if options["resize"] is None else size(options["resize"], "--resize")
    for name in ("mean", "std"):
        try:
            text = options[name]
            values = None if text is None else tuple(float(part) for part in text.split(","))
            given[name] = 3 * values if values is not None and len(values) == 1 else values
        except ValueError:
            raise UsageError(f"--{name} {text} must be one number or three separated by commas") from None
    return given


def print_document(document: dict[str, Any], form: str, *, explain: bool = False) -> None:
    """Print a result document on stdout, or what the columns of its tables mean."""
    from bgcbench.report import document_report, explained
    from bgcbench.results import document_of

    report = document_report(document_of(document, "the result"))
    emit(explained(report) if explain else report, form, None if explain else document)


def emit(report: Report, form: str, document: dict[str, Any] | None = None) -> None:
    """Print a report on stdout; ``document`` is what JSON prints in its place."""
    from bgcbench.report import emit as emit_report

    emit_report(report, form, stdout(report), document)


def stdout(report: Report) -> Console:
    """stdout; where it is no terminal a table gets the width it needs instead of rich's 80 columns."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=max(80, report.width))
    return console


def say(message: str) -> None:
    """Print a line on stderr, where there is one; it may hold whatever a file or a network is called."""
    from bgcbench.results import printable

    with contextlib.suppress(OSError, AttributeError):  # a full disk or a closed stderr ends no measurement
        sys.stderr.write(f"{printable(message)}\n")
        sys.stderr.flush()


def draw(document: dict[str, Any], path: Path, picture: str | None) -> None:
    """Draw a result document; raises UsageError without matplotlib, OutputError where the file cannot be written."""
    from bgcbench.plots import draw as draw_plot
    from bgcbench.results import document_of

    draw_plot(document_of(document, str(path)), path, picture)


def follow(steps: Iterator[tuple[str, float | None]], *, quiet: bool) -> None:
    """Go through ``steps`` (what is done, and the share that is), with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        for _ in steps:
            pass
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        for doing, done in steps:
            bar.update(task, description=doing, total=None if done is None else 1.0, completed=done or 0.0)


def document_of(
    command: str, context: typer.Context, config: RunConfig, session: Session, stored: dict[str, Any] | None
) -> dict[str, Any]:
    """The document that a run of ``config`` fills: a new one, or ``stored``, which it goes on with."""
    from bgcbench import results

    if stored is not None:
        return results.reopened(stored, config.to_json())
    quality = "quick" if config.quick else "full"
    return results.new_document(
        command, context.obj or [], config.to_json(), session.environment, session.settings, quality
    )


def carried_out(
    go: Callable[[], None],
    take: Callable[[], None],
    document: dict[str, Any],
    keys: Iterable[str],
    output: Output,
    writer: ResultWriter | None,
    interrupts: Interrupts,
    *,
    speaks: bool = True,
) -> int:
    """Run ``go`` into ``document``, print that and return the exit code; whatever happens, what there is is saved.

    go: does the run, saving as it goes. take: puts what is known into the document. keys: of the planned rows. writer:
    of the result file, None for stdout. speaks: whether this process prints.
    """
    from bgcbench import results

    planned = len({*keys, *(row["key"] for row in document["results"])})  # a resumed file may hold rows beyond the plan
    failed: str | None = None
    try:
        go()
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        raise
    finally:
        take()
        results.finish(document, planned, interrupted=interrupts.requested(), failed=failed)
        if writer is not None:
            writer.write(document)
        if failed is not None and document["results"] and speaks:
            print_document(document, output.form)  # what there is; the error follows
    done = sum(row["status"] in results.DONE for row in document["results"])
    if not speaks:
        return interrupts.exit_code if interrupts.requested() else int(done < planned)
    if document["results"] or output.form == "json":  # a run that was stopped at once has nothing to show
        try:
            print_document(document, output.form)
        except OutputError as error:
            path = writer.path if writer is not None else results.rescue(document, f"{document['command']}.json")
            kept = f"the result is in {path}" if path else "the result is lost"
            raise OutputError(f"{error}; {kept}") from error
    return closing(writer, interrupts, done, planned, quiet=output.quiet)


def closing(writer: ResultWriter | None, interrupts: Interrupts, done: int, planned: int, *, quiet: bool) -> int:
    """The last line on stderr, and the exit code."""
    where = "" if writer is None else f" to {writer.path}"
    if writer is not None and writer.problem is not None:
        kept = f"the result was rescued to {writer.rescued_to}" if writer.rescued_to else "only stdout has the result"
        say(f"bgcbench: {writer.path} could not be written ({writer.problem}); {kept}")
        return OutputError.exit_code
    if interrupts.requested():
        again = "" if writer is None else f"; resume with --resume {writer.path}"
        say(f"saved {done}/{planned}{where}{again}")
        return interrupts.exit_code
    if not quiet:
        say(f"saved {done}/{planned}{where}" if where else f"measured {done}/{planned}")
    return 0 if done == planned else BgcbenchError.exit_code
