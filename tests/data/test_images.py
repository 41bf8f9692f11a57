"""Images by name or path, and the seeded batches that every source gives."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bgcbench.data import DATASETS, Images, open_images
from bgcbench.errors import ShapeError, UsageError
from bgcbench.specs import Preprocessing


@dataclass(frozen=True)
class Numbered(Images):
    """Images whose every pixel is their own number."""

    images: int

    def __len__(self) -> int:
        return self.images

    @property
    def fingerprint(self) -> str:
        return f"{self.images} numbers"

    def read(self, chosen: Sequence[int]) -> Tensor:
        return torch.tensor(chosen, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *self.size)


def numbered(images: int, size: tuple[int, int] = (2, 3)) -> Numbered:
    """The network sees (number / 255) * 255, which is the number."""
    return Numbered("numbered", Preprocessing(size, (0.0, 0.0, 0.0), (1 / 255,) * 3), None, images)


def drawn(images: int, count: int, batch: int = 4, seed: int = 0) -> list[int]:
    return [round(image[0, 0, 0].item()) for part in numbered(images).batches(count, batch, seed) for image in part]


def test_images_come_in_batches_the_last_of_which_may_be_smaller() -> None:
    batches = list(numbered(20).batches(10, 4, 0))
    assert [part.shape for part in batches] == [(4, 3, 2, 3), (4, 3, 2, 3), (2, 3, 2, 3)]
    assert all(part.dtype == torch.float32 and part.device.type == "cpu" for part in batches)


def test_no_image_comes_twice_and_with_too_many_asked_for_all_come_once() -> None:
    assert len(set(drawn(200, 150))) == 150
    assert sorted(drawn(20, 500)) == list(range(20))


def test_the_choice_follows_from_the_seed_and_the_number_of_images_alone() -> None:
    chosen = drawn(50, 20, batch=4)
    assert chosen == drawn(50, 20, batch=4) == drawn(50, 20, batch=20) == drawn(50, 20, batch=1)
    assert chosen == [round(v) for part in numbered(50, (5, 5)).batches(20, 7, 0) for v in part[:, 0, 0, 0].tolist()]
    assert chosen[:5] == drawn(50, 5)
    assert chosen != drawn(50, 20, seed=1)
    assert chosen != sorted(chosen)


def test_the_global_random_states_are_neither_used_nor_moved() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = drawn(50, 20)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
    torch.manual_seed(12345)
    assert drawn(50, 20) == first


@pytest.mark.parametrize(("count", "batch", "named"), [(0, 1, "count=0"), (1, 0, "batch=0"), (-3, 1, "count=-3")])
def test_counts_below_one_are_refused_before_the_first_batch(count: int, batch: int, named: str) -> None:
    with pytest.raises(ShapeError, match=named):
        numbered(5).batches(count, batch, 0)


def test_digits_are_there_by_name() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = open_images("digits")
    assert (digits.name, digits.size, digits.num_classes, len(digits)) == ("digits", (16, 16), 10, 1297)
    (batch,) = open_images("digits", (8, 8)).batches(5000, 5000, 3)
    assert batch.shape == (1297, 3, 8, 8)
    # Normalised training images at their own size: mean 0 and deviation 1, but for rounding to bytes.
    assert batch.mean().item() == pytest.approx(0, abs=2e-3)
    assert batch.std().item() == pytest.approx(1, abs=2e-3)
    levels = np.unique(np.rint(datasets.load_digits().images * 255 / 16))
    np.testing.assert_allclose(np.unique(batch.numpy()), (levels / 255 - 0.306178) / 0.376571, atol=1e-6)


def test_a_folder_is_there_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path.parent)
    by_name, by_path = open_images(tmp_path.name), open_images(str(tmp_path), (6, 4))
    assert (by_name.name, by_name.size, by_name.num_classes, len(by_name)) == (tmp_path.name, (224, 224), None, 5)
    assert [part.shape for part in by_path.batches(3, 2, 0)] == [(2, 3, 6, 4), (1, 3, 6, 4)]
    again = zip(by_path.batches(5, 2, 0), by_path.batches(5, 2, 0), strict=True)
    assert all(torch.equal(one, other) for one, other in again)


def test_a_name_wins_over_a_folder_of_that_name_which_its_path_reaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "digits").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "digits" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_images("digits")) == 1297
    assert len(open_images("./digits")) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("digit", "unknown data set 'digit': did you mean 'digits'? choose from digits, or give the path of a "
         "folder of images"),
        ("holiday", "unknown data set 'holiday': choose from digits, or give the path of a folder of images"),
        ("", "unknown data set ''"),
        ("./digits", "./digits is not there"),
        ("/no/such/images", "/no/such/images is not there"),
    ],
)  # fmt: skip
def test_what_is_neither_a_name_nor_a_folder_is_refused(
    data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        open_images(data)


def test_every_registered_name_opens_what_it_names() -> None:
    pytest.importorskip("sklearn")
    assert all(open_images(name).name == name for name in DATASETS)
