"""Our kernels for group and balanced group convolution against stock ones, on a CUDA device. Under 10 minutes.

    python -m benchmarks.kernels_cuda [--out results/kernels-cuda.json] [--quick] [--seconds 570]

ceilings: large matrix products and a copy. table4: 128 x 1024 x 7 x 7 -> 1024, 3x3 with padding 1, N = 2, 4, 8, 16 in
bf16, tf32 and fp32: stock group convolution in both layouts, the stock forms of BGC, and our kernels for both; forward,
and forward with backward. resnet50: the 1x1 and 3x3 layers of ResNet-50 at batch 128, N = 4 and 8. networks: training
steps of ResNet-50 and WRN-28-10, standard and with N = 4. compiled: torch.compile's max-autotune of two forms of BGC.

Device times are those of a CUDA graph of 21 calls that rotate over 3 inputs, host times those of enqueuing the same
calls one by one; subjects take turns, the median of the rounds is printed and every round is saved. Each subject's
result is compared with float64 first. Work is counted by the variant's formula, so a form that computes more has a
smaller share of the roofline. The file is written anew after every cell; what --seconds leaves no time for is listed
as skipped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import save
from bgcbench.convert import convert
from bgcbench.convs import build_conv
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.convs.gc import GroupConv2d
from bgcbench.kernels import tiles
from bgcbench.kernels.bgc import bgc_conv2d
from bgcbench.kernels.gc import gc_conv2d
from bgcbench.measure.ceilings import Ceilings, measure_ceilings
from bgcbench.measure.counts import call_work, count
from bgcbench.measure.device import (
    DTYPES,
    backend_state,
    compile_state,
    describe_failure,
    free_memory,
    make_stopwatch,
    random_input,
)
from bgcbench.measure.environment import describe_environment
from bgcbench.measure.workload import Cell, NetworkWorkload
from bgcbench.models import build_model
from bgcbench.specs import VARIANTS, ConvSpec

BATCH, SETS, CALLS, ROUNDS, STEPS = 128, 3, 21, 7, 10
PHASES = ("fwd", "fwd_bwd")
PRECISIONS = ("bf16", "tf32", "fp32")
# (n, m, side of the input, side of the kernel, stride) of ResNet-50's blocks.
RESNET50 = (
    (64, 64, 56, 3, 1), (128, 128, 56, 3, 2), (128, 128, 28, 3, 1), (256, 256, 28, 3, 2), (256, 256, 14, 3, 1),
    (512, 512, 14, 3, 2), (512, 512, 7, 3, 1), (256, 64, 56, 1, 1), (64, 256, 56, 1, 1), (512, 128, 28, 1, 1),
    (128, 512, 28, 1, 1), (1024, 256, 14, 1, 1), (256, 1024, 14, 1, 1), (2048, 512, 7, 1, 1), (512, 2048, 7, 1, 1),
)  # fmt: skip
QUICK_RESNET50 = (RESNET50[4], RESNET50[6], RESNET50[11])


@dataclass(frozen=True)
class Subject:
    """One way to compute a layer: variant, form ('kernels' are ours) and layout."""

    variant: str
    form: str
    layout: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.variant} {self.form} {self.layout}" + (" max-autotune" if self.compiled else "")


GC_STOCK = [Subject("gc", "stock", layout) for layout in ("nchw", "nhwc")]
BGC_STOCK = [Subject("bgc", form, layout) for layout in ("nchw", "nhwc") for form in ("two_conv", "concat", "dense")]
OURS = [Subject("gc", "kernels", "nhwc"), Subject("bgc", "kernels", "nhwc")]
COMPILED = [Subject("bgc", form, "nhwc", compiled=True) for form in ("two_conv", "concat")]


@dataclass(frozen=True)
class Shape:
    """A square layer with padding kernel // 2 and no bias: what one cell measures."""

    n: int
    m: int
    side: int
    kernel: int
    stride: int
    groups: int

    def spec(self, variant: str, form: str = "auto") -> ConvSpec:
        return ConvSpec(
            variant, self.n, self.m, self.kernel, self.stride, self.kernel // 2, groups=self.groups, bias=False,
            algorithm=form,
        )  # fmt: skip


def table4_shapes(quick: bool) -> list[Shape]:
    return [Shape(1024, 1024, 7, 3, 1, groups) for groups in ((4, 16) if quick else (2, 4, 8, 16))]


