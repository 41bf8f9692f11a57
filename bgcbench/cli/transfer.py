"""``bgcbench transfer``: a trained network, converted, judged, and trained on for little."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgcbench.cli.common import (
    GRID,
    MEASURE,
    OUTPUT,
    WORKLOAD,
    Device,
    Exclude,
    Format,
    Include,
    Interpolation,
    Mean,
    Out,
    Plot,
    Quiet,
    Resize,
    SkipInvalid,
    Std,
    StemStride,
    Threads,
    WeightsKey,
    Where,
    app,
    images,
    names,
)
from bgcbench.cli.training import (
    RECIPE,
    Accumulate,
    Algorithm,
    Asked,
    Classes,
    Command,
    Compiled,
    DataDir,
    Download,
    DryRun,
    Flip,
    Gamma,
    GroupLasso,
    LabelSmoothing,
    Layout,
    Momentum,
    Nesterov,
    OneSeed,
    Pad,
    Precision,
    Resume,
    SaveEvery,
    Seeds,
    Subset,
    SyncBn,
    Workers,
    carry_out,
    duration,
    given_options,
    only_first_speaks,
    settled,
)
from bgcbench.errors import UsageError
from bgcbench.specs import TIMM_PREFIX

if TYPE_CHECKING:
    from bgcbench.experiments.session import Session
    from bgcbench.experiments.train_run import Update
    from bgcbench.experiments.transfer import TransferConfig
    from bgcbench.experiments.transfer_run import TransferRun
    from bgcbench.training.distributed import World

CONVERSION = "The conversion"
CHECKPOINTS = (".pt", ".pth")
STAND_IN = "resnet18"  # takes the place of a network whose name stands in a file that needs torch to be read


class _Transfer(Command):
    name = "transfer"
    missing = (
        "name a MODEL, such as resnet50, the checkpoint of a bgcbench train run, or a file to go on with: --resume FILE"
    )
    what_is_done = "do"
    on_top = "; conversions come on top, and so does --time"

    @property
    def config_type(self) -> type[TransferConfig]:
        from bgcbench.experiments.transfer import TransferConfig

        return TransferConfig

    def prepare(self, config: TransferConfig, world: World) -> Any:
        from bgcbench.experiments import closed_form, transfer_run

        return transfer_run.prepare(config, world) if self.is_estimated(config) else closed_form.prepare(config)

    def start(self, prepared: Any, session: Session, world: World, **options: Any) -> TransferRun:
        from bgcbench.experiments.closed_form import ClosedFormRun
        from bgcbench.experiments.transfer_run import TransferRun

        kind = TransferRun if self.is_estimated(prepared.config) else ClosedFormRun
        return kind(prepared, session, world, **options)

    def is_estimated(self, config: TransferConfig) -> bool:
        from bgcbench.experiments.transfer import NO_IMAGES

        return config.data != NO_IMAGES

    def check_places(self, config: TransferConfig, *, fresh: bool, replace: bool) -> None:
        from bgcbench.experiments.transfer import plan, room_to_save
        from bgcbench.specs import WEIGHTS

        super().check_places(config, fresh=fresh, replace=replace)
        weights = config.weights or ""
        if weights not in WEIGHTS and not os.path.exists(weights):
            raise UsageError(f"--weights {weights}: there is no such file; choose a file, {' or '.join(WEIGHTS)}")
        if config.save is not None:
            keys = [row.key for row in plan(config) if not row.is_dense]
            room_to_save(Path(config.save), keys, replace=replace or not fresh)

    def plan_lines(self, run: TransferRun) -> list[str]:
        from bgcbench.experiments.transfer import with_images

        config, prepared = run.config, run.prepared
        if not self.is_estimated(config):
            _, reasons = with_images({"data_dirs": config.data_dirs}, config.num_classes or 0, typed=False)
            return [
                *([f"no images: {'; '.join(reasons)}"] if reasons else []),
                f"plan: {config.model} without images, {len(run.todo)} of {len(run.rows)} rows by the closed form "
                f"(init {', '.join(config.inits)}), on {run.session.environment['device']['name']}; --data-dir DIR "
                "(train/ and val/, or val/ alone) adds errors and calibrated weights",
            ]
        lines = super().plan_lines(run)
        if config.data_dirs:
            lines.append(f"looked for images in {', '.join(config.data_dirs)}")
        calibrated = (
            f"{min(config.images, len(prepared.images))} images to calibrate with, " if config.calibrates else ""
        )
        lines.append(
            f"weights: {prepared.loaded.name}; {calibrated}init {', '.join(config.inits)}, batch norm "
            f"{'re-estimated' if config.rebn else 'as it is'}"
        )
        lines += prepared.told
        extras = ["the untouched network is trained too"] * config.control
        extras += ["its outputs are targets beside the labels"] * config.distill
        if extras or not config.epochs:
            lines.append("; ".join(extras) or "--epochs 0: conversions are judged, and nothing is trained")
        return lines

    def is_drawable(self, row: dict[str, Any]) -> bool:
        calibration = row["convert"].get("calibration") or {"layers": []}
        return row["error_initial"] is not None or bool(calibration["layers"])

    def line(self, update: Update, run: TransferRun) -> str | None:
        if update.doing == "converted":
            return _converted_line(run.known[update.row.key]) if run.prepared.loaded else None
        return _judged_line(update, run) if update.doing == "judged" else super().line(update, run)


@app.command(short_help="Convert a trained network, and train it on for little or not at all.")
def transfer(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="resnet50, any classification network of torchvision, wrn_28_10, timm/NAME, or the path of a dense "
            "checkpoint that bgcbench train wrote.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="default (torchvision's published ones), a file, or none (untrained, to try things out).",
            show_default="default",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="imagenet, folder, digits (extra: digits), cifar10, synthetic (speed only), the path of a folder with "
            "train/ and val/, or none: conversions by the closed form, of which nothing is judged.",
            show_default="imagenet or folder in --data-dir, ./data or ./imagenet, with train/ and val/ or val/ alone; "
            "else none",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    subset: Subset = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Height and width of the images: 224 or 224x160.",
            show_default="the checkpoint's, the data's or the network's",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    interpolation: Interpolation = None,
    weights_key: WeightsKey = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="table3: ResNet-50 on ImageNet as the paper converts it (copied weights, nothing re-estimated).",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="How the weights are found: calibrated (least squares on the network's own activations), white (the "
            "closed form for uncorrelated inputs), copy (the paper), scratch. A list compares them.",
            show_default="calibrated",
            rich_help_panel=CONVERSION,
        ),
    ] = None,
    rebn: Annotated[
        bool | None,
        typer.Option(
            "--rebn/--no-rebn",
            help="Estimate batch norm's statistics anew.",
            show_default="on",
            rich_help_panel=CONVERSION,
        ),
    ] = None,
    calibration_images: Annotated[
        int | None,
        typer.Option(
            help="Training images for both, without labels; one in four is held out to judge.",
            show_default="512",
            rich_help_panel=CONVERSION,
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the converted networks, as they end; bgcbench.load_converted reads them.",
            rich_help_panel=CONVERSION,
        ),
    ] = None,
    where: Where = None,
    include: Include = None,
    exclude: Exclude = None,
    stem_stride: StemStride = None,
    classes: Classes = None,
    variants: Annotated[
        str | None, typer.Option(help="Variants, or all.", show_default="gc,bgc", rich_help_panel=GRID)
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8,16", rich_help_panel=GRID)
    ] = None,
    seeds: Seeds = None,
    seed: OneSeed = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Train the untouched network alike: what more epochs do by themselves.",
            rich_help_panel=GRID,
        ),
    ] = False,
    time: Annotated[
        bool,
        typer.Option(
            "--time", help="Measure inference and a training step of each network, interleaved.", rich_help_panel=GRID
        ),
    ] = False,
    skip_invalid: SkipInvalid = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="paper (30 epochs at a constant rate), fast (that in bf16, channels_last, compiled).",
            show_default="paper",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="0 judges the conversions only.", show_default="30", rich_help_panel=RECIPE),
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill", help="The original network's outputs are targets beside the labels.", rich_help_panel=RECIPE
        ),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images a step, over all processes.", show_default="128", rich_help_panel=RECIPE),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", show_default="0.01", rich_help_panel=RECIPE)
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="multistep, onecycle, cosine or constant.", show_default="constant", rich_help_panel=RECIPE),
    ] = None,
    milestones: Annotated[
        str | None,
        typer.Option(
            help="Epochs after which the learning rate drops.",
            show_default="30, 60 and 80 % of multistep",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    gamma: Gamma = None,
    momentum: Momentum = None,
    nesterov: Nesterov = None,
    weight_decay: Annotated[float | None, typer.Option(show_default="1e-4", rich_help_panel=RECIPE)] = None,
    label_smoothing: LabelSmoothing = None,
    group_lasso: GroupLasso = None,
    pad: Pad = None,
    flip: Flip = None,
    precision: Precision = None,
    layout: Layout = None,
    compiled: Compiled = None,
    algorithm: Algorithm = None,
    device: Device = None,
    accumulate: Accumulate = None,
    sync_bn: SyncBn = False,
    workers: Workers = None,
    threads: Threads = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="A look: 64 images to calibrate with, 2 epochs of 512 images. No claim.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    dry_run: DryRun = False,
    plot: Plot = None,
    save_every: SaveEvery = None,
    out: Out = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace existing --out, --plot and --save files.", rich_help_panel=OUTPUT),
    ] = False,
    resume: Resume = None,
    form: Format = "auto",
    quiet: Quiet = False,
) -> int:
    """Convert a trained network to each variant, say what that costs in accuracy, and train it on to win it back.

    First the untouched network is judged, then every conversion, then each is trained (--epochs 0: none is). With
    calibrated weights most of the loss is won back without any training. Without images conversions are by the closed
    form, and the table says what each layer loses. A run that was stopped goes on with --resume and converts nothing
    twice.

    [bold]bgcbench transfer resnet50 --save networks[/bold]

    [bold]bgcbench transfer resnet50 --data imagenet --data-dir DIR --epochs 0 --init copy,white,calibrated[/bold]

    [bold]bgcbench transfer resnet50 --preset table3 --data-dir DIR --recipe fast --control[/bold]

    [bold]bgcbench transfer results/RUN.checkpoints/ROW/final-e0020-HASH.pt --data digits --save networks[/bold]
    """
    options = dict(locals())  # by the names of the parameters
    own = {
        **images(options),
        "weights": weights,
        "inits": names(init),
        "rebn": rebn,
        "calibration_images": calibration_images,
        "save": None if save is None else str(save),
        **{name: options[name] or None for name in ("distill", "control", "time")},
    }
    with only_first_speaks():
        given = _with_preset(given_options(options, own), preset)
        asked = Asked(out, resume, form, force, quiet, plot, dry_run)
        source = context.get_parameter_source("data_dir")
        typed = data_dir is not None and source is not None and source.name == "COMMANDLINE"
        if _is_path(given.get("model", "")):
            given = _from_checkpoint(given, asked)
        if resume in (None, "auto") and "model" in given:
            given = _with_images(given, asked, typed=typed)
        config, stored, output = settled(COMMAND, given, asked)
    return carry_out(COMMAND, context, config, stored, output, dry_run=dry_run)


def _with_preset(given: dict[str, Any], preset: str | None) -> dict[str, Any]:
    from bgcbench.experiments.train import as_folder
    from bgcbench.experiments.transfer import preset as with_preset

    return as_folder(given) if preset is None else with_preset(preset, given)


def _with_images(given: dict[str, Any], asked: Asked, *, typed: bool) -> dict[str, Any]:
    """``given`` with the images that are there, or for doing without; typed: whether --data-dir was."""
    from bgcbench.experiments.transfer import NO_IMAGES, with_images
    from bgcbench.specs import NetSpec

    classes = NetSpec(given["model"], given.get("num_classes")).classes
    found, _ = with_images(given, classes, typed=typed)
    if found["data"] == NO_IMAGES and asked.plot is not None:
        raise UsageError("--plot draws errors and calibrated layers, which need images: give --data-dir DIR")
    return found


def _is_path(model: str) -> bool:
    """Whether MODEL names a file, and not a network."""
    if model.endswith(CHECKPOINTS) or os.path.isfile(model):
        return True
    return bool(os.path.dirname(model)) and not model.startswith(TIMM_PREFIX)


def _from_checkpoint(given: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """``given`` with the network and the weights of the checkpoint that MODEL names.

    Everything else that can be wrong is said before torch is imported to read it. Raises UsageError.
    """
    path = given["model"]
    if "weights" in given:
        raise UsageError(f"MODEL {path} is a checkpoint and has its weights; leave --weights out")
    if os.path.isdir(path):
        raise UsageError(f"MODEL {path} is a folder; give a checkpoint in it, such as its final-*.pt")
    if not os.path.isfile(path):
        raise UsageError(f"MODEL {path} is not there; give a network's name, or a checkpoint that bgcbench train wrote")
    if asked.resume is None:
        stand_in = {name: value for name, value in given.items() if name != "stem_stride"}
        images = {} if "data" in given else {"data": "folder", "data_dirs": (".",)}  # they are looked for afterwards
        settled(COMMAND, {**stand_in, **images, "model": STAND_IN, "weights": path}, asked)
    from bgcbench.training.checkpoint import network_in  # torch

    found = {name: value for name, value in network_in(Path(path)).items() if value is not None}
    return {**found, **given, "model": found["model"], "weights": path}


def _converted_line(row: dict[str, Any]) -> str:
    """One network that was converted by the closed form, for a log."""
    if row["status"] != "ok":
        return f"{row['key']}: {row['status']}: {row['reason']}"
    losses = [layer["loss"] for layer in (row["white_loss"] or {}).get("layers") or ()]
    lost = f"its layers lose {statistics.median(losses):.1%} of their output (median)" if losses else "as it is"
    return f"{row['key']}: {lost}"


def _judged_line(update: Update, run: TransferRun) -> str:
    """One network before any training, for a log."""
    row = run.known[update.row.key]
    if row["status"] not in ("ok", "interrupted"):
        return f"{row['key']}: {row['status']}: {row['reason']}"
    error, agreement, took = row["error_initial"], row["agreement_initial"], row["convert_seconds"]
    parts = [] if took is None else [f"converted in {duration(took)}"]
    parts += (
        []
        if error is None
        else [f"test error {error:.2f} %{' before any training' if row['params']['epochs'] else ''}"]
    )
    parts += [] if agreement is None else [f"agrees with the untouched network on {agreement:.2f} %"]
    return f"{row['key']}: {', '.join(parts) or 'judged'}"


COMMAND = _Transfer()
