"""A layer or a network in ONNX Runtime as a timeable phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bgcbench.conversion.record import copied
from bgcbench.convs.base import VariantConv2d
from bgcbench.deployment.export import check_error, compared, written
from bgcbench.deployment.fastest import fastest_layers
from bgcbench.deployment.plain import counted, settled
from bgcbench.deployment.targets import Inputs, OnnxTarget
from bgcbench.errors import UsageError
from bgcbench.measure.batches import device_of
from bgcbench.measure.runtime import Session
from bgcbench.measure.workload import Cell, Workload
from bgcbench.specs import EXPORTERS, OPSET, RUNTIME


@dataclass(frozen=True)
class RuntimeFile:
    """An ONNX file that computes what its module does, and how many of its layers run which algorithm."""

    content: bytes
    forms: dict[str, int]


def runtime_file(module: nn.Module, x: Tensor, algorithm: str) -> RuntimeFile:
    """``module`` in eval mode on inputs like ``x``, as :func:`bgcbench.export` writes it.

    Raises what that does: BgcbenchError for what cannot be written or computes something else.
    """
    target = OnnxTarget(EXPORTERS[0], OPSET, x.device)
    module, x = _on_cpu(module), x.detach().cpu()
    inputs = Inputs((x,), ("x",), (False,))
    made = written(settled(module, (x,)), inputs, target, algorithm)
    with torch.no_grad():
        check_error(compared(module.eval(), target.opened(made.contents), [(x,)]).error, target)
    return RuntimeFile(made.contents[0], counted(made.algorithms.values()))


def runtime_layers(layers: Mapping[str, VariantConv2d], x: Tensor) -> Iterator[tuple[str, Cell]]:
    """The phase fwd of each of ``layers`` on ``x`` by itself: as of their files, but of one export, and never ``dense``
    where there is another algorithm.

    Raises what :func:`runtime_file` does.
    """
    target, here = OnnxTarget(EXPORTERS[0], OPSET, x.device), x.detach().cpu()
    own = {name: _on_cpu(layer).eval() for name, layer in layers.items()}
    ready = {name: made for name, layer in own.items() if isinstance(made := settled(layer, (here,)), VariantConv2d)}
    for name, session in fastest_layers(ready, here, target):
        with torch.no_grad():
            check_error(compared(own[name], session, [(here,)]).error, target)
        yield name, Cell(session.bound({session.inputs[0]: x}))


def _on_cpu(module: nn.Module) -> nn.Module:
    """The module, or its copy there."""
    return module if device_of(module).type == "cpu" else copied(module).cpu()


class RuntimeWorkload(Workload):
    """The forward pass of a file in ONNX Runtime on ``x``, which it reads where it lies."""

    def __init__(self, file: RuntimeFile, x: Tensor) -> None:
        super().__init__(nn.Identity(), x, RUNTIME)
        self.forms = dict(file.forms)
        self.session = Session(file.content, x.device)

    def cell(self, phase: str) -> Cell:
        """The cell of 'fwd'; raises UsageError for another name."""
        if phase != "fwd":
            raise UsageError(f"ONNX Runtime runs the phase fwd alone, not '{phase}'")
        return Cell(self.session.bound({self.session.inputs[0]: self.x}))
