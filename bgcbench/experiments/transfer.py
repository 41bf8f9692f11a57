"""``bgcbench transfer``: a trained network, converted, evaluated, and trained on for little (Table 3).

The configuration is pure Python; :mod:`bgcbench.experiments.transfer_run` converts and trains.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bgcbench.errors import OutputError, UsageError
from bgcbench.experiments import train
from bgcbench.experiments.config import ImageChoice, shared_fields
from bgcbench.experiments.options import CONVERSION, GRID, RECIPE, WORKLOAD, Option, one_of, option, word_or_path
from bgcbench.experiments.profile import NetworkConfig
from bgcbench.experiments.train import CLASSES, READ_BY_WORKERS, TrainConfig, params_of, planned
from bgcbench.results import Json
from bgcbench.results.rows import TrainParams, TransferRow
from bgcbench.specs import (
    FACTORY,
    HELD_OUT,
    OWN,
    SOLVED,
    TEST_SPLITS,
    TIMM_PREFIX,
    TRAIN_SPLIT,
    UNLABELLED,
    WEIGHTS,
    Choice,
    check_choice,
)  # fmt: skip
from bgcbench.theory import paper
from bgcbench.training.launcher import processes
from bgcbench.training.recipes import Recipe, make_transfer_recipe

INITS = ("copy", "white", *SOLVED, "scratch")
CALIBRATION_IMAGES, QUICK_CALIBRATION = 512, 64
IMAGENET_VAL = 50_000  # images: fewer are a part of ImageNet, whose errors are none of the paper's
CPU_BATCH = 32  # images that --time measures with at most on a CPU

PRESETS = ("table3",)
NO_IMAGES = "none"  # as --data: conversions by the closed form, nothing is evaluated
KEPT_IN = ("data", "imagenet")  # where images are looked for, in the current folder, unless --data-dir says where


@dataclass(frozen=True)
class TransferConfig(ImageChoice, TrainConfig):
    """One trained network, one data set, the ways to convert it and how to train on; valid once constructed.

    inits: see :func:`bgcbench.convert`. Without images (data NO_IMAGES) only white and copied weights can be, and
    nothing is estimated, evaluated or trained. Of images without labels (data 'unlabelled') the original's outputs are
    the only targets, and networks are evaluated by their agreement with it. The rest is as in ``bgcbench train``.
    Raises UsageError or ShapeError.
    """

    model: str = option(
        "resnet50",
        "resnet50, any classification network of torchvision, wrn_28_10, timm/NAME, or the path of a dense checkpoint "
        "that bgcbench train wrote.",
    )
    variants: tuple[str, ...] = option(("gc", "bgc"))
    groups: tuple[int, ...] = option(paper.GROUPS)
    device: str = option("auto", everyday=False)
    quick: bool = option(False, "A look: 64 images to calibrate with, 2 epochs of 512 images. No claim.")
    data: str = option(
        "",
        "imagenet, folder, digits (extra: digits), cifar10, synthetic (speed only), the path of a folder with train/ "
        "and val/, or of one without labels (unlabelled); or none: conversions by the closed form, of which nothing is "
        "evaluated.",
        shown="imagenet or folder in --data-dir, ./data or ./imagenet, with train/ and val/ or val/ alone; else none",
    )
    recipe: str = option(
        None,
        "paper (30 epochs at a constant rate), fast (that in bf16, channels_last, compiled).",
        everyday=False,
        shown="paper",
    )
    epochs: int = option(None, "0 evaluates the conversions only.", shown="30")
    batch_size: int = option(None, shown="128")
    lr: float = option(None, shown="0.01")
    schedule: str = option(None, shown="constant")
    milestones: tuple[int, ...] = option(
        None, "Epochs after which the learning rate drops.", shown="30, 60 and 80 % of multistep"
    )
    weight_decay: float = option(None, shown="1e-4")
    seeds: tuple[int, ...] = option((0,), everyday=False)
    reference: bool = option(True, hidden=True)
    shard: str | None = option(None, hidden=True)
    weights: str = option(
        None,
        "default (torchvision's published ones), a file, or none (untrained, to try things out).",
        panel=WORKLOAD,
        everyday=True,
        shown="default",
        read=word_or_path(WEIGHTS),
    )
    inits: tuple[str, ...] = option(
        ("calibrated",),
        "How the weights are found: calibrated (least squares on the network's own activations), refit (so are the "
        "convolutions that stay), white (the closed form for uncorrelated inputs), copy (the paper), scratch. A list "
        "compares them.",
        name="init",
        panel=CONVERSION,
        everyday=True,
        check=one_of(INITS, "init"),
    )
    rebn: bool = option(
        True, "Estimate batch norm's statistics anew.", panel=CONVERSION, shown="on", flag="--rebn/--no-rebn"
    )
    calibration_images: int = option(
        None,
        "Training images for both, without labels; one in four is held out to evaluate.",
        panel=CONVERSION,
        shown="512",
    )
    distill: bool = option(
        False, "The original network's outputs are targets beside the labels, or alone without any.", panel=RECIPE
    )
    control: bool = option(False, "Train the untouched network alike: what more epochs do by themselves.", panel=GRID)
    time: bool = option(False, "Measure inference and a training step of each network, interleaved.", panel=GRID)
    save: str | None = option(
        None,
        "A folder for the converted networks, as they end; bgcbench.load_converted reads them.",
        panel=CONVERSION,
        everyday=True,
    )

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(TrainConfig.SHORTHANDS[0], shown="the checkpoint's, the data's or the network's"),
        *TrainConfig.SHORTHANDS[1:],
    )
    takes_unlabelled: ClassVar[bool] = True
    # Beside training's: what changes no number that is there already.
    FREE: ClassVar[tuple[str, ...]] = (*TrainConfig.FREE, "weights", "inits", "control", "time")
    GRIDS: ClassVar[tuple[str, ...]] = (*TrainConfig.GRIDS, "inits", "weights", "control")

    def __post_init__(self) -> None:
        self._settle("weights", "own" if FACTORY.fullmatch(self.model) else "default")
        self._settle("calibration_images", QUICK_CALIBRATION if self.quick else CALIBRATION_IMAGES)
        self._check_images(self.weights, in_memory=self.data not in (*READ_BY_WORKERS, NO_IMAGES))
        super().__post_init__()
        known = CLASSES.get(self.data) or (
            self.num_classes if self.data in ("synthetic", UNLABELLED, NO_IMAGES) else None
        )
        if known is not None:
            self.check_weights(known)

    def _check_data(self) -> None:
        if self.data != NO_IMAGES:
            super()._check_data()

    def _check_rows(self) -> None:
        if self.data == NO_IMAGES:
            self._check_without_images()
        if self.val_alone and self.epochs:
            raise UsageError(
                f"--epochs {self.epochs} needs images to train with, and {self.data_dirs[0]} has no train/; add it, or "
                "say --epochs 0"
            )
        if not self.labelled:
            self._check_without_labels()
        if self.calibration_images < HELD_OUT:
            given = f"--calibration-images {self.calibration_images}"
            raise UsageError(f"{given} must be at least {HELD_OUT}: one in {HELD_OUT} is held out")
        if len(self.cells) < 2:
            raise UsageError("nothing to convert: --variants and --groups leave the standard convolution (N = 1) alone")
        for name in ("distill", "control") if not self.epochs else ():
            if getattr(self, name):
                raise UsageError(f"--{name} is about training, and --epochs 0 trains nothing; leave one of them out")
        if self.time and processes() > 1:
            raise UsageError(
                "--time measures one device by itself; leave it out under torchrun, and add it with --resume afterwards"
            )

    def _check_without_images(self) -> None:
        """Raise UsageError for what only images can give."""
        asked = [f"--init {init}" for init in self.inits if init not in ("white", "copy")]
        asked += [f"--{name}" for name in ("rebn", "distill", "control", "download") if getattr(self, name)]
        asked += [f"--{name} {getattr(self, name)}" for name in ("epochs", "subset", "workers") if getattr(self, name)]
        asked += [f"--{name.replace('_', '-')}" for name in self.preparation]
        if asked:
            raise UsageError(
                f"{asked[0]} needs images; give --data-dir DIR (or BGCBENCH_DATA_DIR) that has train/ and val/, or "
                "val/ alone"
            )
        if processes() > 1:
            raise UsageError("without images there is nothing to share among processes; leave torchrun out")

    def _check_without_labels(self) -> None:
        """Raise UsageError for what only labels can give."""
        if self.epochs and not self.distill:
            raise UsageError(
                f"--epochs {self.epochs} needs labels, and {self.data_dirs[0]} has none (train/ and val/ with a folder "
                "for each class); say --distill, which trains towards the original's outputs, or --epochs 0"
            )
        if self.control:
            raise UsageError("--control would train the original towards its own outputs; leave it out")
        if self.label_smoothing:
            raise UsageError(
                f"--label-smoothing {self.label_smoothing:g} is of labels, and there are none; leave it out"
            )

    def check_classes(self, found: int) -> None:
        if self.num_classes not in (None, found):
            raise UsageError(
                f"the network tells {self.num_classes} classes apart, and --data {self.data} has {found}; give the "
                "data that it was trained on"
            )

    def check_weights(self, classes: int) -> None:
        """Raise UsageError where there are no published weights for a network of so many classes."""
        if self.weights != "default":
            return
        way_out = "give weights with --weights FILE, or the checkpoint of a bgcbench train run as MODEL"
        if OWN.fullmatch(self.model) or self.model.startswith(TIMM_PREFIX):
            raise UsageError(f"--weights default: torchvision publishes no weights of {self.model}; {way_out}")
        if classes != CLASSES["imagenet"]:
            other = f"--classes {classes} is" if self.data == NO_IMAGES else f"--data {self.data} has {classes}"
            raise UsageError(
                f"--weights default: the published weights of {self.model} tell imagenet's {CLASSES['imagenet']:,} "
                f"classes apart, and {other}{' asked for' * (self.data == NO_IMAGES)}; {way_out}"
            )

    def _made(self) -> Recipe:
        return make_transfer_recipe(self.recipe or "paper", self._hyper_given())

    @property
    def what(self) -> str:
        return self.model.replace("/", "-") if self.data == NO_IMAGES else super().what

    @property
    def calibrates(self) -> bool:
        """Whether any conversion looks at images."""
        return self.rebn or not set(SOLVED).isdisjoint(self.inits)

    def costs(self, device: str) -> NetworkConfig:
        """What to measure on ``device`` for --time: the networks, in small batches on a CPU, by the fastest algorithm
        unless another one is asked for by name."""
        own = {
            "device": device,
            "phases": NetworkConfig.USUAL_PHASES,
            "algorithm": "auto" if self.algorithm in (None, "fixed") else self.algorithm,
            "batch": min(self.batch_size, CPU_BATCH) if device == "cpu" else self.batch_size,
            "mode": "compile" if self.compile else "eager",
        }
        return NetworkConfig(**{**shared_fields(self, NetworkConfig), **own})


def plan(config: TransferConfig, weights: str = "", images: int | None = None) -> list[TransferRow]:
    """The rows of ``config``: seed by seed the untouched network, then by N each variant with each initialisation.

    weights: their name, and images: how many there are to calibrate with; both are known when they have been opened.
    """
    return [
        _row(config, cell, init, seed, weights, images or config.calibration_images)
        for seed in config.seeds
        for cell in config.cells
        for init in (("none",) if cell.is_dense else config.inits)
    ]


def _row(config: TransferConfig, cell: Choice, init: str, seed: int, weights: str, images: int) -> TransferRow:
    converted = init != "none"
    rebn = converted and config.rebn
    trains = converted or config.control
    params = params_of(
        config,
        cell,
        seed,
        weights=weights,
        init=init,
        rebn=rebn,
        distill=config.distill and trains,
        epochs=config.epochs if trains else 0,
        calibration_images=images if rebn or init in SOLVED else None,
    )
    # Without images, conversions of a network for ImageNet's classes are compared with the paper's errors on it.
    of_imagenet = config.data == NO_IMAGES and config.num_classes == CLASSES["imagenet"]
    data = paper.TABLE3_DATA if of_imagenet else config.data
    printed = paper.transferred_error(data, config.model, cell.variant, cell.groups)
    how = f"-{init}-s{seed}{'' if rebn else '-norebn'}" if converted else f"-s{seed}"
    return planned(TransferRow, f"{config.what}-{cell.key}{how}", params, printed)


def identity(config: TransferConfig, params: TrainParams, weights_sha256: str | None) -> Json:
    """What a checkpoint of a row must agree on, as in training, and where the weights came from."""
    return {**train.identity(config, params), "init": params.init, "weights_sha256": weights_sha256}


def preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with what ``--preset name`` fixes; raises UsageError where the two contradict each other."""
    check_choice("preset", name, PRESETS)
    fixed: dict[str, Any] = {
        "model": paper.TABLE3_MODEL,
        "data": paper.TABLE3_DATA,
        "variants": tuple(dict.fromkeys(variant for variant, groups in paper.TABLE3 if groups > 1)),
        "groups": paper.GROUPS,
        "inits": ("copy",),
        "rebn": False,
    }
    options = {"model": "MODEL", "inits": "--init", "rebn": "--rebn"}
    for field, value in fixed.items():
        if given.get(field, value) != value:
            raise UsageError(f"--preset {name} fixes {options.get(field, f'--{field}')}; leave one of them out")
    return {"recipe": "paper", "weights": "default", **given, **fixed}


