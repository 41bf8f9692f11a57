"""Capturing CUDA graphs: what a capture must not meet, and what is left of one that fails. On pretended devices."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bgcbench.measure.workload import Workload, capture

INVALIDATED = "operation failed due to a previous error during capture"
POOL = (0, 7)


class Cuda:
    """What ``capture`` asks of torch.cuda. A capture that was spoilt fails as PyTorch's do, and leaves its stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing, self.spoilt = "default", False, False
        self.on_capture: Callable[[], None] = lambda: None
        self.ended: list[str] = []
        self.generator = SimpleNamespace(state="waiting")
        self.generator.clone_state = lambda: SimpleNamespace(state="fresh")
        self.generator.graphsafe_set_state = lambda other: setattr(self.generator, "state", other.state)
        side = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda: side, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "graph": self.graph,
            "current_stream": lambda: side, "stream": self.stream, "current_device": lambda: 0,
            "graph_pool_handle": lambda: POOL, "default_generators": (self.generator,),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: self.end(name, pool), raising=False)

    def end(self, name: str, pool: Any) -> None:
        assert pool == POOL
        self.ended.append(name)

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before = self.current
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph: Any, pool: Any) -> AbstractContextManager[None]:
        assert pool == POOL
        return _Capture(self)


class _Capture:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.cuda.on_capture()
        self.cuda.current, self.cuda.capturing = "capture", True

    def __exit__(self, *failure: object) -> None:
        self.cuda.capturing = False
        if self.cuda.spoilt:
            raise RuntimeError(INVALIDATED)
        self.cuda.current = "default"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_capture_meets_no_output_from_before_it_and_none_is_left_behind(cuda: Cuda) -> None:
    module, outside, inside = nn.Conv2d(2, 2, 1), [], []

    def see(_: nn.Module, __: Any, y: torch.Tensor) -> None:
        (inside if cuda.capturing else outside).append(weakref.ref(y))

    def none_alive() -> None:
        captures.append(len(inside))
        assert [ref() for ref in outside if ref() is not None] == []

    captures: list[int] = []
    module.register_forward_hook(see)
    cuda.on_capture = none_alive
    work = Workload(module, torch.randn(1, 2, 3, 3, requires_grad=True), "graph")
    for _ in range(2):
        for phase in ("fwd", "bwd", "fwd_bwd"):
            cell = work.cell(phase)
            assert [ref() for ref in inside if ref() is not None] == []
            cell.eager.once()  # as the host's time is taken; the output of the backward's stays
    assert len(captures) == 2 * 4  # a backward takes two
    assert len(inside) == 2 * 3
    assert all(leaf.grad is not None for leaf in work.leaves)


def test_a_capture_that_fails_says_why_and_spoils_nothing(cuda: Cuda) -> None:
    def call() -> None:
        cuda.spoilt = True
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="operation not permitted"):
        capture(call, POOL)
    assert cuda.current == "default"
    assert [name.startswith("_cuda_endAllocate") for name in cuda.ended] == [True, False]
    assert cuda.generator.state == "fresh"
    with pytest.raises(RuntimeError, match=INVALIDATED):  # what was not allowed has raised nothing
        capture(lambda: None, POOL)
    assert cuda.current == "default"


def test_a_pool_that_the_allocator_does_not_wait_for_is_not_given_back(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: int, pool: Any) -> None:
        raise RuntimeError("not currently recording")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", refuse, raising=False)
    cuda.spoilt = True
    with pytest.raises(RuntimeError, match=INVALIDATED):
        capture(lambda: None, POOL)
    assert cuda.ended == []


def test_a_failure_that_a_capture_survives_needs_no_repair(cuda: Cuda) -> None:
    def call() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        capture(call, POOL)
    assert cuda.current == "default"
    assert cuda.ended == []
    assert cuda.generator.state == "waiting"
