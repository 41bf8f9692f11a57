"""The operators of bgcbench.kernels: the kernels under triton's interpreter and on a device, stock operations on a CPU.

The truth is always a float64 convolution with the dense kernel.
"""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bgcbench import kernels
from bgcbench.kernels import usable
from bgcbench.kernels.bgc import bgc_conv2d
from bgcbench.kernels.gc import gc_conv2d
from bgcbench.kernels.tiles import Tile, agree, choose, sum_tiles, weight_tiles
from bgcbench.measure.device import backend_state
from tests.conftest import ROOT
from tests.kernels.truth import SMALL, TOLERANCE, Case, difference, errors, operands, operator, reference

BGC = Case(2, 6, 9, (5, 4), (3, 3), (2, 2), (1, 1), 3)
VARIANTS = [BGC, replace(BGC, variant="gc"), replace(BGC, kernel=(1, 1), padding=(0, 0), bias=False)]


def check(found: dict[str, float], case: Case) -> None:
    assert found.pop("strides") == 0
    assert {name: error for name, error in found.items() if error > TOLERANCE[case.precision]} == {}


# The kernels themselves.


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, float]]:
    """The errors of every small case, from one process that has the interpreter."""
    triton = pytest.importorskip("triton")
    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 does not run with numpy 2.4: use an older numpy")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.truth"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(SMALL)), ids=[str(case) for case in SMALL])
def test_the_kernels_compute_the_float64_convolution(interpreted: list[dict[str, float]], number: int) -> None:
    found = dict(interpreted[number])
    assert found.pop("case") == number
    assert set(found) >= {"y", "x", "A", "second dy" if SMALL[number].second else "y"}
    check(found, SMALL[number])


