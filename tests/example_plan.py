"""A ``plan`` document with two layers, as a finished run leaves it."""

from __future__ import annotations

from typing import Any

from tests.example import example_document

ABOUT = {"model": "wrn_10_1", "weights": "none", "data": "digits"}


def row(stage: str, key: str, variant: str = "standard", groups: int = 1, **fields: Any) -> dict[str, Any]:
    params = {name: fields.pop(name) for name in ("rank", "layer", "shape", "subject") if name in fields}
    about = {"stage": stage, "variant": variant, "groups": groups, **ABOUT, **params}
    return {"key": key, "status": "ok", "reason": None, "params": about, **fields}


def plan_document(**fields: Any) -> dict[str, Any]:
    compared = {"top5": 100.0, "kl": 0.01, "logit_error": 0.02, "test_images": 40}
    same = dict.fromkeys(("params_ratio", "macs_ratio", "time_ratio"), 1.0)
    shape = {"shape": "16 -> 16 3x3"}
    rows = [
        row("cost", "cost-a-gc-n4", "gc", 4, layer="a", counts={"params": 576, "macs": 36864}, seconds=1e-4, **shape),
        row("loss", "loss-a-gc-n4", "gc", 4, layer="a", loss=0.1, felt=0.02, **shape),
        row("choice", "choice-a", "gc", 4, layer="a", params_ratio=0.25, macs_ratio=0.25, time_ratio=0.5, loss=0.1,
            felt=0.02, better="BGC N=4", better_cost=0.0042, **shape),
        row("choice", "choice-b", layer="b", **same, loss=0.0, felt=0.0, **shape),
        row("proof", "proof-dense", subject="dense", **same, agreement=100.0, **compared),
        row("proof", "proof-plan", subject="plan", params_ratio=0.6, macs_ratio=0.6, time_ratio=0.71,
            time_ratio_ci95=[0.69, 0.73], agreement=95.0, **compared),
        row("proof", "proof-gc", subject="GC N=2", params_ratio=0.5, macs_ratio=0.5, time_ratio=0.7,
            agreement=84.0, **compared),
    ]  # fmt: skip
    plan = {"kind": "time", "asked": 0.7, "predicted": 0.7, "measured": 0.71, "loss": 0.02,
            "choices": {"a": {"variant": "gc", "groups": 4}, "b": {"variant": "standard"}},
            "curve": [{"cost": 0.4, "loss": 0.3}, {"cost": 1.0, "loss": 0.0}]}  # fmt: skip
    own = {"command": "plan", "results": rows, "plan": plan, "interleaved": [], "config": {}, "ceilings": None}
    return example_document() | own | fields


def with_plan(document: dict[str, Any], like: tuple[str, int] = ("gc", 4)) -> dict[str, Any]:
    """A document of trainings or conversions with a planned network, whose numbers are those of another row."""
    layers = [
        {"name": f"stages.{stage}.0.conv2", "also": [], "in_channels": 16, "out_channels": 16, "bias": False,
         **{side: [3, 3] for side in ("kernel", "stride", "padding", "dilation")}, "padding_mode": "zeros", "height": 8,
         "width": 8, "calls": 1, "variant": variant, "groups": groups, "rank": rank}
        for stage, (variant, groups, rank) in enumerate([("gc", 4, None), ("gc", 4, None), ("lowrank", 3, 8)])
    ]  # fmt: skip
    made = []
    for found in document["results"]:
        params = found["params"]
        if (params["variant"], params["groups"]) == like:
            key = found["key"].replace("{}-n{}".format(*like), "plan")
            convert = {**(found.get("convert") or {}), "planned": True, "layers": layers, "replaced": [], "kept": []}
            plan = {"variant": "plan", "groups": 1}
            made.append({**found, "key": key, "params": {**params, **plan}, "convert": convert})
    return {**document, "results": [*document["results"], *made]}