def with_images(given: Mapping[str, Any], classes: int, *, typed: bool) -> tuple[dict[str, Any], list[str]]:
    """``given`` with the images that are there, where it does not say which; or for doing without, and why that is.

    They are looked for in its data_dirs and in KEPT_IN, and in a folder imagenet in each. typed: whether data_dirs
    stand on the command line; then these must have some. Otherwise they must be of ``classes`` classes. Raises
    UsageError.
    """
    data, asked = given.get("data"), given.get("data_dirs", ())
    if data == UNLABELLED or (data == "folder" and asked and _is_unlabelled(Path(asked[0]))):
        return {"epochs": None if given.get("distill") else 0, **given, "data": UNLABELLED}, []
    if data not in (None, NO_IMAGES, "imagenet", "folder"):
        return dict(given), []
    if data and any(Path(folder, "train").is_dir() for folder in asked):
        return dict(given), []
    folders = (*asked, *(() if typed or (data and asked) else KEPT_IN))
    places = [Path(folder, below) for folder in folders for below in ("", "imagenet")] if data != NO_IMAGES else []
    tried = [_images_in(place, None if typed or data else classes) for place in places]
    reasons = [there for there in tried if isinstance(there, str)]
    for there in tried:
        if not isinstance(there, str):
            found = {**there, "data": data or there["data"]}
            return {**({"epochs": 0} if found["val_alone"] else {}), **given, **found}, []
    if data in ("imagenet", "folder"):
        return dict(given), []  # opening it says what is missing
    if typed and data is None:
        raise UsageError(f"--data-dir: {'; '.join(reasons)}; it has train/ and val/, or val/ alone, a folder a class")
    return {"epochs": 0, "inits": ("white",), "rebn": False, **given, "data": NO_IMAGES}, reasons


