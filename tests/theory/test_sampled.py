from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from bgcbench.theory import sampled
from bgcbench.theory.sampled import contiguous_rows, group_moments, he_rows, shuffled_rows

ROWS = {"contiguous": contiguous_rows, "shuffled": shuffled_rows}
SAMPLES, SIZE = 5, 7
# Chains, where each divides the next, and lists where groups build on several others or none.
LISTS = [(1,), (4,), (2, 4, 8), (1, 2, 4, 8, 24), (2, 3, 4, 6), (2, 3, 6), (2, 3, 4, 6, 12), (3, 8), (1, 24), (2, 6, 8)]


def drawn(row: int) -> Tensor:
    return torch.randn(SAMPLES, SIZE, generator=torch.Generator().manual_seed(row), dtype=torch.float64)


@pytest.mark.parametrize(("channels", "groups"), [(12, 1), (12, 3), (12, 4), (12, 12), (8, 2)])
def test_contiguous_groups_are_runs_and_shuffled_ones_those_behind_a_channel_shuffle(
    channels: int, groups: int
) -> None:
    per_group = channels // groups
    before = torch.arange(channels).reshape(1, channels, 1, 1)
    assert contiguous_rows(channels, groups) == [row // per_group for row in range(channels)]
    shuffled = torch.nn.ChannelShuffle(groups)(before).flatten()
    assert shuffled_rows(channels, groups) == [int(source) // per_group for source in shuffled]


@pytest.mark.parametrize("stripe", [3, 192])  # columns that are formed at once: several stripes, and one
@pytest.mark.parametrize("order", ROWS)
@pytest.mark.parametrize("numbers", LISTS)
def test_every_group_comes_once_with_the_moment_of_its_rows(
    numbers: tuple[int, ...], order: str, stripe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled, "STRIPE", stripe)
    rows, m = ROWS[order], 24
    found: dict[tuple[int, int], Tensor] = {}
    asked: list[int] = []

    def draw(row: int) -> Tensor:
        asked.append(row)
        return drawn(row)

    shares = []
    for share, complete in group_moments(draw, {n: rows(m, n) for n in numbers}, m):
        shares.append(share)
        for each in complete:
            assert (each.groups, each.group) not in found
            found[each.groups, each.group] = each.matrix.clone()  # valid until the next one is asked for
    assert sorted(asked) == list(range(m))  # no row is drawn twice
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert set(found) == {(n, k) for n in numbers for k in range(n)}
    for (n, k), matrix in found.items():
        members = torch.cat([drawn(row) for row, group in enumerate(rows(m, n)) if group == k])
        torch.testing.assert_close(matrix, members.T @ members, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("numbers", [(8, 4, 2), (6, 2, 4, 3)])
def test_the_order_in_which_numbers_are_asked_for_does_not_matter(numbers: tuple[int, ...]) -> None:
    results = []
    for each in (numbers, sorted(numbers)):
        steps = group_moments(drawn, {n: contiguous_rows(24, n) for n in each}, 24)
        results.append([(g.groups, g.group, g.matrix.clone()) for _, complete in steps for g in complete])
    for one, other in zip(*results, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("order", ROWS)
def test_a_group_is_handed_on_before_any_row_of_the_next_is_drawn(order: str) -> None:
    rows, seen = ROWS[order](24, 2), []
    group_of = {n: ROWS[order](24, n) for n in (2, 4, 12)}
    steps = group_moments(lambda row: (seen.append(row), drawn(row))[1], group_of, 24)
    for share, complete in steps:
        assert share == len(seen) / 24
        assert any(group.groups == 12 for group in complete)  # the finest groups never wait
        if any(group.groups == 2 for group in complete):
            finished = {rows[row] for row in seen}
            assert len(seen) == 12 * len(finished)  # whole groups of two so far, and nothing of another


def test_no_more_than_one_unfinished_group_of_each_number_is_held_along_a_chain() -> None:
    steps = group_moments(drawn, {n: shuffled_rows(24, n) for n in (2, 4, 12)}, 24)
    for _ in steps:
        held = [groups for groups, _ in steps.gi_frame.f_locals["unfinished"]]  # type: ignore[attr-defined]
        assert len(held) == len(set(held))


@pytest.mark.parametrize("limit", [1, SAMPLES * SIZE, 2 * SAMPLES * SIZE, 3 * SAMPLES * SIZE - 1])
def test_how_many_rows_go_into_one_product_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "PRODUCT_NUMBERS", limit)
    joined, cat = [], torch.cat

    def joining(parts: list[Tensor]) -> Tensor:
        joined.append(cat(parts))
        return joined[-1]

    monkeypatch.setattr(torch, "cat", joining)
    (_, (only,)), *rest = group_moments(drawn, {1: [0] * 7}, 7)
    monkeypatch.undo()
    assert not rest
    assert max(part.numel() for part in joined) <= max(limit, SAMPLES * SIZE)
    assert len(joined) == -(-7 // max(1, limit // (SAMPLES * SIZE)))
    rows = torch.cat([drawn(row) for row in range(7)])
    torch.testing.assert_close(only.matrix, rows.T @ rows, rtol=1e-12, atol=1e-12)


def seeds(base: int) -> Callable[[str], int]:
    return lambda part: zlib.crc32(f"{base}:{part}".encode())


def test_rows_are_normal_with_hes_variance() -> None:
    samples, size = 4000, 12
    rows = he_rows(0, samples, size, seeds(0), torch.float64)
    assert rows.shape == (samples, size)
    assert stats.kstest((rows * math.sqrt(size / 2)).flatten().numpy(), stats.norm.cdf).pvalue > 1e-3
    count = rows.numel()
    assert float(rows.mean()) == pytest.approx(0.0, abs=5 * math.sqrt(2 / size / count))
    assert float(rows.square().mean()) == pytest.approx(2 / size, rel=5 * math.sqrt(2 / count))
    mixed = torch.corrcoef(rows.T) - torch.eye(size)
    assert float(mixed.abs().max()) < 5 / math.sqrt(samples)


def test_their_spread_is_that_of_torchs_own_he_initialisation() -> None:
    weight = torch.nn.init.kaiming_normal_(torch.empty(400, 8, 3, 3), mode="fan_in", nonlinearity="relu")
    rows = he_rows(0, 400, 72, seeds(0), torch.float64)
    assert float(rows.std()) == pytest.approx(float(weight.std()), rel=5 * math.sqrt(1 / weight.numel()))


def test_a_row_depends_on_nothing_but_seed_row_and_shape() -> None:
    before = torch.get_rng_state()
    alone = he_rows(3, 6, 8, seeds(0), torch.float64)
    he_rows(2, 6, 8, seeds(0), torch.float64)
    assert torch.equal(alone, he_rows(3, 6, 8, seeds(0), torch.float64))
    assert not torch.equal(alone, he_rows(3, 6, 8, seeds(1), torch.float64))
    assert torch.equal(before, torch.get_rng_state())


def test_rows_of_different_outputs_have_nothing_in_common() -> None:
    rows = torch.stack([he_rows(row, 500, 20, seeds(0), torch.float64).flatten() for row in range(6)])
    mixed = torch.corrcoef(rows) - torch.eye(6)
    assert float(mixed.abs().max()) < 5 / math.sqrt(rows.shape[1])


def test_they_are_drawn_in_single_precision_whatever_they_are_computed_in() -> None:
    double, single = (he_rows(1, 6, 8, seeds(0), dtype) for dtype in (torch.float64, torch.float32))
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(double, single.double(), rtol=2e-7, atol=0)
    scaled = double / math.sqrt(2 / 8)
    torch.testing.assert_close(scaled, scaled.float().double(), rtol=1e-15, atol=0)


def test_the_part_that_asks_for_a_seed_names_the_row() -> None:
    asked: list[str] = []
    he_rows(17, 2, 4, lambda part: len(asked) or asked.append(part) or 5, torch.float64)
    assert asked == ["weights:17"]
