"""The command line: parse, call, print. No maths here, and no torch before a command needs a device."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import bgcbench
from bgcbench.errors import BgcbenchError, OutputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from bgcbench.experiments.profile import MeasureConfig, PlannedRow
    from bgcbench.experiments.profile_run import ProfileRun, Session, Subject, Update
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
    "device, and what it loses. Variants: standard (SC), gc (group convolution), shuffle (GC and a channel shuffle), "
    "lgc, flgc (learnt groups), tlgc (two-level), bgc (balanced group convolution of Lee, Park & Lee).",
    epilog="Start with: bgcbench profile --quick. Exit codes: 0 done, 1 some rows failed, 2 usage, 3 no such device, "
    "4 output not writable, 5 compare --fail-on, 130/143 interrupted (the file is valid and resumable).",
)

_WORKLOAD = "Workload"
_NETWORK = "A whole network (with --model)"
_GRID = "What is compared"
_MEASURE = "How it is measured"
_OUTPUT = "Output"

# Fields of a configuration that another option fills.
_OPTIONS = {"num_classes": "classes", "in_channels": "channels", "out_channels": "channels"}

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (a table on a terminal, Markdown elsewhere), table, markdown, csv, json.",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no notes on stderr.", rich_help_panel=_OUTPUT)]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        print(f"bgcbench {bgcbench.__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(short_help="Measure what convolution variants cost here.")
def profile(
    context: typer.Context,
    channels: Annotated[
        int | None,
        typer.Option(help="Channels in and out.", show_default="1024", rich_help_panel=_WORKLOAD),
    ] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Input channels.", show_default="--channels", rich_help_panel=_WORKLOAD)
    ] = None,
    out_channels: Annotated[
        int | None, typer.Option(help="Output channels.", show_default="--channels", rich_help_panel=_WORKLOAD)
    ] = None,
    kernel: Annotated[
        int | None,
        typer.Option(help="Kernel size; padded by (k - 1) // 2.", show_default="3", rich_help_panel=_WORKLOAD),
    ] = None,
    stride: Annotated[int | None, typer.Option(show_default="1", rich_help_panel=_WORKLOAD)] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images a call.", show_default="128; with --model 32", rich_help_panel=_WORKLOAD)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input height and width: 7 or 7x14.",
            show_default="7; the network's own with --model",
            rich_help_panel=_WORKLOAD,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="table4: the paper's Table 4 (also what no shape means).", rich_help_panel=_WORKLOAD),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A whole network instead of a layer: resnet50, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any "
            "classification network of torchvision, or timm/NAME.",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="Which of its convolutions: auto (what the paper replaces), 3x3, 1x1, all, none.",
            show_default="auto",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Replace these too (GLOB of module names; repeatable).", rich_help_panel=_NETWORK),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Keep these (GLOB; repeatable).", rich_help_panel=_NETWORK)
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also each distinct convolution by itself: where the time goes, and what would save some.",
            rich_help_panel=_NETWORK,
        ),
    ] = False,
    stem_stride: Annotated[
        int | None,
        typer.Option(
            help="Stride of the first convolution of efficientnet_* and mobilenet_v*.",
            show_default="2, and 1 up to 64 px",
            rich_help_panel=_NETWORK,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Classes.", show_default="1000; 10 for wrn and resnext29", rich_help_panel=_NETWORK),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8,16", rich_help_panel=_GRID)
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Variants, or all.", show_default="standard,gc,bgc", rich_help_panel=_GRID),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Form to run in: BGC two_conv, concat, dense; LGC and FLGC masked, deployed; all measures each.",
            show_default="auto",
            rich_help_panel=_GRID,
        ),
    ] = None,
    no_reference: Annotated[
        bool, typer.Option("--no-reference", help="Leave the standard convolution out.", rich_help_panel=_GRID)
    ] = False,
    skip_invalid: Annotated[
        bool,
        typer.Option(
            "--skip-invalid", help="Go on when N does not divide the channels; the row says so.", rich_help_panel=_GRID
        ),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:K.", show_default="auto", rich_help_panel=_MEASURE),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp64, fp32, tf32, bf16 or fp16.", show_default="fp32", rich_help_panel=_MEASURE),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="nchw, or nhwc (channels_last).", show_default="nchw", rich_help_panel=_MEASURE),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="Of fwd, bwd, fwd_bwd; with --model of fwd, train_step.",
            show_default="fwd,fwd_bwd",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    no_input_grad: Annotated[
        bool,
        typer.Option(
            "--no-input-grad", help="The backward pass leaves the input's gradient out.", rich_help_panel=_MEASURE
        ),
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="eager, compile (torch.compile) or graph (CUDA graphs).",
            show_default="eager",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="cold: overwrite the cache before every call. warm: do not.",
            show_default="cold on CUDA, warm on a CPU",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            help="Seconds of sampling a row; 6 rounds (CUDA: 10) are measured in any case.",
            show_default="10",
            rich_help_panel=_MEASURE,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="torch's", rich_help_panel=_MEASURE)
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default="0", rich_help_panel=_MEASURE)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in seconds: few samples, no claim.", rich_help_panel=_MEASURE)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            help="Result file; - is stdout (JSON).",
            show_default="results/profile-WHAT-DEVICE-TIME.json",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing --out file.", rich_help_panel=_OUTPUT)
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Continue this result file: keep what it holds, measure the rest. Its settings are used.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    form: Format = "auto",
    quiet: Quiet = False,
) -> int:
    """Measure what a convolution, or a network, and its cheaper variants cost on this device.

    Without a shape it is the paper's Table 4: 3x3, 1024 -> 1024 channels, 128 images of 7x7. Every row is interleaved
    with the standard convolution (the dense network), so that the ratios hold while the machine drifts.

    [bold]bgcbench profile --channels 1024 --groups 2,4,8,16[/bold]

    [bold]bgcbench profile --channels 256 --size 14 --precision bf16 --layout nhwc --variants all --quick[/bold]

    [bold]bgcbench profile --model resnet50 --groups 4 --batch 4 --layers --quick[/bold]
    """
    from bgcbench import results
    from bgcbench.interrupts import Interrupts

    shape = {
        "in_channels": in_channels if in_channels is not None else channels,
        "out_channels": out_channels if out_channels is not None else channels,
        "kernel": kernel,
        "stride": stride,
        "batch": batch,
    }
    if size is not None:
        shape["height"], shape["width"] = _size(size)
    network: dict[str, Any] = {
        "model": model,
        "where": where,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "layers": layers or None,
        "stem_stride": stem_stride,
        "num_classes": classes,
    }
    given: dict[str, Any] = {
        **shape,
        **network,
        "groups": _numbers("--groups", groups),
        "variants": _variants(variants),
        "algorithm": algorithm,
        "reference": False if no_reference else None,
        "skip_invalid": skip_invalid or None,
        "device": device,
        "precision": precision,
        "layout": layout,
        "phases": _names(phases),
        "input_grad": False if no_input_grad else None,
        "mode": mode,
        "cache": cache,
        "max_time_s": max_time,
        "threads": threads,
        "seed": seed,
        "quick": quick or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check_preset(preset, {"channels": channels, **shape, "model": model})
    _check_output(out, form, force=force, resume=resume)
    if no_reference and ((groups is not None and 1 in given["groups"]) or "standard" in (variants or "").split(",")):
        raise UsageError("--no-reference leaves the standard convolution out, and it is asked for; drop one of the two")
    stored = None if resume is None else results.read(resume)
    config = _fresh(given) if stored is None else _resumed(stored, given, str(resume))
    rows = _layer_plan(config)
    output = _Output(
        path=resume or (Path(out) if out not in (None, "-") else None),
        to_stdout=out == "-",
        replace=force or resume is not None,
        form="json" if out == "-" else form,
        quiet=quiet,
    )
    if output.path is not None and not dry_run:
        results.ResultWriter(output.path).probe(replace=output.replace)
    with Interrupts() as interrupts:
        from bgcbench.experiments.profile_run import open_session  # torch, and what needs it

        rows, subjects, notes = _full_plan(config, rows)
        session = open_session(config)
        session.warnings.extend(notes)
        if stored is not None:
            results.check_resumable(stored, "profile", session.settings, session.environment, str(resume))
        output = output.named(config, session)
        if not quiet:
            for line in (*session.warnings, *_plan_lines(config, rows, subjects, session, output.path)):
                _say(line)
        if dry_run:
            return 0
        document = stored or results.new_document(
            "profile",
            context.obj or [],
            config.to_json(),
            session.environment,
            session.settings,
            "quick" if config.quick else "full",
        )
        return _measure(config, session, rows, subjects, document, output, interrupts)


def _fresh(given: dict[str, Any]) -> MeasureConfig:
    """The configuration of a new run: of a network where --model is given, else of a layer."""
    from bgcbench.experiments.network import NetworkConfig
    from bgcbench.experiments.profile import ProfileConfig

    kind: type[MeasureConfig] = NetworkConfig if "model" in given else ProfileConfig
    for name in given:
        if name not in {field.name for field in dataclasses.fields(kind)}:
            why = (
                "describes a layer, and --model a network; leave one of them out"
                if "model" in given
                else "is for a network; name it with --model, or leave the option out"
            )
            raise UsageError(f"--{_OPTIONS.get(name, name).replace('_', '-')} {why}")
    return kind(**given)


def _layer_plan(config: MeasureConfig) -> list[PlannedRow]:
    """The rows of a layer's run, which need no torch to be planned; a network's are planned with it."""
    from bgcbench.experiments.profile import ProfileConfig, plan

    return plan(config) if isinstance(config, ProfileConfig) else []


def _full_plan(
    config: MeasureConfig, rows: list[PlannedRow]
) -> tuple[list[PlannedRow], Mapping[str, Subject], list[str]]:
    """Rows, what they measure by key, and what is to be said before; torch is there by now."""
    from bgcbench.experiments.network import NetworkConfig

    if isinstance(config, NetworkConfig):
        from bgcbench.experiments.network_run import plan_network

        planned = plan_network(config)
        return planned.rows, planned.subjects, planned.notes
    from bgcbench.experiments.profile_run import layer_subjects

    return rows, layer_subjects(config, rows), []


def _check_output(out: str | None, form: str, *, force: bool, resume: Path | None) -> None:
    """Refuse output options that contradict one another or would do nothing."""
    _check_format(form)
    if resume is not None and (out is not None or force):
        raise UsageError("--resume writes to the file it continues; leave --out and --force out")
    if force and out in (None, "-"):
        raise UsageError("--force replaces an existing --out file; name one with --out, or leave --force out")
    if out == "-" and form not in ("auto", "json"):
        raise UsageError(f"--out - prints JSON, not {form}; leave --format out, or write to a file")


def _resumed(stored: dict[str, Any], given: dict[str, Any], name: str) -> MeasureConfig:
    """The configuration that continues ``stored``: its own, with a grid that may have grown."""
    from bgcbench.experiments.network import NetworkConfig
    from bgcbench.experiments.profile import ProfileConfig, check_same_workload
    from bgcbench.results import check_command

    check_command(stored, "profile", name)
    kind: type[MeasureConfig] = NetworkConfig if "model" in stored.get("config", {}) else ProfileConfig
    base = kind.from_json(stored.get("config", {}))
    unknown = given.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        option = _OPTIONS.get(min(unknown), min(unknown)).replace("_", "-")
        raise UsageError(f"--{option} has no meaning for what {name} measures; leave it out")
    grown: dict[str, Any] = {
        grid: tuple(dict.fromkeys((*getattr(base, grid), *given[grid])))
        for grid in ("groups", "variants")
        if grid in given
    }
    config = dataclasses.replace(base, **{**given, **grown})
    check_same_workload(stored["config"], config, name)
    return config


@dataclasses.dataclass(frozen=True)
class _Output:
    """Where a result goes and how it is shown."""

    path: Path | None
    to_stdout: bool
    replace: bool
    form: str
    quiet: bool

    def named(self, config: MeasureConfig, session: Session) -> _Output:
        """This with a path of our own making where none was given; it needs the device's name."""
        from bgcbench.results import default_path

        if self.path is not None or self.to_stdout:
            return self
        device = session.environment["device"]
        name = "cpu" if device["type"] == "cpu" else device["name"]
        return dataclasses.replace(self, path=default_path("profile", config.what, name))


