"""One forward pass of a network over many batches that waits for all of them at every module it is told to.

A network cannot be cut open between two of its modules in general: what it does in between is Python. But it can be
held there. Each batch runs in a thread of its own, and only one of them at a time; where it comes to a module with a
stop, it waits until all the others have come there too and the stop has been settled. So something can be computed from
all images at a layer, the layer changed by it, and the pass go on from there: nothing is run twice. What is held
meanwhile are the activations that are alive at that point.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bgcbench.conversion.layer_moments import on_input
from bgcbench.measure.undisturbed import RandomState


class Stopped(Exception):
    """The conversion was asked to stop."""


@dataclass(eq=False)
class Stop:
    """A module to wait at, and what to do when everybody is there.

    settle: given (number, input) of each batch that has come, before the module runs on it; called once. Later calls
    of the module run through. only_changed: of no concern to a batch that has not been through a changed module.
    """

    module: nn.Module
    settle: Callable[[list[tuple[int, Tensor]]], None]
    only_changed: bool = False
    settled: bool = False


class _Abandoned(BaseException):
    """Ends a thread that nobody waits for any more; no network catches it by accident."""


class _Runner(threading.Thread):
    """One batch on its way through the network."""

    def __init__(self, number: int, run: Callable[[], object], device: torch.device, random: RandomState) -> None:
        super().__init__(daemon=True, name=f"bgcbench batch {number}")
        self.number, self.run_network, self.device, self.random = number, run, device, random
        self.at: tuple[Stop, Tensor] | None = None
        self.changed = False
        self.done = False
        self.error: BaseException | None = None
        self._abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        try:
            on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
            with torch.no_grad(), on_device:
                if not self._abandoned:
                    self.run_network()
        except _Abandoned:
            pass
        except BaseException as problem:  # noqa: BLE001 - raised where the network was called
            self.error = problem
        finally:
            self.done = True
            self._back.release()

    def proceed(self) -> None:
        """Let it run until it waits at a stop or is through, with its own random numbers. Called from outside."""
        self.at = None
        self.random.restore()
        self._go.release()
        self._back.acquire()
        self.random = self.random.now()
        if self.error is not None:
            raise self.error

    def wait(self, stop: Stop, x: Tensor) -> None:
        """Wait at ``stop``. Called by the thread itself."""
        self.at = stop, x
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End it wherever it is."""
        if not self.done:
            self._abandoned = True
            self._go.release()
            self._back.acquire()
        self.join()


def run_in_step(
    runs: Sequence[tuple[Callable[[], object], RandomState]],
    stops: Sequence[Stop],
    *,
    device: torch.device,
    changed: Sequence[nn.Module] = (),
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Run a network on several batches, without gradients, all of them waiting at every one of ``stops``.

    runs: each runs the network, which is on ``device``, on one batch, from that random state. changed: the modules from
    which on a pass concerns the stops with ``only_changed``. A batch that never comes to a stop (a network may decide
    by its input) is not waited for. Raises what the network raises, and Stopped.
    """
    handles: list[RemovableHandle] = [on_input(stop.module, partial(_wait_at, stop)) for stop in stops]
    # After those that wait: a layer that is changed is not yet behind itself.
    handles += [module.register_forward_hook(_passed, prepend=True) for module in changed]
    runners = [_Runner(number, run, device, random) for number, (run, random) in enumerate(runs)]
    begun: list[_Runner] = []
    try:
        for runner in runners:
            runner.start()
            begun.append(runner)
            runner.proceed()
        while waiting := [runner for runner in runners if not runner.done]:
            if asked_to_stop():
                raise Stopped
            first = waiting[0].at
            if first is None:
                raise RuntimeError("a batch waits nowhere")
            stop = first[0]
            here = [runner for runner in waiting if runner.at is not None and runner.at[0] is stop]
            stop.settle([(runner.number, runner.at[1]) for runner in here if runner.at is not None])
            stop.settled = True
            for runner in here:
                runner.proceed()
    finally:
        for runner in begun:
            runner.abandon()
        for handle in handles:
            handle.remove()


def _wait_at(stop: Stop, x: Tensor) -> None:
    runner = threading.current_thread()
    if isinstance(runner, _Runner) and not stop.settled and (runner.changed or not stop.only_changed):
        runner.wait(stop, x.detach())


def _passed(*_: Any) -> None:
    runner = threading.current_thread()
    if isinstance(runner, _Runner):
        runner.changed = True
