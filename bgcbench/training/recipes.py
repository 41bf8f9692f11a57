"""How networks are trained: the recipes and their learning rates. No torch here.

    digits  20 epochs of 64 images, one cycle up to 0.1: minutes on a CPU             (default for digits)
    paper   Lee, Park & Lee: 128 images, SGD with Nesterov momentum 0.9, steps of 0.1  (default elsewhere)
            small images, as CIFAR-10: 200 epochs, drops at 60, 120, 160, weight decay 5e-4
            large images, as ImageNet: 90 epochs, drops at 30, 60, weight decay 1e-4
    fast    the same optimisation, in bf16, channels_last and compiled

Transfer learning has recipes of its own under the last two names (Lee, Park & Lee, Table 3): 30 epochs of 128 images,
the same optimiser at a constant 0.01 (the paper names no schedule), weight decay 1e-4.

Weight decay acts on all parameters but learnt group assignments, there is no label smoothing, and fp32 is without TF32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from bgcbench.errors import UsageError
from bgcbench.specs import LAYOUTS, PRECISIONS, SMALL_IMAGE_PX, check_choice, check_positive

RECIPES = ("digits", "paper", "fast")
TRANSFER_RECIPES = ("paper", "fast")
SCHEDULES = ("multistep", "onecycle", "cosine", "constant")

# One cycle (Smith & Topin, 2019) in the form that torch.optim.lr_scheduler.OneCycleLR has by default.
_RISING, _START, _END = 0.3, 1 / 25, 1 / 25e4


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of a training; valid once constructed (raises UsageError or ShapeError).

    epochs: 0 trains nothing (transfer learning only). batch_size: images a step, over all processes. schedule:
    multistep (``lr`` times ``gamma`` for every one of ``milestones``, in epochs, that has passed), onecycle, cosine (to
    0) or constant. group_lasso: strength of the penalty that LGC's layers add to the loss. compile: torch.compile.
    """

    name: str
    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (60, 120, 160)
    gamma: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    group_lasso: float = 0.0
    precision: str = "fp32"
    layout: str = "nchw"
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("recipe", self.name, RECIPES)
        check_positive("epochs", self.epochs, 0)
        check_positive("batch_size", self.batch_size)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("layout", self.layout, LAYOUTS)
        for name, least, below in _RANGES:
            value = getattr(self, name)
            if not least <= value < below:
                top = "a number" if below == math.inf else f"below {below:g}"
                raise UsageError(f"--{name.replace('_', '-')} {value:g} must be at least {least:g} and {top}")
        if self.lr == 0:
            raise UsageError("--lr 0 trains nothing; give a positive learning rate")
        if self.nesterov and not self.momentum:
            raise UsageError("--momentum 0 has no Nesterov form; add --no-nesterov")
        if any(later <= earlier for earlier, later in zip(self.milestones, self.milestones[1:], strict=False)):
            raise UsageError(f"--milestones {_listed(self.milestones)} must rise from one to the next")
        outside = any(not 0 < mark < self.epochs for mark in self.milestones)
        if self.schedule == "multistep" and self.epochs and outside:
            raise UsageError(
                f"--milestones {_listed(self.milestones)} must lie between epoch 1 and the last but one of "
                f"{self.epochs}; give others, or other --epochs"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of an epoch-long ``steps``; counts on through the epochs."""
        total = self.epochs * steps
        if self.schedule == "multistep":
            return self.lr * self.gamma ** sum(mark * steps <= step for mark in self.milestones)
        if self.schedule == "cosine":
            return _between(self.lr, 0.0, step / total)
        if self.schedule == "onecycle":
            top = _RISING * total - 1
            if step <= top:
                return _between(self.lr * _START, self.lr, step / top)
            return _between(self.lr, self.lr * _END, (step - top) / (total - 1 - top))
        return self.lr


_RANGES = (
    ("lr", 0.0, math.inf),
    ("gamma", 0.0, math.inf),
    ("momentum", 0.0, 1.0),
    ("weight_decay", 0.0, math.inf),
    ("label_smoothing", 0.0, 1.0),
    ("group_lasso", 0.0, math.inf),
)
HYPER = tuple(field.name for field in fields(Recipe) if field.name != "name")


def _between(start: float, end: float, share: float) -> float:
    """From ``start`` to ``end`` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _listed(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def check_parts(batch: int, accumulate: int, processes: int) -> None:
    """Raise UsageError unless a batch can be divided among the processes, and each share into ``accumulate`` parts."""
    parts = processes * check_positive("accumulate", accumulate)
    if batch % parts:
        near = max(parts, round(batch / parts) * parts)
        split = [f"{processes} processes"] if processes > 1 else []
        split += [f"--accumulate {accumulate}"] if accumulate > 1 else []
        raise UsageError(f"--batch-size {batch} cannot be divided by {' x '.join(split)}; use --batch-size {near}")


def default_recipe(data: str) -> str:
    """The recipe of a data set where none is asked for."""
    return "digits" if data == "digits" else "paper"


def make_recipe(name: str, size_px: int, given: Mapping[str, Any]) -> Recipe:
    """The recipe ``name`` for images with sides of up to ``size_px``, with the hyper-parameters ``given`` in its place.

    With other ``epochs`` the milestones keep their share of the training. Raises UsageError or ShapeError.
    """
    check_choice("recipe", name, RECIPES)
    if name == "digits":
        recipe = Recipe(name, epochs=20, batch_size=64, schedule="onecycle", milestones=())
    elif size_px <= SMALL_IMAGE_PX:
        recipe = Recipe(name)
    else:
        recipe = Recipe(name, epochs=90, milestones=(30, 60), weight_decay=1e-4)
    check_positive("epochs", given.get("epochs", recipe.epochs))
    return _with(_accelerated(recipe), given)


def make_transfer_recipe(name: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe ``name`` of TRANSFER_RECIPES for a network that has been trained before; as ``make_recipe``.

    ``epochs`` may be 0.
    """
    check_choice("recipe", name, TRANSFER_RECIPES)
    recipe = Recipe(name, epochs=30, lr=0.01, schedule="constant", milestones=(), weight_decay=1e-4)
    return _with(_accelerated(recipe), given)


def _accelerated(recipe: Recipe) -> Recipe:
    """The recipe called 'fast' with what makes it so."""
    return replace(recipe, precision="bf16", layout="nhwc", compile=True) if recipe.name == "fast" else recipe


def _with(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the hyper-parameters ``given`` in place of its own, its milestones scaled to other epochs."""
    schedule = given.get("schedule", recipe.schedule)
    if schedule != "multistep" and given.get("milestones"):
        raise UsageError(f"--milestones is for --schedule multistep, and this is {schedule}; leave one of them out")
    if schedule != "multistep" and given.get("gamma", recipe.gamma) != recipe.gamma:
        raise UsageError(f"--gamma is for --schedule multistep, and this is {schedule}; leave one of them out")
    given = {"milestones": _scaled_milestones(recipe, schedule, given.get("epochs", recipe.epochs)), **given}
    return replace(recipe, **given)


def _scaled_milestones(recipe: Recipe, schedule: str, epochs: int) -> tuple[int, ...]:
    if schedule != "multistep":
        return ()
    own = recipe.milestones or (60, 120, 160)
    whole = recipe.epochs if recipe.milestones else 200
    marks = (round(mark * epochs / whole) for mark in own)
    return tuple(dict.fromkeys(mark for mark in marks if 0 < mark < epochs))
