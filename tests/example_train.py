"""A small train document with known errors, for tests of its table and its pictures. Every number is made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bgcbench.specs import VARIANTS
from bgcbench.theory.paper import printed_error
from tests.example import example_document

Json = dict[str, Any]
EPOCHS, CHANCE, IMAGES = 10, 90.0, 500
# The last errors of seeds 0, 1 and 2, in whole images of 500.
FINAL: dict[tuple[str, int], tuple[float, float, float]] = {
    ("standard", 1): (1.4, 1.2, 1.6),
    ("gc", 2): (2.0, 2.2, 1.8),
    ("gc", 4): (3.4, 3.8, 3.0),
    ("gc", 8): (6.0, 6.8, 6.4),
    ("shuffle", 2): (1.8, 2.0, 1.6),
    ("shuffle", 4): (2.4, 2.8, 2.6),
    ("shuffle", 8): (4.2, 4.0, 4.8),
    ("lgc", 2): (1.6, 1.8, 1.4),
    ("lgc", 4): (2.0, 2.6, 2.2),
    ("lgc", 8): (3.0, 3.8, 3.6),
    ("flgc", 2): (2.2, 3.0, 2.6),
    ("flgc", 4): (4.8, 4.2, 6.0),
    ("flgc", 8): (9.0, 11.4, 10.2),
    ("tlgc", 2): (1.6, 1.8, 2.0),
    ("tlgc", 4): (2.2, 2.4, 2.0),
    ("tlgc", 8): (3.2, 3.4, 3.0),
    ("bgc", 2): (1.2, 1.6, 1.4),
    ("bgc", 4): (1.8, 2.0, 1.6),
    ("bgc", 8): (2.8, 3.4, 2.8),
}
REST, REPLACED = 20_000, 288_000  # parameters that stay dense, and those of the convolutions that are replaced
MASKED = ("lgc", "flgc")
SETTINGS = ("seed", "precision", "layout", "tf32", "cudnn_benchmark")


def params_of(variant: str, groups: int) -> int:
    return REST + REPLACED * (2 if variant == "bgc" else 1) // groups


def row_of(document: Json, variant: str, groups: int, seed: int = 0) -> Json:
    """The row of one training."""
    wanted = {"variant": variant, "groups": groups, "seed": seed}
    return next(row for row in document["results"] if wanted.items() <= row["params"].items())


def _row(variant: str, groups: int, seed: int, error: float, dataset: str) -> Json:
    real = dataset != "synthetic"
    epochs = [_epoch(number, error, seed, variant, groups, real) for number in range(1, EPOCHS + 1)]
    params = params_of(variant, groups)
    counts = {"params": params, "macs": 64 * params, "adds": 0, "paper_ops": None, "bytes_min": 4 * params}
    if variant in MASKED:
        counts |= {"params_training": REST + REPLACED, "macs_training": 64 * (REST + REPLACED)}
    replaced = [] if variant == "standard" else ["stages.0.0.conv1", "stages.0.0.conv2"]
    return {
        "key": f"wrn_10_2-{dataset}-{variant}-n{groups}-s{seed}",
        "params": {
            **{"model": "wrn_10_2", "weights": "none", "dataset": dataset, "variant": variant, "groups": groups},
            **{"where": "auto", "init": "scratch", "rebn": False, "distill": False, "recipe": "digits"},
            **{"epochs": EPOCHS, "seed": seed, "batch_size": 64, "precision": "fp32", "layout": "nchw"},
            **{"height": 16, "width": 16, "classes": 10, "subset": None},
        },
        "status": "ok",
        "reason": None,
        "counts": counts,
        "epochs": epochs,
        "error_initial": CHANCE if real else None,
        "error_final": error if real else None,
        "error_best": round(error - 0.2, 1) if real else None,
        "epoch_best": EPOCHS - 1 if real else None,
        "error_final_top5": 0.2 if real else None,
        "test_images": IMAGES if real else None,
        "images_per_s": 1000.0 + 10 * seed + groups,
        "train_seconds": 12.5,
        "paper": None,
        "convert": {"replaced": replaced, "kept": [{"name": "stem", "reason": "the first convolution"}]},
        "checkpoints": None,
    }


def _epoch(number: int, error: float, seed: int, variant: str, groups: int, real: bool) -> Json:
    """A curve that falls from chance to ``error``, best one epoch before the last."""
    left = (EPOCHS - number) / EPOCHS
    test = error + (CHANCE - error) * left**3 * (1 + 0.1 * seed) if number != EPOCHS - 1 else error - 0.2
    learnt = {"flgc": {"dead_outputs": 0.0}, "lgc": {"kept": max(1 / groups, left)}}.get(variant)
    return {
        "epoch": number,
        "lr": 0.1 * left,
        "train_loss": 2.0 * left,
        "test_loss": 2.1 * left if real else None,
        "test_error": round(test, 3) if real else None,
        "test_error_top5": 0.2 if real else None,
        "seconds": 1.25,
        "images_per_s": 1000.0 + 10 * seed + groups,
        "learnt": learnt,
    }


def train_document(
    variants: Sequence[str] = tuple(VARIANTS),
    groups: Sequence[int] = (2, 4, 8),
    seeds: Sequence[int] = (0, 1, 2),
    dataset: str = "digits",
) -> Json:
    """All of ``FINAL`` that is asked for, in the order in which it would be trained."""
    cells = [(v, n) for v, n in FINAL if v in variants and (n in groups or n == 1)]
    rows = [_row(v, n, seed, FINAL[v, n][seed], dataset) for v, n in cells for seed in seeds]
    base = example_document()
    config = {
        **{"model": "wrn_10_2", "data": dataset, "recipe": "digits", "epochs": EPOCHS, "batch_size": 64},
        **{"seeds": list(seeds), "variants": list(variants), "groups": list(groups), "lr": 0.1, "momentum": 0.9},
        **{"nesterov": True, "weight_decay": 5e-4, "schedule": "onecycle", "milestones": [], "gamma": 0.1, "pad": 2},
        **{"flip": False, "label_smoothing": 0.0, "group_lasso": 1e-5, "accumulate": 1, "subset": None},
        **{"precision": "fp32", "layout": "nchw", "compile": False, "where": "auto"},
    }
    return {
        **base,
        "command": "train",
        "argv": ["train"],
        "settings": {**{name: base["settings"][name] for name in SETTINGS}, "world_size": 1},
        "config": config,
        "ceilings": None,
        "interleaved": [],
        "results": rows,
        "warnings": [],
    }


def stop(row: Json, status: str, reason: str, epochs: int = 0) -> None:
    """Make ``row`` one that ended with ``status`` after so many epochs."""
    gone = ("error_final", "error_best", "epoch_best", "error_final_top5")
    row.update(dict.fromkeys(gone), status=status, reason=reason, epochs=row["epochs"][:epochs])
    if status == "invalid":
        row.update(counts=None, convert=None, error_initial=None, images_per_s=None)


def papers(document: Json) -> Json:
    """The document with what the paper prints of WRN-28-10, for all but LGC."""
    for row in document["results"]:
        printed = printed_error("cifar10", "wrn_28_10", row["params"]["variant"], row["params"]["groups"])
        row["paper"] = None if printed is None else {"error": printed}
    return document
