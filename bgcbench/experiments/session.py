"""The device of a run and what is recorded about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from bgcbench.deployment.onnx_file import check_packages
from bgcbench.experiments.config import RunConfig
from bgcbench.measure import runtime
from bgcbench.measure.device import backend_state, check_combination, resolve_device, tf32_state
from bgcbench.measure.environment import describe_environment
from bgcbench.results import Json
from bgcbench.results.rows import Environment, Settings
from bgcbench.specs import EXPORTERS, RUNTIME


@dataclass
class Session:
    """The device at hand, its ``environment`` for the result file, and what the user should know.

    settings: what the run sets on purpose, to which opening the data adds.
    """

    device: torch.device
    environment: Environment
    settings: Json
    warnings: list[str] = field(default_factory=list)

    @property
    def conditions(self) -> Settings:
        """The settings as the result file has them."""
        return msgspec.convert(self.settings, Settings)


def open_device(
    config: RunConfig, name: str, *, modes: Sequence[str] = ("eager",), layout: str = "nchw", **settings: Any
) -> Session:
    """Find the device ``name`` and describe it; nothing is computed on it yet. settings: others that a run sets.

    Raises DeviceError where the device asked for is not there, UsageError for what it cannot do and for a package that
    a mode needs.
    """
    if RUNTIME in modes:
        check_packages(EXPORTERS[0])
        settings |= {"runtime": f"onnxruntime {runtime.version()}"}
    device, warning = resolve_device(name)
    for mode in modes:
        check_combination(device, config.precision, mode)
    with backend_state(config.precision, config.threads):
        shared = {
            "seed": config.seed,
            "precision": config.precision,
            "layout": layout,
            "tf32": tf32_state(),
            "cudnn_benchmark": True,
        }
        environment = msgspec.convert(describe_environment(device), Environment)
        return Session(device, environment, {**shared, **settings}, [warning] if warning else [])
