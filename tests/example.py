"""A small profile document with known numbers, for tests of files and tables."""

from __future__ import annotations

import random
from typing import Any

from bgcbench.experiments.profile import ProfileConfig, plan
from bgcbench.measure.statistics import summarise

MEDIANS = {"standard-1": 8.0e-3, "gc-2": 4.0e-3, "bgc-2": 8.0e-3, "gc-4": 2.0e-3, "bgc-4": 4.4e-3}
ROUNDS = [r for r in range(1, 11) for _ in range(4)]


def _phase(median_s: float, seed: int, spread: float = 0.01) -> dict[str, Any]:
    draw = random.Random(seed)
    samples = [round(median_s * (1 + draw.gauss(0, spread)), 9) for _ in ROUNDS]
    summary = summarise(samples, ROUNDS)
    fields = {name: getattr(summary, name) for name in ("n", "median_s", "mean_s", "sd_s", "min_s", "q1_s", "q3_s")}
    return {
        "samples_s": samples,
        "rounds": list(ROUNDS),
        "first_call_s": 0.05,
        "host_s": None,
        "converged": True,
        "stop_reason": "converged",
        "summary": {**fields, "max_s": summary.max_s, "ci95_s": [summary.ci95_s.low, summary.ci95_s.high]},
        "derived": {
            "images_per_s": 128 / summary.median_s,
            "tflops": 1.0,
            "gbytes_per_s": 10.0,
            "roofline_fraction": 0.5,
            "bound": "compute",
            "launch_bound": None,
        },
    }


def example_document() -> dict[str, Any]:
    """Table 4's layer with N = 2 and 4, and N = 3 as an invalid row; every number is made up and fixed."""
    config = ProfileConfig(groups=(2, 3, 4), skip_invalid=True, device="cpu")
    rows = []
    for seed, planned in enumerate(plan(config)):
        row = planned.row.to_json()
        if not planned.invalid:
            median = MEDIANS[f"{planned.params.variant}-{planned.params.groups}"]
            peak = {"baseline_bytes": 100 * 2**20, "peak_bytes": 200 * 2**20, "peak_delta_bytes": 100 * 2**20}
            row |= {
                "status": "ok",
                "reason": None,
                "memory": row["memory"] | peak | {"method": "rss_sampled"},
                "phases": {"fwd": _phase(median / 3, seed), "fwd_bwd": _phase(median, 100 + seed)},
                "interleaved": 1,
            }
        rows.append(row)
    return {
        "schema": {"name": "bgcbench.result", "version": "1.0"},
        "command": "profile",
        "argv": ["profile"],
        "started_at": "2026-01-01T00:00:00Z",
        "finished_at": "2026-01-01T00:05:00Z",
        "complete": True,
        "exit_reason": "ok",
        "quality": "full",
        "tool": {"version": "0.1.0", "git_commit": None, "git_dirty": None},
        "environment": {
            "fingerprint": "0" * 64,
            "python": "3.11.7",
            "os": "Linux",
            "cpu": {"model": "Some CPU", "cores": 2, "threads": 2},
            "ram_bytes": 2**34,
            "torch": "2.15.0",
            "torchvision": "0.29.0",
            "cuda": None,
            "cudnn": None,
            "triton": None,
            "driver": None,
            "device": {
                "type": "cpu",
                "name": "Some CPU",
                "capability": None,
                "sm_count": None,
                "l2_bytes": 2**25,
                "total_bytes": 2**34,
            },
        },
        "settings": {
            "seed": 0,
            "precision": "fp32",
            "layout": "nchw",
            "tf32": {"conv": False, "matmul": False},
            "cudnn_benchmark": True,
            "mode": "eager",
            "cache": "warm",
            "memory": "kept",
        },
        "config": config.to_json(),
        "ceilings": {"flops_per_s": 1.5e11, "bytes_per_s": 3e10, "matmul_sizes": [1024, 2048], "copy_bytes": 2**27},
        "interleaved": [{"id": 1, "rows": 5, "rounds": 10, "canary": {"slow_rounds": []}}],
        "results": rows,
        "warnings": ["an example, not a measurement"],
    }
