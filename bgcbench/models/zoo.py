"""Networks of torchvision and timm, by name."""

from __future__ import annotations

import warnings
from typing import Any

import torchvision
from torch import nn

from bgcbench.errors import UsageError, did_you_mean, import_extra
from bgcbench.specs import TIMM_PREFIX, NetSpec

OURS = ("wrn_28_10", "resnext29_8x64d", "wide_resnet34_2")  # for suggestions


def torchvision_names() -> list[str]:
    """Every classification network of the installed torchvision."""
    return [name for name in torchvision.models.list_models(module=torchvision.models) if "quantized" not in name]


def build_torchvision(spec: NetSpec) -> nn.Module:
    """torchvision's network ``spec.name``, untrained; raises UsageError for a name that it does not have."""
    names = torchvision_names()
    if spec.name not in names:
        hint = did_you_mean(spec.name, [*names, *OURS])
        raise UsageError(
            f"unknown model '{spec.name}': {hint}there are wrn_D_K, resnext29_CxWd, wide_resnet34_2, "
            f"{TIMM_PREFIX}NAME and torchvision's {len(names)} classification networks, such as resnet50"
        )
    options: dict[str, Any] = {"num_classes": spec.num_classes, "weights": None}
    if spec.name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = torchvision.models.get_model(spec.name, **options)
    if spec.stem_stride is not None:
        stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stem.stride = (spec.stem_stride, spec.stem_stride)
    return model


def build_timm(spec: NetSpec) -> nn.Module:
    """timm's network ``spec.name``, untrained; raises UsageError where timm is missing or has no such network."""
    timm, name = _timm_with(spec.name)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=spec.num_classes)
    return model


def timm_config(name: str) -> dict[str, Any]:
    """What timm resolves of the images of the network ``name``: input_size, crop_pct, mean and so on.

    Raises as ``build_timm``.
    """
    timm, own = _timm_with(name)
    stated = timm.models.get_pretrained_cfg(own)
    config: dict[str, Any] = timm.data.resolve_data_config(
        pretrained_cfg=stated.to_dict() if stated else {"architecture": own}
    )
    return config


def _timm_with(prefixed: str) -> tuple[Any, str]:
    """timm and its own name of a network; raises UsageError where it has no such network, or no such weights of it."""
    timm = import_extra("timm", "timm is not installed; pip install 'bgcbench[timm]'")
    name = prefixed.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f"; near it: {', '.join(TIMM_PREFIX + found for found in near)}" if near else ""
        raise UsageError(f"timm has no network '{name}'{hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as problem:  # the part of the name behind its dot
        why = str(problem).rstrip(".")
        raise UsageError(f"{prefixed}: {why}; leave the tag out, or give one that timm has") from None
    return timm, name


def candidates(model: nn.Module) -> list[str]:
    """Names under which the libraries may know ``model``, by where its class comes from."""
    module = type(model).__module__
    if module.startswith("torchvision.models."):
        return [n for n in torchvision_names() if torchvision.models.get_model_builder(n).__module__ == module]
    if module.startswith("timm."):
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        architecture = config.get("architecture") if isinstance(config, dict) else None
        return [TIMM_PREFIX + architecture] if architecture else []
    return []
