"""Whole networks with N = 4 on a CUDA device, channels-last, batch 128, one result file each. About 7 minutes.

    python -m benchmarks.networks_cuda [--only 'network-resnet50-*,...'] [--seconds 480] [--list]

Standard, GC and BGC: inference and a training step, eager, and as CUDA graphs, where the host costs nothing. The most
telling come first; what --seconds leave no time for is named and left out.
"""

from __future__ import annotations

from benchmarks.runs import Run, main

CONDITIONS = (
    ("wrn_28_10", "bf16", "eager"), ("resnet50", "bf16", "eager"),
    ("wrn_28_10", "bf16", "graph"), ("resnet50", "bf16", "graph"),
    ("mobilenet_v2", "bf16", "eager"), ("efficientnet_b0", "bf16", "eager"),
    ("wrn_28_10", "tf32", "eager"), ("resnet50", "tf32", "eager"),
)  # fmt: skip


def _run(model: str, precision: str, mode: str) -> Run:
    options = {"model": model, "precision": precision, "layout": "nhwc", "batch": 128, "groups": 4, "max_time": 2}
    suffix = "" if mode == "eager" else f"-{mode}"
    return Run(f"network-{model}-cuda-{precision}-nhwc{suffix}", 55, "profile", {**options, "mode": mode})


RUNS = [_run(*condition) for condition in CONDITIONS]

if __name__ == "__main__":
    raise SystemExit(main(__doc__, RUNS))
