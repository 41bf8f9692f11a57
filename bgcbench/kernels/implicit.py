"""Launch the kernels: define each sum, select its tile, allocate its result.

Every function takes and returns tensors (B, C, H, W) that are channels-last in memory, and fits the geometry it is
given; an empty batch launches nothing. Whatever is used of a tensor is copied into channels-last where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bgcbench.kernels import programs, tiles
from bgcbench.kernels.common import Geometry, channels_last, empty_nhwc
from bgcbench.kernels.tiles import Tile, cdiv

INTERPRETED: bool = programs.INTERPRETED
# Products of fp32 numbers, whatever the tiles' dtype. For checks only: triton's interpreter multiplies the bit
# patterns of bf16 numbers.
UPCAST = False
# Tensors of so many numbers are addressed in 64 bits.
LARGE = 2**31


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launches go to the current device; make it the tensors'."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


def _vector(g: Geometry, itemsize: int) -> int:
    """Channels that one 16-byte copy may move: the largest power of two that divides both groups' widths."""
    return math.gcd(16 // itemsize, g.c, g.o)


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    """How fp32 products are made; other numbers' do not depend on the setting, nor should their compilations."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def _select(kind: str, candidates: list[Tile], run: Any, like: Tensor, g: Geometry, tf32: bool, *more: Any) -> Tile:
    if INTERPRETED:
        return tiles.INTERPRETER
    numbers = tiles.number_class(like.dtype, tf32)
    key = (kind, like.device, like.dtype, numbers, g, *more)
    return tiles.choose(key, candidates, run, like.device, numbers, programs.REFUSALS)


def group_mean(x: Tensor, g: Geometry) -> Tensor:
    """xbar (B, n/N, H, W) of a channels-last x, in its dtype."""
    out = empty_nhwc(x, (g.batch, g.c, *g.size))
    rows, columns = g.batch * g.size[0] * g.size[1], min(128, 1 << (g.c - 1).bit_length())
    block = max(2048 // columns, 1)
    programs.mean[(cdiv(rows, block), cdiv(g.c, columns))](
        x, out, rows, g.c, g.groups,
        VEC=_vector(g, x.element_size()), WIDE=x.numel() >= LARGE, BLOCK_R=block, BLOCK_C=columns,
    )  # fmt: skip
    return out


def _sum_into(
    kind: str,
    src: Tensor,
    out: Tensor,
    sizes: dict[str, Any],
    others: dict[str, Tensor | None],
    g: Geometry,
    tf32: bool,
) -> None:
    """Run the summing kernel from ``src`` into ``out`` with the block sizes for it.

    sizes, others: its numbers and flags, and the other tensors that it reads, by name.
    """
    summed, produced = sizes["k_channels"], sizes["n_channels"]
    sizes["WIDE"] = max(src.numel(), out.numel()) >= LARGE

    def run(tile: Tile, into: Tensor | None = None) -> Sequence[Tensor]:
        into = torch.empty_like(out) if into is None else into
        blocks = cdiv(g.batch, tile.m) * cdiv(produced, tile.n) * sizes["groups"]
        programs.correlate[(sizes["out_h"] * sizes["out_w"] * blocks,)](
            src=src, **others, out=into, **sizes,
            EVEN_K=summed % tile.k == 0, EVEN_N=produced % tile.n == 0,
            PRECISION=_precision(src.dtype, tf32), UPCAST=UPCAST,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return (into,)

    candidates = tiles.sum_tiles(tiles.number_class(src.dtype, tf32), kind, g.batch, summed, produced)
    run(_select(kind, candidates, run, src, g, tf32, sizes["groups"], sizes["MEAN"], sizes["ADD"]), out)


def _directions(g: Geometry) -> dict[str, int]:
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = g.kernel, g.stride, g.padding
    return {"kernel_h": kernel_h, "kernel_w": kernel_w, "stride_h": stride_h, "stride_w": stride_w,
            "pad_h": pad_h, "pad_w": pad_w}  # fmt: skip


def forward(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, geometry: Geometry, tf32: bool) -> Tensor:
    """y^k = A^k x^k + B^k xbar + bias (B, m, H', W'), channels-last; ``weights`` = A: without the second term."""
    g = geometry
    has_mean = len(weights) > 1
    out = empty_nhwc(x, (g.batch, g.out_channels, *g.out_size))
    if not out.numel():
        return out
    with _on(x.device):
        x, weights = channels_last(x), [channels_last(weight) for weight in weights]
        shared = group_mean(x, g) if has_mean else None
        taps = math.prod(g.kernel)
        (src_h, src_w), (out_h, out_w) = g.size, g.out_size
        sizes = {
            "batch": g.batch, "src_h": src_h, "src_w": src_w, "out_h": out_h, "out_w": out_w, **_directions(g),
            "k_channels": g.c, "n_channels": g.o, "groups": g.groups, "src_pixel": g.in_channels,
            "w_group": g.o * taps * g.c, "w_tap": g.c, "w_far": taps * g.c,
            "out_pixel": g.out_channels, "out_group": g.o, "scale": 1.0,
            "BACKWARD": False, "K_MAJOR": True, "MEAN": has_mean, "BIAS": bias is not None, "ADD": False,
            "VEC": _vector(g, x.element_size()),
        }  # fmt: skip
        others = {"mean": shared, "weight": weights[0], "weight_mean": weights[1] if has_mean else None,
                  "bias": None if bias is None else bias.contiguous(), "addend": None}  # fmt: skip
        _sum_into("forward", x, out, sizes, others, g, tf32)
    return out


def input_gradient(dy: Tensor, weights: Sequence[Tensor], geometry: Geometry, tf32: bool) -> Tensor:
    """dx^k = A^kT dy^k + (1/N) sum_j B^jT dy^j (B, n, H, W), channels-last; ``weights`` = A: the first term alone."""
    g = geometry
    out = empty_nhwc(dy, (g.batch, g.in_channels, *g.size))
    if not out.numel():
        return out
    with _on(dy.device):
        dy = channels_last(dy)
        shared = _shared_gradient(dy, weights[1], g, tf32) if len(weights) > 1 else None
        sizes, kernel = _backward_sizes(g, dy, weights[0], g.groups, tf32)
        sizes |= {"groups": g.groups, "out_pixel": g.in_channels, "out_group": g.c,
                  "scale": 1 / g.groups, "ADD": shared is not None}  # fmt: skip
        others = {"mean": None, "weight": kernel, "weight_mean": None, "bias": None, "addend": shared}
        _sum_into("input", dy, out, sizes, others, g, tf32)
    return out


def _backward_sizes(g: Geometry, dy: Tensor, weight: Tensor, cuts: int, tf32: bool) -> tuple[dict[str, Any], Tensor]:
    """What both input gradients share: the sum over output channels in ``cuts`` groups, and the kernel for it.

    For tf32 the tensor cores want the summed channels contiguous: a copy of the kernel, (cuts, c, kh, kw, m/cuts).
    For other numbers the kernel stays as it is, (m, kh, kw, c).
    """
    taps, summed = math.prod(g.kernel), g.out_channels // cuts
    turned = _precision(dy.dtype, tf32) == "tf32"
    if turned:
        kernel = weight.unflatten(0, (cuts, summed)).permute(0, 2, 3, 4, 1).contiguous()
    else:
        kernel = channels_last(weight)
    (src_h, src_w), (out_h, out_w) = g.out_size, g.size
    return {
        "batch": g.batch, "src_h": src_h, "src_w": src_w, "out_h": out_h, "out_w": out_w, **_directions(g),
        "k_channels": summed, "n_channels": g.c, "src_pixel": g.out_channels,
        "w_group": summed * taps * g.c, "w_tap": summed if turned else g.c, "w_far": taps * (summed if turned else g.c),
        "BACKWARD": True, "K_MAJOR": turned, "MEAN": False, "BIAS": False, "VEC": _vector(g, dy.element_size()),
    }, kernel  # fmt: skip


def _shared_gradient(dy: Tensor, weight_mean: Tensor, g: Geometry, tf32: bool) -> Tensor:
    """g = sum_j B^jT dy^j (B, c, H, W) in fp32.

    The sum runs over all m output channels and the result is narrow, so few tiles would be busy: where they are too
    few for the device, it is cut between groups.
    """
    numbers = tiles.number_class(dy.dtype, tf32)
    first = tiles.INTERPRETER if INTERPRETED else tiles.sum_tiles(numbers, "shared", g.batch, g.out_channels, g.c)[0]
    blocks = math.prod(g.size) * cdiv(g.batch, first.m) * cdiv(g.c, first.n)
    divisors = [d for d in range(1, g.groups + 1) if g.groups % d == 0]
    parts = tiles.parts_of(blocks, tiles.processors(dy.device), divisors)
    out = empty_nhwc(dy, (parts * g.batch, g.c, *g.size), torch.float32)
    sizes, kernel = _backward_sizes(g, dy, weight_mean, parts, tf32)
    sizes |= {"groups": parts, "out_pixel": g.c, "out_group": out.numel() // parts, "scale": 1.0, "ADD": False}
    others = {"mean": None, "weight": kernel, "weight_mean": None, "bias": None, "addend": None}
    _sum_into("shared", dy, out, sizes, others, g, tf32)
    if parts == 1:
        return out
    whole = empty_nhwc(dy, (g.batch, g.c, *g.size), torch.float32)
    _add(out, None, whole, None, parts)
    return whole


def _add(parts: Tensor, parts_mean: Tensor | None, out: Tensor, out_mean: Tensor | None, count: int) -> None:
    """out = the sum of ``count`` fp32 tensors that lie one after another in ``parts``; the same of the mean's."""
    size = out.numel()
    programs.add_parts[(cdiv(size, 1024),)](
        parts, parts_mean, out, out_mean, size, count,
        MEAN=out_mean is not None, VEC=math.gcd(4, size), WIDE=size * count >= LARGE, BLOCK=1024,
    )  # fmt: skip


def weight_gradients(x: Tensor, dy: Tensor, with_mean: bool, geometry: Geometry, tf32: bool) -> list[Tensor]:
    """dA^k from x^k and dy^k and, with the mean, dB^k from xbar and dy^k: (m, n/N, kh, kw), channels-last."""
    g = geometry
    shape = (g.out_channels, g.c, *g.kernel)
    outs = [empty_nhwc(x, shape) for _ in range(2 if with_mean else 1)]
    if not x.numel() or not dy.numel():
        return [out.zero_() for out in outs]
    with _on(x.device):
        x, dy = channels_last(x), channels_last(dy)
        shared = group_mean(x, g) if with_mean else None
        numbers = tiles.number_class(x.dtype, tf32)
        candidates = tiles.weight_tiles(numbers, g.batch, g.c, g.o)
        run = partial(_weight_run, x, shared, dy, g, tf32)

        def trial(tile: Tile) -> Sequence[Tensor]:
            fresh = [torch.empty_like(out) for out in outs]
            run(tile, fresh)
            return fresh

        run(_select("weights", candidates, trial, x, g, tf32, with_mean), outs)
    return outs


def _weight_run(
    x: Tensor, shared: Tensor | None, dy: Tensor, g: Geometry, tf32: bool, tile: Tile, outs: Sequence[Tensor]
) -> None:
    """Both weight gradients with one tile: cut sums as fp32 parts, then the parts added in their order."""
    taps, size, with_mean = math.prod(g.kernel), outs[0].numel(), shared is not None
    blocks = cdiv(g.o, tile.m) * cdiv(g.c, tile.n) * taps * g.groups
    steps = math.prod(g.out_size) * cdiv(g.batch, tile.k)
    most = max(1, min(16, steps // 8))  # a part shorter than 8 steps is mostly start and end
    if INTERPRETED:
        most = min(3, steps)
    parts = tiles.parts_of(blocks, 2 * tiles.processors(x.device), range(1, most + 1))
    written = list(outs)
    if parts > 1:
        written = [empty_nhwc(x, (parts * g.out_channels, g.c, *g.kernel), torch.float32) for _ in outs]
    (src_h, src_w), (grad_h, grad_w) = g.size, g.out_size
    programs.correlate_weights[(blocks * parts,)](
        src=x, mean=shared, grad=dy, out=written[0], out_mean=written[1] if with_mean else None,
        batch=g.batch, src_h=src_h, src_w=src_w, grad_h=grad_h, grad_w=grad_w, **_directions(g),
        in_channels=g.c, out_channels=g.o, groups=g.groups, src_pixel=g.in_channels, grad_pixel=g.out_channels,
        parts=parts, part_size=size,
        MEAN=with_mean, EVEN_B=g.batch % tile.k == 0, EVEN_M=g.o % tile.m == 0, EVEN_N=g.c % tile.n == 0,
        VEC=_vector(g, x.element_size()), WIDE=max(x.numel(), dy.numel()) >= LARGE,
        PRECISION=_precision(x.dtype, tf32), UPCAST=UPCAST,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        _add(written[0], written[1] if with_mean else None, outs[0], outs[1] if with_mean else None, parts)
