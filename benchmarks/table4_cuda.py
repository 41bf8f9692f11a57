"""Table 4 on a CUDA device: every precision, layout and mode, one result file each. About 6 minutes.

    python -m benchmarks.table4_cuda [--folder results] [--device cuda]

Ends with the exit code of the worst run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from bgcbench.cli import main as bgcbench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    worst = 0
    for precision, layout, mode in itertools.product(("fp32", "tf32", "bf16"), ("nchw", "nhwc"), ("eager", "graph")):
        out = options.folder / f"table4-cuda-{precision}-{layout}-{mode}.json"
        arguments = ["profile", "--preset", "table4", "--device", options.device, "--precision", precision]
        arguments += ["--layout", layout, "--mode", mode, "--max-time", "3", "--out", str(out), "--force"]
        print("bgcbench", *arguments, flush=True)
        worst = max(worst, bgcbench(arguments))
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
