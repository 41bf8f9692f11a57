"""Whole networks with N = 4 on a CUDA device, channels-last, batch 128, one result file each. About 7 minutes.

    python -m benchmarks.networks_cuda [--only 'network-resnet50-*,...'] [--seconds 480] [--list]

Standard, GC and BGC: inference and a training step, eager. The most telling come first; what --seconds leave no time
for is named and left out.
"""

from __future__ import annotations

from benchmarks.runs import Run, main

CONDITIONS = (
    ("wrn_28_10", "bf16"), ("resnet50", "bf16"), ("mobilenet_v2", "bf16"), ("efficientnet_b0", "bf16"),
    ("wrn_28_10", "tf32"), ("resnet50", "tf32"), ("mobilenet_v2", "tf32"), ("efficientnet_b0", "tf32"),
)  # fmt: skip
RUNS = [
    Run(
        f"network-{model}-cuda-{precision}-nhwc",
        55,
        "profile",
        {"model": model, "precision": precision, "layout": "nhwc", "batch": 128, "groups": 4, "max_time": 2},
    )
    for model, precision in CONDITIONS
]

if __name__ == "__main__":
    raise SystemExit(main(__doc__, RUNS))
