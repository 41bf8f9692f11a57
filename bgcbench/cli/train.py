"""``bgcbench train``: the same network with each variant, trained alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgcbench.cli import common
from bgcbench.cli.common import (
    GRID,
    MEASURE,
    NETWORK,
    OUTPUT,
    WORKLOAD,
    Device,
    Exclude,
    Force,
    Format,
    Include,
    NoReference,
    Out,
    Output,
    Plot,
    Quiet,
    SkipInvalid,
    StemStride,
    Threads,
    Where,
    app,
)
from bgcbench.errors import OutputError, ResultFileError, UsageError
from bgcbench.training.launcher import own_rank, processes

if TYPE_CHECKING:
    from bgcbench.experiments.train import TrainConfig
    from bgcbench.experiments.train_run import TrainRun, Update
    from bgcbench.interrupts import Interrupts
    from bgcbench.results import ResultWriter

RECIPE = "Recipe (each replaces the recipe's own)"


@app.command(short_help="Train a network with each variant, and compare errors.")
def train(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="wrn_10_2, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any classification network of torchvision, or "
            "timm/NAME.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits (extra: digits), cifar10, imagenet, folder, synthetic (speed only), or the path of a folder "
            "with train/ and val/.",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    data_dir: Annotated[
        list[Path] | None,
        typer.Option(help="Where it is looked for (repeatable).", envvar="BGCBENCH_DATA_DIR", rich_help_panel=WORKLOAD),
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download CIFAR-10 into --data-dir first.", rich_help_panel=WORKLOAD)
    ] = False,
    subset: Annotated[
        int | None,
        typer.Option(help="Train on so many images, all classes alike.", show_default="all", rich_help_panel=WORKLOAD),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width of the images: 224 or 224x160.",
            show_default="the data's: 16 for digits, 32 for cifar10; else the network's",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="table5 (CIFAR-10) or table6 (ImageNet): the paper's grid.", rich_help_panel=WORKLOAD),
    ] = None,
    where: Where = None,
    include: Include = None,
    exclude: Exclude = None,
    stem_stride: StemStride = None,
    classes: Annotated[
        int | None,
        typer.Option(help="Classes of synthetic data.", show_default="the data's", rich_help_panel=NETWORK),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Variants, or all.", show_default="standard,gc,bgc", rich_help_panel=GRID),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8", rich_help_panel=GRID)
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Each row is trained once a seed: 0,1,2 gives mean and standard deviation.",
            show_default="0",
            rich_help_panel=GRID,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same for one seed.", show_default="0", rich_help_panel=GRID)
    ] = None,
    no_reference: NoReference = False,
    skip_invalid: SkipInvalid = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="digits (20 epochs, one cycle), paper (section 5.2), fast (that in bf16, channels_last, compiled).",
            show_default="digits for digits, else paper",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(show_default="20; paper 200, ImageNet 90", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images a step, over all processes.", show_default="64; paper 128", rich_help_panel=RECIPE),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="0.1", rich_help_panel=RECIPE)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="multistep, onecycle, cosine or constant.",
            show_default="onecycle; paper multistep",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    milestones: Annotated[
        str | None,
        typer.Option(
            help="Epochs after which the learning rate drops; scaled with --epochs where not given.",
            show_default="60,120,160; ImageNet 30,60",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Factor of each drop.", show_default="0.1", rich_help_panel=RECIPE)
    ] = None,
    momentum: Annotated[float | None, typer.Option(show_default="0.9", rich_help_panel=RECIPE)] = None,
    nesterov: Annotated[
        bool | None, typer.Option("--nesterov/--no-nesterov", show_default="on", rich_help_panel=RECIPE)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(show_default="5e-4; ImageNet 1e-4", rich_help_panel=RECIPE)
    ] = None,
    label_smoothing: Annotated[float | None, typer.Option(show_default="0", rich_help_panel=RECIPE)] = None,
    group_lasso: Annotated[
        float | None,
        typer.Option(help="Strength of LGC's group lasso.", show_default="0", rich_help_panel=RECIPE),
    ] = None,
    pad: Annotated[
        int | None,
        typer.Option(
            help="Zeros around an image, in px, that crops are taken from.",
            show_default="digits 2, cifar10 4",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip", help="Mirror half of them.", show_default="not digits", rich_help_panel=RECIPE
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, tf32, fp64; bf16 and fp16 are autocast.", show_default="fp32; fast bf16", rich_help_panel=RECIPE
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="nchw, or nhwc (channels_last).", show_default="nchw; fast nhwc", rich_help_panel=RECIPE),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile.", show_default="fast only", rich_help_panel=RECIPE),
    ] = None,
    device: Device = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            help="Parts that a batch goes through the network in, for little memory.",
            show_default="1",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    sync_bn: Annotated[
        bool,
        typer.Option(
            "--sync-bn", help="Batch-norm statistics over all processes (CUDA, torchrun).", rich_help_panel=MEASURE
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that read image files.", show_default="one a core, at most 8", rich_help_panel=MEASURE
        ),
    ] = None,
    threads: Threads = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look: 2 epochs of 512 images. No claim.", rich_help_panel=MEASURE)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, time a few steps, print what is replaced and how long all takes, and stop.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    plot: Plot = None,
    save_every: Annotated[
        float | None,
        typer.Option(help="Seconds between checkpoints within an epoch.", show_default="300", rich_help_panel=OUTPUT),
    ] = None,
    out: Out = None,
    force: Force = False,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Continue this result file, from its last checkpoints; its settings are used. auto: continue --out, "
            "or the newest unfinished run of the same settings under results/; start one where there is none.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    form: Format = "auto",
    quiet: Quiet = False,
) -> int:
    """Train a network with each variant in place of its convolutions, alike in everything else, and compare errors.

    Checkpoints are kept beside the result file. Ctrl-C, SIGTERM and even a lost machine cost minutes at most: the run
    goes on with --resume and ends with the same weights. Under torchrun each process takes one device.

    [bold]bgcbench train wrn_10_2 --data digits --variants standard,gc,bgc --groups 4[/bold]

    [bold]bgcbench train wrn_28_10 --preset table5 --data-dir data --recipe fast --seeds 0,1,2[/bold]

    [bold]torchrun --nproc-per-node 8 -m bgcbench train resnet50 --data imagenet --data-dir DIR --resume auto[/bold]
    """
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "data_dirs": tuple(str(folder) for folder in data_dir) if data_dir else None,
        "download": download or None,
        "subset": subset,
        "where": where,
        "include": tuple(include) if include else None,
        "exclude": tuple(exclude) if exclude else None,
        "stem_stride": stem_stride,
        "num_classes": classes,
        "variants": common.variants(variants),
        "groups": common.numbers("--groups", groups),
        "seeds": _seeds(seeds, seed),
        "reference": False if no_reference else None,
        "skip_invalid": skip_invalid or None,
        "recipe": recipe,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "milestones": common.numbers("--milestones", milestones),
        "gamma": gamma,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "group_lasso": group_lasso,
        "pad": pad,
        "flip": flip,
        "precision": precision,
        "layout": layout,
        "compile": compiled,
        "device": device,
        "accumulate": accumulate,
        "sync_bn": sync_bn or None,
        "workers": workers,
        "threads": threads,
        "quick": quick or None,
        "save_every_s": save_every,
    }
    if size is not None:
        given["height"], given["width"] = common.size(size)
    given = {name: value for name, value in given.items() if value is not None}
    if no_reference and (1 in given.get("groups", ()) or "standard" in (variants or "").split(",")):
        raise UsageError("--no-reference leaves the standard convolution out, and it is asked for; drop one of the two")
    with _only_first_speaks():
        if out == "-" and save_every is not None:
            raise UsageError("--save-every is for checkpoints, which --out - keeps none of; leave one of them out")
        given = _with_preset(given, preset)
        path, stored = _file_to_resume(resume, given, out)
        replacing = force and not (resume == "auto" and path is not None)
        output = Output.asked(None if path else out, form, force=replacing, resume=path, quiet=quiet, plot=plot)
        config = _configuration(given, stored, str(path))
        _check_places(config)
        output.probe(dry_run=dry_run)
    if resume == "auto" and path is not None and not quiet and own_rank() == 0:
        common.say(f"going on with {path}")
    return _run(context, config, stored, output, dry_run=dry_run)


def _seeds(seeds: str | None, seed: int | None) -> tuple[int, ...] | None:
    if seeds is not None and seed is not None:
        raise UsageError(f"--seed {seed} is the same as --seeds {seed}; leave one of them out")
    return common.numbers("--seeds", seeds) if seed is None else (seed,)


@contextlib.contextmanager
def _only_first_speaks() -> Iterator[None]:
    """What is wrong with the options is wrong in every process; one of them says so."""
    try:
        yield
    except (UsageError, OutputError) as error:
        if own_rank() == 0:
            raise
        raise typer.Exit(error.exit_code) from None


def _file_to_resume(
    resume: str | None, given: dict[str, Any], out: str | None
) -> tuple[Path | None, dict[str, Any] | None]:
    """The result file to continue and what is in it; (None, None) for a new run."""
    from bgcbench.results import read

    if resume is None:
        return None, None
    if resume != "auto":
        if out is not None:
            raise UsageError("--resume writes to the file it continues; leave --out out, or say --resume auto")
        return Path(resume), read(Path(resume))
    if out == "-":
        raise UsageError("--resume auto needs a file; name one with --out, or leave --out out")
    wanted = _configuration(given, None, "")
    if out is not None:
        if not Path(out).exists():
            return None, None
        stored = read(Path(out))
        _check_same_run(stored, wanted, out)
        return Path(out), stored
    newest = sorted(Path("results").glob("train-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:
        with contextlib.suppress(ResultFileError):  # of another run, or damaged
            stored = read(path)
            if not stored["complete"]:
                _check_same_run(stored, wanted, str(path))
                return path, stored
    return None, None


def _check_same_run(stored: dict[str, Any], wanted: TrainConfig, name: str) -> None:
    """Raise ResultFileError unless ``stored`` is a run of these very settings, those that were not typed included."""
    from bgcbench.experiments.profile import check_same_fields
    from bgcbench.results import check_command

    check_command(stored, "train", name)
    fields = wanted.to_json()
    if fields["num_classes"] is None:  # seen only in the data
        del fields["num_classes"]
    check_same_fields(stored["config"], fields, wanted.FREE, name)
    for grid in ("variants", "groups", "seeds"):
        if stored["config"].get(grid) != fields[grid]:
            raise ResultFileError(
                f"{name} cannot be resumed: its {grid} are {stored['config'].get(grid)} and {fields[grid]} are asked "
                f"for; say --resume {name} to add to them, or start a new file with --out"
            )


def _check_places(config: TrainConfig) -> None:
    """Refuse folders none of which is there before torch is imported; what is in them is seen later."""
    from bgcbench.experiments.train import IN_FILES

    if config.data in IN_FILES and not config.download and not any(map(os.path.exists, config.data_dirs)):
        places = ", ".join(config.data_dirs)
        raise UsageError(f"--data-dir {places} is not there; give the place of {config.data} (or in BGCBENCH_DATA_DIR)")


def _with_preset(given: dict[str, Any], preset: str | None) -> dict[str, Any]:
    from bgcbench.experiments.train import as_folder
    from bgcbench.experiments.train import preset as with_preset

    return as_folder(given) if preset is None else with_preset(preset, given)


def _configuration(given: dict[str, Any], stored: dict[str, Any] | None, name: str) -> TrainConfig:
    """What to train: as asked, or what file ``name`` holds with the seeds, variants and N that are asked for added."""
    from bgcbench.cli.settings import resumed
    from bgcbench.experiments.train import TrainConfig

    if stored is not None:
        return resumed(stored, given, name, "train", TrainConfig, TrainConfig)
    if "model" not in given:
        raise UsageError("name a MODEL to train, such as wrn_10_2, or a file to go on with: --resume FILE")
    return TrainConfig(**given)


def _run(
    context: typer.Context,
    config: TrainConfig,
    stored: dict[str, Any] | None,
    output: Output,
    *,
    dry_run: bool,
) -> int:
    from bgcbench import results
    from bgcbench.interrupts import Interrupts

    quiet = output.quiet  # as it was asked for
    with Interrupts(patient=processes() > 1) as interrupts:
        from bgcbench.experiments.train_run import TrainRun, open_session, prepare  # torch, and what needs it
        from bgcbench.training.distributed import joined

        with _only_first_speaks():
            session = open_session(config)
        with joined(session.device) as world:
            if not world.is_main:
                output = dataclasses.replace(output, path=None, to_stdout=True, quiet=True, plot=None)
            with _only_first_speaks():
                prepared = prepare(config, world)
                session.settings |= prepared.settings
                if stored is not None:
                    results.check_resumable(stored, "train", session.settings, session.environment, str(output.path))
            output = output.named("train", config.what, session.environment)
            kept = {row["key"]: row for row in (stored or {}).get("results", ())}
            run = TrainRun(
                prepared,
                session,
                world,
                kept=world.share(kept),
                folder=world.share(_checkpoints_of(output.path)),
                afresh=not output.resumes,
                replace=output.replace,
                stop=interrupts.requested,
            )
            if not output.quiet:
                for line in (*run.warnings, *_plan_lines(run, full=dry_run), output.destination):
                    common.say(line)
            if dry_run:
                return 0 if quiet else _estimate(run, interrupts, quiet=output.quiet)
            with _only_first_speaks():
                run.make_room()
            document = stored or results.new_document(
                "train",
                context.obj or [],
                prepared.config.to_json(),
                session.environment,
                session.settings,
                "quick" if config.quick else "full",
            )
            document |= {"config": prepared.config.to_json(), "exit_reason": "running"}
            code = common.carried_out(
                lambda writer: _follow(_saved(run, document, writer), run, quiet=output.quiet),
                lambda: _take(run, document),
                document,
                [row.key for row in run.rows],
                output,
                interrupts,
                speaks=world.is_main,
            )
            if output.plot is not None and any(row["epochs"] for row in document["results"]):
                common.draw(document, output.plot, None)
                if not output.quiet:
                    common.say(f"drawn to {output.plot}")
            return code


def _plan_lines(run: TrainRun, *, full: bool) -> list[str]:
    """What will be trained; ``full``: with every convolution that is replaced or kept."""
    config, data = run.config, run.prepared.data
    recipe = config.hyper
    images = run.prepared.options.subset or len(data.train_labels)
    processes = f", {run.world.size} processes" if run.world.size > 1 else ""
    lines = [
        f"plan: {config.model} on {data.name} ({images} images to train with, {len(data.test_labels)} to test with, "
        f"{data.size[0]}x{data.size[1]} px), {len(run.todo)} of {len(run.rows)} rows to train, on "
        f"{run.session.environment['device']['name']}{processes}",
        f"recipe {recipe.name}: {recipe.epochs} epochs of {images // recipe.batch_size} steps, "
        + ", ".join(f"{name} {_text(getattr(recipe, name))}" for name in _SHOWN),
    ]
    for (variant, groups), cell in run.prepared.cells.items():
        counts, convert = cell.counts, cell.convert
        lines.append(
            f"  {run.name_of(variant, groups)}: {counts['params']:,} parameters, {counts['macs'] / 1e6:,.1f} M MACs an "
            f"image, {len(convert['replaced'])} convolutions replaced, {len(convert['kept'])} kept"
        )
    told: list[dict[str, Any]] = []
    for (variant, groups), cell in run.prepared.cells.items() if full else ():
        choice = {name: cell.convert[name] for name in ("replaced", "kept")}
        if variant == "standard" or choice in told:  # the same convolutions, unless N does not divide some
            continue
        told.append(choice)
        lines.append(f"{run.name_of(variant, groups)}:" if len(told) > 1 else "convolutions:")
        lines += [f"  replaced: {name}" for name in choice["replaced"]]
        lines += [f"  kept: {kept['name']} ({kept['reason']})" for kept in choice["kept"]]
    return lines


def _checkpoints_of(path: Path | None) -> Path | None:
    """The folder beside a result file that its checkpoints are kept in."""
    return None if path is None else path.with_name(f"{path.name.removesuffix('.json')}.checkpoints")


_SHOWN = ("batch_size", "lr", "schedule", "milestones", "momentum", "nesterov", "weight_decay", "label_smoothing",
          "group_lasso", "precision", "layout", "compile")  # fmt: skip


def _text(value: Any) -> str:
    return "/".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _estimate(run: TrainRun, interrupts: Interrupts, *, quiet: bool) -> int:
    """Time a few steps of each variant and N, and print what that makes of the whole run."""
    total, by_cell = 0.0, {}
    for row, epoch_s, all_s in run.estimates():
        by_cell[row.cell] = all_s
        if not quiet:
            common.say(f"  {run.name_of(*row.cell)}: {_duration(epoch_s)} an epoch, {_duration(all_s)} a training")
    if interrupts.requested():
        return interrupts.exit_code
    total = sum(by_cell[row.cell] for row in run.todo)
    if not quiet:
        common.say(f"time in total: about {_duration(total)} for {len(run.todo)} trainings")
    return 0


def _duration(seconds: float) -> str:
    """ "0.8 s", "12 s", "3:20 min", "5:04 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _saved(run: TrainRun, document: dict[str, Any], writer: ResultWriter | None) -> Iterator[Update]:
    """The run's updates; what an epoch has found is already in the document and on the disk.

    The file is there from the start: a run that is killed in its first epoch has checkpoints to go on from.
    """
    if writer is not None:
        writer.write(document)
    for update in run.run():
        if update.ended:
            _take(run, document)
            if writer is not None:
                writer.write(document)
        yield update


