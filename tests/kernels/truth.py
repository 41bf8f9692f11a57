"""Cases for the kernels, and their errors against float64 sums of the dense kernel.

Run as a script under TRITON_INTERPRET=1 it prints the errors of all small cases as JSON, a line a case: the
interpreter is chosen when the kernels are imported, so it needs a process of its own.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from bgcbench.convs.bgc_algorithms import dense_kernel
from bgcbench.convs.blocks import block_diagonal
from bgcbench.kernels import common, usable
from bgcbench.kernels.bgc import bgc_conv2d
from bgcbench.kernels.gc import gc_conv2d

# Relative error in norm of a product of few hundred terms, against float64 on the rounded operands.
TOLERANCE = {"fp32": 3e-6, "tf32": 2e-3, "fp16": 1e-3, "bf16": 1e-2}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One convolution; sizes as in bgcbench.kernels.common.Geometry. layout: nhwc, nchw or strided (neither)."""

    batch: int
    n: int
    m: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    bias: bool = True
    variant: str = "bgc"
    layout: str = "nhwc"
    precision: str = "fp32"
    large: bool = False  # addressed as if it had 2**31 numbers
    second: bool = False  # second derivatives too

    def __str__(self) -> str:
        return "-".join(str(value).replace(" ", "") for value in asdict(self).values())


# The interpreter's tiles are 16 x 16 x 16: widths above 16 take several, and none of them is a multiple of 16.
SMALL = (
    Case(2, 6, 8, (3, 3), (3, 3), (1, 1), (1, 1), 2, large=True),
    Case(2, 6, 8, (3, 2), (3, 3), (1, 1), (1, 1), 2, precision="fp16", layout="nchw"),
    Case(2, 4, 6, (3, 2), (3, 3), (2, 1), (1, 1), 2, bias=False, second=True),
    Case(2, 4, 6, (2, 2), (1, 1), (1, 1), (0, 0), 2, bias=False, variant="gc", second=True),
    Case(3, 4, 4, (5, 3), (3, 3), (2, 2), (1, 1), 2, bias=False, layout="nchw"),
    Case(1, 8, 4, (4, 4), (3, 3), (2, 2), (0, 1), 4, precision="fp16"),
    Case(2, 4, 6, (1, 2), (3, 3), (1, 1), (2, 2), 2, layout="strided"),
    Case(2, 4, 4, (3, 2), (3, 2), (2, 1), (2, 1), 2, bias=False),
    Case(17, 8, 8, (2, 2), (1, 1), (1, 1), (0, 0), 4, layout="strided"),
    Case(17, 36, 10, (1, 2), (1, 1), (1, 1), (0, 0), 2, precision="fp16"),
    Case(3, 10, 42, (2, 2), (1, 1), (1, 1), (0, 0), 2),
    Case(2, 6, 6, (3, 5), (1, 1), (2, 2), (0, 0), 3),
    Case(2, 4, 4, (2, 2), (1, 1), (2, 2), (1, 1), 2),
    Case(1, 64, 32, (2, 1), (1, 1), (1, 1), (0, 0), 2),
    Case(1, 2, 2, (1, 1), (1, 1), (1, 1), (0, 0), 2),
    Case(1, 1, 1, (2, 2), (3, 3), (1, 1), (1, 1), 1),
    Case(0, 4, 6, (3, 3), (3, 3), (1, 1), (1, 1), 2),
    Case(2, 6, 8, (3, 3), (3, 3), (2, 2), (1, 1), 2, variant="gc"),
    Case(17, 8, 36, (2, 1), (1, 1), (1, 1), (0, 0), 2, variant="gc", precision="fp16", layout="nchw"),
    Case(2, 16, 8, (2, 2), (1, 1), (1, 1), (0, 0), 2, precision="bf16"),
)


def operands(case: Case, device: torch.device | str) -> tuple[list[Tensor | None], Tensor]:
    """x, A, B (None for GC), bias (or None) and an upstream gradient, in the case's precision and layout.

    x lies between images of NaN, so that whoever reads outside of it shows.
    """
    dtype = DTYPES[case.precision]
    generator = torch.Generator().manual_seed(case.n * 100 + case.m)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    x = torch.full((case.batch + 2, *case.size, case.n), torch.nan, dtype=dtype, device=device).permute(0, 3, 1, 2)
    x = x[1:-1].copy_(random(case.batch, case.n, *case.size))
    if case.layout == "nchw":
        x = x.contiguous()
    elif case.layout == "strided":
        x = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    per_group = case.n // case.groups
    weights = [random(case.m, per_group, *case.kernel) for _ in range(2 if case.variant == "bgc" else 1)]
    bias = random(case.m) if case.bias else None
    out = [
        (s + 2 * p - k) // d + 1 for s, p, k, d in zip(case.size, case.padding, case.kernel, case.stride, strict=True)
    ]
    return [x, weights[0], weights[1] if len(weights) > 1 else None, bias], random(case.batch, case.m, *out)


