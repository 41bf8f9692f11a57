"""The A/A test on a real machine: one layer entered twice in one interleaved run must not differ from itself.

    python -m benchmarks.same_row_twice [--tries 20] [--out results/same-row-twice.json]

Exit code 1 if the two differ significantly in more than one of twenty tries.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from benchmarks.common import CPU, save, workload
from bgcbench.measure.device import make_stopwatch
from bgcbench.measure.statistics import Series, ratio_of_medians
from bgcbench.measure.timing import Group, Rules, Track

SHAPE = {"channels": 256, "size": 14, "batch": 16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/same-row-twice.json"))
    options = parser.parse_args()
    tries, found = [], 0
    for seed in range(options.tries):
        tracks = [Track(name, workload("bgc", 4, **SHAPE).cell("fwd_bwd")) for name in ("first", "second")]
        group = Group(tracks, make_stopwatch(CPU, cold=False), Rules(max_time_s=4.0), random.Random(seed))
        for _ in group.run():
            pass
        first, second = (Series(track.samples, track.rounds) for track in group.tracks)
        ratio = ratio_of_medians(first, second, paired=True)
        bounds = [ratio.ci95.low, ratio.ci95.high] if ratio.ci95 else None
        significant = ratio.is_significant
        tries.append({"ratio": ratio.value, "ci95": bounds, "told_apart": significant, "rounds": group.rounds})
        found += bool(significant)
        print(f"try {seed + 1:2}: {ratio.value:.4f} {bounds} {'significant' if significant else ''}", flush=True)
    save(options.out, "python -m benchmarks.same_row_twice", {"shape": SHAPE, "told_apart": found, "tries": tries})
    print(f"significantly different in {found} of {len(tries)} tries")
    return int(found > len(tries) / 20)


if __name__ == "__main__":
    raise SystemExit(main())
