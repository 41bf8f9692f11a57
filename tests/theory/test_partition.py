from __future__ import annotations

import itertools

import pytest
import torch

from bgcbench.theory.partition import (
    _exchange,
    assign,
    balanced_sizes,
    contiguous_partition,
    kept_mass,
    search_partition,
)


def balanced(channels: int, groups: int) -> list[torch.Tensor]:
    """Every balanced partition of a few channels."""
    sizes = sorted(balanced_sizes(channels, groups))
    return [torch.tensor(p) for p in itertools.product(range(groups), repeat=channels)
            if sorted(p.count(g) for g in range(groups)) == sizes]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "groups"), [(4, 6, 2), (6, 6, 3), (5, 6, 2)])
def test_on_small_kernels_the_search_comes_close_to_the_best_partition_of_all(m: int, n: int, groups: int) -> None:
    for _ in range(5):
        mass = torch.rand(m, n, dtype=torch.float64)
        best = max(kept_mass(mass, t, s) for t in balanced(m, groups) for s in balanced(n, groups))
        assert kept_mass(mass, *search_partition(mass, groups)) >= 0.97 * best


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_planted_blocks_are_recovered(groups: int) -> None:
    t, s = (contiguous_partition(32, groups)[torch.randperm(32)] for _ in range(2))
    mass = (t[:, None] == s).double() * torch.rand(32, 32, dtype=torch.float64) + 1e-3
    outputs, inputs = search_partition(mass, groups)
    assert kept_mass(mass, outputs, inputs) == pytest.approx(kept_mass(mass, t, s), rel=1e-12)


# Shares that i.i.d. 64 x 64 kernels keep, from the variants' fact sheet; 1/N would be kept without a search.
@pytest.mark.parametrize(("groups", "expected"), [(2, 0.62), (4, 0.40), (8, 0.28), (16, 0.20)])
def test_random_kernels_keep_the_share_found_elsewhere(groups: int, expected: float) -> None:
    mass = torch.randn(64, 64, dtype=torch.float64).square()
    kept = kept_mass(mass, *search_partition(mass, groups)) / float(mass.sum())
    assert kept == pytest.approx(expected, abs=0.03)


def test_an_assignment_is_balanced_and_close_to_the_best() -> None:
    from scipy.optimize import linear_sum_assignment

    scores = torch.rand(30, 3, dtype=torch.float64)
    chosen = assign(scores)
    assert torch.bincount(chosen).tolist() == [10, 10, 10]
    slots = scores.repeat_interleave(10, dim=1).numpy()
    rows, columns = linear_sum_assignment(slots, maximize=True)
    assert float(scores.gather(1, chosen[:, None]).sum()) >= 0.995 * float(slots[rows, columns].sum())


def test_one_group_and_uneven_channels_have_their_partitions() -> None:
    assert contiguous_partition(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    outputs, inputs = search_partition(torch.rand(5, 7), 1)
    assert not outputs.any()
    assert not inputs.any()


def test_the_search_is_never_worse_than_contiguous_groups_and_repeats_itself() -> None:
    mass = torch.block_diag(*[torch.full((4, 4), 1.0)] * 4)
    outputs, inputs = search_partition(mass, 4)
    assert kept_mass(mass, outputs, inputs) == 64.0
    random = torch.rand(16, 16)
    first, second = search_partition(random, 4), search_partition(random, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_exchanges_lead_from_a_bad_assignment_to_the_best_one_of_two_groups() -> None:
    # With two groups the best balanced assignment gives group 0 the rows with the largest s_0 - s_1.
    scores = torch.rand(12, 2, dtype=torch.float64)
    order = (scores[:, 0] - scores[:, 1]).argsort()
    chosen = torch.zeros(12, dtype=torch.int64)
    chosen[order[6:]] = 1  # the worst
    _exchange(scores, chosen)
    assert set(torch.where(chosen == 0)[0].tolist()) == set(order[6:].tolist())
