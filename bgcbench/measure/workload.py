"""One module on one input as timeable phases: forward, backward, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.errors import UsageError

Like = tuple[torch.Size, tuple[int, ...]]


def _nothing() -> None:
    """Default of the hooks around a call."""


@dataclass
class Cell:
    """One timed thing. Only ``call`` is timed; ``prepare`` runs before each call, ``release`` after a batch.

    ``eager`` is the same work as Python would ask for it, where ``call`` replays a CUDA graph instead: the host's
    enqueue time and the memory of a step are its own.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    release: Callable[[], object] = _nothing
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    eager: Cell | None = None

    def once(self) -> None:
        """One prepared call."""
        with self.context():
            self.prepare()
            self.call()


class Workload:
    """Builds the cells of ``module`` on ``x``.

    x: the input, a leaf; whether its gradient is taken is x.requires_grad. mode: 'eager', 'compile'
    (torch.compile) or 'graph' (CUDA graph replay). The backward pass starts from a fixed random gradient in the
    output's own layout: ``y.sum()`` would hand over an expanded one of stride 0, which no network does. ``like`` is
    the output's size and stride where they are known; otherwise the first call finds them.
    """

    def __init__(self, module: nn.Module, x: Tensor, mode: str = "eager", like: Like | None = None) -> None:
        # fullgraph: a layer that cannot be compiled is an error, never an eager row under another name.
        self.module: Any = torch.compile(module, dynamic=False, fullgraph=True) if mode == "compile" else module
        self.plain = module
        self.x = x
        self.mode = mode
        self.leaves = [*module.parameters(), x]
        self._grad_out: Tensor | None = None
        self.like = like
        self.forms: dict[str, int] = {}  # how many layers run which algorithm, where something else has chosen them
        self._y: Tensor | None = None

    def cell(self, phase: str) -> Cell:
        """The cell of a phase: 'fwd' (inference mode), 'bwd' or 'fwd_bwd'; raises UsageError for another name."""
        cells = self._cells()
        if phase not in cells:
            raise UsageError(f"unknown phase '{phase}'")
        cell = cells[phase]
        if self.mode == "compile":
            # An eager call ahead of it: autotuned layers cannot measure while they are compiled.
            with cell.context():
                self._set_phase(phase)
                self.plain(self.x)
        return self._captured(phase, cell) if self.mode == "graph" else cell

    def _cells(self) -> dict[str, Cell]:
        return {
            "fwd": Cell(self._forward, context=torch.inference_mode),
            "bwd": Cell(self._backward, self._prepare_backward, self._release),
            "fwd_bwd": Cell(self._forward_backward, self._clear_gradients, self._release),
        }

    def _set_phase(self, phase: str) -> None:
        """Whatever the module must know of the phase; a single layer need not."""

    def _forward(self) -> object:
        return self.module(self.x)

    def _forward_backward(self) -> None:
        y = self.module(self.x)
        y.backward(self._gradient_like(y))

    def _backward(self) -> None:
        if self._y is not None:
            self._y.backward(self._gradient_like(self._y))

    def _prepare_backward(self) -> None:
        self._clear_gradients()
        self._y = self.module(self.x)

    def _clear_gradients(self) -> None:
        self._y = None
        for leaf in self.leaves:
            leaf.grad = None
        if self._grad_out is None and self.like is not None:
            # Made anew for each batch, so that a memory pass sees it appear; only the very first call makes it
            # inside the timed part, before its size is known.
            empty = torch.empty_strided(*self.like, dtype=self.x.dtype, device=self.x.device)
            self._grad_out = empty.normal_()

    def _release(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self._y = self._grad_out = None

    def _gradient_like(self, y: Tensor) -> Tensor:
        if self._grad_out is None:
            self._grad_out = torch.randn_like(y)
            self.like = (y.shape, y.stride())
        return self._grad_out

    def _captured(self, phase: str, eager: Cell) -> Cell:
        """``eager`` captured into CUDA graphs; a backward alone replays its forward outside the timed part.

        An output that is kept keeps the nodes of its backward pass, those of the leaves among them. They belong to the
        stream that they were made on, and a capture must not meet them: nothing is kept from one to the next.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager.once()
        torch.cuda.current_stream().wait_stream(side)
        self._clear_gradients()
        pool = torch.cuda.graph_pool_handle()
        if phase != "bwd":
            with eager.context():
                return Cell(call=capture(eager.call, pool), eager=eager)
        before, call = capture(self._prepare_backward, pool), capture(self._backward, pool)
        self._y = None
        return Cell(call=call, prepare=before, eager=eager)


def capture(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    """What replays the kernels of ``call``, captured into a CUDA graph with memory from ``pool``.

    Raises what ``call`` raises, or else what the capture does. PyTorch (2.11 at least) leaves the stream of a capture
    that failed the current one, and the allocator and the default generator waiting for its end: later captures,
    random numbers and releases of memory would fail. They are put back.
    """
    graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
    problem: Exception | None = None
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
            try:
                call()
            except Exception as failure:  # noqa: BLE001 - the capture has to end first
                problem = failure
    except RuntimeError as failure:
        problem = problem or failure
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the latter is 2.6's
        end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
        with suppress(RuntimeError):  # the allocator does not wait; the pool is the graph's to give back, then
            end(device, pool)
            torch._C._cuda_releasePool(device, pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
    if problem is not None:
        raise problem
    return graph.replay


class NetworkWorkload(Workload):
    """Builds the cells of a classification network on images ``x``: inference and a training step.

    'fwd' is the forward pass in eval and inference mode; 'train_step' is zero_grad, forward in training mode,
    cross-entropy in fp32 against random ``labels``, backward and an SGD step with momentum 0.9. Its learning rate is 0:
    all of the step's arithmetic is done, and the network that thousands of timed steps run is always the same one.
    Networks that return several scores (auxiliary heads) are trained on the sum of their losses.
    """

    def __init__(
        self, module: nn.Module, x: Tensor, mode: str = "eager", like: Like | None = None, *, labels: Tensor
    ) -> None:
        super().__init__(module, x, mode, like)
        self.labels = labels
        self.optimiser = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
        self._version = x._version

    def _cells(self) -> dict[str, Cell]:
        return {
            "fwd": Cell(self._forward, partial(self._prepare, "fwd"), context=torch.inference_mode),
            "train_step": Cell(self._step, partial(self._prepare, "train_step"), self._release),
        }

    def _set_phase(self, phase: str) -> None:
        self.plain.train(phase == "train_step")

    def _prepare(self, phase: str) -> None:
        if self.x._version != self._version:  # a network that normalises its images in place would make them grow
            self.x.normal_()
            self._version = self.x._version
        if self.plain.training != (phase == "train_step"):
            self._set_phase(phase)

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        total: Any = sum(F.cross_entropy(scores.float(), self.labels) for scores in class_scores(self.module(self.x)))
        total.backward()
        self.optimiser.step()

    def _clear_gradients(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)


def class_scores(output: Any) -> list[Tensor]:
    """The class scores in a network's output: one tensor, or several where it has auxiliary heads."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]
