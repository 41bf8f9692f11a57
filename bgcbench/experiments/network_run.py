"""The plan behind ``bgcbench profile --model``: the network's rows, and what each of them builds and must cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bgcbench.conversion.convert import convert
from bgcbench.conversion.record import Converted, replay
from bgcbench.conversion.selection import Indivisible
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import ShapeError, UsageError
from bgcbench.experiments.base import Session
from bgcbench.experiments.config import ConvertedNetwork, refuse_misfits, shared_fields
from bgcbench.experiments.images import sized, traced
from bgcbench.experiments.profile import (
    NetworkConfig,
    PlannedRow,
    ProfileConfig,
    Wanted,
    planned_layer,
    row_seed,
    unmeasured,
    wanted_of,
    wanted_rows,
)
from bgcbench.experiments.profile_run import ProfileRun, Subject, on_device, open_session
from bgcbench.measure.counts import CallWork, count
from bgcbench.measure.trace import Call, Trace, trace
from bgcbench.measure.workload import Like, NetworkWorkload, Workload
from bgcbench.models import build_empty, build_model
from bgcbench.models.own import class_count
from bgcbench.results import Document, new_document
from bgcbench.results.rows import CellKey, Counts, DistinctLayer, Memory, Record
from bgcbench.specs import PRECISIONS, Choice, ConvSpec, is_own

PASSES = {"fwd": 1, "train_step": 3}  # convolution-sized passes: y; and dx and dW


@dataclass(frozen=True)
class NetworkPlan:
    """The rows of a run, and what there is to say before it; config: with the network's own size."""

    config: NetworkConfig
    rows: list[PlannedRow]
    notes: list[str]

    def add_network(self, wanted: Wanted, subject: NetworkSubject) -> None:
        """The network as ``wanted``."""
        model, where = self.config.model, self.config.where
        what = f"{model}-{wanted.choice.key}-{where}"
        facts = {"counts": subject.counts, "memory": subject.memory, "convert": subject.record}
        row = unmeasured(self.config, wanted, what, {"model": model, "where": where}, **facts)
        self.rows.append(PlannedRow(row, subject))

    def add_layers(self, found: Trace) -> None:
        """The network's own convolution of each shape, and where conversions replace it what they put in its place."""
        config = self.config
        records = [row.row.convert for row in self.rows if row.row.convert]
        replaced = {layer.name for record in records for layer in record.layers}
        by_variant = {layer.name for record in records if not record.planned for layer in record.layers}
        for number, (call, layer) in enumerate(distinct_convolutions(found, replaced)):
            shape = _layer_config(config, call)
            own = ConvSpec("gc" if call.groups > 1 else "standard", *(getattr(call, name) for name in _SHAPE))
            uniform = [each for each in config.choices if not each.is_planned and by_variant & {*layer.names}]
            planned = [config.planned[name] for name in layer.names if name in config.planned]
            wanted = wanted_of(config, dict.fromkeys((Choice(), *uniform, *planned)))
            self.rows.extend(planned_layer(shape, each, own, (config.model, number, layer)) for each in wanted)


def plan_network(config: NetworkConfig) -> NetworkPlan:
    """The dense network, the converted ones, and with ``layers`` each distinct convolution.

    Every conversion is tried here, without numbers, so that what cannot be converted is said before anything is
    measured. Raises ShapeError naming every convolution that some N or rank does not fit, unless ``skip_invalid``
    (they are then kept dense), and UsageError for an unknown network or one without a convolution to replace.
    """
    config = sized(config)
    dense = build_empty(config.spec)
    found = traced(dense, config.spec)
    if is_own(config.model):
        config = dataclasses.replace(config, num_classes=class_count(dense, config.spec))
    planned = NetworkPlan(config, [], [])
    problems: list[str] = []
    for wanted in wanted_rows(config):
        if wanted.choice.is_dense:
            planned.add_network(wanted, NetworkSubject(config, None, dense, wanted))
            continue
        try:
            converted = converted_as_chosen(config, dense, wanted.choice, wanted.in_torch)
        except ShapeError as problem:
            problems.append(str(problem))
        else:
            planned.add_network(wanted, NetworkSubject(config, converted.record, converted.model, wanted))
    refuse_misfits(problems)
    if found.uncounted:
        names = ", ".join(f"{name} ({times}x)" for name, times in found.uncounted.items())
        planned.notes.append(
            f"MACs and roofline leave out what is neither a convolution nor a fully connected layer: {names}"
        )
    if config.layers:
        planned.add_layers(found)
    if not planned.rows:
        raise UsageError("nothing to measure: --groups and --variants leave no row")
    return planned


