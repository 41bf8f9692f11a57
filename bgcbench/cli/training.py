"""What ``bgcbench train`` and ``bgcbench transfer`` share: options, how a run is found, followed and written down."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgcbench.cli import common
from bgcbench.cli.common import GRID, MEASURE, NETWORK, OUTPUT, WORKLOAD, Output
from bgcbench.errors import OutputError, ResultFileError, UsageError
from bgcbench.training.launcher import own_rank, processes

if TYPE_CHECKING:
    from bgcbench.experiments.session import Session
    from bgcbench.experiments.train import TrainConfig
    from bgcbench.experiments.train_run import Prepared, TrainRun, Update
    from bgcbench.interrupts import Interrupts
    from bgcbench.results import ResultWriter
    from bgcbench.training.distributed import World

RECIPE = "Recipe (each replaces the recipe's own)"

Data = Annotated[
    str | None,
    typer.Option(
        help="digits (extra: digits), cifar10, imagenet, folder, synthetic (speed only), or the path of a folder "
        "with train/ and val/.",
        rich_help_panel=WORKLOAD,
    ),
]
DataDir = Annotated[
    list[Path] | None,
    typer.Option(help="Where it is looked for (repeatable).", envvar="BGCBENCH_DATA_DIR", rich_help_panel=WORKLOAD),
]
Download = Annotated[
    bool, typer.Option("--download", help="Download CIFAR-10 into --data-dir first.", rich_help_panel=WORKLOAD)
]
Subset = Annotated[
    int | None,
    typer.Option(help="Train on so many images, all classes alike.", show_default="all", rich_help_panel=WORKLOAD),
]
Classes = Annotated[
    int | None, typer.Option(help="Classes of synthetic data.", show_default="the data's", rich_help_panel=NETWORK)
]
Seeds = Annotated[
    str | None,
    typer.Option(
        help="Each row is done once a seed: 0,1,2 gives mean and standard deviation.",
        show_default="0",
        rich_help_panel=GRID,
    ),
]
OneSeed = Annotated[
    int | None, typer.Option("--seed", help="The same for one seed.", show_default="0", rich_help_panel=GRID)
]
Gamma = Annotated[float | None, typer.Option(help="Factor of each drop.", show_default="0.1", rich_help_panel=RECIPE)]
Momentum = Annotated[float | None, typer.Option(show_default="0.9", rich_help_panel=RECIPE)]
Nesterov = Annotated[bool | None, typer.Option("--nesterov/--no-nesterov", show_default="on", rich_help_panel=RECIPE)]
LabelSmoothing = Annotated[float | None, typer.Option(show_default="0", rich_help_panel=RECIPE)]
GroupLasso = Annotated[
    float | None, typer.Option(help="Strength of LGC's group lasso.", show_default="0", rich_help_panel=RECIPE)
]
Pad = Annotated[
    int | None,
    typer.Option(
        help="Zeros around an image, in px, that crops are taken from.",
        show_default="digits 2, cifar10 4",
        rich_help_panel=RECIPE,
    ),
]
Flip = Annotated[
    bool | None,
    typer.Option("--flip/--no-flip", help="Mirror half of them.", show_default="not digits", rich_help_panel=RECIPE),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="fp32, tf32, fp64; bf16 and fp16 are autocast.", show_default="fp32; fast bf16", rich_help_panel=RECIPE
    ),
]
Layout = Annotated[
    str | None,
    typer.Option(help="nchw, or nhwc (channels_last).", show_default="nchw; fast nhwc", rich_help_panel=RECIPE),
]
Compiled = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile.", show_default="fast only", rich_help_panel=RECIPE),
]
Algorithm = Annotated[
    str | None,
    typer.Option(
        help="Exact form that layers run in: fixed (the first, BGC two_conv: the same bits in every run), auto (the "
        "fastest here, which each process measures), or BGC concat, dense, split, matmul (1x1), triton.",
        show_default="fixed; fast auto",
        rich_help_panel=RECIPE,
    ),
]
Accumulate = Annotated[
    int | None,
    typer.Option(
        help="Parts that a batch goes through the network in, for little memory.",
        show_default="1",
        rich_help_panel=MEASURE,
    ),
]
SyncBn = Annotated[
    bool,
    typer.Option(
        "--sync-bn", help="Batch-norm statistics over all processes (CUDA, torchrun).", rich_help_panel=MEASURE
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that read image files.", show_default="one a core, at most 8", rich_help_panel=MEASURE
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, time a few steps, print what is replaced and how long all takes, and stop.",
        rich_help_panel=OUTPUT,
    ),
]
SaveEvery = Annotated[
    float | None,
    typer.Option(help="Seconds between checkpoints within an epoch.", show_default="300", rich_help_panel=OUTPUT),
]
Resume = Annotated[
    str | None,
    typer.Option(
        help="Continue this result file, from its last checkpoints; its settings are used. auto: continue --out, "
        "or the newest unfinished run of the same settings under results/; start one where there is none.",
        rich_help_panel=OUTPUT,
    ),
]


class Command(ABC):
    """What one of the commands is made of; torch is imported in :meth:`prepare`.

    name: on the command line. missing: what to say where no network is named. what_is_done: to a row, for people.
    on_top: what the estimate of a dry run leaves out.
    """

    name: str
    missing: str
    what_is_done: str
    on_top: str = ""

    @property
    @abstractmethod
    def config_type(self) -> type[TrainConfig]:
        """The configuration that its options fill."""

    @abstractmethod
    def prepare(self, config: Any, world: World) -> Prepared:
        """Open the data and build the networks; raises UsageError and ShapeError."""

    @abstractmethod
    def start(self, prepared: Any, session: Session, world: World, **options: Any) -> TrainRun:
        """The run over ``prepared``."""

    def check_places(self, config: Any, *, fresh: bool, replace: bool) -> None:
        """Refuse what is not there, or in the way, before torch is imported; what is in it is seen later.

        fresh: whether the run begins anew; replace: whether it may replace files.
        """
        from bgcbench.experiments.train import IN_FILES

        if config.data in IN_FILES and not config.download and not any(map(os.path.exists, config.data_dirs)):
            places = ", ".join(config.data_dirs)
            raise UsageError(
                f"--data-dir {places} is not there; give the place of {config.data} (or in BGCBENCH_DATA_DIR)"
            )

    def plan_lines(self, run: Any) -> list[str]:
        """What there is to say of the plan beside the networks."""
        config, data = run.config, run.prepared.data
        images = run.prepared.options.subset or len(data.train_labels)
        processes_text = f", {run.world.size} processes" if run.world.size > 1 else ""
        lines = [
            f"plan: {config.model} on {data.name} ({images} images to train with, {len(data.test_labels)} to test "
            f"with, {data.size[0]}x{data.size[1]} px), {len(run.todo)} of {len(run.rows)} rows to {self.what_is_done}, "
            f"on {run.session.environment['device']['name']}{processes_text}"
        ]
        recipe = config.hyper
        if recipe.epochs:
            lines.append(
                f"recipe {recipe.name}: {recipe.epochs} epochs of {images // recipe.batch_size} steps, "
                + ", ".join(f"{name} {_text(getattr(recipe, name))}" for name in _SHOWN)
            )
        return lines

    def is_estimated(self, config: Any) -> bool:
        """Whether a dry run times a few steps."""
        return True

    def is_drawable(self, row: dict[str, Any]) -> bool:
        """Whether there is anything in a row that a picture shows."""
        return bool(row["epochs"])

    def line(self, update: Update, run: Any) -> str | None:
        """What a log says of ``update``; None for nothing."""
        return None if update.record is None else _epoch_line(update, run)


_SHOWN = ("batch_size", "lr", "schedule", "milestones", "momentum", "nesterov", "weight_decay", "label_smoothing",
          "group_lasso", "precision", "layout", "compile")  # fmt: skip


def given_options(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that were asked for.

    options: the parameters of a command by their names, as typer has filled them. own: fields that only this command
    has. What is not asked for is None, or False where an option can only switch on.
    """
    same = ("model", "data", "subset", "where", "stem_stride", "recipe", "epochs", "batch_size", "lr", "schedule",
            "gamma", "momentum", "nesterov", "weight_decay", "label_smoothing", "group_lasso", "pad", "flip",
            "precision", "layout", "algorithm", "device", "accumulate", "workers", "threads")  # fmt: skip
    switches = ("download", "skip_invalid", "sync_bn", "quick")
    lists = ("include", "exclude")
    given: dict[str, Any] = {
        **{name: options[name] for name in same},
        **{name: options[name] or None for name in switches},
        **{name: tuple(options[name]) if options[name] else None for name in lists},
        "data_dirs": tuple(map(str, options["data_dir"])) if options["data_dir"] else None,
        "num_classes": options["classes"],
        "variants": common.variants(options["variants"]),
        "groups": common.numbers("--groups", options["groups"]),
        "seeds": _seeds(options["seeds"], options["seed"]),
        "milestones": common.numbers("--milestones", options["milestones"]),
        "compile": options["compiled"],
        "save_every_s": options["save_every"],
        **own,
    }
    if options["size"] is not None:
        given["height"], given["width"] = common.size(options["size"])
    return {name: value for name, value in given.items() if value is not None}


