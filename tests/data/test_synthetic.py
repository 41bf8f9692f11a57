"""Random images with random labels: the same every time, and never mistaken for a result."""

from __future__ import annotations

import pytest
import torch

from bgcbench.data.synthetic import open_synthetic
from bgcbench.errors import ShapeError


def test_images_and_labels_are_random_and_the_same_every_time() -> None:
    data, again = open_synthetic(), open_synthetic()
    assert data.fingerprint == again.fingerprint != open_synthetic(classes=11).fingerprint
    # Uniform bytes: mean 127.5, deviation sqrt((256^2 - 1) / 12) = 73.9, over 6.3 million of them.
    assert data.train_images.float().mean().item() == pytest.approx(127.5, abs=5 * 73.9 / 6.29e6**0.5)
    assert data.train_images.float().std().item() == pytest.approx(73.9, abs=0.1)
    # 205 of each label, give or take 5 standard deviations of 13.6.
    assert (torch.bincount(data.train_labels, minlength=10) - 204.8).abs().max() < 5 * 13.6
    assert not torch.equal(data.train_images[:512], data.test_images)


@pytest.mark.parametrize(
    ("size", "train", "test", "pad"),
    [(None, 2048, 512, 4), ((64, 48), 2048, 512, 4), ((65, 8), 512, 128, 0), ((8, 65), 512, 128, 0)],
)
def test_large_images_are_fewer_and_not_padded(size: tuple[int, int] | None, train: int, test: int, pad: int) -> None:
    data = open_synthetic(size)
    assert data.size == (size or (32, 32))
    assert data.train_images.shape == (train, 3, *data.size)
    assert data.test_images.shape == (test, 3, *data.size)
    assert (len(data.train_labels), len(data.test_labels)) == (train, test)
    assert (data.pad, data.flip) == (pad, True)


def test_classes_and_counts_can_be_chosen() -> None:
    data = open_synthetic((8, 8), 1000, (5000, 7))
    assert data.num_classes == 1000
    assert (len(data.train_images), len(data.test_images)) == (5000, 7)
    assert 990 < data.train_labels.max() < 1000


def test_what_it_is_not_for_is_said() -> None:
    data = open_synthetic((8, 8))
    assert not data.meaningful
    assert data.notes == ("the images and labels are random: the speed is measured, and an error rate says nothing",)


def test_sizes_and_counts_below_one_and_a_single_class_are_refused() -> None:
    for arguments, message in (
        (((0, 8),), "size=0"),
        (((8, 8), 1), "classes=1 must be a whole number of at least 2"),
        (((8, 8), 0), "classes=0"),
        (((8, 8), 2, (0, 5)), "images=0"),
        (((8, 8), 2, (5, 0)), "images=0"),
    ):
        with pytest.raises(ShapeError, match=message):
            open_synthetic(*arguments)
