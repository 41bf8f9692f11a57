"""What the device can do at best, measured in the same run and precision, and how near a layer comes to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bgcbench.measure.counts import CallWork
from bgcbench.measure.device import FALLBACK_CACHE_BYTES, DeviceStopwatch, cache_bytes
from bgcbench.measure.workload import Cell


@dataclass(frozen=True)
class Ceilings:
    """Best rates seen: arithmetic (FLOP/s of large square matrix products) and memory (bytes/s of a large copy,
    counting bytes read and bytes written)."""

    flops_per_s: float
    bytes_per_s: float
    matmul_sizes: tuple[int, ...]
    copy_bytes: int

    def floor_s(self, work: CallWork) -> float:
        """Least time ``work`` could take: the larger of its arithmetic and its traffic at the ceilings."""
        return max(work.flops / self.flops_per_s, work.bytes / self.bytes_per_s)

    def bound(self, work: CallWork) -> str:
        """Which ceiling ``work`` meets first: 'compute' or 'memory'."""
        return "compute" if work.flops / self.flops_per_s >= work.bytes / self.bytes_per_s else "memory"

    def roofline_fraction(self, work: CallWork, seconds: float) -> float:
        """Achieved over attainable rate, min(peak, intensity x bandwidth).

        Not clamped. Above 1 the formula's work was not all done (a Winograd algorithm, products with zero padding
        skipped), the cache was warm, or the library's convolution is better than its matrix product.
        """
        return self.floor_s(work) / seconds


def measure_ceilings(stopwatch: DeviceStopwatch, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """Time matrix products of several sizes and a copy of at least four times the cache; best of several each."""
    device = stopwatch.device
    on_cuda = device.type == "cuda"
    sizes = ((4096,) if quick else (4096, 8192)) if on_cuda else ((2048,) if quick else (1024, 2048, 4096))
    repeats = 20 if on_cuda else 5
    best, used = 0.0, []
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = Cell(call=lambda a=a, b=b: torch.mm(a, b), context=torch.inference_mode)  # type: ignore[misc]
        seconds = min(stopwatch.sample(product, 1) + stopwatch.sample(product, 1))
        if seconds < 0.3:
            seconds = min(seconds, *stopwatch.sample(product, repeats))
        best = max(best, 2 * size**3 / seconds)
        used.append(size)
        if seconds > 0.3:  # the next size takes eight times as long; half precision on a CPU can be that slow
            break
    cache = cache_bytes(device) or FALLBACK_CACHE_BYTES
    size_bytes = max(4 * cache, (256 if on_cuda else 64) * 2**20)
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = Cell(call=lambda: target.copy_(source), context=torch.inference_mode)
    stopwatch.sample(copy, 1)
    seconds = min(stopwatch.sample(copy, repeats))
    return Ceilings(best, 2 * size_bytes / seconds, tuple(used), size_bytes)
