"""Carries ``bgcbench plan`` out: costs, losses, the choice, and the proof on images that were never used.

Each stage leaves its rows, and a resumed run begins with those that are there. The choice follows from the rows of
costs and losses alone, so a resumed run makes the same plan.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from bgcbench.conversion.approximability import shape_of
from bgcbench.conversion.convert import convert, save_converted
from bgcbench.conversion.lockstep import Stopped
from bgcbench.errors import UsageError
from bgcbench.experiments import approx_network_run
from bgcbench.experiments.approx_run import Step
from bgcbench.experiments.base import Run
from bgcbench.experiments.plan import PlanConfig
from bgcbench.experiments.profile import row_seed
from bgcbench.experiments.session import Session
from bgcbench.experiments.transfer import room_to_save
from bgcbench.measure import timing
from bgcbench.measure.allocator import memory_state
from bgcbench.measure.batches import Passing
from bgcbench.measure.device import backend_state, describe_failure
from bgcbench.measure.undisturbed import undisturbed
from bgcbench.planning.plan import LayerOptions, Plan, Problem, Scored, choices_for, choose, counted, score, timed
from bgcbench.planning.times import interleaved
from bgcbench.results import Document, write_atomically
from bgcbench.results.rows import Counts, CurvePoint, PlanFacts, PlanParams, PlanRow, Replaced
from bgcbench.specs import HELD_OUT, Choice

PLAN_FILE, NETWORK_FILE = "plan.json", "network.pt"
DENSE, PLAN = "dense", "plan"  # subjects of a proof, besides the variants
READ = 64  # images that are read at a time
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
        for subject in (DENSE, PLAN, *(name for name in self.config.variants if name != "standard")):
            params = PlanParams(stage="proof", subject=subject, **shared)
            made.append(PlannedRow(f"proof-{subject}", params))
        return made


def prepare(config: PlanConfig) -> Prepared:
    """Build the network, load its weights, open the images and choose the convolutions.

    Raises UsageError for what is not there, for too few images, and for a budget that no choice can meet.
    """
    network = approx_network_run.prepare(config)
    network.config = dataclasses.replace(config, height=network.config.height, width=network.config.width)
    there = len(network.batches.images)
    test = min(config.test_images, there // UNSEEN)
    planned_on = min(config.calibration_images, there - test)
    if planned_on < HELD_OUT or test < 1:
        raise UsageError(f"--data {config.data} has {there} images; {HELD_OUT * 2} are needed to plan on and to test")
    network.batches.count, network.batches.batch = planned_on, READ
    prepared = Prepared(network, network.config, planned_on, test)
    kind, budget = config.budget
    if kind in ("params", "macs"):
        options = [_counted(layer, prepared.choices[layer.name]) for layer in prepared.layers]
        choose(options, kind, budget, most_variants=config.most_variants)  # raises where it cannot be met
    return prepared


def _counted(layer: Replaced, choices: Sequence[Choice]) -> LayerOptions:
    """A layer with what its choices cost by formula; of the losses nothing is known yet."""
    options = (Scored(choice, *counted(layer, choice), 0.0, 0.0) for choice in (Choice(), *choices))
    return LayerOptions(layer, tuple(options))


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
        self.plan: Plan | None = None
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
            f"{options} choices, {asked}; {prepared.images} images to plan on, {prepared.test_images} others to test",
            *network.told,
            *(f"  {name}: {', '.join(each.label for each in found)}" for name, found in prepared.choices.items()),
            *(f"  kept: {kept.name} ({kept.reason})" for kept in network.layers.kept),
        ]

    def take_into(self, document: Document) -> None:
        super().take_into(document)
        document.plan = self.facts

    def run(self) -> Iterator[Step]:
        """Go through the stages, and say after every step what is new."""
        config = self.config
        with backend_state("fp32", config.threads):
            model = self.prepared.network.model.to(self.session.device).eval()
            yield from self._costs(model)
            yield from self._losses(model)
            if self.stop():
                return
            self._choose()
            yield Step("chosen", save=True)
            yield from self._prove(model)

    # ------------------------------------------------------------------------------------------------ costs and losses

    def _left(self, stage: str) -> list[PlannedRow]:
        return [row for row in self.planned if row.params.stage == stage and row.key not in self.known]

    def _example(self) -> tuple[Tensor]:
        """A batch of random images, where the network is."""
        generator = torch.Generator().manual_seed(row_seed(self.config.seed, "timed"))
        shape = (self.config.batch, *self.prepared.network.config.spec.size)
        return (torch.randn(shape, generator=generator).to(self.session.device),)

    def _costs(self, model: nn.Module) -> Iterator[Step]:
        left = self._left("cost")
        if not left:
            return
        seconds: dict[tuple[str, Choice], float | None] = {}
        if self.config.budget[0] == "time":
            yield Step(f"measuring {len(left)} choices of {len(self.prepared.layers)} convolutions")
            bare = Problem(tuple(_counted(layer, self.prepared.choices[layer.name]) for layer in self.prepared.layers))
            try:
                found = timed(
                    model, bare, Passing(), self._example(), quick=self.config.quick,
                    seed=row_seed(self.config.seed, "times"), stop=self.stop,
                )  # fmt: skip
            except Stopped:
                return
            seconds = {(each.layer.name, one.choice): one.seconds for each in found.layers for one in each.options}
            facts = {"rest_s": found.rest_s, "factors": dict(found.factors)}
            self.facts = msgspec.structs.replace(self.facts, **facts)
        for row in left:
            layer, choice = _of(row)
            params, macs = counted(layer, choice)
            self._done(row, counts=Counts(params=params, macs=macs), seconds=seconds.get((layer.name, choice)))
        yield Step("costs are known", save=True)

    def _losses(self, model: nn.Module) -> Iterator[Step]:
        left = self._left("loss")
        names = {layer.name for layer, _ in map(_of, left)}
        layers = [layer for layer in self.prepared.layers if layer.name in names]
        if not layers or self.stop():
            return
        network, config = self.prepared.network, self.config
        yield Step(f"{self.prepared.images} images through {config.model}")
        scored = score(
            model,
            layers,
            self.prepared.choices,
            list(network.batches),
            images=self.prepared.images * config.calibration_views,
            passing=Passing(),
            pictures=network.batches.pictures,
            memory_bytes=round(config.memory_gib * 2**30),
            seed=row_seed(config.seed, "positions"),
            stop=self.stop,
        )
        for number, options in enumerate(scored, 1):
            by_choice = {each.choice: each for each in options.options}
            for row in left:
                layer, choice = _of(row)
                if layer.name == options.layer.name:
                    self._done(row, loss=by_choice[choice].loss, felt=by_choice[choice].felt)
            yield Step(options.layer.name, number / len(layers), save=True)

    def _done(self, row: PlannedRow, **found: Any) -> None:
        self.known[row.key] = PlanRow(row.key, "ok", None, params=row.params, **found)

    # ---------------------------------------------------------------------------------------------------------- choice

    def options(self) -> list[LayerOptions]:
        """Every layer with what is known of its choices."""
        made: dict[str, list[Scored]] = {}
        for row in (row for row in self.planned if row.params.stage == "cost"):
            layer, choice = _of(row)
            cost, loss = self.known[row.key], self.known[f"loss-{layer.name}-{choice.key}"]
            if cost.counts is None or (self.facts.kind == "time" and cost.seconds is None):
                continue  # it could not be measured
            made.setdefault(layer.name, []).append(
                Scored(choice, cost.counts.params, cost.counts.macs, loss.loss or 0.0, loss.felt or 0.0, cost.seconds)
            )
        return [LayerOptions(layer, tuple(made[layer.name])) for layer in self.prepared.layers]

    def _choose(self) -> None:
        kind, budget = self.config.budget
        self.plan = choose(
            self.options(), kind, budget, most_variants=self.config.most_variants, rest=self.facts.rest_s
        )
        found = {layer.name: layer for layer in self.plan.layers}
        for row in (row for row in self.planned if row.params.stage == "choice"):
            layer = found[row.params.layer or ""]
            chosen, choice = layer.chosen, layer.chosen.choice
            shape = shape_of(next(each for each in self.prepared.layers if each.name == layer.name))
            params = msgspec.structs.replace(
                row.params, variant=choice.variant, groups=choice.reduction(*shape), rank=choice.rank, shape=layer.shape
            )
            self.known[row.key] = PlanRow(
                row.key, "ok", None, params=params, counts=Counts(params=chosen.params, macs=chosen.macs),
                params_ratio=chosen.params / layer.dense.params, macs_ratio=chosen.macs / layer.dense.macs,
                seconds=chosen.seconds, loss=chosen.loss, felt=chosen.felt,
                time_ratio=chosen.seconds / layer.dense.seconds if chosen.seconds and layer.dense.seconds else None,
                better=layer.better.choice.label if layer.better else None,
            )  # fmt: skip
        self.facts = msgspec.structs.replace(
            self.facts,
            predicted=self.plan.cost,
            loss=self.plan.loss,
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

    def uniform(self, variant: str) -> dict[str, Choice] | None:
        """The most costly choice of ``variant`` for all layers that it fits which keeps the budget; None for none."""
        options, (kind, budget) = self.options(), self.config.budget
        cost_kind = "macs" if kind == "loss" else kind
        whole = self.facts.rest_s + sum(each.dense.cost(cost_kind) for each in options)
        best: tuple[float, dict[str, Choice]] | None = None
        for choice in dict.fromkeys(one.choice for each in options for one in each.options if not one.choice.is_dense):
            if choice.variant != variant:
                continue
            chosen = {
                each.layer.name: next((o for o in each.options if o.choice == choice), each.dense) for each in options
            }
            cost = (self.facts.rest_s + sum(each.cost(cost_kind) for each in chosen.values())) / whole
            felt = sum(each.felt for each in chosen.values())
            keeps = felt <= budget if kind == "loss" else cost <= budget
            rank = -cost if kind == "loss" else cost  # of a budget of loss the cheapest, else the one that loses least
            if keeps and (best is None or rank > best[0]):
                best = rank, {name: each.choice for name, each in chosen.items()}
        return None if best is None else best[1]

    # ----------------------------------------------------------------------------------------------------------- proof

    def _prove(self, model: nn.Module) -> Iterator[Step]:
        left = [row for row in self._left("proof") if row.params.subject != DENSE]
        if self.plan is None or not left:
            return
        seen = list(self.prepared.network.batches)
        unseen = self._unseen()
        original = outputs_of(model, unseen)
        networks: dict[str, nn.Module] = {DENSE: model}
        for number, row in enumerate(left):
            if self.stop():
                return
            subject = row.params.subject or ""
            choices = self.plan.choices if subject == PLAN else self.uniform(subject)
            if choices is None:
                self.known[row.key] = PlanRow(row.key, "invalid", "no N of it keeps to the budget", params=row.params)
                continue
            yield Step(f"converting as {subject}", number / len(left))
            try:
                network = self._converted(model, subject, choices, seen)
            except Stopped:
                return
            except Exception as problem:  # noqa: BLE001 - whatever it is, the others are worth having
                failure = describe_failure(problem, self.session.device)
                self.known[row.key] = PlanRow(row.key, failure.status, failure.reason, params=row.params)
                continue
            networks[subject] = network
            compared = compare(original, outputs_of(network, unseen))
            found: Any = {**self._ratios(choices), **compared, "test_images": self.prepared.test_images}
            # Not done before it is timed: a run that is stopped here must not go on without times.
            params = _named(row, choices).params
            self.known[row.key] = PlanRow(row.key, "interrupted", "not timed yet", params=params, **found)
        dense = next(row for row in self.planned if row.key == "proof-dense")
        ratios = dict.fromkeys(("params_ratio", "macs_ratio", "time_ratio"), 1.0)
        self._done(dense, **ratios, **compare(original, original), test_images=self.prepared.test_images)
        yield Step("measuring the networks", save=True)
        self._time(networks)
        yield Step("proved", 1.0, save=True)

    def _unseen(self) -> list[Tensor]:
        """Images that nothing was planned on."""
        batches, test = self.prepared.network.batches, self.prepared.test_images
        every = batches.images.batches(self.prepared.images + test, batches.batch, batches.seed)
        return list(torch.cat(list(every))[self.prepared.images :].split(batches.batch))

    def _converted(
        self, model: nn.Module, subject: str, choices: Mapping[str, Choice], seen: list[Tensor]
    ) -> nn.Module:
        config, network = self.config, self.prepared.network
        if all(choice.is_dense for choice in choices.values()):
            return model
        converted = convert(
            model,
            plan=choices,
            init="calibrated",
            calibration=seen,
            calibration_images=self.prepared.images * config.calibration_views,
            calibration_pictures=network.batches.pictures,
            example_input=network.config.spec.size,
            seed=row_seed(config.seed, "positions"),
            stop=self.stop,
        )
        self.warnings += [f"{subject}: {note}" for note in converted.record.notes]
        if subject == PLAN and config.save is not None:
            buffer = io.BytesIO()
            save_converted(converted, buffer)
            self._save(NETWORK_FILE, lambda path: write_atomically(path, buffer.getvalue()))
        return converted.model

    def _ratios(self, choices: Mapping[str, Choice]) -> dict[str, float]:
        """Of all convolutions together, to what they are."""
        sums = {"params": [0.0, 0.0], "macs": [0.0, 0.0]}
        for layer in self.prepared.layers:
            after, before = counted(layer, choices[layer.name]), counted(layer, Choice())
            for kind, own, dense in zip(sums, after, before, strict=True):
                sums[kind][0] += own
                sums[kind][1] += dense
        return {f"{kind}_ratio": own / dense for kind, (own, dense) in sums.items()}

    def _time(self, networks: Mapping[str, nn.Module]) -> None:
        """Measure the networks in turn; their rows are done then, those that could not be measured without a time."""
        example = self._example()
        calls = {name: partial(network, *example) for name, network in networks.items()}
        device = self.session.device
        rules = timing.Rules.for_device(device.type, quick=self.config.quick, max_time_s=None)
        rules = dataclasses.replace(rules, min_rounds=6)
        kept = memory_state("kept" if device.type == "cpu" else None)
        with undisturbed(self.prepared.network.model), kept:
            found = interleaved(calls, device, rules, seed=row_seed(self.config.seed, "proof"), stop=self.stop)
        if self.stop():
            return
        for subject in networks:
            row = msgspec.structs.replace(self.known[f"proof-{subject}"], status="ok", reason=None)
            if subject in found and DENSE in found:
                ratio, ends = found[subject].ratio_to(found[DENSE])
                times = {"seconds": found[subject].median_s, "time_ratio": ratio, "time_ratio_ci95": ends}
                row = msgspec.structs.replace(row, **times)
            self.known[row.key] = row
        plan = self.known.get("proof-plan")
        if plan is not None:
            field = "logit_error" if self.facts.kind == "loss" else f"{self.facts.kind}_ratio"
            self.facts = msgspec.structs.replace(self.facts, measured=getattr(plan, field))


def _of(row: PlannedRow) -> tuple[Replaced, Choice]:
    """The layer and the choice that a row of costs or losses is about."""
    if row.layer is None or row.choice is None:
        raise ValueError(f"{row.key} is about no choice")
    return row.layer, row.choice


def _named(row: PlannedRow, choices: Mapping[str, Choice]) -> PlannedRow:
    """``row`` of a uniform network with its variant and N."""
    used = {choice for choice in choices.values() if not choice.is_dense}
    if row.params.subject == PLAN or len(used) != 1:
        return row
    choice = used.pop()
    params = msgspec.structs.replace(row.params, variant=choice.variant, groups=choice.groups, rank=choice.rank)
    return dataclasses.replace(row, params=params)


@torch.no_grad()
def outputs_of(network: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The class scores of all images, (images, classes) in float64."""
    device = next(network.parameters()).device
    with undisturbed(network):
        return torch.cat([network(batch.to(device)).double().cpu() for batch in batches])


def compare(original: Tensor, other: Tensor) -> dict[str, float]:
    """How ``other`` class scores (B, classes) compare with the original ones.

    agreement, top5: percent of images on which the original's first guess is the first, or among the first five. kl:
    the mean of KL(original || other) in nats. logit_error: sum |z - z'|^2 / sum |z - mean z|^2.
    """
    first, log = original.argmax(1), original.log_softmax(1)
    five = other.topk(min(5, other.shape[1])).indices
    variance = float((original - original.mean(0)).square().sum())
    return {
        "agreement": 100 * float((first == other.argmax(1)).double().mean()),
        "top5": 100 * float((first[:, None] == five).any(1).double().mean()),
        "kl": float((log.exp() * (log - other.log_softmax(1))).sum(1).mean()),
        "logit_error": float((original - other).square().sum()) / variance if variance > 0 else 0.0,
    }