def _take(run: TrainRun, document: dict[str, Any]) -> None:
    document["results"] = run.results
    if run.ceilings is not None:
        document["ceilings"] = {**dataclasses.asdict(run.ceilings), "matmul_sizes": list(run.ceilings.matmul_sizes)}
    document["warnings"] = list(dict.fromkeys((*document["warnings"], *run.warnings)))


def _follow(updates: Iterator[Update], run: TrainRun, *, quiet: bool) -> None:
    """Go through the run with a bar on a terminal, a line an epoch elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    said = len(run.warnings)
    if quiet or not console.is_terminal:
        for update in updates:
            for warning in run.warnings[said:] if not quiet else ():
                common.say(warning)
            said = len(run.warnings)
            if not quiet and update.record is not None:
                common.say(_epoch_line(update, run))
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=12)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        for update in updates:
            for warning in run.warnings[said:]:
                bar.console.print(warning)
            said = len(run.warnings)
            bar.update(task, description=_bar_text(update, run), completed=update.done)


def _epoch_line(update: Update, run: TrainRun) -> str:
    """One epoch, for a log."""
    record = update.record or {}
    error, best = record["test_error"], run.known[update.row.key]["error_best"]
    judged = "" if error is None else f", test error {error:.2f} %"
    judged += "" if best is None else f" (best {best:.2f} %)"
    speed = "" if record["images_per_s"] is None else f", {record['images_per_s']:.0f} images/s"
    left = "" if update.left_s is None else f", {_duration(update.left_s)} left"
    learnt = "".join(f", {name} {value:.1%}" for name, value in (record["learnt"] or {}).items())
    return (
        f"{update.row.key} epoch {record['epoch']}/{run.config.epochs}: lr {record['lr']:.3g}, loss "
        f"{record['train_loss']:.4f}{judged}{learnt}{speed}{left}"
    )


def _bar_text(update: Update, run: TrainRun) -> str:
    """What the bar shows: the row, its epoch, loss and error, images a second and the time left of the run."""
    text = f"{update.number + 1}/{update.count} {run.name_of(*update.row.cell)}"
    if len(run.config.seeds) > 1:
        text += f" seed {update.row.seed}"
    progress = update.progress
    if progress is None:
        return text
    text += f"  epoch {progress.epoch}/{progress.epochs}"
    if progress.loss is not None:
        text += f"  loss {progress.loss:.3f}"
    if progress.error is not None:
        text += f"  error {progress.error:.2f} %"
    if progress.images_per_s is not None:
        text += f"  {progress.images_per_s:.0f} images/s"
    return text if update.left_s is None else f"{text}  {_duration(update.left_s)} left"
