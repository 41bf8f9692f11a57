"""Data sets to train on, by name or path, and what all of them offer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from bgcbench.data import LABELLED, LabelledData, open_labelled
from bgcbench.data.digits import open_digits
from bgcbench.data.feeds import FolderFeed, ResidentFeed
from bgcbench.data.folder import IMAGENET_EVALUATION, load_image
from bgcbench.data.labelled import FolderData, ResidentData, search
from bgcbench.errors import ShapeError, UsageError, some
from bgcbench.specs import TRAINING_SETS, Preprocessing
from tests.data.test_folder import save

CPU = torch.device("cpu")


def resident(**changes: Any) -> ResidentData:
    """Six images to train with and four to test with."""
    data = ResidentData(
        name="counted",
        preprocessing=Preprocessing((2, 3), (0.5,) * 3, (0.5,) * 3),
        num_classes=3,
        train_labels=torch.arange(6) % 3,
        test_labels=torch.arange(4) % 3,
        train_images=torch.arange(6 * 18, dtype=torch.uint8).view(6, 3, 2, 3),
        test_images=torch.arange(4 * 18, dtype=torch.uint8).view(4, 3, 2, 3),
        pad=1,
        flip=True,
    )
    return replace(data, **changes)


def test_the_names_that_can_be_chosen_are_those_that_can_be_opened() -> None:
    assert tuple(LABELLED) == TRAINING_SETS


def test_digits_have_the_labels_and_the_split_of_their_file() -> None:
    pytest.importorskip("sklearn")
    data, digits = open_labelled("digits", None, []), open_digits()
    assert isinstance(data, ResidentData)
    for images, labels, chosen in (
        (data.train_images, data.train_labels, digits.train),
        (data.test_images, data.test_labels, digits.test),
    ):
        assert torch.equal(images, digits.pixels[list(chosen)])
        assert torch.equal(labels, digits.labels[list(chosen)])
    assert (data.name, data.size, data.num_classes, data.pad, data.flip) == ("digits", (16, 16), 10, 2, False)
    assert (data.mean, data.std, data.meaningful, data.notes) == (digits.mean, digits.std, True, ())
    assert open_labelled("digits", (8, 12), [Path("/nowhere")]).size == (8, 12)


def test_a_resident_feed_has_the_data_sets_images_and_augmentation() -> None:
    data = resident()
    feed = data.feed(CPU, workers=3)
    assert isinstance(feed, ResidentFeed)
    assert (feed.pad, feed.flip, feed.count) == (1, True, 6)
    ((images, labels),) = feed.test([torch.tensor([3, 1])])
    assert torch.equal(images, data.test_images[[3, 1]])
    assert torch.equal(labels, data.test_labels[[3, 1]])
    ((_, labels),) = feed.train([torch.arange(6)], 0, 0)
    assert torch.equal(labels, data.train_labels)


def altered(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] += 1
    return changed


def test_the_fingerprint_changes_with_any_pixel_label_size_and_split() -> None:
    data = resident()
    seen = {resident(**{part: altered(getattr(data, part))}).fingerprint
            for part in ("train_images", "test_images", "train_labels", "test_labels")}  # fmt: skip
    seen.add(resident(train_images=data.train_images.view(6, 3, 3, 2)).fingerprint)
    seen.add(resident(train_images=data.test_images, test_images=data.train_images).fingerprint)
    seen.add(data.fingerprint)
    assert len(seen) == 7
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in seen)
    assert resident(name="other", pad=0, flip=False).fingerprint == data.fingerprint
    assert resident(train_images=data.train_images.contiguous(memory_format=torch.channels_last)).fingerprint == (
        data.fingerprint
    )


def test_a_folder_feed_reads_with_as_many_workers_as_asked(tmp_path: Path) -> None:
    data = FolderData("f", IMAGENET_EVALUATION.at((4, 4)), 2, torch.tensor([0]), torch.tensor([1]),
                      train_root=tmp_path, test_root=tmp_path, train_files=("a",), test_files=("b",))  # fmt: skip
    feed = data.feed(CPU, workers=3)
    assert isinstance(feed, FolderFeed)
    assert (feed.workers, feed.how) == (3, data.preprocessing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar-10", "unknown data set 'cifar-10': did you mean 'cifar10'? choose from digits, cifar10, imagenet, "
         "folder, unlabelled, synthetic, or give the path of a folder with the folders train and val"),
        ("holiday", "unknown data set 'holiday': choose from digits,"),
        ("", "unknown data set ''"),
        ("./digits", "folder was not found: digits is not there; give --data-dir"),
    ],
)  # fmt: skip
def test_what_is_neither_a_name_nor_a_folder_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="^" + re.escape(message)):
        open_labelled(name, None, [])


@pytest.mark.parametrize("name", ["digits", "imagenet", "folder", "synthetic", "/"])
def test_only_cifar10_is_downloaded(name: str) -> None:
    with pytest.raises(UsageError, match=r"^--download is for cifar10, not for \w+; leave it out$"):
        open_labelled(name, None, [Path("/")], download=True)


@pytest.mark.parametrize("given", [{"classes": 10}, {"counts": (5, 5)}])
def test_only_synthetic_images_have_as_many_classes_and_images_as_asked(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^numbers of .* are for synthetic, and digits has its own; leave"):
        open_labelled("digits", None, [], **given)
    data = open_labelled("synthetic", (4, 4), [], classes=10, counts=(5, 5))
    assert (data.name, data.num_classes, len(data.test_labels)) == ("synthetic", 10, 5)


@pytest.mark.parametrize("name", ["digits", "cifar10", "synthetic"])
def test_a_size_below_one_pixel_is_refused(name: str) -> None:
    if name == "digits":
        pytest.importorskip("sklearn")
    with pytest.raises(ShapeError, match="size=0"):
        open_labelled(name, (0, 0), [Path("/")])


def test_a_search_takes_the_first_and_joins_the_reasons_of_those_that_have_it_not(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name / f"in_{name}").mkdir(parents=True)
    (tmp_path / "file").write_text("")

    def look(wanted: str) -> Callable[[Path, set[str]], Path | str]:
        return lambda place, names: place / wanted if wanted in names else f"{place.name} has {len(names)}"

    dirs = [tmp_path / name for name in ("x", "a", "file", "b", "c", "file/x")]
    assert search(dirs, look("in_b")) == tmp_path / "b" / "in_b"
    assert search(dirs, look("in_x")) == (
        f"{tmp_path}/x is not there; a has 1; file has 0; b has 1; c has 1; {tmp_path}/file/x cannot be listed (Not a "
        "directory)"
    )


def test_a_few_names_stand_for_many() -> None:
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some([str(n) for n in range(1003)]) == "0, 1, 2 and 1,000 more"


def test_every_data_set_is_one_of_labelled_data() -> None:
    data = open_labelled("synthetic", (4, 4), [], counts=(5, 5))
    assert isinstance(data, LabelledData)


def test_calibration_images_are_those_to_train_with_and_not_augmented() -> None:
    data = resident(preprocessing=Preprocessing((2, 3), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)))
    images = data.calibration()
    assert (images.name, images.size, images.num_classes, len(images)) == ("counted", (2, 3), 3, 6)
    assert torch.equal(images.read([4, 1]), data.train_images[[4, 1]])
    batches = list(images.batches(5, 2, seed=3))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    drawn = torch.cat(batches)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    every = (data.train_images / 255 - mean) / std
    # each is one of the training images, and none comes twice
    matches = [int((image - every).abs().amax(dim=(1, 2, 3)).argmin()) for image in drawn]
    assert torch.allclose(drawn, every[matches], atol=1e-6)
    assert len(set(matches)) == 5
    assert images.fingerprint != resident(train_images=altered(data.train_images)).calibration().fingerprint


@pytest.mark.parametrize(
    ("files", "train", "test"),
    [
        ([f"{n}.png" for n in range(6)], ["1.png", "2.png", "3.png", "5.png"], ["0.png", "4.png"]),
        (["train/a.png", "train/b.png", "val/c.png", "d.png"], ["train/a.png", "train/b.png"], ["val/c.png"]),
        (["val/a.png", "val/b.png"], ["val/b.png"], ["val/a.png"]),
    ],
)
def test_images_without_labels_are_divided_into_those_to_train_and_to_evaluate(
    files: list[str], train: list[str], test: list[str], tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / file)
    data = open_labelled("unlabelled", (8, 8), [tmp_path], classes=7)
    assert isinstance(data, FolderData)
    splits = (data.train_root, data.train_files), (data.test_root, data.test_files)
    found = [[(root / name).relative_to(tmp_path).as_posix() for name in names] for root, names in splits]
    assert found == [train, test]
    assert (data.num_classes, data.labelled, data.meaningful) == (7, False, False)


def test_too_few_images_without_labels_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="has too few images"):
        open_labelled("unlabelled", (8, 8), [tmp_path], classes=7)


def test_calibration_images_in_files_are_read_as_those_to_test_with(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / "train" / f"{name}.png", 20, 30)
    how = Preprocessing((8, 12), (0.5,) * 3, (0.25,) * 3, (10, 14), "box")
    data = FolderData("f", how, 2, torch.tensor([0, 1, 1]), torch.tensor([1]),
                      train_root=tmp_path / "train", test_root=tmp_path, train_files=("a.png", "b.png", "c.png"),
                      test_files=("gone.png",))  # fmt: skip
    images = data.calibration()
    assert (len(images), images.size, images.num_classes) == (3, (8, 12), 2)
    assert torch.equal(images.read([1])[0], load_image(tmp_path / "train" / "b.png", how))
    (batch,) = images.batches(9, 64, seed=0)
    assert batch.shape == (3, 3, 8, 12)
    pixels = batch.mul(0.25).add(0.5).mul(255).round()
    assert sorted(float(image.sum()) for image in pixels) == sorted(float(images.read([n]).sum()) for n in range(3))
