"""Block sizes: a few candidates by kernel, dtype and channels, and a tuner that measures them once per shape.

Which tile wins is a matter of timing, so results may differ in their last bits between processes, never within one.
BGCBENCH_TUNE_KERNELS=0 takes the first candidate everywhere.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bgcbench.kernels.clock import device_seconds

WARM_UP, ROUNDS, CALLS = 3, 3, 10
# Relative difference of two candidates that only sum in another order, by class of numbers.
AGREEMENT = {"half": 1e-2, "tf32": 3e-3, "ieee": 1e-5}


@dataclass(frozen=True)
class Tile:
    """Rows (images, or output channels), columns (channels) and summed elements of a tile; warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3


INTERPRETER = Tile(16, 16, 16, 4, 1)
_chosen: dict[Hashable, Tile] = {}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def number_class(dtype: torch.dtype, tf32: bool) -> str:
    """'half' (fp16, bf16), 'tf32' or 'ieee' (fp32): what decides how much of a tile fits where."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if tf32 else "ieee"


def _fit(size: int, blocks: Sequence[int]) -> list[int]:
    """``blocks`` by what covering ``size`` with them costs: padding, plus 16 for every block; the best first."""
    return sorted(blocks, key=lambda block: (cdiv(size, block) * (block + 16), size % block != 0, -block))


def _ceiling(size: int, most: int) -> int:
    """The least power of two from 16 to ``most`` that reaches ``size``, else ``most``."""
    return min(most, max(16, 1 << (max(size, 1) - 1).bit_length()))


def _distinct(*tiles: Tile) -> list[Tile]:
    return list(dict.fromkeys(tiles))


def sum_tiles(numbers: str, kind: str, batch: int, k_channels: int, n_channels: int) -> list[Tile]:
    """Candidates of the kernel behind y ('forward'), g ('shared') and dx ('input'); the first has 4 warps.

    None of them spills registers on sm_90 (tests/kernels/test_compile_sm90.py): 'input' needs more than the others,
    because g comes in beside the accumulator.
    """
    most_rows = 64 if numbers == "ieee" or (numbers == "tf32" and kind == "input") else 128
    rows = _ceiling(batch, most_rows)
    depths = {"half": (64, 32, 16), "tf32": (32, 16), "ieee": (16,)}[numbers]
    depth = _fit(k_channels, depths)[0]
    best, second, *_ = _fit(n_channels, (128, 64, 32, 16))
    narrow = min(best, 64)
    if numbers == "ieee":
        return _distinct(Tile(rows, narrow, depth, 4, 2), Tile(rows, max(narrow // 2, 16), depth, 4, 2))
    tiles = [Tile(rows, narrow, depth, 4, 3), Tile(rows, narrow, depth, 4, 4)]
    if rows < most_rows:
        return tiles
    if rows == 64:
        return [*tiles, Tile(128, narrow, depth, 8, 3)] if batch > 64 else tiles
    if best == 128:
        tiles += [Tile(128, 128, depth, 8, 3)]
        tiles += [Tile(64, 128, depth, 4, 3)] if numbers == "half" else []
        tiles += [Tile(128, 256, depth, 8, 3)] if n_channels % 256 == 0 and kind == "forward" else []
    elif second < 64:
        tiles.append(Tile(rows, second, depth, 4, 3))
    return tiles


def weight_tiles(numbers: str, batch: int, in_channels: int, out_channels: int) -> list[Tile]:
    """Candidates of the kernel behind dA and dB (two accumulators); the first has 4 warps."""
    most = 64 if numbers == "half" else 32
    depth = _ceiling(batch, most)
    wide = (64, 32, 16)
    rows, columns = _fit(out_channels, wide)[0], _fit(in_channels, wide)[0]
    if numbers == "ieee":
        return _distinct(
            Tile(min(rows, 32), columns, 16, 4, 2), Tile(rows, columns, 16, 8 if rows == columns == 64 else 4, 2)
        )
    tiles = [Tile(rows, columns, depth, 4, 3)]
    if numbers == "half" and out_channels % 128 == 0:
        tiles.append(Tile(128, columns, depth, 4, 3))
        if in_channels % 128 == 0:
            tiles.append(Tile(128, 128, depth, 8, 3))
    if depth == most and numbers == "half":
        tiles.append(Tile(rows, columns, depth // 2, 4, 4))
    return tiles


def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``; 4 stands for an interpreter's, so that sums are cut there too."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def parts_of(programs: int, wanted: int, allowed: Sequence[int]) -> int:
    """Into how many of the ``allowed`` parts to cut a sum so that ``programs`` of them come to ``wanted``."""
    return next((parts for parts in allowed if programs * parts >= wanted), max(allowed))


def may_measure(device: torch.device) -> bool:
    """Whether candidates can be timed now: on a CUDA device, not while a graph is captured or code is compiled."""
    if device.type != "cuda" or os.environ.get("BGCBENCH_TUNE_KERNELS") == "0":
        return False
    return not torch.cuda.is_current_stream_capturing() and not torch.compiler.is_compiling()


def choose(
    key: Hashable,
    candidates: Sequence[Tile],
    run: Callable[[Tile], Sequence[Tensor]],
    device: torch.device,
    numbers: str,
    refusals: tuple[type[BaseException], ...],
) -> Tile:
    """The fastest of ``candidates`` for ``key``, measured once; where nothing can be measured, the first.

    run: launches a candidate and returns what it computed. A candidate that raises one of ``refusals`` (too much
    shared memory, no code) is left out, and so is one of 8 warps whose result is not that of 4 warps. Raises the
    first refusal where no candidate is left.
    """
    if key in _chosen:
        return _chosen[key]
    if not may_measure(device):
        return candidates[0]
    times: dict[Tile, float] = {}
    reference: Sequence[Tensor] | None = None
    refused: BaseException | None = None
    for tile in candidates:
        try:
            found = run(tile)
        except refusals as problem:
            refused = refused or problem
            continue
        if tile.warps == 4 and reference is None:
            reference = found
        elif tile.warps > 4 and (reference is None or not agree(found, reference, AGREEMENT[numbers])):
            continue
        times[tile] = _time(run, tile)
    if not times:
        raise refused or RuntimeError("no block sizes for this convolution compute what 4 warps do")
    _chosen[key] = min(times, key=lambda tile: times[tile])
    return _chosen[key]


def chosen() -> dict[Hashable, Tile]:
    """What the tuner has found in this process, by key: kernel, device, dtype, numbers, geometry and more."""
    return dict(_chosen)


def agree(found: Sequence[Tensor], reference: Sequence[Tensor], tolerance: float) -> bool:
    """Whether every tensor is within ``tolerance`` of its reference, relative to its norm; NaN never is."""
    for own, other in zip(found, reference, strict=True):
        norm = float(other.float().norm())
        difference = float((own.float() - other.float()).norm())
        if not (math.isfinite(norm) and difference <= tolerance * norm):
            return False
    return True


def _time(run: Callable[[Tile], Sequence[Tensor]], tile: Tile) -> float:
    """Seconds of one call: the median round."""
    for _ in range(WARM_UP):
        run(tile)
    return statistics.median(device_seconds(lambda: run(tile), CALLS) for _ in range(ROUNDS))