def begun(
    config: NetworkConfig, cells: Collection[CellKey] | None = None, stop: Callable[[], bool] = lambda: False
) -> tuple[ProfileRun, Document]:
    """A run over the networks of ``config``, by default all of them, and the document to take it into."""
    session = open_session(config)
    planned = plan_network(config)
    session.warnings.extend(planned.notes)
    rows = [row for row in planned.rows if cells is None or row.params.cell in cells]
    run = ProfileRun(planned.config, session, rows, stop=stop)
    own, conditions = run.config.to_json(), session.conditions
    return run, new_document("profile", (), own, session.environment, conditions, quick=config.quick)


def converted_as_chosen(
    config: ConvertedNetwork, dense: nn.Module, choice: Choice, algorithm_of: Callable[[str], str], **how: Any
) -> Converted:
    """``dense`` with the convolutions that ``config`` chooses, or that its plan names, replaced, freshly initialised.

    how: other arguments of ``convert``, such as another init.
    Raises ShapeError where some of them do not fit, unless ``skip_invalid``, which keeps those dense; UsageError for a
    plan that is not for this network.
    """
    try:
        converted = convert(dense, **{"init": "scratch", **how, **config.conversion(choice, algorithm_of)})
    except Indivisible as problem:
        raise ShapeError(problem.fact) from None
    except UsageError as problem:
        if choice.is_planned:  # of which nothing is left out by --skip-invalid
            raise UsageError(f"--plan: {problem}") from None
        raise
    if choice.is_planned:
        record = converted.record
        asked = {name for name, each in config.planned.items() if not each.is_dense}
        for name, reason in ((kept.name, kept.reason) for kept in record.kept if kept.name in asked):
            raise UsageError(f"--plan: {name} cannot be replaced: {reason}; leave it out")
    return converted


class NetworkSubject(Subject):
    """A network, dense or converted (``record``).

    empty: the network that will be measured, without numbers; from it come the counts.
    """

    quick_share = 5.0

    def __init__(self, config: NetworkConfig, record: Record | None, empty: nn.Module, wanted: Wanted) -> None:
        self.config, self.record = config, record
        self.mode, self.algorithm = wanted.mode, wanted.algorithm
        self.phases, self.batch, self.input_grad = config.phases, config.batch, False
        self.input_shape = (config.batch, *config.spec.size)
        self.item = PRECISIONS[config.precision]
        self.found = trace(empty, config.spec.size)
        self.counts = network_counts(empty, self.found, self.batch, self.item)
        # What the algorithm that runs stores and multiplies: a masked one its dense kernels.
        masked = record is not None and any(layer.algorithm == "masked" for layer in record.layers)
        self.params = (self.counts.params_training if masked else None) or self.counts.params
        self.macs = (self.counts.macs_training if masked else None) or self.counts.macs
        trains = "train_step" in config.phases
        self.held_bytes = (3 if trains else 1) * self.params * self.item
        self.memory = Memory(
            paper_bytes=None,
            params_bytes=self.params * self.item + sum(b.numel() * b.element_size() for b in empty.buffers()),
            optimizer_bytes=self.params * self.item if trains else 0,  # momentum
            input_bytes=math.prod(self.input_shape) * self.item,
            output_bytes=self.batch * config.spec.classes * self.item,
        )

    @property
    def is_tuned(self) -> bool:
        return self.algorithm == "auto" and self.record is not None

    def module(self, session: Session) -> nn.Module:
        # The same seed in every row: what was not replaced starts from the same weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, "network"))
            model = build_model(self.config.spec)
            if self.record is not None:
                model = replay(model, self.record)
        return on_device(model, self.config, session)

    def in_torch(self, session: Session, x: torch.Tensor, like: Like | None) -> Workload:
        generator = torch.Generator().manual_seed(row_seed(self.config.seed, "labels"))
        labels = torch.randint(self.config.spec.classes, (self.batch,), generator=generator).to(session.device)
        return NetworkWorkload(self.module(session), x, self.mode, like, labels=labels)

    def work(self, phase: str) -> CallWork:
        moved = self.found.values_moved * self.batch + self.params
        operations = 2 * self.macs + (self.counts.adds or 0)
        return CallWork(PASSES[phase] * operations * self.batch, PASSES[phase] * moved * self.item)

    def needed_bytes(self, phase: str) -> int:
        """Weights and the largest layer's input and output; to train, gradients, momentum and all outputs."""
        if phase == "train_step":
            return (3 * self.params + self.found.outputs * self.batch) * self.item
        largest = max((call.values_in + call.values_out for call in self.found.calls), default=0)
        return (self.params + largest * self.batch) * self.item

    def way_out(self, phase: str) -> str:
        if phase != "train_step":
            return ""
        larger = "use a larger --batch (batch norm needs more than one value a channel), or " if self.batch == 1 else ""
        return f"; {larger}leave it out with --phases fwd"