# Shapes that the interpreter is too slow for: several tiles in every direction, ragged everywhere.
LARGE = [
    replace(base, precision=precision)
    for base in (
        Case(128, 256, 256, (7, 7), (3, 3), (1, 1), (1, 1), 4),
        Case(20, 96, 160, (9, 7), (3, 3), (2, 2), (2, 1), 2, layout="nchw"),
        Case(33, 80, 40, (6, 5), (3, 3), (1, 1), (0, 2), 2),
        Case(130, 512, 512, (3, 3), (3, 3), (1, 1), (1, 1), 2, bias=False),
        Case(64, 160, 320, (8, 8), (1, 1), (2, 2), (0, 0), 4, layout="strided"),
        Case(65, 30, 42, (5, 5), (5, 4), (3, 2), (2, 3), 3),
        Case(1, 64, 64, (14, 14), (3, 3), (1, 1), (1, 1), 8, large=True),
        Case(128, 256, 256, (7, 7), (3, 3), (1, 1), (1, 1), 16, variant="gc"),
    )
    for precision in TOLERANCE
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*(c for c in SMALL if c.precision != "bf16"), *LARGE], ids=str)
def test_the_kernels_on_a_device(case: Case) -> None:
    with backend_state(case.precision):
        check(errors(case, "cuda"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_every_candidate_on_a_device(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 8 warps above all: the same loop has been wrong with them in other people's kernels."""
    from bgcbench.kernels import implicit

    seen: set[tuple[str, Tile]] = set()
    for number in range(5):

        def take(kind: str, candidates: list[Tile], *_: Any, number: int = number) -> Tile:
            tile = candidates[min(number, len(candidates) - 1)]
            seen.add((kind, tile))
            return tile

        monkeypatch.setattr(implicit, "_select", take)
        with backend_state(case.precision):
            check(errors(case, "cuda"), case)
    assert len({kind for kind, _ in seen}) == (4 if case.variant == "bgc" else 3)


@pytest.mark.gpu
def test_a_result_is_the_same_every_time_and_in_a_graph() -> None:
    case = Case(64, 128, 128, (7, 7), (3, 3), (1, 1), (1, 1), 4, precision="bf16")
    tensors, upstream = operands(case, "cuda")
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]

    def call() -> list[Tensor]:
        y = operator(case, *leaves)
        # Detached: what is kept would keep the nodes of this stream, which a capture on another one must not meet.
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    first = call()  # the tuner runs here
    for _ in range(3):
        assert all(torch.equal(own, other) for own, other in zip(call(), first, strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(own, other) for own, other in zip(captured, first, strict=True))


# The operators on a CPU, where they run stock convolutions.


@pytest.mark.parametrize("case", [c for c in SMALL if c.precision == "fp32"], ids=str)
def test_the_operators_run_without_the_kernels(case: Case) -> None:
    tensors, _ = operands(case, "cpu")
    x, a, *_ = tensors
    assert x is not None
    assert a is not None
    assert not usable(x, a, case.stride, case.padding, (1, 1), case.groups)
    check(errors(case, "cpu"), case)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_first_and_second_derivatives(case: Case) -> None:
    tensors, _ = operands(replace(case, batch=1, size=(3, 3), n=3, m=3), "cpu")
    leaves = [t.detach().double().requires_grad_() for t in tensors if t is not None]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        weights = list(rest[: 1 if case.variant == "gc" else 2]) + [None] * (case.variant == "gc")
        return operator(case, x, *weights, rest[-1] if case.bias else None)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("case", [*VARIANTS, replace(BGC, layout="nchw")], ids=str)
def test_the_registration(case: Case) -> None:
    (x, a, b, bias), dy = operands(case, "cpu")
    assert x is not None
    assert a is not None
    rest = (list(case.stride), list(case.padding), case.groups, False)
    weights = (a,) if b is None else (a, b)
    ops = torch.ops.bgcbench
    name = "bgc_conv2d" if b is not None else "gc_conv2d"
    calls = {
        getattr(ops, name): (x, *weights, bias, *rest),
        getattr(ops, f"{name}_input_grad"): (dy, *weights, list(case.size), *rest),
        getattr(ops, f"{name}_weight_grads"): (x, dy, list(case.kernel), *rest),
    }
    for op, arguments in calls.items():
        given = [t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in arguments]
        torch.library.opcheck(op.default, tuple(given))


class Layer(nn.Module):
    """Nothing but the operator, behind the question that a layer asks first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        (_, a, b, bias), _ = operands(case, "cpu")
        assert a is not None
        self.case = case
        self.a = nn.Parameter(a)
        self.b = None if b is None else nn.Parameter(b)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        case = self.case
        if usable(x, self.a, case.stride, case.padding, (1, 1), case.groups):
            return operator(case, x, self.a, self.b, self.bias)
        return 1.0 * operator(case, x, self.a, self.b, self.bias)


@pytest.mark.parametrize("case", VARIANTS[:2], ids=str)
def test_compiling_breaks_no_graph(case: Case) -> None:
    torch._dynamo.reset()
    layer = Layer(case)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    (x, *_), dy = operands(case, "cpu")
    assert x is not None
    for call in (layer, compiled):
        layer.zero_grad()
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        y.backward(dy)
        found = [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]
        if call is layer:
            expected = found
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right)


def test_compiling_for_any_batch_makes_one_graph() -> None:
    torch._dynamo.reset()
    layer = Layer(BGC)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        (x, *_), _ = operands(replace(BGC, batch=batch), "cpu")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("case", VARIANTS[:2], ids=str)
def test_exporting_keeps_the_operator(case: Case) -> None:
    layer = Layer(case)
    (x, *_), _ = operands(case, "cpu")
    assert x is not None
    exported = torch.export.export(layer, (x,))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum(f"bgcbench.{case.variant}_conv2d" in name for name in names) == 1
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_a_convolution(dtype: torch.dtype) -> None:
    for case in VARIANTS[:2]:
        (x, a, b, bias), _ = operands(case, "cpu")
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, a, b, bias)]
        with torch.autocast("cpu", dtype=dtype):
            y = operator(case, *leaves)  # type: ignore[arg-type]
            doubles = operator(case, *[None if t is None else t.detach().double() for t in leaves])  # type: ignore[arg-type]
        assert y.dtype == dtype
        assert doubles.dtype == torch.float64
        given = [t for t in leaves if t is not None]
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), given))
        exact = reference(case, *[None if t is None else t.detach().double() for t in leaves])  # type: ignore[arg-type]
        assert difference(y.detach(), exact) < 2e-2


@pytest.mark.parametrize(("case", "factor"), [(VARIANTS[0], 4), (VARIANTS[1], 2)], ids=str)
def test_flops_are_the_formulas(case: Case, factor: int) -> None:
    tensors, dy = operands(case, "cpu")
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with FlopCounterMode(display=False) as counter:
        y = operator(case, *leaves)  # type: ignore[arg-type]
        forward = counter.get_total_flops()
        torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
    macs = case.batch * math.prod(y.shape[2:]) * math.prod(case.kernel) * case.m * case.n // case.groups
    assert forward == factor * macs
    assert counter.get_total_flops() == 3 * forward


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    (x, a, b, _), dy = operands(BGC, "cpu")
    assert a is not None
    assert b is not None
    for wanted in ("x", "a", "b"):
        leaves = {"x": x, "a": a, "b": b}
        leaves[wanted] = leaves[wanted].detach().requires_grad_()  # type: ignore[union-attr]
        y = bgc_conv2d(leaves["x"], leaves["a"], leaves["b"], None, BGC.stride, BGC.padding, BGC.groups)
        with FlopCounterMode(display=False) as counter:
            y.backward(dy)
        (name,) = (str(op) for op in counter.get_flop_counts()["Global"])
        assert name.endswith("input_grad" if wanted == "x" else "weight_grads")


def test_gradients_that_are_not_contiguous() -> None:
    (x, a, b, bias), _ = operands(BGC, "cpu")
    leaves = [t.detach().requires_grad_() for t in (x, a, b, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    own = torch.autograd.grad(operator(BGC, *leaves).sum(), leaves)
    right = torch.autograd.grad(reference(BGC, *exact).sum(), exact)
    assert all(difference(o, r) < 1e-6 for o, r in zip(own, right, strict=True))


# What the kernels are asked for, and with which tiles.


@pytest.mark.parametrize(
    "change",
    [
        {"dilation": (2, 2)},
        {"stride": (0, 1)},
        {"groups": 5},
        {"padding": (-1, 0)},
        {"x": torch.zeros(2, 8, 4, 4, dtype=torch.float64)},
        {"x": torch.zeros(8, 4, 4)},
        {"x": torch.zeros(2, 8, 0, 4)},
        {"x": torch.zeros(2, 8, 1, 1)},
        {"x": torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)},
        {"x": torch.zeros(2, 8, 4, 4, device="meta")},
    ],
    ids=["dilation", "stride", "groups", "padding", "float64", "unbatched", "no rows", "too small", "types", "meta"],
)
def test_what_the_kernels_cannot_do_they_refuse(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.empty(8, 4, 3, 3), "groups": 2}
    monkeypatch.setattr("bgcbench.kernels.device_ready", lambda kind, index: kind != "meta")
    assert usable(**given)  # type: ignore[arg-type]
    assert not usable(**{**given, **change})  # type: ignore[arg-type]


def test_asking_imports_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in Path(kernels.__file__).parent.glob("*.py"):
        imports = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in imports for alias in node.names}
        assert file.stem in ("implicit", "programs") or not names & {"triton", "implicit", "programs"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("implicit", "programs"):
        monkeypatch.setitem(sys.modules, f"bgcbench.kernels.{name}", None)  # so that importing it raises
        monkeypatch.delattr(kernels, name, raising=False)
    x, weight = torch.ones(1, 4, 3, 3), torch.ones(4, 2, 3, 3)
    assert not usable(x, weight, groups=2)
    bgc_conv2d(x, weight, weight, groups=2)


@pytest.mark.parametrize("numbers", ["half", "tf32", "ieee"])
def test_the_first_candidate_has_four_warps(numbers: str) -> None:
    for batch in (1, 20, 64, 128):
        for channels in (1, 10, 16, 40, 64, 80, 128, 512):
            groups = [sum_tiles(numbers, kind, batch, channels, channels) for kind in ("forward", "shared", "input")]
            for candidates in (*groups, weight_tiles(numbers, batch, channels, channels)):
                assert candidates[0].warps == 4
                assert len(set(candidates)) == len(candidates) <= 5
                assert all(min(tile.m, tile.n, tile.k) >= 16 for tile in candidates)


class Refused(Exception):
    """What a launch raises where a tile has no room."""


def tune(monkeypatch: pytest.MonkeyPatch, times: dict[Tile, float], run: Callable[[Tile], list[Tensor]]) -> Tile:
    monkeypatch.setattr("bgcbench.kernels.tiles._chosen", {})
    monkeypatch.setattr("bgcbench.kernels.tiles.may_measure", lambda device: True)
    monkeypatch.setattr("bgcbench.kernels.tiles._time", lambda run, tile: times[tile])
    return choose("key", list(times), run, torch.device("cpu"), "half", (Refused,))


def test_the_tuner_takes_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast, wrong, large = Tile(64, 64, 64), Tile(128, 64, 64), Tile(128, 128, 64, 8), Tile(256, 128, 64, 8)

    def run(tile: Tile) -> list[Tensor]:
        if tile == large:
            raise Refused
        return [torch.full((4,), math.nan if tile == wrong else 1.0)]

    assert tune(monkeypatch, {slow: 3.0, fast: 2.0, wrong: 1.0, large: 0.5}, run) == fast
    right = Tile(128, 128, 32, 8)
    assert tune(monkeypatch, {slow: 3.0, fast: 2.0, right: 1.0}, run) == right
    with pytest.raises(Refused):
        tune(monkeypatch, {large: 1.0}, run)


def test_agreement_is_relative_and_nan_never_agrees() -> None:
    one = [torch.ones(3) * 1e-3]
    assert agree([one[0] * 1.001], one, 1e-2)
    assert not agree([one[0] * 1.1], one, 1e-2)
    assert not agree([one[0] * math.nan], one, 1e-2)
    assert not agree(one, [one[0] * math.inf], 1e-2)
    assert agree([torch.zeros(2)], [torch.zeros(2)], 1e-2)


def test_one_group_is_the_standard_convolution() -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    torch.testing.assert_close(gc_conv2d(x, weight, None, 1, 1, 1), F.conv2d(x, weight, None, 1, 1))
    torch.testing.assert_close(bgc_conv2d(x, weight, weight, None, 1, 1), 2 * F.conv2d(x, weight, None, 1, 1))
