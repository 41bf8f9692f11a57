"""How what is timed runs: in a mode of PyTorch's or in ONNX Runtime, and in a phase."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bgcbench.convs.base import VariantConv2d
from bgcbench.deployment.onnx_file import check_packages
from bgcbench.deployment.workload import RuntimeWorkload, runtime_file, runtime_layers
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing, copied_to
from bgcbench.measure.device import check_combination, compile_state
from bgcbench.measure.workload import Cell, NetworkWorkload, Workload, class_scores
from bgcbench.planning import PLAN_MODES
from bgcbench.specs import (
    EXPORTERS,
    NETWORK_PHASES,
    RUNTIME,
    TRAINED_AND_DEPLOYED,
    VARIANTS,
    check_choice,
    check_in_runtime,
)

# Seconds for each layer by itself, and for each convolution of a network, to be compiled or exported, roughly: forward
# on two CPU cores. A training step is compiled twice, forward and backward.
READY_S = {"eager": (0.0, 0.0), "compile": (1.5, 1.0), RUNTIME: (0.5, 1.5)}
Makers = Mapping[str, Callable[[], Cell]]  # by name, what makes a thing ready to be timed


@dataclass(frozen=True)
class Execution:
    """A mode and a phase; valid once constructed.

    mode: 'eager', 'compile' (torch.compile) or 'onnxruntime', as ``bgcbench profile`` measures them. phase: 'fwd', or
    'train_step': of a layer forward and backward, of a network the optimiser's step, too. Raises UsageError.
    """

    mode: str = "eager"
    phase: str = "fwd"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, PLAN_MODES)
        check_choice("phase", self.phase, NETWORK_PHASES)
        if self.mode == RUNTIME:
            check_in_runtime(phase=self.phase)
            check_packages(EXPORTERS[0])

    @property
    def trains(self) -> bool:
        return self.phase == "train_step"

    @property
    def state(self) -> AbstractContextManager[Any]:
        """To be entered around everything that runs."""
        return compile_state() if self.mode == "compile" else contextlib.nullcontext()

    def ready_s(self, layers: int, convolutions: int) -> float:
        """A rough guess of what it takes to make so many layers by themselves, and networks of so many, ready."""
        of_layer, of_convolution = READY_S[self.mode]
        return (2 if self.trains else 1) * (layers * of_layer + convolutions * of_convolution)

    def check(self, passing: Passing, example: Any, device: torch.device) -> None:
        """Raise UsageError where it cannot run a network on ``example`` (of ``Passing.of``) on ``device``."""
        check_combination(device, "fp32", self.mode)
        of_images = isinstance(example, tuple) and len(example) == 1 and isinstance(example[0], Tensor)
        if self != Execution() and (passing.forward is not None or not of_images):
            raise UsageError(
                f"mode='{self.mode}' with phase='{self.phase}' times networks that are called with one tensor of "
                "images; use mode='eager' and phase='fwd' for others, or wrap the network in a module that is"
            )

    def algorithm(self, variant: str) -> str:
        """The algorithm of a layer of ``variant`` that has just been made."""
        learnt = VARIANTS[variant].algorithms == TRAINED_AND_DEPLOYED
        return "deployed" if self.mode == RUNTIME and learnt else "auto"

    def own(self, model: nn.Module) -> nn.Module:
        """The network to run: ``model`` itself, or a copy where running it changes it."""
        return copy.deepcopy(model).requires_grad_(requires_grad=True) if self.trains else model

    def layers(self, layers: Mapping[str, VariantConv2d], x: Tensor) -> Makers:
        """What makes each of ``layers`` ready to run on ``x``, whose gradient is taken if it asks for one."""
        if self.mode != RUNTIME:
            phase = "fwd_bwd" if self.trains else "fwd"
            return {name: partial(self._ready, Workload(each, x, self.mode), phase) for name, each in layers.items()}
        x = x.contiguous()
        with contextlib.suppress(Exception):  # one by one it is known which of them cannot be
            return {name: partial(_made, cell) for name, cell in runtime_layers(layers, x)}
        return {name: partial(self._in_runtime, each, x) for name, each in layers.items()}

    def network(self, model: nn.Module, passing: Passing, example: Any) -> Cell:
        """``model`` (see :meth:`own`) ready to run on ``example``."""
        if self == Execution():
            return Cell(partial(passing, model, example), context=torch.inference_mode)
        (x,) = copied_to(example, model)
        if self.mode == RUNTIME:
            return self._in_runtime(model, x)
        with torch.no_grad():
            scores = class_scores(model(x))
        if not scores or scores[0].dim() != 2:
            raise UsageError("the network gives no row of class scores for each image")
        labels = torch.arange(len(x), device=x.device) % scores[0].shape[1]
        return self._ready(NetworkWorkload(model, x, self.mode, labels=labels), self.phase)

    def _ready(self, workload: Workload, phase: str) -> Cell:
        """After a first call, which compiles, and finds algorithms."""
        cell = workload.cell(phase)
        cell.once()
        cell.release()
        return cell

    def _in_runtime(self, module: nn.Module, x: Tensor) -> Cell:
        return RuntimeWorkload(runtime_file(module, x, "auto"), x).cell("fwd")


def _made(cell: Cell) -> Cell:
    return cell
