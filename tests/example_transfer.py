"""A small transfer document with known errors, for tests of its table and its pictures. Every number is made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bgcbench.results.document import stage_of
from tests.example import example_document
from tests.example_train import params_of

Json = dict[str, Any]
EPOCHS, IMAGES, UNTOUCHED, LOST = 3, 500, 0.6, 89.6
LAYERS = ("stages.0.0.conv1", "stages.0.0.conv2", "stages.1.0.conv1", "stages.1.0.conv2")
# Errors of seeds 0, 1 and 2, in whole images of 500, before any training, with batch norm re-estimated; without, all
# but the calibrated ones are LOST.
BEFORE: dict[tuple[str, int, str], tuple[float, float, float]] = {
    ("gc", 2, "copy"): (4.0, 4.2, 3.8),
    ("gc", 4, "copy"): (23.6, 24.0, 23.2),
    ("gc", 8, "copy"): (68.8, 70.0, 67.6),
    ("gc", 2, "white"): (3.0, 3.2, 2.8),
    ("gc", 4, "white"): (21.0, 22.0, 20.0),
    ("gc", 8, "white"): (66.0, 68.0, 64.0),
    ("gc", 2, "calibrated"): (0.8, 1.0, 0.6),
    ("gc", 4, "calibrated"): (1.0, 1.2, 0.8),
    ("gc", 8, "calibrated"): (6.0, 6.6, 5.4),
    ("tlgc", 2, "calibrated"): (0.8, 0.8, 0.8),
    ("tlgc", 4, "calibrated"): (0.8, 0.6, 1.0),
    ("tlgc", 8, "calibrated"): (4.0, 4.4, 3.6),
    ("bgc", 2, "copy"): (2.0, 2.2, 1.8),
    ("bgc", 4, "copy"): (4.8, 5.2, 4.4),
    ("bgc", 8, "copy"): (54.8, 56.0, 53.6),
    ("bgc", 2, "white"): (0.6, 0.6, 0.6),
    ("bgc", 4, "white"): (4.0, 4.4, 3.6),
    ("bgc", 8, "white"): (50.0, 54.0, 46.0),
    ("bgc", 2, "calibrated"): (0.6, 0.6, 0.6),
    ("bgc", 4, "calibrated"): (0.6, 0.8, 0.4),
    ("bgc", 8, "calibrated"): (1.6, 1.8, 1.4),
}
# After training, calibrated; copied and white end 0.4 points higher, from scratch 2.0.
AFTER: dict[tuple[str, int], tuple[float, float, float]] = {
    ("standard", 1): (0.4, 0.6, 0.4),
    ("gc", 2): (0.6, 0.8, 0.4),
    ("gc", 4): (0.8, 1.0, 0.6),
    ("gc", 8): (1.6, 2.0, 1.8),
    ("tlgc", 2): (0.6, 0.6, 0.6),
    ("tlgc", 4): (0.8, 0.8, 0.8),
    ("tlgc", 8): (1.4, 1.6, 1.2),
    ("bgc", 2): (0.4, 0.4, 0.4),
    ("bgc", 4): (0.6, 0.8, 0.4),
    ("bgc", 8): (1.2, 1.4, 1.0),
}
MORE = {"copy": 0.4, "white": 0.4, "calibrated": 0.0, "scratch": 2.0, "none": 0.0}
# Seconds of an inference and of a training step; each is known to 5 %.
SECONDS: dict[tuple[str, int], tuple[float, float]] = {
    ("standard", 1): (0.010, 0.030),
    ("gc", 2): (0.006, 0.020),
    ("gc", 4): (0.004, 0.012),
    ("gc", 8): (0.003, 0.008),
    ("bgc", 2): (0.0115, 0.033),
    ("bgc", 4): (0.0058, 0.021),
    ("bgc", 8): (0.0045, 0.0135),
}


def row_of(
    document: Json, variant: str, groups: int, seed: int = 0, init: str = "calibrated", rebn: bool = True
) -> Json:
    """The row of one conversion; of the untouched network for N = 1."""
    wanted: Json = {"variant": variant, "groups": groups, "seed": seed}
    wanted |= {} if variant == "standard" else {"init": init, "rebn": rebn}
    return next(row for row in document["results"] if wanted.items() <= row["params"].items())


def before(variant: str, groups: int, init: str, rebn: bool, seed: int) -> float:
    """The error (percent) of a conversion before any training."""
    if variant == "standard":
        return UNTOUCHED
    if init == "scratch":
        return 90.0
    error = BEFORE[variant, groups, init][seed]
    return error if rebn else error + 2 if init == "calibrated" else LOST


def _row(variant: str, groups: int, init: str, rebn: bool, seed: int, about: Json) -> Json:
    dense, dataset, epochs = variant == "standard", about["dataset"], about["epochs"]
    if dense:
        init, epochs = "none", epochs if about["control"] else 0
    real = dataset != "synthetic"
    first = before(variant, groups, init, rebn, seed)
    last = round(AFTER[variant, groups][seed] + MORE[init], 1)
    params = params_of(variant, groups)
    counts = {"params": params, "macs": 64 * params, "adds": 0, "paper_ops": None, "bytes_min": 4 * params}
    key = f"wrn_16_4-{dataset}-{variant}-n{groups}" + ("" if dense else f"-{init}") + f"-s{seed}"
    record: Json = {"replaced": [], "kept": [{"name": "stem", "reason": "the first convolution"}], "calibration": None}
    if not dense:
        record["replaced"] = list(LAYERS)
        record["calibration"] = _calibration(variant, groups, init, rebn, seed)
    trained = {
        "epochs": [_epoch(number, first, last, real) for number in range(1, epochs + 1)],
        "error_final": last if real and epochs else None,
        "error_best": round(last - 0.2, 1) if real and epochs else None,
        "epoch_best": epochs - 1 if real and epochs else None,
        "error_final_top5": None,
        "images_per_s": 1000.0 + groups if epochs else None,
        "train_seconds": 1.25 * epochs,
    }
    return {
        "key": key if dense or rebn else f"{key}-norebn",
        "params": {
            **{"model": "wrn_16_4", "weights": "digits-s0.pt", "dataset": dataset, "variant": variant},
            **{"groups": groups, "where": "auto", "init": init, "rebn": rebn and not dense, "distill": False},
            **{"recipe": "paper", "epochs": epochs, "seed": seed, "batch_size": 128, "precision": "fp32"},
            **{"layout": "nchw", "height": 16, "width": 16, "classes": 10, "subset": None},
            "calibration_images": 512 if rebn or init == "calibrated" else None,
        },
        "status": "ok",
        "reason": None,
        "counts": counts,
        "error_initial": first if real else None,
        "error_initial_top5": None,
        "loss_initial": first / 20 if real else None,
        "agreement_initial": None if dense or not real else round(100.2 - first, 1),
        **trained,
        "train_images": 1297,
        "test_images": IMAGES if real else None,
        "convert_seconds": None if dense else 2.0 + groups,
        "world_size": 1,
        "paper": None,
        "convert": record,
        "checkpoints": None,
        "saved": None,
        "time": _time(variant, groups) if about["time"] else None,
    }


def _epoch(number: int, first: float, last: float, real: bool) -> Json:
    left = (EPOCHS - number) / EPOCHS
    test = round(last + (first - last) * left**2, 3) if real else None
    return {
        **{"epoch": number, "lr": 0.01, "train_loss": left, "test_loss": left if real else None, "test_error": test},
        **{"test_error_top5": None, "seconds": 1.25, "images_per_s": 1000.0, "learnt": None},
    }


def _calibration(variant: str, groups: int, init: str, rebn: bool, seed: int) -> Json | None:
    """Deeper layers lose less; calibrated a tenth of what white does, which for BGC with two groups is nothing."""
    if init != "calibrated" and not rebn:
        return None
    white = 1 - (2 if variant == "bgc" else 1) / groups
    copied = (1 - 1 / groups) ** (2 if variant == "bgc" else 1)
    layers = [
        {
            **{"name": name, "groups": groups, "copied": copied / (1 + depth), "before": white / (1 + depth)},
            **{"after": white / (10 + 2 * depth + seed), "rows": 12000, "held_out_rows": 4000, "condition": 1.3e4},
            **{"ridge": 0.001 * 10 ** min(depth, 9), "centred": True, "scarce": False},
        }
        for depth, name in enumerate(LAYERS)
    ]
    return {
        **{"images": 512, "held_out": 128 if init == "calibrated" else 0, "seed": seed, "rebn": rebn, "norms": 9},
        **{"seconds": 4.2, "moment_bytes": 2**20, "in_flight_bytes": 2**20},
        "layers": layers if init == "calibrated" else [],
    }


def _time(variant: str, groups: int) -> Json:
    def phase(seconds: float, dense: float) -> Json:
        ratio = dense / seconds
        return {
            **{"median_s": seconds, "n": 30, "ci95_s": [0.95 * seconds, 1.05 * seconds], "ratio": ratio},
            "ratio_ci95": [1.0, 1.0] if variant == "standard" else [0.95 * ratio, 1.05 * ratio],
        }

    pairs = zip(("fwd", "train_step"), SECONDS[variant, groups], SECONDS["standard", 1], strict=True)
    return {
        "phase": {name: phase(own, dense) for name, own, dense in pairs},
        **{"batch": 128, "precision": "fp32", "layout": "nchw"},
    }


def transfer_document(
    variants: Sequence[str] = ("gc", "bgc"),
    groups: Sequence[int] = (2, 4, 8),
    seeds: Sequence[int] = (0, 1, 2),
    inits: Sequence[str] = ("calibrated",),
    rebn: Sequence[bool] = (True,),
    epochs: int = 0,
    control: bool = False,
    time: bool = False,
    dataset: str = "digits",
) -> Json:
    """The untouched network and all conversions that are asked for, in the order in which they would be trained."""
    about = {"dataset": dataset, "epochs": epochs, "control": control, "time": time}
    grid = [(v, n, init, norms) for n in groups for v in variants for init in inits for norms in rebn]
    cells = [("standard", 1, "none", False), *grid]
    rows = [_row(*cell, seed, about) for seed in seeds for cell in cells]
    base = example_document()
    config = {
        **{"model": "wrn_16_4", "data": dataset, "recipe": "paper", "epochs": epochs, "batch_size": 128},
        **{"seeds": list(seeds), "variants": list(variants), "groups": list(groups), "lr": 0.01, "momentum": 0.9},
        **{"nesterov": True, "weight_decay": 1e-4, "schedule": "constant", "milestones": [], "gamma": 0.1, "pad": 2},
        **{"flip": False, "label_smoothing": 0.0, "group_lasso": 0.0, "accumulate": 1, "subset": None},
        **{"precision": "fp32", "layout": "nchw", "compile": False, "where": "auto", "control": control},
    }
    return {
        **base,
        "command": "transfer",
        "argv": ["transfer"],
        "settings": {**base["settings"], "world_size": 1},
        "config": config,
        "ceilings": None,
        "interleaved": [],
        "results": rows,
        "warnings": [],
    }


def stop(row: Json, status: str, reason: str, *, converted: bool = True, epochs: int = 0) -> None:
    """Make ``row`` one that ended with ``status``, after so many epochs, or before it was ``converted``."""
    trained = ("error_final", "error_best", "epoch_best", "error_final_top5", "images_per_s")
    row.update(dict.fromkeys(trained), status=status, reason=reason, epochs=row["epochs"][:epochs])
    if not converted:
        row.update(dict.fromkeys(("error_initial", "loss_initial", "agreement_initial", "convert_seconds")))
        row["convert"] = None
    if status == "invalid":
        row["counts"] = None
    row["stage"] = stage_of(row)
