"""What the algorithms of a balanced group convolution cost on this device, layer by layer of five networks.

    python -m benchmarks.bgc_forms [--device cpu] [--batch 16] [--out results/bgc-forms-cpu.json] [--networks NAMES]

For each distinct 1x1 and 3x3 convolution of the networks (their own grouped ones left out), N = 2, 4, 8 and both
layouts, in inference and forward and backward: every algorithm of BGC that can run, the one that 'auto' chooses (which
has made its choice before, by its own measurement), and PyTorch's group convolution of N/2 groups, which does the same
multiply-adds. All of a cell is timed in turns by the tool's protocol; what is reported is medians. A cell is saved
when it is done, and another call with the same --out goes on with the rest.

On a CPU the C library is told to keep its memory (see bgcbench.measure.allocator): clearing fresh pages takes up to
half of a call's time, and its scatter hides what the algorithms differ by.

summary: in how many cells the algorithm that 'auto' chose is within 5 % of the best, and the geometric mean of the time
of BGC(N) over GC(N/2) where n/N is at least 32, with all cells and by N, phase and layout.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import math
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from benchmarks.common import find_device, save
from benchmarks.files import AlgorithmCell, AlgorithmFile, DistinctLayer
from bgcbench.convs import autotune, build_conv
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.measure.allocator import memory_state, resolve_memory
from bgcbench.measure.device import backend_state, current, make_stopwatch, random_input
from bgcbench.measure.timing import Group, Rules, Track
from bgcbench.measure.trace import trace
from bgcbench.measure.workload import Cell, Workload
from bgcbench.models import build_model
from bgcbench.specs import LAYOUTS, ConvSpec, NetSpec

NETWORKS = ("resnet50", "wrn_28_10", "resnext29_8x64d", "mobilenet_v2", "efficientnet_b0")
GROUPS = (2, 4, 8)
PHASES = ("fwd", "fwd_bwd")
WIDE = 32  # channels a group from which the ratio to a group convolution is an aim
WITHIN = 1.05
PRUNE_RATIO = 1.5  # an algorithm that 'auto' has seen to be slower than this multiple of the fastest is not measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing at least")
    parser.add_argument("--row-time", type=float, default=0.06, help="seconds of timing for each algorithm of a cell")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="default: results/bgc-forms-cpu.json, or -cuda")
    options = parser.parse_args()
    device = find_device(parser, options.device)
    options.out = options.out or Path(f"results/bgc-forms-{device.type}.json")
    memory = resolve_memory(None, device.type)
    with backend_state("fp32", options.threads), current(device), memory_state(memory):
        return run(options, device, memory)


def run(options: argparse.Namespace, device: torch.device, memory: str | None) -> int:
    """Measure what is not in the file yet. memory: the state that the C library's allocator is in."""
    command = f"python -m benchmarks.bgc_forms --device {options.device} --batch {options.batch}"
    done = msgspec.json.decode(options.out.read_bytes(), type=AlgorithmFile).results if options.out.exists() else []
    cells = {cell.key: cell for cell in done}
    stopwatch = make_stopwatch(device, cold=False)
    shapes = distinct(options.networks.split(","))
    planned = list(plan(shapes, options.batch))
    for number, (key, spec, size, layout, phase) in enumerate(planned):
        if key in cells:
            continue
        cells[key] = measured(spec, size, layout, phase, options, device, stopwatch, number)
        cells[key].key = key
        print(f"{number + 1}/{len(planned)} {told(cells[key])}", flush=True)
        if number % 16 == 15 or number + 1 == len(planned):
            content = [cells[key] for key, *_ in planned if key in cells]
            facts = {"batch": options.batch, "memory": memory, "shapes": shapes, "summary": summary(content)}
            save(options.out, command, {**facts, "results": content}, device)
    for name, figure in summary(list(cells.values())).items():
        print(f"{name}: {figure}")
    return 0


def distinct(networks: list[str]) -> list[DistinctLayer]:
    """Every 1x1 and 3x3 convolution that is not grouped and whose input is no image, once, and where it occurs."""
    found: dict[tuple[Any, ...], DistinctLayer] = {}
    for name in networks:
        spec = NetSpec(name)
        with torch.device("meta"):
            model = build_model(spec)
        for call in trace(model, spec.size).calls:
            if call.kind != "conv" or call.groups > 1 or call.kernel not in ((1, 1), (3, 3)) or call.in_channels < 8:
                continue
            if call.size is None:
                continue
            key = (call.in_channels, call.out_channels, call.kernel, call.stride, call.size)
            channels, kernel, stride = (call.in_channels, call.out_channels), call.kernel[0], call.stride[0]
            entry = found.setdefault(key, DistinctLayer(*channels, kernel, stride, *call.size, {}))
            entry.networks[name] = entry.networks.get(name, 0) + 1
    return list(found.values())


