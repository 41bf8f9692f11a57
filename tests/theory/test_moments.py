from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from bgcbench.errors import ShapeError
from bgcbench.theory import moments
from bgcbench.theory.moments import Patches, PatchMoments, patch_second_moment, some_positions

SHAPES = [
    pytest.param((3, 3), {}, id="plain"),
    pytest.param((3, 3), {"padding": (1, 1)}, id="padded"),
    pytest.param((3, 2), {"stride": (2, 1), "padding": (1, 0)}, id="stride"),
    pytest.param((2, 3), {"dilation": (2, 1), "padding": (0, 2)}, id="dilation"),
    pytest.param((2, 2), {"stride": (1, 3), "dilation": (3, 2), "padding": (2, 1)}, id="everything"),
]


def patches(x: Tensor, kernel: tuple[int, int], **geometry: Any) -> Tensor:
    """All patches of x (B, n, H, W), cut out one by one: (B, D, nK), channel-major, then taps row by row."""
    pad, stride, dilation = (
        geometry.get(name, default) for name, default in (("padding", (0, 0)), ("stride", (1, 1)), ("dilation", (1, 1)))
    )
    padded = torch.nn.functional.pad(x, (pad[1], pad[1], pad[0], pad[0]))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    cut = [
        padded[:, :, top : top + spans[0] : dilation[0], left : left + spans[1] : dilation[1]].flatten(1)
        for top in range(0, padded.shape[2] - spans[0] + 1, stride[0])
        for left in range(0, padded.shape[3] - spans[1] + 1, stride[1])
    ]
    return torch.stack(cut, 1)


def added(x: Tensor, kernel: tuple[int, int], **options: Any) -> PatchMoments:
    found = PatchMoments(x.shape[1], kernel, **options)
    found.add(x)
    return found


def test_the_second_moment_is_the_mean_of_outer_products_of_patches() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    patches = torch.nn.functional.unfold(x, 2, stride=2)  # (2, 12, 4)
    expected = sum(torch.outer(patches[b, :, d], patches[b, :, d]) for b in range(2) for d in range(4)) / 8
    torch.testing.assert_close(patch_second_moment(x, (2, 2), stride=(2, 2)), expected)


def test_a_patch_and_a_kernel_are_flattened_in_the_same_order() -> None:
    x, weight = (torch.randn(s, dtype=torch.float64) for s in ((1, 3, 3, 3), (2, 3, 3, 3)))
    moment = patch_second_moment(x, (3, 3))
    y = torch.nn.functional.conv2d(x, weight).flatten()
    torch.testing.assert_close((weight.flatten(1) @ moment @ weight.flatten(1).T).diagonal(), y.square())


