"""Training speed of the paper's networks on a CUDA device, every variant, both recipes, one result file each.

    python -m benchmarks.train_cuda [--folder results] [--device cuda] [--models wrn_28_10,...] [--recipes paper,fast]

Synthetic images at the paper's shapes, batch 128, N = 4, four epochs of 16 steps (images/s is the median epoch's, so
that compilation is left out). The tables say which share of the device's matrix peak was reached. Some 30 minutes.
Ends with the exit code of the worst run.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from bgcbench.cli import main as bgcbench

# Sides and classes of the images, as in Tables 5 and 6.
MODELS = {
    "wrn_28_10": (32, 10),
    "resnext29_8x64d": (32, 10),
    "efficientnet_b0": (32, 10),
    "wide_resnet34_2": (224, 1000),
    "mobilenet_v2": (224, 1000),
    "resnet50": (224, 1000),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--recipes", default="paper,fast")
    options = parser.parse_args()
    worst = 0
    for model, recipe in itertools.product(options.models.split(","), options.recipes.split(",")):
        side, classes = MODELS[model]
        out = options.folder / f"train-{model}-synthetic-cuda-{recipe}.json"
        arguments = ["train", model, "--data", "synthetic", "--size", str(side), "--classes", str(classes)]
        arguments += ["--recipe", recipe, "--variants", "all", "--groups", "4", "--skip-invalid", "--epochs", "4"]
        arguments += ["--subset", "2048"] if side <= 64 else ["--subset", "512"]
        arguments += ["--device", options.device, "--out", str(out), "--force"]
        print("bgcbench", *arguments, flush=True)
        worst = max(worst, bgcbench(arguments))
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
