"""bgcbench: which convolutions can be made cheaper, with which variant, how much time it saves and what it loses.

The public names below are loaded on first use, so that ``import bgcbench`` and ``bgcbench --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bgcbench.specs import VARIANTS

__version__ = "0.1.0"

_HOMES = {
    **{name: home for home, name in (variant.layer.split(":") for variant in VARIANTS.values())},
    "BgcbenchError": "bgcbench.errors",
    "ConvSpec": "bgcbench.specs",
    "Converted": "bgcbench.conversion.record",
    "LayerError": "bgcbench.conversion.approximability",
    "Choice": "bgcbench.specs",
    "Plan": "bgcbench.planning.decision",
    "Views": "bgcbench.data.views",
    "approximability": "bgcbench.conversion.approximability",
    "build_conv": "bgcbench.convs",
    "build_model": "bgcbench.models",
    "convert": "bgcbench.conversion.convert",
    "export": "bgcbench.deployment.export",
    "fold_norms": "bgcbench.conversion.folding",
    "load_converted": "bgcbench.conversion.convert",
    "parameter_groups": "bgcbench.convs.masked",
    "plan": "bgcbench.planning.plan",
    "profile": "bgcbench.profiling",
    "save_converted": "bgcbench.conversion.convert",
}

_MODULES = {"calibration": "bgcbench.conversion.calibration"}  # used by its name: bgcbench.calibration.reestimate_norms

__all__ = [
    "BalancedGroupConv2d",
    "BgcbenchError",
    "Choice",
    "ConvSpec",
    "Converted",
    "FullyLearnableGroupConv2d",
    "GroupConv2d",
    "LayerError",
    "LearnedGroupConv2d",
    "LowRankConv2d",
    "Plan",
    "ShuffleGroupConv2d",
    "StandardConv2d",
    "TwoLevelGroupConv2d",
    "Views",
    "__version__",
    "approximability",
    "build_conv",
    "build_model",
    "calibration",
    "convert",
    "export",
    "fold_norms",
    "load_converted",
    "parameter_groups",
    "plan",
    "profile",
    "save_converted",
]

if TYPE_CHECKING:
    from bgcbench.conversion import calibration
    from bgcbench.conversion.approximability import LayerError, approximability
    from bgcbench.conversion.convert import convert, load_converted, save_converted
    from bgcbench.conversion.folding import fold_norms
    from bgcbench.conversion.record import Converted
    from bgcbench.convs import build_conv
    from bgcbench.convs.bgc import BalancedGroupConv2d
    from bgcbench.convs.flgc import FullyLearnableGroupConv2d
    from bgcbench.convs.gc import GroupConv2d
    from bgcbench.convs.lgc import LearnedGroupConv2d
    from bgcbench.convs.lowrank import LowRankConv2d
    from bgcbench.convs.masked import parameter_groups
    from bgcbench.convs.shuffle import ShuffleGroupConv2d
    from bgcbench.convs.standard import StandardConv2d
    from bgcbench.convs.tlgc import TwoLevelGroupConv2d
    from bgcbench.data.views import Views
    from bgcbench.deployment.export import export
    from bgcbench.errors import BgcbenchError
    from bgcbench.models import build_model
    from bgcbench.planning.decision import Plan
    from bgcbench.planning.plan import plan
    from bgcbench.profiling import profile
    from bgcbench.specs import Choice, ConvSpec


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOMES:
        raise AttributeError(f"module 'bgcbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
