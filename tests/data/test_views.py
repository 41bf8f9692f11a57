"""Views of calibration pictures: what they are, and that all views of a picture are held out together."""

from __future__ import annotations

import pytest
import torch

import bgcbench
from bgcbench.conversion.layer_moments import Holding, parts_of
from bgcbench.errors import UsageError
from bgcbench.measure.batches import Passing
from bgcbench.results.rows import Record
from tests.conversion.test_budget import images, network


def pictures() -> torch.Tensor:
    """Eight images that are told by their colour."""
    texture = torch.rand(8, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    return torch.arange(8.0)[:, None, None, None] * 100 + texture


def test_the_image_itself_comes_first_and_views_are_parts_of_it() -> None:
    made = torch.cat(list(bgcbench.Views([pictures()[:3], (pictures()[3:], torch.zeros(5))], 4)))
    assert made.shape == (32, 3, 10, 12)
    torch.testing.assert_close(made[::4], pictures(), atol=1.0, rtol=0)
    assert (made / 100).round().mean((1, 2, 3)).tolist() == [number // 4 for number in range(32)]
    assert len({view.sum().item() for view in made}) > 24


def test_views_follow_from_the_seed_and_the_number_of_the_image_alone() -> None:
    x = pictures()
    before = torch.random.get_rng_state()
    whole = torch.cat(list(bgcbench.Views([x], 3, seed=5)))
    torch.testing.assert_close(torch.cat(list(bgcbench.Views(x.split(3), 3, seed=5))), whole, rtol=0, atol=0)
    assert not torch.equal(torch.cat(list(bgcbench.Views([x], 3, seed=6))), whole)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("named", ["loader", "function", "names"])
def test_all_views_of_a_picture_are_held_out_or_none(named: str) -> None:
    views = bgcbench.Views([pictures()], 3)
    given = {"loader": views.pictures, "function": lambda n: n // 3, "names": [f"p{n // 3}" for n in range(24)]}[named]
    holding = Holding(given)
    held = {n: part.held_out for part in parts_of(views, 24, Passing(), network(), holding) for n in part.numbers}
    assert [n for n, is_held_out in held.items() if is_held_out] == [9, 10, 11, 21, 22, 23]  # pictures 3 and 7
    holding.check_enough()


def test_each_image_is_a_picture_where_nothing_else_is_said() -> None:
    parts = parts_of([pictures()], 8, Passing(), network(), Holding())
    assert [n for part in parts if part.held_out for n in part.numbers] == [3, 7]


def test_conversion_and_approximability_take_the_pictures_that_a_loader_names() -> None:
    views = bgcbench.Views([images(8)], 3)
    record = bgcbench.convert(network(), "gc", 2, init="calibrated", calibration=views).record
    assert record.calibration is not None
    assert (record.calibration.images, record.calibration.held_out) == (24, 6)
    named = bgcbench.convert(
        network(), "gc", 2, init="calibrated", calibration=[torch.cat(list(views))],
        calibration_pictures=[n // 3 for n in range(24)],
    ).record  # fmt: skip
    assert named.calibration is not None
    assert [layer.after for layer in named.calibration.layers] == [layer.after for layer in record.calibration.layers]
    by_picture = bgcbench.approximability(network(), views, variants=["gc"], groups=[2], images=24)
    by_image = bgcbench.approximability(network(), list(views), variants=["gc"], groups=[2], images=24)
    assert [found.rows for found in by_picture] == [found.rows for found in by_image]
    assert [found.calibrated for found in by_picture] != [found.calibrated for found in by_image]


def test_too_few_pictures_are_refused_however_many_views() -> None:
    with pytest.raises(UsageError, match="3 pictures to calibrate on are too few; use at least 4"):
        bgcbench.convert(network(), "gc", 2, init="calibrated", calibration=bgcbench.Views([images(3)], 8))
    with pytest.raises(UsageError, match="pictures are named for 5 calibration images, and there are more"):
        bgcbench.convert(network(), "gc", 2, init="calibrated", calibration=[images(8)], calibration_pictures=range(5))
    with pytest.raises(UsageError, match="views are of batches of images"):
        list(bgcbench.Views([torch.zeros(3, 4, 4)], 2))


def test_what_is_fitted_to_too_few_pictures_is_told() -> None:
    def calibrated(x: torch.Tensor) -> Record:
        options = {"where": "none", "include": "1", "init": "calibrated", "calibration": [x]}
        return bgcbench.convert(network(), "bgc", 4, **options).record

    torch.manual_seed(0)
    record = calibrated(torch.randn(4, 3, 6, 6))
    assert any("the images are too few: calibrated layers lose over" in note for note in record.notes)
    record = calibrated(torch.randn(256, 3, 12, 12))
    assert not any("too few" in note for note in record.notes)
    assert record.calibration is not None
    (layer,) = record.calibration.layers
    assert layer.fitted == pytest.approx(layer.after, rel=0.1)
