"""The operators behind bgc.py and gc.py, for one kernel (A) or two (A, B), differentiable any number of times.

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
from bgcbench.kernels.common import Geometry, empty_nhwc, launchable

_OPTIONS = "int[] stride, int[] padding, int groups, bool tf32"
_NO_GRADIENTS = (None,) * 4  # of these options


def _backend(*tensors: Tensor) -> Any:
    """The module that takes these tensors, whose shapes fit: the kernels' launches, or stock convolutions."""
    if not launchable(*tensors):
        return stock
    from bgcbench.kernels import implicit

    return implicit


def _one_or_all(gradients: Sequence[Tensor]) -> Any:
    return gradients[0] if len(gradients) == 1 else tuple(gradients)


class Operators:
    """f, d and w for ``count`` kernels, registered as bgcbench::NAME, NAME_input_grad and NAME_weight_grads.

    ``rest`` are the operators' arguments after x (of d: dy): the kernels, then of f the bias or None, of d the size of
    x, then stride, padding, groups and tf32.
    """

    def __init__(self, name: str, count: int) -> None:
        self.count = count
        kernels = ", ".join(("Tensor weight", "Tensor weight_mean")[:count])
        gradients = "Tensor" if count == 1 else "(Tensor, Tensor)"
        self.f, self.d, self.w = (
            torch.library.custom_op(f"bgcbench::{name}{suffix}", compute, mutates_args=(), schema=schema)
            for suffix, compute, schema in (
                ("", self._f, f"(Tensor x, {kernels}, Tensor? bias, {_OPTIONS}) -> Tensor"),
                ("_input_grad", self._d, f"(Tensor dy, {kernels}, SymInt[] size, {_OPTIONS}) -> Tensor"),
                ("_weight_grads", self._w, f"(Tensor x, Tensor dy, int[] kernel, {_OPTIONS}) -> {gradients}"),
            )
        )
        self.f.register_fake(self._fake_f)
        self.d.register_fake(self._fake_d)
        self.w.register_fake(self._fake_w)
        self.f.register_autograd(self._f_backward, setup_context=self._keep_kernels)
        self.d.register_autograd(self._d_backward, setup_context=self._keep_kernels)
        self.w.register_autograd(self._w_backward, setup_context=self._keep_inputs)
        operators = torch.ops.bgcbench
        register_flop_formula(getattr(operators, name))(self._flops_of_f)
        register_flop_formula(getattr(operators, f"{name}_input_grad"))(self._flops_of_d)
        register_flop_formula(getattr(operators, f"{name}_weight_grads"))(self._flops_of_w)

    def _f(self, x: Tensor, *rest: Any) -> Tensor:
        weights, (bias, stride, padding, groups, tf32) = rest[: self.count], rest[self.count :]
        geometry = Geometry.of(x.shape, weights[0].shape, stride, padding, groups)
        y: Tensor = _backend(x, *weights).forward(x, weights, bias, geometry, tf32)
        return y

    def _d(self, dy: Tensor, *rest: Any) -> Tensor:
        weights, (size, stride, padding, groups, tf32) = rest[: self.count], rest[self.count :]
        geometry = Geometry.of_gradient(dy.shape, weights[0].shape, size, stride, padding, groups)
        dx: Tensor = _backend(dy, *weights).input_gradient(dy, weights, geometry, tf32)
        return dx

    def _w(self, x: Tensor, dy: Tensor, kernel: Any, stride: Any, padding: Any, groups: int, tf32: bool) -> Any:
        geometry = Geometry.of(x.shape, (dy.shape[1], x.shape[1] // groups, *kernel), stride, padding, groups)
        return _one_or_all(_backend(x, dy).weight_gradients(x, dy, self.count > 1, geometry, tf32))

    def _fake_f(self, x: Tensor, *rest: Any) -> Tensor:
        stride, padding, groups, _ = rest[-4:]
        geometry = Geometry.of(x.shape, rest[0].shape, stride, padding, groups)
        return empty_nhwc(x, (geometry.batch, geometry.out_channels, *geometry.out_size))

    def _fake_d(self, dy: Tensor, *rest: Any) -> Tensor:
        size, _, _, groups, _ = rest[-5:]
        return empty_nhwc(dy, (dy.shape[0], rest[0].shape[1] * groups, *size))

    def _fake_w(self, x: Tensor, dy: Tensor, kernel: Any, stride: Any, padding: Any, groups: int, tf32: bool) -> Any:
        shape = (dy.shape[1], x.shape[1] // groups, *kernel)
        return _one_or_all([empty_nhwc(x, shape) for _ in range(self.count)])

    def _keep_kernels(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[: 1 + self.count])
        ctx.options = inputs[-4:]

    def _keep_inputs(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, dy, _, *ctx.options = inputs
        ctx.save_for_backward(x, dy)

    def _f_backward(self, ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        need_x, *need_weights, need_bias = ctx.needs_input_grad[: 2 + self.count]
        dx = self.d(dy, *weights, x.shape[2:], *ctx.options) if need_x else None
        dweights = self._wanted_of_w(need_weights, x, dy, weights[0].shape[2:], *ctx.options)
        return dx, *dweights, dy.sum((0, 2, 3)) if need_bias else None, *_NO_GRADIENTS

    def _d_backward(self, ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
        dy, *weights = ctx.saved_tensors
        need_dy, *need_weights = ctx.needs_input_grad[: 1 + self.count]
        ddy = self.f(ddx, *weights, None, *ctx.options) if need_dy else None
        dweights = self._wanted_of_w(need_weights, ddx, dy, weights[0].shape[2:], *ctx.options)
        return ddy, *dweights, None, *_NO_GRADIENTS

    def _w_backward(self, ctx: Any, *ddweights: Tensor) -> tuple[Any, ...]:
        x, dy = ctx.saved_tensors
        need_x, need_dy, *_ = ctx.needs_input_grad
        dx = self.d(dy, *ddweights, x.shape[2:], *ctx.options) if need_x else None
        ddy = self.f(x, *ddweights, None, *ctx.options) if need_dy else None
        return dx, ddy, None, *_NO_GRADIENTS

    def _wanted_of_w(self, wanted: Sequence[bool], *arguments: Any) -> list[Tensor | None]:
        if not any(wanted):
            return [None] * self.count
        found = self.w(*arguments)
        gradients = (found,) if self.count == 1 else found
        return [gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True)]

    # For each kernel the multiply-adds of the grouped convolution, two operations each; taps on padding count.

    def _flops_of_f(self, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
        stride, padding, groups, _tf32 = rest[-4:]
        return 2 * self.count * Geometry.of(x, weight, stride, padding, groups).macs

    def _flops_of_d(self, dy: Any, weight: Any, *rest: Any, **_: Any) -> int:
        size, stride, padding, groups, _tf32 = rest[-5:]
        return 2 * self.count * Geometry.of_gradient(dy, weight, size, stride, padding, groups).macs

    def _flops_of_w(self, x: Any, dy: Any, kernel: Any, *rest: Any, **_: Any) -> int:
        stride, padding, groups, _tf32 = rest
        return 2 * self.count * Geometry.of(x, (dy[1], x[1] // groups, *kernel), stride, padding, groups).macs
