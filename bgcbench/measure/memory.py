"""Peak memory of one step, measured in a separate pass."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass

import psutil
import torch

from bgcbench.measure.allocator import trim_heap
from bgcbench.measure.workload import Cell

# Two passes may differ by the allocator's block (CUDA), or by pages the system counts late (resident set).
_TOLERANCE = {"cuda_allocator": 2 * 2**20, "rss_sampled": 16 * 2**20}


@dataclass(frozen=True)
class Peak:
    """Bytes before a step and at its highest point, how they were read, and whether a second pass agreed."""

    baseline_bytes: int
    peak_bytes: int
    method: str
    agreed: bool

    @property
    def delta_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes


def measure_peak(cell: Cell, device: torch.device, *, passes: int = 2) -> Peak:
    """Highest memory during one call of ``cell``: collect, baseline, reset, one step, read; ``passes`` times.

    CUDA: the caching allocator's own count (method 'cuda_allocator'). CPU: the process's resident set, sampled by a
    thread (method 'rss_sampled'), which also sees what the libraries keep, so it is coarse below some MiB. The
    highest of the passes is returned; ``agreed`` is False where they differ by more than the method's grain.
    """
    read = _cuda_pass if device.type == "cuda" else _cpu_pass
    method = "cuda_allocator" if device.type == "cuda" else "rss_sampled"
    peaks = sorted((read(cell, device) for _ in range(passes)), key=lambda pair: pair[1] - pair[0])
    spread = (peaks[-1][1] - peaks[-1][0]) - (peaks[0][1] - peaks[0][0])
    return Peak(*peaks[-1], method, agreed=spread <= _TOLERANCE[method])


def _cuda_pass(cell: Cell, device: torch.device) -> tuple[int, int]:
    cell.release()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    baseline = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cell.once()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    cell.release()
    return baseline, peak


def _cpu_pass(cell: Cell, device: torch.device) -> tuple[int, int]:
    cell.release()
    gc.collect()
    trim_heap()  # or the baseline would hold the last step's memory
    process, done = psutil.Process(), threading.Event()
    baseline = process.memory_info().rss
    highest = [baseline]

    def watch() -> None:
        while not done.wait(2e-4):
            highest[0] = max(highest[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        cell.once()
        highest[0] = max(highest[0], process.memory_info().rss)  # before the gradients are released
    finally:
        done.set()
        watcher.join()
        cell.release()
    return baseline, highest[0]
