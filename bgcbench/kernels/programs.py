"""The kernels: convolutions as implicit matrix products, batch-major. Launched by :mod:`bgcbench.kernels.implicit`.

All data are channels-last: x is (B, H, W, n) in memory, kernels are (m, kh, kw, n/N). A tile is BLOCK_M *images* by
BLOCK_N channels at *one* pixel. At one pixel the taps that fall inside the image are a rectangle known before the
loop, so padding costs neither products nor masks, and the input gradient of a strided convolution visits just the
taps that exist. One kernel makes all of

    y^k  = A^k * x^k + B^k * xbar + bias        (two segments of the sum, one loop, one accumulator)
    g    = sum_j B^jT * dy^j                    (the group index cuts the sum; parts are added in a fixed order)
    dx^k = A^kT * dy^k + g / N                  (g / N is added on the way out)

and a second one dA^k, dB^k, which read every tile of dy once for both. Sums are fp32 throughout.
"""

# mypy: ignore-errors
# (triton's language has no types)
from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Numbers that a kernel is not compiled anew for. What the compiler would learn from their divisibility, VEC says.
_SIZES = (
    "batch", "src_h", "src_w", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "groups", "src_pixel",
)  # fmt: skip
_SUMMED = (
    "out_h", "out_w", "k_channels", "n_channels", "w_group", "w_tap", "w_far", "out_pixel", "out_group", "scale",
)  # fmt: skip
_WEIGHTS = ("grad_h", "grad_w", "in_channels", "out_channels", "grad_pixel", "parts", "part_size")


# What a launch raises for block sizes that the device or its compiler has no room for.
REFUSALS = tuple(
    getattr(triton.runtime.errors, name)
    for name in ("OutOfResources", "PTXASError")
    if hasattr(triton.runtime.errors, name)
)


@triton.jit
def _inside(start, limit, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Which of the channels start .. start + BLOCK lie below ``limit``, constant over VEC of them; VEC | limit."""
    return (start + tl.arange(0, BLOCK)) // VEC < limit // VEC


@triton.jit
def _bounded(start, inside, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The channels start .. start + BLOCK, 0 for those outside: no address beyond the tensor is ever formed.

    Whole runs of VEC are inside or outside, so the runs that are loaded are contiguous; the compiler cannot see it.
    """
    columns = tl.where(inside, start + tl.arange(0, BLOCK), 0)
    return tl.max_contiguous(tl.multiple_of(columns, VEC), VEC)


@triton.jit
def _read(at, mask, EVEN: tl.constexpr):
    """The tile at the pointers ``at``, zeros where ``mask`` is off; EVEN: it is on everywhere."""
    return tl.load(at) if EVEN else tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=("rows", "channels", "groups"))
