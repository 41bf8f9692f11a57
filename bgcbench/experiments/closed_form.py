"""``bgcbench transfer`` without images: what conversions cost, and what each layer loses by the closed form.

What a layer loses on white input (i.i.d. zero-mean channels) follows from its kernel alone: with W the dense kernel
and D that of the layer in its place, E||Wx - Dx||^2 / E||Wx||^2 = ||W - D||^2 / ||W||^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from bgcbench.conversion.record import Converted
from bgcbench.experiments.images import seeded, sized
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.train_run import Update, try_conversions
from bgcbench.experiments.transfer import TransferConfig, plan
from bgcbench.experiments.transfer_run import UNTRAINED, TransferRun
from bgcbench.measure.device import Failure, free_memory
from bgcbench.models.weights import Loaded, Weights, WeightsNotFound
from bgcbench.results import Json
from bgcbench.results.rows import LayerLoss, TransferRow, WhiteLoss
from bgcbench.theory.exact import white_error

CONVERTED = "converted"  # what an update says when a row has ended


@dataclass
class ClosedFormPrepared:
    """The network (on the CPU), and what its weights are; None where they are missing."""

    config: TransferConfig
    rows: list[TransferRow]
    network: nn.Module
    loaded: Loaded | None
    warnings: list[str]

    @property
    def settings(self) -> Json:
        if self.loaded is None:
            return {}
        return {"weights_sha256": self.loaded.sha256, "weights_key": self.loaded.key}


def prepare(config: TransferConfig) -> ClosedFormPrepared:
    """Try every conversion and load the weights.

    Raises UsageError for what does not fit, ShapeError where N does not divide (unless skip_invalid).
    """
    weights = Weights(config.model, config.weights, config.weights_key)
    config = sized(config, weights)
    rows, _, warnings = try_conversions(config, plan(config, weights.name))
    network, loaded = seeded(config.spec, row_seed(config.seed, "network")).eval(), None
    try:
        loaded = weights.load_into(network, config.spec)
        warnings += loaded.notes
    except WeightsNotFound as problem:
        warnings.append(str(problem))
    warnings += [UNTRAINED] * (config.weights == "none")
    return ClosedFormPrepared(config, rows, network, loaded, list(dict.fromkeys(warnings)))


def layer_losses(dense: nn.Module, converted: Converted) -> tuple[LayerLoss, ...]:
    """||W - D||^2 / ||W||^2 of every replaced convolution, in the order of execution."""
    found = []
    for layer in converted.record.layers:
        own, other = (net.get_submodule(layer.name) for net in (dense, converted.model))
        kernel = own.weight.detach().double()  # type: ignore[operator]
        lost = (kernel - other.dense_weight().detach().double()).square().sum()  # type: ignore[operator]
        energy = float(kernel.square().sum())
        found.append(LayerLoss(layer.name, float(lost) / energy if energy else 0.0))
    return tuple(found)


class ClosedFormRun(TransferRun):
    """One run over the rows of a prepared transfer without images: converted, and timed where that is asked for."""

    prepared: ClosedFormPrepared  # type: ignore[assignment]
    less_memory = "use --device cpu"

    def _work(self) -> Iterator[Update]:
        todo = self.todo
        for number, row in enumerate(todo):
            if self.stop():
                return
            yield Update(row, number, len(todo), None, number / len(todo), doing="converting")
            self._convert_row(row)
            free_memory(self.session.device)
            yield Update(row, number, len(todo), None, (number + 1) / len(todo), save=True, doing=CONVERTED)
        if self.config.time:
            yield from self._time_all()

    def _convert_row(self, row: TransferRow) -> None:
        """Convert the network of ``row``, and write down what it costs and loses."""
        alike = row.params.init == "white" and not row.params.choice.is_planned
        expected = white_error(*row.params.cell) if alike else None
        loss = None if row.params.is_dense else WhiteLoss(expected, None)
        if self.prepared.loaded is None:
            self._note(row, "error", "the weights are missing", white_loss=loss)
            return
        if row.params.is_dense:
            self._note(row, "ok", None)
            return
        found = self._converted_alike(row)
        if isinstance(found, Failure):
            self._note(row, found.status, found.reason, white_loss=loss)
            return
        model, record, seconds = found
        loss = WhiteLoss(expected, layer_losses(self.original, Converted(model, record)))
        self._note(row, "ok", None, white_loss=loss, convert=record, convert_seconds=seconds, stage="converted")
        self.warnings += [note for note in record.notes if note not in self.warnings]
        self._save(row, model)
