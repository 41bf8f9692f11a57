"""What solving all convolutions together saves: ``bgcbench approx`` against two ways of solving the same problems.

    python -m benchmarks.approx_solver [--rounds 5] [--convolutions 2] [--out results/approx-solver.json]

The default shape of ``bgcbench approx`` (1-D, 256 -> 256 channels, K = 3, length 32, N = 4..64) with S convolutions and
S normal inputs, GC and BGC:

    ours          a whole run, from sampling to rows: second moments, no problem is solved by itself
    conventional  one torch.linalg.lstsq a convolution, variant, N and group on the explicit design matrix (S D rows);
                  measured on some convolutions and scaled to S, sampling and design matrices counted once
    shared        one QR a variant, N and group, for the stacked outputs of all convolutions

Ours and the shared factorisation are run in turns. Exit code 1 if any two of the three disagree by more than 1e-9.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import save
from bgcbench.experiments.approx import ApproxConfig, plan
from bgcbench.experiments.approx_run import ApproxRun, draw_inputs, open_session
from bgcbench.experiments.base import Session
from bgcbench.experiments.profile import row_seed
from bgcbench.theory.sampled import he_rows

LIMIT = 1e-9
VARIANTS = ("gc", "bgc")
Errors = dict[tuple[str, int], Tensor]  # (variant, N) -> (1/S) sum over inputs of ||Wx - Vx||^2, a convolution each
Result = TypeVar("Result")


def ours(config: ApproxConfig, session: Session) -> dict[tuple[str, int], float]:
    """The mean errors of a run, from sampling to rows."""
    run = ApproxRun(config, session, plan(config))
    for _ in run.run():
        pass
    return {(row.params.variant, row.params.groups): row.error for row in run.results if row.error is not None}


def sampled(config: ApproxConfig) -> tuple[Tensor, Tensor]:
    """The inputs' im2col matrix (S D, nK) and the convolutions (S, m, nK) of the run."""
    seeds = functools.partial(row_seed, config.seed)
    (law,) = config.laws
    generator = torch.Generator().manual_seed(seeds(f"inputs:{law.name}"))
    x = draw_inputs(law, (config.samples, config.in_channels, *config.size), generator)
    spec: Any = config.spec()
    patches = F.unfold(x, spec.kernel_size, padding=spec.padding, stride=spec.stride)  # (S, nK, D)
    size = patches.shape[1]
    rows = [he_rows(row, config.samples, size, seeds, torch.float64) for row in range(config.out_channels)]
    return patches.transpose(1, 2).flatten(0, 1), torch.stack(rows, 1)


def designs(patches: Tensor, groups: int) -> list[Tensor]:
    """[u^k, ubar] of every group: (S D, 2 nK/N)."""
    parts = patches.chunk(groups, 1)
    mean = patches.unflatten(1, (groups, -1)).mean(1)
    return [torch.cat([own, mean], 1) for own in parts]


def prepared(config: ApproxConfig) -> tuple[Tensor, Tensor, dict[int, list[Tensor]]]:
    """What the conventional problems have in common: the sample, and every N's designs."""
    patches, weights = sampled(config)
    return patches, weights, {groups: designs(patches, groups) for groups in config.groups}


