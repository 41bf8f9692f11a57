"""Trains the rows of ``bgcbench train``: the data is opened, each network built, converted and trained."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from msgspec.structs import replace
from torch import nn

from bgcbench.conversion.convert import candidates
from bgcbench.conversion.lockstep import Stopped
from bgcbench.conversion.record import replay
from bgcbench.data import open_labelled
from bgcbench.data.labelled import LabelledData, ResidentData
from bgcbench.errors import BgcbenchError, OutputError, ShapeError, UsageError
from bgcbench.experiments.base import Run, Session, open_device
from bgcbench.experiments.config import refuse_misfits
from bgcbench.experiments.images import sized, traced
from bgcbench.experiments.network_run import converted_as_chosen, network_counts
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.profile_run import measured_forms
from bgcbench.experiments.train import RowT, TrainConfig, identity, plan
from bgcbench.measure.ceilings import measure_ceilings
from bgcbench.measure.device import (
    DTYPES,
    backend_state,
    compile_state,
    current,
    describe_failure,
    free_memory,
    make_stopwatch,
)
from bgcbench.measure.trace import Trace, trace
from bgcbench.models import build_empty, build_model
from bgcbench.results import Json
from bgcbench.results.rows import CellKey, Counts, Epoch, Kept, Record, TrainRow
from bgcbench.specs import PRECISIONS, UNLABELLED, Choice
from bgcbench.training.checkpoint import Checkpoints
from bgcbench.training.distributed import World, own_device
from bgcbench.training.loop import NotFinite, Options, Progress, Training, check_batch, subset_of
from bgcbench.training.recipes import Recipe

OUT_OF_MEMORY = "use --accumulate 2 or more (the same batch in smaller parts), or a smaller --batch-size"
WORKERS = 8  # at most, where --workers is not given


def open_session(config: TrainConfig) -> Session:
    """This process's device; raises DeviceError where it is not there, UsageError for what it cannot do."""
    mode = "compile" if config.compile else "eager"
    session = open_device(config, own_device(config.device), layout=config.layout, deterministic=False)
    session.settings["mode"] = mode  # a network is compiled on any device
    if session.device.type == "cpu":
        dataclasses.replace(config, device="cpu")  # which refuses what a CPU cannot do
    session.warnings = [warning.replace("measured", "trained") for warning in session.warnings]
    return session


@dataclass(kw_only=True)
class Prepared(Generic[RowT]):
    """The data and the networks of a run, without numbers: everything that can be wrong is known.

    config: with the number of classes that the data has. rows: with what their networks cost and keep, undone.
    traces: what a forward pass of each cell does.
    """

    config: TrainConfig
    data: LabelledData
    rows: list[RowT]
    traces: dict[Choice, Trace]
    options: Options
    warnings: list[str]

    @property
    def settings(self) -> Json:
        """What a result file says of the data as it ran."""
        data = self.data
        crops = {"pad": data.pad, "flip": data.flip} if isinstance(data, ResidentData) else {"pad": None, "flip": True}
        return {"data_sha256": data.fingerprint, "preprocessing": data.preprocessing.to_json(), **crops}


def prepare(config: TrainConfig, world: World) -> Prepared[TrainRow]:
    """Open and verify the data, try every conversion and check every size, before anything is trained.

    Raises UsageError for what is not there or does not fit, ShapeError where N does not divide (unless skip_invalid).
    """
    config, data = open_data(sized(config), world)
    options = options_of(config, data, world)
    rows, traces, warnings = try_conversions(config, plan(config), **image_counts(data, options))
    return Prepared(config=config, data=data, rows=rows, traces=traces, options=options,
                    warnings=list(dict.fromkeys((*data.notes, *warnings))))  # fmt: skip


def image_counts(data: LabelledData, options: Options) -> dict[str, int]:
    """The fields of every row that say how many images there are."""
    return {"train_images": options.subset or len(data.train_labels), "test_images": len(data.test_labels)}


