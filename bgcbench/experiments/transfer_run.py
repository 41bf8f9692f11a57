"""Converts, evaluates, times and trains the rows of ``bgcbench transfer``, one stage after the other.

    evaluate   the untouched network
    convert    each row's network, which then waits in a checkpoint, and evaluate it
    time       each variant and N (--time)
    train      each network that is to be

What a stage finds is in the result file before the next one begins. So a run that is cut short has compared all
conversions, and one that goes on converts nothing twice.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from bgcbench.conversion.convert import convert, save_converted
from bgcbench.conversion.lockstep import Stopped
from bgcbench.conversion.record import Converted
from bgcbench.data import Images
from bgcbench.data.views import Views
from bgcbench.errors import OutputError, UsageError
from bgcbench.experiments.base import Session
from bgcbench.experiments.images import prepared_for, seeded, sized, told, warned
from bgcbench.experiments.network_run import begun
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.train_run import (
    Prepared,
    TrainRun,
    Update,
    image_counts,
    open_data,
    options_of,
    try_conversions,
)
from bgcbench.experiments.transfer import TransferConfig, identity, plan, room_to_save, saved_name
from bgcbench.measure.device import Failure, describe_failure, free_memory
from bgcbench.models.weights import Loaded, Weights
from bgcbench.results import Document, Json, write_atomically
from bgcbench.results.rows import CellKey, NetworkTime, ProfileRow, Ratio, Record, TransferRow
from bgcbench.results.times import time_ratio
from bgcbench.specs import HELD_OUT
from bgcbench.training.distributed import World
from bgcbench.training.loop import NotFinite, Scores, Training
from bgcbench.training.recipes import Recipe

UNTRAINED = "--weights none: the network is untrained, and what a conversion loses of it says nothing"
NOT_EVALUATED, NOT_TRAINED, UNTOUCHED = "converted, not evaluated yet", "converted, not trained yet", "not trained yet"
STANDARD: CellKey = ("standard", 1, None)
MEASURED_AS = {"fwd": "deployed", "train_step": "masked"}  # the algorithm, where a network is measured in both
BATCH = 64  # calibration images that are read at a time


@dataclass(kw_only=True)
class TransferPrepared(Prepared[TransferRow]):
    """What :class:`Prepared` has, and the network with its weights (on the CPU) and the images to calibrate with.

    told: what to say of the images before the run.
    """

    config: TransferConfig
    network: nn.Module
    loaded: Loaded
    images: Images
    told: list[str]

    @property
    def settings(self) -> Json:
        return {"weights_sha256": self.loaded.sha256, "weights_key": self.loaded.key, **super().settings}


def prepare(config: TransferConfig, world: World) -> TransferPrepared:
    """Open and verify the data, try every conversion and load the weights, before anything is evaluated.

    Raises UsageError for what is not there or does not fit, ShapeError where N or a rank does not fit (unless
    skip_invalid).
    """
    weights = Weights(config.model, config.weights, config.weights_key)
    config, data = open_data(sized(config, weights), world)
    config.check_weights(data.num_classes)
    data = prepared_for(config, data, weights)
    options = options_of(config, data, world)
    images = data.calibration()
    wanted, count = config.calibration_images, min(config.calibration_images, len(images))
    rows = plan(config, weights.name, count)
    rows, traces, warnings = try_conversions(config, rows, **image_counts(data, options))
    if config.calibrates and len(images) < HELD_OUT:
        raise UsageError(f"--data {config.data} has {len(images)} training images; {HELD_OUT} are needed to calibrate")
    network = seeded(config.spec, row_seed(config.seed, "network")).eval()
    loaded = world.first(lambda: weights.load_into(network, config.spec))
    warnings += [*loaded.notes, *warned(data.preprocessing, weights, config.model)]
    warnings += [UNTRAINED] * (config.weights == "none")
    if config.calibrates and count < wanted and not config.quick:
        warnings.append(
            f"{data.name} has {count} training images, fewer than the {wanted} to calibrate with; all are used"
        )
    return TransferPrepared(
        config=config,
        data=data,
        rows=rows,
        traces=traces,
        options=options,
        warnings=list(dict.fromkeys((*data.notes, *warnings))),
        network=network,
        loaded=loaded,
        images=images,
        told=told(data.preprocessing, weights),
    )


class TransferRun(TrainRun[TransferRow]):
    """One run over the rows of a prepared transfer, in stages."""

    prepared: TransferPrepared
    config: TransferConfig
    less_memory = "use fewer --calibration-images"  # for a conversion

    def __init__(self, prepared: TransferPrepared, session: Session, world: World, **options: Any) -> None:
        super().__init__(prepared, session, world, **options)
        self._untouched: tuple[Scores, Tensor] | NotFinite | None = None  # its guesses are of this process's images
        self._drawn: tuple[int, list[Tensor]] = (-1, [])
        # Converted networks that no checkpoint has: on the CPU, by key.
        self._held: dict[str, dict[str, Tensor]] = {}

    @functools.cached_property
    def original(self) -> nn.Module:
        """The untouched network, on the device."""
        return self._placed(self.prepared.network).eval()

    def make_room(self) -> None:
        """As in training, and the folder of --save."""
        super().make_room()
        self.world.once(self._make_room_to_save)

    def _make_room_to_save(self) -> None:
        if self.config.save is None:
            return
        folder = Path(self.config.save)
        # What a resumed run finds there is its own.
        names = [saved_name(row.key) for row in self.planned if not row.params.is_dense]
        room_to_save(folder, names, replace=self._replace or not self._afresh)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--save {folder} cannot be made ({error.strerror or error}); choose another") from error

    def _work(self) -> Iterator[Update]:
        if not (yield from self._convert_all()):
            return
        if self.config.time and not (yield from self._time_all()):
            return
        left = {row.key for row in self._not_evaluated}  # those that could not be converted
        yield from self._train([row for row in self.todo if row.key not in left])

    # ------------------------------------------------------------------------------------------ converted and evaluated

    @property
    def _not_evaluated(self) -> list[TransferRow]:
        """The rows that are to be evaluated, and before that converted."""
        rows = self.world.once(lambda: [n for n, row in enumerate(self.planned) if not self._is_evaluated(row)])
        return [self.planned[number] for number in rows]

    def _is_evaluated(self, row: TransferRow) -> bool:
        """Whether a row is converted and evaluated, and its network still there where it is to be trained."""
        if self._known(row).stage not in ("evaluated", "trained"):
            return False
        return row.params.is_dense or self._is_done(row) or row.key in self._held or self._is_kept(row)

    def _is_kept(self, row: TransferRow) -> bool:
        """Whether there is a checkpoint of a row, which begins with the converted network."""
        checkpoints = self._checkpoints(row)
        return checkpoints is not None and bool(checkpoints.names)

    def _convert_all(self) -> Generator[Update, None, bool]:
        """Evaluate the untouched network and every conversion; False where the run was asked to stop."""
        rows = self._not_evaluated
        for number, row in enumerate(rows):
            if self.world.any(self.stop()):
                return False
            at = functools.partial(Update, row, number, len(rows), None)
            yield at(number / len(rows), doing="evaluating" if row.params.is_dense else "converting")
            training: Training | None = None
            try:
                with self._failing(functools.partial(self._note, row)):
                    untouched = self._evaluated_untouched()
                    training = self._evaluator(row) if row.params.is_dense else self._converted(row)
                    if training is not None and not row.params.is_dense:
                        yield at(number / len(rows), save=True, doing="evaluating")  # the file has what is converted
                    if training is not None:
                        self._evaluate(row, training, *untouched)
            except Stopped:
                return False
            training = None
            free_memory(self.session.device)
            yield at((number + 1) / len(rows), save=True, doing="evaluated")
            if self.known[row.key].judged and not row.params.epochs:
                self._forget(row)
        self._drawn = (-1, [])
        return True

    def _forget(self, row: TransferRow) -> None:
        """Remove the checkpoint of a row that nothing is to go on from."""
        checkpoints = self._checkpoints(row)
        if checkpoints is None or not self.world.is_main:
            return
        checkpoints.clear()
        for folder in (checkpoints.folder, checkpoints.folder.parent):
            with contextlib.suppress(OSError):  # where it has something else in it
                folder.rmdir()

    @property
    def _evaluating(self) -> Recipe:
        """How a network is evaluated before any training: not compiled, which would take longer than the evaluation."""
        return dataclasses.replace(self.config.hyper, epochs=0, compile=False)

    def _evaluator(self, row: TransferRow) -> Training:
        """What evaluates the untouched network."""
        return self._training(row, self.original, checkpoints=False, recipe=self._evaluating)

    def _evaluated_untouched(self) -> tuple[Scores, Tensor]:
        """Scores and guesses of the untouched network, found once in a run. Raises NotFinite, and Stopped."""
        if self._untouched is None:
            training = self._evaluator(self.planned[0])
            try:
                self._untouched = _scores(training), training.guesses
            except NotFinite as problem:
                self._untouched = problem
        if isinstance(self._untouched, NotFinite):
            raise NotFinite(str(self._untouched))
        return self._untouched

    def _converted(self, row: TransferRow) -> Training | None:
        """The converted network of a row, ready to be evaluated and kept in a checkpoint; None where it cannot be.

        Raises Stopped.
        """
        before = self._known(row).convert_seconds is not None
        if before and self.world.once(lambda: self._is_kept(row)):
            training = self._training(row, self._placed(super()._network(row)), recipe=self._evaluating)
            training.resume()
            return training
        if before:
            self.warnings.append(f"{row.key}: no checkpoint is there, so it is converted again")
        found = self._converted_alike(row)
        if isinstance(found, Failure):
            self._note(row, found.status, found.reason)
            return None
        model, record, seconds = found
        training = self._training(row, model, record=record, recipe=self._evaluating)
        if training.checkpoints is not None and self.world.is_main:
            training.checkpoints.clear()  # of a run that was killed before it wrote down what it had converted
        training.keep()
        done = {"convert": record, "convert_seconds": seconds, "stage": "converted", "judged": False}
        self._note(row, "interrupted", NOT_EVALUATED, **{**self._found(row, training), **done})
        self.warnings += [note for note in record.notes if note not in self.warnings]
        return training

    def _converted_alike(self, row: TransferRow) -> tuple[nn.Module, Record, float] | Failure:
        """The converted network on the device, its record and the seconds that took. Raises Stopped.

        The main process converts for all: they would have to agree to the last bit.
        """
        made: list[nn.Module] = []

        def convert_here() -> tuple[Record, float] | Failure | None:
            batches = self._batches(row)  # an image that cannot be read would be in the way of other rows too
            begin = time.perf_counter()
            try:
                converted = self._convert(row, batches)
            except Stopped:
                return None
            except Exception as problem:  # noqa: BLE001 - the other rows are worth having
                return describe_failure(problem, self.session.device, self.less_memory)
            made.append(converted.model)
            return converted.record, time.perf_counter() - begin

        found = self.world.once(convert_here)
        if found is None:
            raise Stopped
        if isinstance(found, Failure):
            return found
        model = made[0] if made else self._placed(super()._network(row))
        self.world.share_module(model)
        return model, *found

    def _convert(self, row: TransferRow, batches: Sequence[Tensor] | None) -> Converted:
        config, params, views = self.config, row.params, self.config.calibration_views
        torch.manual_seed(row_seed(params.seed, row.key))  # for 'scratch'
        return convert(
            self.original,
            **config.conversion(params.choice, config.algorithm_of),
            init=params.init,
            calibration=batches,
            calibration_images=views * params.calibration_images if params.calibration_images else None,
            calibration_pictures=lambda number: number // views,
            rebn=params.rebn,
            seed=params.seed,
            stop=self.stop,
        )

    def _batches(self, row: TransferRow) -> list[Tensor] | None:
        """The images that a row is calibrated with, the same for all of a seed; None where it looks at none."""
        count, seed = row.params.calibration_images, row.params.seed
        if count is None:
            return None
        if self._drawn[0] != seed:
            images, views = self.prepared.images, self.config.calibration_views
            self._drawn = seed, list(Views(images.batches(count, BATCH, seed), views, seed=seed))
        return self._drawn[1]

    def _evaluate(self, row: TransferRow, training: Training, untouched: Scores, guesses: Tensor) -> None:
        """Evaluate a network before any training, and write down what is found; raises Stopped."""
        dense = row.params.is_dense
        scores = untouched if dense else _scores(training)
        training.state.initial = self._meaningful(scores.error)
        found = self._found(row, training, learnt=True) | {
            "error_initial_top5": self._meaningful(scores.top5),
            "loss_initial": self._meaningful(scores.loss),
            "stage": "evaluated",
            "judged": True,
        }
        if not dense:
            found["agreement_initial"] = self._agreement(training, guesses)
        waits = UNTOUCHED if dense else NOT_TRAINED
        self._note(row, *(("interrupted", waits) if row.params.epochs else ("ok", None)), **found)
        if dense:
            return
        if not row.params.epochs:
            self._save(row, training.network)
        elif not self.world.once(lambda: self._is_kept(row)):
            state = training.network.state_dict()
            self._held[row.key] = {name: value.detach().cpu().clone() for name, value in state.items()}

    def _agreement(self, training: Training, guesses: Tensor) -> float | None:
        """Percent of the test images of which the network, and the untouched one (``guesses``), say the same class."""
        agreed = float((training.guesses == guesses).sum())
        same, count = self.world.total([agreed, len(guesses)])
        data = self.prepared.data
        return 100 * same / count if data.meaningful or not data.labelled else None

    def _meaningful(self, value: float | None) -> float | None:
        """``value`` where the labels are real and it is a number."""
        return value if self.prepared.data.meaningful and value is not None and math.isfinite(value) else None

    def _save(self, row: TransferRow, model: nn.Module) -> None:
        """Write the network for :func:`bgcbench.load_converted`; a disk that refuses it costs nothing else."""
        known = self.known[row.key]
        if self.config.save is None or known.convert is None or not self.world.is_main:
            return
        path = Path(self.config.save) / saved_name(row.key)
        buffer = io.BytesIO()
        save_converted(Converted(model, known.convert), buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            self.warnings.append(f"--save {path} could not be written ({error.strerror or error}); the run goes on")
            return
        self.known[row.key] = replace(known, saved=path.name)

    # ------------------------------------------------------------------------------------------------------------ timed

    def _time_all(self) -> Generator[Update, None, bool]:
        """Time each variant and N that has no times yet, beside the standard one; False where asked to stop."""
        rows = [row for row in self.planned if row.key in self.known and self.known[row.key].time is None]
        if not rows:
            return True
        at = functools.partial(Update, self.planned[0], 0, len(rows), None)
        try:
            costs = self.config.costs(str(self.session.device))
            run, measured = begun(costs, {STANDARD, *(row.params.cell for row in rows)}, self.stop)
            for update in run.run():
                yield at(0.0, doing=f"timing: {update.doing}")
        except Exception as problem:  # noqa: BLE001 - conversions and trainings are worth having without
            failure = describe_failure(problem, self.session.device)
            self.warnings.append(f"--time: the networks could not be measured: {failure.reason}")
            return True
        if self.stop():
            return False
        run.take_into(measured)
        failed = [row for row in measured.results if row.status != "ok"]
        self.warnings += [f"--time: {text}" for text in measured.measurement_warnings]
        self.warnings += [f"--time: {row.params.choice.label} could not be measured: {row.reason}" for row in failed]
        for row in rows:
            self.known[row.key] = replace(self.known[row.key], time=network_time(measured, row.params.cell))
        yield at(1.0, save=True, doing="timed")
        return True

    # --------------------------------------------------------------------------------------------------------- training

    def _network(self, row: TransferRow) -> nn.Module:
        """The network to train; a converted one without numbers where a checkpoint has them."""
        if row.params.is_dense:
            return copy.deepcopy(self.original)
        model = super()._network(row)
        if row.key in self._held:
            model.load_state_dict(self._held[row.key])
        return model

    def _training(self, row: TransferRow, model: nn.Module, **options: Any) -> Training:
        recipe = options.pop("recipe", None) or (self.config.hyper if row.params.epochs else self._evaluating)
        teacher = self.original if row.params.distill and recipe.epochs else None
        return super()._training(row, model, recipe=recipe, teacher=teacher, **options)

    def _identity(self, row: TransferRow) -> Json:
        return identity(self.config, row.params, self.prepared.loaded.sha256)

    def _end(self, row: TransferRow, training: Training) -> None:
        super()._end(row, training)
        if not self.prepared.data.labelled:
            agreement = self._agreement(training, self._evaluated_untouched()[1])
            self.known[row.key] = replace(self.known[row.key], agreement_final=agreement)
        if not row.params.is_dense:
            self._save(row, training.network)


def network_time(measured: Document, cell: CellKey) -> NetworkTime | None:
    """Median times of a network (seconds), and the standard network's over them; None where none was measured."""
    rows: Sequence[ProfileRow] = measured.results
    phases: dict[str, Ratio] = {}
    for phase, algorithm in MEASURED_AS.items():
        of = [row for row in rows if phase in row.phases and phase not in row.failures]
        of.sort(key=lambda row: row.params.algorithm != algorithm)
        standard, row = (next((row for row in of if row.params.cell == each), None) for each in (STANDARD, cell))
        if row is None:
            continue
        summary, over = row.phases[phase].summary, time_ratio(row, standard, phase)
        ends = (over.ci95.low, over.ci95.high) if over and over.ci95 else None
        phases[phase] = Ratio(summary.median_s, summary.ci95_s, summary.n, over.value if over else None, ends)
    if not phases:
        return None
    conditions = {name: getattr(rows[0].params, name) for name in ("batch", "precision", "layout", "mode")}
    return NetworkTime(phases, memory=measured.settings.memory, **conditions)


def _scores(training: Training) -> Scores:
    """Of a network before any training. Raises NotFinite, and Stopped where the run was asked to stop."""
    scores = training.begin()
    if scores is None:
        raise Stopped
    return scores
