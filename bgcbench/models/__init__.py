"""Networks by name: the paper's own, and any classification network of torchvision or timm."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bgcbench.models import zoo
from bgcbench.models.own import build_own
from bgcbench.models.resnext import ResNeXt29
from bgcbench.models.wide_resnet import WideResNet34
from bgcbench.models.wrn import WideResNet
from bgcbench.specs import FACTORY, RESNEXT29, TIMM_PREFIX, WRN, NetSpec, is_own, may_run

__all__ = ["MODELS", "build_empty", "build_model", "identify"]


def _numbers(pattern: re.Pattern[str], name: str) -> tuple[int, int]:
    """The two numbers in the name of one of a family's networks."""
    first, second = pattern.findall(name)[0]
    return int(first), int(second)


# The first pattern that a name matches builds it; whatever matches none is torchvision's.
MODELS: dict[re.Pattern[str], Callable[[NetSpec], nn.Module]] = {
    WRN: lambda spec: WideResNet(*_numbers(WRN, spec.name), spec.classes),
    RESNEXT29: lambda spec: ResNeXt29(*_numbers(RESNEXT29, spec.name), spec.classes),
    re.compile("wide_resnet34_2"): lambda spec: WideResNet34(2, spec.classes),
    re.compile(f"{TIMM_PREFIX}.+"): zoo.build_timm,
    FACTORY: build_own,
    re.compile(".*"): zoo.build_torchvision,
}


def build_model(spec: NetSpec | str, **options: Any) -> nn.Module:
    """The untrained network that ``spec`` (or a name, with NetSpec's options) describes, on the CPU in fp32.

    Names: wrn_D_K, resnext29_CxWd, wide_resnet34_2, torchvision's classification networks, timm/NAME, and the function
    that makes one of your own, as net.py:make or package.module:make, which is called without arguments. It is
    initialised from torch's global random state. Raises UsageError for an unknown name, ShapeError for numbers that fit
    no network.
    """
    asked = NetSpec(may_run(spec), **options) if isinstance(spec, str) else spec
    build = next(build for pattern, build in MODELS.items() if pattern.fullmatch(asked.name))
    model = build(asked)
    if not is_own(asked.name):  # which no file may name, so that its record is none of how to build it
        model._bgcbench_source = asked.source  # type: ignore[assignment]
    return model


def build_empty(spec: NetSpec) -> nn.Module:
    """The network without numbers (on the meta device), or with them where its initialisation needs some."""
    if is_own(spec.name):  # it may read weights
        return build_model(spec)
    try:
        with torch.device("meta"):
            return build_model(spec)
    except NotImplementedError:
        with torch.random.fork_rng(devices=[]):
            return build_model(spec)


def identify(model: nn.Module) -> dict[str, Any] | None:
    """How :func:`build_model` makes a network like ``model`` (a 'source': NetSpec's arguments); None if it cannot.

    A network counts as alike where all its modules, their plain attributes and all its tensors' shapes agree, and it
    has no hooks. Nothing is guessed: the candidate is built, without numbers, and compared.
    """
    if any(_has_own_behaviour(module) for module in model.modules()):
        return None
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    outputs += [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][-1:]
    own = getattr(model, "_bgcbench_source", None)
    sources = [own] if own else []
    try:
        for name in zoo.candidates(model):
            sources += [NetSpec(name, num_classes=classes).source for classes in dict.fromkeys(reversed(outputs[-2:]))]
        signature = _signature(model)
        return next((source for source in sources if _skeleton(tuple(source.items())) == signature), None)
    except Exception:  # noqa: BLE001 - a library that cannot build its own network only means that we cannot either
        return None


def _signature(model: nn.Module) -> str:
    state = model.state_dict().items()
    shapes = {name: tuple(value.shape) if isinstance(value, torch.Tensor) else "?" for name, value in state}
    plain = (bool, int, float, str, tuple, type(None))
    attributes = [
        {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training" and isinstance(v, plain)}
        for module in model.modules()
    ]
    return f"{model!r}\n{shapes}\n{attributes}"


def _has_own_behaviour(module: nn.Module) -> bool:
    """Whether somebody has hung something onto the module that changes what it computes."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, kind) for kind in hooks)


@functools.lru_cache(maxsize=256)
def _skeleton(source: tuple[tuple[str, Any], ...]) -> str:
    """The signature of a network built from ``source``."""
    return _signature(build_empty(NetSpec(**dict(source))))