def mean(
    x, out, rows, channels, groups,
    VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[r, c] = (1/N) sum_k x[r, k, c] for x (rows, N, channels), rounded once."""
    start = tl.program_id(1) * BLOCK_C
    within = _inside(start, channels, BLOCK_C, VEC)
    column = _bounded(start, within, BLOCK_C, VEC)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (row < rows)[:, None] & within[None, :]
    row = tl.minimum(row, rows - 1)
    if WIDE:
        row = row.to(tl.int64)
    at = x + (row * tl.multiple_of(groups * channels, VEC))[:, None] + column[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for k in range(groups):
        total += tl.load(at + tl.multiple_of(k * channels, VEC), mask=inside, other=0.0).to(tl.float32)
    at_out = tl.multiple_of(row * channels, VEC)[:, None] + column[None, :]
    tl.store(out + at_out, (total / groups).to(out.dtype.element_ty), mask=inside)


# Every branch is on a constant of the compilation.
@triton.jit(do_not_specialize=_SIZES + _SUMMED)
def correlate(  # noqa: PLR0915
    src, mean, weight, weight_mean, bias, addend, out,
    batch, src_h, src_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    k_channels, n_channels, groups, src_pixel, w_group, w_tap, w_far, out_pixel, out_group, scale,
    BACKWARD: tl.constexpr, K_MAJOR: tl.constexpr, MEAN: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[b, pixel, k, :] = sum over taps and channels of src[b, pixel', k, :] times a kernel's slice.

    src: (B, src_h, src_w, src_pixel channels), group k at channel k * k_channels. mean: (B, src_h, src_w,
    k_channels). Kernels by strides: group, tap, and w_far for the one of summed and produced channels that is not
    contiguous (K_MAJOR: the summed ones are). VEC divides both numbers of channels. BACKWARD: taps run from an input
    pixel to the output pixels that read it. addend: fp32 (B, out_h, out_w, n_channels), times scale.
    """
    n_blocks = tl.cdiv(n_channels, BLOCK_N)
    m_blocks = tl.cdiv(batch, BLOCK_M)
    per_pixel = n_blocks * m_blocks * groups
    pid = tl.program_id(0)
    rank, rest = pid // per_pixel, pid % per_pixel
    start_n = (rest % n_blocks) * BLOCK_N
    start_m = (rest // n_blocks % m_blocks) * BLOCK_M
    group = rest // n_blocks // m_blocks

    # Programs start in the order of their numbers: pixels with all taps first, then the border, so that short
    # programs fill the gaps at the end.
    if BACKWARD:
        row = (rank // out_w + tl.maximum(kernel_h - 1 - pad_h, 0)) % out_h
        column = (rank % out_w + tl.maximum(kernel_w - 1 - pad_w, 0)) % out_w
        top, lead_h = (row + pad_h) // stride_h, (row + pad_h) % stride_h
        left, lead_w = (column + pad_w) // stride_w, (column + pad_w) % stride_w
        first_i, first_j = tl.maximum(top + 1 - src_h, 0), tl.maximum(left + 1 - src_w, 0)
        last_i = tl.minimum((kernel_h - lead_h + stride_h - 1) // stride_h, top + 1)
        last_j = tl.minimum((kernel_w - lead_w + stride_w - 1) // stride_w, left + 1)
    else:
        row = (rank // out_w + (pad_h + stride_h - 1) // stride_h) % out_h
        column = (rank % out_w + (pad_w + stride_w - 1) // stride_w) % out_w
        top, left = row * stride_h - pad_h, column * stride_w - pad_w
        first_i, first_j = tl.maximum(-top, 0), tl.maximum(-left, 0)
        last_i, last_j = tl.minimum(kernel_h, src_h - top), tl.minimum(kernel_w, src_w - left)
    steps = tl.maximum(last_i - first_i, 0) * tl.maximum(last_j - first_j, 0) * tl.cdiv(k_channels, BLOCK_K)

    image = start_m + tl.arange(0, BLOCK_M)
    stored = image < batch
    image = tl.minimum(image, batch - 1)  # rows beyond the batch repeat the last image and are not stored
    if WIDE:
        image = image.to(tl.int64)
    produced = start_n + tl.arange(0, BLOCK_N)
    kept = _inside(start_n, n_channels, BLOCK_N, VEC)
    if not EVEN_N:
        produced = _bounded(start_n, kept, BLOCK_N, VEC)
    w_k, w_n = (1, w_far) if K_MAJOR else (w_far, 1)
    columns = tl.multiple_of(produced * w_n, VEC)[None, :]
    lanes = tl.arange(0, BLOCK_K)

    place = row * out_w + column
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    i, j, chunk = first_i, first_j, 0
    for step in range(steps * 2 if MEAN else steps):
        if BACKWARD:
            pixel = (top - i) * src_w + left - j
            tap = (lead_h + stride_h * i) * kernel_w + lead_w + stride_w * j
        else:
            pixel = (top + i) * src_w + left + j
            tap = i * kernel_w + j
        # Selecting the segment's pointers keeps one product a step; two into one accumulator would wait for one
        # another.
        source, kernel, pitch, offset = src, weight, src_pixel, group * k_channels
        if MEAN:
            second = step >= steps
            source = tl.where(second, mean, src)
            kernel = tl.where(second, weight_mean, weight)
            pitch = tl.where(second, k_channels, src_pixel)
            offset = tl.where(second, 0, group * k_channels)
        at = tl.multiple_of(pixel * pitch + offset + chunk, VEC)
        at_kernel = tl.multiple_of(group * w_group + tap * w_tap + chunk * w_k, VEC)
        rows = image * tl.multiple_of(src_h * src_w * pitch, VEC)
        summed, within = lanes, lanes < BLOCK_K
        if not EVEN_K:
            within = _inside(0, k_channels - chunk, BLOCK_K, VEC)
            summed = _bounded(0, within, BLOCK_K, VEC)
        kernel_at = kernel + at_kernel + tl.multiple_of(summed * w_k, VEC)[:, None] + columns
        a = _read(source + at + rows[:, None] + summed[None, :], within[None, :], EVEN_K)
        b = _read(kernel_at, within[:, None] & kept[None, :], EVEN_K and EVEN_N)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

        chunk += BLOCK_K
        j = tl.where(chunk >= k_channels, j + 1, j)
        chunk = tl.where(chunk >= k_channels, 0, chunk)
        i = tl.where(j >= last_j, i + 1, i)
        j = tl.where(j >= last_j, first_j, j)
        i = tl.where(i >= last_i, first_i, i)  # the second segment starts over

    if ADD:
        at_add = image * tl.multiple_of(out_h * out_w * n_channels, VEC) + tl.multiple_of(place * n_channels, VEC)
        # Rows beyond the batch repeat the last image: they need no mask of their own.
        acc += _read(addend + at_add[:, None] + produced[None, :], kept[None, :], EVEN_N) * scale
    if BIAS:
        acc += tl.load(bias + group * n_channels + produced, mask=kept, other=0.0).to(tl.float32)[None, :]
    inside = stored[:, None] & kept[None, :]
    at_out = image * tl.multiple_of(out_h * out_w * out_pixel, VEC) + tl.multiple_of(place * out_pixel, VEC)
    base = out + tl.multiple_of(group.to(tl.int64) * out_group, VEC)
    tl.store(base + at_out[:, None] + produced[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES + _WEIGHTS)
def correlate_weights(  # noqa: PLR0915
    src, mean, grad, out, out_mean,
    batch, src_h, src_w, grad_h, grad_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    in_channels, out_channels, groups, src_pixel, grad_pixel, parts, part_size,
    MEAN: tl.constexpr, EVEN_B: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[part, k, o, tap, c] = sum over images and pixels of grad[b, q, k, o] src[b, q s + tap - p, k, c].

    The same with ``mean`` for out_mean. A tile is BLOCK_M output by BLOCK_N input channels of one group and one tap;
    the pixels whose tap lies inside the image, times chunks of BLOCK_K images, are one range, cut into ``parts``.
    """
    n_blocks = tl.cdiv(in_channels, BLOCK_N)
    m_blocks = tl.cdiv(out_channels, BLOCK_M)
    pid = tl.program_id(0)
    start_n, pid = (pid % n_blocks) * BLOCK_N, pid // n_blocks
    start_m, pid = (pid % m_blocks) * BLOCK_M, pid // m_blocks
    tap, pid = pid % (kernel_h * kernel_w), pid // (kernel_h * kernel_w)
    group, part = pid % groups, pid // groups

    up, left = tap // kernel_w - pad_h, tap % kernel_w - pad_w  # the tap's place relative to a pixel's origin
    first_i = (tl.maximum(-up, 0) + stride_h - 1) // stride_h
    first_j = (tl.maximum(-left, 0) + stride_w - 1) // stride_w
    last_i = tl.minimum((tl.maximum(src_h - up, 0) + stride_h - 1) // stride_h, grad_h)
    last_j = tl.minimum((tl.maximum(src_w - left, 0) + stride_w - 1) // stride_w, grad_w)
    across = tl.maximum(last_j - first_j, 0)
    chunks = tl.cdiv(batch, BLOCK_K)
    steps = tl.maximum(last_i - first_i, 0) * across * chunks
    begin, end = steps * part // parts, steps * (part + 1) // parts
    chunk = begin % chunks * BLOCK_K
    i = first_i + begin // chunks // tl.maximum(across, 1)
    j = first_j + begin // chunks % tl.maximum(across, 1)

    lanes = tl.arange(0, BLOCK_K)
    outputs, inputs = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    kept_m, kept_n = _inside(start_m, out_channels, BLOCK_M, VEC), _inside(start_n, in_channels, BLOCK_N, VEC)
    if not EVEN_M:
        outputs = _bounded(start_m, kept_m, BLOCK_M, VEC)
    if not EVEN_N:
        inputs = _bounded(start_n, kept_n, BLOCK_N, VEC)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_mean = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(end - begin):
        there = lanes < batch - chunk
        image, first = lanes, chunk
        if not EVEN_B:
            image = tl.where(there, lanes, 0)
        if WIDE:
            image, first = image.to(tl.int64), chunk.to(tl.int64)
        at_src = (i * stride_h + up) * src_w + j * stride_w + left
        at_grad = (i * grad_w + j) * grad_pixel + group * out_channels + first * (grad_h * grad_w * grad_pixel)
        at_x = at_src * src_pixel + group * in_channels + first * (src_h * src_w * src_pixel)
        dy_rows = (image * tl.multiple_of(grad_h * grad_w * grad_pixel, VEC))[:, None]
        x_rows = (image * tl.multiple_of(src_h * src_w * src_pixel, VEC))[:, None]
        dy_at = grad + tl.multiple_of(at_grad, VEC) + dy_rows + outputs[None, :]
        x_at = src + tl.multiple_of(at_x, VEC) + x_rows + inputs[None, :]
        dy = _read(dy_at, there[:, None] & kept_m[None, :], EVEN_B and EVEN_M)
        x = _read(x_at, there[:, None] & kept_n[None, :], EVEN_B and EVEN_N)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
        if MEAN:
            at_mean = at_src * in_channels + first * (src_h * src_w * in_channels)
            mean_rows = (image * tl.multiple_of(src_h * src_w * in_channels, VEC))[:, None]
            mean_at = mean + tl.multiple_of(at_mean, VEC) + mean_rows + inputs[None, :]
            xbar = _read(mean_at, there[:, None] & kept_n[None, :], EVEN_B and EVEN_N)
            if UPCAST:
                xbar = xbar.to(tl.float32)
            acc_mean = tl.dot(tl.trans(dy), xbar, acc_mean, input_precision=PRECISION)

        chunk += BLOCK_K
        j = tl.where(chunk >= batch, j + 1, j)
        chunk = tl.where(chunk >= batch, 0, chunk)
        i = tl.where(j >= last_j, i + 1, i)
        j = tl.where(j >= last_j, first_j, j)

    first = tl.multiple_of(part.to(tl.int64) * part_size, VEC)
    kernel_rows = ((group * out_channels + outputs) * (kernel_h * kernel_w) + tap) * in_channels
    at = tl.multiple_of(kernel_rows, VEC)[:, None] + inputs[None, :]
    inside = kept_m[:, None] & kept_n[None, :]
    tl.store(out + first + at, acc.to(out.dtype.element_ty), mask=inside)
    if MEAN:
        tl.store(out_mean + first + at, acc_mean.to(out_mean.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("size", "parts"))
def add_parts(
    partial, partial_mean, out, out_mean, size, parts,
    MEAN: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] = sum_p partial[p, e], always in the order of p, rounded once; the same of the mean's."""
    start = tl.program_id(0) * BLOCK
    inside = _inside(start, size, BLOCK, VEC)
    at = _bounded(start, inside, BLOCK, VEC)
    step = size // VEC * VEC  # which is size, and seen to be a multiple of VEC
    if WIDE:
        at = at.to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    place = at
    for _ in range(parts):
        total += tl.load(partial + place, mask=inside, other=0.0)
        place += step
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    if MEAN:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        place = at
        for _ in range(parts):
            total += tl.load(partial_mean + place, mask=inside, other=0.0)
            place += step
        tl.store(out_mean + at, total.to(out_mean.dtype.element_ty), mask=inside)
