"""Converts one network, as :mod:`bgcbench.experiments.conversion` says."""

from __future__ import annotations

import io

from bgcbench.conversion.convert import save_converted
from bgcbench.data import open_images
from bgcbench.experiments.approx_network_run import UNTRAINED, Batches
from bgcbench.experiments.conversion import ConversionConfig
from bgcbench.experiments.images import prepared_for, seeded, sized, told, traced, usual_weights, warned
from bgcbench.experiments.network_run import converted_as_chosen, network_counts
from bgcbench.experiments.profile import row_seed
from bgcbench.measure.trace import trace
from bgcbench.models.weights import Weights
from bgcbench.results.rows import Conversion

BATCH = 32


def converted_network(config: ConversionConfig) -> tuple[bytes, Conversion]:
    """The file that ``bgcbench.load_converted`` reads, and what was done.

    Raises UsageError for what is not there or does not fit, ShapeError where N or the rank does not fit.
    """
    weights = Weights(config.model, config.weights or usual_weights(config.spec), config.weights_key)
    config = sized(config, weights)
    spec, images, calibration = config.spec, None, None
    if config.data:
        images = prepared_for(config, open_images(config.data, (spec.size[1], spec.size[2])), weights)
    dense = seeded(spec, row_seed(config.seed, "network")).eval()
    found = traced(dense, spec)
    loaded = weights.load_into(dense, spec)
    notes = [*loaded.notes, *([f"{config.model}: {UNTRAINED}"] if loaded.name == "none" else [])]
    if images is not None:
        count = min(config.calibration_images, len(images))
        calibration = Batches(images, count, BATCH, config.seed, config.calibration_views)
        preparation = images.preprocessing, weights
        notes += [*told(*preparation), *warned(*preparation, config.model)]
    (choice,) = config.choices
    converted = converted_as_chosen(
        config,
        dense,
        choice,
        lambda variant: "auto",
        init=config.init or "white",
        calibration=calibration,
        calibration_images=None if calibration is None else calibration.count * calibration.views,
        seed=config.seed,
    )
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