Config = TypeVar("Config", bound=TrainConfig)


def open_data(config: Config, world: World) -> tuple[Config, LabelledData]:
    """The data, and ``config`` with what is known only now: how many classes it has.

    Raises UsageError for what is not there or does not fit.
    """
    data = _opened(config, world)
    if config.num_classes is None:
        config = dataclasses.replace(config, num_classes=data.num_classes)
    config.check_classes(data.num_classes)
    if config.quick and config.subset is not None and config.subset > len(data.train_labels):
        config = dataclasses.replace(config, subset=len(data.train_labels))
    return config, data


def options_of(config: TrainConfig, data: LabelledData, world: World) -> Options:
    """How a training runs; raises UsageError where a batch does not divide or the data does not fill it."""
    if config.sync_bn and world.size == 1:
        raise UsageError("--sync-bn is for several processes, and this is one; start them with torchrun")
    options = Options(config.accumulate, _workers(config), config.save_every_s, config.sync_bn, config.subset)
    images = subset_of(data.train_labels, config.subset)
    if config.hyper.epochs:
        check_batch(config.hyper, options, len(images), world.size)
    return options


def try_conversions(
    config: TrainConfig, rows: list[RowT], **facts: Any
) -> tuple[list[RowT], dict[Choice, Trace], list[str]]:
    """Convert each cell of ``config`` without numbers: ``rows`` with what they cost and keep, what a forward
    pass of each does, and what the user should know. facts: other fields of all rows.

    Raises ShapeError naming every convolution that some N or rank does not fit, unless skip_invalid, and UsageError
    where there is nothing to replace.
    """
    spec = config.spec
    dense = build_empty(spec)
    as_it_is = traced(dense, spec)
    traces: dict[Choice, Trace] = {}
    cells: dict[Choice, tuple[Counts, Record]] = {}
    problems: list[str] = []
    for cell in config.cells:
        model, record, found = dense, _all_kept(config, dense), as_it_is
        if not cell.is_dense:
            try:
                converted = converted_as_chosen(config, dense, cell, config.algorithm_of)
            except ShapeError as problem:
                problems.append(str(problem))
                continue
            model, record = converted.model, converted.record
            found = trace(model, spec.size)
        traces[cell] = found
        cells[cell] = counts_of(config, model, found), record
    refuse_misfits(problems)

    def completed(row: RowT) -> RowT:
        counts, record = cells[row.params.choice]
        init = record.init if row.params.is_dense else row.params.init
        return replace(row, counts=counts, convert=replace(record, init=init), **facts)

    notes = [note for _, record in cells.values() for note in record.notes]
    return [completed(row) for row in rows], traces, notes


def _all_kept(config: TrainConfig, dense: nn.Module) -> Record:
    """The record of the dense network: what a conversion would look at stays."""
    found = candidates(
        dense, where=config.where, include=config.include, exclude=config.exclude, example_input=config.spec.size
    )
    kept = (Kept(layer.name, "the dense network", "standard") for layer in found.chosen)
    return Record(replaced=(), kept=(*kept, *found.kept))


def counts_of(config: TrainConfig, model: nn.Module, found: Trace, *, learnt: bool = False) -> Counts:
    """What ``model`` costs, as it was built or, with ``learnt``, as its structure is now."""
    return network_counts(model, found, config.batch_size, PRECISIONS[config.precision], learnt=learnt)


def _opened(config: TrainConfig, world: World) -> LabelledData:
    def opened() -> LabelledData:
        return open_labelled(
            config.data,
            (config.height or 0, config.width or 0),
            [Path(folder) for folder in config.data_dirs],
            download=config.download and world.is_main,
            classes=config.num_classes if config.data in ("synthetic", UNLABELLED) else None,
            val_alone=config.val_alone,
        )

    data = world.first(opened)
    given = {"pad": config.pad, "flip": config.flip}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not changed:
        return data
    if not isinstance(data, ResidentData):
        raise UsageError(
            f"--{next(iter(changed))} is for images that fit into memory; {data.name} is augmented by random resized "
            "crops: leave it out"
        )
    return dataclasses.replace(data, **changed)


