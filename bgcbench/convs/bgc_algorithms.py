"""The exact algorithms of a balanced group convolution (eq. 3.1): y^k = A^k x^k + B^k xbar + bias^k, on tensors.

They compute the same map and differ in what they call and in what they read and write. Their gradients are written out
by hand, because autograd, taking them apart operation by operation, stores the gradient of the mean N times over (once
a group), adds that to the gradient of x in another pass, and copies what it cannot view:

    dx^k = A^k* dy^k + (1/N) sum_l B^l* dy^l        dA^k = dy^k (*) x^k        dB^k = dy^k (*) xbar

(B* is the transposed convolution, dy (*) x the correlation that gives a kernel's gradient.) Where something records the
single operations (see followed.py), and for second derivatives, the same maps are composed of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bgcbench import kernels
from bgcbench.convs.blocks import block_diagonal
from bgcbench.convs.followed import is_followed, is_symbolic
from bgcbench.convs.layouts import format_of, is_channels_last, like_layout_of


class Geometry(NamedTuple):
    """How the kernels move over x, and the number of groups N."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: bool, groups: int, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Those of :meth:`convolve`'s x, weight and bias that are wanted, None in the place of the others."""
        if not any(wanted):
            return None, None, None
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            dy, x, weight, [len(weight)] if bias else None, self.stride, self.padding, self.dilation, False, (0, 0),
            groups, wanted,
        )  # fmt: skip
        return found


# ------------------------------------------------------------------------------------------------ groups and their mean