def conventional(config: ApproxConfig, patches: Tensor, weights: Tensor, at_hand: dict[int, list[Tensor]]) -> Errors:
    """One lstsq a convolution, variant, N and group; ``weights`` (some, m, nK), ``at_hand`` the designs of every N."""
    found: dict[tuple[str, int], list[float]] = {(v, n): [] for v in VARIANTS for n in config.groups}
    for weight in weights:
        outputs = patches @ weight.T  # (S D, m)
        for groups, both_of in at_hand.items():
            error = dict.fromkeys(VARIANTS, 0.0)
            for both, y in zip(both_of, outputs.chunk(groups, 1), strict=True):
                for variant, design in (("gc", both[:, : both.shape[1] // 2]), ("bgc", both)):
                    solution = torch.linalg.lstsq(design, y).solution
                    error[variant] += float((y - design @ solution).square().sum())
            for variant, value in error.items():
                found[variant, groups].append(value / config.samples)
    return {key: torch.tensor(errors, dtype=torch.float64) for key, errors in found.items()}


def shared(config: ApproxConfig) -> Errors:
    """Sampling, all outputs by one product, and a QR a variant, N and group: ||Y||^2 - ||Q^T Y||^2."""
    patches, weights = sampled(config)
    outputs = patches @ weights.transpose(0, 1).flatten(0, 1).T  # (S D, m S), output by output
    energies = outputs.square().sum(0).reshape(config.out_channels, -1)  # (m, S)
    found = {}
    for groups in config.groups:
        left = {variant: torch.zeros(config.samples, dtype=torch.float64) for variant in VARIANTS}
        for both, y, energy in zip(
            designs(patches, groups), outputs.chunk(groups, 1), energies.chunk(groups), strict=True
        ):
            for variant, design in (("gc", both[:, : both.shape[1] // 2]), ("bgc", both)):
                seen = (torch.linalg.qr(design).Q.T @ y).square_().sum(0)
                left[variant] += (energy - seen.reshape(energy.shape)).sum(0)
        found.update({(variant, groups): errors / config.samples for variant, errors in left.items()})
    return found


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--convolutions", type=int, default=2, help="how many are solved the conventional way")
    parser.add_argument("--samples", type=int, default=64, help="S")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=Path("results/approx-solver.json"))
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config = ApproxConfig(variants=VARIANTS, inputs=("normal",), samples=options.samples, device="cpu")
    some = min(options.convolutions, config.samples)
    session = open_session(config)

    times: dict[str, list[float]] = {"ours": [], "shared": []}
    errors: Errors = {}
    together: dict[tuple[str, int], float] = {}
    for number in range(options.rounds):
        for name in ("ours", "shared") if number % 2 == 0 else ("shared", "ours"):
            if name == "ours":
                seconds, together = timed(lambda: ours(config, session))
            else:
                seconds, errors = timed(lambda: shared(config))
            times[name].append(seconds)
            print(f"round {number + 1}: {name:10} {seconds:.2f} s", flush=True)
    setup_s, (patches, weights, at_hand) = timed(lambda: prepared(config))
    solve_s, alone = timed(lambda: conventional(config, patches, weights[:some], at_hand))
    scaled_s = setup_s + solve_s * config.samples / some
    print(
        f"conventional: {solve_s:.2f} s for {some} convolutions, so {scaled_s:.1f} s for {config.samples}", flush=True
    )

    difference = max(
        *(abs(together[key] / float(each.mean()) - 1) for key, each in errors.items()),
        *(float((alone[key] / each[:some] - 1).abs().max()) for key, each in errors.items()),
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ours_s, shared_s = medians.values()
    conventional, one_factor = scaled_s / ours_s, shared_s / ours_s
    save(
        options.out,
        " ".join(["python -m benchmarks.approx_solver", *sys.argv[1:]]),
        {
            "config": config.to_json(),
            "samples": config.samples,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "times_s": times,
            "medians_s": medians,
            "conventional": {
                "driver": "torch.linalg.lstsq's default",
                "convolutions": some,
                "setup_s": setup_s,
                "solve_s": solve_s,
                "scaled_s": scaled_s,
                "note": f"solved for {some} of {config.samples} convolutions; scaled_s is setup_s (sampling and "
                f"designs, once) + solve_s x {config.samples}/{some}",
            },
            "ratios": {"conventional": conventional, "shared": one_factor},
            "largest_relative_difference": difference,
            "errors": {f"{variant}-{groups}": value for (variant, groups), value in together.items()},
        },
    )
    print(
        f"ours {ours_s:.2f} s; conventional {conventional:.0f}x, shared {one_factor:.2f}x as "
        f"long; the three agree to {difference:.0e}"
    )
    return int(difference > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
