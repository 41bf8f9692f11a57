"""Group convolution as one operator: y^k = A^k x^k + bias, differentiable any number of times.

    f(x, A, bias) = y        d(dy, A) = dx        w(x, dy) = dA

The three are closed under differentiation, as those of bgc.py are, and run the same kernels without the mean's part.
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


def gc_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """y^k = A^k x^k + bias; ``weight`` = A: what ``conv2d(x, weight, bias, stride, padding, groups=N)`` computes.

    x: (B, n, H, W); A: (m, n/N, kh, kw); bias: (m,). Returns (B, m, H', W'), channels-last in memory whatever the
    layout of x. Runs Triton kernels where :func:`bgcbench.kernels.usable` says so and stock convolutions elsewhere.
    Autocast's dtype and PyTorch's TF32 setting for convolutions are those of the call, in the backward pass too.
    """
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    y: Tensor = forward(x, weight, bias, as_pair(stride), as_pair(padding), groups, tf32_allowed())
    return y


@torch.library.custom_op(
    "bgcbench::gc_conv2d",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, {_SAME}) -> Tensor",
)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> Tensor:
    geometry = Geometry.of(x.shape, weight.shape, stride, padding, groups)
    if not launchable(x, weight):
        return stock.forward(x, weight, None, bias, geometry)
    from bgcbench.kernels import implicit

    return implicit.forward(x, weight, None, bias, geometry, tf32)


@torch.library.custom_op(
    "bgcbench::gc_conv2d_input_grad",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor weight, SymInt[] size, {_SAME}) -> Tensor",
)
def input_grad(
    dy: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> Tensor:
    geometry = Geometry.of_gradient(dy.shape, weight.shape, size, stride, padding, groups)
    if not launchable(dy, weight):
        return stock.input_gradient(dy, weight, None, geometry)
    from bgcbench.kernels import implicit

    return implicit.input_gradient(dy, weight, None, geometry, tf32)


@torch.library.custom_op(
    "bgcbench::gc_conv2d_weight_grads",
    mutates_args=(),
    schema=f"(Tensor x, Tensor dy, int[] kernel, {_SAME}) -> Tensor",
)
def weight_grads(
    x: Tensor,
    dy: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    tf32: bool,
) -> Tensor:
    geometry = Geometry.of(x.shape, (dy.shape[1], x.shape[1] // groups, *kernel), stride, padding, groups)
    if not launchable(x, dy):
        return stock.weight_gradients(x, dy, False, geometry)[0]
    from bgcbench.kernels import implicit

    return implicit.weight_gradients(x, dy, False, geometry, tf32)[0]


@forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, groups, _ = rest
    geometry = Geometry.of(x.shape, weight.shape, stride, padding, groups)
    return empty_nhwc(x, (geometry.batch, geometry.out_channels, *geometry.out_size))


@input_grad.register_fake
def _(dy: Tensor, weight: Tensor, size: Sequence[int], *rest: Any) -> Tensor:
    return empty_nhwc(dy, (dy.shape[0], weight.shape[1] * rest[2], *size))


@weight_grads.register_fake
def _(x: Tensor, dy: Tensor, kernel: Sequence[int], *rest: Any) -> Tensor:
    return empty_nhwc(x, (dy.shape[1], x.shape[1] // rest[2], *kernel))


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    dx = input_grad(dy, weight, x.shape[2:], *ctx.rest) if need_x else None
    dweight = weight_grads(x, dy, weight.shape[2:], *ctx.rest) if need_weight else None
    dbias = dy.sum((0, 2, 3)) if need_bias else None
    return dx, dweight, dbias, None, None, None, None


def _keep_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, _, *ctx.rest = inputs
    ctx.save_for_backward(dy, weight)


def _input_grad_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, weight = ctx.saved_tensors
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ddy = forward(ddx, weight, None, *ctx.rest) if need_dy else None
    dweight = weight_grads(ddx, dy, weight.shape[2:], *ctx.rest) if need_weight else None
    return ddy, dweight, None, None, None, None, None


def _keep_weight_grads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, _, *ctx.rest = inputs
    ctx.save_for_backward(x, dy)


def _weight_grads_backward(ctx: Any, ddweight: Tensor) -> tuple[Any, ...]:
    x, dy = ctx.saved_tensors
    need_x, need_dy, *_ = ctx.needs_input_grad
    dx = input_grad(dy, ddweight, x.shape[2:], *ctx.rest) if need_x else None
    ddy = forward(x, ddweight, None, *ctx.rest) if need_dy else None
    return dx, ddy, None, None, None, None, None


forward.register_autograd(_forward_backward, setup_context=_keep_forward)
input_grad.register_autograd(_input_grad_backward, setup_context=_keep_input_grad)
weight_grads.register_autograd(_weight_grads_backward, setup_context=_keep_weight_grads)


# A multiply-add is two operations; taps on padding count.
@register_flop_formula(torch.ops.bgcbench.gc_conv2d)
def _flops(x: Any, weight: Any, bias: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 2 * Geometry.of(x, weight, stride, padding, groups).macs


@register_flop_formula(torch.ops.bgcbench.gc_conv2d_input_grad)
def _input_flops(dy: Any, weight: Any, size: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 2 * Geometry.of_gradient(dy, weight, size, stride, padding, groups).macs


@register_flop_formula(torch.ops.bgcbench.gc_conv2d_weight_grads)
def _weight_flops(x: Any, dy: Any, kernel: Any, *rest: Any, **_: Any) -> int:
    stride, padding, groups, _tf32 = rest
    return 2 * Geometry.of(x, (dy[1], x[1] // groups, *kernel), stride, padding, groups).macs
