"""Whole networks on a CUDA device: batch 128, bf16 and tf32, one result file each. About 20 minutes.

    python -m benchmarks.networks_cuda [--folder results] [--device cuda] [--models resnet50,wrn_28_10]

Ends with the exit code of the worst run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from bgcbench.cli import main as bgcbench

MODELS = ("resnet50", "mobilenet_v2", "efficientnet_b0", "wrn_28_10")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    worst = 0
    for model, precision in itertools.product(options.models.split(","), ("bf16", "tf32")):
        out = options.folder / f"network-{model}-cuda-{precision}-nhwc.json"
        arguments = ["profile", "--model", model, "--device", options.device, "--precision", precision]
        arguments += ["--layout", "nhwc", "--batch", "128", "--groups", "2,4,8", "--out", str(out), "--force"]
        print("bgcbench", *arguments, flush=True)
        worst = max(worst, bgcbench(arguments))
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
