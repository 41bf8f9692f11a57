"""Balanced group convolution as one operator: y^k = A^k x^k + B^k xbar + bias, differentiable any number of times.

    f(x, A, B, bias) = y        d(dy, A, B) = dx        w(x, dy) = dA, dB

f is linear in x and in (A, B), so the three are closed under differentiation: d's own derivatives are f and w, and
w's are d and f. They are opaque to torch.compile and torch.export, and count their FLOPs by formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from bgcbench.kernels import stock
from bgcbench.kernels.common import Geometry, as_pair, autocast, empty_nhwc, launchable, tf32_allowed

_SAME = "int[] stride, int[] padding, int groups, bool tf32"


def bgc_conv2d(
    x: Tensor,
    weight: Tensor,
    weight_mean: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """y^k = A^k x^k + B^k xbar + bias with xbar = (1/N) sum_k x^k; ``weight`` = A, ``weight_mean`` = B.

    x: (B, n, H, W); A, B: (m, n/N, kh, kw); bias: (m,). Returns (B, m, H', W'), channels-last in memory whatever the
    layout of x. Runs Triton kernels where :func:`bgcbench.kernels.usable` says so and stock convolutions elsewhere.
    Autocast's dtype and PyTorch's TF32 setting for convolutions are those of the call, in the backward pass too.
    """
    x, weight, weight_mean, bias = autocast(x, weight, weight_mean, bias)  # type: ignore[assignment]
    y: Tensor = forward(x, weight, weight_mean, bias, as_pair(stride), as_pair(padding), groups, tf32_allowed())
    return y


@torch.library.custom_op(
    "bgcbench::bgc_conv2d",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor weight_mean, Tensor? bias, {_SAME}) -> Tensor",
)
def forward(
    x: Tensor,
    weight: Tensor,
    weight_mean: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> Tensor:
    geometry = Geometry.of(x.shape, weight.shape, stride, padding, groups)
    if not launchable(x, weight, weight_mean):
        return stock.forward(x, weight, weight_mean, bias, geometry)
    from bgcbench.kernels import implicit

    return implicit.forward(x, weight, weight_mean, bias, geometry, tf32)


@torch.library.custom_op(
    "bgcbench::bgc_conv2d_input_grad",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, Tensor weight_mean, SymInt[] size, {_SAME}) -> Tensor",
)
def input_grad(
    dy: Tensor,
    weight: Tensor,
    weight_mean: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> Tensor:
    geometry = Geometry.of_gradient(dy.shape, weight.shape, size, stride, padding, groups)
    if not launchable(dy, weight, weight_mean):
        return stock.input_gradient(dy, weight, weight_mean, geometry)
    from bgcbench.kernels import implicit

    return implicit.input_gradient(dy, weight, weight_mean, geometry, tf32)


@torch.library.custom_op(
    "bgcbench::bgc_conv2d_weight_grads",
    mutates_args=(),
    schema=f"(Tensor x, Tensor dy, int[] kernel, {_SAME}) -> (Tensor, Tensor)",
)
def weight_grads(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    geometry = Geometry.of(x.shape, (dy.shape[1], x.shape[1] // groups, *kernel), stride, padding, groups)
    if launchable(x, dy):
        from bgcbench.kernels import implicit

        own, shared = implicit.weight_gradients(x, dy, True, geometry, tf32)
    else:
        own, shared = stock.weight_gradients(x, dy, True, geometry)
    return own, shared


@forward.register_fake
def _(x: Tensor, weight: Tensor, weight_mean: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, groups, _ = rest
    geometry = Geometry.of(x.shape, weight.shape, stride, padding, groups)
    return empty_nhwc(x, (geometry.batch, geometry.out_channels, *geometry.out_size))


@input_grad.register_fake
def _(dy: Tensor, weight: Tensor, weight_mean: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return empty_nhwc(dy, (dy.shape[0], weight.shape[1] * rest[2], *size))


@weight_grads.register_fake
def _(x: Tensor, dy: Tensor, kernel: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (dy.shape[1], x.shape[1] // rest[2], *kernel)
    return empty_nhwc(x, shape), empty_nhwc(x, shape)


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_mean, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, weight_mean)


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, weight_mean = ctx.saved_tensors
    need_x, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
    dx = input_grad(dy, weight, weight_mean, x.shape[2:], *ctx.rest) if need_x else None
    da, db = weight_grads(x, dy, weight.shape[2:], *ctx.rest) if need_a or need_b else (None, None)
    dbias = dy.sum((0, 2, 3)) if need_bias else None
    return dx, da if need_a else None, db if need_b else None, dbias, None, None, None, None


def _keep_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, weight_mean, _, *ctx.rest = inputs
    ctx.save_for_backward(dy, weight, weight_mean)


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, weight, weight_mean = ctx.saved_tensors
    need_dy, need_a, need_b, *_ = ctx.needs_input_grad
    ddy = forward(ddx, weight, weight_mean, None, *ctx.rest) if need_dy else None
    da, db = weight_grads(ddx, dy, weight.shape[2:], *ctx.rest) if need_a or need_b else (None, None)
    return ddy, da if need_a else None, db if need_b else None, None, None, None, None, None


def _keep_weight_grads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dy, _, *ctx.rest = inputs
    ctx.save_for_backward(x, dy)


def _weight_grads_backward(ctx: Any, dda: Tensor, ddb: Tensor) -> tuple[Any, ...]:
    x, dy = ctx.saved_tensors
    need_x, need_dy, *_ = ctx.needs_input_grad
    dx = input_grad(dy, dda, ddb, x.shape[2:], *ctx.rest) if need_x else None
    ddy = forward(x, dda, ddb, None, *ctx.rest) if need_dy else None
    return dx, ddy, None, None, None, None, None


forward.register_autograd(_forward_backward, setup_context=_keep_forward)
input_grad.register_autograd(_input_grad_backward, setup_context=_keep_input_grad)
weight_grads.register_autograd(_weight_grads_backward, setup_context=_keep_weight_grads)


# Two multiply-adds for each of the grouped convolution's, two operations each; taps on padding count.
@register_flop_formula(torch.ops.bgcbench.bgc_conv2d)
def _flops(x: Any, weight: Any, weight_mean: Any, bias: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 4 * Geometry.of(x, weight, stride, padding, groups).macs


@register_flop_formula(torch.ops.bgcbench.bgc_conv2d_input_grad)
def _input_flops(dy: Any, weight: Any, weight_mean: Any, size: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 4 * Geometry.of_gradient(dy, weight, size, stride, padding, groups).macs


@register_flop_formula(torch.ops.bgcbench.bgc_conv2d_weight_grads)
def _weight_flops(x: Any, dy: Any, kernel: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 4 * Geometry.of(x, (dy[1], x[1] // groups, *kernel), stride, padding, groups).macs
