"""Small approx documents with known errors, for tests of their pictures. Every number is made up."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from bgcbench.experiments.approx import ApproxConfig, plan
from bgcbench.experiments.approx_run import fits
from bgcbench.measure.counts import count
from bgcbench.results.rows import Counts, SampledRow
from bgcbench.theory.bounds import SCALING_POWER
from bgcbench.theory.exact import white_error
from bgcbench.theory.inputs import InputLaw
from tests.example import example_document

Json = dict[str, Any]
# How far below the exact value a made-up measurement is, and what the learned groups keep that others do not.
LOW, LEARNED = 0.99, 0.8


def new_document(**fields: Any) -> Json:
    """A document of ``approx`` without rows."""
    head = {name: example_document()[name] for name in ("schema", "argv", "started_at", "tool", "environment")}
    settings = {name: value for name, value in example_document()["settings"].items() if name != "phases"}
    return {**head, "settings": settings, "command": "approx", "complete": True, "exit_reason": "ok", **fields}


def sampled(spread: float = 1e-4, **options: Any) -> Json:
    """A document of sampled convolutions with made-up errors near the exact ones of white input."""
    config = ApproxConfig(
        **{"device": "cpu", "in_channels": 64, "out_channels": 64, "groups": (2, 4, 8, 16), **options}
    )
    rows = []
    for planned in plan(config):
        variant, groups = planned.params.variant, planned.params.groups
        exact = white_error(*planned.params.cell)
        share = LEARNED * (1 - 1 / groups) if exact is None else exact
        unit, energy = 1 / config.in_channels, 7000.0 * InputLaw.parse(planned.params.input).variance
        relative = LOW * share * unit
        power = SCALING_POWER.get(variant)
        built = {"gc": 1 - 1 / groups, "bgc": (1 - 1 / groups) ** 2}.get(variant)
        layer = count(config.spec(planned.params.choice), *config.size)
        rows.append(
            SampledRow(
                planned.key,
                "ok",
                None,
                planned.params,
                counts=msgspec.convert(layer, Counts, from_attributes=True),
                error=relative * energy,
                error_se=relative * energy * spread,
                relative_error=relative,
                relative_error_se=relative * spread,
                output_relative_error=LOW * share,
                scaled_error=relative / (1 - 1 / groups) ** power if power and groups > 1 else None,
                exact_relative_error=None if exact is None else exact * unit,
                in_sample_factor=LOW,
                construction_relative_error=None if built is None else built * unit,
            )
        )
    return new_document(results=[row.to_json() for row in rows], fits=[fit.to_json() for fit in fits(rows)])


def network(
    layers: tuple[str, ...] = ("layer1.0.conv2", "layer1.1.conv2", "layer4.2.conv2"),
    variants: tuple[str, ...] = ("gc", "bgc"),
    groups: tuple[int, ...] = (2, 4, 8),
    **names: Any,
) -> Json:
    """A document of a network's layers; N = 8 does not fit the second one."""
    rows = []
    for depth, layer in enumerate(layers):
        for variant, n in itertools.product(variants, groups):
            fitting = not (depth == 1 and n == 8)
            error = (white_error(variant, n) or 0.0) * (depth + 1) / len(layers)
            params = {"model": "resnet50", "weights": "IMAGENET1K_V2", "data": "digits", "calibration_images": 256}
            params |= {"layer": layer, "variant": variant, "groups": n, "input": "activations", **names}
            params |= {"kernel": 3, "kernel_width": 3, "stride": 1, "in_channels": 64, "out_channels": 64}
            errors = {"copy": min(1.0, 2 * error), "white": min(1.0, 1.5 * error), "calibrated": error}
            rows.append(
                {
                    "key": f"{layer}-{variant}-n{n}",
                    "params": params,
                    "status": "ok" if fitting else "invalid",
                    "reason": None if fitting else "64 channels",
                    "counts": None,
                    "output_relative_error": errors if fitting else None,
                    **{"ridge": None, "rows": 1, "held_out_rows": 1, "macs_share": None},
                }
            )
    return new_document(results=rows)


def row_of(document: Json, variant: str, groups: int, name: str = "normal") -> Json:
    wanted = {"variant": variant, "groups": groups, "input": name}
    return next(row for row in document["results"] if wanted.items() <= row["params"].items())
