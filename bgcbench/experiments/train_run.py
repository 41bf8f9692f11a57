"""Trains the rows of ``bgcbench train``: the data is opened, each network built, converted and trained."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bgcbench.conversion.convert import candidates
from bgcbench.conversion.record import replay
from bgcbench.data import open_labelled
from bgcbench.data.labelled import LabelledData, ResidentData
from bgcbench.errors import BgcbenchError, OutputError, ShapeError, UsageError
from bgcbench.experiments.base import Run
from bgcbench.experiments.images import sized, traced
from bgcbench.experiments.network_run import (
    converted_as_chosen,
    network_counts,
    network_label,
    refuse_indivisible,
)
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.profile_run import measured_forms
from bgcbench.experiments.session import Session, open_device
from bgcbench.experiments.train import TrainConfig, TrainRow, identity, plan
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
from bgcbench.results import DONE, Json, stage_of
from bgcbench.results.rows import Record
from bgcbench.specs import PRECISIONS
from bgcbench.theory import paper
from bgcbench.training.checkpoint import Checkpoints
from bgcbench.training.distributed import World, own_device
from bgcbench.training.loop import NotFinite, Options, Progress, State, Training, check_batch, subset_of
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


@dataclass(frozen=True)
class Cell:
    """What all seeds of a variant and N share. record: None for the dense network; kept: its convolutions that stay."""

    record: Record | None
    found: Trace
    counts: Json
    convert: Json


@dataclass
class Prepared:
    """The data and the networks of a run, without numbers: everything that can be wrong is known.

    config: with the number of classes that the data has.
    """

    config: TrainConfig
    data: LabelledData
    rows: list[TrainRow]
    cells: dict[tuple[str, int], Cell]
    options: Options
    warnings: list[str] = field(default_factory=list)

    @property
    def settings(self) -> Json:
        """What a result file says of the data as it ran."""
        data = self.data
        crops = {"pad": data.pad, "flip": data.flip} if isinstance(data, ResidentData) else {"pad": None, "flip": True}
        return {"data_sha256": data.fingerprint, "preprocessing": data.preprocessing.to_json(), **crops}


def prepare(config: TrainConfig, world: World) -> Prepared:
    """Open and verify the data, try every conversion and check every size, before anything is trained.

    Raises UsageError for what is not there or does not fit, ShapeError where N does not divide (unless skip_invalid).
    """
    config, data = open_data(sized(config), world)
    options = options_of(config, data, world)
    cells, warnings = try_conversions(config)
    return Prepared(config, data, plan(config), cells, options, list(dict.fromkeys((*data.notes, *warnings))))


Config = TypeVar("Config", bound=TrainConfig)


def open_data(config: Config, world: World) -> tuple[Config, LabelledData]:
    """The data, and ``config`` with what is known only now: how many classes it has.

    The main process opens it first, so that a download is made once. Raises UsageError for what is not there or does
    not fit.
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


def try_conversions(config: TrainConfig) -> tuple[dict[tuple[str, int], Cell], list[str]]:
    """Each variant and N of ``config``, converted without numbers, and what the user should know of it.

    Raises ShapeError naming every convolution that some N does not divide, unless skip_invalid, and UsageError where
    there is nothing to replace.
    """
    spec = config.spec
    dense = build_empty(spec)
    as_it_is = traced(dense, spec)
    warnings: list[str] = []
    problems: list[str] = []
    cells: dict[tuple[str, int], Cell] = {}
    for variant, groups in config.cells:
        record, model = None, dense
        if variant != "standard":
            try:
                converted = converted_as_chosen(config, dense, variant, groups, config.form_of(variant))
            except ShapeError as problem:
                problems.append(str(problem))
                continue
            record, model = converted.record, converted.model
            warnings += record.notes
        found = as_it_is if record is None else trace(model, spec.size)
        counts = network_counts(model, found, config.batch_size or 1, PRECISIONS[config.precision])
        cells[variant, groups] = Cell(record, found, counts, _converted(record, dense, config))
    refuse_indivisible(problems)
    return cells, warnings


def _opened(config: TrainConfig, world: World) -> LabelledData:
    size = (config.height or 0, config.width or 0)
    folders = [Path(folder) for folder in config.data_dirs]

    def opened(*, download: bool) -> LabelledData:
        classes = config.num_classes if config.data == "synthetic" else None
        return open_labelled(config.data, size, folders, download=download, classes=classes, val_alone=config.val_alone)

    found: list[LabelledData] = []
    world.once(lambda: found.append(opened(download=config.download)))
    data = found[0] if found else opened(download=False)
    changed: dict[str, Any] = {"pad": config.pad, "flip": config.flip}
    changed = {name: value for name, value in changed.items() if value is not None}
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


def _converted(record: Record | None, dense: nn.Module, config: TrainConfig) -> Json:
    """The ``convert`` entry of a row; of the dense network it is what a conversion would look at."""
    if record is not None:
        return record.to_json()
    found = candidates(
        dense, where=config.where, include=config.include, exclude=config.exclude, example_input=config.spec.size
    )
    kept = [{"name": layer.name, "reason": "the dense network", "code": "standard"} for layer in found.chosen]
    return {"replaced": [], "kept": kept + [one.to_json() for one in found.kept]}


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
    record: Json | None = None
    doing: str = ""


