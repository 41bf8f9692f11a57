"""Converts one network, as :mod:`bgcbench.experiments.conversion` says."""

from __future__ import annotations

import io

import torch

from bgcbench.conversion.convert import convert, save_converted
from bgcbench.conversion.selection import Indivisible
from bgcbench.data import open_images
from bgcbench.errors import ShapeError
from bgcbench.experiments.approx_network_run import UNTRAINED, Batches
from bgcbench.experiments.conversion import ConversionConfig
from bgcbench.experiments.images import prepared_for, sized, told, traced, warned
from bgcbench.experiments.network_run import network_counts
from bgcbench.experiments.profile import row_seed
from bgcbench.measure.trace import trace
from bgcbench.models import build_model
from bgcbench.models.weights import Weights, has_default
from bgcbench.results.rows import Conversion
from bgcbench.specs import is_own

BATCH = 32


def converted_network(config: ConversionConfig) -> tuple[bytes, Conversion]:
    """The file that ``bgcbench.load_converted`` reads, and what was done.

    Raises UsageError for what is not there or does not fit, ShapeError where N or the rank does not fit.
    """
    usual = "own" if is_own(config.model) else "default" if has_default(config.spec) else "none"
    weights = Weights(config.model, config.weights or usual, config.weights_key)
    config = sized(config, weights)
    spec = config.spec
    images = (
        prepared_for(config, open_images(config.data, (spec.size[1], spec.size[2])), weights) if config.data else None
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row_seed(config.seed, "network"))
        dense = build_model(spec).eval()
    found = traced(dense, spec)
    loaded = weights.load_into(dense, spec)
    notes = [*loaded.notes, *([f"{config.model}: {UNTRAINED}"] if loaded.name == "none" else [])]
    calibration = None
    if images is not None:
        count = min(config.calibration_images, len(images))
        calibration = Batches(images, count, BATCH, config.seed, config.calibration_views)
        notes += [*told(images.preprocessing, weights), *warned(images.preprocessing, weights, config.model)]
    try:
        converted = convert(
            dense,
            **config.choice.to_json(),
            where=config.where,
            include=config.include,
            exclude=config.exclude,
            init=config.init or "white",
            on_indivisible="skip" if config.skip_invalid else "raise",
            example_input=spec.size,
            calibration=calibration,
            calibration_images=None if calibration is None else calibration.count * calibration.views,
            seed=config.seed,
        )
    except Indivisible as problem:
        raise ShapeError(f"{problem.fact}; keep them dense with --skip-invalid") from None
    after = converted.model.eval()
    file = io.BytesIO()
    save_converted(converted, file)
    done = Conversion(
        model=config.model,
        weights=loaded.name,
        before=network_counts(dense, found, 1, 4),
        after=network_counts(after, trace(after, spec.size), 1, 4),
        record=converted.record,
        notes=tuple(notes),
    )
    return file.getvalue(), done