def _is_unlabelled(folder: Path) -> bool:
    """Whether no folder divides the images there, but the splits, and none those of a split."""
    try:
        below = [Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
        inside = [entry for split in below for entry in os.scandir(split) if entry.is_dir()]
    except OSError:
        return False  # opening it says why
    return not inside and {split.name for split in below} <= {TRAIN_SPLIT, *TEST_SPLITS}


def _images_in(folder: Path, classes: int | None) -> Json | str:
    """The data set in ``folder`` as fields of the configuration; or why there is none."""
    val = folder / "val"
    try:
        names = [entry.name for entry in os.scandir(val) if entry.is_dir() and not entry.name.startswith(".")]
        images = sum(len(os.listdir(val / name)) for name in names) if len(names) == CLASSES["imagenet"] else 0
    except OSError as problem:
        return f"{folder} has no val ({problem.strerror})" if folder.is_dir() else f"{folder} is not there"
    if not names:
        return f"{val} has no folders of classes"
    if classes is not None and len(names) != classes:
        return f"{val} has {len(names):,} classes, and the network tells {classes:,} apart"
    data = "imagenet" if images == IMAGENET_VAL else "folder"
    return {"data": data, "data_dirs": (str(folder),), "val_alone": not (folder / "train").is_dir()}


def room_to_save(folder: Path, names: Iterable[str], *, replace: bool) -> None:
    """Raise OutputError unless the files ``names`` can be written to ``folder``; nothing is made."""
    above = folder
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"--save {folder} cannot be written: {above} is no folder; choose one")
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise OutputError(f"--save {folder} cannot be written ({error.strerror or error}); choose another") from error
    there = [name for name in names if os.path.exists(folder / name)]
    if there and not replace:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise OutputError(f"--save {folder}: {there[0]}{more} exist; --force replaces them, or choose another folder")


def saved_name(key: str) -> str:
    """The name of the file that the network of a row is saved in."""
    return f"{key}.pt"
