"""Converts, judges and trains the rows of ``bgcbench transfer``.

The untouched network is judged first, then every conversion; what that finds is in the result file, and the converted
network in a checkpoint, before anything is trained. So a run that is cut short has compared all conversions, and one
that goes on converts nothing twice.
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
from torch import Tensor, nn

from bgcbench.conversion.calibration import Stopped
from bgcbench.conversion.convert import convert, save_converted
from bgcbench.conversion.record import Converted
from bgcbench.data import Images
from bgcbench.errors import BgcbenchError, OutputError, UsageError
from bgcbench.experiments import profile_run
from bgcbench.experiments.images import prepared_for, sized, told, warned
from bgcbench.experiments.network_run import network_label, plan_network
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.train import TrainRow
from bgcbench.experiments.train_run import (
    OUT_OF_MEMORY,
    Prepared,
    TrainRun,
    Update,
    open_data,
    options_of,
    try_conversions,
)
from bgcbench.experiments.transfer import TransferConfig, identity, plan, room_to_save, saved_name
from bgcbench.measure.device import Failure, describe_failure, free_memory
from bgcbench.measure.statistics import Series, ratio_of_medians
from bgcbench.models import build_model
from bgcbench.models.weights import Loaded, Weights
from bgcbench.results import DONE, Json, measurement_warnings, write_atomically
from bgcbench.results.rows import Record
from bgcbench.specs import HELD_OUT
from bgcbench.theory import paper
from bgcbench.training.checkpoint import Checkpoints
from bgcbench.training.distributed import World
from bgcbench.training.loop import NotFinite, Scores, Training
from bgcbench.training.recipes import Recipe

NOT_JUDGED, NOT_TRAINED, UNTOUCHED = "converted, not judged yet", "converted, not trained yet", "not trained yet"
BATCH = 64  # calibration images that are read at a time
# What is known of a row before its training, and stays.
INITIAL = ("error_initial_top5", "loss_initial", "agreement_initial", "convert_seconds", "judged", "saved", "time")


@dataclass(kw_only=True)
class TransferPrepared(Prepared):
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
    """Open and verify the data, try every conversion and load the weights, before anything is judged.

    Raises UsageError for what is not there or does not fit, ShapeError where N does not divide (unless skip_invalid).
    """
    weights = Weights(config.model, config.weights or "default", config.weights_key)
    config, data = open_data(sized(config, weights), world)
    config.check_weights(data.num_classes)
    data = prepared_for(config, data, weights)
    options = options_of(config, data, world)
    cells, warnings = try_conversions(config)
    images = data.calibration()
    if config.calibrates and len(images) < HELD_OUT:
        raise UsageError(f"--data {config.data} has {len(images)} training images; {HELD_OUT} are needed to calibrate")
    network, loaded = _loaded(config, world, weights)
    count = min(config.images, len(images))
    warnings += [*loaded.notes, *warned(data.preprocessing, weights, config.model)]
    if config.weights == "none":
        warnings.append("--weights none: the network is untrained, and what a conversion loses of it says nothing")
    if config.calibrates and count < config.images and not config.quick:
        warnings.append(
            f"{data.name} has {count} training images, fewer than the {config.images} to calibrate with; all are used"
        )
    return TransferPrepared(
        config=config,
        data=data,
        rows=plan(config, loaded.name, count),
        cells=cells,
        options=options,
        warnings=list(dict.fromkeys((*data.notes, *warnings))),
        network=network,
        loaded=loaded,
        images=images,
        told=told(data.preprocessing, weights),
    )


def _loaded(config: TransferConfig, world: World, weights: Weights) -> tuple[nn.Module, Loaded]:
    """The network with its weights. The main process loads them first, so that a download is made once."""
    spec = config.spec

    def load() -> tuple[nn.Module, Loaded]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(config.seed, "network"))
            network = build_model(spec)
        return network.eval(), weights.load_into(network, spec)

    found: list[tuple[nn.Module, Loaded]] = []
    world.once(lambda: found.append(load()))
    return found[0] if found else load()


class TransferRun(TrainRun):
    """One run over the rows of a prepared transfer: judged, converted and judged, timed, trained."""

    prepared: TransferPrepared
    config: TransferConfig

    def __init__(self, prepared: TransferPrepared, session: Any, world: World, **options: Any) -> None:
        super().__init__(prepared, session, world, **options)
        self._original_scores: Scores | None = None
        self._damage: str | None = None  # why the untouched network cannot be judged
        self._guesses = torch.empty(0)  # the untouched network's, of this process's share of the test images
        self._drawn: tuple[int, list[Tensor]] = (-1, [])
        # Converted networks that no checkpoint has: on the CPU, by key.
        self._held: dict[str, dict[str, Tensor]] = {}

    @functools.cached_property
    def original(self) -> nn.Module:
        """The untouched network, on the device."""
        return self._placed(self.prepared.network).eval()

    def title(self, row: TrainRow) -> str:
        inits = len(self.config.inits) > 1 and not row.is_dense
        return f"{super().title(row)} {row.init}" if inits else super().title(row)

    # ----------------------------------------------------------------------------------------------- what is to be done

    @property
    def todo(self) -> list[TrainRow]:
        return [row for row in self.rows if not self._is_done(row)]

    @property
    def unjudged(self) -> list[TrainRow]:
        """The rows that are to be judged, and before that converted."""
        rows = self.world.once(lambda: [number for number, row in enumerate(self.rows) if not self._is_judged(row)])
        return [self.rows[number] for number in rows]

    def _is_done(self, row: TrainRow) -> bool:
        known = self.known.get(row.key)
        # A file that was made without --control has the untouched network's row, and not its training.
        return known is not None and known["status"] in DONE and known["params"]["epochs"] == row.epochs

    def _is_judged(self, row: TrainRow) -> bool:
        """Whether a row is converted and judged, and its network still there where it is to be trained."""
        if not self.known.get(row.key, {}).get("judged"):
            return False
        return row.is_dense or self._is_done(row) or row.key in self._held or self._is_kept(row)

    def _is_kept(self, row: TrainRow) -> bool:
        """Whether there is a checkpoint of a row, which begins with the converted network."""
        return self.folder is not None and bool(Checkpoints(self.folder / row.key).names)

    def _work(self) -> Iterator[Update]:
        if not (yield from self._judge_all()):
            return
        if self.config.time and not (yield from self._measure_all()):
            return
        unjudged = {row.key for row in self.unjudged}  # those that could not be converted
        yield from self._train([row for row in self.todo if row.key not in unjudged])

    def make_room(self) -> None:
        """As in training, and the folder of --save."""
        super().make_room()
        self.world.once(self._make_room_to_save)

    def _make_room_to_save(self) -> None:
        if self.config.save is None:
            return
        folder = Path(self.config.save)
        # What a resumed run finds there is its own.
        keys = [row.key for row in self.rows if not row.is_dense]
        room_to_save(folder, keys, replace=self._replace or not self._afresh)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"--save {folder} cannot be made ({error.strerror or error}); choose another") from error

    # ---------------------------------------------------------------------------------------------- before any training

    def _judge_all(self) -> Generator[Update, None, bool]:
        """Judge the untouched network and every conversion; False where the run was asked to stop."""
        rows = self.unjudged
        for number, row in enumerate(rows):
            if self.world.any(self.stop()):
                return False
            at = functools.partial(Update, row, number, len(rows), None)
            yield at(number / len(rows), doing="judging" if row.is_dense else "converting")
            try:
                self._judge_original()
                training = self._reference(row) if row.is_dense else self._converted(row)
                if training is not None and not row.is_dense:
                    yield at(number / len(rows), save=True, doing="judging")  # the file has what is converted
                if training is not None:
                    self._judge(row, training)
            except Stopped:
                return False
            except NotFinite as problem:  # found by all processes alike
                self._take(row, None, "error", str(problem))
            except BgcbenchError:
                raise
            except Exception as problem:
                failure = describe_failure(problem, self.session.device, OUT_OF_MEMORY)
                self._take(row, None, failure.status, failure.reason)
                if self.world.size > 1:
                    raise  # the other processes wait for this one
            training = None
            free_memory(self.session.device)
            yield at((number + 1) / len(rows), save=True, doing="judged")
            if self.known[row.key]["judged"] and not row.epochs:
                self._forget(row)
        self._drawn = (-1, [])
        return True

    def _forget(self, row: TrainRow) -> None:
        """Remove the checkpoint of a row that nothing is to go on from."""
        if self.folder is None or not self.world.is_main:
            return
        Checkpoints(self.folder / row.key).clear()
        for folder in (self.folder / row.key, self.folder):
            with contextlib.suppress(OSError):  # where it has something else in it
                folder.rmdir()

    def _reference(self, row: TrainRow) -> Training:
        """What judges the untouched network."""
        return self._training(row, self.original, checkpoints=False, recipe=self._judging, teacher=None)

    def _judge_original(self) -> None:
        """Judge the untouched network, once in a run; raises Stopped where the run was asked to stop meanwhile."""
        if self._damage is not None:
            raise NotFinite(self._damage)
        if self._original_scores is None:
            training = self._reference(self.rows[0])
            try:
                self._original_scores, self._guesses = training.begin(), training.guesses
            except NotFinite as problem:
                self._damage = str(problem)
                raise
        if self._original_scores is None:
            raise Stopped

    def _converted(self, row: TrainRow) -> Training | None:
        """The converted network of a row, ready to be judged and kept in a checkpoint; None where it cannot be.

        Raises Stopped.
        """
        before = self.known.get(row.key, {}).get("convert_seconds") is not None
        if before and self.world.once(lambda: self._is_kept(row)):
            training = self._training(row, self._placed(super()._network(row)), recipe=self._judging)
            training.resume()
            return training
        if before:
            self.warnings.append(f"{row.key}: no checkpoint is there, so it is converted again")
        found = self._converted_alike(row)
        if found is None:
            raise Stopped
        if isinstance(found, Failure):
            self._take(row, None, found.status, found.reason)
            return None
        model, record, seconds = found
        training = self._training(row, model, record=record, recipe=self._judging)
        if training.checkpoints is not None and self.world.is_main:
            training.checkpoints.clear()  # of a run that was killed before it wrote down what it had converted
        training.keep()
        self._take(row, training, "interrupted", NOT_JUDGED)
        self.known[row.key] |= {"convert": record, "convert_seconds": seconds}
        self.warnings += [note for note in record["notes"] if note not in self.warnings]
        return training

    def _converted_alike(self, row: TrainRow) -> tuple[nn.Module, Json, float] | Failure | None:
        """The converted network on the device, its record and the seconds that took; None where asked to stop.

        The main process converts for all: they would have to agree to the last bit.
        """
        made: list[nn.Module] = []

        def convert_here() -> tuple[Json, float] | Failure | None:
            batches = self._batches(row)  # an image that cannot be read would be in the way of other rows too
            begin = time.perf_counter()
            try:
                converted = self._convert(row, batches)
            except Stopped:
                return None
            except Exception as problem:  # noqa: BLE001 - the other rows are worth having
                return describe_failure(problem, self.session.device, "use fewer --calibration-images")
            made.append(converted.model)
            return converted.record.to_json(), time.perf_counter() - begin

        found = self.world.once(convert_here)
        if found is None or isinstance(found, Failure):
            return found
        model = made[0] if made else self._placed(super()._network(row))
        self.world.share_module(model)
        return model, *found

    def _convert(self, row: TrainRow, batches: Sequence[Tensor] | None) -> Converted:
        config, (variant, groups) = self.config, row.cell
        torch.manual_seed(row_seed(row.seed, row.key))  # for 'scratch'
        return convert(
            self.original,
            variant,
            groups,
            where=config.where,
            include=config.include,
            exclude=config.exclude,
            init=row.init,
            on_indivisible="skip" if config.skip_invalid else "raise",
            algorithm=config.form_of(variant),
            example_input=config.spec.size,
            calibration=batches,
            calibration_images=row.params["calibration_images"],
            rebn=row.params["rebn"],
            seed=row.seed,
            stop=self.stop,
        )

    def _batches(self, row: TrainRow) -> list[Tensor] | None:
        """The images that a row is calibrated with, the same for all of a seed; None where it looks at none."""
        count = row.params["calibration_images"]
        if count is None:
            return None
        if self._drawn[0] != row.seed:
            self._drawn = row.seed, list(self.prepared.images.batches(count, BATCH, row.seed))
        return self._drawn[1]

    @property
    def _judging(self) -> Recipe:
        """How a network is judged before any training: not compiled, which would take longer than the judging."""
        return dataclasses.replace(self.config.hyper, epochs=0, compile=False)

    def _judge(self, row: TrainRow, training: Training) -> None:
        """Judge a network before any training, and write down what is found; raises Stopped."""
        scores = self._original_scores if row.is_dense else training.begin()
        if scores is None:
            raise Stopped
        training.state.initial = self._meaningful(scores.error)
        self._take(row, training, "ok", None)
        found = self.known[row.key]
        found |= {
            "error_initial_top5": self._meaningful(scores.top5),
            "loss_initial": self._meaningful(scores.loss),
            "judged": True,
        }
        if row.epochs:
            found |= {"status": "interrupted", "reason": UNTOUCHED if row.is_dense else NOT_TRAINED}
        if row.is_dense:
            return
        agreed = float((training.guesses == self._guesses).sum())
        same, count = self.world.total([agreed, len(self._guesses)])
        found["agreement_initial"] = self._meaningful(100 * same / count)
        if not row.epochs:
            self._save(row, training.network, found["convert"])
        elif not self.world.once(lambda: self._is_kept(row)):
            state = training.network.state_dict()
            self._held[row.key] = {name: value.detach().cpu().clone() for name, value in state.items()}

    def _meaningful(self, value: float | None) -> float | None:
        """``value`` where the labels are real and it is a number."""
        return value if self.prepared.data.meaningful and value is not None and math.isfinite(value) else None

    # --------------------------------------------------------------------------------------------------------- training

    def _network(self, row: TrainRow) -> nn.Module:
        """The network to train; a converted one without numbers where a checkpoint has them."""
        if row.is_dense:
            return copy.deepcopy(self.original)
        model = super()._network(row)
        if row.key in self._held:
            model.load_state_dict(self._held[row.key])
        return model

    def training(self, row: TrainRow, *, checkpoints: bool = True) -> Training:
        training = super().training(row, checkpoints=checkpoints)
        training.state.initial = self.known.get(row.key, {}).get("error_initial")
        return training

    def _training(self, row: TrainRow, model: nn.Module, *, checkpoints: bool = True, **options: Any) -> Training:
        given: dict[str, Any] = {
            "identity": identity(self.config, row, self.prepared.loaded.sha256),
            "record": None if row.is_dense else self.known.get(row.key, {}).get("convert"),
            "teacher": self.original if row.params["distill"] else None,
        }
        return super()._training(row, model, checkpoints=checkpoints, **{**given, **options})

    def _recipe(self, row: TrainRow) -> Recipe:
        return super()._recipe(row) if row.epochs else self._judging

    def _take(self, row: TrainRow, training: Training | None, status: str, reason: str | None) -> None:
        earlier = self.known.get(row.key, {})
        super()._take(row, training, status, reason)
        found = self.known[row.key]
        found |= {name: earlier.get(name) for name in INITIAL}
        found["judged"] = bool(found["judged"])
        if found["error_initial"] is None:
            found["error_initial"] = earlier.get("error_initial")
        found["convert"] = earlier.get("convert") or {**found["convert"], "init": row.init}
        if not row.epochs:
            found["checkpoints"] = None
        if status != "ok":
            found["counts"] = earlier.get("counts") or found["counts"]
        elif row.epochs and training is not None and training.recipe.epochs and not row.is_dense:
            self._save(row, training.network, found["convert"])

    def _printed(self, row: TrainRow) -> float | None:
        return paper.transferred_error(row.params["dataset"], row.params["model"], *row.cell)

    def _save(self, row: TrainRow, model: nn.Module, record: Json) -> None:
        """Write the network for :func:`bgcbench.load_converted`; a disk that refuses it costs nothing else."""
        if self.config.save is None or not self.world.is_main:
            return
        path = Path(self.config.save) / saved_name(row.key)
        buffer = io.BytesIO()
        save_converted(Converted(model, Record.from_json(record)), buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            self.warnings.append(f"--save {path} could not be written ({error.strerror or error}); the run goes on")
            return
        self.known[row.key]["saved"] = path.name

    # ----------------------------------------------------------------------------------------------- what networks cost

    def _measure_all(self) -> Generator[Update, None, bool]:
        """Time each variant and N that has no times yet, beside the standard one; False where asked to stop."""
        rows = [row for row in self.rows if row.key in self.known and self.known[row.key]["time"] is None]
        cells = {row.cell for row in rows}
        if not cells:
            return True
        standard = self.rows[0].cell
        config = self.config.costs(str(self.session.device))
        try:
            planned = plan_network(config)
            session = profile_run.open_session(config)
            wanted = [row for row in planned.rows if _cell(row.params) in {*cells, standard}]
            run = profile_run.ProfileRun(config, session, wanted, subjects=planned.subjects, stop=self.stop)
            for update in run.run():
                yield Update(self.rows[0], 0, len(wanted), None, 0.0, doing=f"timing: {update.doing}")
        except Exception as problem:  # noqa: BLE001 - conversions and trainings are worth having without
            failure = describe_failure(problem, self.session.device)
            self.warnings.append(f"--time: the networks could not be measured: {failure.reason}")
            return True
        if self.stop():
            return False
        measured = run.results
        timed = {"results": measured, "interleaved": run.interleaved, "settings": session.settings}
        self.warnings += [f"--time: {text}" for text in measurement_warnings(timed)]
        for found in measured:
            if found["status"] != "ok":
                label = network_label(*_cell(found["params"]))
                self.warnings.append(f"--time: {label} could not be measured: {found['reason']}")
        times = {cell: _times(measured, cell, standard) for cell in cells}
        for found in filter(None, times.values()):
            found["memory"] = run.protocol.memory
        for row in rows:
            self.known[row.key]["time"] = times[row.cell]
        yield Update(self.rows[0], 0, len(wanted), None, 1.0, save=True, doing="timed")
        return True


def _cell(params: Json) -> tuple[str, int]:
    return params["variant"], params["groups"]


def _times(measured: Sequence[Json], cell: tuple[str, int], standard: tuple[str, int]) -> Json | None:
    """The ``time`` of a row: medians (seconds) and the standard convolution's times over them; None without any."""
    phases: Json = {}
    for phase, form in (("fwd", "deployed"), ("train_step", "masked")):
        row, reference = _row_of(measured, cell, form, phase), _row_of(measured, standard, form, phase)
        if row is None:
            continue
        summary = row["phases"][phase]["summary"]
        phases[phase] = {"median_s": summary["median_s"], "ci95_s": summary["ci95_s"], "n": summary["n"],
                         "ratio": None, "ratio_ci95": None}  # fmt: skip
        if reference is not None:
            over, under = (Series(r["phases"][phase]["samples_s"], r["phases"][phase]["rounds"])
                           for r in (reference, row))  # fmt: skip
            ratio = ratio_of_medians(over, under, paired=row["interleaved"] == reference["interleaved"])
            bounds = None if ratio.ci95 is None else [ratio.ci95.low, ratio.ci95.high]
            phases[phase] |= {"ratio": ratio.value, "ratio_ci95": bounds}
    if not phases:
        return None
    params = measured[0]["params"]
    return {"phase": phases, **{name: params[name] for name in ("batch", "precision", "layout", "mode")}}


def _row_of(measured: Sequence[Json], cell: tuple[str, int], form: str, phase: str) -> Json | None:
    """The measured row of a variant and N, of two forms (trained, deployed) the one called ``form``."""
    rows = [
        row
        for row in measured
        if _cell(row["params"]) == cell and phase in row["phases"] and phase not in row.get("failures", {})
    ]
    return next((row for row in rows if row["params"]["algorithm"] == form), rows[0] if rows else None)
