"""``bgcbench export``: from a file that bgcbench has written to one that runs without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.conversion.convert import load_converted
from bgcbench.conversion.record import record_in
from bgcbench.errors import ResultFileError, UsageError, reason_of
from bgcbench.models import build_model
from bgcbench.specs import NetSpec
from bgcbench.training.checkpoint import network_in


def load_network(path: Path) -> tuple[nn.Module, tuple[int, int, int] | None]:
    """The network in ``path``, in eval mode, and the size of its images where the file says so.

    path: what ``save_converted``, ``plan --save`` or ``transfer --save`` wrote, or a checkpoint of ``train`` or
    ``transfer``. Raises ResultFileError for any other file.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - the readers below know what to say of it
        stored = None
    if isinstance(stored, dict) and "record" in stored:
        model = load_converted(path)
        return model, record_in(stored).size
    try:
        found = network_in(path)
    except ResultFileError:
        raise ResultFileError(
            f"{path} holds no network that bgcbench wrote: give a file of transfer --save, plan --save, save_converted "
            "or a checkpoint of train; for a network of your own there is bgcbench.export in Python"
        ) from None
    spec = NetSpec(**{("name" if name == "model" else name): value for name, value in found.items()})
    model = build_model(spec)
    try:
        model.load_state_dict(stored["model"])
    except RuntimeError as problem:
        raise ResultFileError(f"{path} does not fit {spec.name}: {reason_of(problem)}") from None
    return model.eval(), spec.size


def read_inputs(path: Path) -> Tensor:
    """The tensor (B, ...) in a file of ``torch.save`` or ``numpy.save``; raises UsageError for anything else."""
    try:
        if path.suffix == ".npy":
            import numpy

            found: Any = torch.from_numpy(numpy.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        why = reason_of(problem)
        raise UsageError(f"--inputs {path} cannot be read ({why}); save a tensor with torch.save") from problem
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise UsageError(f"--inputs {path} holds no tensor of images (B, C, H, W); save one with torch.save")
    return found
