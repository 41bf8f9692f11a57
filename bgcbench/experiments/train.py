"""``bgcbench train``: the same network with each variant, trained alike on one data set (Tables 5 and 6).

The configuration is pure Python; :mod:`bgcbench.experiments.train_run` trains.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from bgcbench.errors import UsageError
from bgcbench.experiments.config import ConvertedNetwork, RunConfig
from bgcbench.experiments.options import (
    GRID,
    MEASURE,
    OUTPUT,
    RECIPE,
    SIZE,
    WORKLOAD,
    Option,
    images,
    is_shard,
    listed,
    option,
    positive,
    shorthand,
    word,
)
from bgcbench.results import Json
from bgcbench.results.rows import PaperError, TrainParams, TrainRow
from bgcbench.specs import (
    DIGITS_PX,
    TRAINING_ALGORITHMS,
    TRAINING_SETS,
    UNLABELLED,
    VARIANTS,
    Choice,
    NetSpec,
    check_choice,
    check_on_cpu,
    is_own,
)
from bgcbench.theory import paper
from bgcbench.training.launcher import processes
from bgcbench.training.recipes import HYPER, Recipe, check_parts, default_recipe, make_recipe

CLASSES = {"digits": 10, "cifar10": 10, "imagenet": 1000}
IN_FILES = ("cifar10", "imagenet", "folder", UNLABELLED)  # data sets that are looked for in --data-dir
READ_BY_WORKERS = ("imagenet", "folder", UNLABELLED)
SIDES_PX = {"digits": DIGITS_PX, "cifar10": 32}
QUICK_EPOCHS, QUICK_IMAGES = 2, 512

RowT = TypeVar("RowT", bound=TrainRow)

# Data set and printed cells of Tables 5 and 6; a run trains one of their networks.
PRESETS = {"table5": ("cifar10", paper.TABLE5), "table6": ("imagenet", paper.TABLE6)}


@dataclass(frozen=True)
class TrainConfig(ConvertedNetwork, RunConfig):
    """One network, one data set, one recipe, the variants and seeds; valid once constructed.

    data: one of TRAINING_SETS; :func:`as_folder` makes 'folder' of a path. None is for what the recipe (see
    :class:`bgcbench.training.recipes.Recipe`), the network or the data set has; but for the data's, it is written out
    afterwards. val_alone: there are no images to train with, a part of the others calibrates (``bgcbench transfer``).
    Raises UsageError or ShapeError.
    """

    model: str = option(
        "resnet50",
        "wrn_10_2, wrn_28_10, resnext29_8x64d, wide_resnet34_2, any classification network of torchvision, or "
        "timm/NAME.",
    )
    num_classes: int | None = option(None, "Classes of synthetic data.", shown="the data's")
    groups: tuple[int, ...] = option((2, 4, 8))
    precision: str = option(
        "", "fp32, tf32, fp64; bf16 and fp16 are autocast.", panel=RECIPE, shown="fp32; fast bf16", read=word
    )
    quick: bool = option(False, "A look: 2 epochs of 512 images. No claim.")
    seed: int = option(0, hidden=True)
    data: str = option(
        "",
        "digits (extra: digits), cifar10, imagenet, folder, synthetic (speed only), or the path of a folder with "
        "train/ and val/, or your own: data.py:load.",
        short="d",
        panel=WORKLOAD,
        everyday=True,
        read=images((*TRAINING_SETS, "none")),
    )
    data_dirs: tuple[str, ...] = option(
        (), "Where it is looked for (repeatable).", name="data-dir", panel=WORKLOAD, everyday=True, kind=list[Path],
        read=listed, envvar="BGCBENCH_DATA_DIR",
    )  # fmt: skip
    download: bool = option(False, "Download CIFAR-10 into --data-dir first.", panel=WORKLOAD)
    recipe: str = option(
        None,
        "digits (20 epochs, one cycle), paper (section 5.2), fast (that in bf16, channels_last, compiled).",
        panel=RECIPE,
        everyday=True,
        shown="digits for digits, else paper",
        read=word,
    )
    epochs: int = option(None, panel=RECIPE, everyday=True, shown="20; paper 200, ImageNet 90")
    batch_size: int = option(None, "Images a step, over all processes.", panel=RECIPE, shown="64; paper 128")
    lr: float = option(None, "Learning rate.", panel=RECIPE, shown="0.1")
    schedule: str = option(
        None, "multistep, onecycle, cosine or constant.", panel=RECIPE, shown="onecycle; paper multistep", read=word
    )
    milestones: tuple[int, ...] = option(
        None,
        "Epochs after which the learning rate drops; scaled with --epochs where not given.",
        panel=RECIPE,
        shown="60,120,160; ImageNet 30,60",
    )
    gamma: float = option(None, "Factor of each drop.", panel=RECIPE, shown="0.1")
    momentum: float = option(None, panel=RECIPE, shown="0.9")
    nesterov: bool = option(None, panel=RECIPE, shown="on", flag="--nesterov/--no-nesterov")
    weight_decay: float = option(None, panel=RECIPE, shown="5e-4; ImageNet 1e-4")
    label_smoothing: float = option(None, panel=RECIPE, shown="0")
    group_lasso: float = option(None, "Strength of LGC's group lasso.", panel=RECIPE, shown="0")
    layout: str = option("", "nchw, or nhwc (channels_last).", panel=RECIPE, shown="nchw; fast nhwc", read=word)
    compile: bool = option(None, "torch.compile.", panel=RECIPE, shown="fast only", flag="--compile/--no-compile")
    algorithm: str = option(
        None,
        "Algorithm that layers run: fixed (the first, BGC and LR two_conv: the same bits in every run), auto (the "
        "fastest here, which each process measures), or BGC concat, dense, split, matmul (1x1), triton, LR dense, "
        "matmul.",
        panel=RECIPE,
        shown="fixed; fast auto",
        read=word,
    )
    pad: int | None = option(
        None, "Zeros around an image, in px, that crops are taken from.", panel=RECIPE, shown="digits 2, cifar10 4"
    )
    flip: bool | None = option(None, "Mirror half of them.", panel=RECIPE, shown="not digits", flag="--flip/--no-flip")
    accumulate: int = option(
        1, "Parts that a batch goes through the network in, for little memory.", panel=MEASURE, check=positive
    )
    sync_bn: bool = option(False, "Batch-norm statistics over all processes (CUDA, torchrun).", panel=MEASURE)
    shard: str | None = option(
        None,
        "K/M: only part K of M of the rows, as for a batch queue's array job; bgcbench merge joins the parts.",
        panel=GRID,
        check=is_shard,
    )
    seeds: tuple[int, ...] = option(
        (0,), "Each row is done once a seed: 0,1,2 gives mean and standard deviation.", panel=GRID, everyday=True
    )
    subset: int | None = option(None, "Train on so many images, all classes alike.", panel=WORKLOAD, shown="all")
    workers: int | None = option(None, "Processes that read image files.", panel=MEASURE, shown="one a core, at most 8")
    val_alone: bool = False
    save_every_s: float = option(300.0, "Seconds between checkpoints within an epoch.", name="save-every", panel=OUTPUT)
    reference: bool = option(True, "Leave the standard convolution out.", name="no-reference", panel=GRID)

    SHORTHANDS: ClassVar[tuple[Option, ...]] = (
        dataclasses.replace(
            SIZE,
            help="Height and width of the images: 224 or 224x160.",
            everyday=False,
            shown="the data's: 16 for digits, 32 for cifar10; else the network's",
        ),
        shorthand(
            "seed", ("seeds",), "The same for one seed.", kind=int, read=lambda name, one: (one,), panel=GRID, shown="0"
        ),
    )
    takes_unlabelled: ClassVar[bool] = False
    FREE: ClassVar[tuple[str, ...]] = ("data_dirs", "download", "threads", "workers", "save_every_s", "seed")
    # What --resume may add to or change, and --resume auto must find as it is.
    GRIDS: ClassVar[tuple[str, ...]] = ("variants", "groups", "ranks", "seeds")

    def __post_init__(self) -> None:
        self._check_data()
        self._settle("algorithm", "auto" if self.recipe == "fast" else "fixed")
        check_choice("algorithm", self.algorithm, TRAINING_ALGORITHMS)
        if self.quick:
            self._settle("epochs", QUICK_EPOCHS)
            self._settle("subset", QUICK_IMAGES)
        # How many classes a folder has is known when it is opened.
        unknown = self.num_classes is None and (self.data == "folder" or is_own(self.data))
        self._resolve_network()
        if unknown:
            object.__setattr__(self, "num_classes", None)
        for name, value in dataclasses.asdict(self._made()).items():  # so that a file says what ran
            object.__setattr__(self, "recipe" if name == "name" else name, value)
        self._check_own()
        self._check_device()
        object.__setattr__(self, "seed", self.seeds[0])
        super().__post_init__()
        self._settle_plan()
        self._check_rows()

    def _settle(self, name: str, value: Any) -> None:
        """Give a field that nothing was asked for its value."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_rows(self) -> None:
        if not self.cells:
            raise UsageError("nothing to train: --groups and --variants leave no row")

    def _check_data(self) -> None:
        """Raise UsageError for data that cannot be there; whether it is whole is seen when it is opened."""
        known = [name for name in TRAINING_SETS if name != UNLABELLED or self.takes_unlabelled]
        if not self.data:
            raise UsageError(f"--data is missing: choose from {', '.join(known)}, or give a folder of images")
        if not self.labelled and not self.takes_unlabelled:
            raise UsageError(f"--data {UNLABELLED} has nothing to train towards; bgcbench transfer --distill takes it")
        try:
            if not is_own(self.data):
                check_choice("data set", self.data, known)
        except UsageError as unknown:
            raise UsageError(f"{unknown}, or give the path of a folder with train/ and val/") from None
        if self.download and self.data != "cifar10":
            raise UsageError(f"--download is for cifar10, not for {self.data}; leave it out")
        if self.data in IN_FILES and not self.data_dirs:
            also = "; --download fetches it there" if self.data == "cifar10" else ""
            raise UsageError(f"--data {self.data} needs --data-dir DIR (or BGCBENCH_DATA_DIR), where it is{also}")
        if self.workers is not None and self.data not in READ_BY_WORKERS:
            raise UsageError(f"--workers reads image files, and {self.data} is held in memory; leave it out")
        if self.data in ("digits", "cifar10"):
            self.check_classes(CLASSES[self.data])

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return self.data != UNLABELLED

    def check_classes(self, found: int) -> None:
        """Raise UsageError unless a network for ``found`` classes, which the data has, is what is asked for."""
        if self.num_classes not in (None, found):
            raise UsageError(
                f"--classes {self.num_classes} does not go with --data {self.data}, which has {found}; leave --classes "
                "out"
            )

    def _check_device(self) -> None:
        """Raise UsageError for what a CPU cannot do, where it is asked for by name."""
        if self.device == "cpu":
            check_on_cpu(self.precision, "eager")
            if self.precision == "fp16":
                raise UsageError("--precision fp16 trains on CUDA devices only; on a CPU use bf16 or fp32")
            if self.sync_bn:
                raise UsageError("--sync-bn is for CUDA devices, PyTorch has none for a CPU; leave it out")

    def _check_own(self) -> None:
        """Raise UsageError for a number that no recipe checks."""
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            listed = ",".join(map(str, self.seeds))
            raise UsageError(f"--seeds {listed} must be whole numbers from 0 up, none twice")
        named = self.algorithm not in ("fixed", "auto")
        if named and not any(self.algorithm in self.algorithms_of(choice) for choice in self.choices):
            raise UsageError(f"--algorithm {self.algorithm}: no variant asked for has it; add bgc, or leave it out")
        names = (*self.variants, *(choice.variant for choice in self.planned.values()))
        if self.group_lasso and not any(VARIANTS[name].has_lasso for name in names):
            raise UsageError("--group-lasso is a penalty on lgc, which is not among --variants; leave it out")
        check_parts(self.hyper.batch_size, self.accumulate, processes())
        if self.subset is not None and self.subset < 1:
            raise UsageError(f"--subset {self.subset} must be a number of training images")
        if self.pad is not None and self.pad < 0:
            raise UsageError(f"--pad {self.pad} must be 0 or a number of pixels")
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers} must be 0 (read in this process) or a number of processes")
        if not self.save_every_s > 0:
            raise UsageError(f"--save-every {self.save_every_s:g} must be a positive number of seconds")

    def _made(self) -> Recipe:
        return make_recipe(self.recipe or default_recipe(self.data), max(self.spec.size[1:]), self._hyper_given())

    def _hyper_given(self) -> Json:
        """The hyper-parameters that were asked for."""
        given = {name: getattr(self, name) for name in HYPER}
        return {name: value for name, value in given.items() if value is not None and value != ""}

    @property
    def hyper(self) -> Recipe:
        """The recipe with every hyper-parameter as it was asked for."""
        return Recipe(self.recipe, **{name: getattr(self, name) for name in HYPER})

    def algorithm_of(self, variant: str) -> str:
        """The algorithm that layers of ``variant`` are built with, by name or 'auto'."""
        known = VARIANTS[variant]
        if self.algorithm in known.algorithms:
            return self.algorithm
        return known.algorithms[0] if known.measured and self.algorithm != "auto" else "auto"

    @property
    def spec(self) -> NetSpec:
        """The network; a data set of known classes and size decides both where they are not given."""
        classes = self.num_classes or CLASSES.get(self.data)
        height = self.height or SIDES_PX.get(self.data)
        return NetSpec(self.model, classes, height, self.width or (None if self.height else height), self.stem_stride)

    @property
    def cells(self) -> list[Choice]:
        """Of every row, the standard convolution first; it is N = 1 of all variants."""
        return [Choice()] * self.reference + self.choices

    @property
    def what(self) -> str:
        return f"{self.model.replace('/', '-')}-{self.data}"


