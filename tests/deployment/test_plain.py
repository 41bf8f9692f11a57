"""Layers of variants made of standard operations, for where bgcbench is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bgcbench.convs.flgc import FullyLearnableGroupConv2d
from bgcbench.convs.masked import MaskedConv2d
from bgcbench.deployment.plain import chosen_algorithms, least_work, made_plain
from bgcbench.errors import UsageError
from bgcbench.specs import VARIANTS, load_layer
from tests.convs.test_contract import GROUPS, IN, SHAPES, dense_output, make


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_algorithm_computes_the_same(name: str, shape: dict[str, object]) -> None:
    for groups in GROUPS:
        layer = make(name, "auto", groups, **shape).eval()
        if isinstance(layer, MaskedConv2d):
            layer = layer.deploy()
        x = torch.randn(2, IN, 9, 7, dtype=torch.float64)
        expected = dense_output(layer, x)
        assert layer.spec.plain == (("dense",) if layer.groups == 1 else VARIANTS[name].plain)
        for algorithm in layer.spec.plain:
            module = layer.plain(algorithm)
            parts = [part for part in module.modules() if not list(part.children()) and list(part.parameters())]
            assert {type(part) for part in parts} == {nn.Conv2d}
            assert not module.training
            torch.testing.assert_close(module(x[0]), expected[0], rtol=1e-12, atol=1e-12)
            plain = copy.deepcopy(layer)
            module = plain.plain(algorithm)
            with torch.no_grad():
                plain.kernel.zero_()
            torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)  # with weights of its own


@pytest.mark.parametrize("bias", [True, False])
def test_uneven_groups_and_outputs_without_inputs_too(bias: bool) -> None:
    layer = FullyLearnableGroupConv2d(6, 7, 3, padding=1, groups=3, bias=bias, algorithm="deployed").double().eval()
    layer._set_partition(torch.tensor([0, 0, 2, 0, 2, 0]), torch.tensor([1, 0, 2, 1, 0, 2, 2]), torch.device("cpu"))
    nn.init.normal_(layer.kernel)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer.plain("deployed")(x), dense_output(layer, x), rtol=1e-12, atol=1e-12)


def test_without_a_measurement_the_fewest_weights_are_taken() -> None:
    found = {
        (name, n): least_work(load_layer(name)(16, 16, 3, groups=n, **options))
        for name, n, options in [
            ("standard", 1, {}), ("gc", 4, {}), ("shuffle", 4, {}), ("tlgc", 4, {}), ("bgc", 2, {}), ("bgc", 4, {}),
            ("lowrank", 4, {}), ("lgc", 4, {"algorithm": "deployed"}), ("flgc", 4, {"algorithm": "deployed"}),
        ]
    }  # fmt: skip
    assert found == {
        ("standard", 1): "dense", ("gc", 4): "stock", ("shuffle", 4): "stock", ("tlgc", 4): "stock",
        ("bgc", 2): "dense",  # all that it saves is nothing
        ("bgc", 4): "two_conv", ("lowrank", 4): "two_conv", ("lgc", 4): "deployed", ("flgc", 4): "deployed",
    }  # fmt: skip


def test_an_algorithm_is_for_the_layers_that_have_it() -> None:
    network = nn.Sequential(*(load_layer(name)(8, 8, 3, groups=4) for name in ("bgc", "gc")), nn.Conv2d(8, 8, 1))
    assert chosen_algorithms(network, "split") == {"0": "split", "1": "stock"}
    plain = made_plain(network, {"0": "split", "1": "stock"})
    assert [type(part).__name__ for part in plain] == ["Added", "Conv2d", "Conv2d"]
    assert type(network[0]).__name__ == "BalancedGroupConv2d"  # a copy was made plain
    with pytest.raises(UsageError, match="the network's layers; they have two_conv, matrix, split, dense, stock;"):
        chosen_algorithms(network, "deployed")
    with pytest.raises(UsageError, match="unknown plain algorithm of gc 'matrix'"):
        network[1].plain("matrix")  # type: ignore[operator]
