"""What the benchmark scripts share: a layer as a workload, and a JSON file with the environment it ran in."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import torch

from bgcbench.convs import build_conv
from bgcbench.errors import DeviceError
from bgcbench.measure.device import random_input, resolve_device
from bgcbench.measure.environment import describe_environment
from bgcbench.measure.workload import Workload
from bgcbench.results import utc_now, write_atomically
from bgcbench.specs import ConvSpec

CPU = torch.device("cpu")


def find_device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device called ``name``; where it is not there, one line and the command line's own exit code."""
    try:
        return resolve_device(name)[0]
    except DeviceError as problem:
        parser.exit(problem.exit_code, f"{parser.prog}: {problem}\n")


def workload(variant: str, groups: int, channels: int, size: int, batch: int) -> Workload:
    """A 3x3 layer of ``variant`` and its input, fp32 on the CPU."""
    spec = ConvSpec(variant, channels, channels, 3, padding=1, groups=groups, bias=False)
    x = random_input((batch, channels, size, size), CPU, torch.float32, "nchw", seed=0)
    return Workload(build_conv(spec), x.requires_grad_())


def save(path: Path, command: str, content: dict[str, Any], device: torch.device = CPU) -> None:
    """Write ``content`` with the time, the command and the environment of ``device`` beside it, whole or not at all.

    ``content`` may bring the environment, which takes a moment to describe.
    """
    environment = content.get("environment") or describe_environment(device)
    document = {"command": command, "finished_at": utc_now(), "environment": environment, **content}
    write_atomically(path, (json.dumps(document, indent=1, default=msgspec.to_builtins) + "\n").encode())
    print(f"saved {path}")