def _measure(
    config: MeasureConfig,
    session: Session,
    rows: list[PlannedRow],
    subjects: Mapping[str, Subject],
    document: dict[str, Any],
    output: _Output,
    interrupts: Interrupts,
) -> int:
    """Run ``rows`` into ``document``, saving as it grows; print it and return the exit code."""
    from bgcbench import results
    from bgcbench.experiments.profile_run import ProfileRun

    writer = None if output.path is None else results.ResultWriter(output.path)
    if writer is not None:
        writer.probe(replace=output.replace)
    if interrupts.requested():
        _say("interrupted before anything was measured; nothing was written")
        return interrupts.exit_code
    document["config"] = config.to_json()
    document["exit_reason"] = "running"
    # A resumed file may hold rows beyond the plan.
    planned = len({row.key for row in rows} | {row["key"] for row in document["results"]})
    run = ProfileRun(
        config,
        session,
        rows,
        subjects=subjects,
        kept={row["key"]: row for row in document["results"]},
        interleaved=document.get("interleaved", ()),
        stop=interrupts.requested,
    )
    failed: str | None = None
    try:
        _follow(run, document, writer, quiet=output.quiet)
    except Exception as error:
        failed = f"the run broke off: {type(error).__name__}: {error}"
        raise
    finally:
        results.finish(document, planned, interrupted=interrupts.requested(), failed=failed)
        if writer is not None:
            writer.write(document)
    _print_document(document, output.form)
    done = sum(row["status"] in results.DONE for row in document["results"])
    return _closing(writer, interrupts, done, planned, quiet=output.quiet)


