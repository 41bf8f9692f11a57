"""Table 4 on a CUDA device: every precision, layout and mode, one result file each. About 7 minutes.

    python -m benchmarks.table4_cuda [--only 'table4-cuda-bf16-*,...'] [--seconds 480] [--list]

The most telling conditions come first; what --seconds leave no time for is named and left out.
"""

from __future__ import annotations

from benchmarks.runs import Run, main

CONDITIONS = (
    ("bf16", "nhwc", "graph"), ("tf32", "nhwc", "graph"), ("fp32", "nchw", "eager"), ("bf16", "nhwc", "eager"),
    ("fp32", "nhwc", "graph"), ("tf32", "nhwc", "eager"), ("bf16", "nchw", "graph"), ("tf32", "nchw", "graph"),
    ("fp32", "nchw", "graph"), ("bf16", "nchw", "eager"), ("tf32", "nchw", "eager"), ("fp32", "nhwc", "eager"),
)  # fmt: skip
RUNS = [
    Run(
        f"table4-cuda-{precision}-{layout}-{mode}",
        45 if precision == "fp32" else 35,
        "profile",
        {"preset": "table4", "precision": precision, "layout": layout, "mode": mode, "max_time": 1.5},
    )
    for precision, layout, mode in CONDITIONS
]

if __name__ == "__main__":
    raise SystemExit(main(__doc__, RUNS))
