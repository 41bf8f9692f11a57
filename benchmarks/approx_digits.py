"""A small network trained on real images, and what each of its convolutions loses.

    python -m benchmarks.approx_digits [--out results/approx-wrn_16_4-digits-cpu.json] [--plot FILE]

wrn_16_4 is trained on scikit-learn's digits by ``bgcbench train``, in a temporary folder; what is written is the result
of ``bgcbench approx --model wrn_16_4 --weights FILE --data digits``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from bgcbench.cli import main as command
from bgcbench.results.document import read

MODEL = "wrn_16_4"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/approx-wrn_16_4-digits-cpu.json"))
    parser.add_argument("--plot", type=Path, default=Path("results/approx-wrn_16_4-digits-cpu.png"))
    options = parser.parse_args()
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            code = command(["train", MODEL, "--data", "digits", "--variants", "standard", "--device", "cpu",
                            "--out", "trained.json"])  # fmt: skip
            if code:
                return code
            (row,) = read(Path("trained.json")).results
            weights = f"{MODEL}-digits-error{row.error_final:.1f}.pt"
            (final,) = Path(row.checkpoints).glob("final-*.pt")
            final.rename(weights)
            code = command(["approx", "--model", MODEL, "--weights", weights, "--data", "digits", "--device", "cpu",
                            "--variants", "gc,bgc,lowrank",
                            "--out", "r.json", "--plot", "r.png"])  # fmt: skip
        finally:
            os.chdir(start)
        if code == 0:
            shutil.copy(Path(folder, "r.json"), options.out)
            shutil.copy(Path(folder, "r.png"), options.plot)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
