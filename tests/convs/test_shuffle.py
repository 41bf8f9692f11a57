from __future__ import annotations

import pytest
import torch
from torch import nn

from bgcbench.convs.shuffle import ShuffleGroupConv2d, shuffle_order


@pytest.mark.parametrize("groups", [1, 2, 3, 6, 12])
def test_the_permutation_is_that_of_torchs_channel_shuffle(groups: int) -> None:
    channels = torch.arange(12.0).reshape(1, 12, 1, 1)
    shuffled = nn.ChannelShuffle(groups)(channels).flatten().long()
    assert shuffle_order(12, groups).tolist() == shuffled.tolist()
    assert shuffled.tolist() == [(p % groups) * (12 // groups) + p // groups for p in range(12)]


def test_shuffling_over_n_and_then_over_m_by_n_is_the_identity() -> None:
    x = torch.arange(12)
    assert x[shuffle_order(12, 3)][shuffle_order(12, 4)].tolist() == x.tolist()
    assert shuffle_order(12, 1).tolist() == x.tolist()


def test_it_equals_torchs_group_convolution_and_channel_shuffle_in_sequence() -> None:
    layer = ShuffleGroupConv2d(8, 12, 3, groups=4, bias=False, dtype=torch.float64)
    plain = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4, bias=False, dtype=torch.float64), nn.ChannelShuffle(4))
    plain[0].load_state_dict({"weight": layer.weight_group})
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


def test_projection_keeps_one_block_of_each_row_in_the_standard_order() -> None:
    groups, weight = 4, torch.randn(8, 8, 1, 1, dtype=torch.float64)
    dense = ShuffleGroupConv2d.from_dense(weight, groups).dense_weight().detach()
    order = shuffle_order(8, groups)
    for p in range(8):
        group = int(order[p]) // 2
        kept = range(2 * group, 2 * group + 2)
        for j in range(8):
            assert dense[p, j, 0, 0] == (weight[p, j, 0, 0] if j in kept else 0.0)


def test_the_bias_is_in_the_order_of_the_output() -> None:
    weight, bias = torch.randn(6, 6, 1, 1), torch.randn(6)
    layer = ShuffleGroupConv2d.from_dense(weight, 3, bias=bias)
    torch.testing.assert_close(layer(torch.zeros(1, 6, 1, 1)).flatten(), bias)
