"""``bgcbench show``, ``report``, ``doctor`` and ``compare``: what needs files or the machine, and no measurement."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from bgcbench import plots, results
from bgcbench.cli import output
from bgcbench.errors import BgcbenchError, ResultFileError, UsageError
from bgcbench.experiments import options
from bgcbench.experiments.profile import ProfileConfig
from bgcbench.results import Document, merging
from bgcbench.results import files as writing
from bgcbench.results.rows import COMMANDS
from bgcbench.specs import FORMATS, check_choice

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (a table on a terminal, Markdown elsewhere), table, markdown, csv, json.",
        rich_help_panel=options.more(options.OUTPUT),
    ),
]

LAYER = options.more("A layer for --table1")
PICTURES = "; ".join(f"{', '.join(of.pictures)} ({name})" for name, of in COMMANDS.items() if of.pictures)


def show(
    file: Annotated[Path | None, typer.Argument(help="A result file.")] = None,
    table1: Annotated[
        bool, typer.Option("--table1", help="The paper's Table 1 evaluated, for FILE's layer or the one given here.")
    ] = False,
    channels: Annotated[
        int | None, typer.Option(help="Channels in and out.", show_default="1024", rich_help_panel=LAYER)
    ] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Input channels.", show_default="--channels", rich_help_panel=LAYER)
    ] = None,
    out_channels: Annotated[
        int | None, typer.Option(help="Output channels.", show_default="--channels", rich_help_panel=LAYER)
    ] = None,
    kernel: Annotated[int | None, typer.Option(help="Kernel size.", show_default="3", rich_help_panel=LAYER)] = None,
    size: Annotated[
        str | None, typer.Option(help="Input height and width.", show_default="7", rich_help_panel=LAYER)
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8,16", rich_help_panel=LAYER)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw FILE: a .png, .svg or .pdf file (extra: plot)."),
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option(help=f"Which one: {PICTURES}.", show_default="what there is to draw"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --plot file.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what the columns of FILE's tables mean, and all notes.")
    ] = False,
    wide: Annotated[
        bool,
        typer.Option(
            "--wide",
            help="Show every column of every table on a terminal, too.",
            rich_help_panel=options.more(options.OUTPUT),
        ),
    ] = False,
    form: Format = "auto",
) -> int:
    """Print a result file again, or Table 1 for any layer. Measures nothing.

    [bold]bgcbench show results/FILE.json --format markdown[/bold]

    [bold]bgcbench show --table1 --channels 256 --groups 2,4,8[/bold]
    """
    form = check_choice("format", form.casefold(), FORMATS)
    shape = {"channels": channels, "in_channels": in_channels, "out_channels": out_channels, "kernel": kernel,
             "size": size, "groups": groups}  # fmt: skip
    given = [f"--{name.replace('_', '-')}" for name, value in shape.items() if value is not None]
    if given and (file is not None or not table1):
        raise UsageError(f"{given[0]} describes a layer for --table1 without FILE; drop it, or use show --table1")
    if file is None and not table1:
        raise UsageError("show needs a result FILE, or --table1 with a layer such as --channels 1024")
    if explain and (file is None or table1):
        raise UsageError("--explain is for a result FILE without --table1; see docs/tables.md for all columns")
    document = results.read(file) if file is not None else None
    _check_plot(plot, picture, force=force, drawable=not table1)
    if document is not None and not table1:
        with _consistent(str(file)):
            output.print_document(document, form, explain=explain, wide=wide, answer_first=True)
            if plot is not None:
                plots.draw(document, plot, picture)
        return 0
    if document is None:
        described = [each for each in options.options_of(ProfileConfig).values() if each.parameter in shape]
        config = ProfileConfig(**options.given_fields(described, shape))
    else:
        results.check_command(document, "profile", str(file))
        if "model" in document.config:
            raise UsageError(f"{file} measured a network; --table1 is for one layer, such as --channels 1024")
        config = ProfileConfig.from_json(document.config)
        measurable = {row.params.groups for row in document.results if row.status != "invalid" and not row.params.rank}
        config = dataclasses.replace(config, groups=tuple(sorted(measurable)))
    from bgcbench.report import table1_report

    shown = config.in_channels, config.out_channels, config.kernel, (config.height, config.width), config.groups
    output.emit(table1_report(*shown), form)
    return 0


def report(
    files: Annotated[list[Path], typer.Argument(help="Result files, or folders of them.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page, a .html file.")] = Path("report.html"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
) -> int:
    """Make one HTML page of result files, to be read or sent without bgcbench: verdicts, sortable tables, pictures.

    The page has everything in it and loads nothing. Of a folder it shows every result file, and names the others.

    [bold]bgcbench report results -o report.html[/bold]
    """
    from bgcbench.report import document_report, html

    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: the name must end in .html")
    writing.check_new(out, "--out", replace=force)
    parts, no_pictures = [], ""
    for number, (name, document) in enumerate(_documents(files), 1):
        with _consistent(name):
            try:
                pictures = plots.inline_pictures(document, f"f{number}")
            except UsageError as missing:  # of matplotlib: the page is whole without
                pictures, no_pictures = [], str(missing)
            parts.append(html.Part(number, name, document, document_report(document), pictures))
    if not parts:
        raise UsageError(f"no result file in {', '.join(map(str, files))}; name files that a bgcbench command wrote")
    writing.write_named(out, "--out", html.page(parts, no_pictures).encode())
    drawn = sum(len(part.pictures) for part in parts)
    drawn_words = no_pictures or f"{drawn} picture{'s' * (drawn != 1)}"
    output.say(f"{out}: {len(parts)} result file{'s' * (len(parts) != 1)}, {drawn_words}")
    return 0


def merge(
    files: Annotated[
        list[Path], typer.Argument(help="The parts: result files of runs with --shard.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The result file of all rows.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> int:
    """Join the parts of one plan, which runs with --shard 1/M to M/M have made, into one result file.

    Parts of other plans, settings or machines are refused. Rows of different parts were not measured in turn:
    their ratios have wider intervals.

    [bold]bgcbench profile --channels 256 --shard 1/2 -o one.json[/bold]

    [bold]bgcbench merge one.json two.json -o all.json[/bold]
    """
    if out is None:
        raise UsageError("name the file for all rows: -o FILE")
    writing.check_new(out, "--out", replace=force)
    joined = merging.merged([(str(path), results.read(path)) for path in files])
    writing.write_named(out, "--out", results.dumps(joined).encode())
    missing = "" if joined.complete else "; not complete: parts, or rows of parts, are missing"
    output.say(f"{out}: {len(joined.results)} rows of {len(files)} parts{missing}")
    return 0 if joined.complete else BgcbenchError.exit_code


def _documents(paths: list[Path]) -> Iterator[tuple[str, Document]]:
    """The name and the document of each result file, and of those in folders; says which files there are no results."""
    seen: set[Path] = set()
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                yield file.as_posix(), results.read(file)
            except ResultFileError as error:
                if not path.is_dir():
                    raise
                output.say(f"left out: {error}")


@contextlib.contextmanager
def _consistent(name: str) -> Iterator[None]:
    """A file whose every value may be, and whose values cannot be together, is damaged too."""
    try:
        yield
    except BgcbenchError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as problem:
        raise ResultFileError(
            f"{name} is damaged: its rows do not fit together ({type(problem).__name__}: {problem})"
        ) from problem


def _check_plot(plot: Path | None, picture: str | None, *, force: bool, drawable: bool) -> None:
    """Refuse --plot, --picture and --force where they would do nothing, or the file could not be written."""
    if plot is None:
        if picture is not None or force:
            option = "--picture" if picture is not None else "--force"
            raise UsageError(f"{option} is for --plot FILE; add that, or leave {option} out")
        return
    if not drawable:
        raise UsageError("--plot draws a result FILE; name one, without --table1")
    plots.check_plot(plot, replace=force)


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:K.")] = "auto", form: Format = "auto"
) -> int:
    """Print this machine's environment and what on it could spoil a measurement."""
    form, device = check_choice("format", form.casefold(), FORMATS), device.casefold()
    ProfileConfig(device=device)  # the name is checked before torch is imported
    from bgcbench.measure.device import resolve_device
    from bgcbench.measure.environment import describe_environment, diagnose
    from bgcbench.report import doctor_report

    found, warning = resolve_device(device)
    findings = diagnose(found)
    if warning:
        findings.insert(0, ("device search", warning, "pass --device cpu to say so yourself"))
    output.emit(doctor_report(describe_environment(found), findings), form)
    return 0


