from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bgcbench.convs import build_conv
from bgcbench.errors import ShapeError
from bgcbench.measure.counts import call_work, count, paper_bytes
from bgcbench.specs import VARIANTS, ConvSpec
from bgcbench.theory.paper import GROUPS, MIB, TABLE4, WORKLOAD


def spec(variant: str, groups: int = 1, n: int = 8, m: int = 12, kernel: int = 3, **options: object) -> ConvSpec:
    return ConvSpec(variant, n, m, kernel, groups=groups, bias=False, **options)  # type: ignore[arg-type]


def brute_force_macs(n: int, m: int, groups: int, kernel: int, height: int, width: int, stride: int) -> int:
    """Multiplications counted one by one in the loops of a grouped convolution with padding (kernel - 1) // 2."""
    pad, macs = (kernel - 1) // 2, 0
    rows = range(0, height + 2 * pad - kernel + 1, stride)
    columns = range(0, width + 2 * pad - kernel + 1, stride)
    for output, _, _ in itertools.product(range(m), rows, columns):
        group = output // (m // groups)
        for _input in range(group * n // groups, (group + 1) * n // groups):
            macs += kernel * kernel  # taps on the padding count, as in every published table
    return macs


@pytest.mark.parametrize(("groups", "kernel", "stride"), [(1, 3, 1), (2, 3, 2), (4, 1, 1), (4, 3, 1)])
def test_macs_of_grouped_convolutions_equal_a_count_one_by_one(groups: int, kernel: int, stride: int) -> None:
    expected = brute_force_macs(8, 12, groups, kernel, 6, 5, stride)
    name = "standard" if groups == 1 else "gc"
    layer = spec(name, groups, kernel=kernel, stride=stride, padding=(kernel - 1) // 2)
    assert count(layer, 6, 5).macs == expected
    if groups > 1:
        both = dataclasses.replace(layer, variant="bgc")
        assert count(both, 6, 5).macs == 2 * expected  # two branches with the same kernels' sizes
        assert count(dataclasses.replace(layer, variant="shuffle"), 6, 5).macs == expected


def test_the_mean_costs_one_addition_for_every_input_value() -> None:
    # (1/N) sum_k x^k: N - 1 additions and one scaling for each of n/N * 6 * 5 values, N of them in all.
    assert count(spec("bgc", 4, stride=2, padding=1), 6, 5).adds == 8 * 6 * 5
    assert count(spec("bgc", 1), 6, 5).adds == 0
    assert count(spec("gc", 4), 6, 5).adds == 0


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_params_equal_what_the_layer_stores(name: str, bias: bool) -> None:
    for groups in (1,) if name == "standard" else (1, 2, 4):
        algorithm = "deployed" if "deployed" in VARIANTS[name].algorithms else "auto"  # masked they store what trains
        layer = ConvSpec(name, 8, 12, 3, groups=groups, bias=bias, algorithm=algorithm)
        assert count(layer, 5, 5).params == sum(p.numel() for p in build_conv(layer).parameters())
        if groups > 1 and algorithm == "deployed":
            trained = build_conv(dataclasses.replace(layer, algorithm="masked"))
            assert count(layer, 5, 5).params_training == sum(p.numel() for p in trained.parameters())


def test_table_1_by_hand() -> None:
    # n = 8, m = 12, K = 9, N = 4: Kmn = 864.
    columns = {name: count(spec(name, 1 if name == "standard" else 4), 3, 3) for name in VARIANTS}
    assert {name: c.paper_params for name, c in columns.items()} == {
        "standard": 864,
        "gc": 216,
        "shuffle": 216,
        "lgc": 2 * 864,
        "flgc": 864 + 4 * 8 + 4 * 12,
        "tlgc": 216 + 9 * 8 + 4 * 12,
        "bgc": 2 * 216,
        "lowrank": 2 * (9 * 8 + 12),  # r = floor(864 / (4 (72 + 12)))
    }
    assert columns["lgc"].params == columns["flgc"].params == 216
    assert columns["lgc"].params_training == 864
    assert columns["flgc"].params_training == 864 + 4 * 20
    assert columns["lgc"].macs_training == columns["flgc"].macs_training == 864  # D = 1


def test_the_papers_operation_counts_by_hand() -> None:
    # One output position of a 3x3 input without padding: D = 1. Section 4 and (3.14), n = 8, m = 12, K = 9, N = 4.
    ops = {name: count(spec(name, 1 if name == "standard" else 4), 3, 3).paper_ops for name in VARIANTS}
    assert ops == {
        "standard": 864,
        "gc": 216,
        "shuffle": 216,
        "lgc": 216 + 3 * (216 + 24 + 1),
        "flgc": 216 + 20 * 16 + 216,
        "tlgc": 216 + 72 + 48,
        "bgc": 432 + 8,
        "lowrank": 2 * (72 + 12),
    }


def test_bgc_with_twice_the_groups_has_the_parameters_of_gc() -> None:
    for groups in (1, 2, 4):
        assert count(spec("bgc", 2 * groups, 16, 16), 5, 5).params == count(spec("gc", groups, 16, 16), 5, 5).params


def test_one_group_is_the_standard_convolution() -> None:
    reference = count(spec("standard"), 5, 5)
    for name in ("gc", "shuffle", "bgc"):
        assert count(spec(name, 1), 5, 5) == reference


def test_least_bytes_by_hand() -> None:
    # 2 images, bf16: input 8 * 25, output 12 * 25 numbers an image, 864 weights shared by 2 images.
    counted = count(spec("standard", padding=1), 5, 5, batch=2, precision="bf16")
    assert counted.bytes_min == 2 * (8 * 25 + 12 * 25) + 2 * 864 // 2
    work = call_work(counted, 2, "fwd_bwd")
    assert work.bytes == 3 * 2 * counted.bytes_min
    assert work.flops == 3 * 2 * 2 * 864 * 25
    assert call_work(counted, 2, "bwd", input_grad=False).flops == 2 * 2 * 864 * 25
    assert call_work(counted, 2, "fwd").flops == 2 * 2 * 864 * 25


@pytest.mark.parametrize(("variant", "groups"), TABLE4)
def test_the_papers_memory_column(variant: str, groups: int) -> None:
    layer = ConvSpec(variant, 1024, 1024, 3, padding=1, groups=groups, bias=False)
    ours = paper_bytes(layer, 7, 7, WORKLOAD["batch"])
    printed = TABLE4[variant, groups].memory_bytes
    above = {("bgc", 2): 3.0, ("bgc", 8): 0.5, ("bgc", 16): 1.0}.get((variant, groups), 0.0)
    assert f"{ours / MIB + above:.2f}" == f"{printed / MIB:.2f}"


def test_every_entry_of_table_4_is_there() -> None:
    assert set(TABLE4) == {("standard", 1), *(("gc", n) for n in GROUPS), *(("bgc", n) for n in GROUPS)}


def test_the_output_size_is_torchs() -> None:
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3), (1, 2), (0, 1), (1, 2)):
        layer = ConvSpec("standard", 1, 1, kernel, stride, padding, dilation, bias=False)
        y = build_conv(layer)(torch.zeros(1, 1, 9, 6))
        assert layer.output_size(9, 6) == tuple(y.shape[2:])


def test_a_kernel_larger_than_the_input_is_refused() -> None:
    with pytest.raises(ShapeError, match="leaves no output"):
        count(spec("standard"), 2, 2)


def test_uneven_balanced_groups_are_counted_pair_by_pair() -> None:
    # 7 inputs in groups of 3, 2, 2 and 5 outputs in groups of 2, 2, 1: 6 + 4 + 2 pairs.
    assert count(ConvSpec("flgc", 7, 5, 1, groups=3, bias=False), 4, 4).params == 12
