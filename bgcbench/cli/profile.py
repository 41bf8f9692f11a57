"""``bgcbench profile``: what convolution variants cost on this device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgcbench.cli import common
from bgcbench.cli.common import (
    GRID,
    MEASURE,
    NETWORK,
    WORKLOAD,
    Device,
    DryRun,
    Exclude,
    Force,
    Format,
    Include,
    NoReference,
    Out,
    Output,
    Quiet,
    Resume,
    Seed,
    SkipInvalid,
    StemStride,
    Threads,
    Where,
    app,
)
from bgcbench.errors import UsageError

if TYPE_CHECKING:
    from bgcbench.experiments.profile import MeasureConfig, PlannedRow
    from bgcbench.experiments.profile_run import ProfileRun, ProfileSession, Subject, Update
    from bgcbench.results import ResultWriter


@app.command(short_help="Measure what convolution variants cost here.")
def profile(
    context: typer.Context,
    channels: Annotated[
        int | None,
        typer.Option(help="Channels in and out.", show_default="1024", rich_help_panel=WORKLOAD),
    ] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Input channels.", show_default="--channels", rich_help_panel=WORKLOAD)
    ] = None,
    out_channels: Annotated[
        int | None, typer.Option(help="Output channels.", show_default="--channels", rich_help_panel=WORKLOAD)
    ] = None,
    kernel: Annotated[
        int | None,
        typer.Option(help="Kernel size; padded by (k - 1) // 2.", show_default="3", rich_help_panel=WORKLOAD),
    ] = None,
    stride: Annotated[int | None, typer.Option(show_default="1", rich_help_panel=WORKLOAD)] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images a call.", show_default="128; with --model 32", rich_help_panel=WORKLOAD)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Input height and width: 7 or 7x14.",
            show_default="7; the network's own with --model",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="table4: the paper's Table 4 (also what no shape means).", rich_help_panel=WORKLOAD),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A whole network instead of a layer: resnet50, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any "
            "classification network of torchvision, or timm/NAME.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    where: Where = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also each distinct convolution by itself: where the time goes, and what would save some.",
            rich_help_panel=NETWORK,
        ),
    ] = False,
    stem_stride: StemStride = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Classes.", show_default="1000; 10 for wrn and resnext29", rich_help_panel=NETWORK),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8,16", rich_help_panel=GRID)
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Variants, or all.", show_default="standard,gc,bgc", rich_help_panel=GRID),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Form to run in: BGC two_conv, concat, dense, split, matmul (1x1), triton (CUDA), or auto, the "
            "fastest; GC triton; LGC, FLGC masked, deployed; all measures each.",
            show_default="auto",
            rich_help_panel=GRID,
        ),
    ] = None,
    no_reference: NoReference = False,
    skip_invalid: SkipInvalid = False,
    device: Device = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp64, fp32, tf32, bf16 or fp16.", show_default="fp32", rich_help_panel=MEASURE),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="nchw, or nhwc (channels_last).", show_default="nchw", rich_help_panel=MEASURE),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            help="Of fwd, bwd, fwd_bwd; with --model of fwd, train_step.",
            show_default="fwd,fwd_bwd",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    no_input_grad: Annotated[
        bool,
        typer.Option(
            "--no-input-grad", help="The backward pass leaves the input's gradient out.", rich_help_panel=MEASURE
        ),
    ] = False,
    mode: Annotated[
        str | None,
        typer.Option(
            help="eager, compile (torch.compile) or graph (CUDA graphs).",
            show_default="eager",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="cold: overwrite the cache before every call. warm: do not.",
            show_default="cold on CUDA, warm on a CPU",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="kept: a CPU's tensors reuse freed memory, as most of a whole network's do. fresh: all of it comes "
            "anew from the system at each call, as in a script of one layer.",
            show_default="kept",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(
            help="Seconds of sampling a row; 6 rounds (CUDA: 10) are measured in any case.",
            show_default="10",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    threads: Threads = None,
    seed: Seed = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in seconds: few samples, no claim.", rich_help_panel=MEASURE)
    ] = False,
    dry_run: DryRun = False,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
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
        shape["height"], shape["width"] = common.size(size)
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
        "groups": common.numbers("--groups", groups),
        "variants": common.variants(variants),
        "algorithm": algorithm,
        "reference": False if no_reference else None,
        "skip_invalid": skip_invalid or None,
        "device": device,
        "precision": precision,
        "layout": layout,
        "phases": common.names(phases),
        "input_grad": False if no_input_grad else None,
        "mode": mode,
        "cache": cache,
        "memory": memory,
        "max_time_s": max_time,
        "threads": threads,
        "seed": seed,
        "quick": quick or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    _check_preset(preset, {"channels": channels, **shape, "model": model})
    output = Output.asked(out, form, force=force, resume=resume, quiet=quiet)
    if no_reference and ((groups is not None and 1 in given["groups"]) or "standard" in (variants or "").split(",")):
        raise UsageError("--no-reference leaves the standard convolution out, and it is asked for; drop one of the two")
    stored = output.stored()
    config = _configuration(given, stored, str(resume))
    rows = _layer_plan(config)
    output.probe(dry_run=dry_run)
    with Interrupts() as interrupts:
        from bgcbench.experiments.profile_run import ProfileRun, open_session  # torch, and what needs it

        config, rows, subjects, notes = _full_plan(config, rows)
        session = open_session(config)
        session.warnings.extend(notes)
        if stored is not None:
            results.check_resumable(stored, "profile", session.settings, session.environment, str(resume))
        output = output.named("profile", config.what, session.environment)
        if not quiet:
            for line in (*session.warnings, *_plan_lines(config, rows, subjects, session, output.path)):
                common.say(line)
        if dry_run:
            return 0
        with output.claimed(stored, interrupts) as writer:
            if interrupts.requested():
                common.say("interrupted before anything was measured; nothing was written")
                return interrupts.exit_code
            document = common.document_of("profile", context, config, session, stored)
            run = ProfileRun(
                config,
                session,
                rows,
                subjects=subjects,
                kept={row["key"]: row for row in document["results"]},
                interleaved=document.get("interleaved", ()),
                stop=interrupts.requested,
            )
            return common.carried_out(
                lambda: _follow(_saved(run, document, writer), quiet=output.quiet),
                lambda: None,  # each update that is worth it has been taken already
                document,
                [row.key for row in rows],
                output,
                writer,
                interrupts,
            )


def _check_preset(preset: str | None, shape: dict[str, Any]) -> None:
    from bgcbench.specs import check_choice

    if preset is None:
        return
    check_choice("preset", preset, ("table4",))
    fixed = [name.replace("_", "-") for name, value in shape.items() if value is not None]
    if fixed:
        how = "takes another workload" if fixed[0] == "model" else "changes it"
        raise UsageError(f"--preset {preset} fixes the layer, and --{fixed[0]} {how}; leave one of them out")


def _configuration(given: dict[str, Any], stored: dict[str, Any] | None, name: str) -> MeasureConfig:
    """What to measure: as asked, or what file ``name`` holds with what is asked for added."""
    from bgcbench.cli.settings import fresh, resumed
    from bgcbench.experiments.network import NetworkConfig
    from bgcbench.experiments.profile import ProfileConfig

    layer: type[MeasureConfig] = ProfileConfig
    if stored is None:
        return fresh(given, layer, NetworkConfig)
    return resumed(stored, given, name, "profile", layer, NetworkConfig)


def _layer_plan(config: MeasureConfig) -> list[PlannedRow]:
    """The rows of a layer's run, which need no torch to be planned; a network's are planned with it."""
    from bgcbench.experiments.profile import ProfileConfig, plan

    return plan(config) if isinstance(config, ProfileConfig) else []


def _full_plan(
    config: MeasureConfig, rows: list[PlannedRow]
) -> tuple[MeasureConfig, list[PlannedRow], Mapping[str, Subject], list[str]]:
    """The configuration, rows, what they measure by key, and what is to be said before; torch is there by now."""
    from bgcbench.experiments.network import NetworkConfig

    if isinstance(config, NetworkConfig):
        from bgcbench.experiments.network_run import plan_network

        planned = plan_network(config)
        return planned.config, planned.rows, planned.subjects, planned.notes
    from bgcbench.experiments.profile_run import layer_subjects

    return config, rows, layer_subjects(config, rows), []


def _follow(updates: Iterator[Update], *, quiet: bool) -> None:
    """Go through the run with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        for _ in updates:
            pass
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=16), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None, left="")
        for update in updates:
            bar.update(task, **_bar_state(update))


def _saved(run: ProfileRun, document: dict[str, Any], writer: ResultWriter | None) -> Iterator[Update]:
    """The run's updates, each that is worth saving already in the document and on the disk."""
    for update in run.run():
        if update.save:
            document["results"] = update.rows
            document["ceilings"] = update.ceilings or document.get("ceilings")
            document["interleaved"] = update.interleaved
            document["warnings"] = list(dict.fromkeys((*document["warnings"], *update.warnings)))
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
    session: ProfileSession,
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
