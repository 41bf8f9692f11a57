"""The training loop: one network, one data set, one recipe, in one process or in several.

What happens in a step follows from (seed, epoch, step) alone: the order and augmentation of the images, the learning
rate, the random numbers inside the network (dropout). So a training that was stopped anywhere or killed goes on as if
it had not been; on another number of processes too, but for what each of them draws or counts for itself (dropout, the
statistics of batch norm).
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs import autotune
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.masked import MaskedConv2d, parameter_groups
from bgcbench.data.feeds import epoch_order, stream_seed
from bgcbench.data.labelled import LabelledData
from bgcbench.errors import BgcbenchError, ResultFileError, UsageError
from bgcbench.measure.device import DTYPES
from bgcbench.measure.undisturbed import first_not_finite
from bgcbench.measure.workload import class_scores
from bgcbench.results import Json, write_atomically
from bgcbench.results.rows import Epoch, Record
from bgcbench.training.checkpoint import DIAGNOSIS, Checkpoints, Stored
from bgcbench.training.distributed import World
from bgcbench.training.recipes import Recipe, check_parts

TOP5_CLASSES = 10  # from so many classes on the five best scores are looked at too
LOOK_STEPS = {"cpu": 1, "cuda": 50}  # between two looks at the losses: on CUDA each one waits for the device
AGREE_STEPS = 10  # several processes ask one another this often whether to stop or to save
SHOW_S = 0.25  # between two reports of progress
AUXILIARY_WEIGHT = 0.3  # of the losses of auxiliary heads, as in GoogLeNet's paper
TEACHER_WEIGHT, TEACHER_TEMPERATURE = 1.0, 1.0  # of the divergence from a teacher's outputs, beside the labels' 1


class NotFinite(BgcbenchError):
    """A loss or an output of the network is infinite or no number."""


class _AskedToStop(Exception):
    """The run was asked to stop during an evaluation."""


@dataclass(frozen=True)
class Options:
    """How a training runs.

    accumulate: parts that a process's share of a batch is cut into, one after the other through the network; batch norm
    sees them one by one.
    workers: processes that read images from files. save_every_s: seconds between checkpoints within an epoch; one is
    always made at its end. sync_bn: batch-norm statistics over all processes. subset: train on so many images.
    """

    accumulate: int = 1
    workers: int = 0
    save_every_s: float = 300.0
    sync_bn: bool = False
    subset: int | None = None


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: mean cross-entropy, errors in percent (top5 None below TOP5_CLASSES classes)."""

    loss: float
    error: float
    top5: float | None
    images: int


@dataclass(frozen=True)
class Progress:
    """Where a training is: ``epoch`` (from 1) of ``epochs``, and ``done`` (0 to 1) of the whole.

    The latest loss and error (percent), and the images a second of this epoch so far. ended: an epoch has just ended,
    and the history is one longer.
    """

    epoch: int
    epochs: int
    done: float
    loss: float | None
    error: float | None
    images_per_s: float | None
    ended: bool = False


@dataclass
class State:
    """What a checkpoint brings back beside the tensors; ``seconds`` and ``step`` are of the epoch under way."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps of the next one that are over
    seconds: float = 0.0
    initial: float | None = None  # error in percent before any training
    best: float | None = None
    best_epoch: int | None = None
    history: list[Epoch] = field(default_factory=list)


class Prepared(nn.Module):
    """A network that takes images as bytes (B, 3, h, w): converted to ``dtype``, normalised and laid out on its device.

    mean, std: of the channels, 0 being black and 1 white.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
                 layout: str) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        spread = torch.tensor(std, dtype=torch.float64).view(1, 3, 1, 1)
        self.scale = (1 / (255 * spread)).to(dtype)
        self.shift = (-torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1) / spread).to(dtype)
        self.format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        # Plain tensors, not buffers, which would be in every checkpoint and go round between processes at every step.
        self.scale, self.shift = fn(self.scale), fn(self.shift)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, images: Tensor) -> Any:
        # The bytes are laid out before they become four times as many.
        x = images.contiguous(memory_format=self.format).to(self.scale.dtype)
        return self.network(torch.addcmul(self.shift, x, self.scale))


