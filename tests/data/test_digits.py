"""scikit-learn's digits: one fixed split, honest pixels. Truth is numpy's, from the file itself."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from bgcbench.data.digits import MEAN, STD, Digits, open_digits, split
from bgcbench.errors import ShapeError, UsageError

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return open_digits()


@pytest.fixture(scope="module")
def native() -> np.ndarray:
    return datasets.load_digits().images


def enlarged(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with half-pixel centres, one axis after the other."""
    for side in (height, width):
        at = (np.arange(side) + 0.5) * len(image) / side - 0.5
        image = np.stack([np.interp(at, np.arange(len(image)), column) for column in image.T])
    return image


def test_1297_digits_are_for_training_and_the_other_500_for_testing(digits: Digits) -> None:
    assert (len(digits), len(digits.train), len(digits.test)) == (1297, 1297, 500)
    assert sorted(digits.train + digits.test) == list(range(1797))


def test_the_split_is_the_same_for_ever_whatever_the_size(digits: Digits) -> None:
    stated = hashlib.sha256(",".join(map(str, digits.test)).encode()).hexdigest()
    assert stated == "1be497501048bdb6b7137f1207d70345d8732ca16f49ec3ba28ad06c4a27a926"
    assert open_digits((8, 11)).test == digits.test


def test_each_class_is_tested_within_one_image_of_its_share(digits: Digits) -> None:
    everywhere = Counter(digits.labels.tolist())
    tested = Counter(digits.labels[list(digits.test)].tolist())
    assert sorted(everywhere) == list(range(10)) == sorted(tested)
    assert all(abs(tested[label] - 500 * n / 1797) < 1 for label, n in everywhere.items())


def test_images_left_over_by_rounding_go_to_the_largest_remainders_then_to_the_lowest_class() -> None:
    # Shares of 500 in 1000: 166.5, 166.5 and 167 exactly; one image is left over, for the lower of the equal two.
    labels = [2] * 334 + [1] * 333 + [0] * 333
    _, test = split(labels)
    assert Counter(labels[number] for number in test) == {0: 167, 1: 166, 2: 167}


def test_the_constants_are_those_of_the_training_pixels_at_8_by_8(digits: Digits, native: np.ndarray) -> None:
    pixels = native[list(digits.train)] / 16
    assert pytest.approx(pixels.mean(), abs=5e-7) == MEAN
    assert pytest.approx(pixels.std(), abs=5e-7) == STD
    assert (digits.mean, digits.std) == ((MEAN,) * 3, (STD,) * 3)


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (11, 24), (32, 20)])
def test_pixels_are_resized_bilinearly_and_stored_in_bytes(native: np.ndarray, size: tuple[int, int]) -> None:
    digits = open_digits(size)
    assert digits.size == size
    assert (digits.pixels.shape, digits.pixels.dtype) == ((1797, 3, *size), torch.uint8)
    for number in (0, 700, 1796):
        expected = enlarged(native[number] * 255 / 16, *size)
        channels = digits.pixels[number].numpy().astype(float)
        np.testing.assert_allclose(channels, np.stack([expected] * 3), atol=0.5 + 1e-4)


def test_read_gives_training_images_only(digits: Digits) -> None:
    batch = digits.read([0, 1296])
    assert torch.equal(batch, digits.pixels[[digits.train[0], digits.train[1296]]])


def test_digits_have_ten_classes_and_a_name_for_file_names(digits: Digits) -> None:
    assert (digits.name, digits.num_classes, digits.size) == ("digits", 10, (16, 16))


def test_without_scikit_learn_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"^the digits data set needs scikit-learn; pip install 'bgcbench\[digits\]'$"):
        open_digits()


def test_a_size_below_one_pixel_is_refused() -> None:
    with pytest.raises(ShapeError, match="size=0"):
        open_digits((0, 16))


def test_the_fingerprint_is_that_of_the_pixels() -> None:
    assert open_digits().fingerprint == open_digits((16, 16)).fingerprint != open_digits((8, 8)).fingerprint


def test_the_test_split_has_the_other_images_and_their_labels() -> None:
    digits = open_digits()
    other = digits.test_split
    assert len(other) == 500
    assert other.test == digits.test
    numbers = other.order(7, seed=3)
    assert torch.equal(other.read(numbers), digits.pixels[[digits.test[n] for n in numbers]])
    assert torch.equal(other.labels_of(numbers), digits.labels[[digits.test[n] for n in numbers]])
