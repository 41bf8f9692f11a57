"""The plan behind ``bgcbench profile --model``: the network's rows, and what each of them builds and must cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from bgcbench.conversion.convert import convert
from bgcbench.conversion.record import Converted, replay
from bgcbench.conversion.selection import Indivisible
from bgcbench.convs.base import VariantConv2d
from bgcbench.errors import ShapeError, UsageError
from bgcbench.experiments.images import sized, traced
from bgcbench.experiments.network import NetworkConfig
from bgcbench.experiments.profile import (
    MeasureConfig,
    PlannedRow,
    ProfileConfig,
    conditions,
    row_key,
    row_seed,
    wanted_rows,
)
from bgcbench.experiments.profile_run import LayerSubject, Subject, on_device
from bgcbench.experiments.session import Session
from bgcbench.measure.counts import CallWork, count
from bgcbench.measure.trace import Call, Trace, trace
from bgcbench.measure.workload import Like, NetworkWorkload, Workload
from bgcbench.models import build_empty, build_model
from bgcbench.results import Json
from bgcbench.results.rows import Record
from bgcbench.specs import PRECISIONS, VARIANTS, ConvSpec, NetSpec, unfit

PASSES = {"fwd": 1, "train_step": 3}  # convolution-sized passes: y; and dx and dW


@dataclass(frozen=True)
class NetworkPlan:
    """The rows of a run, what each measures (by key), and what there is to say before it.

    config: with the network's own size.
    """

    config: MeasureConfig
    rows: list[PlannedRow]
    subjects: dict[str, Subject]
    notes: list[str]


def plan_network(config: NetworkConfig) -> NetworkPlan:
    """The dense network, the converted ones by N, and with ``layers`` each distinct convolution.

    Every conversion is tried here, without numbers, so that what cannot be converted is said before anything is
    measured. Raises ShapeError naming every convolution that some N does not divide, unless ``skip_invalid`` (they are
    then kept dense), and UsageError for an unknown network or one without a convolution to replace.
    """
    config = sized(config)
    spec = config.spec
    dense = build_empty(spec)
    found = traced(dense, spec)
    rows: list[PlannedRow] = []
    subjects: dict[str, Subject] = {}
    problems: list[str] = []
    records: list[Record] = []
    notes: list[str] = []
    for variant, groups, form in wanted_rows(config):
        row = _row(config, variant, groups, form)
        record, model = None, dense
        if variant != "standard":
            try:
                converted = converted_as_chosen(config, dense, variant, groups, form)
            except ShapeError as problem:
                problems.append(str(problem))
                continue
            record, model = converted.record, converted.model
            records.append(record)
        rows.append(row)
        subjects[row.key] = NetworkSubject(config, record, model, network_label(variant, groups))
    refuse_indivisible(problems)
    if found.uncounted:
        names = ", ".join(f"{name} ({times}x)" for name, times in found.uncounted.items())
        notes.append(f"MACs and roofline leave out what is neither a convolution nor a fully connected layer: {names}")
    if config.layers:
        for row, subject in _layer_rows(config, found, records):
            rows.append(row)
            if subject is not None:
                subjects[row.key] = subject
    if not subjects:
        raise UsageError("nothing to measure: --groups and --variants leave no row")
    return NetworkPlan(config, rows, subjects, list(dict.fromkeys(notes)))


class Choice(Protocol):
    """The configuration of a command that converts a network: of profile, of train."""

    @property
    def spec(self) -> NetSpec: ...
    @property
    def where(self) -> str: ...
    @property
    def include(self) -> tuple[str, ...]: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...
    @property
    def skip_invalid(self) -> bool: ...


def converted_as_chosen(config: Choice, dense: nn.Module, variant: str, groups: int, form: str = "auto") -> Converted:
    """``dense`` with the convolutions that ``config`` chooses replaced, freshly initialised.

    Raises ShapeError where N does not divide some of them, unless ``skip_invalid``, which keeps those dense.
    """
    try:
        return convert(
            dense,
            variant,
            groups,
            where=config.where,
            include=config.include,
            exclude=config.exclude,
            init="scratch",
            on_indivisible="skip" if config.skip_invalid else "raise",
            algorithm=form,
            example_input=config.spec.size,
        )
    except Indivisible as problem:
        raise ShapeError(problem.fact) from None


def refuse_indivisible(problems: Sequence[str]) -> None:
    """Raise one ShapeError with all that N does not divide, if there is anything."""
    if problems:
        raise ShapeError("; ".join(dict.fromkeys(problems)) + "; drop these groups or use --skip-invalid")


def network_label(variant: str, groups: int) -> str:
    """A row for people: "dense", "BGC N=4"."""
    return "dense" if variant == "standard" else f"{VARIANTS[variant].label} N={groups}"


def _row(config: NetworkConfig, variant: str, groups: int, form: str) -> PlannedRow:
    params: Json = {
        "model": config.model,
        "variant": variant,
        "groups": groups,
        "where": config.where,
        **conditions(config, variant, form),
    }
    key = row_key(config, f"{config.model}-{variant}-n{groups}-{config.where}", form)
    return PlannedRow(key, params, None, group="network")


class NetworkSubject(Subject):
    """A network, dense or converted.

    empty: the network that will be measured, without numbers; from it come the counts.
    """

    quick_share = 5.0

    def __init__(self, config: NetworkConfig, record: Record | None, empty: nn.Module, label: str) -> None:
        self.config, self.record, self.label = config, record, label
        self.phases, self.batch, self.input_grad = config.phases, config.batch, False
        self.input_shape = (config.batch, *config.spec.size)
        self.item = PRECISIONS[config.precision]
        self.found = trace(empty, config.spec.size)
        self.counts = network_counts(empty, self.found, self.batch, self.item)
        # What the form that runs stores and multiplies: a masked one its dense kernels.
        masked = record is not None and record.algorithm == "masked"
        self.params = int(self.counts["params_training" if masked else "params"])
        self.macs = int(self.counts["macs_training" if masked else "macs"])
        self.buffers_bytes = sum(b.numel() * b.element_size() for b in empty.buffers())

    def module(self, session: Session) -> nn.Module:
        # The same seed in every row: what was not replaced starts from the same weights.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, "network"))
            model = build_model(self.config.spec)
            if self.record is not None:
                model = replay(model, self.record)
        return on_device(model, self.config, session)

    def workload(self, session: Session, x: torch.Tensor, like: Like | None) -> Workload:
        generator = torch.Generator().manual_seed(row_seed(self.config.seed, "labels"))
        labels = torch.randint(self.config.spec.classes, (self.batch,), generator=generator).to(session.device)
        return NetworkWorkload(self.module(session), x, self.config.mode, like, labels=labels)

    def work(self, phase: str) -> CallWork:
        moved = self.found.values_moved * self.batch + self.params
        operations = 2 * self.macs + self.counts["adds"]
        return CallWork(PASSES[phase] * operations * self.batch, PASSES[phase] * moved * self.item)

    @property
    def _trains(self) -> bool:
        return "train_step" in self.phases

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

    @property
    def held_bytes(self) -> int:
        return (3 if self._trains else 1) * self.params * self.item

    def facts(self, params: Json) -> Json:
        return {
            "counts": self.counts,
            "approximability": None,
            "memory": {
                "paper_bytes": None,
                "params_bytes": self.params * self.item + self.buffers_bytes,
                "optimizer_bytes": self.params * self.item if self._trains else 0,  # momentum
                "input_bytes": math.prod(self.input_shape) * self.item,
                "output_bytes": self.batch * self.config.spec.classes * self.item,
            },
            "paper": None,
            "convert": None if self.record is None else self.record.to_json(),
        }


def network_counts(model: nn.Module, found: Trace, batch: int, item: int, *, learnt: bool = False) -> Json:
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
    counts_json: Json = {
        "params": params,
        "macs": macs,
        "adds": adds,
        "paper_ops": None,
        "bytes_min": found.values_moved * item + -(-stored * item // batch),
    }
    if stored != params:
        counts_json |= {"params_training": stored, "macs_training": trained}
    return counts_json


# ------------------------------------------------------------------------------------------- the network's layers


@dataclass(frozen=True)
class Distinct:
    """One distinct convolution of a network: its shape, and which modules have it."""

    call: Call
    names: tuple[str, ...]
    calls: int
    replaced: bool

    @property
    def label(self) -> str:
        """ "64 -> 64 3x3 /2 at 56x56"."""
        call, (height, width) = self.call, self.call.size or (0, 0)
        stride = f" /{call.stride[0]}" if call.stride != (1, 1) else ""
        grouped = f" groups={call.groups}" if call.groups > 1 else ""
        kernel = "x".join(str(side) for side in call.kernel)
        return f"{call.in_channels} -> {call.out_channels} {kernel}{stride}{grouped} at {height}x{width}"

    def spec(self, variant: str, groups: int, algorithm: str) -> ConvSpec:
        """This convolution as ``variant``; the network's own is 'standard', which may itself be grouped."""
        call = self.call
        if variant == "standard" and call.groups > 1:
            variant, groups = "gc", call.groups
        return ConvSpec(
            variant,
            call.in_channels,
            call.out_channels,
            call.kernel,
            call.stride,
            call.padding,
            call.dilation,
            groups,
            call.bias,
            algorithm,
        )