def plan(config: TrainConfig) -> list[TrainRow]:
    """The rows of ``config``, undone: seed by seed, so that a run cut short has compared all variants once."""
    return [
        planned(
            TrainRow,
            f"{config.what}-{cell.key}-s{seed}",
            params_of(config, cell, seed, weights="none", init="scratch", epochs=config.epochs),
            paper.printed_error(config.data, config.model, cell.variant, cell.groups),
        )
        for seed in config.seeds
        for cell in config.cells
    ]


def params_of(config: TrainConfig, cell: Choice, seed: int, **others: Any) -> TrainParams:
    """The parameters of a row; others: those that ``config`` does not say."""
    names = ("model", "where", "recipe", "batch_size", "precision", "layout", "height", "width", "subset")
    return TrainParams(
        **{name: getattr(config, name) for name in names},
        dataset=config.data,
        classes=config.num_classes,
        **dataclasses.asdict(cell),
        algorithm=None if cell.is_planned else VARIANTS[cell.variant].settled(config.algorithm_of(cell.variant)),
        seed=seed,
        **{"rebn": False, "distill": False, **others},
    )


def planned(kind: type[RowT], key: str, params: TrainParams, printed: float | None) -> RowT:
    """A row of which nothing is done; printed: the paper's error."""
    unknown: Json = dict.fromkeys(("reason", "counts", "error_initial", "error_final", "error_best", "convert"))
    error = None if printed is None else PaperError(printed)
    return kind(key=key, params=params, status="interrupted", epochs=(), paper=error, **unknown)