def _seeds(seeds: str | None, seed: int | None) -> tuple[int, ...] | None:
    if seeds is not None and seed is not None:
        raise UsageError(f"--seed {seed} is the same as --seeds {seed}; leave one of them out")
    return common.numbers("--seeds", seeds) if seed is None else (seed,)


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """What is wrong with the options is wrong in every process; one of them says so."""
    try:
        yield
    except (UsageError, OutputError) as error:
        if own_rank() == 0:
            raise
        raise typer.Exit(error.exit_code) from None


@dataclasses.dataclass(frozen=True)
class Asked:
    """Where a run begins and ends: the options that say so, as they were typed."""

    out: str | None
    resume: str | None
    form: str
    force: bool
    quiet: bool
    plot: Path | None
    dry_run: bool


def settled(command: Command, given: dict[str, Any], asked: Asked) -> tuple[Any, dict[str, Any] | None, Output]:
    """The configuration, the document that is gone on with (None for a new run) and where it goes: all checked.

    Nothing here needs torch. Raises UsageError, ResultFileError and OutputError.
    """
    if asked.out == "-" and "save_every_s" in given:
        raise UsageError("--save-every is for checkpoints, which --out - keeps none of; leave one of them out")
    path, stored = _file_to_resume(command, asked, given)
    replacing = asked.force and not (asked.resume == "auto" and path is not None)
    # --force may be about the files of --save alone
    for_save = "save" in given and path is None and asked.out in (None, "-") and asked.plot is None
    output = Output.asked(
        None if path else asked.out,
        asked.form,
        force=replacing and not for_save,
        resume=path,
        quiet=asked.quiet,
        plot=asked.plot,
    )
    output = dataclasses.replace(output, replace=output.replace or replacing)
    config = _configuration(command, given, stored, str(path))
    command.check_places(config, fresh=stored is None, replace=asked.force or asked.dry_run)
    if own_rank() == 0:  # which alone writes
        output.probe(dry_run=asked.dry_run)
    if asked.resume == "auto" and path is not None and not asked.quiet and own_rank() == 0:
        common.say(f"going on with {path}")
    return config, stored, output


