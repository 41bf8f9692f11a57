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
    """Bytes before a step and at its highest point, how they were read, and whether a second pass, if any, agreed."""

    baseline_bytes: int
    peak_bytes: int
    method: str
    agreed: bool | None

    @property
    def delta_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes


def measure_peak(cell: Cell, device: torch.device, *, passes: int = 2) -> Peak:
    """Highest memory during one call of ``cell``: collect, baseline, reset, one step, read; ``passes`` times.

    CUDA: the caching allocator's own count (method 'cuda_allocator'). CPU: the process's resident set, sampled by a
    thread (method 'rss_sampled'), which also sees what the libraries keep, so it is coarse below some MiB. The
    highest of the passes is returned; ``agreed`` is False where they differ by more than the method's grain.
    """
    method, one_pass = ("cuda_allocator", _cuda_pass) if device.type == "cuda" else ("rss_sampled", _cpu_pass)
    measured = []
    for _ in range(passes):
        cell.release()
        gc.collect()
        try:
            measured.append(one_pass(cell, device))
        finally:
            cell.release()
    deltas = [peak - baseline for baseline, peak in measured]
    highest = measured[deltas.index(max(deltas))]
    agreed = max(deltas) - min(deltas) <= _TOLERANCE[method] if passes > 1 else None
    return Peak(*highest, method, agreed)


def _cuda_pass(cell: Cell, device: torch.device) -> tuple[int, int]:
    """Bytes before one call and at its highest point."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    baseline = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    cell.once()
    torch.cuda.synchronize(device)
    return baseline, torch.cuda.max_memory_allocated(device)


def _cpu_pass(cell: Cell, device: torch.device) -> tuple[int, int]:
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
    return baseline, highest[0]