class Training:
    """One training of ``network``, which is changed in place; :meth:`run` does it, ``state`` says what it has found.

    network: on ``world.device``, in the recipe's layout, freshly initialised. identity: what a checkpoint must agree
    on, flat; a resumed training refuses any other, field by field. record: how the network was converted, for the
    checkpoints. checkpoints: None to keep none. warn: told what the user should know. stop: asked at every step
    whether to end early, with a checkpoint. teacher: a network, on the device and laid out like ``network``, whose
    outputs on the same images are targets beside the labels (Hinton, Vinyals & Dean, 2015), or alone where ``data`` has
    none; it stays as it is, in eval mode.

    A recipe of 0 epochs trains nothing; :meth:`begin` evaluates the network. ``guesses`` are the classes that the last
    evaluation has found, in the order of this process's share of the test images. Raises UsageError for a batch that
    does not divide or that the data set does not fill.
    """

    def __init__(
        self,
        network: nn.Module,
        data: LabelledData,
        recipe: Recipe,
        world: World,
        *,
        seed: int,
        identity: Json | None = None,
        record: Record | None = None,
        options: Options | None = None,
        checkpoints: Checkpoints | None = None,
        teacher: nn.Module | None = None,
        stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.network, self.data, self.recipe, self.world = network, data, recipe, world
        of_data = {"data_sha256": data.fingerprint, "preprocessing": data.preprocessing.to_json()}
        self.seed, self.identity, self.record = seed, {**(identity or {}), **of_data}, record
        self.options, self.checkpoints = options or Options(), checkpoints
        self.stop, self.warn = stop, warn
        self.numbers = subset_of(data.train_labels, self.options.subset)
        self.steps = check_batch(recipe, self.options, len(self.numbers), world.size) if recipe.epochs else 0
        self.state = State()
        self.guesses = torch.empty(0, dtype=torch.int64)
        self.stopped = False
        self.feed = data.feed(world.device, workers=self.options.workers)
        self.layers = [m for m in network.modules() if isinstance(m, MaskedConv2d)]
        groupings = [layer.grouping() for layer in self.layers]
        self.starts = [None if grouping is None else grouping.cpu() for grouping in groupings]
        self.resumed = 0.0  # the share of the training that an earlier run has done
        if self.options.sync_bn and world.size > 1 and recipe.epochs:
            self.network = network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self._prepare(network, teacher)
        self.losses = torch.zeros(self.steps, device=world.device)

    def _prepare(self, network: nn.Module, teacher: nn.Module | None) -> None:
        """Everything around the network: normalisation, optimiser, data parallelism, compilation."""
        recipe, device = self.recipe, self.world.device
        dtype = torch.float64 if recipe.precision == "fp64" else torch.float32

        def prepared(inner: nn.Module) -> nn.Module:
            return Prepared(inner, self.data.mean, self.data.std, dtype, recipe.layout).to(device)

        self.plain = prepared(network)
        self.teacher: Any = None if teacher is None else prepared(teacher).eval()
        self.autocast_dtype = DTYPES[recipe.precision] if recipe.precision in ("bf16", "fp16") else None
        self.optimiser = torch.optim.SGD(
            parameter_groups(network, recipe.weight_decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.parallel: Any = self.plain
        if self.world.size > 1 and recipe.epochs:
            own = [device] if device.type == "cuda" else None
            # Flags cannot go round by gloo; each process sets its own alike.
            flags = [name for name, buffer in self.plain.named_buffers() if buffer.dtype == torch.bool]
            parallel = nn.parallel.DistributedDataParallel
            parallel._set_params_and_buffers_to_ignore_for_model(self.plain, flags)
            self.parallel = parallel(self.plain, device_ids=own)
        self.algorithms_found = not recipe.compile  # by the layers; those are compiled
        self.train_model: Any = torch.compile(self.parallel) if recipe.compile else self.parallel
        self.eval_model: Any = torch.compile(self.plain) if recipe.compile else self.plain
        if recipe.compile and teacher is not None:
            self.teacher = torch.compile(self.teacher)

    # ------------------------------------------------------------------------------------------------------ the run

    def begin(self) -> Scores | None:
        """Evaluate the network before any training; None where the run was asked to stop. Raises NotFinite."""
        try:
            return self._initial()
        except _AskedToStop:
            self.stopped = True
            return None

    def _initial(self) -> Scores:
        scores = self.evaluate()
        if not math.isfinite(scores.loss):
            raise NotFinite(f"the network's outputs are not finite: {self._where_not_finite()}; check its weights")
        self.state.initial = self._error(scores)
        return scores

    def run(self) -> Iterator[Progress]:
        """Train from the last checkpoint, or from the start, to the end; ``stopped`` says that it was asked to stop.

        What is known of the network before any training is not found out again. Raises NotFinite, ResultFileError
        for a checkpoint of something else, and what the network raises.
        """
        trained = False
        try:
            if not self.resume() and self.state.initial is None:
                self._initial()
            while self.state.epoch < self.recipe.epochs and not self.stopped:
                trained = True
                yield from self._epoch()
                if self.state.epoch < self.recipe.epochs and self._agreed(due=False)[0]:
                    self.stopped = True  # with the checkpoint that the epoch has ended with
        except _AskedToStop:
            self.stopped = True
            if self.state.step:
                self.keep()
        if self.stopped:
            return
        if self.checkpoints is not None and self.world.is_main and trained:
            self.checkpoints.save_final(replace(self._stored(), extra={}), self.state.epoch)
            self._warn_of_problem()

    def _epoch(self) -> Iterator[Progress]:
        state = self.state
        order = self.numbers[epoch_order(len(self.numbers), self.seed, state.epoch)]
        batches = self._shares(order)[state.step * self.options.accumulate :]
        self.train_model.train()
        stream = self.feed.train(batches, self.seed, state.epoch)
        self._wait()
        begin = shown = saved = time.perf_counter()
        before, steps_before = state.seconds, state.step
        with contextlib.closing(stream):  # type: ignore[type-var]  # ends the workers of one that is left early
            while state.step < self.steps:
                self._step(stream)
                now = time.perf_counter()
                state.seconds = before + now - begin
                stop, save = self._agreed(due=now - saved > self.options.save_every_s)
                if stop or save:
                    self._wait()
                    now = time.perf_counter()
                    state.seconds = before + now - begin
                    self.keep()
                    begin += time.perf_counter() - now
                    saved = time.perf_counter()
                    if stop:
                        self.stopped = True
                        return
                if now - shown > SHOW_S:
                    shown = now
                    yield self._progress((state.step - steps_before) / (now - begin) if now > begin else None)
        self._wait()
        state.seconds = before + time.perf_counter() - begin
        yield self._end_epoch()

    def _find_algorithms(self) -> None:
        """Run the network eagerly, a training step and a test batch, so that its layers measure their algorithms.

        While code is compiled they cannot, and take the last ones. Black images will do; nothing is changed.
        """
        if self.algorithms_found:
            return
        self.algorithms_found = True
        share = max(1, self.recipe.batch_size // self.world.size)
        before = [buffer.clone() for buffer in self.plain.buffers()]
        with torch.compiler.set_stance("force_eager"):
            if self.steps:
                shape = (share // self.options.accumulate, 3, *self.data.size)
                images = torch.zeros(shape, dtype=torch.uint8, device=self.world.device)
                self.train_model.train()
                self._loss(images, torch.zeros(len(images), dtype=torch.int64, device=self.world.device))
            self._score([torch.arange(min(share, len(self.data.test_labels)))])
        for buffer, value in zip(self.plain.buffers(), before, strict=True):
            buffer.copy_(value)

    def _step(self, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One step of the optimiser, on one batch."""
        self._find_algorithms()
        state, parts = self.state, self.options.accumulate
        torch.manual_seed(stream_seed("step", self.seed, state.epoch, state.step, self.world.rank))
        number = state.epoch * self.steps + state.step
        lr = self.recipe.lr_at(number, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self._tell_layers(number / (self.recipe.epochs * self.steps))
        total = torch.zeros((), device=self.world.device)
        for part in range(parts):
            images, labels = next(stream)
            last = part == parts - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.parallel.no_sync():
                loss = self._loss(images, labels) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.losses[state.step] = total
        state.step += 1
        look = LOOK_STEPS.get(self.world.device.type, 1) if self.world.size == 1 else AGREE_STEPS
        if state.step % look == 0:
            self._look(state.step - look)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        recipe = self.recipe
        with torch.autocast(self.world.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = self.train_model(images)
        heads = [scores if scores.dtype == torch.float64 else scores.float() for scores in class_scores(output)]
        if self.data.labelled:
            losses = [F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing) for scores in heads]
        else:
            losses = self._divergences(heads, images)
        loss = losses[0]
        for auxiliary in losses[1:]:
            loss = loss + AUXILIARY_WEIGHT * auxiliary
        if self.data.labelled and self.teacher is not None:
            loss = loss + TEACHER_WEIGHT * self._divergences(heads[:1], images)[0]
        if recipe.group_lasso:
            penalties = [penalty for layer in self.layers if (penalty := layer.group_lasso()) is not None]
            loss = loss + recipe.group_lasso * sum(penalties)
        return loss

    def _divergences(self, heads: Sequence[Tensor], images: Tensor) -> list[Tensor]:
        """KL(teacher || network) of the class probabilities of each of the network's heads, a mean over the images.

        Times the square of the temperature, so that its gradient does not depend on that (Hinton et al., section 2.1).
        """
        device = self.world.device.type
        with torch.no_grad(), torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            wanted = class_scores(self.teacher(images))[0]
        found = []
        for scores in heads:
            logs, targets = ((part / TEACHER_TEMPERATURE).log_softmax(1) for part in (scores, wanted.to(scores.dtype)))
            loss = F.kl_div(logs, targets, reduction="batchmean", log_target=True)
            found.append(TEACHER_TEMPERATURE**2 * loss)
        return found

    def _tell_layers(self, fraction: float) -> None:
        for layer in self.layers:
            layer.set_progress(fraction)

    def _end_epoch(self) -> Progress:
        """Evaluate the network, write the epoch down, and keep a checkpoint."""
        state = self.state
        self._look(0)
        self.losses = self._merged_losses()
        self._tell_layers((state.epoch + 1) / self.recipe.epochs)
        begin = time.perf_counter()
        scores = self.evaluate()
        if not math.isfinite(scores.loss):
            self._give_up(self.steps - 1, "test loss")
        error = self._error(scores)
        images = self.steps * self.recipe.batch_size
        state.history.append(
            Epoch(
                epoch=state.epoch + 1,
                lr=self.recipe.lr_at((state.epoch + 1) * self.steps - 1, self.steps),
                train_loss=float(self.losses.double().mean()),
                test_loss=scores.loss if self.data.meaningful else None,
                test_error=error,
                test_error_top5=scores.top5 if self.data.meaningful else None,
                seconds=state.seconds,
                test_seconds=time.perf_counter() - begin,
                images_per_s=images / state.seconds if state.seconds > 0 else None,
                learnt=self._learnt(),
                world_size=self.world.size,
            )
        )
        speed = self.steps / state.seconds if state.seconds > 0 else None
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
        # A network that is still to be pruned is another one than the row is about.
        settled = all(layer.is_settled for layer in self.layers)
        better = settled and error is not None and (state.best is None or error < state.best)
        if better:
            state.best, state.best_epoch = error, state.epoch
        progress = replace(self._progress(speed), epoch=state.epoch, ended=True, loss=float(self.losses[-1]))
        if self.checkpoints is not None and self.world.is_main:
            if better:
                self.checkpoints.save_best(replace(self._stored(), extra={}), state.epoch)
            if state.epoch < self.recipe.epochs:
                self.checkpoints.save(self._stored(), state.epoch, 0)
            self._warn_of_problem()
        return progress

    def _learnt(self) -> dict[str, float] | None:
        """What the layers say of their structure, each by the share of its outputs."""
        sums: dict[str, list[float]] = {}
        for layer, start in zip(self.layers, self.starts, strict=True):
            said = dict(layer.learnt())
            grouping = layer.grouping()
            if grouping is not None and start is not None:
                said["moved"] = float((grouping.cpu() != start).double().mean())
            for name, value in said.items():
                found = sums.setdefault(name, [0.0, 0.0])
                found[0] += value * layer.out_channels
                found[1] += layer.out_channels
        return {name: weighted / outputs for name, (weighted, outputs) in sums.items()} or None

    def _progress(self, steps_per_s: float | None) -> Progress:
        state = self.state
        steps = state.epoch * self.steps + state.step
        return Progress(
            epoch=min(state.epoch + 1, self.recipe.epochs),
            epochs=self.recipe.epochs,
            done=steps / (self.recipe.epochs * self.steps),
            loss=float(self.losses[state.step - 1]) if state.step else None,
            error=state.history[-1].test_error if state.history else state.initial,
            images_per_s=steps_per_s and steps_per_s * self.recipe.batch_size,
        )

    def _shares(self, order: Tensor) -> list[Tensor]:
        """This process's part of every batch of ``order``, cut for accumulation; what fills no batch is left out."""
        rank, size = self.world.rank, self.world.size
        whole = order[: self.steps * self.recipe.batch_size]
        mine = whole.view(self.steps, size, -1)[:, rank]  # (steps, batch / size)
        return list(mine.reshape(self.steps * self.options.accumulate, -1))

    def _agreed(self, *, due: bool) -> tuple[bool, bool]:
        """Whether to stop and whether to save now; several processes ask one another at every tenth step."""
        stop = self.stop()
        if self.world.size == 1:
            return stop, due and self.checkpoints is not None
        if self.state.step % AGREE_STEPS:
            return False, False
        stops, saves = self.world.total([stop, due and self.checkpoints is not None and self.world.is_main])
        return stops > 0, saves > 0

    def estimate(self, budget_s: float = 3.0) -> float:
        """Seconds that an epoch takes, evaluation included, from a few steps of it; the network is changed by them.

        Of a recipe of 0 epochs, what the evaluation takes. A step and a test batch come before the clock runs: in the
        first one libraries set themselves up and compilers compile.
        """
        steps_s = self._step_time(budget_s) * self.steps if self.steps else 0.0
        batch = max(1, self.recipe.batch_size // self.world.size)
        tests = len(self.data.test_labels)
        shown = torch.arange(min(tests, batch))
        self._score([shown])
        start = time.perf_counter()
        self._score([shown])
        return steps_s + (time.perf_counter() - start) * -(-tests // self.world.size) / len(shown)

    def _step_time(self, budget_s: float) -> float:
        batches = self._shares(self.numbers[epoch_order(len(self.numbers), self.seed, 0)])
        parts = self.options.accumulate
        # Several processes must all do the same number of steps.
        most = min(self.steps, 9 if self.world.size == 1 else 4)
        budget_s = budget_s if self.world.size == 1 else math.inf
        self.train_model.train()
        times: list[float] = []
        with contextlib.closing(self.feed.train(batches[: most * parts], self.seed, 0)) as stream:  # type: ignore[type-var]
            for number in range(most):
                start = time.perf_counter()
                self._step(stream)
                self._wait()
                times.append(time.perf_counter() - start)
                if number and sum(times[1:]) > budget_s:
                    break
        self.state = State()
        return statistics.median(times[1:] or times)

    def _wait(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    # ---------------------------------------------------------------------------------------------- the evaluation

    def evaluate(self) -> Scores:
        """Loss and errors on all test images, each counted once: whole numbers are added up over the processes.

        Batch norm runs on the main process's statistics everywhere.
        """
        world, labels = self.world, self.data.test_labels
        world.share_buffers(self.network)
        five = self.data.num_classes >= TOP5_CLASSES
        mine = torch.arange(world.rank, len(labels), world.size)
        # Several processes cannot leave one by one.
        stop = self.stop if world.size == 1 else None
        counted, self.guesses = self._score(mine.split(max(1, self.recipe.batch_size // world.size)), stop)
        images, wrong, missed, loss = world.total(counted)
        if int(images) != len(labels):
            raise BgcbenchError(f"{int(images)} test images were evaluated, and there are {len(labels)}")
        return Scores(loss / images, 100 * wrong / images, 100 * missed / images if five else None, int(images))

    def _score(self, batches: Sequence[Tensor], stop: Callable[[], bool] | None = None) -> tuple[list[float], Tensor]:
        """Of the test images numbered in ``batches``: how many they are, how many are wrong in the first and in five
        guesses, and the sum of their losses; and the first guesses, one an image, on the CPU.

        Raises _AskedToStop where ``stop`` says so.
        """
        self._find_algorithms()
        device = self.world.device
        self.eval_model.eval()
        found = torch.zeros(4, dtype=torch.float64, device=device)
        guesses = [torch.empty(0, dtype=torch.int64, device=device)]
        with torch.no_grad():
            for images, truth in self.feed.test(batches):
                if stop is not None and stop():
                    raise _AskedToStop
                # One batch may be smaller than the others; it is not worth another compilation.
                missing = len(batches[0]) - len(images) if self.recipe.compile else 0
                given = F.pad(images, (0,) * 7 + (missing,)) if missing else images
                with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                    output = self.eval_model(given)
                scores = class_scores(output)[0][: len(truth)].double()
                best = scores.topk(min(5, scores.shape[1]), dim=1).indices
                guesses.append(best[:, 0])
                right = best == truth[:, None]
                found[0] += len(truth)
                found[1] += len(truth) - right[:, 0].sum()
                found[2] += len(truth) - right.sum()
                found[3] += F.cross_entropy(scores, truth, reduction="sum")
        self.eval_model.train()
        counted: list[float] = found.tolist()
        return counted, torch.cat(guesses).cpu()

    def _where_not_finite(self) -> str:
        """The module of the network where numbers stop being finite on this process's first test images."""
        device, first = self.world.device.type, torch.arange(min(self.recipe.batch_size, len(self.data.test_labels)))
        ((images, _),) = self.feed.test([first])

        def run() -> None:
            with torch.autocast(device, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                self.plain(images)

        return first_not_finite(self.network, run) or "on some images only"

    def _error(self, scores: Scores) -> float | None:
        """The error, None where labels are random and an error would say nothing."""
        return scores.error if self.data.meaningful else None

    # ---------------------------------------------------------------------------------- losses that are no numbers

    def _look(self, start: int) -> None:
        """Raise NotFinite, with a diagnosis written, if a loss from step ``start`` on is infinite or no number."""
        recent = self.losses[start : self.state.step]
        bad = (~recent.isfinite()).nonzero()
        first = self.world.least(int(bad[0]) + start if len(bad) else self.steps)
        if first < self.steps:
            self._give_up(first, "loss")

    def _give_up(self, first: int, what: str) -> NoReturn:
        """Raise NotFinite for step ``first`` of this epoch, with a diagnosis written."""
        state = self.state
        number = state.epoch * self.steps + first
        lr = self.recipe.lr_at(number, self.steps)
        where = ""
        if self.checkpoints is not None and self.world.is_main:
            path = self.checkpoints.folder / DIAGNOSIS
            write_diagnosis(path, self._diagnosis(first, lr))
            where = f"; {path.name} beside its checkpoints says more"
        raise NotFinite(
            f"the {what} was no longer finite in epoch {state.epoch + 1}, step {first + 1} of {self.steps} "
            f"(learning rate {lr:.3g}): {self._where_not_finite()}; use a lower --lr or another --precision{where}"
        )

    def _diagnosis(self, step: int, lr: float) -> Json:
        order = self.numbers[epoch_order(len(self.numbers), self.seed, self.state.epoch)]
        batch = self.recipe.batch_size
        state = self.network.state_dict()
        return {
            "epoch": self.state.epoch + 1,
            "step": step + 1,
            "steps": self.steps,
            "lr": lr,
            "losses": [_plain(value) for value in self.losses[max(0, step - 20) : step + 1].tolist()],
            "images": order[step * batch : (step + 1) * batch].tolist(),
            "not_finite": [name for name, v in state.items() if v.is_floating_point() and not v.isfinite().all()],
            "largest": {
                name: _plain(float(v.abs().max())) for name, v in state.items() if v.is_floating_point() and v.numel()
            },
            "identity": self.identity,
        }

    # ---------------------------------------------------------------------------------------------- the checkpoints

    def _merged_losses(self) -> Tensor:
        """The losses of this epoch so far, averaged over the processes."""
        if self.world.size == 1 or not self.steps:
            return self.losses
        summed = self.world.total(self.losses.double().tolist())
        return torch.tensor([value / self.world.size for value in summed], device=self.world.device)

    def keep(self) -> None:
        """A checkpoint of the network as it is, from which ``run`` or :meth:`resume` goes on."""
        if self.checkpoints is None:
            return
        self._look(0)
        self.losses = self._merged_losses()
        if self.world.is_main:
            self.checkpoints.save(self._stored(), self.state.epoch, self.state.step)
            self._warn_of_problem()

    def _stored(self) -> Stored:
        """Everything that the rest of the training depends on."""
        names = {id(parameter): name for name, parameter in self.network.named_parameters()}
        extra = {
            f"momentum.{names[id(parameter)]}": held["momentum_buffer"].detach()
            for parameter, held in self.optimiser.state.items()
            if held.get("momentum_buffer") is not None
        }
        meta = {
            "identity": self.identity,
            "state": msgspec.to_builtins(self.state),
            "scaler": self.scaler.state_dict(),
            "forms": self._algorithms(),
            "choices": autotune.remembered(),
            "world_size": self.world.size,
            "torch": torch.__version__,
        }
        extra |= {f"start.{number}": start for number, start in enumerate(self.starts) if start is not None}
        state = {name: value.detach() for name, value in self.network.state_dict().items()}
        record = None if self.record is None else self.record.to_json()
        return Stored(state, {**extra, "losses": self.losses}, meta, record)

    def _algorithms(self) -> dict[str, str]:
        """The algorithm that each layer was asked to run; what 'auto' has found stands beside it."""
        return {name: m.algorithm for name, m in self.network.named_modules() if isinstance(m, VariantConv2d)}

    def resume(self) -> bool:
        """Take over the newest checkpoint; False where there is none. The main process reads it for all."""
        if self.checkpoints is None:
            return False
        checkpoints = self.checkpoints
        stored = self.world.once(lambda: checkpoints.latest(self.warn))
        if stored is None:
            return False
        where = self.checkpoints.folder
        check_identity(stored.meta["identity"], self.identity, str(where))
        self.state = msgspec.convert(stored.meta["state"], State)
        try:
            self.network.load_state_dict(stored.model)
        except RuntimeError as problem:
            raise ResultFileError(f"{where}: the checkpoint does not fit the network: {problem}") from problem
        adopt_algorithms(self.network, stored.meta["forms"])
        autotune.restore(stored.meta.get("choices", ()))  # what was measured must not change half-way
        self.algorithms_found = not self.recipe.compile
        for name, parameter in self.network.named_parameters():
            if (held := stored.extra.get(f"momentum.{name}")) is not None:
                self.optimiser.state[parameter]["momentum_buffer"] = held.to(parameter.device).clone(
                    memory_format=torch.preserve_format
                )
        self.scaler.load_state_dict(stored.meta["scaler"])
        if self.state.step:
            self.losses = stored.extra["losses"].to(self.world.device)
        self.starts = [stored.extra.get(f"start.{number}", start) for number, start in enumerate(self.starts)]
        if self.steps:
            self.resumed = (self.state.epoch + self.state.step / self.steps) / self.recipe.epochs
        if stored.meta["world_size"] != self.world.size:
            self.warn(
                f"{where}: trained by {stored.meta['world_size']} processes so far, by {self.world.size} from here on"
            )
        return True

    def _warn_of_problem(self) -> None:
        if self.checkpoints is not None and self.checkpoints.problem is not None:
            self.warn(f"{self.checkpoints.problem}; training goes on, and older checkpoints are kept")


# -------------------------------------------------------------------------------------------------------- the pieces


def check_batch(recipe: Recipe, options: Options, images: int, processes: int) -> int:
    """Steps of an epoch of ``images`` images; raises UsageError for a batch that does not divide or is not filled."""
    batch = recipe.batch_size
    check_parts(batch, options.accumulate, processes)
    if images < batch:
        raise UsageError(f"--batch-size {batch} is more than the {images} training images; use a smaller one")
    return images // batch


def subset_of(labels: Tensor, count: int | None) -> Tensor:
    """The numbers of ``count`` training images, ascending: of every class the same share, whatever the seed."""
    everything = torch.arange(len(labels))
    if count is None or count == len(labels):
        return everything
    if not 1 <= count < len(labels):
        raise UsageError(f"--subset {count} must be at most the {len(labels)} training images, and at least 1")
    # Each image's rank in its class over the size of that class: the lowest are an even sample of all classes.
    order = epoch_order(len(labels), 0, 0)
    by_class = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    place = torch.arange(len(labels), dtype=torch.float64) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[by_class] = (place + 0.5) / sizes[labels[by_class]]
    return rank.argsort(stable=True)[:count].sort().values


def check_identity(stored: Json, wanted: Json, name: str) -> None:
    """Raise ResultFileError, naming the first field that differs, unless a checkpoint is of the training wanted."""
    wanted = json.loads(json.dumps(wanted))
    for what in sorted({*stored, *wanted}):
        if stored.get(what) != wanted.get(what):
            raise ResultFileError(
                f"{name} cannot be resumed: its {what} was {stored.get(what)} and is {wanted.get(what)} now; "
                "start a new file with --out"
            )


def adopt_algorithms(network: nn.Module, algorithms: dict[str, str]) -> None:
    """Make each layer run the algorithm that ``algorithms`` names, by module."""
    for name, module in network.named_modules():
        if isinstance(module, VariantConv2d) and name in algorithms:
            module.spec = replace(module.spec, algorithm=algorithms[name])


def write_diagnosis(path: Any, diagnosis: Json) -> None:
    """Write what is known of a loss that is no number; a disk that refuses it must not hide the reason itself."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(diagnosis, indent=1) + "\n").encode())


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