def reference(case: Case, x: Tensor, a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """One standard convolution with the dense kernel."""
    dense = block_diagonal(a, case.groups) if b is None else dense_kernel(a, b, case.groups)
    return F.conv2d(x, dense, bias, case.stride, case.padding)


def operator(case: Case, x: Tensor, a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """The public function of the case's variant."""
    if b is None:
        return gc_conv2d(x, a, bias, case.stride, case.padding, case.groups)
    return bgc_conv2d(x, a, b, bias, case.stride, case.padding, case.groups)


@contextmanager
def poisoned(large: bool) -> Iterator[None]:
    """Results begin as NaN, so that an element that no program writes shows; 64-bit addresses for all if ``large``."""
    from bgcbench.kernels import implicit

    def empty(*arguments: Any) -> Tensor:
        return common.empty_nhwc(*arguments).fill_(torch.nan)

    threshold = 0 if large else implicit.LARGE
    with mock.patch.object(implicit, "empty_nhwc", empty), mock.patch.object(implicit, "LARGE", threshold):
        yield


def difference(own: Tensor, exact: Tensor) -> float:
    """Relative in norm; absolute where the norm is 0 (an empty batch); infinite for NaN."""
    norm = float(exact.norm()) or 1.0
    error = float((own.double() - exact).norm()) / norm
    return error if math.isfinite(error) else math.inf


def derivatives(case: Case, function: Any, tensors: list[Tensor | None], upstream: Tensor) -> dict[str, Tensor]:
    """y and every gradient, by name; of a case with ``second`` also those of sum(gradient^2), the upstream's too."""
    named = {name: t for name, t in zip(("x", "A", "B", "bias"), tensors, strict=True) if t is not None}
    leaves = list(named.values())
    y = function(case, *tensors)
    first = torch.autograd.grad(y, leaves, upstream, create_graph=case.second)
    found = {"y": y, **dict(zip(named, first, strict=True))}
    if case.second:
        energy = torch.stack([gradient.square().sum() for gradient in first]).sum()
        found |= zip((f"second {name}" for name in (*named, "dy")), torch.autograd.grad(energy, [*leaves, upstream]),
                     strict=True)  # fmt: skip
    return {name: value.detach() for name, value in found.items()}


def errors(case: Case, device: torch.device | str) -> dict[str, float]:
    """Of y and of every gradient, by name, against float64; and whether the output's strides are as promised."""
    tensors, upstream = operands(case, device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    with poisoned(case.large):
        found = derivatives(case, operator, leaves, upstream.requires_grad_(case.second))
    true = derivatives(case, reference, exact, upstream.detach().double().requires_grad_(case.second))
    strides = found["y"].stride() != common.empty_nhwc(found["y"], found["y"].shape).stride()
    return {name: difference(found[name], right) for name, right in true.items()} | {"strides": float(strides)}


def main() -> None:
    from bgcbench.kernels import implicit

    try:
        from triton.runtime import interpreter

        # Every addition in 64 bits beside the 32-bit one, to find overflows, takes half of the time.
        interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
        # A third of the rest: what stays is made ready anew at each call of a function within a kernel.
        made_ready = functools.cache(interpreter._patch_lang)
        rewritten = interpreter.InterpretedFunction.rewrite

        def call(function: Any, *given: Any, **named: Any) -> Any:
            made_ready(function.fn)
            return rewritten(function)(*given, **named)

        interpreter.InterpretedFunction.__call__ = call
    except (ImportError, AttributeError, TypeError):
        pass
    for number, case in enumerate(SMALL):
        x, a, *_ = operands(case, "cpu")[0]
        assert x is not None
        assert a is not None
        assert implicit.INTERPRETED
        assert usable(x, a, case.stride, case.padding, (1, 1), case.groups)
        with mock.patch.object(implicit, "UPCAST", case.precision == "bf16"):
            print(json.dumps({"case": number, **errors(case, "cpu")}), flush=True)


if __name__ == "__main__":
    main()
