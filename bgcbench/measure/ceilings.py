"""What the device can do at best, measured in the same run and precision, and how near a layer comes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    def bound(self, work: CallWork) -> Literal["compute", "memory"]:
        """Which ceiling ``work`` meets first: 'compute' or 'memory'."""
        return "compute" if work.flops / self.flops_per_s >= work.bytes / self.bytes_per_s else "memory"

    def roofline_fraction(self, work: CallWork, seconds: float) -> float:
        """Achieved over attainable rate, min(peak, intensity x bandwidth).

        Not clamped. Above 1 the formula's work was not all done (a Winograd algorithm, products with zero padding
        skipped), the cache was warm, or the library's convolution is better than its matrix product.
        """
        return self.floor_s(work) / seconds


def measure_ceilings(stopwatch: DeviceStopwatch, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """Time matrix products of growing sizes and a copy of at least four times the cache; best of several each.

    A size is tried if it is to take no longer than a second (a tenth with ``quick``), as far as the one before it
    tells: half precision on a CPU without instructions for it is a hundred times slower than single.
    """
    device = stopwatch.device
    on_cuda = device.type == "cuda"
    sizes = ((4096,) if quick else (4096, 8192)) if on_cuda else (256, 512, 1024, 2048, 4096)
    limit_s = 0.1 if quick else 1.0
    best, seconds, used = 0.0, 0.0, []
    for size in sizes:
        if 8 * seconds > limit_s:
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = Cell(call=lambda a=a, b=b: torch.mm(a, b), context=torch.inference_mode)  # type: ignore[misc]
        seconds = _fastest(stopwatch, product, limit_s)
        best = max(best, 2 * size**3 / seconds)
        used.append(size)
    cache = cache_bytes(device) or FALLBACK_CACHE_BYTES
    size_bytes = max(4 * cache, (256 if on_cuda else 64) * 2**20)
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = Cell(call=lambda: target.copy_(source), context=torch.inference_mode)
    return Ceilings(best, 2 * size_bytes / _fastest(stopwatch, copy, limit_s), tuple(used), size_bytes)


def _fastest(stopwatch: DeviceStopwatch, cell: Cell, limit_s: float) -> float:
    """The shortest of the calls that fit into ``limit_s`` after the first, which may set something up: two where a
    call is long, at most twenty, and five of short ones even where other processes hold them up."""
    times = stopwatch.sample(cell, 1)
    while len(times) < 20 and (sum(times[1:]) < limit_s or (len(times) < 5 and min(times) < limit_s / 10)):
        times += stopwatch.sample(cell, 1)
    return min(times)