def network_counts(model: nn.Module, found: Trace, batch: int, item: int, *, learnt: bool = False) -> Counts:
    """counts of a network's row: deployed parameters and multiply-adds an image, BGC's additions, and what trains.

    MACs are those of convolutions and fully connected layers; bytes_min is what these read and write, and this image's
    share of the weights. learnt: as the layers' structure is now, where it is learnt (FLGC's groups may be uneven), and
    not as the formula has it.
    """
    stored = sum(p.numel() for p in model.parameters())
    params, macs, adds, trained = stored, found.macs, 0, found.macs
    modules = dict(model.named_modules())
    seen: set[str] = set()
    for call in found.convs:
        module = modules.get(call.module) if call.module is not None else None
        if not isinstance(module, VariantConv2d) or call.size is None or call.module is None:
            continue
        formula = count(module.spec, *call.size)
        counts = module.counts(*call.size) if learnt else formula
        macs += counts.macs - formula.macs
        trained += counts.macs - formula.macs
        adds += counts.adds
        trained += (counts.macs_training or counts.macs) - counts.macs
        if call.module not in seen:
            seen.add(call.module)
            params += counts.params - sum(p.numel() for p in module.parameters())
    masked = stored != params
    return Counts(
        params=params,
        macs=macs,
        adds=adds,
        bytes_min=found.values_moved * item + -(-stored * item // batch),
        params_training=stored if masked else None,
        macs_training=trained if masked else None,
    )


# ------------------------------------------------------------------------------------------- the network's layers


_SHAPE = ("in_channels", "out_channels", "kernel", "stride", "padding", "dilation", "groups", "bias")


def distinct_convolutions(found: Trace, replaced: set[str]) -> list[tuple[Call, DistinctLayer]]:
    """The convolutions of a network that differ in shape or input, in the order of execution; each with its first call.

    ``replaced``: names of those that a conversion replaces.
    """
    shapes: dict[tuple[Any, ...], list[Call]] = {}
    for call in found.convs:
        if call.module is not None:
            key = tuple(getattr(call, name) for name in (*_SHAPE, "size", "reads_image"))
            shapes.setdefault(key, []).append(call)
    return [
        (
            first := calls[0],
            DistinctLayer(
                label=_label(first),
                count=len(calls),
                names=tuple(dict.fromkeys(call.module or "" for call in calls)),
                replaced=any(call.module in replaced for call in calls),
                **{name: getattr(first, name) for name in ("kernel", "stride", "padding", "dilation", "groups")},
            ),
        )
        for calls in shapes.values()
    ]


def _label(call: Call) -> str:
    """ "64 -> 64 3x3 /2 at 56x56"."""
    height, width = call.size or (0, 0)
    stride = f" /{call.stride[0]}" if call.stride != (1, 1) else ""
    grouped = f" groups={call.groups}" if call.groups > 1 else ""
    kernel = "x".join(str(side) for side in call.kernel)
    return f"{call.in_channels} -> {call.out_channels} {kernel}{stride}{grouped} at {height}x{width}"


def _layer_config(config: NetworkConfig, call: Call) -> ProfileConfig:
    """The network's convolution as one layer to measure."""
    phases = tuple({"fwd": "fwd", "train_step": "fwd_bwd"}[phase] for phase in config.phases)
    (kernel, _), (stride, _), (height, width) = call.kernel, call.stride, call.size or (1, 1)
    own = {"phases": phases, "input_grad": not call.reads_image or phases == ("fwd",)}
    own |= {"in_channels": call.in_channels, "out_channels": call.out_channels, "kernel": kernel, "stride": stride}
    return ProfileConfig(**{**shared_fields(config, ProfileConfig), **own, "height": height, "width": width})
