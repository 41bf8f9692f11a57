"""Plans of EfficientNet-lite0's pointwise convolutions for several budgets, on photographs never seen.

    python -m benchmarks.plan_efficientnet_lite --photos FOLDER [--out results/plan-efficientnet_lite0-cpu.json]
    python -m benchmarks.plan_efficientnet_lite --draw results/plan-efficientnet_lite0-cpu.json

Network, photographs, splits and what is compared: see benchmarks.transfer_efficientnet_lite. At each share of the
pointwise convolutions' parameters three networks: the plan by predicted loss, the best uniform conversion by predicted
loss (what ``bgcbench plan --quick`` tries out), and low rank with ranks spread under the budget. All of them with init
'refit'; at one budget the plan with 'calibrated' as well, which leaves alone what stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import torch

import bgcbench
from benchmarks.common import save
from benchmarks.files import PlannedPhotographFile
from benchmarks.transfer_efficientnet_lite import SIDE, Comparison, Trial, logits, network, numbers, photographs
from bgcbench.conversion.convert import candidates
from bgcbench.planning.choices import Problem, best_families
from bgcbench.planning.decision import choose
from bgcbench.planning.plan import Seen, counted_problem, held_outputs, scored

VARIANTS, GROUPS = ("gc", "bgc", "lowrank"), (2, 4, 8)
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
LABELS = {
    "plan": "bgcbench plan",
    "uniform": "best choice for all layers",
    "low rank": "low rank, ranks under a budget",
}
BOTH_INITS = 0.7  # the budget at which the plan is converted with 'calibrated', too


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """A converted network. predicted: loss, where it is known; held_out: error of the outputs on photographs that were
    held out to choose by; params_ratio: of the pointwise convolutions' parameters, what remains."""

    seed: int
    budget: float
    how: str
    label: str
    init: str
    predicted: float | None
    params_ratio: float
    held_out: float
    unseen: Comparison
    seen: Comparison


def asked_for(problem: Problem, budget: float) -> dict[str, tuple[str, dict[str, Any], float | None]]:
    """By what it is: a label, the arguments of bgcbench.convert, and the predicted loss."""
    plan = choose(problem, "params", budget)
    ((label, uniform),) = best_families(problem, "params", budget, quick=True).values()
    return {
        "plan": ("plan", {"plan": plan}, problem.felt(plan)),
        "uniform": (label, {"plan": uniform}, problem.felt(uniform)),
        "low rank": ("LR, budget", {"variant": "lowrank", "budget": budget}, None),
    }


def draw(path: Path) -> None:
    """The curves of the first split that the result file ``path`` holds, beside it."""
    from matplotlib import pyplot

    found = msgspec.json.decode(path.read_bytes(), type=PlannedPhotographFile).results
    rows = [row for row in found if row.init == "refit" and row.seed == found[0].seed]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for how, look in {"plan": "o-", "uniform": "s--", "low rank": "^:"}.items():
        points = [row for row in rows if row.how == how]
        shares, kept = [row.params_ratio for row in points], [row.unseen.agreement for row in points]
        axes.plot(shares, kept, look, label=LABELS[how])
        if how == "uniform":
            for share, agreement, row in zip(shares, kept, points, strict=True):
                axes.annotate(
                    row.label, (share, agreement), xytext=(-7, 4), textcoords="offset points", fontsize=8, ha="right"
                )
    axes.set(xlabel="share of the pointwise convolutions' parameters", ylabel="first guesses kept, % of photographs",
             title="EfficientNet-lite0, converted without training", ylim=(0, 100))  # fmt: skip
    axes.legend(loc="upper left")
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photos", type=Path, help="a folder of photographs, subfolders too")
    source.add_argument("--draw", type=Path, metavar="FILE", help="draw the curves of this result file, and end")
    parser.add_argument("--out", type=Path, help="where to write the result file; none without it")
    parser.add_argument("--crops", type=int, default=4, help="of each photograph, to calibrate on (default 4)")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of splits and crops (default 0,1,2)")
    options = parser.parse_args()
    if options.draw is not None:
        draw(options.draw)
        return 0
    command = "python -m benchmarks.plan_efficientnet_lite --photos FOLDER"
    command += f" --crops {options.crops} --seeds {','.join(map(str, options.seeds))}"
    model, pictures = network(), photographs(options.photos)
    rows: list[Network] = []
    for seed in options.seeds:
        trial = Trial.of(model, pictures, seed, options.crops)
        names = trial.crops.names
        seen = Seen(batches=trial.batches, images=len(names), pictures=names, seed=seed)
        layers = candidates(model, example_input=(3, SIDE, SIDE)).chosen
        problem = scored(model, counted_problem(layers, VARIANTS, GROUPS), seen).solved_anew()
        original = held_outputs(model, seen)
        dense = {each.layer.name: each.dense.params for each in problem.layers}
        # The first seed tells the whole curve, the others what one budget comes to on other photographs.
        for budget in BUDGETS if seed == options.seeds[0] else (BOTH_INITS,):
            for how, (label, asked, predicted) in asked_for(problem, budget).items():
                for init in ("refit", "calibrated")[: 1 + (how == "plan" and budget == BOTH_INITS)]:
                    wanted = {**trial.options, "init": init, "example_input": (3, SIDE, SIDE), **asked}
                    done = bgcbench.convert(model, **wanted).model
                    left = (sum(p.numel() for p in done.get_submodule(name).parameters()) for name in dense)
                    compared: Any = trial.evaluate(lambda images, done=done: logits(done, images))
                    rows.append(row := Network(
                        seed=seed, budget=budget, how=how, label=label, init=init, predicted=predicted,
                        params_ratio=sum(left) / sum(dense.values()), held_out=original.error(done), **compared,
                    ))  # fmt: skip
                    unseen = f"agrees {row.unseen.agreement:.1f} % KL {row.unseen.kl:.2f}"
                    print(f"{seed} {budget} {label:10} {init:10} {row.params_ratio:.3f} {unseen}", flush=True)
                    if options.out is not None:  # after each, as each takes a while
                        about = {"threads": torch.get_num_threads(), "photographs": len(pictures)}
                        save(options.out, command, {**about, "results": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
