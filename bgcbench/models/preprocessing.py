"""How a network's images are prepared, as its library states it: torchvision's transforms, timm's configuration."""

from __future__ import annotations

import math
from typing import Any

import torchvision

from bgcbench.errors import UsageError
from bgcbench.models.zoo import timm_config
from bgcbench.specs import TIMM_PREFIX, Pair, Preprocessing

# Not the enum's DEFAULT: the balanced-group paper starts from 23.87 % error, which V1 has; this vit_h_14 takes 224 px.
_CHOSEN = {"resnet50": "IMAGENET1K_V1", "vit_h_14": "IMAGENET1K_SWAG_LINEAR_V1"}


def published(name: str) -> Any:
    """torchvision's enum member with the weights to use for the network ``name``; None where there are none."""
    return getattr(members(name), _CHOSEN.get(name, "DEFAULT"), None)


def members(name: str) -> Any:
    """All of torchvision's published weights of the network ``name``, an enum; empty where there are none."""
    known = name in torchvision.models.list_models(module=torchvision.models)
    return torchvision.models.get_model_weights(name) if known else ()


def of_published(weights: Any, source: str = "weights") -> Preprocessing:
    """What torchvision's ``weights``, a member of such an enum, are evaluated with."""
    stated = weights.transforms()
    (side,), (short,) = stated.crop_size, stated.resize_size
    return Preprocessing(
        (side, side), tuple(stated.mean), tuple(stated.std), (short, short), stated.interpolation.value, source=source
    )


def stated(name: str) -> Preprocessing | None:
    """What its library states for the network ``name``; None where it has no library, or that says nothing.

    Raises UsageError where timm is missing or does not know it, or prepares images in a way that is not offered here.
    """
    if not name.startswith(TIMM_PREFIX):
        weights = published(name)
        return None if weights is None else of_published(weights, "library")
    found = timm_config(name)
    if found["crop_mode"] == "border":
        raise UsageError(f"{name} is given images with a border around them, which bgcbench does not make; use another")
    _, height, width = found["input_size"]
    high, wide = (math.floor(side / found["crop_pct"]) for side in (height, width))
    return Preprocessing(
        (height, width),
        tuple(found["mean"]),
        tuple(found["std"]),
        (high, wide),
        found["interpolation"],
        found["crop_mode"],
        "library",
    )


def own_size(name: str) -> Pair | None:
    """(height, width) in px of the images that the network ``name`` is made for; None where no library states it."""
    if name.startswith(TIMM_PREFIX):
        _, height, width = timm_config(name)["input_size"]
        return height, width
    weights = published(name)
    return None if weights is None else of_published(weights).size
