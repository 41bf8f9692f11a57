"""Carries ``bgcbench plan`` out: costs, losses, the choice, and the proof on images that were never used.

Each stage leaves its rows, and a resumed run begins with those that are there. The choice follows from the rows of
costs and losses alone, so a resumed run makes the same plan.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from bgcbench.conversion.approximability import shape_of
from bgcbench.conversion.convert import convert, save_converted
from bgcbench.conversion.layer_moments import patch_length, positions_an_image
from bgcbench.conversion.lockstep import Stopped
from bgcbench.conversion.record import Converted, counted
from bgcbench.errors import ResultFileError, UsageError
from bgcbench.experiments import approx_network_run
from bgcbench.experiments.base import Run, Session, Step
from bgcbench.experiments.plan import PlanConfig
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.profile_run import on_device
from bgcbench.experiments.transfer import room_to_save
from bgcbench.measure import timing
from bgcbench.measure.batches import Passing
from bgcbench.measure.device import DTYPES, backend_state, describe_failure
from bgcbench.measure.undisturbed import undisturbed
from bgcbench.measure.workload import Cell
from bgcbench.planning.choices import LayerOptions, Problem, Scored, best_families, choices_for
from bgcbench.planning.decision import AGAIN, FELT, PLAIN, Contender, Plan, choose, planned
from bgcbench.planning.execution import Execution
from bgcbench.planning.losses import SENSITIVITY_IMAGES
from bgcbench.planning.plan import (
    DENSE,
    NETWORK_ROUNDS,
    PLAN,
    SCALING_ROUNDS,
    SCALINGS,
    Seen,
    counted_problem,
    decided,
    held_outputs,
    layer_rules,
    losses_of,
    saved_by_its_network,
    score,
    timed,
    tryout,
)
from bgcbench.planning.times import EAGER, interleaved
from bgcbench.results import Document, check_command, check_resumable, write_atomically
from bgcbench.results.rows import Counts, CurvePoint, PlanFacts, PlanParams, PlanRow, Replaced
from bgcbench.specs import HELD_OUT, REFIT, Choice

PLAN_FILE, NETWORK_FILE = "plan.json", "network.pt"
DENSE_KEY = "proof-dense"
READ = 64  # images that are read at a time
QUICKLY = "left out by --quick"
LOOK = 8  # images of a look at how fast the network is
# Operations of solving a layer as a choice, for each s^2 of a patch vector of s numbers: for each output channel, and
# of TLGC's search.
SOLVING, SEARCHING = 12.0, 2.5e4
NO_FAMILY = "no N of it keeps to the budget"
UNSEEN = 3  # of so many images one is never planned on, where there are too few for all that is asked


@dataclass(frozen=True)
class PlannedRow:
    """A row of the plan: its key, what it is about, and the layer and the choice of one that is about these."""

    key: str
    params: PlanParams
    layer: Replaced | None = None
    choice: Choice | None = None


@dataclass
class Prepared:
    """The network, its convolutions with what each may become, and how many images are planned on and compared with."""

    network: approx_network_run.Prepared
    config: PlanConfig
    images: int
    test_images: int

    @property
    def settings(self) -> dict[str, Any]:
        return self.network.settings

    @property
    def layers(self) -> tuple[Replaced, ...]:
        return self.network.layers.chosen

    @property
    def choices(self) -> dict[str, list[Choice]]:
        """By layer, what fits it."""
        config = self.config
        return {layer.name: choices_for(layer, config.variants, config.groups, config.ranks) for layer in self.layers}

    @property
    def bare(self) -> Problem:
        """Every layer with what its choices cost by formula; of the losses nothing is known yet."""
        config = self.config
        return counted_problem(self.layers, config.variants, config.groups, config.ranks)

    def seen(self, stop: Callable[[], bool]) -> Seen:
        """The images that are planned on."""
        batches, config = self.network.batches, self.config
        return Seen(
            batches=list(batches),
            images=self.images * config.calibration_views,
            pictures=batches.pictures,
            memory_bytes=round(config.memory_gib * 2**30),
            seed=row_seed(config.seed, "positions"),
            quick=config.quick,
            stop=stop,
        )

    def unseen(self) -> tuple[list[Tensor], Tensor | None]:
        """Images that nothing was planned on, and their labels where they are the network's classes."""
        images, seed = self.network.batches.images, self.network.batches.seed
        source = images.test_split
        if source is None:
            source, chosen = images, images.order(self.images + self.test_images, seed)[self.images :]
        else:
            chosen = source.order(self.test_images, seed)
        labelled = source.num_classes == self.network.config.spec.classes
        batches = [source.normalised(chosen[start : start + READ]) for start in range(0, len(chosen), READ)]
        return batches, source.labels_of(chosen) if labelled else None

    def rows(self) -> list[PlannedRow]:
        """Of every layer its costs and losses, what it becomes, and the networks that are compared."""
        made = []
        network, stages = self.network, ("cost", "loss")
        about: Any = {"model": self.config.model, "weights": network.loaded.name, "data": network.batches.images.name}
        stage: Any
        for layer, stage in itertools.product(self.layers, stages):
            shape = "x".join(map(str, layer.kernel)) + f" {layer.in_channels} -> {layer.out_channels}"
            for choice in (Choice(), *self.choices[layer.name]):
                reduction = choice.reduction(*shape_of(layer))
                params = PlanParams(
                    stage=stage, variant=choice.variant, groups=reduction, rank=choice.rank, layer=layer.name,
                    shape=shape, **about,
                )  # fmt: skip
                made.append(PlannedRow(f"{stage}-{layer.name}-{choice.key}", params, layer, choice))
        shared: Any = {"variant": "standard", "groups": 1, **about}
        for layer in self.layers:
            params = PlanParams(stage="choice", layer=layer.name, **shared)
            made.append(PlannedRow(f"choice-{layer.name}", params, layer))
        variants = [name for name in self.config.variants if name != "standard"]
        tried = (FELT, PLAIN, *variants, AGAIN)
        for stage, subjects in (
            ("trial", tried if self.config.budget[1] < 1 else ()),
            ("proof", (DENSE, PLAN, *variants)),
        ):
            for subject in subjects:
                params = PlanParams(stage=stage, subject=subject, **shared)
                made.append(PlannedRow(f"{stage}-{subject}", params))
        return made


