"""How many minor page faults inference and a training step of whole networks have, as the C library's memory is set.

    python -m benchmarks.page_faults [--batch 4] [--calls 8] [--out results/page-faults.json]

Each network, phase and state runs in a process of its own. untouched: nothing is set, as in anybody's script; kept and
fresh: as ``bgcbench profile --memory`` sets them. Counts, and no times: they are the same beside other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.common import CPU, save
from bgcbench.measure.allocator import memory_state, resolve_memory
from bgcbench.measure.device import CpuStopwatch, random_input
from bgcbench.measure.workload import NetworkWorkload
from bgcbench.models import build_model
from bgcbench.specs import NetSpec

NETWORKS = ("resnet50", "mobilenet_v2")
PHASES = ("fwd", "train_step")
UNTOUCHED = "untouched"


def faults_of(network: str, phase: str, state: str, batch: int, calls: int) -> list[int]:
    """Minor page faults of the first ``calls`` calls in this process."""
    spec, counted = NetSpec(network), list[int]()
    x = random_input((batch, *spec.size), CPU, torch.float32, "nchw", seed=0)
    cell = NetworkWorkload(build_model(spec), x, labels=torch.arange(batch)).cell(phase)
    with memory_state(None if state == UNTOUCHED else resolve_memory(state, "cpu")):
        CpuStopwatch(CPU).sample(cell, calls, counted)
    return counted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/page-faults.json"))
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "PHASE", "STATE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(faults_of(*options.one, options.batch, options.calls)))
        return 0
    numbers = ["--batch", str(options.batch), "--calls", str(options.calls)]
    rows = []
    for network in NETWORKS:
        for phase in PHASES:
            counted, late = {}, {}
            for state in (UNTOUCHED, "kept", "fresh"):
                command = [sys.executable, "-m", "benchmarks.page_faults", "--one", network, phase, state, *numbers]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                counted[state] = json.loads(done.stdout)
                late[state] = statistics.median(counted[state][options.calls // 2 :])
            reused = 1 - late[UNTOUCHED] / late["fresh"]
            rows.append({"network": network, "phase": phase, "minor_faults": counted, "late": late, "reused": reused})
            print(f"{network} {phase}: {late}, an untouched process reuses {reused:.0%}", flush=True)
    save(options.out, "python -m benchmarks.page_faults", {"batch": options.batch, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
