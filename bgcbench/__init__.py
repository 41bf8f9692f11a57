"""bgcbench: which convolutions can be made cheaper, with which variant, how much time it saves and what it loses.

The public names below are loaded on first use, so that ``import bgcbench`` and ``bgcbench --help`` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "BalancedGroupConv2d": "bgcbench.convs.bgc",
    "BgcbenchError": "bgcbench.errors",
    "ConvSpec": "bgcbench.specs",
    "GroupConv2d": "bgcbench.convs.gc",
    "ShuffleGroupConv2d": "bgcbench.convs.shuffle",
    "StandardConv2d": "bgcbench.convs.standard",
    "build_conv": "bgcbench.convs",
}

__all__ = [
    "BalancedGroupConv2d",
    "BgcbenchError",
    "ConvSpec",
    "GroupConv2d",
    "ShuffleGroupConv2d",
    "StandardConv2d",
    "__version__",
    "build_conv",
]

if TYPE_CHECKING:
    from bgcbench.convs import build_conv
    from bgcbench.convs.bgc import BalancedGroupConv2d
    from bgcbench.convs.gc import GroupConv2d
    from bgcbench.convs.shuffle import ShuffleGroupConv2d
    from bgcbench.convs.standard import StandardConv2d
    from bgcbench.errors import BgcbenchError
    from bgcbench.specs import ConvSpec


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bgcbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
