"""The algorithms of BGC have gradients written out by hand: against autograd and the definition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.convs.bgc_algorithms import dense_kernel
from bgcbench.specs import ConvSpec

ALGORITHMS = ConvSpec("bgc", 8, 12, 1, groups=4).algorithms  # all of them
LAYOUTS = ("nchw", "nhwc", "neither")


def cases() -> Iterator[Any]:
    """(algorithm, layer's arguments, input) over kernels, strides, padding, sizes of one pixel and group counts."""
    geometries: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({"kernel_size": 1}, (3, 8, 5, 4)),
        ({"kernel_size": 1, "stride": (2, 1)}, (2, 8, 5, 4)),
        ({"kernel_size": 1, "groups": 2}, (3, 8, 1, 1)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (2, 8, 5, 6)),
        ({"kernel_size": (2, 3), "padding": (0, 2), "dilation": (1, 2), "groups": 2}, (1, 8, 4, 5)),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (2, 8, 4, 3)),
    ]
    for options, shape in geometries:
        spec = ConvSpec("bgc", 8, 12, options["kernel_size"], padding=options.get("padding", 0), groups=4)
        for algorithm in spec.algorithms:
            name = "-".join(f"{key[0]}{value}" for key, value in options.items())
            yield pytest.param(algorithm, options, shape, id=f"{algorithm}-{name}")


CASES = list(cases())


def made(algorithm: str, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> BalancedGroupConv2d:
    torch.manual_seed(0)
    layer = BalancedGroupConv2d(8, 12, **{"groups": 4, **options}, algorithm=algorithm, dtype=dtype)
    torch.nn.init.normal_(layer.bias)
    return layer


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "neither":
        wider = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
        return wider[..., ::2].copy_(x)
    return x.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)


def by_definition(layer: BalancedGroupConv2d, x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """The standard convolution with the dense kernel, put together entry by entry."""
    groups, outputs = layer.groups, len(a) // layer.groups
    rows = []
    for k in range(groups):
        row = [b[k * outputs : (k + 1) * outputs] / groups for _ in range(groups)]
        row[k] = row[k] + a[k * outputs : (k + 1) * outputs]
        rows.append(torch.cat(row, dim=1))
    kernel = torch.cat(rows)
    if layer.padding_mode == "zeros":
        return F.conv2d(x, kernel, bias, layer.stride, layer.padding, layer.dilation)
    vertical, horizontal = layer.padding
    x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode=layer.padding_mode)
    return F.conv2d(x, kernel, bias, layer.stride, 0, layer.dilation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("algorithm", "options", "shape"), CASES)
def test_values_and_gradients_are_those_of_the_definition(
    algorithm: str, options: dict[str, Any], shape: tuple[int, ...], layout: str
) -> None:
    layer = made(algorithm, options)
    x = laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]
    before = [leaf.detach().clone() for leaf in leaves]
    expected = by_definition(layer, *leaves)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, dy)
    given = dy.clone()
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, given), wanted)
    torch.testing.assert_close(layer(x).detach(), torch.no_grad()(layer)(x))
    for now, then in zip([*leaves, given], [*before, dy], strict=True):
        assert torch.equal(now, then)  # what is computed in place is nobody else's
    # A gradient whose images do not follow one another, as a product's may be.
    turned = dy.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(torch.autograd.grad(layer(x), leaves, turned), wanted)
    # A gradient without memory of its own, as that of a sum is.
    found = torch.autograd.grad(layer(x).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(by_definition(layer, *leaves).sum(), leaves))


@pytest.mark.parametrize(("algorithm", "options", "shape"), CASES)
def test_gradients_that_nobody_wants_are_left_out(
    algorithm: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    layer = made(algorithm, options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]
    expected = by_definition(layer, *leaves)
    dy = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, leaves, dy)
    for wanted in (0b0001, 0b0010, 0b0100, 0b1000, 0b0110, 0b1001):
        chosen = [bool(wanted >> number & 1) for number in range(4)]
        for leaf, is_wanted in zip(leaves, chosen, strict=True):
            leaf.requires_grad_(is_wanted)
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(layer(x), asked, dy)
        torch.testing.assert_close(found, tuple(itertools.compress(gradients, chosen)))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("algorithm", "options", "shape"), CASES)
