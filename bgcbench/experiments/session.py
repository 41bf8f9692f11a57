"""The device of a run and what is recorded about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bgcbench.experiments.config import RunConfig
from bgcbench.measure.device import backend_state, check_combination, resolve_device, tf32_state
from bgcbench.measure.environment import describe_environment
from bgcbench.results import Json


@dataclass
class Session:
    """The device at hand, the ``environment`` and ``settings`` of the result file, and what the user should know."""

    device: torch.device
    environment: Json
    settings: Json
    warnings: list[str] = field(default_factory=list)


def open_device(config: RunConfig, name: str, *, mode: str = "eager", layout: str = "nchw", **settings: Any) -> Session:
    """Find the device ``name`` and describe it; nothing is computed on it yet. settings: others that a run sets.

    Raises DeviceError where the device asked for is not there, UsageError for what it cannot do.
    """
    device, warning = resolve_device(name)
    check_combination(device, config.precision, mode)
    with backend_state(config.precision, config.threads):
        shared = {
            "seed": config.seed,
            "precision": config.precision,
            "layout": layout,
            "tf32": tf32_state(),
            "cudnn_benchmark": True,
        }
        return Session(device, describe_environment(device), {**shared, **settings}, [warning] if warning else [])