def distinct_convolutions(found: Trace, replaced: set[str]) -> list[Distinct]:
    """The convolutions of a network that differ in shape or input, in the order of execution.

    ``replaced``: names of those that a conversion replaces.
    """
    shapes: dict[tuple[Any, ...], list[Call]] = {}
    for call in found.convs:
        if call.module is not None:
            key = (call.in_channels, call.out_channels, call.kernel, call.stride, call.padding, call.dilation,
                   call.groups, call.bias, call.size, call.reads_image)  # fmt: skip
            shapes.setdefault(key, []).append(call)
    return [
        Distinct(
            calls[0],
            tuple(dict.fromkeys(call.module or "" for call in calls)),
            len(calls),
            any(call.module in replaced for call in calls),
        )
        for calls in shapes.values()
    ]


class NetworkLayerSubject(LayerSubject):
    """One distinct convolution of a network, its own or a variant in its place."""

    def __init__(
        self, config: ProfileConfig, planned: PlannedRow, spec: ConvSpec, distinct: Distinct, label: str
    ) -> None:
        super().__init__(config, planned, spec, label)
        self.distinct = distinct

    def facts(self, params: Json) -> Json:
        return super().facts(params) | {"layer": layer_facts(self.distinct)}


def layer_facts(distinct: Distinct) -> Json:
    """The ``layer`` entry of a row: where this convolution stands in the network."""
    call = distinct.call
    return {
        "label": distinct.label,
        "count": distinct.calls,
        "names": list(distinct.names),
        "replaced": distinct.replaced,
        "kernel": list(call.kernel),
        "stride": list(call.stride),
        "padding": list(call.padding),
        "dilation": list(call.dilation),
        "groups": call.groups,
    }


