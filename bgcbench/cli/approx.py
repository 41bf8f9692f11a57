"""``bgcbench approx``: how well variants can stand in for standard convolutions."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
    Interpolation,
    Mean,
    Out,
    Output,
    Plot,
    Quiet,
    Resize,
    Resume,
    Seed,
    SkipInvalid,
    Std,
    StemStride,
    Threads,
    WeightsKey,
    Where,
    app,
)
from bgcbench.errors import UsageError

if TYPE_CHECKING:
    from bgcbench.experiments.approx import ApproxConfig
    from bgcbench.experiments.approx_network import ApproxNetworkConfig
    from bgcbench.experiments.approx_network_run import ApproxNetworkRun
    from bgcbench.experiments.approx_run import ApproxRun
    from bgcbench.experiments.session import Session
    from bgcbench.interrupts import Interrupts
    from bgcbench.results import ResultWriter


@app.command(short_help="How well variants can stand in for standard convolutions.")
def approx(
    context: typer.Context,
    channels: Annotated[
        int | None, typer.Option(help="Channels in and out.", show_default="256", rich_help_panel=WORKLOAD)
    ] = None,
    in_channels: Annotated[
        int | None, typer.Option(help="Input channels.", show_default="--channels", rich_help_panel=WORKLOAD)
    ] = None,
    out_channels: Annotated[
        int | None, typer.Option(help="Output channels.", show_default="--channels", rich_help_panel=WORKLOAD)
    ] = None,
    kernel: Annotated[
        int | None,
        typer.Option(
            help="Kernel size of an axis; padded by (k - 1) // 2.", show_default="3", rich_help_panel=WORKLOAD
        ),
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="1-D or 2-D convolutions.", show_default="1", rich_help_panel=WORKLOAD)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Input length of an axis.", show_default="32", rich_help_panel=WORKLOAD)
    ] = None,
    stride: Annotated[int | None, typer.Option(show_default="1", rich_help_panel=WORKLOAD)] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="Laws of the input: normal, uniform, normal:MU (a mean), relu (rectified normal), factor:RHO (a "
            "factor common to all channels, with that share of the variance).",
            show_default="normal,uniform",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="S: convolutions, and inputs.", show_default="1000", rich_help_panel=WORKLOAD),
    ] = None,
    search_samples: Annotated[
        int | None,
        typer.Option(
            help="Of the convolutions, how many tlgc, flgc and lgc are solved for, each by itself.",
            show_default="4",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="figure1, figure2: section 5.1 of the paper (also what no shape means), with that picture.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Ask every convolution of this network, on its own activations: resnet50, wrn_28_10, any "
            "classification network of torchvision, or timm/NAME.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A file, default (torchvision's published ones) or none (untrained).",
            show_default="default where there are any",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images to run through it: digits, or a folder of images.", rich_help_panel=NETWORK),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            help="How many of them; one in four is held out to judge.", show_default="256", rich_help_panel=NETWORK
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Their height and width: 224 or 224x160.",
            show_default="the network's own; 16 for digits and small networks",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            help="Classes of the network.", show_default="1000; 10 for wrn and resnext29", rich_help_panel=NETWORK
        ),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    weights_key: WeightsKey = None,
    stem_stride: StemStride = None,
    where: Where = None,
    include: Include = None,
    exclude: Exclude = None,
    batch: Annotated[
        int | None, typer.Option(help="Images at a time.", show_default="32", rich_help_panel=NETWORK)
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="GiB that the second moments may take; more layers than fit are done in several runs over the images.",
            show_default="4",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Group counts N.", show_default="4,8,16,32,64; with --model 2,4,8,16", rich_help_panel=GRID),
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Variants, or all.", show_default="gc,bgc", rich_help_panel=GRID)
    ] = None,
    skip_invalid: SkipInvalid = False,
    device: Device = None,
    precision: Annotated[
        str | None, typer.Option(help="fp64 or fp32; with --model fp64.", show_default="fp64", rich_help_panel=MEASURE)
    ] = None,
    threads: Threads = None,
    seed: Seed = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A look: 64 samples, or 32 images. No claim.", rich_help_panel=MEASURE),
    ] = False,
    dry_run: DryRun = False,
    plot: Plot = None,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
    form: Format = "auto",
    quiet: Quiet = False,
) -> int:
    """How well a variant can stand in for standard convolutions: exactly, beside the paper's bounds.

    Without a shape it is section 5.1 of the paper: 1-D convolutions, 256 -> 256 channels, He initialisation, the least
    error over the variant's own weights (5.1). With --model every convolution of a network is asked on the activations
    that it really sees, with copied, white-optimal and calibrated weights.

    [bold]bgcbench approx --plot figures.png[/bold]

    [bold]bgcbench approx --variants all --channels 64 --groups 2,4,8 --input normal,relu,factor:0.5[/bold]

    [bold]bgcbench approx --model resnet50 --data path/to/images --plot heatmap.png[/bold]
    """
    options = dict(locals())  # by the names of the parameters
    given: dict[str, Any] = {
        **common.images(options),
        "in_channels": in_channels if in_channels is not None else channels,
        "out_channels": out_channels if out_channels is not None else channels,
        "kernel": kernel,
        "dims": dims,
        "length": length,
        "stride": stride,
        "inputs": common.names(inputs),
        "samples": samples,
        "search_samples": search_samples,
        "model": model,
        "weights": weights,
        "data": data,
        "calibration_images": calibration_images,
        "num_classes": classes,
        "stem_stride": stem_stride,
        "where": where,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "batch": batch,
        "memory_gib": memory,
        "groups": common.numbers("--groups", groups),
        "variants": common.variants(variants),
        "skip_invalid": skip_invalid or None,
        "device": device,
        "precision": precision,
        "threads": threads,
        "seed": seed,
        "quick": quick or None,
    }
    if size is not None:
        given["height"], given["width"] = common.size(size)
    given = {name: value for name, value in given.items() if value is not None}
    _check_preset(preset, given)
    _check_files(given)
    output = Output.asked(out, form, force=force, resume=resume, quiet=quiet, plot=plot)
    stored = output.stored()
    config = _configuration(given, stored, str(resume))
    output.probe(dry_run=dry_run)
    return _run(context, config, stored, output, preset=preset, dry_run=dry_run)


def _check_files(given: dict[str, Any]) -> None:
    """Refuse files and folders that are not there before torch is imported; what is in them is seen later."""
    from bgcbench.specs import DATA_SETS, WEIGHTS

    data, weights = given.get("data"), given.get("weights")
    if data is not None and data not in DATA_SETS and os.path.dirname(data) and not os.path.exists(data):
        raise UsageError(f"--data {data} is not there; give {', '.join(DATA_SETS)}, or a folder of images")
    if weights is not None and weights not in WEIGHTS and os.path.dirname(weights) and not os.path.exists(weights):
        raise UsageError(f"--weights {weights}: there is no such file; choose a file, {' or '.join(WEIGHTS)}")


def _check_preset(preset: str | None, given: dict[str, Any]) -> None:
    from bgcbench.cli.settings import option
    from bgcbench.experiments.approx import PRESETS
    from bgcbench.specs import check_choice

    if preset is None:
        return
    check_choice("preset", preset, PRESETS)
    free = {"samples", "device", "threads", "seed", "quick", "length"}  # what the paper does not state
    if fixed := [name for name in given if name not in free]:
        raise UsageError(
            f"--preset {preset} fixes the experiment, and {option(fixed[0])} changes it; leave one of them out"
        )


def _configuration(
    given: dict[str, Any], stored: dict[str, Any] | None, name: str
) -> ApproxConfig | ApproxNetworkConfig:
    """What to compute: as asked, or what file ``name`` holds with what is asked for added."""
    from bgcbench.cli.settings import fresh, resumed
    from bgcbench.experiments.approx import ApproxConfig
    from bgcbench.experiments.approx_network import ApproxNetworkConfig
    from bgcbench.experiments.config import RunConfig

    kinds: tuple[type[RunConfig], type[RunConfig]] = ApproxConfig, ApproxNetworkConfig
    config = fresh(given, *kinds) if stored is None else resumed(stored, given, name, "approx", *kinds)
    if isinstance(config, ApproxConfig):
        from bgcbench.experiments.approx import plan

        plan(config)  # what is wrong with it is said before torch is imported
        return config
    if not isinstance(config, ApproxNetworkConfig):
        raise TypeError(f"{type(config).__name__} is no configuration of approx")
    return config


def _run(
    context: typer.Context,
    config: ApproxConfig | ApproxNetworkConfig,
    stored: dict[str, Any] | None,
    output: Output,
    *,
    preset: str | None,
    dry_run: bool,
) -> int:
    from bgcbench import results
    from bgcbench.interrupts import Interrupts

    with Interrupts() as interrupts:
        from bgcbench.experiments.approx_run import open_session  # torch, and what needs it

        session = open_session(config)
        kept = {row["key"]: row for row in (stored or {}).get("results", ())}
        run, keys, facts, lines = _prepared(config, session, kept, interrupts)
        if stored is not None:
            results.check_resumable(stored, "approx", session.settings, session.environment, str(output.path))
        output = output.named("approx", config.what, session.environment)
        if not output.quiet:
            for line in (*run.warnings, *lines, output.destination):
                common.say(line)
        if dry_run:
            return 0
        config = run.config  # with the network's own size
        with output.claimed(stored, interrupts) as writer:
            document = {**common.document_of("approx", context, config, session, stored), **facts}
            code = common.carried_out(
                lambda: common.follow(_saved(run, document, writer), quiet=output.quiet),
                lambda: _take(run, document),
                document,
                keys,
                output,
                writer,
                interrupts,
            )
        if output.plot is not None and document["results"]:
            common.draw(document, output.plot, preset)
            if not output.quiet:
                common.say(f"drawn to {output.plot}")
        return code


def _prepared(
    config: ApproxConfig | ApproxNetworkConfig,
    session: Session,
    kept: dict[str, Any],
    interrupts: Interrupts,
) -> tuple[ApproxRun | ApproxNetworkRun, list[str], dict[str, Any], list[str]]:
    """The run, the keys of its rows, what the file says of the whole, and the plan in words."""
    from bgcbench.experiments.approx import ApproxConfig, plan
    from bgcbench.experiments.approx_run import ApproxRun

    if isinstance(config, ApproxConfig):
        rows = plan(config)
        run = ApproxRun(config, session, rows, kept=kept, stop=interrupts.requested)
        lines = [f"plan: {len(rows)} rows, {config.samples} convolutions and inputs ({config.rows_of_data} positions)"]
        lines += [f"  {row.key}" + (f"  invalid: {row.invalid}" if row.invalid else "") for row in rows]
        return run, [row.key for row in rows], {}, lines
    from bgcbench.experiments.approx_network_run import ApproxNetworkRun, prepare

    prepared = prepare(config)
    session.settings |= prepared.settings
    network_run = ApproxNetworkRun(prepared, session, kept=kept, stop=interrupts.requested)
    layers = prepared.layers.chosen
    lines = [
        f"plan: {len(layers)} convolutions of {config.model} (weights: {prepared.loaded.name}) x {len(config.cells)}, "
        f"{min(config.images, len(prepared.images))} images of {prepared.images.name}; moments of up to "
        f"{prepared.moment_bytes / 2**30:.2g} GiB at once, {prepared.portions} run"
        f"{'s' * (prepared.portions > 1)} over the images",
        *prepared.told,
    ]
    lines += [f"  {layer.name}: {layer.in_channels} -> {layer.out_channels}" for layer in layers]
    lines += [f"  kept: {kept.name} ({kept.reason})" for kept in prepared.layers.kept]
    return network_run, network_run.keys, {"network": prepared.facts}, lines


def _saved(
    run: ApproxRun | ApproxNetworkRun, document: dict[str, Any], writer: ResultWriter | None
) -> Iterator[tuple[str, float | None]]:
    """What the run is at, each new row being already in the document and on the disk."""
    for step in run.run():
        if step.rows is not None:
            _take(run, document)
            if writer is not None:
                writer.write(document)
        yield step.doing, step.done


def _take(run: ApproxRun | ApproxNetworkRun, document: dict[str, Any]) -> None:
    """What the run has found so far, into the document."""
    from bgcbench.experiments.approx_run import ApproxRun, fits

    document["results"] = run.results
    document["warnings"] = list(dict.fromkeys((*document["warnings"], *run.warnings)))
    if isinstance(run, ApproxRun):
        document["fits"] = fits(run.results)