def identity(config: TrainConfig, params: TrainParams) -> Json:
    """What a checkpoint of a row must agree on: all that its training depends on but the data's contents."""
    left_out = {*config.FREE, *config.GRIDS, "plan", "reference", "skip_invalid", "device", "quick", "save"}
    shared = {name: value for name, value in config.to_json().items() if name not in left_out}
    rank = {} if params.rank is None else {"rank": params.rank}  # a file of an older version has none
    plan = {"plan": config.plan} if params.choice.is_planned else {}
    return {**shared, **plan, "variant": params.variant, "groups": params.groups, **rank, "seed": params.seed}


def as_folder(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with a --data that is the path of a folder as the data set 'folder' in that place."""
    data = given.get("data")
    if data is None or data in TRAINING_SETS or is_own(data) or not (os.path.dirname(data) or os.path.exists(data)):
        return dict(given)
    return {**given, "data": "folder", "data_dirs": (data,)}


def preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with what ``--preset name`` fixes; raises UsageError where the two contradict each other."""
    check_choice("preset", name, PRESETS)
    data, cells = PRESETS[name]
    model = given.get("model")
    models = dict.fromkeys(printed for printed, _, _ in cells)
    if model not in models:
        raise UsageError(f"--preset {name} is for {', '.join(models)}; '{model}' is none of them")
    for field in ("data", "variants", "groups"):
        if field in given:
            raise UsageError(f"--preset {name} fixes --{field}; leave one of them out")
    groups = sorted({n for printed, _, n in cells if printed == model and n > 1})
    return {"data": data, "variants": paper.TABLE_VARIANTS, "groups": tuple(groups), "recipe": "paper", **given}