def strided(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """The positions of x (B, n, H, W) that a 1x1 kernel without padding sees; the others need not even be averaged."""
    if stride == (1, 1):
        return x
    return like_layout_of(x, x[..., :: stride[0], :: stride[1]])


def by_groups(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """A view of x (..., n, H, W) with an axis for the groups, and which one: x's layout decides where it is."""
    if is_channels_last(x):
        # On the NHWC view sums run over one contiguous axis pair, and their result is channels_last again.
        return x.permute(0, 2, 3, 1).unflatten(-1, (groups, -1)), -2  # (B, H, W, N, n/N)
    return x.unflatten(-3, (groups, -1)), -4  # (..., N, n/N, H, W)


def group_mean(x: Tensor, groups: int) -> Tensor:
    """xbar = (1/N) sum_k x^k over contiguous groups. x: (..., n, H, W); returns (..., n/N, H, W), x's layout."""
    grouped, axis = by_groups(x, groups)
    mean = grouped.mean(axis)
    return mean.permute(0, 3, 1, 2) if axis == -2 else mean


def group_sum(x: Tensor, groups: int) -> Tensor:
    """sum_k x^k. x: (..., n, H, W); returns (..., n/N, H, W), x's layout."""
    grouped, axis = by_groups(x, groups)
    # To add two is several times faster than a sum over an axis, but autograd's way back through it is longer.
    total = torch.add(*grouped.unbind(axis)) if groups == 2 and not torch.is_grad_enabled() else grouped.sum(axis)
    return total.permute(0, 3, 1, 2) if axis == -2 else total


def mean_and_kernel(x: Tensor, b: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """xbar and B; or sum_k x^k and B/N, which are as good and cheaper.

    x: (..., n, H, W); b: (m, n/N, kh, kw). In half precision a sum could be too large, and B/N too small.
    """
    if is_summed(x):
        return group_sum(x, groups), b / groups
    return group_mean(x, groups), b


def is_summed(x: Tensor) -> bool:
    """Whether the 1/N of the mean goes into its kernel."""
    return not is_symbolic(x) and x.dtype in (torch.float32, torch.float64) and not kernels.autocast_on(x.device.type)


def add_to_groups(x: Tensor, shared: Tensor, groups: int, factor: float) -> Tensor:
    """x^k + factor * shared for every group, in the memory of x. x: (B, n, H, W); shared: (B, n/N, H, W)."""
    grouped, axis = by_groups(x, groups)
    if axis == -2:
        shared = shared.permute(0, 2, 3, 1)
    grouped.add_(shared.unsqueeze(axis), alpha=factor)
    return x


def append_to_groups(x: Tensor, mean: Tensor, groups: int) -> Tensor:
    """[x^1 ; xbar ; x^2 ; xbar ; ...]: every group followed by the same maps.

    x: (..., n, H, W); mean: (..., n/N, H, W); returns (..., 2n, H, W) in x's layout.
    """
    grouped, axis = by_groups(x, groups)
    if axis == -2:
        rows = mean.permute(0, 2, 3, 1).unsqueeze(-2).expand_as(grouped)
        return torch.cat([grouped, rows], dim=-1).flatten(-2).permute(0, 3, 1, 2)
    return torch.cat([grouped, mean.unsqueeze(-4).expand_as(grouped)], dim=-3).flatten(-4, -3)


# ------------------------------------------------------------------------------------------------------------ gradients


class _Map(NamedTuple):
    """A map with its gradients written out. All three functions take its constants first.

    compute: the inputs to y and what else ``gradients`` needs. composed: the inputs to y, in differentiable operations.
    gradients: dy, the inputs, what ``compute`` kept and which gradients are wanted, to those (others None).
    """

    compute: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    composed: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor | None, ...]]


def _by_hand(map_: _Map, constants: tuple[Any, ...], *inputs: Tensor | None) -> Tensor:
    """y of the map: composed where something records it, else computed in place, with its own gradients if needed."""
    if is_followed(inputs[0]):
        return map_.composed(*constants, *inputs)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        y: Tensor = _ByHand.apply(map_, constants, *inputs)
        return y
    if not torch.is_grad_enabled():
        return map_.compute(*constants, *inputs)[0]
    with torch.no_grad():  # compute works in place
        return map_.compute(*constants, *inputs)[0]


class _ByHand(torch.autograd.Function):
    """Runs a :class:`_Map`; its second derivatives are those of the composed operations."""

    @staticmethod
    def forward(ctx: Any, map_: _Map, constants: tuple[Any, ...], *inputs: Tensor | None) -> Tensor:
        y, kept = map_.compute(*constants, *inputs)
        ctx.map_, ctx.constants, ctx.count = map_, constants, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        saved = ctx.saved_tensors  # asked for once: a checkpoint gives each back once
        inputs, kept = saved[: ctx.count], saved[ctx.count :]
        wanted = ctx.needs_input_grad[2:]
        # In the types of the forward pass, whatever is on by now.
        with torch.autocast(dy.device.type, enabled=False) if kernels.autocast_on(dy.device.type) else nullcontext():
            if not torch.is_grad_enabled():
                return None, None, *ctx.map_.gradients(*ctx.constants, dy, inputs, kept, wanted)
            y = ctx.map_.composed(*ctx.constants, *inputs)  # create_graph=True
            leaves = [one for one, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(y, leaves, dy, create_graph=True))
            return None, None, *(next(found) if is_wanted else None for is_wanted in wanted)


# --------------------------------------------------------------------------------------------------------- two branches


def two_branches(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, geometry: Geometry, split: bool) -> Tensor:
    """A convolution of x plus a convolution of xbar.

    x: (B, n, H, W); a, b: (m, n/N, kh, kw); bias: (m,); returns (B, m, H', W'). split: whether that of x is taken group
    by group, as N large calls; else it is a grouped one.
    """
    return _by_hand(_TWO_BRANCHES, (geometry, split), x, a, b, bias)


def _two_branches(
    geometry: Geometry, split: bool, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    groups = geometry.groups
    if split:
        mean, kernel = mean_and_kernel(x, b, groups)
        y = geometry.convolve(mean, kernel, bias, 1)
        for part, group, block in zip(*_chunks(groups, y, x), a.chunk(groups), strict=True):
            part.add_(geometry.convolve(group, block, None, 1))
    else:
        # First what takes products, which hide the time in which x comes from memory; then the sum finds it nearer.
        y = geometry.convolve(x, a, None, groups)
        mean, kernel = mean_and_kernel(x, b, groups)
        y += geometry.convolve(mean, kernel, bias, 1)
    return y, (mean, kernel)


def _two_branches_composed(
    geometry: Geometry, split: bool, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    mean, kernel = mean_and_kernel(x, b, geometry.groups)
    shared = geometry.convolve(mean, kernel, bias, 1)
    if not split:
        return geometry.convolve(x, a, None, geometry.groups) + shared
    groups, blocks = x.unflatten(-3, (geometry.groups, -1)), a.unflatten(0, (geometry.groups, -1))
    parts = [geometry.convolve(groups.select(-4, k), blocks[k], None, 1) for k in range(geometry.groups)]
    return torch.cat(parts, dim=-3) + shared


def _two_branches_gradients(
    geometry: Geometry, split: bool, dy: Tensor, inputs: tuple[Any, ...], kept: tuple[Tensor, Tensor],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, a, _, bias = inputs
    mean, kernel = kept
    groups = geometry.groups
    of_x, of_a, of_b, of_bias = wanted
    if split and (of_x or of_a):
        (dys, xs), blocks = _chunks(groups, dy, x), a.chunk(groups)
        found: list[Any] = [
            geometry.gradients(dys[k], xs[k], blocks[k], False, 1, (of_x, of_a, False)) for k in range(groups)
        ]
        dx = like_layout_of(x, torch.cat([one[0] for one in found], dim=1)) if of_x else None
        da = torch.cat([one[1] for one in found]) if of_a else None
    else:
        dx, da, _ = geometry.gradients(dy, x, a, False, groups, (of_x, of_a, False))
    dmean, db, dbias = geometry.gradients(dy, mean, kernel, bias is not None, 1, (of_x, of_b, of_bias))
    if dx is not None and dmean is not None:
        dx = add_to_groups(dx, dmean, groups, 1.0 if is_summed(x) else 1 / groups)
    return dx, da, _of_kernel(db, x, groups), dbias


_TWO_BRANCHES = _Map(_two_branches, _two_branches_composed, _two_branches_gradients)


def _chunks(groups: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.chunk(groups, dim=1) for tensor in tensors]


def _of_kernel(gradient: Tensor | None, x: Tensor, groups: int) -> Tensor | None:
    """The gradient of B from that of the kernel that :func:`mean_and_kernel` made of it."""
    return gradient / groups if gradient is not None and is_summed(x) else gradient


# --------------------------------------------------------------------------------------------------------- one grouped


def concatenated(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """One grouped convolution of [x^k ; xbar] with [A^k B^k]. Shapes as for :func:`two_branches`."""
    groups = geometry.groups
    both = _by_hand(_APPENDED, (groups,), x)
    kernel = torch.cat([a, b / groups if is_summed(x) else b], dim=1)  # (m, 2n/N, kh, kw)
    return geometry.convolve(both, kernel, bias, groups)


def _appended_composed(groups: int, x: Tensor) -> Tensor:
    mean = group_sum(x, groups) if is_summed(x) else group_mean(x, groups)
    return append_to_groups(x, mean, groups)


def _appended(groups: int, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _appended_composed(groups, x), ()


def _appended_gradients(
    groups: int, dy: Tensor, inputs: tuple[Tensor], kept: tuple[()], wanted: tuple[bool]
) -> tuple[Tensor | None]:
    if not wanted[0]:
        return (None,)
    (x,) = inputs
    grouped, axis = by_groups(dy, groups)
    own, mean = grouped.chunk(2, dim=-1 if axis == -2 else -3)
    dx = torch.add(own, mean.sum(axis, keepdim=True), alpha=1.0 if is_summed(x) else 1 / groups)
    return (dx.flatten(-2).permute(0, 3, 1, 2) if axis == -2 else dx.flatten(-4, -3),)


_APPENDED = _Map(_appended, _appended_composed, _appended_gradients)

# ------------------------------------------------------------------------------------------------------------ one dense


def dense(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """One standard convolution with the folded kernel. Shapes as for :func:`two_branches`."""
    layout = format_of(x)
    folded = _by_hand(_FOLDED, (geometry.groups, layout), a, b)
    # A convolution is slow at a single pixel. What is recorded must be right for more pixels, too.
    if not is_followed(x) and x.shape[2:] == a.shape[2:] == (1, 1) and geometry.padding == (0, 0):
        return F.linear(x.flatten(1), folded.flatten(1), bias)[..., None, None]
    return geometry.convolve(x, folded, bias, 1)


def dense_kernel(a: Tensor, b: Tensor, groups: int) -> Tensor:
    """D[k, l] = [k = l] A^k + B^k / N (eq. 3.1 written as one convolution).

    a, b: (m, n/N, kh, kw); returns (m, n, kh, kw).
    """
    return block_diagonal(a, groups) + (b / groups).repeat(1, groups, 1, 1)


def _folded_composed(groups: int, layout: torch.memory_format, a: Tensor, b: Tensor) -> Tensor:
    return dense_kernel(a, b, groups).contiguous(memory_format=layout)


def _folded(groups: int, layout: torch.memory_format, a: Tensor, b: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs, size, *positions = a.shape
    folded = torch.empty((outputs, groups * size, *positions), dtype=a.dtype, device=a.device, memory_format=layout)
    blocks = _blocks(folded, groups)
    torch.div(b.unflatten(0, (groups, -1)).unsqueeze(2).expand_as(blocks), groups, out=blocks)
    diagonal = blocks.diagonal(dim1=0, dim2=2)  # (m/N, n/N, kh, kw, N)
    diagonal += a.unflatten(0, (groups, -1)).movedim(0, -1)
    return folded, ()


def _folded_gradients(
    groups: int, layout: torch.memory_format, dy: Tensor, inputs: tuple[Tensor, Tensor], kept: tuple[()],
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    blocks = _blocks(dy, groups)
    da = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1) if wanted[0] else None
    db = blocks.sum(2).flatten(0, 1) / groups if wanted[1] else None
    return da, db


_FOLDED = _Map(_folded, _folded_composed, _folded_gradients)


def _blocks(kernel: Tensor, groups: int) -> Tensor:
    """A view of a dense kernel (m, n, kh, kw) of any layout as blocks D[k, l]: (N, m/N, N, n/N, kh, kw)."""
    blocks: Tensor = kernel.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    return blocks


# -------------------------------------------------------------------------------------------------------- 1x1, matrices


def matrix_products(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The layer with 1x1 kernels as products of matrices.

    x: (B, n, H, W); a, b: (m, n/N, 1, 1); bias: (m,); returns (B, m, H, W) in x's layout.
    """
    return _by_hand(_PRODUCTS, (groups,), x, a, b, bias)


def _products_composed(groups: int, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    mean, kernel = mean_and_kernel(x, b, groups)
    y = F.conv2d(mean, kernel, bias)
    blocks: Tensor = a.flatten(1).unflatten(0, (groups, -1))  # (N, m/N, n/N)
    if is_channels_last(x):
        own = _rows(x, groups).transpose(0, 1) @ blocks.mT  # (N, R, m/N)
        return y + _from_rows(own.transpose(0, 1).flatten(1), *x.shape[2:])
    own = blocks @ x.unflatten(-3, (groups, -1)).flatten(-2)  # (..., N, m/N, HW)
    total: Tensor = y + own.reshape_as(y)
    return total


def _products(groups: int, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    images, _, height, width = x.shape
    outputs, size = a.shape[:2]
    mean, kernel = mean_and_kernel(x, b, groups)
    if not _is_rows(x):
        y = kernel.flatten(1).expand(images, -1, -1) @ mean.flatten(2)  # (B, m, HW)
        if bias is not None:
            y += bias[:, None]
        sums = y.view(images * groups, outputs // groups, height * width)
        sums.baddbmm_(_kernels(a, groups, images), x.reshape(images * groups, size, height * width))
        return y.view(images, outputs, height, width), (mean, kernel)
    if height * width == 1:
        y = F.linear(mean.flatten(1), kernel.flatten(1), bias)
    else:  # the convolution is the faster product here
        y = F.conv2d(mean, kernel, bias).permute(0, 2, 3, 1).reshape(-1, outputs)
    columns = y.view(-1, groups, outputs // groups).unbind(1)
    for own, group, block in zip(columns, _rows(x, groups).unbind(1), a.flatten(1).chunk(groups), strict=True):
        own.addmm_(group, block.T)  # added straight into its columns of the result
    return _from_rows(y, height, width), (mean, kernel)


def _products_gradients(
    groups: int, dy: Tensor, inputs: tuple[Any, ...], kept: tuple[Tensor, Tensor], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    x, a, _, _ = inputs
    mean, kernel = kept[0], kept[1].flatten(1)
    images, _, height, width = x.shape
    outputs, size = a.shape[:2]
    of_x, of_a, of_b, of_bias = wanted
    factor = 1.0 if is_summed(x) else 1 / groups
    dx = da = db = None
    if _is_rows(x):
        rows, grouped = _rows(dy, 1)[:, 0], _rows(dy, groups)  # (R, m), (R, N, m/N)
        own = _rows(x, groups)
        if of_b:
            db = rows.T @ _rows(mean, 1)[:, 0]
        if of_a:
            da = torch.cat([part.T @ group for part, group in zip(grouped.unbind(1), own.unbind(1), strict=True)])
        if of_x:
            shared = rows @ kernel * factor if factor != 1 else rows @ kernel
            dx = shared[:, None].expand(-1, groups, -1).contiguous()
            blocks = a.flatten(1).chunk(groups)
            for part, group, block in zip(dx.unbind(1), grouped.unbind(1), blocks, strict=True):
                part.addmm_(group, block)
            dx = _from_rows(dx.flatten(1), height, width)
    else:
        maps = dy.reshape(images, outputs, height * width)
        grouped = maps.reshape(images * groups, outputs // groups, height * width)
        if of_b:
            db = (maps @ mean.flatten(2).mT).sum(0)
        if of_a:
            own = x.reshape(images * groups, size, height * width)
            da = (grouped @ own.mT).view(images, outputs, size).sum(0)
        if of_x:
            dx = (_kernels(a, groups, images).mT @ grouped).view(x.shape)
            shared = kernel.T.expand(images, -1, -1) @ maps
            dx = add_to_groups(dx, shared.view(images, size, height, width), groups, factor)
    return (
        dx,
        da.reshape(a.shape) if da is not None else None,
        _of_kernel(db.reshape(a.shape), x, groups) if db is not None else None,
        dy.sum((0, 2, 3)) if of_bias else None,
    )


_PRODUCTS = _Map(_products, _products_composed, _products_gradients)


def _is_rows(x: Tensor) -> bool:
    """Whether the channels of a position lie side by side."""
    return is_channels_last(x) or x.shape[2:] == (1, 1)


def _rows(x: Tensor, groups: int) -> Tensor:
    """x (B, n, H, W) as a matrix of positions: (R, N, n/N); a view where the channels lie side by side."""
    return x.permute(0, 2, 3, 1).reshape(-1, groups, x.shape[1] // groups)


def _from_rows(rows: Tensor, height: int, width: int) -> Tensor:
    """(R, m) as (B, m, H, W), channels-last."""
    return rows.view(-1, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _kernels(a: Tensor, groups: int, images: int) -> Tensor:
    """A's blocks for every group of every image: (B N, m/N, n/N)."""
    return a.reshape(1, groups, a.shape[0] // groups, -1).expand(images, -1, -1, -1).flatten(0, 1)
