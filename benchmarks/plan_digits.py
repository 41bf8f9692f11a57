"""Planned networks versus the best uniform ones, at the same share of the parameters: wrn_16_4 on digits.

    python -m benchmarks.plan_digits --weights FILE... --folder RUNS [--out results/plan-wrn_16_4-digits-cpu.json]

FILE: a trained wrn_16_4 (``bgcbench train wrn_16_4 --data digits``), several for several seeds. Each is planned with
``bgcbench plan`` for each budget, and what the plans and the best choice of every variant for all layers come to on
the 500 test images is kept. Costs and losses are measured for the first budget only. RUNS keeps the result files; those
that are complete are not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import save
from benchmarks.files import PlannedNetwork
from bgcbench.cli import main as bgcbench
from bgcbench.results import read
from bgcbench.results.rows import PlanRow

VARIANTS, BUDGETS = "gc,shuffle,bgc,lowrank", (0.125, 0.25)


def planned(weights: Path, budget: float, folder: Path) -> Path:
    """The result file of that plan, made where it is not there."""
    path, first = (folder / f"{weights.stem}-{share:g}.json" for share in (budget, BUDGETS[0]))
    if not (path.exists() and read(path).complete):
        words = ["plan", "wrn_16_4", "--weights", str(weights), "--data", "digits", "--params", f"{budget:g}"]
        words += ["--variants", VARIANTS, "--quiet"]
        words += ["--resume", str(path)] if path.exists() else ["--out", str(path)]
        if path != first:
            words += ["--measured", str(first)]
        if code := bgcbench(words):
            raise SystemExit(code)
    return path


def networks(path: Path, weights: Path, budget: float) -> list[PlannedNetwork]:
    """What the file says of each network."""
    proof: list[PlanRow] = [row for row in read(path).results if row.params.stage == "proof" and row.status == "ok"]
    return [
        PlannedNetwork(
            weights=weights.name, budget=budget, network=row.params.subject or "", params_ratio=row.params_ratio or 0.0,
            error=row.error or 0.0, agreement=row.agreement or 0.0, kl=row.kl or 0.0,
            logit_error=row.logit_error or 0.0,
        )
        for row in proof
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="checkpoints of a trained wrn_16_4")
    parser.add_argument("--folder", type=Path, required=True, help="where the result files of the plans are kept")
    parser.add_argument("--out", type=Path, help="where to write what they say; nowhere without it")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[PlannedNetwork] = []
    for weights in options.weights:
        for budget in BUDGETS:
            own = networks(planned(weights, budget, options.folder), weights, budget)
            for row in own:
                said = f"error {row.error:.2f} % agrees {row.agreement:.1f} % KL {row.kl:.4f}"
                print(f"{row.weights} {row.budget:g} {row.network:12} {said}", flush=True)
            found += own
    if options.out is not None:
        save(options.out, "python -m benchmarks.plan_digits --weights FILE... --folder RUNS", {"results": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