def _closing(writer: ResultWriter | None, interrupts: Interrupts, done: int, planned: int, *, quiet: bool) -> int:
    """The last line on stderr, and the exit code."""
    where = "" if writer is None else f" to {writer.path}"
    if writer is not None and writer.problem is not None:
        kept = f"the result was rescued to {writer.rescued_to}" if writer.rescued_to else "only stdout has the result"
        _say(f"bgcbench: {writer.path} could not be written ({writer.problem}); {kept}")
        return OutputError.exit_code
    if interrupts.requested():
        again = "" if writer is None else f"; resume with --resume {writer.path}"
        _say(f"saved {done}/{planned}{where}{again}")
        return interrupts.exit_code
    if not quiet:
        _say(f"saved {done}/{planned}{where}" if where else f"measured {done}/{planned}")
    return 0 if done == planned else BgcbenchError.exit_code


def _follow(run: ProfileRun, document: dict[str, Any], writer: ResultWriter | None, *, quiet: bool) -> None:
    """Drive the run, its document and its file kept up to date, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    updates = _saved(run, document, writer)
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        for _ in updates:
            pass
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=16), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")
        for update in updates:
            bar.update(task, **_bar_state(update))


def _saved(run: ProfileRun, document: dict[str, Any], writer: ResultWriter | None) -> Iterator[Update]:
    """The run's updates, each that is worth saving already in the document and on the disk."""
    earlier = [warning for warning in document["warnings"] if warning not in run.warnings]  # of a resumed file
    for update in run.run():
        if update.save:
            document["results"] = update.rows
            document["ceilings"] = update.ceilings or document.get("ceilings")
            document["interleaved"] = update.interleaved
            document["warnings"] = earlier + update.warnings
            if writer is not None:
                writer.write(document)
        yield update