def _file_to_resume(command: Command, asked: Asked, given: dict[str, Any]) -> tuple[Path | None, dict[str, Any] | None]:
    """The result file to continue and what is in it; (None, None) for a new run."""
    from bgcbench.results import read

    resume, out = asked.resume, asked.out
    if resume is None:
        return None, None
    if resume != "auto":
        if out is not None:
            raise UsageError("--resume writes to the file it continues; leave --out out, or say --resume auto")
        return Path(resume), read(Path(resume))
    if out == "-":
        raise UsageError("--resume auto needs a file; name one with --out, or leave --out out")
    wanted = _configuration(command, given, None, "")
    if out is not None:
        if not Path(out).exists():
            return None, None
        stored = read(Path(out))
        _check_same_run(command, stored, wanted, out)
        return Path(out), stored
    files = Path("results").glob(f"{command.name}-*.json")
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ResultFileError):  # of another run, or damaged
            stored = read(path)
            if not stored["complete"]:
                _check_same_run(command, stored, wanted, str(path))
                return path, stored
    return None, None


def _check_same_run(command: Command, stored: dict[str, Any], wanted: TrainConfig, name: str) -> None:
    """Raise ResultFileError unless ``stored`` is a run of these very settings, those that were not typed included."""
    from bgcbench.experiments.profile import check_same_fields
    from bgcbench.results import check_command

    check_command(stored, command.name, name)
    # None is what is seen only in the data and the weights.
    late = ("num_classes", "height", "width")
    fields = {name: value for name, value in wanted.to_json().items() if value is not None or name not in late}
    check_same_fields(stored["config"], fields, wanted.FREE, name)
    for grid in wanted.GRIDS:
        if stored["config"].get(grid) != fields[grid]:
            raise ResultFileError(
                f"{name} cannot be resumed: its {grid} are {stored['config'].get(grid)} and {fields[grid]} are asked "
                f"for; say --resume {name} to add to them, or start a new file with --out"
            )


