"""What the scripts' own result files hold, as far as another script reads it; other fields are left alone."""

from __future__ import annotations

from typing import Any

import msgspec

from bgcbench.measure.statistics import Interval


class File(msgspec.Struct, kw_only=True):
    """Any of them; ``command`` made it."""

    command: str


# ----------------------------------------------------------------------------------------------------------- bgc_forms


class DistinctLayer(msgspec.Struct):
    """A convolution of the networks, and how often each of them has it."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int
    width: int
    networks: dict[str, int]


class AlgorithmCell(msgspec.Struct, kw_only=True):
    """One layer, N, layout and phase: seconds by algorithm, of 'auto', of GC(N) and of GC(N/2), as 'gc_half'."""

    key: str = ""
    in_channels: int
    out_channels: int
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int]
    size: tuple[int, ...]
    groups: int
    layout: str
    phase: str
    chosen: str
    median_s: dict[str, float]
    samples: dict[str, int]
    seen_by_auto_s: dict[str, float]

    @property
    def algorithms(self) -> dict[str, float]:
        """Seconds of each algorithm that was measured, without 'auto' and the group convolutions."""
        return {name: s for name, s in self.median_s.items() if name not in ("gc", "gc_half", "auto")}

    def auto_over(self, other: str) -> float:
        """Time of 'auto' over that of ``other``."""
        return self.median_s["auto"] / self.median_s[other]


class AlgorithmSummary(msgspec.Struct):
    cells: int
    within_5_percent: int
    ratio_to_gc_of_half: float


class AlgorithmFile(File):
    summary: AlgorithmSummary
    results: list[AlgorithmCell]


# -------------------------------------------------------------------------------------------------------- kernels_cuda


class KernelRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A subject's errors, seconds of every round by phase, and share of the roofline; or why it failed."""

    subject: str
    variant: str
    algorithm: str
    errors: dict[str, float] = {}
    device_s: dict[str, list[float]] = {}
    host_s: dict[str, list[float]] = {}
    roofline: dict[str, float] = {}
    failed: str | None = None


class Shape(msgspec.Struct, frozen=True):
    """A square layer with padding kernel // 2 and no bias: what one cell measures."""

    n: int
    m: int
    side: int
    kernel: int
    stride: int
    groups: int


class KernelCell(msgspec.Struct):
    shape: Shape
    batch: int
    precision: str
    rows: list[KernelRow]
    took_s: float = 0.0
    tiles: dict[str, dict[str, Any]] = {}


class NetworkRow(msgspec.Struct, omit_defaults=True):
    """Seconds of a network's training steps, or why it failed."""

    subject: str
    step_s: list[float] = []
    failed: str | None = None


class Named(msgspec.Struct):
    name: str


class Machine(msgspec.Struct):
    device: Named


class KernelFile(File):
    environment: Machine
    table4: list[KernelCell] = []


# ---------------------------------------------------------------------------------------------------------- the others


class Agreement(File):
    """agree_with_torch; worst: the largest difference as a share."""

    worst: float


class Try(msgspec.Struct):
    ci95: tuple[float, float] | None

    @property
    def half_width(self) -> float | None:
        return Interval(*self.ci95).width / 2 if self.ci95 else None


class Twice(File):
    """same_row_twice; told_apart: tries in which the ratio is significant."""

    told_apart: int
    tries: list[Try]


class SolverRatios(msgspec.Struct):
    conventional: float
    shared: float


class Solver(File):
    """approx_solver; ratios: times of other ways over ours."""

    ratios: SolverRatios
    largest_relative_difference: float


class Pipeline(msgspec.Struct):
    images_per_s: dict[str, list[float]]
    ratio: float


class Loop(msgspec.Struct):
    added_s: float


class TrainSpeed(File):
    pipeline: Pipeline
    loop: Loop


class CalibrationMemory(msgspec.Struct):
    moment_bytes: int
    in_flight_bytes: int


class TimedConversion(msgspec.Struct):
    seconds: float
    calibration: CalibrationMemory


class ConvertFile(File):
    results: list[TimedConversion]


# --------------------------------------------------------------------------------------------------------- photographs


class Said(msgspec.Struct):
    """What a converted network says versus the original one, of 1000 classes: percent, nats and a share."""

    agreement: float
    top5: float
    kl: float
    logit_error: float


class Photographed(msgspec.Struct, kw_only=True):
    """A network converted in one way at a budget, and what it says of photographs that were not fitted."""

    seed: int
    how: str
    budget: float
    params_ratio: float
    unseen: Said


class PhotographFile(File, kw_only=True):
    """medians: loss of the layers by themselves, by variant and N."""

    medians: dict[str, float]
    results: tuple[Photographed, ...]


class PlannedPhotographed(Photographed, kw_only=True):
    """label: what was converted to; init: how; predicted: the loss that was expected, where one was."""

    label: str
    init: str
    predicted: float | None = None


class PlannedPhotographFile(File, kw_only=True):
    results: tuple[PlannedPhotographed, ...]


# -------------------------------------------------------------------------------------------------------- plan_digits


class PlannedNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """A network at a budget: its error and what it has in common with the original, in percent, on the test images."""

    weights: str
    budget: float
    network: str
    params_ratio: float
    error: float
    agreement: float
    kl: float
    logit_error: float


class PlannedFile(File):
    results: list[PlannedNetwork]


# --------------------------------------------------------------------------------------------------------- plan_ranks


class RankedPlan(msgspec.Struct):
    """A random plan of the network in the file ``weights``: what was predicted of it (felt, plain) and what is real."""

    weights: str
    felt: float
    plain: float
    kl: float
    logit_error: float


class RankFile(File):
    results: tuple[RankedPlan, ...]
