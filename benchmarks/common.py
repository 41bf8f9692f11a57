"""What the benchmark scripts share: a layer as a workload, and a JSON file with the environment it ran in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bgcbench.convs import build_conv
from bgcbench.measure.device import random_input
from bgcbench.measure.environment import describe_environment
from bgcbench.measure.workload import Workload
from bgcbench.results import utc_now
from bgcbench.specs import ConvSpec

CPU = torch.device("cpu")


def workload(variant: str, groups: int, channels: int, size: int, batch: int) -> Workload:
    """A 3x3 layer of ``variant`` and its input, fp32 on the CPU."""
    spec = ConvSpec(variant, channels, channels, 3, padding=1, groups=groups, bias=False)
    x = random_input((batch, channels, size, size), CPU, torch.float32, "nchw", seed=0)
    return Workload(build_conv(spec), x.requires_grad_())


def save(path: Path, command: str, content: dict[str, Any]) -> None:
    """Write ``content`` with the time, the command and the environment beside it."""
    document = {"command": command, "finished_at": utc_now(), "environment": describe_environment(CPU), **content}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"saved {path}")