@pytest.mark.parametrize(("kernel", "geometry"), SHAPES)
def test_it_sums_outer_products_and_patches_over_all_positions(kernel: tuple[int, int], geometry: dict) -> None:
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64) + 0.5
    cut = patches(x, kernel, **geometry)
    flat = cut.flatten(0, 1)
    found = added(x, kernel, **geometry)
    torch.testing.assert_close(found.total, flat.T @ flat, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.first, flat.sum(0), rtol=1e-12, atol=1e-12)
    assert found.positions == flat.shape[0]
    torch.testing.assert_close(found.moment, flat.T @ flat / len(flat), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean, flat.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(patch_second_moment(x, kernel, **geometry), found.moment, rtol=0, atol=0)


def test_the_moment_is_about_zero_and_not_about_the_mean() -> None:
    assert patch_second_moment(torch.full((2, 1, 3, 3), 2.0), (1, 1)).tolist() == [[4.0]]


def test_inputs_added_in_parts_count_as_if_they_came_together() -> None:
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    together, parts = added(x, (3, 3), padding=(1, 1)), PatchMoments(2, (3, 3), padding=(1, 1))
    for part in (x[:2], x[2:2], x[2:]):
        parts.add(part)
    torch.testing.assert_close(parts.total, together.total, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(parts.first, together.first, rtol=1e-13, atol=1e-13)
    assert parts.positions == together.positions == 80


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_how_many_patches_are_formed_at_once_changes_nothing_but_memory(
    images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 3, 6, 8, dtype=torch.float64)
    whole = added(x, (3, 3), stride=(2, 2), padding=(1, 1))
    formed, unfold = [], torch.nn.functional.unfold

    def counting(*arguments: Any) -> Tensor:
        formed.append(unfold(*arguments))
        return formed[-1]

    monkeypatch.setattr(torch.nn.functional, "unfold", counting)
    limit = images * 27 * 3 * 4  # nK numbers at each of the 3 x 4 positions
    monkeypatch.setattr(moments, "CHUNK_NUMBERS", limit)
    chunked = added(x, (3, 3), stride=(2, 2), padding=(1, 1))
    assert max(part.numel() for part in formed) == limit
    assert len(formed) == -(-5 // images)
    torch.testing.assert_close(chunked.total, whole.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked.first, whole.first, rtol=1e-12, atol=1e-12)
    assert chunked.positions == whole.positions == 60


def test_one_image_is_taken_at_a_time_where_even_that_is_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    whole = added(x, (3, 3))
    monkeypatch.setattr(moments, "CHUNK_NUMBERS", 1)
    torch.testing.assert_close(added(x, (3, 3)).total, whole.total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "geometry"), SHAPES)
def test_a_patch_at_a_position_is_that_of_all_patches(kernel: tuple[int, int], geometry: dict) -> None:
    x, cut = torch.randn(1, 3, 7, 6, dtype=torch.float64), Patches(kernel, **geometry)
    width, whole = cut.output_size(x)[1], cut.all(x)
    assert torch.equal(whole.T, patches(x, kernel, **geometry)[0])
    for chosen in (torch.arange(whole.shape[1]), some_positions(whole.shape[1], 3)):
        assert torch.equal(cut.at(x[0], chosen // width, chosen % width), whole[:, chosen])


def drawn(seed: int, at_most: int = 4) -> list[int]:
    return some_positions(12, at_most, torch.Generator().manual_seed(seed)).tolist()


def test_positions_are_drawn_without_repetition_in_order_and_by_the_seed() -> None:
    for at_most in (1, 5, 11):
        assert len(set(drawn(3, at_most))) == at_most
        assert drawn(3, at_most) == sorted(drawn(3, at_most))
    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(10)}) > 5


def test_every_position_is_taken_equally_often() -> None:
    counts = Counter(position for seed in range(400) for position in drawn(seed, 3))
    assert all(100 - 5 * 9 < counts[at] < 100 + 5 * 9 for at in range(12))  # binomial(400, 1/4), five deviations


def test_it_adds_up_in_its_own_dtype_whatever_that_of_the_inputs() -> None:
    x = torch.randn(2, 2, 3, 3)
    exact = added(x, (2, 2))
    assert exact.total.dtype == exact.first.dtype == torch.float64
    torch.testing.assert_close(exact.total, added(x.double(), (2, 2)).total, rtol=0, atol=0)
    single = added(x.double(), (2, 2), dtype=torch.float32)
    assert single.total.dtype == single.first.dtype == torch.float32
    torch.testing.assert_close(single.total.double(), exact.total, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_inputs_graph_is_kept() -> None:
    found = added(torch.randn(1, 2, 3, 3, requires_grad=True), (1, 1))
    assert not found.total.requires_grad
    assert not found.first.requires_grad


def test_no_images_have_no_second_moment() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        patch_second_moment(torch.empty(0, 3, 4, 4), (1, 1))


def test_no_images_have_no_mean_either_until_some_come() -> None:
    found = PatchMoments(2, (1, 1))
    for ask in ("mean", "moment"):
        with pytest.raises(ShapeError, match="at least one"):
            getattr(found, ask)
    found.add(torch.ones(1, 2, 1, 1))
    assert found.mean.tolist() == [1.0, 1.0]