def _workers(config: TrainConfig) -> int:
    """--workers, or a process a core, within reason and shared by the trainings on this machine."""
    if config.workers is not None:
        return config.workers
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun
    return max(1, min(WORKERS, (os.cpu_count() or 1) // max(1, beside)))


@dataclass(frozen=True)
class Update:
    """What a run is at: the row, ``number`` (from 0) of ``count``, its progress (None before the first step), and the
    share of the run that is done.

    save: an epoch, or the row, has just ended; ``results`` are newer than before. record: the epoch that has ended.
    doing: what else than training is done, "" for nothing.
    """

    row: TrainRow
    number: int
    count: int
    progress: Progress | None
    done: float
    left_s: float | None = None
    save: bool = False
    record: Epoch | None = None
    doing: str = ""


class TrainRun(Run[RowT]):
    """One run over the rows of ``prepared``; ``results`` are what is known of them at any time.

    kept: rows of an earlier file by key; those that are done are not trained again. folder: where checkpoints are kept,
    None for nowhere. A run that begins ``afresh`` goes on with nothing: :meth:`make_room`, which is to be called first,
    removes checkpoints of an earlier run in that folder if ``replace``, and otherwise raises OutputError.
    """

    config: TrainConfig
    planned: Sequence[RowT]

    def __init__(
        self,
        prepared: Prepared[RowT],
        session: Session,
        world: World,
        *,
        folder: Path | None = None,
        afresh: bool = True,
        replace: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(prepared.config, session, prepared.rows, **options)
        self.prepared, self.world, self.folder = prepared, world, folder
        self.warnings = [*session.warnings, *prepared.warnings]
        self._begun: float | None = None
        self._credit = 0.0  # rows' worth of what earlier runs have done
        self._afresh, self._replace = afresh, replace

    def make_room(self) -> None:
        """See that no checkpoint of an earlier run is in the way of one that begins afresh; raises OutputError."""
        if self._afresh:
            self.world.once(self._make_room)

    def _make_room(self) -> None:
        for row in self.planned:
            earlier = self._checkpoints(row)
            if earlier is None:
                return
            if earlier.names and not self._replace:
                raise OutputError(
                    f"{earlier.folder} holds checkpoints of an earlier run; --force removes them, --resume goes on "
                    "with them, or give another --out"
                )
            earlier.clear()

    def title(self, row: TrainRow) -> str:
        """A row for people, as far as the run's rows differ: "BGC N=4", "BGC N=4 seed 1", "BGC N=4 white"."""
        inits = {planned.params.init for planned in self.planned if not planned.params.is_dense}
        words = [row.params.choice.label]
        words += [f"seed {row.params.seed}"] * (len(self.config.seeds) > 1)
        words += [row.params.init] * (len(inits) > 1 and not row.params.is_dense)
        return " ".join(words)

    @property
    def todo(self) -> list[RowT]:
        """The rows that are not done."""
        return [row for row in self.planned if not self._is_done(row)]

    def _is_done(self, row: RowT) -> bool:
        known = self._known(row)
        # A file that was made without --control has the untouched network's row, and not its training.
        return known.is_done and known.params.epochs == row.params.epochs

    def _known(self, row: RowT) -> RowT:
        """What is known of ``row``; itself where nothing is."""
        return self.known.get(row.key, row)

    def _note(self, row: RowT, status: str, reason: str | None, **found: Any) -> None:
        """Write down how far ``row`` has come, and what was ``found`` of it; the rest stays as it is known."""
        folder = self.folder if row.params.epochs else None
        self.known[row.key] = replace(
            self._known(row), params=row.params, status=status, reason=reason, world_size=self.world.size,
            checkpoints=None if folder is None else f"{folder.name}/{row.key}", **found,
        )  # fmt: skip

    @contextlib.contextmanager
    def _failing(self, note: Callable[[str, str], None]) -> Iterator[None]:
        """What fails in this block is noted as (status, reason) of its row, and the other rows go on."""
        try:
            yield
        except NotFinite as problem:  # found by all processes alike
            note("error", str(problem))
        except (BgcbenchError, Stopped):
            raise  # a file that cannot be read, a checkpoint of something else: other rows would meet it too
        except Exception as problem:
            failure = describe_failure(problem, self.session.device, OUT_OF_MEMORY)
            note(failure.status, failure.reason)
            if self.world.size > 1:
                raise  # the other processes wait for this one

    def run(self) -> Iterator[Update]:
        """Do what is left, and say how it goes. The global random state is put back afterwards."""
        with self._state():
            yield from self._work()

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """Everything global that a training sets, put back afterwards; its device is the current one."""
        device = self.session.device
        with (
            current(device),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            backend_state(self.config.precision, self.config.threads),
            compile_state(),
        ):
            yield

    def _work(self) -> Iterator[Update]:
        yield from self._train(self.todo)

    # --------------------------------------------------------------------------------------------------------- training

    def _train(self, todo: Sequence[RowT]) -> Iterator[Update]:
        if todo and self.session.device.type == "cuda":
            stopwatch = make_stopwatch(self.session.device, cold=False)
            self.ceilings = measure_ceilings(stopwatch, DTYPES[self.config.precision])
        self._begun = time.perf_counter()
        for number, row in enumerate(todo):
            if self.world.any(self.stop()):
                return
            yield from self._trained(row, number, len(todo))
            free_memory(self.session.device)
            if self.config.compile:
                torch._dynamo.reset()
            if self.known[row.key].status == "interrupted":
                return

    def _trained(self, row: RowT, number: int, count: int) -> Iterator[Update]:
        yield Update(row, number, count, None, number / count)
        training: Training | None = None

        def note(status: str, reason: str | None) -> None:
            self._note(row, status, reason, **({} if training is None else self._found(row, training)))

        with self._failing(note):
            training = self.training(row)
            lost, credited = bool(self._known(row).epochs), False
            for progress in training.run():
                if not credited:
                    credited = True
                    self._credit += training.resumed
                    if lost and not training.resumed:
                        self.warnings.append(f"{row.key}: no checkpoint is there, so it is trained from the start")
                if progress.ended:
                    note("interrupted", f"epoch {progress.epoch} of {progress.epochs} was the last")
                done = (number + progress.done) / count
                record = training.state.history[-1] if progress.ended else None
                left = self._left(done, self._credit / count)
                yield Update(row, number, count, progress, done, left, progress.ended, record)
            if training.stopped:
                note("interrupted", f"stopped in epoch {training.state.epoch + 1}")
            else:
                self._end(row, training)
        yield Update(row, number, count, None, (number + 1) / count, save=True)

    def _end(self, row: RowT, training: Training) -> None:
        """Write down a training that has come to its end."""
        self._note(row, "ok", None, **self._found(row, training, learnt=True) | {"stage": "trained"})

    def _found(self, row: RowT, training: Training, *, learnt: bool = False) -> Json:
        """What a training has found so far, as fields of its row; learnt: with the structure that it has come to."""
        state, known = training.state, self._known(row)
        found = self.prepared.traces[row.params.choice]
        counts = counts_of(self.config, training.network, found, learnt=True) if learnt else known.counts
        initial = known.error_initial if state.initial is None else state.initial
        last = state.history[-1] if state.history else None
        speeds = [epoch.images_per_s for epoch in state.history if epoch.images_per_s]
        speed = statistics.median(speeds) if speeds else None
        evaluated = bool(state.history) or initial is not None
        return {
            "counts": counts,
            "epochs": tuple(state.history),
            "error_initial": initial,
            "error_final": last and last.test_error,
            "error_best": state.best,
            "epoch_best": state.best_epoch,
            "error_final_top5": last and last.test_error_top5,
            "images_per_s": speed,
            "matmul_fraction": speed and self._of_peak(counts, speed),
            "train_seconds": sum(epoch.seconds for epoch in state.history),
            "forms": measured_forms(training.network) or known.forms,
            "stage": "evaluated" if evaluated else known.stage,
        }

    def training(self, row: RowT, *, checkpoints: bool = True) -> Training:
        """The training of ``row``, with its network on the device."""
        training = self._training(row, self._placed(self._network(row)), checkpoints=checkpoints)
        training.state.initial = self._known(row).error_initial
        return training

    def _network(self, row: RowT) -> nn.Module:
        """The network that the training of ``row`` starts with."""
        # What is not replaced starts alike in every row of a seed.
        torch.manual_seed(row_seed(row.params.seed, "network"))
        model = build_model(self.config.spec)
        if row.convert is not None and row.convert.replaced:
            torch.manual_seed(row_seed(row.params.seed, row.key))
            model = replay(model, row.convert)
        return model

    def _placed(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, in the run's layout."""
        config = self.config
        model = model.to(self.session.device, torch.float64 if config.precision == "fp64" else None)
        return model.to(memory_format=torch.channels_last) if config.layout == "nhwc" else model

    def _training(
        self,
        row: RowT,
        model: nn.Module,
        *,
        checkpoints: bool = True,
        recipe: Recipe | None = None,
        record: Record | None = None,
        teacher: nn.Module | None = None,
    ) -> Training:
        """The training of ``row`` with ``model``, which is placed, and what ``record`` says was done to it."""
        return Training(
            model,
            self.prepared.data,
            recipe or self.config.hyper,
            self.world,
            seed=row_seed(row.params.seed, "training"),
            identity=self._identity(row),
            record=None if row.params.is_dense else record or self._known(row).convert,
            options=self.prepared.options,
            checkpoints=self._checkpoints(row) if checkpoints else None,
            teacher=teacher,
            stop=self.stop,
            warn=self.warnings.append,
        )

    def _identity(self, row: RowT) -> Json:
        """What the checkpoints of ``row`` must agree on."""
        return identity(self.config, row.params)

    def _checkpoints(self, row: RowT) -> Checkpoints | None:
        return None if self.folder is None else Checkpoints(self.folder / row.key)

    def _left(self, done: float, before: float) -> float | None:
        """Seconds left of the run, as fast as it has been so far; the share ``before`` was done by an earlier one."""
        if self._begun is None or done <= before:
            return None
        elapsed = time.perf_counter() - self._begun
        return elapsed * (1 - done) / (done - before)

    def _of_peak(self, counts: Counts | None, images_per_s: float) -> float | None:
        """Achieved FLOP/s of each device over those of its best matrix product; None where that was not measured.

        A training step is counted as three forward passes: y, dx and dW.
        """
        if self.ceilings is None or counts is None:
            return None
        macs = counts.macs_training or counts.macs
        return 3 * 2 * macs * images_per_s / self.world.size / self.ceilings.flops_per_s

    # --------------------------------------------------------------------------------------------------- the dry run

    def estimates(self) -> Iterator[tuple[RowT, float, float]]:
        """(row, seconds an epoch, seconds in all) of one row of each cell, by training a few steps of it.

        Of a row that is not trained, what evaluating it takes. Raises BgcbenchError where a network cannot be trained,
        as out of memory.
        """
        seen: set[CellKey] = set()
        with self._state():
            for row in self.todo:
                if row.params.cell in seen:
                    continue
                if self.world.any(self.stop()):
                    return
                seen.add(row.params.cell)
                try:
                    epoch_s = self.training(row, checkpoints=False).estimate()
                except BgcbenchError:
                    raise
                except Exception as problem:
                    failure = describe_failure(problem, self.session.device, OUT_OF_MEMORY)
                    raise BgcbenchError(f"{row.params.choice.label}: {failure.reason}") from problem
                yield row, epoch_s, epoch_s * max(1, row.params.epochs)
                free_memory(self.session.device)