def resnet50_shapes(quick: bool) -> list[Shape]:
    layers = QUICK_RESNET50 if quick else RESNET50
    return [Shape(*layer, groups) for layer in layers for groups in ((4,) if quick else (4, 8))]


@dataclass
class Report:
    """The file that grows, and the time that is left."""

    out: Path
    command: str
    deadline: float
    content: dict[str, Any] = field(default_factory=dict)

    def add(self, section: str, cell: dict[str, Any]) -> None:
        self.content.setdefault(section, []).append(cell)
        save(self.out, self.command, self.content)

    def has_time(self, section: str, cell: dict[str, Any], seconds: float) -> bool:
        """Whether ``seconds`` are left for a cell; if not, it is noted as skipped."""
        if time.monotonic() + seconds < self.deadline:
            return True
        self.content.setdefault("skipped", []).append({"section": section, **cell})
        return False


def use_kernels(model: nn.Module) -> nn.Module:
    """Let every BGC and GC layer of ``model`` (itself, if it is one) run our kernels, whatever its algorithm says."""
    for module in model.modules():
        if isinstance(module, BalancedGroupConv2d) and module.weight_mean is not None:
            module.forward = functools.partial(_balanced, module)  # type: ignore[method-assign]
        elif type(module) is GroupConv2d:
            module.forward = functools.partial(_grouped, module)  # type: ignore[method-assign]
    return model


def _balanced(layer: BalancedGroupConv2d, x: Tensor) -> Tensor:
    assert layer.weight_mean is not None
    return bgc_conv2d(x, layer.weight, layer.weight_mean, layer.bias, layer.stride, layer.padding, layer.groups)


def _grouped(layer: GroupConv2d, x: Tensor) -> Tensor:
    return gc_conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.groups)


def default_form(variant: str) -> str:
    """The first algorithm of a variant: never one that is chosen by measuring."""
    forms = VARIANTS[variant].algorithms
    return forms[0] if len(forms) > 1 else "auto"


def make_layer(shape: Shape, subject: Subject) -> VariantConv2d:
    """The layer of ``subject`` on the CPU in fp32; the same weights for all subjects of a variant."""
    torch.manual_seed(0)
    form = default_form(subject.variant) if subject.form in ("kernels", "stock") else subject.form
    return build_conv(shape.spec(subject.variant, form))


