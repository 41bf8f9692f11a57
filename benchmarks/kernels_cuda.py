"""Our kernels for group and balanced group convolution against stock ones, on a CUDA device. Under 9 minutes.

    python -m benchmarks.kernels_cuda [--sections table4,resnet50,networks,compiled] [--quick] [--seconds 480]

table4: 128 x 1024 x 7 x 7 -> 1024, 3x3 with padding 1, N = 2, 4, 8, 16 in bf16, tf32 and fp32: the standard
convolution and stock group convolution in both layouts, the stock algorithms of BGC, and our kernels for both; forward,
and forward with backward. resnet50: the 1x1 and 3x3 layers of ResNet-50 at batch 128, N = 4 and 8. networks: training
steps of ResNet-50 and WRN-28-10, standard and with N = 4. compiled: torch.compile's max-autotune of two algorithms of
BGC. --quick: table4 and resnet50 alone, bf16 and tf32, a few layers.

Device times are those of a CUDA graph of 21 calls that rotate over 3 inputs, host times those of enqueuing the same
calls one by one; subjects take turns, the median of the rounds is printed and every round is saved. Each subject's
result is compared with float64 first. Work is counted by the variant's formula, so an algorithm that computes more
has a smaller share of the roofline. The most telling cells come first. The file is written anew after every cell; what
--seconds leave no time for is listed as skipped.

Exit code 1 if a subject failed or its error is above its precision's tolerance, 3 without a CUDA device.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import CPU, save
from benchmarks.files import KernelCell, KernelRow, NetworkRow, Shape
from bgcbench.conversion.convert import convert
from bgcbench.convs import build_conv
from bgcbench.errors import DeviceError
from bgcbench.kernels import tiles
from bgcbench.measure.ceilings import Ceilings, measure_ceilings
from bgcbench.measure.counts import call_work, count
from bgcbench.measure.device import (
    DTYPES,
    DeviceStopwatch,
    backend_state,
    compile_state,
    current,
    describe_failure,
    free_memory,
    make_stopwatch,
    random_input,
)
from bgcbench.measure.environment import describe_environment
from bgcbench.measure.workload import Cell, NetworkWorkload
from bgcbench.models import build_model
from bgcbench.specs import ConvSpec

SECTIONS = ("table4", "resnet50", "networks", "compiled")
PHASES = ("fwd", "fwd_bwd")
# Relative error in norm against float64 from which a result is wrong.
TOLERANCE = {"bf16": 2e-2, "tf32": 3e-3, "fp32": 1e-5}
# (n, m, side of the input, side of the kernel, stride) of ResNet-50's blocks.
RESNET50 = (
    (64, 64, 56, 3, 1), (128, 128, 56, 3, 2), (128, 128, 28, 3, 1), (256, 256, 28, 3, 2), (256, 256, 14, 3, 1),
    (512, 512, 14, 3, 2), (512, 512, 7, 3, 1), (256, 64, 56, 1, 1), (64, 256, 56, 1, 1), (512, 128, 28, 1, 1),
    (128, 512, 28, 1, 1), (1024, 256, 14, 1, 1), (256, 1024, 14, 1, 1), (2048, 512, 7, 1, 1), (512, 2048, 7, 1, 1),
)  # fmt: skip
QUICK_RESNET50 = (RESNET50[4], RESNET50[6], RESNET50[2], RESNET50[11])


@dataclass(frozen=True)
class Size:
    """How much is measured: images, inputs, calls a graph, rounds, training steps; channels are divided."""

    batch: int = 128
    inputs: int = 3
    calls: int = 21
    rounds: int = 7
    steps: int = 10
    divide: int = 1


REHEARSAL = Size(batch=2, inputs=2, calls=2, rounds=1, steps=1, divide=16)


@dataclass(frozen=True)
class Subject:
    """One way to compute a layer: variant, algorithm ('triton' are our kernels) and layout."""

    variant: str
    algorithm: str
    layout: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant} {self.algorithm} {self.layout}" + (" max-autotune" if self.compiled else "")


STANDARD = [Subject("standard", "stock", layout) for layout in ("nchw", "nhwc")]
GC_STOCK = [Subject("gc", "stock", layout) for layout in ("nchw", "nhwc")]
BGC_STOCK = [Subject("bgc", name, layout) for layout in ("nchw", "nhwc") for name in ("two_conv", "concat", "dense")]
OURS = [Subject("gc", "triton", "nhwc"), Subject("bgc", "triton", "nhwc")]
ALL = [*STANDARD, *GC_STOCK, *BGC_STOCK, *OURS]
FEW = [STANDARD[1], GC_STOCK[1], Subject("bgc", "two_conv", "nhwc"), Subject("bgc", "dense", "nhwc"), *OURS]
COMPILED = [Subject("bgc", name, "nhwc", compiled=True) for name in ("two_conv", "concat")]


def spec_of(shape: Shape, variant: str, algorithm: str = "auto") -> ConvSpec:
    groups = 1 if variant == "standard" else shape.groups
    return ConvSpec(
        variant, shape.n, shape.m, shape.kernel, shape.stride, shape.kernel // 2, groups=groups, bias=False,
        algorithm=algorithm,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One cell of a layers' section, and the seconds that it may take."""

    section: str
    shape: Shape
    precision: str
    subjects: Sequence[Subject]
    seconds: float