def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A later result file.")],
    fail_on: Annotated[
        float | None,
        typer.Option(help="Exit with 5 if a row is significantly slower by more than this percentage, or missing."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare files measured with different settings.")] = False,
    form: Format = "auto",
) -> int:
    """Compare two profile files row by row, with confidence intervals.

    [bold]bgcbench compare before.json after.json --fail-on 3[/bold]
    """
    form = check_choice("format", form.casefold(), FORMATS)
    if fail_on is not None and not 0 <= fail_on < float("inf"):
        raise UsageError(f"--fail-on {fail_on} must be 0 or a positive number of percent")
    documents = [results.read(path) for path in (before, after)]
    for path, document in zip((before, after), documents, strict=True):
        results.check_command(document, "profile", str(path))
    from bgcbench.report import compare_report, settings_that_differ

    differing = settings_that_differ(*documents)
    if differing and not force:
        name, old, new = differing[0]
        raise UsageError(f"{name} is {old} in {before} and {new} in {after}; measure alike, or use --force")

    limit = None if fail_on is None else fail_on / 100
    with _consistent(f"{before} or {after}"):
        report, tripped = compare_report(documents[0], documents[1], (str(before), str(after)), limit)
    output.emit(report, form)
    if tripped:
        output.say(f"regression: at least one row is significantly slower (more than {fail_on:g} %) or missing")
    return 5 if tripped else 0