def _bar_state(update: Update) -> dict[str, Any]:
    """What the bar shows: the row, its current median and the time left."""
    progress = update.progress
    if progress is None:
        return {"description": update.doing, "total": None, "left": ""}
    text = update.doing
    if progress.track is not None:
        text += f"  {progress.track.label}"
        if progress.track.samples:
            text += f"  median {progress.track.summary().median_s * 1e3:.3f} ms"
    if progress.left_s is None:
        return {"description": text, "total": None, "left": ""}
    left = f"at most {progress.left_s:.0f} s left"
    return {
        "description": text,
        "total": progress.elapsed_s + progress.left_s,
        "completed": progress.elapsed_s,
        "left": left,
    }


def _plan_lines(
    config: MeasureConfig,
    rows: list[PlannedRow],
    subjects: Mapping[str, Subject],
    session: Session,
    path: Path | None,
) -> list[str]:
    """What will be measured, where it goes and how long it may take."""
    from bgcbench.experiments.profile import estimated_seconds

    threads = session.environment["cpu"]["threads"]
    flops = [[subject.work(phase).flops for phase in subject.phases] for subject in subjects.values()]
    minutes = estimated_seconds(config, flops, session.device.type, threads) / 60
    lines = [
        f"plan: {len(subjects)} rows x {', '.join(config.phases)} on {session.environment['device']['name']}, "
        f"{config.precision}, {config.layout}, {config.mode}; roughly {minutes:.1f} min"
    ]
    lines += [f"  {row.key}" + (f"  invalid: {row.invalid}" if row.invalid else "") for row in rows]
    return [*lines, f"result file: {path}" if path else "result: stdout"]


