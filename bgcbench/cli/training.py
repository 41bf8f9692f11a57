"""``bgcbench train`` and ``bgcbench transfer``: networks trained alike, and a trained network converted."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import typer

from bgcbench.cli.measuring import check_reference, with_plan
from bgcbench.cli.output import Said, say
from bgcbench.cli.run import Beginning, Command, settled
from bgcbench.errors import UsageError
from bgcbench.experiments import train, transfer
from bgcbench.experiments.options import Asked, AskedOfTraining, AskedOfTransfer, in_shard
from bgcbench.experiments.train import IN_FILES, TrainConfig, as_folder
from bgcbench.experiments.transfer import NO_IMAGES, TransferConfig, room_to_save, saved_name, with_images
from bgcbench.results import Json
from bgcbench.results.rows import CellKey, Epoch, TransferRow
from bgcbench.specs import FACTORY, TIMM_PREFIX, WEIGHTS, NetSpec

if TYPE_CHECKING:
    from bgcbench.experiments.base import Session
    from bgcbench.experiments.train_run import TrainRun, Update
    from bgcbench.experiments.transfer_run import TransferRun
    from bgcbench.interrupts import Interrupts
    from bgcbench.training.distributed import World

CHECKPOINTS = (".pt", ".pth")
STAND_IN = "resnet18"  # takes the place of a network whose name stands in a file that needs torch to be read
_SHOWN = ("batch_size", "lr", "schedule", "milestones", "momentum", "nesterov", "weight_decay", "label_smoothing",
          "group_lasso", "precision", "layout", "compile")  # fmt: skip


class Train(Command):
    """Train a network with each variant in place of its convolutions, alike in everything else, and compare errors.

    Checkpoints are kept beside the result file. Ctrl-C, SIGTERM and even a lost machine cost minutes at most: the run
    goes on with --resume and ends with the same weights. Under torchrun each process takes one device.

    [bold]bgcbench train wrn_10_2 --data digits --variants standard,gc,bgc --groups 4[/bold]

    [bold]bgcbench train wrn_28_10 --preset table5 --data-dir data --recipe fast --seeds 0,1,2[/bold]

    [bold]torchrun --nproc-per-node 8 -m bgcbench train resnet50 --data imagenet --data-dir DIR --resume auto[/bold]
    """

    summary = "Train a network with each variant, and compare errors."
    kinds = (TrainConfig,)
    asked = AskedOfTraining
    preset = "table5 (CIFAR-10) or table6 (ImageNet): the paper's grid."
    missing = "name a MODEL to train, such as wrn_10_2, or a file to go on with: --resume FILE"
    experiment: ClassVar[Any] = train  # the module that knows the presets
    what_is_done: ClassVar[str] = "train"  # to a row, for people
    on_top: ClassVar[str] = ""  # what the estimate of a dry run leaves out

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        check_reference(given)
        seed, seeds = context.params.get("seed"), context.params.get("seeds")
        if seed is not None and seeds is not None:
            raise UsageError(f"--seed {seed} is the same as --seeds {seed}; leave one of them out")
        return with_plan(as_folder(given) if preset is None else self.experiment.preset(preset, given), asked)

    def check(self, config: Any, *, fresh: bool, replace: bool) -> None:
        if config.data in IN_FILES and not config.download and not any(map(os.path.exists, config.data_dirs)):
            places = ", ".join(config.data_dirs)
            raise UsageError(
                f"--data-dir {places} is not there; give the place of {config.data} (or in BGCBENCH_DATA_DIR)"
            )

    def open_session(self, config: Any) -> Session:
        from bgcbench.experiments.train_run import open_session

        return open_session(config)

    def joined(self, session: Session) -> contextlib.AbstractContextManager[World]:
        from bgcbench.training.distributed import joined

        return joined(session.device)

    def prepare(self, config: Any, session: Session, world: World) -> Any:
        from bgcbench.experiments.train_run import prepare

        prepared = prepare(config, world)
        session.settings |= prepared.settings
        return prepared

    def start(self, prepared: Any, session: Session, world: World, beginning: Beginning) -> TrainRun[Any]:
        from bgcbench.experiments.train_run import TrainRun

        rows = in_shard(prepared.config.shard, prepared.rows)
        return TrainRun(dataclasses.replace(prepared, rows=rows), session, world, **beginning.of_training)

    def plan_lines(self, run: Any, *, full: bool) -> list[str]:
        return [*self.own_lines(run), *_network_lines(run, full=full)]

    def own_lines(self, run: Any) -> list[str]:
        """What there is to say of the plan beside the networks."""
        config, data = run.config, run.prepared.data
        images = run.prepared.options.subset or len(data.train_labels)
        processes_text = f", {run.world.size} processes" if run.world.size > 1 else ""
        lines = [
            f"plan: {config.model} on {data.name} ({images} images to train with, {len(data.test_labels)} to test "
            f"with, {data.size[0]}x{data.size[1]} px), {len(run.todo)} of {len(run.planned)} rows to "
            f"{self.what_is_done}, on {run.session.environment.device.name}{processes_text}"
        ]
        recipe = config.hyper
        if recipe.epochs:
            lines.append(
                f"recipe {recipe.name}: {recipe.epochs} epochs of {images // recipe.batch_size} steps, "
                + ", ".join(f"{name} {_text(getattr(recipe, name))}" for name in _SHOWN)
            )
        return lines

    def estimate(self, run: Any, interrupts: Interrupts, *, quiet: bool) -> int:
        """Time a few steps of each variant and N, and print what that makes of the whole run."""
        seconds: dict[CellKey, float] = {}
        for row, epoch_s, all_s in run.estimates():
            seconds[row.params.cell] = all_s
            if not quiet:
                trained = f"{duration(epoch_s)} an epoch, {duration(all_s)} a training"
                takes = trained if row.params.epochs else f"{duration(all_s)} to evaluate"
                say(f"  {row.params.choice.label}: {takes}")
        if interrupts.requested():
            return interrupts.exit_code
        todo = run.todo
        total = sum(seconds[row.params.cell] for row in todo)
        trainings = sum(bool(row.params.epochs) for row in todo)
        parts = [f"{trainings} trainings"] * bool(trainings)
        parts += [f"{len(todo) - trainings} networks to evaluate"] * (len(todo) > trainings)
        if not quiet:
            of_what = f"{' and '.join(parts)}{self.on_top}" if parts else "nothing"
            say(f"time in total: about {duration(total)} for {of_what}")
        return 0

    def said(self, update: Update, run: Any) -> Said:
        return Said(_bar_text(update, run), update.done, self.line(update, run))

    def line(self, update: Update, run: Any) -> str | None:
        """What a log says of ``update``; None for nothing."""
        return None if update.record is None else _epoch_line(update, update.record, run)

    def is_drawable(self, row: Any) -> bool:
        return bool(row.epochs)


class Transfer(Train):
    """Convert a trained network to each variant, say what that costs in accuracy, and train it on to win it back.

    First the untouched network is evaluated, then every conversion, then each is trained (--epochs 0: none is). With
    calibrated weights most of the loss is won back without any training. Without images conversions are by the closed
    form, and the table says what each layer loses. A run that was stopped goes on with --resume and converts nothing
    twice.

    [bold]bgcbench transfer resnet50 --save networks[/bold]

    [bold]bgcbench transfer resnet50 --data imagenet --data-dir DIR --epochs 0 --init copy,white,calibrated[/bold]

    [bold]bgcbench transfer resnet50 --preset table3 --data-dir DIR --recipe fast --control[/bold]

    [bold]bgcbench transfer results/RUN.checkpoints/ROW/final-e0020-HASH.pt --data digits --save networks[/bold]
    """

    summary = "Convert a trained network; optionally fine-tune it."
    kinds = (TransferConfig,)
    asked = AskedOfTransfer
    preset = "table3: ResNet-50 on ImageNet as the paper converts it (copied weights, nothing re-estimated)."
    missing = (
        "name a MODEL, such as resnet50, the checkpoint of a bgcbench train run, or a file to go on with: --resume FILE"
    )
    experiment: ClassVar[Any] = transfer
    what_is_done = "do"
    on_top = "; conversions come on top, and so does --time"

    def given(self, given: Json, preset: str | None, asked: Asked, context: typer.Context) -> Json:
        given = super().given(given, preset, asked, context)
        source = context.get_parameter_source("data_dir")
        typed = "data_dirs" in given and source is not None and source.name == "COMMANDLINE"
        if _is_path(given.get("model", "")):
            given = self._from_checkpoint(given, asked)
        if (asked.resume is None or asked.is_auto) and "model" in given:
            classes = NetSpec(given["model"], given.get("num_classes")).classes
            given, _ = with_images(given, classes, typed=typed)
            if given["data"] == NO_IMAGES and asked.plot is not None:
                raise UsageError("--plot draws errors and calibrated layers, which need images: give --data-dir DIR")
        return given

    def check(self, config: TransferConfig, *, fresh: bool, replace: bool) -> None:
        super().check(config, fresh=fresh, replace=replace)
        if config.weights not in WEIGHTS and not os.path.exists(config.weights):
            raise UsageError(
                f"--weights {config.weights}: there is no such file; choose a file, {' or '.join(WEIGHTS)}"
            )
        if config.save is not None:
            keys = [row.key for row in transfer.plan(config) if not row.params.is_dense]
            room_to_save(Path(config.save), map(saved_name, keys), replace=replace or not fresh)

    def prepare(self, config: TransferConfig, session: Session, world: World) -> Any:
        from bgcbench.experiments import closed_form, transfer_run

        prepared = closed_form.prepare(config) if config.data == NO_IMAGES else transfer_run.prepare(config, world)
        session.settings |= prepared.settings
        return prepared

    def start(self, prepared: Any, session: Session, world: World, beginning: Beginning) -> TransferRun:
        from bgcbench.experiments.closed_form import ClosedFormRun
        from bgcbench.experiments.transfer_run import TransferRun

        kind = ClosedFormRun if prepared.config.data == NO_IMAGES else TransferRun
        return kind(prepared, session, world, **beginning.of_training)

    def own_lines(self, run: TransferRun) -> list[str]:
        config, prepared = run.config, run.prepared
        if config.data == NO_IMAGES:
            _, reasons = with_images({"data_dirs": config.data_dirs}, config.num_classes or 0, typed=False)
            return [
                *([f"no images: {'; '.join(reasons)}"] if reasons else []),
                f"plan: {config.model} without images, {len(run.todo)} of {len(run.planned)} rows by the closed form "
                f"(init {', '.join(config.inits)}), on {run.session.environment.device.name}; --data-dir DIR "
                "(train/ and val/, or val/ alone) adds errors and calibrated weights",
            ]
        lines = super().own_lines(run)
        if config.data_dirs:
            lines.append(f"looked for images in {', '.join(config.data_dirs)}")
        count = min(config.calibration_images, len(prepared.images))
        calibrated = f"{count} images to calibrate with, " if config.calibrates else ""
        lines.append(
            f"weights: {prepared.loaded.name}; {calibrated}init {', '.join(config.inits)}, batch norm "
            f"{'re-estimated' if config.rebn else 'as it is'}"
        )
        lines += prepared.told
        extras = ["the untouched network is trained too"] * config.control
        extras += [
            f"its outputs are {'targets beside the labels' if config.labelled else 'the targets'}"
        ] * config.distill
        if extras or not config.epochs:
            lines.append("; ".join(extras) or "--epochs 0: conversions are evaluated, and nothing is trained")
        return lines

    def estimate(self, run: TransferRun, interrupts: Interrupts, *, quiet: bool) -> int:
        return 0 if run.config.data == NO_IMAGES else super().estimate(run, interrupts, quiet=quiet)

    def is_drawable(self, row: Any) -> bool:
        calibration = row.convert and row.convert.calibration
        return row.error_initial is not None or bool(calibration and calibration.layers)

    def line(self, update: Update, run: TransferRun) -> str | None:
        if update.doing not in ("converted", "evaluated"):
            return super().line(update, run)
        return _untrained_line(run.known[update.row.key]) if run.prepared.loaded else None

    def _from_checkpoint(self, given: Json, asked: Asked) -> Json:
        """``given`` with the network and the weights of the checkpoint that MODEL names.

        Everything else that can be wrong is said before torch is imported to read it. Raises UsageError.
        """
        path = given["model"]
        if "weights" in given:
            raise UsageError(f"MODEL {path} is a checkpoint and has its weights; leave --weights out")
        if os.path.isdir(path):
            raise UsageError(f"MODEL {path} is a folder; give a checkpoint in it, such as its final-*.pt")
        if not os.path.isfile(path):
            raise UsageError(
                f"MODEL {path} is not there; give a network's name, or a checkpoint that bgcbench train wrote"
            )
        if asked.resume is None:
            stand_in = {name: value for name, value in given.items() if name != "stem_stride"}
            if "data" not in given:  # images are looked for afterwards
                stand_in |= {"data": "folder", "data_dirs": (".",)}
            settled(self, {**stand_in, "model": STAND_IN, "weights": path}, asked)
        from bgcbench.training.checkpoint import network_in  # torch

        found = {name: value for name, value in network_in(Path(path)).items() if value is not None}
        return {**found, **given, "model": found["model"], "weights": path}


def _is_path(model: str) -> bool:
    """Whether MODEL names a file, and not a network."""
    if FACTORY.fullmatch(model):
        return False
    is_below = bool(os.path.dirname(model)) and not model.startswith(TIMM_PREFIX)
    return is_below or model.endswith(CHECKPOINTS) or os.path.isfile(model)


def _network_lines(run: TrainRun[Any], *, full: bool) -> list[str]:
    """The networks of the plan; ``full``: with every convolution that is replaced or kept."""
    cells = {row.params.choice.label: row for row in run.planned}
    lines = [
        f"  {label}: {row.counts.params:,} parameters, {row.counts.macs / 1e6:,.1f} M MACs an image, "
        f"{len(row.convert.replaced)} convolutions replaced, {len(row.convert.kept)} kept"
        for label, row in cells.items()
    ]
    choices: list[tuple[Any, Any]] = []
    for label, row in cells.items() if full else ():
        choice = row.convert.replaced, row.convert.kept
        if row.params.is_dense or choice in choices:  # the same convolutions, unless N does not divide some
            continue
        lines.append(f"{label}:" if choices else "convolutions:")
        lines += [f"  replaced: {name}" for name in row.convert.replaced]
        lines += [f"  kept: {kept.name} ({kept.reason})" for kept in row.convert.kept]
        choices.append(choice)
    return lines


def _text(value: Any) -> str:
    return "/".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def duration(seconds: float) -> str:
    """ "0.8 s", "12 s", "3:20 min", "5:04 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def _epoch_line(update: Update, epoch: Epoch, run: TrainRun[Any]) -> str:
    """One epoch, for a log."""
    error, best = epoch.test_error, run.known[update.row.key].error_best
    errors = "" if error is None else f", test error {error:.2f} %"
    errors += "" if best is None else f" (best {best:.2f} %)"
    speed = "" if epoch.images_per_s is None else f", {epoch.images_per_s:.0f} images/s"
    left = "" if update.left_s is None else f", {duration(update.left_s)} left"
    learnt = "".join(f", {name} {value:.1%}" for name, value in (epoch.learnt or {}).items())
    return (
        f"{update.row.key} epoch {epoch.epoch}/{run.config.epochs}: lr {epoch.lr:.3g}, loss "
        f"{epoch.train_loss:.4f}{errors}{learnt}{speed}{left}"
    )