class TrainRun(Run):
    """One run over the rows of ``prepared``; ``results`` are what is known of them at any time.

    kept: rows of an earlier file by key; those that are done are not trained again. folder: where checkpoints are kept,
    None for nowhere. A run that begins ``afresh`` goes on with nothing: :meth:`make_room`, which is to be called first,
    removes checkpoints of an earlier run in that folder if ``replace``, and otherwise raises OutputError.
    """

    config: TrainConfig

    def __init__(
        self,
        prepared: Prepared,
        session: Session,
        world: World,
        *,
        kept: Mapping[str, Json] | None = None,
        folder: Path | None = None,
        afresh: bool = True,
        replace: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.prepared, self.session, self.world, self.stop = prepared, session, world, stop
        self.config = prepared.config
        self.folder = folder
        self.known: dict[str, Json] = dict(kept or {})
        self.warnings = [*session.warnings, *prepared.warnings]
        self.rows = prepared.rows
        self._begun: float | None = None
        self._credit = 0.0  # rows' worth of what earlier runs have done
        self._afresh, self._replace = afresh, replace

    def make_room(self) -> None:
        """See that no checkpoint of an earlier run is in the way of one that begins afresh; raises OutputError."""
        if self._afresh:
            self.world.once(self._make_room)

    def _make_room(self) -> None:
        for row in self.rows if self.folder is not None else ():
            earlier = Checkpoints(Path(self.folder or "") / row.key)
            if earlier.names and not self._replace:
                raise OutputError(
                    f"{earlier.folder} holds checkpoints of an earlier run; --force removes them, --resume goes on "
                    "with them, or give another --out"
                )
            earlier.clear()

    def title(self, row: TrainRow) -> str:
        """A row for people, as far as the run's rows differ: "BGC N=4", "BGC N=4 seed 1"."""
        label = network_label(*row.cell)
        return f"{label} seed {row.seed}" if len(self.config.seeds) > 1 else label

    @property
    def keys(self) -> list[str]:
        return [row.key for row in self.rows]

    @property
    def results(self) -> list[Json]:
        order = dict.fromkeys((*(row.key for row in self.rows), *self.known))
        return [{**self.known[key], "stage": stage_of(self.known[key])} for key in order if key in self.known]

    @property
    def todo(self) -> list[TrainRow]:
        """The rows that are not done."""
        return [row for row in self.rows if self.known.get(row.key, {}).get("status") not in DONE]

    def run(self) -> Iterator[Update]:
        """Do what is left, and say how it goes. The global random state is put back afterwards."""
        with self._state():
            yield from self._work()

    def _work(self) -> Iterator[Update]:
        yield from self._train(self.todo)

    def _train(self, todo: Sequence[TrainRow]) -> Iterator[Update]:
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
            if self.known[row.key]["status"] == "interrupted":
                return

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

    def _trained(self, row: TrainRow, number: int, count: int) -> Iterator[Update]:
        yield Update(row, number, count, None, number / count)
        training: Training | None = None
        credited = False
        try:
            training = self.training(row)
            lost = bool(self.known.get(row.key, {}).get("epochs"))
            for progress in training.run():
                if not credited:
                    credited = True
                    self._credit += training.resumed
                    if lost and not training.resumed:
                        self.warnings.append(f"{row.key}: no checkpoint is there, so it is trained from the start")
                if progress.ended:
                    self._take(
                        row, training, "interrupted", f"epoch {progress.epoch} of {progress.epochs} was the last"
                    )
                done = (number + progress.done) / count
                record = training.state.history[-1] if progress.ended else None
                left = self._left(done, self._credit / count)
                yield Update(row, number, count, progress, done, left, progress.ended, record)
            if training.stopped:
                self._take(row, training, "interrupted", f"stopped in epoch {training.state.epoch + 1}")
            else:
                self._take(row, training, "ok", None)
        except NotFinite as problem:
            self._take(row, training, "error", str(problem))
        except BgcbenchError:
            raise  # a file that cannot be read, a checkpoint of something else: other rows would meet it too
        except Exception as problem:
            failure = describe_failure(problem, self.session.device, OUT_OF_MEMORY)
            self._take(row, training, failure.status, failure.reason)
            if self.world.size > 1:
                raise  # the other processes wait for this one
        yield Update(row, number, count, None, (number + 1) / count, save=True)

    def training(self, row: TrainRow, *, checkpoints: bool = True) -> Training:
        """The training of ``row``, with its network on the device."""
        return self._training(row, self._placed(self._network(row)), checkpoints=checkpoints)

    def _network(self, row: TrainRow) -> nn.Module:
        """The network that the training of ``row`` starts with."""
        record = self.prepared.cells[row.cell].record
        # What is not replaced starts alike in every row of a seed.
        torch.manual_seed(row_seed(row.seed, "network"))
        model = build_model(self.config.spec)
        if record is not None:
            torch.manual_seed(row_seed(row.seed, row.key))
            model = replay(model, record)
        return model

    def _placed(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, in the run's layout."""
        config = self.config
        model = model.to(self.session.device, torch.float64 if config.precision == "fp64" else None)
        return model.to(memory_format=torch.channels_last) if config.layout == "nhwc" else model

    def _training(self, row: TrainRow, model: nn.Module, *, checkpoints: bool = True, **options: Any) -> Training:
        """The training of ``row`` with ``model``, which is placed; options: others of Training's than a training's."""
        where = Checkpoints(self.folder / row.key) if checkpoints and self.folder is not None else None
        record = self.prepared.cells[row.cell].record
        recipe = options.pop("recipe", None) or self._recipe(row)
        shared = {
            "seed": row_seed(row.seed, "training"),
            "identity": identity(self.config, row),
            "record": None if record is None else record.to_json(),
            "options": self.prepared.options,
            "checkpoints": where,
            "stop": self.stop,
            "warn": self.warnings.append,
        }
        return Training(model, self.prepared.data, recipe, self.world, **{**shared, **options})

    def _recipe(self, row: TrainRow) -> Recipe:
        return self.config.hyper

    def _left(self, done: float, before: float) -> float | None:
        """Seconds left of the run, as fast as it has been so far; the share ``before`` was done by an earlier one."""
        if self._begun is None or done <= before:
            return None
        elapsed = time.perf_counter() - self._begun
        return elapsed * (1 - done) / (done - before)

    def _take(self, row: TrainRow, training: Training | None, status: str, reason: str | None) -> None:
        """Write down what is known of a row; without a training that is what was known before."""
        cell = self.prepared.cells[row.cell]
        earlier = self.known.get(row.key, {})
        state = State(history=earlier.get("epochs", []), initial=earlier.get("error_initial"),
                      best=earlier.get("error_best"), best_epoch=earlier.get("epoch_best"))  # fmt: skip
        state = state if training is None else training.state
        history = list(state.history)
        last = history[-1] if history else {}
        counts = cell.counts
        if training is not None and status == "ok" and cell.record is not None:
            counts = network_counts(
                training.network,
                cell.found,
                self.config.batch_size or 1,
                PRECISIONS[self.config.precision],
                learnt=True,
            )
        forms = {} if training is None else measured_forms(training.network)
        forms = forms or earlier.get("forms", {})
        printed = self._printed(row)
        speeds = [epoch["images_per_s"] for epoch in history if epoch["images_per_s"]]
        self.known[row.key] = {
            "key": row.key,
            "params": row.params,
            "status": status,
            "reason": reason,
            "counts": counts,
            "epochs": history,
            "error_initial": state.initial,
            "error_final": last.get("test_error"),
            "error_best": state.best,
            "epoch_best": state.best_epoch,
            "error_final_top5": last.get("test_error_top5"),
            "train_images": self.prepared.options.subset or len(self.prepared.data.train_labels),
            "test_images": len(self.prepared.data.test_labels),
            "images_per_s": statistics.median(speeds) if speeds else None,
            "matmul_fraction": self._of_peak(counts, statistics.median(speeds)) if speeds else None,
            "train_seconds": sum(epoch["seconds"] for epoch in history),
            "world_size": self.world.size,
            "paper": None if printed is None else {"error": printed},
            "convert": cell.convert,
            **({"forms": forms} if forms else {}),
            "checkpoints": None if self.folder is None else f"{self.folder.name}/{row.key}",
        }

    def _printed(self, row: TrainRow) -> float | None:
        """The error that the paper prints for ``row``."""
        return paper.printed_error(row.params["dataset"], row.params["model"], *row.cell)

    def _of_peak(self, counts: Json, images_per_s: float) -> float | None:
        """Achieved FLOP/s of each device over those of its best matrix product; None where that was not measured.

        A training step is counted as three forward passes: y, dx and dW.
        """
        if self.ceilings is None:
            return None
        macs = float(counts.get("macs_training") or counts["macs"])
        return 3 * 2 * macs * images_per_s / self.world.size / self.ceilings.flops_per_s

    # --------------------------------------------------------------------------------------------------- the dry run

    def estimates(self) -> Iterator[tuple[TrainRow, float, float]]:
        """(row, seconds an epoch, seconds in all) of one row of each variant and N, by training a few steps of it.

        Of a row that is not trained, what judging it takes. Raises BgcbenchError where a network cannot be trained, as
        out of memory.
        """
        seen: set[tuple[str, int]] = set()
        with self._state():
            for row in self.todo:
                if row.cell in seen:
                    continue
                if self.world.any(self.stop()):
                    return
                seen.add(row.cell)
                try:
                    epoch_s = self.training(row, checkpoints=False).estimate()
                except BgcbenchError:
                    raise
                except Exception as problem:
                    failure = describe_failure(problem, self.session.device, OUT_OF_MEMORY)
                    raise BgcbenchError(f"{network_label(*row.cell)}: {failure.reason}") from problem
                yield row, epoch_s, epoch_s * max(1, row.epochs)
                free_memory(self.session.device)