def layer_jobs(quick: bool) -> list[Job]:
    """The cells of table4 and resnet50, the most telling first."""

    def table4(precision: str, subjects: Sequence[Subject], seconds: float, *groups: int) -> Iterator[Job]:
        for number in groups:
            yield Job("table4", Shape(1024, 1024, 7, 3, 1, number), precision, subjects, seconds)

    def resnet50(layers: Sequence[tuple[int, ...]], groups: int) -> Iterator[Job]:
        for layer in layers:
            yield Job("resnet50", Shape(*layer, groups), "bf16", FEW, 8)

    found = [*table4("bf16", ALL, 15, 4, 16), *resnet50(QUICK_RESNET50, 4), *table4("tf32", FEW, 10, 4, 16)]
    found += table4("bf16", ALL, 15, 8, 2)
    if quick:
        return found
    found += resnet50([layer for layer in RESNET50 if layer not in QUICK_RESNET50], 4)
    found += resnet50(RESNET50, 8)
    return [*found, *table4("tf32", FEW, 10, 8, 2), *table4("fp32", FEW, 15, 4, 16, 8, 2)]


COMPILED_JOBS = [Job("compiled", Shape(1024, 1024, 7, 3, 1, groups), "bf16", COMPILED, 90) for groups in (4, 16)]


def tiny(job: Job, size: Size) -> Job:
    """``job`` in a rehearsal: fewer channels and positions, and fp32, which every CPU has."""
    shape = msgspec.structs.replace(
        job.shape, n=job.shape.n // size.divide, m=job.shape.m // size.divide, side=min(job.shape.side, 7)
    )
    return replace(job, shape=shape, precision="fp32", seconds=0)