@app.command(short_help="Print a result file again, or Table 1.")
def show(
    file: Annotated[Path | None, typer.Argument(help="A result file.")] = None,
    table1: Annotated[
        bool, typer.Option("--table1", help="The paper's Table 1 evaluated, for FILE's layer or the one given here.")
    ] = False,
    channels: Annotated[int | None, typer.Option(help="Channels in and out.", show_default="1024")] = None,
    in_channels: Annotated[int | None, typer.Option(help="Input channels.", show_default="--channels")] = None,
    out_channels: Annotated[int | None, typer.Option(help="Output channels.", show_default="--channels")] = None,
    kernel: Annotated[int | None, typer.Option(help="Kernel size.", show_default="3")] = None,
    size: Annotated[str | None, typer.Option(help="Input height and width.", show_default="7")] = None,
    groups: Annotated[str | None, typer.Option(help="Group counts N.", show_default="2,4,8,16")] = None,
    form: Format = "auto",
) -> int:
    """Print a result file again, or Table 1 for any layer. Measures nothing.

    [bold]bgcbench show results/FILE.json --format markdown[/bold]

    [bold]bgcbench show --table1 --channels 256 --groups 2,4,8[/bold]
    """
    from bgcbench import results
    from bgcbench.experiments.profile import ProfileConfig

    _check_format(form)
    shape = {"channels": channels, "in-channels": in_channels, "out-channels": out_channels, "kernel": kernel,
             "size": size, "groups": groups}  # fmt: skip
    given = [f"--{name}" for name, value in shape.items() if value is not None]
    if given and (file is not None or not table1):
        raise UsageError(f"{given[0]} describes a layer for --table1 without FILE; drop it, or use show --table1")
    if file is None and not table1:
        raise UsageError("show needs a result FILE, or --table1 with a layer such as --channels 1024")
    document = results.read(file) if file is not None else None
    if document is not None and not table1:
        _print_document(document, form)
        return 0
    if document is not None and "model" in document.get("config", {}):
        raise UsageError(f"{file} measured a network; --table1 is for one layer, such as --channels 1024")
    if document is not None:
        config = ProfileConfig.from_json(document.get("config", {}))
        measurable = {row["params"]["groups"] for row in document["results"] if row["status"] != "invalid"}
        config = dataclasses.replace(config, groups=tuple(sorted(measurable)))
    else:
        options: dict[str, Any] = {
            "in_channels": in_channels if in_channels is not None else channels,
            "out_channels": out_channels if out_channels is not None else channels,
            "kernel": kernel,
            "groups": _numbers("--groups", groups),
        }
        if size is not None:
            options["height"], options["width"] = _size(size)
        config = dataclasses.replace(ProfileConfig(), **{k: v for k, v in options.items() if v is not None})
    from bgcbench.report import table1_report

    _emit(
        table1_report(
            config.in_channels, config.out_channels, config.kernel, (config.height, config.width), config.groups
        ),
        form,
    )
    return 0


@app.command(short_help="Print what could spoil a measurement here.")
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:K.")] = "auto", form: Format = "auto"
) -> int:
    """Print this machine's environment and what on it could spoil a measurement."""
    from bgcbench.experiments.profile import ProfileConfig

    _check_format(form)
    ProfileConfig(device=device)  # the name is checked before torch is imported
    from bgcbench.measure.device import resolve_device
    from bgcbench.measure.environment import describe_environment, diagnose
    from bgcbench.report import doctor_report

    found, warning = resolve_device(device)
    findings = diagnose(found)
    if warning:
        findings.insert(0, ("device search", warning, "pass --device cpu to say so yourself"))
    _emit(doctor_report(describe_environment(found), findings), form)
    return 0


