"""Training speed of the paper's networks on a CUDA device, one result file each. About 7 minutes.

    python -m benchmarks.train_cuda [--only 'train-wrn_28_10-*,...'] [--seconds 480] [--list]

Standard, GC and BGC with N = 4 on synthetic images of the paper's shapes, batch 128, four epochs of 16 steps (4 of
ImageNet's size); images/s is the median epoch's. "eager" is the recipe without torch.compile, which takes minutes of
its own. The tables say which share of the device's matrix peak was reached. The most telling come first; what
--seconds leave no time for is named and left out.
"""

from __future__ import annotations

from typing import Any

from benchmarks.runs import Run, main

# Sides and classes of the images, as in Tables 5 and 6.
CIFAR = {"size": 32, "classes": 10}
IMAGENET = {"size": 224, "classes": 1000}
EAGER = {"recipe": "fast", "compile": False}


def _run(model: str, what: str, seconds: float, images: dict[str, Any], recipe: dict[str, Any]) -> Run:
    grid = {"variants": "standard,gc,bgc", "groups": 4, "epochs": 4}
    name = f"train-{model}-synthetic-cuda-{what}"
    return Run(name, seconds, "train", {"model": model, "data": "synthetic", **images, **recipe, **grid})


RUNS = [
    _run("wrn_28_10", "fast-eager", 35, CIFAR, EAGER),
    _run("resnet50", "fast-eager", 45, IMAGENET, EAGER),
    _run("wrn_28_10", "paper", 45, CIFAR, {"recipe": "paper"}),
    _run("mobilenet_v2", "fast-eager", 40, IMAGENET, EAGER),
    _run("resnext29_8x64d", "fast-eager", 40, CIFAR, EAGER),
    _run("wrn_28_10", "fast", 270, CIFAR, {"recipe": "fast"}),
]

if __name__ == "__main__":
    raise SystemExit(main(__doc__, RUNS))