class Prepared:
    """A subject on the device with its inputs and, for each phase, what runs all of its calls (a graph's replay)."""

    def __init__(self, shape: Shape, subject: Subject, precision: str, device: torch.device, size: Size) -> None:
        self.subject, self.device, self.size, dtype = subject, device, size, DTYPES[precision]
        layout = torch.channels_last if subject.layout == "nhwc" else torch.contiguous_format
        torch.manual_seed(0)  # the same weights for all subjects of a variant
        layer = build_conv(spec_of(shape, subject.variant, subject.algorithm))
        self.layer = layer.to(device=device, dtype=dtype, memory_format=layout)
        self.call: Callable[[Tensor], Tensor] = self.layer
        if subject.compiled:
            self.call = torch.compile(self.layer, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        drawn = torch.Generator(device).manual_seed(0)  # on the device: the CPU would take minutes for all of them
        self.inputs = [
            torch.randn((size.batch, shape.n, shape.side, shape.side), generator=drawn, device=device)
            .to(dtype=dtype, memory_format=layout)
            .requires_grad_()
            for _ in range(size.inputs)
        ]
        with torch.no_grad():
            y = self.layer(self.inputs[0])
        self.upstream = [torch.randn_like(y) for _ in self.inputs]
        self.leaves = list(self.layer.parameters())
        self.replays = {phase: self._captured(phase) for phase in PHASES}

    def once(self, phase: str, number: int) -> object:
        number %= self.size.inputs
        x = self.inputs[number]
        if phase == "fwd":
            with torch.no_grad():
                return self.call(x)
        return torch.autograd.grad(self.call(x), [x, *self.leaves], self.upstream[number])

    def all(self, phase: str) -> None:
        for number in range(self.size.calls):
            self.once(phase, number)

    def _captured(self, phase: str) -> Callable[[], None]:
        """A graph's replay; on a CPU, which has none, the calls themselves."""
        if self.device.type != "cuda":
            return functools.partial(self.all, phase)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(2 * self.size.inputs):  # block sizes and algorithms are chosen here
                self.once(phase, number)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.all(phase)
        graph.replay()
        return graph.replay

    def device_s(self, phase: str, stopwatch: DeviceStopwatch) -> float:
        """Seconds of one call inside the graph."""
        return stopwatch.sample(Cell(call=self.replays[phase]), 1)[0] / self.size.calls

    def host_s(self, phase: str, stopwatch: DeviceStopwatch) -> float:
        """Seconds the host takes to ask for one call."""
        stopwatch.synchronize()
        begin = time.perf_counter()
        self.all(phase)
        seconds = (time.perf_counter() - begin) / self.size.calls
        stopwatch.synchronize()
        return seconds

    def errors(self) -> dict[str, float]:
        """Relative errors in norm of y and all gradients against a float64 convolution with the dense kernel."""
        x, dy = self.inputs[0], self.upstream[0]
        y = self.call(x)
        found = [y, *torch.autograd.grad(y, [x, *self.leaves], dy)]
        exact_layer = copy.deepcopy(self.layer).double()
        exact_x = x.detach().double().requires_grad_()
        dense = exact_layer.dense_weight()
        exact_y = F.conv2d(exact_x, dense, None, exact_layer.stride, exact_layer.padding)
        exact = [exact_y, *torch.autograd.grad(exact_y, [exact_x, *exact_layer.parameters()], dy.double())]
        names = ["y", "x", *(name for name, _ in self.layer.named_parameters())]
        return {
            name: float((own.detach().double() - right.detach()).norm() / right.detach().norm())
            for name, own, right in zip(names, found, exact, strict=True)
        }


def is_wrong(row: KernelRow, precision: str) -> bool:
    """Whether a subject failed, or one of its errors is too large or no number."""
    return bool(row.failed) or not all(error <= TOLERANCE[precision] for error in row.errors.values())


@dataclass
class Bench:
    """The device, the file that grows, the time that is left, and whether anything was wrong."""

    device: torch.device
    out: Path
    command: str
    deadline: float
    size: Size
    content: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, Ceilings] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    def __post_init__(self) -> None:
        self.stopwatch = make_stopwatch(self.device, cold=False)
        self.content |= {"environment": describe_environment(self.device), "size": vars(self.size)}
        self.content |= {"complete": False, "rehearsal": self.size == REHEARSAL}

    def save(self) -> None:
        save(self.out, self.command, self.content)

    def add(self, section: str, cell: object) -> None:
        self.content.setdefault(section, []).append(cell)
        self.save()
        free_memory(self.device)

    def has_time(self, section: str, cell: dict[str, Any], seconds: float) -> bool:
        """Whether ``seconds`` are left for a cell; if not, it is noted as skipped."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.content.setdefault("skipped", []).append({"section": section, **cell})
        return False

    def peak(self, precision: str) -> Ceilings:
        """The ceilings in ``precision``, measured when they are first asked for."""
        if precision not in self.peaks:
            with backend_state(precision):
                found = measure_ceilings(self.stopwatch, DTYPES[precision], quick=self.size == REHEARSAL)
            self.peaks[precision] = found
            self.add("ceilings", {"precision": precision, **vars(found)})
            print(f"{precision}: {found.flops_per_s / 1e12:.0f} TFLOP/s, {found.bytes_per_s / 1e12:.2f} TB/s")
        return self.peaks[precision]

    def layers(self, jobs: Sequence[Job]) -> None:
        """Cells of the layers' sections, as far as the time goes."""
        for job in jobs:
            self._layer(tiny(job, self.size) if self.size == REHEARSAL else job)

    def _layer(self, job: Job) -> None:
        what = {"shape": job.shape, "batch": self.size.batch, "precision": job.precision}
        if not self.has_time(job.section, what, job.seconds):
            return
        peak = self.peak(job.precision)
        begin, before = time.monotonic(), tiles.chosen()
        with backend_state(job.precision), compile_state():
            rows = self._measured(job, peak)
        new = {str(key): vars(tile) for key, tile in tiles.chosen().items() if key not in before}
        cell = KernelCell(job.shape, self.size.batch, job.precision, rows, time.monotonic() - begin, new)
        self.wrong += sum(is_wrong(row, job.precision) for row in rows)
        print(f"{job.section} {job.shape} {job.precision}")
        print(*map(told, rows), sep="\n", flush=True)
        self.lines.append(digest(job.section, cell))
        self.add(job.section, cell)

    def _measured(self, job: Job, peak: Ceilings) -> list[KernelRow]:
        """A row for each subject: times of interleaved rounds, errors, share of the roofline; or why there are none."""
        rows: list[KernelRow] = []
        ready: list[tuple[Prepared, KernelRow]] = []
        for subject in job.subjects:
            row = KernelRow(subject=subject.name, variant=subject.variant, algorithm=subject.algorithm)
            rows.append(row)
            try:
                prepared = Prepared(job.shape, subject, job.precision, self.device, self.size)
                row.errors = prepared.errors()
            except Exception as problem:  # noqa: BLE001 - one subject's failure must not cost the others' numbers
                row.failed = describe_failure(problem, self.device).reason
                continue
            ready.append((prepared, row))
        for _, (prepared, row), phase in itertools.product(range(self.size.rounds), ready, PHASES):
            row.device_s.setdefault(phase, []).append(prepared.device_s(phase, self.stopwatch))
            row.host_s.setdefault(phase, []).append(prepared.host_s(phase, self.stopwatch))
        for prepared, row in ready:
            row.roofline = self._roofline(job, prepared.subject.variant, peak, row.device_s)
        return rows

    def _roofline(self, job: Job, variant: str, peak: Ceilings, seconds: dict[str, list[float]]) -> dict[str, float]:
        """The share of what the ceilings allow that the median round reaches, by phase."""
        side, batch = job.shape.side, self.size.batch
        counts = count(spec_of(job.shape, variant), side, side, batch=batch, precision=job.precision)
        return {
            phase: peak.roofline_fraction(call_work(counts, batch, phase), statistics.median(values))
            for phase, values in seconds.items()
        }

    def network(self, name: str, side: int, classes: int) -> None:
        """Training steps in bf16, channels-last, as CUDA graphs; the subjects take turns."""
        what = {"model": name, "batch": self.size.batch, "precision": "bf16", "groups": 4}
        if not self.has_time("networks", what, 60):
            return
        with backend_state("bf16"):
            rows = self._network_rows(name, side, classes)
        self.wrong += sum(bool(row.failed) for row in rows)
        steps = [f"{row.subject} {row.failed or f'{1e3 * statistics.median(row.step_s):.2f}'}" for row in rows]
        self.lines.append(f"{name} ms a step: {', '.join(steps)}")
        self.add("networks", {**what, "rows": rows})

    def _network_rows(self, name: str, side: int, classes: int) -> list[NetworkRow]:
        batch = self.size.batch
        x = random_input((batch, 3, side, side), self.device, torch.bfloat16, "nhwc", seed=0)
        labels = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(0)).to(self.device)
        rows: list[NetworkRow] = []
        cells: list[tuple[Cell, NetworkRow]] = []
        for variant, algorithm in (("standard", "stock"), ("gc", "stock"), ("bgc", "two_conv"), ("gc", "triton"),
                                   ("bgc", "triton")):  # fmt: skip
            row = NetworkRow(f"{variant} {algorithm}")
            rows.append(row)
            try:
                model = build_model(name)
                if variant != "standard":
                    model = convert(model, variant, 4, init="scratch", algorithm=algorithm).model
                model = model.to(device=self.device, dtype=torch.bfloat16, memory_format=torch.channels_last)
                mode = "graph" if self.device.type == "cuda" else "eager"
                cells.append((NetworkWorkload(model, x, mode, labels=labels).cell("train_step"), row))
            except Exception as problem:  # noqa: BLE001 - the other networks are to be measured all the same
                row.failed = describe_failure(problem, self.device).reason
        for _, (cell, row) in itertools.product(range(3), cells):
            row.step_s += self.stopwatch.sample(cell, self.size.steps)
        return rows


