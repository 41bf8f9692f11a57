"""The device of a run and what is recorded about it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bgcbench.results import Json


@dataclass
class Session:
    """The device at hand, the ``environment`` and ``settings`` of the result file, and what the user should know."""

    device: torch.device
    environment: Json
    settings: Json
    warnings: list[str] = field(default_factory=list)