def test_second_derivatives(algorithm: str, options: dict[str, Any], shape: tuple[int, ...], layout: str) -> None:
    layer = made(algorithm, options)
    x = laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), leaves)

    torch.testing.assert_close(penalty(layer(x)), penalty(by_definition(layer, *leaves)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_half_precision(number: int, dtype: torch.dtype) -> None:
    algorithm, options, shape = CASES[number].values
    # Every case in both types and both layouts, and every type in every layout.
    layout = LAYOUTS[(number + (dtype == torch.float16)) % 2]
    layer = made(algorithm, options, dtype)
    x = laid_out(torch.randn(shape).to(dtype), layout).requires_grad_()
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = by_definition(layer, *exact)
    dy = torch.randn_like(expected).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    wanted = torch.autograd.grad(expected, exact, dy.double())
    found = torch.autograd.grad(y, leaves, dy)
    # A few roundings of eps/2 each, of numbers up to the largest.
    for one, other in zip([y, *found], [expected, *wanted], strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=4 * torch.finfo(dtype).eps * float(other.detach().abs().max())
        )


@pytest.mark.parametrize("inside", [False, True], ids=["backward-outside", "backward-inside"])
@pytest.mark.parametrize(("algorithm", "options", "shape"), CASES)
def test_autocast_computes_in_its_type_and_gradients_keep_theirs(
    algorithm: str, options: dict[str, Any], shape: tuple[int, ...], inside: bool
) -> None:
    layer = made(algorithm, options, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        found = torch.autograd.grad(y, leaves, torch.ones_like(y)) if inside else None
    assert y.dtype == torch.bfloat16
    found = found or torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert {gradient.dtype for gradient in found} == {torch.float32}
    expected = by_definition(layer, *leaves)
    wanted = torch.autograd.grad(expected.sum(), leaves)
    eps = torch.finfo(torch.bfloat16).eps
    for one, other in zip([y, *found], [expected, *wanted], strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=4 * eps * float(other.detach().abs().max()))


@pytest.mark.parametrize(("algorithm", "options", "shape"), CASES)
def test_autocast_around_the_backward_pass_alone_changes_nothing(
    algorithm: str, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    if algorithm == "dense" and shape[2:] == (1, 1):
        pytest.skip("what PyTorch's linear does there is its own affair")
    layer = made(algorithm, options, torch.float32)
    x = torch.randn(shape, requires_grad=True)
    leaves = [x, layer.weight_group, layer.weight_mean, layer.bias]

    expected = torch.autograd.grad(layer(x).sum(), leaves)
    for again in (False, True):
        total = layer(x).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = torch.autograd.grad(total, leaves, create_graph=again)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_mean_of_large_numbers_in_half_precision_is_no_sum(algorithm: str) -> None:
    layer = made(algorithm, {"kernel_size": 1}, torch.float16)
    x = torch.full((2, 8, 3, 3), 3e4, dtype=torch.float16, requires_grad=True)  # four of them are too many for float16
    with torch.no_grad():
        layer.weight_group.zero_()
        layer.weight_mean.fill_(2**-4)
    expected = (layer.bias + 2 * 3e4 / 16).view(1, -1, 1, 1).expand(2, 12, 3, 3)
    torch.testing.assert_close(layer(x), expected)
    layer, x = layer.float(), x.detach().float()
    for follow in (nullcontext(), forward_ad.dual_level()):
        with follow, torch.autocast("cpu", dtype=torch.float16):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_forward_mode_and_traces_follow_the_single_operations(algorithm: str) -> None:
    layer = made(algorithm, {"kernel_size": 1})
    x, tangent = torch.randn(2, 2, 8, 4, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent)))
        kernel = dense_kernel(layer.weight_group, layer.weight_mean, 4)
        torch.testing.assert_close(y.tangent, F.conv2d(tangent, kernel))
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    other = torch.randn(5, 8, 2, 3, dtype=torch.float64)
    assert "ByHand" not in str(traced.graph)  # which no other program could run
    torch.testing.assert_close(traced(other), layer(other))
