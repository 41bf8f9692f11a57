"""How long the device takes, however long the host takes to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

SHORTEST, LONGEST = 2**20, 2**26  # cycles of the device's clock: about 0.5 and 35 ms


def device_seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds that one of ``calls`` calls takes on the current CUDA device.

    Kernels of some microseconds are over before the host has asked for the next one, and events around them would time
    the host. So the device sleeps until all of them are queued, and where it woke up too early sleeps longer.
    """
    cycles = SHORTEST
    while True:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        first.record()
        for _ in range(calls):
            call()
        last.record()
        in_time = not first.query()
        last.synchronize()
        if in_time or cycles >= LONGEST:
            return float(first.elapsed_time(last)) / 1e3 / calls
        cycles *= 4
