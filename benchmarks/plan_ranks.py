"""Whether predicted losses rank plans as the converted networks do: random plans of wrn_16_4 on digits.

    python -m benchmarks.plan_ranks --weights FILE... [--plans 30] [--out results/plan-ranks-cpu.json]

FILE: a trained wrn_16_4 (``bgcbench train wrn_16_4 --data digits``). A random plan replaces each layer with a
probability drawn for the plan, by a choice drawn for the layer. Predicted is the sum of what the network feels of the
choices, and for comparison the sum of the layers' losses alone; real are KL(original || converted) and the squared
error of the class scores on the 500 test images. Said is Spearman's correlation of each with each.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import msgspec
import torch
from scipy.stats import spearmanr

import bgcbench
from benchmarks.common import save
from bgcbench.conversion.convert import candidates
from bgcbench.data.digits import open_digits
from bgcbench.experiments.plan_run import compare, outputs_of
from bgcbench.planning.choices import Problem
from bgcbench.planning.plan import Seen, counted_problem, scored

VARIANTS, GROUPS, IMAGES = ("gc", "shuffle", "bgc", "lowrank"), (2, 4, 8, 16), 256
REAL = ("kl", "logit_error")


class Tried(msgspec.Struct, frozen=True):
    """A random plan: how many layers it replaces, what was predicted of it and what it lost."""

    weights: str
    replaced: int
    felt: float
    plain: float
    kl: float
    logit_error: float
    agreement: float


def random_plan(problem: Problem, draw: random.Random) -> dict[str, bgcbench.Choice]:
    """Of each layer a choice, or none."""
    share = draw.random()
    every = [(each.layer.name, draw.choice(each.options[1:]).choice, draw.random() < share) for each in problem.layers]
    return {name: choice if replaced else bgcbench.Choice() for name, choice, replaced in every}


def tried(path: Path, plans: int) -> list[Tried]:
    """Random plans of the network whose weights are in ``path``."""
    model = bgcbench.build_model("wrn_16_4")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    digits = open_digits()
    batches = list(digits.batches(IMAGES, 64, seed=0))
    test = list(digits.test_split.batches(500, 100, seed=0))
    original = outputs_of(model.eval(), test)
    layers = candidates(model, example_input=batches[0][:1]).chosen
    bare = counted_problem(layers, VARIANTS, GROUPS)
    problem = scored(model, bare, Seen(batches=batches, images=IMAGES)).solved_anew()
    draw, found = random.Random(0), []
    while len(found) < plans:
        plan = random_plan(problem, draw)
        if all(choice.is_dense for choice in plan.values()):
            continue
        done = bgcbench.convert(model, plan=plan, init="refit", calibration=batches, calibration_images=IMAGES)
        real = compare(original, outputs_of(done.model, test))
        plain = sum(each.of(plan[each.layer.name]).loss for each in problem.layers)
        shown = {name: real[name] for name in (*REAL, "agreement")}
        found.append(Tried(path.name, len(done.record.replaced), problem.felt(plan), plain, **shown))
        print(found[-1], flush=True)
    return found


def correlations(found: list[Tried]) -> dict[str, float]:
    """Of each prediction with each real loss, over the plans of one network."""
    return {
        f"{predicted} {real}": float(
            spearmanr([getattr(one, predicted) for one in found], [getattr(one, real) for one in found]).statistic
        )
        for predicted in ("felt", "plain")
        for real in REAL
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="checkpoints of a trained wrn_16_4")
    parser.add_argument("--plans", type=int, default=30, help="random plans of each network (default 30)")
    parser.add_argument("--out", type=Path, help="where to write the result file; none without it")
    options = parser.parse_args()
    results = {path.name: tried(path, options.plans) for path in options.weights}
    said: dict[str, Any] = {name: correlations(found) for name, found in results.items()}
    for name, each in said.items():
        print(name, {what: round(value, 3) for what, value in each.items()})
    if options.out is not None:
        command = f"python -m benchmarks.plan_ranks --weights FILE... --plans {options.plans}"
        every = [one for found in results.values() for one in found]
        save(options.out, command, {"results": every, "correlations": said})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