def _bar_text(update: Update, run: TrainRun[Any]) -> str:
    """What the bar shows: the row, its epoch, loss and error, images a second and the time left of the run."""
    parts = [f"{update.number + 1}/{update.count} {run.title(update.row)}"]
    progress = update.progress
    if update.doing:
        parts.append(update.doing)
    elif progress is not None:
        left = None if update.left_s is None else duration(update.left_s)
        shown = (
            ("epoch {}", f"{progress.epoch}/{progress.epochs}"),
            ("loss {:.3f}", progress.loss),
            ("error {:.2f} %", progress.error),
            ("{:.0f} images/s", progress.images_per_s),
            ("{} left", left),
        )
        parts += [text.format(value) for text, value in shown if value is not None]
    return "  ".join(parts)


def _untrained_line(row: TransferRow) -> str:
    """One network before any training, for a log."""
    if row.status not in ("ok", "interrupted"):
        return f"{row.key}: {row.status}: {row.reason}"
    parts = []
    if row.white_loss is not None and row.white_loss.layers:
        lost = statistics.median(layer.loss for layer in row.white_loss.layers)
        parts.append(f"its layers lose {lost:.1%} of their output (median)")
    elif row.convert_seconds is not None:
        parts.append(f"converted in {duration(row.convert_seconds)}")
    if row.error_initial is not None:
        parts.append(f"test error {row.error_initial:.2f} %{' before any training' * bool(row.params.epochs)}")
    if row.agreement_initial is not None:
        parts.append(f"agrees with the untouched network on {row.agreement_initial:.2f} %")
    return f"{row.key}: {', '.join(parts) or row.stage or 'as it is'}"
