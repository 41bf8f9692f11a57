"""Time the device and the host separately for one call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SHORTEST, LONGEST = 2**20, 2**26  # cycles of the device's clock: about 0.5 and 35 ms


def device_and_host_seconds(call: Callable[[], object], calls: int = 1) -> tuple[float, float]:
    """Seconds that one of ``calls`` calls takes on the current CUDA device, and that the host takes to ask for it.

    Kernels of some microseconds are over before the host has asked for the next one, and events around them would time
    the host. So the device sleeps until all of them are queued, and where it woke up too early sleeps longer.
    """
    cycles = SHORTEST
    while True:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        first.record()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        host = time.perf_counter() - begin
        last.record()
        in_time = not first.query()
        last.synchronize()
        if in_time or cycles >= LONGEST:
            return float(first.elapsed_time(last)) / 1e3 / calls, host / calls
        cycles *= 4


def device_seconds(call: Callable[[], object], calls: int = 1) -> float:
    """The first of :func:`device_and_host_seconds`: what a call costs where the host is ahead of the device."""
    return device_and_host_seconds(call, calls)[0]