@app.command(short_help="Compare two profile files.")
def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A later result file.")],
    fail_on: Annotated[
        float | None,
        typer.Option(help="Exit with 5 if a row is slower by more than this percentage beyond doubt, or is gone."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare files measured with different settings.")] = False,
    form: Format = "auto",
) -> int:
    """Compare two profile files row by row, with confidence intervals.

    [bold]bgcbench compare before.json after.json --fail-on 3[/bold]
    """
    from bgcbench import results

    _check_format(form)
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

    report, tripped = compare_report(
        documents[0], documents[1], (str(before), str(after)), None if fail_on is None else fail_on / 100
    )
    _emit(report, form)
    if tripped:
        _say(f"a row is slower by more than {fail_on} % beyond doubt, or is no longer measured")
    return 5 if tripped else 0


# ------------------------------------------------------------------------------------------------------------ helpers


def _check_format(form: str) -> None:
    from bgcbench.specs import FORMATS, check_choice

    check_choice("format", form, FORMATS)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """'2,4,8' as numbers; raises UsageError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text} must be whole numbers separated by commas, such as 2,4,8") from None
    return tuple(dict.fromkeys(values))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _variants(text: str | None) -> tuple[str, ...] | None:
    from bgcbench.specs import VARIANTS

    return tuple(VARIANTS) if text == "all" else _names(text)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(re.fullmatch("[0-9]+", part) for part in parts):
        raise UsageError(f"--size {text} must be a number of pixels or HEIGHTxWIDTH, such as 7 or 7x14")
    return int(parts[0]), int(parts[-1])


def _check_preset(preset: str | None, shape: dict[str, Any]) -> None:
    from bgcbench.specs import check_choice

    if preset is None:
        return
    check_choice("preset", preset, ("table4",))
    fixed = [name.replace("_", "-") for name, value in shape.items() if value is not None]
    if fixed:
        how = "takes another workload" if fixed[0] == "model" else "changes it"
        raise UsageError(f"--preset {preset} fixes the layer, and --{fixed[0]} {how}; leave one of them out")


def _print_document(document: dict[str, Any], form: str) -> None:
    from bgcbench.report import document_report

    _emit(document_report(document), form, document)


def _emit(report: Report, form: str, document: dict[str, Any] | None = None) -> None:
    from bgcbench.report import emit

    emit(report, form, _stdout(report), document)


def _stdout(report: Report) -> Console:
    """stdout; where it is no terminal a table gets the width it needs instead of rich's 80 columns."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=max(80, sum(column.width + 2 for column in report.columns)))
    return console


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; a mistake of the user's is one line on stderr."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = app(args=words, obj=words, prog_name="bgcbench", standalone_mode=False)
    except BgcbenchError as error:
        _say(f"bgcbench: {error}")
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe has gone; whatever is in a file is in a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        _say("bgcbench: interrupted")
        return 130
    except Exception as error:
        # Typer's own usage errors; their class lives in different modules in different versions.
        if not hasattr(error, "format_message"):
            raise
        message = " ".join(str(error.format_message()).split())
        message += _value_given(message, words)
        _say(f"bgcbench: {message} (see bgcbench {' '.join(_command_path(error))}--help)")
        return UsageError.exit_code
    return int(code or 0)


def _value_given(message: str, argv: Sequence[str]) -> str:
    """The value of the option that ``message`` calls invalid; Typer's message leaves it out."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in itertools.pairwise(words):
        if message.startswith("Invalid value") and f"'{option}'" in message and f"'{value}'" not in message:
            return f", not '{value}'"
    return ""


def _command_path(error: Exception) -> list[str]:
    context = getattr(error, "ctx", None)
    path = str(getattr(context, "command_path", "bgcbench")).split()[1:]
    return [*path, ""] if path else []


def run() -> None:
    """Console script."""
    raise SystemExit(main())