def plan(shapes: list[DistinctLayer], batch: int) -> Iterator[tuple[str, ConvSpec, tuple[int, ...], str, str]]:
    """(key, BGC's layer, input, layout, phase) of every cell."""
    for shape in shapes:
        n, m, k = shape.in_channels, shape.out_channels, shape.kernel
        for groups in GROUPS:
            if n % groups or m % groups:
                continue
            spec = ConvSpec("bgc", n, m, k, shape.stride, k // 2, groups=groups, bias=False)
            size = (batch, n, shape.height, shape.width)
            for layout in LAYOUTS:
                for phase in PHASES:
                    area = f"{shape.height}x{shape.width}"
                    key = f"{n}x{m}-k{k}-s{shape.stride}-{area}-n{groups}-{layout}-{phase}"
                    yield key, spec, size, layout, phase


def measured(
    spec: ConvSpec, size: tuple[int, ...], layout: str, phase: str, options: argparse.Namespace,
    device: torch.device, stopwatch: Any, number: int,
) -> AlgorithmCell:  # fmt: skip
    """The medians of one cell, in seconds by algorithm, of 'auto' and of the group convolutions."""
    rules = Rules.for_device(device.type, quick=True, max_time_s=options.row_time)
    rules = dataclasses.replace(rules, min_rounds=options.rounds, warmup_max_s=0.01)
    x = random_input(size, device, torch.float32, layout, seed=0).requires_grad_(phase == "fwd_bwd")

    def track(name: str, variant: str, groups: int, algorithm: str) -> tuple[Track[Cell], nn.Module]:
        one = ConvSpec(variant, spec.in_channels, spec.out_channels, spec.kernel_size, spec.stride, spec.padding,
                       groups=groups, bias=False, algorithm=algorithm)  # fmt: skip
        layer = build_conv(one).to(device)
        if layout == "nhwc":
            layer = layer.to(memory_format=torch.channels_last)
        cell = Workload(layer, x).cell(phase)
        cell.once()
        begin = stopwatch.now()
        cell.once()
        made = Track(name, cell, stopwatch.now() - begin, name)
        cell.release()
        return made, layer

    autotune.forget()
    auto, layer = track("auto", "bgc", spec.groups, "auto")
    assert isinstance(layer, BalancedGroupConv2d)
    chosen = layer.chosen["training" if phase == "fwd_bwd" else "inference"]
    (found,) = autotune.remembered()
    # What 'auto' has seen to be out of the question is not worth the time of a quiet machine.
    seen: dict[str, float] = found["seconds"]
    limit = PRUNE_RATIO * min(seen.values())
    kept = [auto, *(track(name, "bgc", spec.groups, name)[0] for name, s in seen.items() if s < limit)]
    kept.append(track("gc", "gc", spec.groups, "stock")[0])
    half = ("standard", 1) if spec.groups == 2 else ("gc", spec.groups // 2)
    kept.append(track("gc_half", *half, "stock")[0])
    group = Group(kept, stopwatch, rules, random.Random(number), lambda: False)
    for _ in group.run():
        pass
    times = {one.row: one.summary().median_s for one in kept}
    samples = {one.row: len(one.samples) for one in kept}
    del kept, auto, layer, group
    gc.collect()
    return AlgorithmCell(
        in_channels=spec.in_channels, out_channels=spec.out_channels, kernel=spec.kernel_size, stride=spec.stride,
        size=size, groups=spec.groups, layout=layout, phase=phase, chosen=chosen, median_s=times, samples=samples,
        seen_by_auto_s=seen,
    )  # fmt: skip


def off_best(cell: AlgorithmCell) -> float:
    """Time of the algorithm that 'auto' chose over that of the best one, both measured by name in turns."""
    times = cell.algorithms
    return times[cell.chosen] / min(times.values()) if cell.chosen in times else math.inf


def summary(cells: list[AlgorithmCell]) -> dict[str, Any]:
    """The figures that the file is about."""
    if not cells:
        return {}
    wide = [cell for cell in cells if cell.in_channels // cell.groups >= WIDE]

    def mean_ratio(some: list[AlgorithmCell], to: str = "gc_half") -> float | None:
        return statistics.geometric_mean(cell.auto_over(to) for cell in some) if some else None

    return {
        "cells": len(cells),
        "within_5_percent": sum(off_best(cell) <= WITHIN for cell in cells),
        "auto_over_best": statistics.geometric_mean(
            cell.auto_over(min(cell.algorithms, key=cell.algorithms.__getitem__)) for cell in cells
        ),
        "wide_cells": len(wide),
        "ratio_to_gc_of_half": mean_ratio(wide),
        "ratio_to_gc_of_half_all_cells": mean_ratio(cells),
        "ratio_to_gc_of_same_n": mean_ratio(wide, "gc"),
        "by": {
            f"N={groups} {phase} {layout}": mean_ratio(
                [c for c in wide if (c.groups, c.phase, c.layout) == (groups, phase, layout)]
            )
            for groups in GROUPS for phase in PHASES for layout in LAYOUTS
        },
        "chosen": dict(sorted(collections.Counter(cell.chosen for cell in cells).items())),
    }  # fmt: skip


def told(cell: AlgorithmCell) -> str:
    """One line on a cell."""
    times = " ".join(f"{name} {s * 1e3:.2f}" for name, s in cell.median_s.items())
    ratio = cell.auto_over("gc_half")
    return f"{cell.key}: {cell.chosen} ({off_best(cell):.2f} of the best), {ratio:.2f} of GC(N/2) | {times} ms"


if __name__ == "__main__":
    raise SystemExit(main())
