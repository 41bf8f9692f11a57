"""A run's network with its weights, and its images, prepared as these were trained unless it is asked for otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import nn

from bgcbench.data.base import SourceT, prepared_as
from bgcbench.errors import UsageError
from bgcbench.experiments.config import NetworkChoice
from bgcbench.measure.trace import Trace, trace
from bgcbench.models import build_model
from bgcbench.models.own import class_count
from bgcbench.models.preprocessing import own_size
from bgcbench.models.weights import Weights, has_default
from bgcbench.specs import DEFAULT_PX, NetSpec, Preprocessing, is_own

Config = TypeVar("Config", bound=NetworkChoice)


def usual_weights(spec: NetSpec) -> str:
    """The weights of a network where none are asked for."""
    return "own" if is_own(spec.name) else "default" if has_default(spec) else "none"


def seeded(spec: NetSpec, seed: int) -> nn.Module:
    """The network of ``spec`` with the numbers that follow from ``seed``; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(spec)


def sized(config: Config, weights: Weights | None = None) -> Config:
    """``config`` with a size where none was asked for: that of the weights' images, or the network's own."""
    if config.height is not None:
        return config
    said = None if weights is None else weights.preprocessing
    height, width = said.size if said is not None else own_size(config.model) or (DEFAULT_PX, DEFAULT_PX)
    return dataclasses.replace(config, height=height, width=width)


def traced(model: nn.Module, spec: NetSpec) -> Trace:
    """What ``model``, the network of ``spec``, does on an image; raises UsageError where it takes none of that size."""
    try:
        found = trace(model, spec.size)
    except Exception as problem:
        _, height, width = spec.size
        own = own_size(spec.name)
        way_out = "try another --size" if own is None else f"its own --size is {own[0]}x{own[1]}"
        reason = (str(problem) or type(problem).__name__).splitlines()[0][:120]
        raise UsageError(f"{spec.name} takes no images of {height}x{width} px ({reason}); {way_out}") from problem
    if is_own(spec.name):
        class_count(model, spec)
    return found


def prepared_for(config: Any, images: SourceT, weights: Weights) -> SourceT:
    """``images`` as ``config`` (NetworkChoice and ImageChoice, with a size) asks for, or else as the weights need them.

    What a library states for a network is of ImageNet: images in memory that have the network's very classes are what
    it was trained on, and keep their own. Raises UsageError for numbers that do not go together.
    """
    own, said = images.preprocessing, weights.preprocessing
    in_memory = own.resize is None
    trained_on = in_memory and getattr(images, "num_classes", None) == config.num_classes
    if said is None or (said.source == "library" and trained_on):
        said = own
    elif said.resize is None:  # of images in memory, and these need not be
        said = dataclasses.replace(own, mean=said.mean, std=said.std, source=said.source)
    return prepared_as(images, dataclasses.replace(said.at((config.height, config.width)), **config.preparation))


def told(preprocessing: Preprocessing, weights: Weights) -> list[str]:
    """What to say of it before a run."""
    line = f"images: {preprocessing} ({Preprocessing.SOURCES[preprocessing.source]})"
    unsure = weights.contents is not None and preprocessing.source != "weights"
    return [line + ("; --mean, --std, --resize and --interpolation say others" if unsure else "")]


def warned(preprocessing: Preprocessing, weights: Weights, model: str) -> list[str]:
    """A warning where the images are not of the size that the weights are for."""
    said = weights.preprocessing
    if said is None or said.source != "weights" or said.size == preprocessing.size:
        return []
    (height, width), (high, wide) = said.size, preprocessing.size
    return [
        f"{weights.name} of {model} is for images of {height}x{width} px, and {high}x{wide} are used; --size "
        f"{height}x{width} is what it was trained with"
    ]
