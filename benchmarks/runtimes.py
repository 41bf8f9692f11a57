"""Networks at half of their convolutions' parameters on the CPU: eager versus torch.compile versus ONNX Runtime.

    python -m benchmarks.runtimes resnet50 [--threads 1] [--max-time 10] [--folder results]

Dense, GC N=2, BGC N=4 and low rank N=2, one image at a time, all modes interleaved: what
``bgcbench profile --model resnet50 --mode eager,compile,onnxruntime`` measures, of these rows alone. One thread: on a
shared machine all threads of a call wait for the one that another program keeps from running. The result files are
runtimes-MODEL-cpu.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bgcbench.experiments.network_run import begun
from bgcbench.experiments.profile import NetworkConfig
from bgcbench.results import Document, write_atomically
from bgcbench.results.document import dumps

CELLS = (("standard", 1), ("gc", 2), ("bgc", 4), ("lowrank", 2))


def measured(config: NetworkConfig) -> Document:
    """The result of ``CELLS`` among the rows of ``config``."""
    run, document = begun(config, [(*cell, None) for cell in CELLS])
    document.argv = tuple(sys.argv[1:])
    said = ""
    for update in run.run():
        if update.progress is None and update.doing != said:
            print(said := update.doing, file=sys.stderr, flush=True)
    run.take_into(document)
    document.finish(len(run.planned))
    return document


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--folder", type=Path, default=Path("results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--mode", default="eager,compile,onnxruntime")
    parser.add_argument("--max-time", type=float, help="seconds of sampling a row")
    parser.add_argument("--size", type=int, help="px of a side, where it is not the network's own")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args(argv)
    failed = 0
    for model in asked.models:
        config = NetworkConfig(
            model=model, groups=(2, 4), variants=("gc", "bgc", "lowrank"), batch=1, phases=("fwd",),
            mode=asked.mode, device="cpu", skip_invalid=True, threads=asked.threads,
            max_time_s=asked.max_time, quick=asked.quick, height=asked.size, width=asked.size,
        )  # fmt: skip
        document = measured(config)
        write_atomically(asked.folder / f"runtimes-{model}-cpu.json", dumps(document).encode())
        for row in document.results:
            print(row.key, row.status, row.reason or f"{(row.median_s('fwd') or 0) * 1e3:.2f} ms", row.forms)
        failed += sum(row.status != "ok" for row in document.results)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
