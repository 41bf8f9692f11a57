"""Folders of classes: what is taken, what is refused. Truth is torchvision's ImageFolder on the same folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

from bgcbench.data import imagefolder, labelled, open_labelled
from bgcbench.data.folder import IMAGENET_EVALUATION, load_image
from bgcbench.data.imagefolder import IMAGENET, Expected, open_imagefolder, open_imagenet
from bgcbench.errors import ShapeError, UsageError
from tests.data.test_folder import save

CLASSES = ("n01", "n02", "n10")


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, 3 images each to train with and 2 to test with: enough for everything that opens no image."""
    top = tmp_path / "photos"
    for name in CLASSES:
        touch(top, *(f"train/{name}/{n}.JPEG" for n in range(3)), *(f"val/{name}/{n}.JPEG" for n in range(2)))
    return top


@pytest.fixture
def small_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagefolder, "IMAGENET", Expected(3, 9, 6))


def refusal(top: Path, name: str = "folder") -> str:
    with pytest.raises(UsageError) as refused:
        open_labelled(name, None, [top])
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_files_and_labels_are_those_of_torchvisions_imagefolder(root: Path) -> None:
    touch(root, "train/Zebra/b.png", "train/Zebra/a.PNG", "train/ant/inside/1.webp", "train/ant/2.jpg",
          "train/ant/x.txt", "train/n01-b/1.jpg", "val/Zebra/1.png", "val/ant/1.png", "val/n01-b/1.jpg")  # fmt: skip
    data = open_imagefolder(None, [root])
    for split, top, files, labels in (
        ("train", data.train_root, data.train_files, data.train_labels),
        ("val", data.test_root, data.test_files, data.test_labels),
    ):
        truth = ImageFolder(root / split)
        samples = [(os.path.join(top, name), label) for name, label in zip(files, labels.tolist(), strict=True)]
        assert sorted(samples) == sorted(truth.samples)
        assert [label for _, label in samples] == truth.targets
        assert len(truth.class_to_idx) == data.num_classes == 6
    assert data.train_labels.dtype == torch.int64
    assert (data.name, data.size, data.notes) == ("photos", (224, 224), ())
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_hidden_files_and_folders_are_skipped(root: Path) -> None:
    touch(root, "train/.thumbnails/1.png", "train/n01/.1.png", "train/.2.png", "val/.DS_Store")
    data = open_imagefolder(None, [root])
    assert (data.num_classes, len(data.train_files), data.notes) == (3, 9, ())


def test_images_beside_the_classes_are_not_used_and_that_is_said(root: Path) -> None:
    touch(root, "val/1.png", "val/2.png", "val/notes.txt")
    data = open_imagefolder(None, [root])
    assert len(data.test_files) == 6
    assert data.notes == (f"{root}/val has 2 images outside the folders of the classes, which are not used",)


@pytest.mark.parametrize("split", ["val", "valid", "validation", "test"])
def test_the_second_split_may_have_other_names(root: Path, split: str) -> None:
    (root / "val").rename(root / split)
    assert open_imagefolder(None, [root]).test_root == root / split


def test_of_several_second_splits_val_comes_before_test(root: Path) -> None:
    touch(root, "test/1.png")
    assert open_imagefolder(None, [root]).test_root == root / "val"


def test_a_path_is_a_data_set_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert open_labelled(".", (8, 8), [Path("/nowhere")]).name == "photos"
    assert open_labelled(str(root), None, []).fingerprint == open_labelled("folder", None, [root]).fingerprint


def test_images_are_fed_from_the_splits_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            save(tmp_path / split / name / "1.png", 30 + 5 * (split == "val"), 30)
    feed = open_imagefolder((16, 12), [tmp_path]).feed(torch.device("cpu"))
    ((images, labels),) = feed.test([torch.tensor([1, 0])])
    assert torch.equal(images[0], load_image(tmp_path / "val" / "b" / "1.png", IMAGENET_EVALUATION.at((16, 12))))
    assert labels.tolist() == [1, 0]
    ((images, labels),) = feed.train([torch.tensor([1])], 0, 0)
    assert (images.shape, labels.tolist()) == ((1, 3, 16, 12), [1])


