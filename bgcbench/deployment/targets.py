"""The kinds of files that a network leaves in: how each is written, read again and looked into."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bgcbench
from bgcbench.deployment import code, onnx_file
from bgcbench.errors import BgcbenchError, reason_of
from bgcbench.measure.batches import tensors_of
from bgcbench.measure.runtime import CPU, Session
from bgcbench.specs import EXPORTERS

Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Inputs:
    """What a network is followed on: its arguments, their names, and which begin with a batch of any size."""

    args: tuple[Tensor, ...]
    names: tuple[str, ...]
    dynamic: tuple[bool, ...]

    @property
    def one(self) -> tuple[Tensor, ...]:
        """The arguments with one image, where the batch may have any size."""
        return tuple(arg[:1] if any_size else arg for arg, any_size in zip(self.args, self.dynamic, strict=True))


class Target(ABC):
    """One kind of file. what: for messages. way_out: what to try where it cannot be written."""

    what: str
    way_out: str

    @abstractmethod
    def contents(self, model: nn.Module, inputs: Inputs) -> list[bytes]:
        """The files' contents; raises whatever keeps ``model`` from being written."""

    @abstractmethod
    def opened(self, contents: Sequence[bytes]) -> Run:
        """What runs the files' network, as another program would."""

    @abstractmethod
    def nodes(self, contents: Sequence[bytes]) -> Mapping[str, int]:
        """How many of which operators there are, the most frequent first; raises BgcbenchError for custom ones."""

    def written(self, model: nn.Module, inputs: Inputs) -> list[bytes]:
        """``contents``; raises BgcbenchError that names the module that cannot be written, why, and what to try."""
        try:
            return self.contents(model, inputs)
        except Exception as problem:
            name, reason = self._culprit(model, inputs) or ("the network", reason_of(problem))
            raise BgcbenchError(f"{name} cannot be written as {self.what} ({reason}); try {self.way_out}") from problem

    def _culprit(self, model: nn.Module, inputs: Inputs) -> tuple[str, str] | None:
        """The smallest module that cannot be written by itself on what it is called with, and why; None if unknown."""
        called = _called_with(model, inputs)
        found, inside = None, model
        while True:
            for module in _called_below(inside, called):
                try:
                    self.contents(module, called[module])
                except Exception as problem:  # noqa: BLE001 - which is what is looked for
                    path = next(path for path, each in model.named_modules() if each is module)
                    found, inside = (f"{path} ({type(module).__name__})", reason_of(problem)), module
                    break
            else:
                return found


def _called_with(model: nn.Module, inputs: Inputs) -> dict[nn.Module, Inputs]:
    """What each module below ``model`` is called with first, where that is tensors alone."""
    found: dict[nn.Module, Inputs] = {}
    images = {len(arg) for arg, is_batched in zip(inputs.args, inputs.dynamic, strict=True) if is_batched}

    def see(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if args and not named and all(isinstance(arg, Tensor) for arg in args):
            dynamic = tuple(arg.dim() > 0 and len(arg) in images for arg in args)
            names = tuple(f"x{number}" for number in range(len(args)))
            found.setdefault(module, Inputs(tuple(arg.clone() for arg in args), names, dynamic))

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if module is not model:
                hooks.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
        model(*(arg.clone() for arg in inputs.args))
    return found


def _called_below(module: nn.Module, called: Mapping[nn.Module, Inputs]) -> Iterator[nn.Module]:
    """The first modules below ``module`` that are called: its children, and those of lists of modules."""
    for child in module.children():
        if child in called:
            yield child
        else:
            yield from _called_below(child, called)


@dataclass(frozen=True)
class OnnxTarget(Target):
    """An ONNX file, written by one of torch's exporters, run in ONNX Runtime on ``device``."""

    exporter: str
    opset: int
    device: torch.device = CPU

    def __post_init__(self) -> None:
        onnx_file.check_packages(self.exporter)

    @property
    def what(self) -> str:  # type: ignore[override]
        return f"ONNX by torch's exporter '{self.exporter}'"

    @property
    def way_out(self) -> str:  # type: ignore[override]
        return f"exporter '{next(name for name in EXPORTERS if name != self.exporter)}'"

    def contents(self, model: nn.Module, inputs: Inputs) -> list[bytes]:
        with torch.no_grad():
            count = len(list(tensors_of(model(*(arg.clone() for arg in inputs.args)))))
        outputs = ["output"] if count == 1 else [f"output{number}" for number in range(count)]
        names = [f"{name}_" if name in outputs else name for name in inputs.names]
        made = onnx_file.written(
            model, inputs.args, (names, outputs), inputs.dynamic, exporter=self.exporter, opset=self.opset
        )
        return [made]

    def opened(self, contents: Sequence[bytes]) -> Run:
        return Session(contents[0], self.device)

    def nodes(self, contents: Sequence[bytes]) -> Mapping[str, int]:
        return onnx_file.nodes_in(contents[0])


@dataclass(frozen=True)
class CodeTarget(Target):
    """A state dict and a module of torch.nn parts. stem: the files' name. network: what it is called in the code."""

    stem: str
    network: str
    what = "code of torch.nn parts"
    way_out = "'exported'"

    def contents(self, model: nn.Module, inputs: Inputs) -> list[bytes]:
        if type(model).__module__.startswith("torch.nn."):
            model = nn.Sequential(model)  # parts are used as they are, not looked into
        source, state = code.written(model, self.stem, self.network, bgcbench.__version__)
        return [_saved(state), source.encode()]

    def opened(self, contents: Sequence[bytes]) -> Run:
        state = torch.load(io.BytesIO(contents[0]), weights_only=True)
        return _without_gradients(code.run(contents[1].decode(), state))

    def nodes(self, contents: Sequence[bytes]) -> Mapping[str, int]:
        state = torch.load(io.BytesIO(contents[0]), weights_only=True)
        network = code.run(contents[1].decode(), state)
        return dict(Counter(type(part).__name__ for part in network.children()).most_common())


@dataclass(frozen=True)
class ProgramTarget(Target):
    """torch.export's program in its file."""

    what = "torch.export's program"
    way_out = "'onnx' with the exporter 'torchscript'"

    def contents(self, model: nn.Module, inputs: Inputs) -> list[bytes]:
        shapes = onnx_file.dynamic_shapes(inputs.dynamic)
        with torch.no_grad(), onnx_file.quiet():
            program = torch.export.export(model, inputs.args, dynamic_shapes=shapes, strict=False)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # from which line of whose source code it comes
        file = io.BytesIO()
        torch.export.save(program, file)
        return [file.getvalue()]

    def opened(self, contents: Sequence[bytes]) -> Run:
        return _without_gradients(torch.export.load(io.BytesIO(contents[0])).module())

    def nodes(self, contents: Sequence[bytes]) -> Mapping[str, int]:
        program = torch.export.load(io.BytesIO(contents[0]))
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        custom = {str(target) for target in called if getattr(target, "namespace", "aten") not in ("aten", "prims")}
        if custom:
            raise BgcbenchError(f"the program needs operators that are not torch's own: {', '.join(sorted(custom))}")
        return dict(Counter(str(getattr(target, "__name__", target)).split(".")[0] for target in called).most_common())


def _saved(state: Mapping[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save({name: value.clone() for name, value in state.items()}, file)
    return file.getvalue()


def _without_gradients(network: nn.Module) -> Run:
    def run(*args: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_of(network(*args)))

    return run