def prepare(config: PlanConfig) -> Prepared:
    """Build the network, load its weights, open the images and choose the convolutions.

    Raises UsageError for what is not there, for too few images, and for a budget that no choice can meet.
    """
    network = approx_network_run.prepare(config)
    network.config = dataclasses.replace(config, height=network.config.height, width=network.config.width)
    images = network.batches.images
    there, other = len(images), images.test_split
    test = min(config.test_images, there // UNSEEN if other is None else len(other))
    planned_on = min(config.calibration_images, there - test if other is None else there)
    if planned_on < HELD_OUT or test < 1:
        raise UsageError(f"--data {config.data} has {there} images; {HELD_OUT * 2} are needed to plan on and to test")
    network.batches.count, network.batches.batch = planned_on, READ
    prepared = Prepared(network, network.config, planned_on, test)
    kind, budget = config.budget
    if kind in ("params", "macs"):
        choose(prepared.bare, kind, budget, most_variants=config.most_variants)  # raises where it cannot be met
    return prepared


class PlanRun(Run[PlanRow]):
    """One run over a prepared network; ``plan`` is known after the choice."""

    config: PlanConfig
    planned: list[PlannedRow]

    def __init__(
        self,
        prepared: Prepared,
        session: Session,
        *,
        kept: Mapping[str, PlanRow] | None = None,
        facts: PlanFacts | None = None,
        replace: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.session, self.prepared, self.stop = prepared.config, session, prepared, stop
        self.planned = prepared.rows()
        self.known = {key: row for key, row in (kept or {}).items() if row.is_done}
        self.warnings = list(dict.fromkeys(prepared.network.warnings))
        kind, budget = self.config.budget
        asked: Any = {"kind": kind, "asked": budget}
        self.facts = facts or PlanFacts(**asked)
        self.execution = Execution(self.config.mode, self.config.phase)
        self.plan: Plan | None = None
        self._networks: dict[frozenset[tuple[str, Choice]], Converted] = {}
        self._replace = replace

    def make_room(self) -> None:
        if self.config.save is not None:
            room_to_save(Path(self.config.save), [PLAN_FILE, NETWORK_FILE], replace=self._replace)

    @property
    def plan_lines(self) -> list[str]:
        """What will be done, in words."""
        prepared, (kind, budget) = self.prepared, self.config.budget
        asked = f"{kind} {budget:g}" if budget < 1 else "no budget: the whole curve"
        options = sum(len(choices) for choices in prepared.choices.values())
        network = prepared.network
        return [
            f"plan: {len(prepared.layers)} convolutions of {self.config.model} (weights: {network.loaded.name}), "
            f"{options} choices, {asked}; {prepared.images} images to plan on, {prepared.test_images} others to test; "
            f"timed in {self.config.mode}, {self.config.phase}",
            f"roughly {self.estimated_s() / 60:.0f} min, by a look at the device",
            *network.told,
            *(f"  {name}: {', '.join(each.label for each in found)}" for name, found in prepared.choices.items()),
            *(f"  kept: {kept.name} ({kept.reason})" for kept in network.layers.kept),
        ]

    def estimated_s(self) -> float:
        """A rough guess of the run's length: passes over the images, moments and solutions, and what is timed.

        A pass of one image and a product of matrices are timed for it. Moments take some twenty rows for each entry of
        a patch vector of s numbers, 40 s^3 operations, where there are as many.
        """
        config, prepared, device = self.config, self.prepared, self.session.device
        network = prepared.network
        with backend_state("fp32", config.threads):
            model = network.model.to(device).eval()
            image_s = _seconds(partial(outputs_of, model, [torch.randn(LOOK, *network.config.spec.size)])) / LOOK
            square = torch.randn(LOOK * 128, LOOK * 128, dtype=torch.float64)
            rate = 2 * len(square) ** 3 / _seconds(lambda: square @ square)
        variants = [name for name in config.variants if name != "standard"]
        converted = 2 if config.quick else 3 + len(variants)
        put_in = SENSITIVITY_IMAGES // 4 if config.quick else SENSITIVITY_IMAGES
        losses_left = {row.params.layer for row in self._left("loss")}  # others are known, of an earlier run
        images, seconds = prepared.images * config.calibration_views, 0.0
        for layer in prepared.layers:
            size, choices = patch_length(layer), prepared.choices[layer.name]
            rows = images * min(positions_an_image(layer, images), (layer.height or 1) * (layer.width or 1))
            solving = [
                (SEARCHING if choice.variant == "tlgc" else SOLVING * layer.out_channels) * size**2
                for choice in choices
            ]
            moments = 2 * rows * size**2
            if layer.name in losses_left:
                seconds += (moments + sum(solving)) / rate + len(variants) * min(put_in, images // HELD_OUT) * image_s
            seconds += converted * (2 * moments + sum(solving) / max(1, len(solving))) / rate
        seconds += (images * (1 + 2 * converted) + prepared.test_images * (1 + converted)) * image_s
        call_s, there = (3 if self.execution.trains else 1) * config.batch * image_s, len(prepared.layers)
        if config.budget[0] == "time" and self._left("cost"):
            # Layers of one shape are measured once.
            alike = {replace(layer, name="", also=(), calls=None): layer.name for layer in prepared.layers}
            layers = sum(1 + len(prepared.choices[name]) for name in alike.values())
            networks = 1 + (1 if config.quick and config.mode != "eager" else 2) * len(variants)
            seconds += layers * layer_rules(device.type, quick=config.quick).max_time_s
            seconds += networks * NETWORK_ROUNDS * call_s + self.execution.ready_s(layers, networks * there)
        if config.budget[0] == "time" and self.facts.scale is None:
            networks = 2 * SCALINGS.get(config.mode, 1)
            seconds += networks * SCALING_ROUNDS * call_s + self.execution.ready_s(0, networks * there)
        compared = 3 if config.quick else 2 + len(variants)
        return seconds + compared * 10 * call_s + self.execution.ready_s(0, compared * there)

    def take_into(self, document: Document) -> None:
        super().take_into(document)
        document.plan = self.facts

    def run(self) -> Iterator[Step]:
        """Go through the stages, and say after every step what is new."""
        config = self.config
        with backend_state("fp32", config.threads):
            model = self.prepared.network.model.to(self.session.device).eval()
            yield from self._costs(model)
            if self.stop():
                return
            self._check_time()
            yield from self._losses(model)
            if self.stop():
                return
            yield from self._scale(model)
            if self.stop():
                return
            yield from self._try_out(model)
            if self.plan is None:
                return
            yield Step("chosen", save=True)
            yield from self._prove(model)

    # ------------------------------------------------------------------------------------------------ costs and losses

    def _left(self, stage: str) -> list[PlannedRow]:
        return [row for row in self.planned if row.params.stage == stage and row.key not in self.known]

    def _as_timed(self, network: nn.Module) -> nn.Module:
        """``network``, or a copy of it, in the precision and layout of what is timed."""
        if (self.config.precision, self.config.layout) == ("fp32", "nchw"):
            return network
        return on_device(copy.deepcopy(network), self.config, self.session).eval()

    def _example(self) -> tuple[Tensor]:
        """A batch of random images, where the network is, as it is timed."""
        generator = torch.Generator().manual_seed(row_seed(self.config.seed, "timed"))
        shape = (self.config.batch, *self.prepared.network.config.spec.size)
        x = torch.randn(shape, generator=generator).to(self.session.device, DTYPES[self.config.precision])
        return (x.to(memory_format=torch.channels_last) if self.config.layout == "nhwc" else x,)

    def _costs(self, model: nn.Module) -> Iterator[Step]:
        left = self._left("cost")
        if not left:
            return
        seconds: dict[tuple[str, Choice], float | None] = {}
        untimed: Mapping[tuple[str, Choice], str] = {}
        if self.config.budget[0] == "time":
            yield Step(f"measuring {len(left)} choices of {len(self.prepared.layers)} convolutions")
            try:
                with backend_state(self.config.precision, self.config.threads):
                    found = timed(
                        self._as_timed(model), self.prepared.bare, Passing(), self._example(), self.execution,
                        quick=self.config.quick, seed=row_seed(self.config.seed, "times"), stop=self.stop,
                    )  # fmt: skip
            except Stopped:
                return
            seconds = {(each.layer.name, one.choice): one.seconds for each in found.layers for one in each.options}
            untimed = found.untimed
            self.warnings += found.notes
            self.facts = replace(self.facts, rest_s=found.rest_s, factors=dict(found.factors))
        for row in left:
            layer, choice = _of(row)
            params, macs = counted(layer, choice)
            own: Any = {"counts": Counts(params=params, macs=macs), "seconds": seconds.get((layer.name, choice))}
            reason = untimed.get((layer.name, choice))
            self.known[row.key] = PlanRow(row.key, "invalid" if reason else "ok", reason, params=row.params, **own)
        yield Step("costs are known", save=True)

    def _check_time(self) -> None:
        """Raise UsageError for a budget of time that no choice can meet, before losses are measured for it."""
        kind, budget = self.config.budget
        if kind == "time":
            choose(self.problem, kind, budget, most_variants=self.config.most_variants)

    def _losses(self, model: nn.Module) -> Iterator[Step]:
        left = self._left("loss")
        names = {layer.name for layer, _ in map(_of, left)}
        if not names or self.stop():
            return
        yield Step(f"{self.prepared.images} images through {self.config.model}")
        wanted = [each for each in self.prepared.bare.layers if each.layer.name in names]
        scored = score(model, wanted, self.prepared.seen(self.stop))
        for number, options in enumerate(scored, 1):
            by_choice = {each.choice: each for each in options.options}
            for row in left:
                layer, choice = _of(row)
                if layer.name == options.layer.name:
                    self._done(row, loss=by_choice[choice].loss, felt=by_choice[choice].felt)
            yield Step(options.layer.name, number / len(wanted), save=True)

    def _done(self, row: PlannedRow, **found: Any) -> None:
        self.known[row.key] = PlanRow(row.key, "ok", None, params=row.params, **found)

    # ---------------------------------------------------------------------------------------------------------- choice

    @property
    def problem(self) -> Problem:
        """Every layer with what is known of its choices; what is not known of its losses is 0."""
        made: dict[str, list[Scored]] = {}
        for row in (row for row in self.planned if row.params.stage == "cost"):
            layer, choice = _of(row)
            cost, loss = self.known[row.key], self.known.get(f"loss-{layer.name}-{choice.key}")
            if cost.counts is None or (self.facts.kind == "time" and cost.seconds is None):
                continue  # it could not be measured
            lost = (0.0, 0.0) if loss is None else (loss.loss or 0.0, loss.felt or 0.0)
            made.setdefault(layer.name, []).append(
                Scored(choice, cost.counts.params, cost.counts.macs, *lost, cost.seconds)
            )
        layers = tuple(LayerOptions(layer, tuple(made[layer.name])) for layer in self.prepared.layers)
        found = Problem(layers, rest_s=self.facts.rest_s, factors=self.facts.factors).solved_anew()
        return found if self.facts.scale is None else found.saving(self.facts.scale)

    def _scale(self, model: nn.Module) -> Iterator[Step]:
        """Measure the network of the best plan for a budget of time, and take layers to save what it saves."""
        config, (kind, budget) = self.config, self.config.budget
        if kind != "time" or budget == 1 or self.facts.scale is not None:
            return
        yield Step("measuring the plan's network")
        try:
            with backend_state(config.precision, config.threads):
                scale, note = saved_by_its_network(
                    self._as_timed(model), self.problem, budget, Passing(), self._example(), self.execution,
                    most_variants=config.most_variants, quick=config.quick, seed=row_seed(config.seed, "scale"),
                    stop=self.stop,
                )  # fmt: skip
        except Stopped:
            return
        self.warnings += filter(None, [note])
        self.facts = replace(self.facts, scale=scale)
        yield Step(f"it saves {scale:.3g} times what was predicted", save=True)

    def _try_out(self, model: nn.Module) -> Iterator[Step]:
        """Convert the network as each contender, and choose."""
        problem, (kind, budget), most = self.problem, self.config.budget, self.config.most_variants
        if budget == 1:
            self._choose(planned(problem, kind, budget, choose(problem, kind, budget, most_variants=most)))
            return
        rows = {row.params.subject: row for row in self.planned if row.params.stage == "trial"}
        seen = self.prepared.seen(self.stop)
        original = held_outputs(model, seen)

        def converted(contender: Contender) -> tuple[float, Mapping[str, float]]:
            row, choices = rows[contender.name], contender.choices
            if (known := self.known.get(row.key)) is not None and known.logit_error is not None:
                return known.logit_error, self.facts.real
            row = dataclasses.replace(row, params=replace(row.params, subject=contender.label))
            done = self._converted(model, row, choices, seen)
            if done is None:
                return math.inf, {}
            error, lost = original.error(done.model), losses_of(done.record)
            if contender.name == FELT:
                self.facts = replace(self.facts, real=lost)
            held_out = sum(len(part.numbers) for part in original.parts)
            self._done(row, logit_error=error, test_images=held_out, **ratios(problem, choices))
            return error, lost

        tried: dict[str, tuple[Contender, float]] = {}
        try:
            for each, error in tryout(problem, kind, budget, converted, most, quick=self.config.quick):
                tried[each.name] = each, error
                yield Step(f"tried out: {each.label}", len(tried) / len(rows), save=True)
        except Stopped:
            return
        for name, row in rows.items():
            if name not in tried and row.key not in self.known:
                reason = "the same as another" if name == AGAIN else NO_FAMILY
                self._leave_out(row, QUICKLY if self.config.quick else reason)
        self._choose(decided(problem, kind, budget, tried))

    def _leave_out(self, row: PlannedRow, reason: str) -> None:
        self.known[row.key] = PlanRow(row.key, "invalid", reason, params=row.params)

    def _choose(self, plan: Plan) -> None:
        self.plan = plan
        found = {layer.name: layer for layer in self.plan.layers}
        for row in (row for row in self.planned if row.params.stage == "choice"):
            layer = found[row.params.layer or ""]
            chosen, choice = layer.chosen, layer.chosen.choice
            shape = shape_of(next(each for each in self.prepared.layers if each.name == layer.name))
            params = replace(
                row.params, variant=choice.variant, groups=choice.reduction(*shape), rank=choice.rank, shape=layer.shape
            )
            self.known[row.key] = PlanRow(
                row.key, "ok", None, params=params, counts=Counts(params=chosen.params, macs=chosen.macs),
                params_ratio=chosen.params / layer.dense.params, macs_ratio=chosen.macs / layer.dense.macs,
                seconds=chosen.seconds, loss=chosen.loss, felt=chosen.felt,
                time_ratio=chosen.seconds / layer.dense.seconds if chosen.seconds and layer.dense.seconds else None,
                better=layer.better.choice.label if layer.better else None, better_cost=layer.better_cost,
            )  # fmt: skip
        self.facts = replace(
            self.facts,
            predicted=self.plan.cost,
            loss=self.plan.loss,
            by=self.plan.by,
            choices={name: choice.to_json() for name, choice in self.plan.choices.items()},
            curve=tuple(CurvePoint(cost=point.cost, loss=point.loss) for point in self.plan.curve),
        )
        if self.config.save is not None:
            self._save(PLAN_FILE, self.plan.save)

    def _save(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of --save; a disk that refuses it costs nothing else."""
        path = Path(self.config.save or "") / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as problem:
            self.warnings.append(f"--save {path} could not be written ({problem.strerror or problem}); the run goes on")

    # ----------------------------------------------------------------------------------------------------------- proof

    def _prove(self, model: nn.Module) -> Iterator[Step]:
        left = [row for row in self._left("proof") if row.params.subject != DENSE]
        if self.plan is None or not left:
            return
        problem, (kind, budget) = self.problem, self.config.budget
        families = best_families(problem, kind, budget, quick=self.config.quick)
        seen = self.prepared.seen(self.stop)
        unseen, labels = self.prepared.unseen()
        original = outputs_of(model, unseen)
        networks: dict[str, nn.Module] = {DENSE_KEY: model}
        shared = {"test_images": self.prepared.test_images}
        for number, row in enumerate(left):
            subject = row.params.subject or ""
            if subject != PLAN and subject not in families:
                self._leave_out(row, QUICKLY if self.config.quick else NO_FAMILY)
                continue
            label, choices = (PLAN, self.plan.choices) if subject == PLAN else families[subject]
            yield Step(f"converting as {label}", number / len(left))
            row = dataclasses.replace(row, params=replace(row.params, subject=label))  # noqa: PLW2901
            try:
                done = self._converted(model, row, choices, seen)
            except Stopped:
                return
            if done is None:
                continue
            networks[row.key] = done.model
            if subject == PLAN and self.config.save is not None:
                self._save(NETWORK_FILE, partial(_write_network, done))
            found: Any = {
                **ratios(problem, choices),
                **compare(original, outputs_of(done.model, unseen), labels),
                **shared,
            }
            # Not done before it is timed: a run that is stopped here must not go on without times.
            self.known[row.key] = PlanRow(row.key, "interrupted", "not timed yet", params=row.params, **found)
        dense = next(row for row in self.planned if row.key == DENSE_KEY)
        same = dict.fromkeys(("params_ratio", "macs_ratio", "time_ratio"), 1.0)
        self._done(dense, **same, **compare(original, original, labels), **shared)
        yield Step("measuring the networks", save=True)
        self._time(networks)
        yield Step("proved", 1.0, save=True)

    def _converted(
        self, model: nn.Module, row: PlannedRow, choices: Mapping[str, Choice], seen: Seen
    ) -> Converted | None:
        """The network as ``choices``, converted once in a run; None, with the row saying why, where it cannot be."""
        key = frozenset(choices.items())
        if key in self._networks:
            return self._networks[key]
        try:
            done = convert(
                model,
                plan=choices,
                init=REFIT,
                calibration=seen.batches,
                calibration_images=seen.images,
                calibration_pictures=seen.pictures,
                example_input=self.prepared.network.config.spec.size,
                seed=seen.seed,
                stop=self.stop,
            )
        except Stopped:
            raise
        except Exception as problem:  # noqa: BLE001 - whatever it is, the others are worth having
            failure = describe_failure(problem, self.session.device)
            self.known[row.key] = PlanRow(row.key, failure.status, failure.reason, params=row.params)
            return None
        self.warnings += [f"{row.params.subject}: {note}" for note in done.record.notes]
        self._networks[key] = done
        return done

    def _ready(self, network: nn.Module, example: tuple[Tensor]) -> Cell:
        return self.execution.network(self.execution.own(self._as_timed(network)), Passing(), example)

    def _time(self, networks: Mapping[str, nn.Module]) -> None:
        """Measure the networks in turn; their rows are done then, those that could not be measured without a time."""
        example, execution, device = self._example(), self.execution, self.session.device
        makers = {name: partial(self._ready, network, example) for name, network in networks.items()}
        rules = timing.Rules.for_device(device.type, quick=self.config.quick, max_time_s=None)
        rules = dataclasses.replace(rules, min_rounds=max(rules.min_rounds, NETWORK_ROUNDS))
        precise = backend_state(self.config.precision, self.config.threads)
        with undisturbed(self.prepared.network.model), precise, execution.state:
            measured = interleaved(makers, device, rules, seed=row_seed(self.config.seed, "proof"), stop=self.stop)
        found = measured.times
        self.warnings += [f"{name} could not be timed: {why}" for name, why in measured.failures.items()]
        if self.stop():
            return
        for key in networks:
            row = replace(self.known[key], status="ok", reason=None)
            if key in found and DENSE_KEY in found:
                ratio, ends = found[key].ratio_to(found[DENSE_KEY])
                times = {"seconds": found[key].median_s, "time_ratio": ratio, "time_ratio_ci95": ends}
                row = replace(row, **times)
            self.known[key] = row
        plan = self.known.get("proof-plan")
        if plan is not None:
            field = "logit_error" if self.facts.kind == "loss" else f"{self.facts.kind}_ratio"
            self.facts = replace(self.facts, measured=getattr(plan, field))


def measured(document: Document, name: str, run: PlanRun) -> None:
    """Give ``run`` the costs and losses that ``document``, file ``name``, has of the same network on the same images.

    Times that were taken in another way are left out, with a warning. Raises ResultFileError for a file of anything
    else, or of another machine.
    """
    check_command(document, "plan", name)
    config, conditions = run.config, run.session.conditions
    # What a file does not have came later, and does by default what was done without it.
    there, asked = {"mode": EAGER.mode, "phase": EAGER.phase} | document.config, config.to_json()
    differs = [(field, there.get(field), value) for field, value in asked.items() if there.get(field) != value]
    for field, was, value in differs:
        if field not in (*config.AFTERWARDS, *config.OF_TIMES):
            raise ResultFileError(
                f"{name} has other costs and losses: its {field} is {was}, and {value} is asked for; leave --measured "
                "out"
            )
    of_times = {field: getattr(document.settings, field) for field in ("precision", "layout", "tf32", "runtime")}
    check_resumable(document, replace(conditions, **of_times), run.session.environment, name)
    facts, by_time = document.plan or PlanFacts(kind="params", asked=1), config.budget[0] == "time"
    others = [f"{field} is {was}, not {value}" for field, was, value in differs if field in config.OF_TIMES]
    if document.settings.runtime != conditions.runtime and not others:
        others = [f"runtime is {document.settings.runtime}, not {conditions.runtime}"]
    has_times = by_time and facts.kind == "time"
    if has_times and others:
        run.warnings.append(f"--measured {name}: its {', its '.join(others)}, so that times are measured anew")
    takes_times = has_times and not others
    keys = {row.key for row in run.planned}
    for row in document.results:
        fresh = row.params.stage == "cost" and by_time and not takes_times
        if row.params.stage in ("cost", "loss") and row.key in keys and row.is_done and not fresh:
            run.known.setdefault(row.key, row)
    if takes_times:
        run.facts = replace(run.facts, rest_s=facts.rest_s, factors=facts.factors)


def _seconds(call: Callable[[], object]) -> float:
    """How long a call takes at best, of three after a first one."""
    call()
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)


def _of(row: PlannedRow) -> tuple[Replaced, Choice]:
    """The layer and the choice that a row of costs or losses is about."""
    if row.layer is None or row.choice is None:
        raise ValueError(f"{row.key} is about no choice")
    return row.layer, row.choice


def _write_network(done: Converted, path: Path) -> None:
    buffer = io.BytesIO()
    save_converted(done, buffer)
    write_atomically(path, buffer.getvalue())


def ratios(problem: Problem, choices: Mapping[str, Choice]) -> dict[str, float]:
    """Of all convolutions together, to what they are."""
    return {f"{kind}_ratio": problem.share(choices, kind) for kind in ("params", "macs")}


@torch.no_grad()
def outputs_of(network: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The class scores of all images, (images, classes) in float64."""
    device = next(network.parameters()).device
    with undisturbed(network):
        return torch.cat([network(batch.to(device)).double().cpu() for batch in batches])


def compare(original: Tensor, other: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """How ``other`` class scores (B, classes) compare with the original ones, and with ``labels`` (B,).

    error: percent of images whose first guess is wrong, where there are labels. agreement, top5: percent of images on
    which the original's first guess is the first, or among the first five. kl:
    the mean of KL(original || other) in nats. logit_error: sum |z - z'|^2 / sum |z - mean z|^2.
    """
    first, log = original.argmax(1), original.log_softmax(1)
    five = other.topk(min(5, other.shape[1])).indices
    variance = float((original - original.mean(0)).square().sum())
    wrong = {} if labels is None else {"error": 100 * float((other.argmax(1) != labels).double().mean())}
    return wrong | {
        "agreement": 100 * float((first == other.argmax(1)).double().mean()),
        "top5": 100 * float((first[:, None] == five).any(1).double().mean()),
        "kl": float((log.exp() * (log - other.log_softmax(1))).sum(1).mean()),
        "logit_error": float((original - other).square().sum()) / variance if variance > 0 else 0.0,
    }