def test_the_fingerprint_changes_with_names_splits_sizes_and_the_crop(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [open_imagefolder(None, [root]).fingerprint, open_imagefolder((32, 32), [root]).fingerprint]
    assert seen[0] == open_imagefolder(None, [root]).fingerprint
    (root / "train/n01/0.JPEG").write_bytes(b"1")
    seen.append(open_imagefolder(None, [root]).fingerprint)
    (root / "train/n01/0.JPEG").rename(root / "train/n02/9.JPEG")
    seen.append(open_imagefolder(None, [root]).fingerprint)
    (root / "train/n02/9.JPEG").rename(root / "val/n02/9.JPEG")
    seen.append(open_imagefolder(None, [root]).fingerprint)
    monkeypatch.setattr(labelled, "SIZES_UP_TO", 14)  # of 15 files: names only
    seen.append(open_imagefolder(None, [root]).fingerprint)
    assert len(set(seen)) == len(seen)
    assert all(len(fingerprint) == 16 for fingerprint in seen)
    (root / "val/n02/9.JPEG").write_bytes(b"12")
    assert open_imagefolder(None, [root]).fingerprint == seen[-1]


def test_a_link_to_nothing_is_named_by_the_fingerprint(root: Path) -> None:
    (root / "val/n02/gone.png").symlink_to(root / "nothing")
    with pytest.raises(UsageError, match=r"val/n02/gone.png cannot be read as an image \(No such file"):
        _ = open_imagefolder(None, [root]).fingerprint


@pytest.mark.parametrize(("name", "also"), [("folder", "; or give its path as --data"), ("imagenet", "")])
def test_without_a_folder_the_ways_to_give_one_are_named(name: str, also: str) -> None:
    tests = "val or valid or validation or test" if name == "folder" else "val"
    with pytest.raises(UsageError) as refused:
        open_labelled(name, None, [])
    assert str(refused.value) == (
        f"{name} needs --data-dir (or BGCBENCH_DATA_DIR): the folder that has train and {tests}{also}"
    )


def test_where_there_is_no_train_it_is_said_what_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.png", "a/1.png", ".x/1.png", "file.png")
    (tmp_path / "b" / "empty").mkdir()
    with pytest.raises(UsageError) as refused:
        open_labelled("imagenet", None, [tmp_path / p for p in ("nowhere", "file.png", "b/empty", ".")])
    assert str(refused.value) == (
        f"imagenet was not found: {tmp_path}/nowhere is not there; {tmp_path}/file.png is a file, not a folder; "
        f"{tmp_path}/b/empty has no folder train, it has nothing; {tmp_path} has no folder train, it has a, b, "
        "file.png; give --data-dir (or BGCBENCH_DATA_DIR) the folder that has train and val"
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_of_a_split_itself_the_folder_above_is_named(root: Path, split: str) -> None:
    said = refusal(root / split)
    assert f"{root / split} is one of the splits: give the folder above it, {root}; " in said


def test_a_missing_second_split_is_refused(root: Path) -> None:
    (root / "val").rename(root / "holdout")
    assert refusal(root) == (
        f"{root} has no folder val or valid or validation or test beside train; put the images to test with there"
    )
    (root / "holdout").rename(root / "test")
    assert refusal(root, "imagenet") == f"{root} has no folder val beside train; put the images to test with there"


def test_a_flat_folder_is_refused_and_for_imagenets_it_is_said_how_to_sort_it(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/1.png", *(f"val/ILSVRC2012_val_{n:08}.JPEG" for n in range(1, 1201)))
    for name in ("imagenet", "folder"):
        assert refusal(tmp_path, name) == (
            f"{tmp_path}/val has 1,200 images and no folders of classes; sort them into a folder for each class with "
            "the script valprep.sh (soumith/imagenetloader.torch), or by ILSVRC2012_validation_ground_truth.txt"
        )
    (tmp_path / "val").rename(tmp_path / "other")
    touch(tmp_path, "val/1.png", "val/2.png")
    assert refusal(tmp_path) == (
        f"{tmp_path}/val has 2 images and no folders of classes; put the images of each class into a folder of its own"
    )


def test_a_split_with_nothing_in_it_is_refused(root: Path) -> None:
    (root / "val").rename(root / "elsewhere")
    (root / "val").mkdir()
    assert refusal(root).startswith(f"{root}/val has no folders of classes; put the images")


def test_different_classes_in_the_splits_are_named(root: Path) -> None:
    touch(root, *(f"train/only{n}/1.png" for n in range(5)), "val/n11/1.png")
    assert refusal(root) == (
        f"the splits have different classes, 5 only in {root}/train (only0, only1, only2 and 2 more) and 1 only in "
        f"{root}/val (n11); give both the same folders"
    )


def test_a_class_that_one_split_has_not_is_named(root: Path) -> None:
    touch(root, "train/n11/1.png")
    assert refusal(root) == (
        f"the splits have different classes, 1 only in {root}/train (n11); give both the same folders"
    )


def test_one_class_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "train/cat/1.png", "val/cat/1.png")
    assert refusal(tmp_path) == (f"{tmp_path}/train has one class, cat, and a network needs two to tell apart")


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_without_images_are_named(root: Path, split: str) -> None:
    for file in (root / split / "n02").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert refusal(root) == (
        f"{root}/{split} has no image in 1 of its 3 classes (n02); fill their folders, or remove them from both splits"
    )


@pytest.mark.parametrize("closed", ["photos", "train", "n02"])
def test_a_folder_that_may_not_be_listed_is_refused(root: Path, closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(listing: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def listed(path: Any) -> Any:
            if Path(path).name == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return listing(path)

        return listed

    for function in ("scandir", "listdir"):
        monkeypatch.setattr(os, function, refusing(getattr(os, function)))
    assert f"{closed} cannot be listed (Permission denied)" in refusal(root)


def test_imagenet_is_known_by_its_numbers() -> None:
    assert Expected(1000, 1281167, 50000) == IMAGENET


@pytest.mark.usefixtures("small_imagenet")
def test_a_whole_imagenet_is_taken(root: Path) -> None:
    data = open_labelled("imagenet", (160, 160), [root])
    assert (data.name, data.num_classes, data.size) == ("imagenet", 3, (160, 160))
    assert open_imagenet(None, [root]).size == (224, 224)


@pytest.mark.parametrize(
    ("expected", "said"),
    [(Expected(4, 9, 6), "train has 3 classes, and imagenet has 4;"),
     (Expected(3, 1281167, 6), "train has 9 images, and imagenet has 1,281,167;"),
     (Expected(3, 9, 5), "val has 6 images, and imagenet has 5;")],
)  # fmt: skip
def test_a_part_of_imagenet_is_refused_and_the_way_to_train_on_it_is_named(
    root: Path, expected: Expected, said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        open_imagenet(None, [root], expected=expected)
    assert str(refused.value) == (f"{root}/{said} complete it, or train on a part of imagenet with --data folder")


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_size_below_one_pixel_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ShapeError, match="size=0"):
        open_labelled(name, (0, 8), [root])
