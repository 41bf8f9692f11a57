"""``bgcbench train``: the same network with each variant, trained alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bgcbench.cli.common import (
    GRID,
    MEASURE,
    WORKLOAD,
    Device,
    Exclude,
    Force,
    Format,
    Include,
    NoReference,
    Out,
    Plot,
    Quiet,
    SkipInvalid,
    StemStride,
    Threads,
    Where,
    app,
)
from bgcbench.cli.training import (
    RECIPE,
    Accumulate,
    Algorithm,
    Asked,
    Classes,
    Command,
    Compiled,
    Data,
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
    given_options,
    only_first_speaks,
    settled,
)
from bgcbench.errors import UsageError

if TYPE_CHECKING:
    from bgcbench.experiments.session import Session
    from bgcbench.experiments.train import TrainConfig
    from bgcbench.experiments.train_run import Prepared, TrainRun
    from bgcbench.training.distributed import World


class _Train(Command):
    name = "train"
    missing = "name a MODEL to train, such as wrn_10_2, or a file to go on with: --resume FILE"
    what_is_done = "train"

    @property
    def config_type(self) -> type[TrainConfig]:
        from bgcbench.experiments.train import TrainConfig

        return TrainConfig

    def prepare(self, config: TrainConfig, world: World) -> Prepared:
        from bgcbench.experiments.train_run import prepare

        return prepare(config, world)

    def start(self, prepared: Prepared, session: Session, world: World, **options: Any) -> TrainRun:
        from bgcbench.experiments.train_run import TrainRun

        return TrainRun(prepared, session, world, **options)


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
    data: Data = None,
    data_dir: DataDir = None,
    download: Download = False,
    subset: Subset = None,
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
    classes: Classes = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Variants, or all.", show_default="standard,gc,bgc", rich_help_panel=GRID),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Group counts N.", show_default="2,4,8", rich_help_panel=GRID)
    ] = None,
    seeds: Seeds = None,
    seed: OneSeed = None,
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
    gamma: Gamma = None,
    momentum: Momentum = None,
    nesterov: Nesterov = None,
    weight_decay: Annotated[
        float | None, typer.Option(show_default="5e-4; ImageNet 1e-4", rich_help_panel=RECIPE)
    ] = None,
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
        bool, typer.Option("--quick", help="A look: 2 epochs of 512 images. No claim.", rich_help_panel=MEASURE)
    ] = False,
    dry_run: DryRun = False,
    plot: Plot = None,
    save_every: SaveEvery = None,
    out: Out = None,
    force: Force = False,
    resume: Resume = None,
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
    options = dict(locals())  # by the names of the parameters
    with only_first_speaks():
        given = given_options(options, {"reference": False if no_reference else None})
        if no_reference and (1 in given.get("groups", ()) or "standard" in (variants or "").split(",")):
            raise UsageError(
                "--no-reference leaves the standard convolution out, and it is asked for; drop one of the two"
            )
        given = _with_preset(given, preset)
        asked = Asked(out, resume, form, force, quiet, plot, dry_run)
        config, stored, output = settled(COMMAND, given, asked)
    return carry_out(COMMAND, context, config, stored, output, dry_run=dry_run)


def _with_preset(given: dict[str, Any], preset: str | None) -> dict[str, Any]:
    from bgcbench.experiments.train import as_folder
    from bgcbench.experiments.train import preset as with_preset

    return as_folder(given) if preset is None else with_preset(preset, given)


COMMAND = _Train()