def micros(seconds: dict[str, list[float]], phase: str) -> float:
    """Microseconds of the median round."""
    return 1e6 * statistics.median(seconds[phase])


def told(row: KernelRow) -> str:
    """A subject's figures, or why there are none."""
    if row.failed:
        return f"  {row.subject:<32} {row.failed}"
    parts = [
        f"{phase} {micros(row.device_s, phase):8.1f} us ({row.roofline[phase]:.2f} of roofline, "
        f"host {micros(row.host_s, phase):.0f})"
        for phase in PHASES
    ]
    return f"  {row.subject:<32} {' '.join(parts)}  worst error {max(row.errors.values()):.1e}"


def digest(section: str, cell: KernelCell) -> str:
    """One line a cell: the fastest stock subject of each variant and our kernels, forward and backward."""
    shape, rows = cell.shape, [row for row in cell.rows if not row.failed]
    parts = []
    for variant, ours in (("standard", False), ("gc", False), ("bgc", False), ("gc", True), ("bgc", True)):
        mine = [row for row in rows if row.variant == variant and (row.algorithm == "triton") is ours]
        if mine:
            best = min(mine, key=lambda row: micros(row.device_s, "fwd_bwd"))
            parts.append(f"{best.subject.removesuffix(' nhwc')} {micros(best.device_s, 'fwd_bwd'):.0f}")
    failed = f", {len(cell.rows) - len(rows)} failed" if len(rows) < len(cell.rows) else ""
    worst = max((error for row in rows for error in row.errors.values()), default=float("nan"))
    what = f"{section} {shape.n}-{shape.m} {shape.kernel}x{shape.kernel}/{shape.stride} {shape.side}px N={shape.groups}"
    return f"{what} {cell.precision}: {', '.join(parts)} us, error {worst:.0e}{failed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/kernels-cuda.json"))
    parser.add_argument("--sections", default=None, help="of table4, resnet50, networks, compiled (default: all)")
    parser.add_argument("--quick", action="store_true", help="table4 and resnet50 alone, and a part of their cells")
    parser.add_argument("--seconds", type=float, default=480, help="begin no cell that would end after so long")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: does it run? Implies --quick")
    options = parser.parse_args()
    quick = options.quick or options.rehearse
    sections = options.sections.split(",") if options.sections else SECTIONS[:2] if quick else SECTIONS
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--sections {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    if not (options.rehearse or torch.cuda.is_available()):
        print("benchmarks.kernels_cuda: no CUDA device here; --rehearse tries the script on a CPU")
        return DeviceError.exit_code
    device = CPU if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    command = "python -m benchmarks.kernels_cuda" + (" --quick" if options.quick else "")
    command += f" --sections {options.sections}" if options.sections else ""
    size = REHEARSAL if options.rehearse else Size()
    with current(device):
        bench = Bench(device, options.out, command, time.monotonic() + options.seconds, size)
        bench.layers([job for job in layer_jobs(quick) if job.section in sections])
        if "networks" in sections:
            bench.network("resnet50", 224, 1000)
            bench.network("wrn_28_10", 32, 10)
        bench.layers([job for job in COMPILED_JOBS if job.section in sections])
    bench.content |= {"complete": True}
    bench.save()
    print(*bench.lines, sep="\n")
    if bench.wrong:
        print(f"{bench.wrong} subjects failed or are wrong")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
