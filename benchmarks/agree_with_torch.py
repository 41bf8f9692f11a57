"""Do our medians agree with torch.utils.benchmark's? The same calls, measured alternately, on the CPU.

    python -m benchmarks.agree_with_torch [--alternations 9] [--out results/agree-with-torch.json]

Each state of the C library's memory (``--memory`` of bgcbench profile) has a process of its own, in which every
alternation measures a row once with each tool, in turns as to which comes first; a row's figure is the median over the
alternations of (our median / torch's median). Beside it stands a process in which torch.utils.benchmark is alone, with
that state set by glibc's own environment variables, and one in which nothing is set. Exit code 1 if a row of either
comparison is off by more than its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

from benchmarks.common import CPU, save, workload
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.device import make_stopwatch
from bgcbench.measure.timing import Group, Rules, Track
from bgcbench.measure.workload import Cell
from bgcbench.specs import MEMORY

ROWS = [(variant, groups, phase) for variant, groups in (("standard", 1), ("gc", 4), ("bgc", 4), ("shuffle", 8))
        for phase in ("fwd", "fwd_bwd")]  # fmt: skip
SHAPE = {"channels": 256, "size": 14, "batch": 16}
LIMIT, LIMIT_ALONE = 0.05, 0.15  # processes of their own are not measured in turns
UNTOUCHED = "untouched"
# What mallopt(3) sets, as glibc reads it when a process starts.
VARIABLES = {
    "kept": {"MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_MMAP_MAX_": "0"},
    "fresh": {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"},
    UNTOUCHED: {},
}


def ours(cell: Cell) -> float:
    """Median of one protocol run of a second."""
    group = Group([Track("row", cell)], make_stopwatch(CPU, cold=False), Rules(max_time_s=1.0), random.Random(0))
    for _ in group.run():
        pass
    return group.tracks[0].summary().median_s


def theirs(cell: Cell) -> float:
    """Median of torch.utils.benchmark's blocked_autorange over a second, all threads."""
    timer = benchmark.Timer("cell.once()", globals={"cell": cell}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1.0).median


def alternately(state: str, alternations: int) -> list[list[tuple[float, float]]]:
    """For each row (our median, torch's median) of each alternation, in this process."""
    found = []
    with memory_state(state):
        for variant, groups, phase in ROWS:
            cell = workload(variant, groups, **SHAPE).cell(phase)
            pairs = []
            for number in range(alternations):
                order = (ours, theirs) if number % 2 else (theirs, ours)
                medians = {tool.__name__: tool(cell) for tool in order}
                pairs.append((medians["ours"], medians["theirs"]))
            found.append(pairs)
    return found


def alone() -> list[float]:
    """For each row torch's median, where nothing of ours has measured or set anything."""
    return [theirs(workload(variant, groups, **SHAPE).cell(phase)) for variant, groups, phase in ROWS]


def in_a_process(*arguments: str, **variables: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.agree_with_torch", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | variables)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/agree-with-torch.json"))
    parser.add_argument("--alternate", choices=MEMORY, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone or options.alternate:
        print(json.dumps(alone() if options.alone else alternately(options.alternate, options.alternations)))
        return 0
    separate = {state: in_a_process("--alone", **variables) for state, variables in VARIABLES.items()}
    rows, worst, worst_alone = [], 0.0, 0.0
    for state in MEMORY:
        together = in_a_process("--alternate", state, "--alternations", str(options.alternations))
        for number, ((variant, groups, phase), pairs) in enumerate(zip(ROWS, together, strict=True)):
            ratio = statistics.median(a / b for a, b in pairs)
            apart = statistics.median(a for a, _ in pairs) / separate[state][number]
            worst, worst_alone = max(worst, abs(ratio - 1)), max(worst_alone, abs(apart - 1))
            rows.append({
                "variant": variant, "groups": groups, "phase": phase, "memory": state, "ratio": ratio,
                "ratio_alone": apart, "medians_s": pairs, "alone_s": separate[state][number],
                "untouched_s": separate[UNTOUCHED][number],
            })  # fmt: skip
            name = f"{variant:9} N={groups} {phase:8} memory {state:5}"
            print(f"{name} ours / torch's = {ratio:.4f} in turns, {apart:.4f} in processes of their own", flush=True)
    found = {"shape": SHAPE, "worst": worst, "worst_alone": worst_alone, "rows": rows}
    save(options.out, "python -m benchmarks.agree_with_torch", found)
    print(f"largest difference {worst:.1%} in turns, {worst_alone:.1%} in processes of their own")
    return int(worst > LIMIT or worst_alone > LIMIT_ALONE)


if __name__ == "__main__":
    raise SystemExit(main())