class Prepared:
    """A subject on the device with its inputs and, for each phase, a graph of CALLS calls."""

    def __init__(self, shape: Shape, subject: Subject, precision: str, device: torch.device) -> None:
        self.subject = subject
        self.dtype = DTYPES[precision]
        layout = torch.channels_last if subject.layout == "nhwc" else torch.contiguous_format
        self.layer = make_layer(shape, subject).to(device=device, dtype=self.dtype, memory_format=layout)
        self.call: Callable[[Tensor], Tensor] = self.layer
        if subject.form == "kernels":
            use_kernels(self.layer)
        if subject.compiled:
            self.call = torch.compile(self.layer, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")
        size = (BATCH, shape.n, shape.side, shape.side)
        drawn = torch.Generator(device).manual_seed(0)  # on the device: the CPU would take minutes for all of them
        self.inputs = [
            torch.randn(size, generator=drawn, device=device)
            .to(dtype=self.dtype, memory_format=layout)
            .requires_grad_()
            for _ in range(SETS)
        ]
        with torch.no_grad():
            y = self.layer(self.inputs[0])
        self.upstream = [torch.randn_like(y) for _ in range(SETS)]
        self.leaves = list(self.layer.parameters())
        self.graphs = {phase: self._captured(phase) for phase in PHASES}

    def once(self, phase: str, number: int) -> object:
        x = self.inputs[number % SETS]
        if phase == "fwd":
            with torch.no_grad():
                return self.call(x)
        return torch.autograd.grad(self.call(x), [x, *self.leaves], self.upstream[number % SETS])

    def _captured(self, phase: str) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for number in range(2 * SETS):  # block sizes and algorithms are chosen here
                self.once(phase, number)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(CALLS):
                self.once(phase, number)
        graph.replay()
        return graph

    def device_s(self, phase: str) -> float:
        """Seconds of one call inside the graph."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graphs[phase].replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / CALLS

    def host_s(self, phase: str) -> float:
        """Seconds the host takes to ask for one call."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for number in range(CALLS):
            self.once(phase, number)
        seconds = (time.perf_counter() - begin) / CALLS
        torch.cuda.synchronize()
        return seconds

    def errors(self) -> dict[str, float]:
        """Relative errors in norm of y and all gradients against a float64 convolution with the dense kernel."""
        x, dy = self.inputs[0], self.upstream[0]
        y = self.call(x)
        found = [y, *torch.autograd.grad(y, [x, *self.leaves], dy)]
        exact_layer = make_layer_like(self.layer).double()
        exact_x = x.detach().double().requires_grad_()
        dense = exact_layer.dense_weight()
        exact_y = F.conv2d(exact_x, dense, None, exact_layer.stride, exact_layer.padding)
        exact = [exact_y, *torch.autograd.grad(exact_y, [exact_x, *exact_layer.parameters()], dy.double())]
        names = ["y", "x", *(name for name, _ in self.layer.named_parameters())]
        return {
            name: float((own.detach().double() - right.detach()).norm() / right.detach().norm())
            for name, own, right in zip(names, found, exact, strict=True)
        }


def make_layer_like(layer: VariantConv2d) -> VariantConv2d:
    """A fresh layer with the weights of ``layer``, whose forward may have been replaced."""
    fresh = build_conv(layer.spec).to(device=layer.weight.device, dtype=layer.weight.dtype)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def measure(shape: Shape, subjects: list[Subject], precision: str, device: torch.device, peak: Ceilings) -> list[Any]:
    """A row for each subject: times of interleaved rounds, errors, share of the roofline; or why there are none."""
    rows, ready = [], []
    for subject in subjects:
        row: dict[str, Any] = {"subject": subject.name}
        rows.append(row)
        try:
            prepared = Prepared(shape, subject, precision, device)
            row["errors"] = prepared.errors()
        except Exception as problem:  # noqa: BLE001 - one subject's failure must not cost the others' numbers
            row["failed"] = describe_failure(problem, device).reason
            continue
        ready.append((prepared, row))
    for _, (prepared, row), phase in itertools.product(range(ROUNDS), ready, PHASES):
        row.setdefault("device_s", {}).setdefault(phase, []).append(prepared.device_s(phase))
        row.setdefault("host_s", {}).setdefault(phase, []).append(prepared.host_s(phase))
    for prepared, row in ready:
        row["roofline"] = roofline(shape, prepared.subject.variant, precision, peak, row["device_s"])
    return rows


def roofline(
    shape: Shape, variant: str, precision: str, peak: Ceilings, seconds: dict[str, list[float]]
) -> dict[str, float]:
    """The share of what the ceilings allow that the median round reaches, by phase."""
    counts = count(shape.spec(variant), shape.side, shape.side, batch=BATCH, precision=precision)
    return {
        phase: peak.roofline_fraction(call_work(counts, BATCH, phase), statistics.median(values))
        for phase, values in seconds.items()
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(title)
    for row in rows:
        if "failed" in row:
            print(f"  {row['subject']:<32} {row['failed']}")
            continue
        text = f"  {row['subject']:<32}"
        for phase in PHASES:
            device, host = (1e6 * statistics.median(row[kind][phase]) for kind in ("device_s", "host_s"))
            text += f" {phase} {device:8.1f} us ({row['roofline'][phase]:.2f} of roofline, host {host:.0f})"
        print(f"{text}  worst error {max(row['errors'].values()):.1e}", flush=True)


def layers(report: Report, quick: bool, device: torch.device, peaks: dict[str, Ceilings]) -> None:
    """The sections table4, resnet50 and compiled."""
    jobs: list[tuple[str, Shape, str, list[Subject], float]] = []
    precisions = PRECISIONS[:1] if quick else PRECISIONS
    for precision, shape in itertools.product(precisions, table4_shapes(quick)):
        jobs.append(("table4", shape, precision, [*GC_STOCK, *BGC_STOCK, *OURS], 20))
    small = [Subject("gc", "stock", "nhwc"), Subject("bgc", "two_conv", "nhwc"), Subject("bgc", "dense", "nhwc")]
    jobs += [("resnet50", shape, "bf16", [*small, *OURS], 8) for shape in resnet50_shapes(quick)]
    for section, shape, precision, subjects, seconds in jobs:
        run(report, section, shape, precision, subjects, seconds, device, peaks)


def run(
    report: Report,
    section: str,
    shape: Shape,
    precision: str,
    subjects: list[Subject],
    seconds: float,
    device: torch.device,
    peaks: dict[str, Ceilings],
) -> None:
    """One cell of the layers' sections."""
    cell: dict[str, Any] = {"shape": vars(shape), "batch": BATCH, "precision": precision}
    if not report.has_time(section, cell, seconds):
        return
    begin, before = time.monotonic(), tiles.chosen()
    with backend_state(precision), compile_state():
        cell["rows"] = measure(shape, subjects, precision, device, peaks[precision])
    cell["took_s"] = time.monotonic() - begin
    cell["tiles"] = {str(key): vars(tile) for key, tile in tiles.chosen().items() if key not in before}
    show(f"{section} {shape} {precision}", cell["rows"])
    report.add(section, cell)
    free_memory(device)


def networks(report: Report, device: torch.device) -> None:
    """Training steps at batch 128 in bf16, channels-last, as CUDA graphs; the subjects take turns."""
    for name, side, classes in (("resnet50", 224, 1000), ("wrn_28_10", 32, 10)):
        cell: dict[str, Any] = {"model": name, "batch": BATCH, "precision": "bf16", "groups": 4}
        if not report.has_time("networks", cell, 60):
            continue
        with backend_state("bf16"):
            cell["rows"] = _network_rows(name, side, classes, device)
        print(name, flush=True)
        for row in cell["rows"]:
            result = row.get("failed") or f"{1e3 * statistics.median(row['step_s']):8.2f} ms a step"
            print(f"  {row['subject']:<32} {result}")
        report.add("networks", cell)
        free_memory(device)


def network_subjects() -> Iterator[tuple[str, str | None, str, bool]]:
    """Name, variant (None: standard), form, and whether our kernels run."""
    yield "standard", None, "auto", False
    yield "gc stock", "gc", default_form("gc"), False
    yield "bgc two_conv", "bgc", "two_conv", False
    yield "gc kernels", "gc", default_form("gc"), True
    yield "bgc kernels", "bgc", "two_conv", True


def _network_rows(name: str, side: int, classes: int, device: torch.device) -> list[dict[str, Any]]:
    x = random_input((BATCH, 3, side, side), device, torch.bfloat16, "nhwc", seed=0)
    labels = torch.randint(classes, (BATCH,), generator=torch.Generator().manual_seed(0)).to(device)
    stopwatch = make_stopwatch(device, cold=False)
    rows: list[dict[str, Any]] = []
    cells: list[tuple[Cell, dict[str, Any]]] = []
    for subject, variant, form, ours in network_subjects():
        row: dict[str, Any] = {"subject": subject, "step_s": []}
        rows.append(row)
        try:
            model = build_model(name)
            if variant is not None:
                model = convert(model, variant, 4, init="scratch", algorithm=form).model
            model = model.to(device=device, dtype=torch.bfloat16, memory_format=torch.channels_last)
            work = NetworkWorkload(use_kernels(model) if ours else model, x, "graph", labels=labels)
            cells.append((work.cell("train_step"), row))
        except Exception as problem:  # noqa: BLE001 - the other networks are to be measured all the same
            row["failed"] = describe_failure(problem, device).reason
    for _, (cell, row) in itertools.product(range(3), cells):
        row["step_s"] += stopwatch.sample(cell, STEPS)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/kernels-cuda.json"))
    parser.add_argument("--quick", action="store_true", help="bf16, N = 4 and 16, a few layers, no networks")
    parser.add_argument("--seconds", type=float, default=570, help="start no cell that would end after so long")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.kernels_cuda: no CUDA device here; there is nothing to measure")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    command = "python -m benchmarks.kernels_cuda" + (" --quick" if options.quick else "")
    report = Report(options.out, command, time.monotonic() + options.seconds)
    report.content |= {
        "device": describe_environment(device), "sets": SETS, "calls": CALLS, "rounds": ROUNDS, "steps": STEPS,
    }  # fmt: skip
    stopwatch, peaks = make_stopwatch(device, cold=False), {}
    for precision in PRECISIONS:
        with backend_state(precision):
            peaks[precision] = measure_ceilings(stopwatch, DTYPES[precision])
        report.add("ceilings", {"precision": precision, **vars(peaks[precision])})
        print(f"{precision}: {peaks[precision].flops_per_s / 1e12:.0f} TFLOP/s, "
              f"{peaks[precision].bytes_per_s / 1e12:.2f} TB/s")  # fmt: skip
    layers(report, options.quick, device, peaks)
    if not options.quick:
        networks(report, device)
    for groups in (4, 16):
        run(report, "compiled", Shape(1024, 1024, 7, 3, 1, groups), "bf16", COMPILED, 90, device, peaks)
    save(options.out, command, report.content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