def _layer_rows(
    config: NetworkConfig, found: Trace, records: list[Record]
) -> list[tuple[PlannedRow, NetworkLayerSubject | None]]:
    """The network's own convolution of each shape, and where the conversion replaces it each variant beside it."""
    replaced = {layer.name for record in records for layer in record.layers}
    phases = tuple({"fwd": "fwd", "train_step": "fwd_bwd"}[phase] for phase in config.phases)
    names = ("batch", "precision", "layout", "mode", "cache", "device", "threads", "seed", "max_time_s", "quick")
    shared = {name: getattr(config, name) for name in names}
    planned: list[tuple[PlannedRow, NetworkLayerSubject | None]] = []
    for number, distinct in enumerate(distinct_convolutions(found, replaced)):
        call = distinct.call
        height, width = call.size or (1, 1)
        layer = ProfileConfig(
            in_channels=call.in_channels,
            out_channels=call.out_channels,
            kernel=call.kernel[0],
            stride=call.stride[0],
            height=height,
            width=width,
            phases=phases,
            input_grad=not call.reads_image or phases == ("fwd",),
            **shared,
        )
        rows = wanted_rows(config) if distinct.replaced else []
        if not config.reference or not rows:
            rows = [("standard", 1, "auto"), *rows]
        for variant, groups, form in rows:
            row = _layer_row(config, layer, distinct, number, (variant, groups, form))
            subject = None
            if row.spec is not None:
                label = f"{network_label(variant, groups)} of {distinct.label}"
                subject = NetworkLayerSubject(layer, row, row.spec, distinct, label)
            planned.append((row, subject))
    return planned


def _layer_row(
    config: NetworkConfig, layer: ProfileConfig, distinct: Distinct, number: int, wanted: tuple[str, int, str]
) -> PlannedRow:
    variant, groups, form = wanted
    call = distinct.call
    params: Json = {
        "model": config.model,
        "layer": number,
        "variant": variant,
        "groups": groups,
        "in_channels": call.in_channels,
        "out_channels": call.out_channels,
        "kernel": layer.kernel,
        "stride": layer.stride,
        **conditions(layer, variant, form),
    }
    if call.kernel[0] != call.kernel[1]:
        params["kernel_width"] = call.kernel[1]
    key = row_key(layer, f"{config.model}-layer{number}-{variant}-n{groups}", form)
    group = f"layer {number}"
    why = unfit(variant, call.in_channels, call.out_channels, groups) if variant != "standard" else None
    if why:
        return PlannedRow(key, params, None, why, group)
    return PlannedRow(key, params, distinct.spec(variant, groups, form), None, group)
