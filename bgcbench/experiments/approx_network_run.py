"""Computes the rows of ``bgcbench approx --model``: the network is built, filled with weights and run over images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from torch import Tensor, nn

from bgcbench.conversion.approximability import (
    Evaluator,
    LayerError,
    kernel_of,
    misfits,
    moment_bytes,
    passes,
    shape_of,
    shares,
    stream,
)
from bgcbench.conversion.convert import Candidates, candidates
from bgcbench.data import Images, open_images
from bgcbench.data.views import Views
from bgcbench.errors import UsageError
from bgcbench.experiments.approx import ApproxNetworkConfig
from bgcbench.experiments.base import Run, Session, Step
from bgcbench.experiments.config import refuse_misfits
from bgcbench.experiments.images import prepared_for, seeded, sized, told, traced, usual_weights, warned
from bgcbench.experiments.profile import row_seed
from bgcbench.measure.device import backend_state, describe_failure
from bgcbench.models.weights import Loaded, Weights
from bgcbench.results import Document, Json
from bgcbench.results.rows import Counts, LayerErrors, LayerParams, LayerRow, Moments, NetworkFacts, Replaced, Status
from bgcbench.specs import HELD_OUT, Choice

UNTRAINED = "no published weights: the network is untrained, and so are its activations; give --weights FILE"


@dataclass
class Batches:
    """The calibration images, the same every time they are gone through."""

    images: Images
    count: int
    batch: int
    seed: int
    views: int

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Views(self.images.batches(self.count, self.batch, self.seed), self.views, seed=self.seed))

    def pictures(self, number: int) -> int:
        """Which image a view shows."""
        return number // self.views


@dataclass
class Prepared:
    """The network with its weights, the images and the convolutions to look at: everything that can be wrong is known.

    config: with the network's own size. moments: what those take that are held at the same time, and in how many runs
    over the images all are. told: what to say of the images before the run.
    """

    config: ApproxNetworkConfig
    model: nn.Module
    loaded: Loaded
    batches: Batches
    layers: Candidates
    moments: Moments
    told: list[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Json:
        """What a resumed run must find as it was."""
        return {
            "weights_sha256": self.loaded.sha256,
            "weights_key": self.loaded.key,
            "data_sha256": self.batches.images.fingerprint,
            "preprocessing": self.batches.images.preprocessing.to_json(),
        }

    @property
    def facts(self) -> NetworkFacts:
        """What a result file says of the network as a whole."""
        return NetworkFacts(
            weights=self.loaded.name,
            weights_sha256=self.loaded.sha256,
            data_sha256=self.batches.images.fingerprint,
            kept=self.layers.kept,
            moments=self.moments,
        )

    @property
    def rows(self) -> list[LayerRow]:
        """Every layer as everything that is asked, undone."""
        return [self._row(layer, choice) for layer in self.layers.chosen for choice in self.config.choices]

    def _row(self, layer: Replaced, choice: Choice) -> LayerRow:
        model, weights, data = self.config.model, self.loaded.name, self.batches.images.name
        params = LayerParams(
            variant=choice.variant,
            groups=choice.reduction(*shape_of(layer)),
            rank=choice.rank,
            model=model,
            weights=weights,
            layer=layer.name,
            kernel=layer.kernel[0],
            kernel_width=layer.kernel[1],
            stride=layer.stride[0],
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            input="activations",
            data=data,
            calibration_images=self.batches.count,
        )
        unknown: Json = dict.fromkeys(("reason", "counts", "output_relative_error", "ridge", "macs_share"))
        key = f"{model}-{layer.name}-{choice.key}-{weights}-{data}"
        return LayerRow(key=key, status="interrupted", params=params, rows=0, held_out_rows=0, **unknown)


def prepare(config: ApproxNetworkConfig) -> Prepared:
    """Build the network, load its weights, open the images and choose the convolutions.

    Raises UsageError for what is not there or does not fit, ShapeError where an N or a rank does not fit (unless
    skip_invalid).
    """
    usual = usual_weights(config.spec)
    weights = Weights(config.model, config.weights or usual, config.weights_key)
    config = sized(config, weights)
    spec = config.spec
    images = prepared_for(config, open_images(config.data, (spec.size[1], spec.size[2])), weights)
    if len(images) < HELD_OUT:
        raise UsageError(f"--data {config.data} has {len(images)} images; at least {HELD_OUT} are needed")
    model = seeded(spec, row_seed(config.seed, "model"))
    traced(model, spec)
    loaded = weights.load_into(model, spec)
    found = candidates(
        model, where=config.where, include=config.include, exclude=config.exclude, example_input=spec.size
    )
    if not config.skip_invalid:
        refuse_misfits(misfits(found.chosen, config.choices))
    elif all(choice.unfit(*shape_of(layer)) for layer in found.chosen for choice in config.choices):
        raise UsageError("nothing to compute: no N of --groups divides the channels of any convolution")
    memory = round(config.memory_gib * 2**30)
    portions = passes(found.chosen, memory)
    held = max(sum(moment_bytes(layer) for layer in portion) for portion in portions)
    moments = Moments(bytes=held, passes=len(portions))
    warnings = [*found.notes, *loaded.notes, *warned(images.preprocessing, weights, config.model)]
    if config.weights is None and usual == "none":
        warnings.append(f"{config.model}: {UNTRAINED}")
    there, asked = len(images), config.calibration_images
    if there < asked:
        warnings.append(f"{images.name} has {there} images, fewer than the {asked} asked for; all are used")
    batches = Batches(images, min(there, asked), config.batch, config.seed, config.calibration_views)
    said = told(images.preprocessing, weights)
    return Prepared(config, model, loaded, batches, found, moments, said, warnings)


class ApproxNetworkRun(Run[LayerRow]):
    """One run over the layers of a prepared network."""

    config: ApproxNetworkConfig
    planned: list[LayerRow]

    def __init__(self, prepared: Prepared, session: Session, **options: Any) -> None:
        super().__init__(prepared.config, session, prepared.rows, **options)
        self.known = {key: row for key, row in self.known.items() if row.is_done}
        self.prepared = prepared
        self.warnings = list(prepared.warnings)

    @property
    def plan_lines(self) -> list[str]:
        """The plan in words."""
        config, prepared, batches = self.config, self.prepared, self.prepared.batches
        layers, moments = prepared.layers.chosen, prepared.moments
        return [
            f"plan: {len(layers)} convolutions of {config.model} (weights: {prepared.loaded.name}) x "
            f"{len(config.choices)}, {batches.count} images of {batches.images.name}; moments of up to "
            f"{moments.bytes / 2**30:.2g} GiB at once, {moments.passes} run{'s' * (moments.passes > 1)} over the "
            "images",
            *prepared.told,
            *(f"  {layer.name}: {layer.in_channels} -> {layer.out_channels}" for layer in layers),
            *(f"  kept: {kept.name} ({kept.reason})" for kept in prepared.layers.kept),
        ]

    def take_into(self, document: Document) -> None:
        super().take_into(document)
        document.network = self.prepared.facts

    def run(self) -> Iterator[Step]:
        config, prepared, count = self.config, self.prepared, self.prepared.batches.count
        left = [row for row in self.planned if row.key not in self.known]
        names = {row.params.layer for row in left}
        layers = [layer for layer in prepared.layers.chosen if layer.name in names]
        if not layers:
            return
        share_of = shares(prepared.layers.chosen)
        with backend_state("fp32", config.threads):
            model = prepared.model.to(self.session.device)
            yield Step(f"{count} images through {config.model}")
            source = stream(
                model,
                layers,
                prepared.batches,
                images=count * config.calibration_views,
                memory_bytes=round(config.memory_gib * 2**30),
                seed=row_seed(config.seed, "positions"),
                stop=self.stop,
            )
            scarce: list[str] = []
            for number, (layer, moments) in enumerate(source):
                evaluator = Evaluator(layer, kernel_of(model, layer), moments, share_of.get(layer.name))
                for row in (row for row in left if row.params.layer == layer.name):
                    if self.stop():
                        return
                    yield Step(f"{layer.name}: {row.params.choice.label}", number / len(layers))
                    status: Status = "invalid"
                    try:
                        found = evaluator.evaluate(row.params.choice)
                    except Exception as problem:  # noqa: BLE001 - whatever it is, the other rows are worth having
                        failure = describe_failure(problem, self.session.device)
                        status, found = failure.status, evaluator.unknown(row.params.choice, failure.reason)
                    scarce += [layer.name] * found.scarce
                    self.known[row.key] = _finished(row, found, status)
                yield Step(layer.name, (number + 1) / len(layers), save=True)
            if scarce:
                self.warnings.append(_scarce(scarce))


def _finished(row: LayerRow, found: LayerError, failed: Status) -> LayerRow:
    errors = {"copy": found.copied, "white": found.white, "calibrated": found.calibrated}
    counts = {"params": found.params, "macs": found.macs}
    return LayerRow(
        row.key,
        "ok" if found.reason is None else failed,
        found.reason,
        row.params,
        counts=None if found.params is None else msgspec.convert(counts, Counts),
        output_relative_error=msgspec.convert(errors, LayerErrors) if found.reason is None else None,
        ridge=found.ridge,
        rows=found.rows,
        held_out_rows=found.held_out_rows,
        macs_share=found.share,
    )


def _scarce(layers: list[str]) -> str:
    names = list(dict.fromkeys(layers))
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"fewer than ten positions for each number that is solved for in {shown} (small N): calibrated weights gain "
        "from more --calibration-images there"
    )
