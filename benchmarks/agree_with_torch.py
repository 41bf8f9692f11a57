"""Do our medians agree with torch.utils.benchmark's? The same calls, measured alternately, on the CPU.

    python -m benchmarks.agree_with_torch [--alternations 9] [--out results/agree-with-torch.json]

Every alternation measures a row once with each tool, in turns as to which comes first; a row's figure is the median
over the alternations of (our median / torch's median). Exit code 1 if a row is off by more than 5 %.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path

import torch
from torch.utils import benchmark

from benchmarks.common import CPU, save, workload
from bgcbench.measure.device import make_stopwatch
from bgcbench.measure.timing import Group, Rules, Track
from bgcbench.measure.workload import Cell

ROWS = [("standard", 1), ("gc", 4), ("bgc", 4), ("shuffle", 8)]
SHAPE = {"channels": 256, "size": 14, "batch": 16}
LIMIT = 0.05


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternations", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/agree-with-torch.json"))
    options = parser.parse_args()
    rows, worst = [], 0.0
    for variant, groups in ROWS:
        for phase in ("fwd", "fwd_bwd"):
            cell = workload(variant, groups, **SHAPE).cell(phase)
            pairs = []
            for number in range(options.alternations):
                order = (ours, theirs) if number % 2 else (theirs, ours)
                found = {tool.__name__: tool(cell) for tool in order}
                pairs.append((found["ours"], found["theirs"]))
            ratio = statistics.median(a / b for a, b in pairs)
            worst = max(worst, abs(ratio - 1))
            rows.append({"variant": variant, "groups": groups, "phase": phase, "ratio": ratio, "medians_s": pairs})
            print(f"{variant:9} N={groups} {phase:8} bgcbench / torch.utils.benchmark = {ratio:.4f}", flush=True)
    save(options.out, "python -m benchmarks.agree_with_torch", {"shape": SHAPE, "worst": worst, "rows": rows})
    print(f"largest difference {worst:.1%}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