def _configuration(command: Command, given: dict[str, Any], stored: dict[str, Any] | None, name: str) -> TrainConfig:
    """What to do: as asked, or what file ``name`` holds with the seeds, variants and N that are asked for added."""
    from bgcbench.cli.settings import resumed

    if stored is not None:
        return resumed(stored, given, name, command.name, command.config_type, command.config_type)
    if "model" not in given:
        raise UsageError(command.missing)
    return command.config_type(**given)


def carry_out(
    command: Command,
    context: typer.Context,
    config: Any,
    stored: dict[str, Any] | None,
    output: Output,
    *,
    dry_run: bool,
) -> int:
    """Do what ``config`` asks for, into the result file; returns the exit code."""
    from bgcbench import results
    from bgcbench.interrupts import Interrupts

    quiet = output.quiet  # as it was asked for
    with Interrupts(patient=processes() > 1) as interrupts:
        from bgcbench.experiments.train_run import open_session  # torch, and what needs it
        from bgcbench.training.distributed import joined

        with only_first_speaks():
            session = open_session(config)
        with joined(session.device) as world:
            if not world.is_main:
                output = dataclasses.replace(output, path=None, to_stdout=True, quiet=True, plot=None)
            with only_first_speaks():
                prepared = command.prepare(config, world)
                session.settings |= prepared.settings
                there = stored
                if stored is not None and all(row["status"] == "error" for row in stored["results"]):
                    # Nothing to be mixed with.
                    stored = {
                        **stored,
                        "settings": session.settings,
                        "environment": session.environment,
                        "warnings": [],
                    }
                elif stored is not None:
                    results.check_resumable(
                        stored, command.name, session.settings, session.environment, str(output.path)
                    )
            output = output.named(command.name, config.what, session.environment)
            kept = {row["key"]: row for row in (stored or {}).get("results", ())}
            run = command.start(
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
                lines = (*command.plan_lines(run), *_network_lines(run, full=dry_run))
                for line in (*run.warnings, *lines, output.destination):
                    common.say(line)
            if dry_run:
                if quiet or not command.is_estimated(config):
                    return 0
                return _estimate(command, run, interrupts, quiet=output.quiet)
            with contextlib.ExitStack() as claim:
                writers: list[ResultWriter | None] = []
                with only_first_speaks():
                    world.once(lambda: writers.append(claim.enter_context(output.claimed(there, interrupts))))
                    run.make_room()
                writer = writers[0] if writers else None
                document = common.document_of(command.name, context, prepared.config, session, stored)
                code = common.carried_out(
                    lambda: _follow(command, _saved(run, document, writer), run, quiet=output.quiet),
                    lambda: _take(run, document),
                    document,
                    [row.key for row in run.rows],
                    output,
                    writer,
                    interrupts,
                    speaks=world.is_main,
                )
            if output.plot is not None and any(map(command.is_drawable, document["results"])):
                common.draw(document, output.plot, None)
                if not output.quiet:
                    common.say(f"drawn to {output.plot}")
            return code


def _network_lines(run: TrainRun, *, full: bool) -> list[str]:
    """The networks of the plan; ``full``: with every convolution that is replaced or kept."""
    from bgcbench.experiments.network_run import network_label

    lines: list[str] = []
    for cell, known in run.prepared.cells.items():
        counts, convert = known.counts, known.convert
        lines.append(
            f"  {network_label(*cell)}: {counts['params']:,} parameters, {counts['macs'] / 1e6:,.1f} M MACs an "
            f"image, {len(convert['replaced'])} convolutions replaced, {len(convert['kept'])} kept"
        )
    told: list[dict[str, Any]] = []
    for cell, known in run.prepared.cells.items() if full else ():
        choice = {name: known.convert[name] for name in ("replaced", "kept")}
        if known.record is None or choice in told:  # the same convolutions, unless N does not divide some
            continue
        told.append(choice)
        lines.append(f"{network_label(*cell)}:" if len(told) > 1 else "convolutions:")
        lines += [f"  replaced: {name}" for name in choice["replaced"]]
        lines += [f"  kept: {kept['name']} ({kept['reason']})" for kept in choice["kept"]]
    return lines


def _checkpoints_of(path: Path | None) -> Path | None:
    """The folder beside a result file that its checkpoints are kept in."""
    return None if path is None else path.with_name(f"{path.name.removesuffix('.json')}.checkpoints")


def _text(value: Any) -> str:
    return "/".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _estimate(command: Command, run: TrainRun, interrupts: Interrupts, *, quiet: bool) -> int:
    """Time a few steps of each variant and N, and print what that makes of the whole run."""
    from bgcbench.experiments.network_run import network_label

    seconds: dict[tuple[str, int], float] = {}
    for row, epoch_s, all_s in run.estimates():
        seconds[row.cell] = all_s
        if not quiet:
            trained = f"{duration(epoch_s)} an epoch, {duration(all_s)} a training"
            common.say(f"  {network_label(*row.cell)}: {trained if row.epochs else f'{duration(all_s)} to judge'}")
    if interrupts.requested():
        return interrupts.exit_code
    todo = run.todo
    total = sum(seconds[row.cell] for row in todo)
    trainings = sum(bool(row.epochs) for row in todo)
    parts = [f"{trainings} trainings"] * bool(trainings)
    parts += [f"{len(todo) - trainings} networks to judge"] * (len(todo) > trainings)
    if not quiet:
        of_what = f"{' and '.join(parts)}{command.on_top}" if parts else "nothing"
        common.say(f"time in total: about {duration(total)} for {of_what}")
    return 0


def duration(seconds: float) -> str:
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


def _follow(command: Command, updates: Iterator[Update], run: TrainRun, *, quiet: bool) -> None:
    """Go through the run with a bar on a terminal, a line an epoch or a row elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from bgcbench.results import printable

    console = Console(stderr=True)
    said = len(run.warnings)
    if quiet or not console.is_terminal:
        for update in updates:
            for warning in run.warnings[said:] if not quiet else ():
                common.say(warning)
            said = len(run.warnings)
            line = None if quiet else command.line(update, run)
            if line is not None:
                common.say(line)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=12)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        for update in updates:
            for warning in run.warnings[said:]:
                bar.console.print(printable(warning), markup=False, highlight=False)
            said = len(run.warnings)
            bar.update(task, description=_bar_text(update, run), completed=update.done)


def _epoch_line(update: Update, run: TrainRun) -> str:
    """One epoch, for a log."""
    record = update.record or {}
    error, best = record["test_error"], run.known[update.row.key]["error_best"]
    judged = "" if error is None else f", test error {error:.2f} %"
    judged += "" if best is None else f" (best {best:.2f} %)"
    speed = "" if record["images_per_s"] is None else f", {record['images_per_s']:.0f} images/s"
    left = "" if update.left_s is None else f", {duration(update.left_s)} left"
    learnt = "".join(f", {name} {value:.1%}" for name, value in (record["learnt"] or {}).items())
    return (
        f"{update.row.key} epoch {record['epoch']}/{run.config.epochs}: lr {record['lr']:.3g}, loss "
        f"{record['train_loss']:.4f}{judged}{learnt}{speed}{left}"
    )


def _bar_text(update: Update, run: TrainRun) -> str:
    """What the bar shows: the row, its epoch, loss and error, images a second and the time left of the run."""
    text = f"{update.number + 1}/{update.count} {run.title(update.row)}"
    if update.doing:
        return f"{text}  {update.doing}"
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
    return text if update.left_s is None else f"{text}  {duration(update.left_s)} left"
