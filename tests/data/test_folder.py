"""A folder of images: what is found in it, and how it is prepared. Truth is torchvision's preset and Pillow."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import pil_to_tensor

from bgcbench.data.folder import IMAGENET_EVALUATION, load_image, open_folder
from bgcbench.errors import ShapeError, UsageError


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth and noisy parts, another one for every size."""
    random = np.random.default_rng(width * 1000 + height)
    smooth = np.linspace(0, 255, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None]
    values = (smooth + random.integers(0, 60, (height, width, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(values[..., 0]))
        return image
    return image.convert(mode)


def save(path: Path, width: int = 40, height: int = 30, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, mode).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "mode", "width", "height"),
    [("a.png", "RGB", 300, 400), ("a.png", "RGB", 501, 333), ("a.png", "RGB", 57, 64), ("a.png", "RGB", 256, 256),
     ("a.jpg", "RGB", 120, 100), ("a.png", "L", 120, 100), ("a.jpeg", "L", 120, 100), ("a.png", "RGBA", 120, 100),
     ("a.png", "P", 120, 100), ("a.png", "1", 120, 100), ("a.bmp", "RGB", 120, 100), ("a.webp", "RGB", 120, 100),
     ("a.tiff", "CMYK", 120, 100)],
)  # fmt: skip
def test_an_image_is_prepared_as_torchvision_evaluates_its_networks(
    tmp_path: Path, name: str, mode: str, width: int, height: int
) -> None:
    path = save(tmp_path / name, width, height, mode)
    expected = ImageClassification(crop_size=224, resize_size=256)(Image.open(path).convert("RGB"))
    (batch,) = open_folder(str(tmp_path)).batches(1, 1, 0)
    assert (batch.shape, batch.dtype, batch.device.type) == ((1, 3, 224, 224), torch.float32, "cpu")
    torch.testing.assert_close(batch[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "size", "resized", "corner"),
    [
        ((300, 400), (112, 224), (256, 341), (16, 114)),  # 128 x 256 are to be covered: the width decides
        ((900, 300), (112, 224), (384, 128), (80, 8)),  # here the height does
        ((400, 300), (224, 112), (341, 256), (114, 16)),
        ((600, 200), (32, 32), (111, 37), (40, 2)),  # round(32 * 256 / 224) = 37
    ],
)
def test_an_image_covers_8_7ths_of_any_size_before_its_centre_is_cut_out(
    tmp_path: Path, image: tuple[int, int], size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    path = save(tmp_path / "a.png", *image)
    left, top = corner
    whole = picture(*image).resize(resized, Image.Resampling.BILINEAR)
    cut = whole.crop((left, top, left + size[1], top + size[0]))
    assert torch.equal(load_image(path, IMAGENET_EVALUATION.at(size)), pil_to_tensor(cut))


def test_normalisation_is_imagenets(tmp_path: Path) -> None:
    Image.new("RGB", (10, 10), (255, 0, 51)).save(tmp_path / "a.png")
    (batch,) = open_folder(str(tmp_path), (4, 4)).batches(1, 1, 0)
    expected = (np.array([1.0, 0.0, 0.2]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch[0, :, 2, 2].numpy(), expected, rtol=1e-6)
    folder = open_folder(str(tmp_path))
    assert (folder.mean, folder.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images_are_found_in_all_subfolders_sorted_by_path_whatever_the_case_of_their_ending(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.JPEG", "b/c/d.png", "a/z.png"):
        save(tmp_path / name)
    for name in (".hidden.png", ".thumbnails/1.png", "b/.x/1.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    folder = open_folder(str(tmp_path))
    assert folder.files == ("a.JPEG", "a/z.png", "b/1.jpg", "b/2.PNG", "b/c/d.png")
    assert len(folder) == 5


def test_where_there_is_a_folder_train_only_its_images_count(tmp_path: Path) -> None:
    save(tmp_path / "imagenet" / "train" / "n01" / "1.png")
    save(tmp_path / "imagenet" / "val" / "n01" / "2.png")
    folder = open_folder(str(tmp_path / "imagenet"))
    assert folder.files == ("n01/1.png",)
    assert (folder.name, folder.num_classes, folder.size) == ("imagenet", 1, (224, 224))


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "1.png")
    save(tmp_path / "images" / "2.png")
    (tmp_path / "images" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "up").symlink_to(tmp_path / "images")
    assert open_folder(str(tmp_path / "images")).files == ("2.png", "class/1.png")


def test_the_current_folder_has_the_name_it_has_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "photos" / "1.png")
    monkeypatch.chdir(tmp_path / "photos")
    assert open_folder(".").name == "photos"


def test_a_path_that_is_no_folder_of_images_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "one" / "1.png")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    for path, message in (
        (tmp_path / "nowhere", "nowhere is not there; give the path of a folder"),
        (file, "1.png is a file, not a folder"),
        (tmp_path / "empty", "empty has no images, .* ending in .jpg, .jpeg, .png"),
    ):
        with pytest.raises(UsageError, match=message) as refused:
            open_folder(str(path))
        assert "\n" not in str(refused.value)


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "closed" / "1.png")

    def listed(path: str, listing: Callable[[str], Any] = os.scandir) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(UsageError, match=r"closed cannot be listed \(Permission denied\)"):
        open_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.6])
def test_a_truncated_image_is_refused_by_name(tmp_path: Path, name: str, kept: float) -> None:
    path = save(tmp_path / name, 200, 150)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UsageError, match=f"{name} cannot be read as an image .*; repair or remove it") as refused:
        list(open_folder(str(tmp_path)).batches(1, 1, 0))
    assert "\n" not in str(refused.value)


def test_what_only_has_the_name_of_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>")
    with pytest.raises(UsageError, match=r"page.jpg cannot be read as an image \(no image format that Pillow knows\)"):
        list(open_folder(str(tmp_path)).batches(1, 1, 0))
    (tmp_path / "page.jpg").unlink()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"gone.png cannot be read as an image \(No such file"):
        list(open_folder(str(tmp_path)).batches(1, 1, 0))


@pytest.mark.parametrize(("ending", "dtype"), [("png", np.uint16), ("tif", np.int32), ("tif", np.float32)])
def test_an_image_that_pillow_would_clip_to_8_bits_is_refused(tmp_path: Path, ending: str, dtype: type) -> None:
    Image.fromarray(np.full((20, 20), 3000, dtype)).save(tmp_path / f"deep.{ending}")
    with pytest.raises(UsageError, match=r"has more than 8 bits a channel, .* convert it to 8 bits"):
        list(open_folder(str(tmp_path)).batches(1, 1, 0))


def test_a_size_below_one_pixel_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    with pytest.raises(ShapeError, match="size=0"):
        open_folder(str(tmp_path), (0, 4))


def test_a_class_that_is_called_train_is_one_among_others(tmp_path: Path) -> None:
    for name in ("train", "boat", "car"):
        save(tmp_path / "photos" / name / "1.png")
    assert len(open_folder(str(tmp_path / "photos"))) == 3
    for name in ("train", "val", "test"):
        save(tmp_path / "splits" / name / "1.png")
    assert open_folder(str(tmp_path / "splits")).files == ("1.png",)


def test_the_fingerprint_changes_with_names_sizes_and_the_crop(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    first = open_folder(str(tmp_path / "a")).fingerprint
    assert len(first) == 16
    assert open_folder(str(tmp_path / "a")).fingerprint == first
    assert open_folder(str(tmp_path / "a"), (32, 32)).fingerprint != first
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    assert open_folder(str(tmp_path / "a")).fingerprint != first


def test_labels_are_the_places_of_the_classes_folders_and_the_other_split_has_them_too(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (100 * label, 0, 0)).save(tmp_path / split / name / f"{number}.png")
    folder = open_folder(str(tmp_path), (8, 8))
    other = folder.test_split
    assert other is not None
    for source, count in ((folder, 3), (other, 2)):
        numbers = source.order(99, seed=0)
        labels = source.labels_of(numbers)
        assert labels is not None
        assert sorted(labels.tolist()) == [0] * count + [1] * count
        assert torch.equal(source.read(numbers)[:, 0, 0, 0], 100 * labels)
    assert folder.num_classes == 2
    (tmp_path / "val" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "cat" / "0.png")
    assert open_folder(str(tmp_path), (8, 8)).test_split is None  # of other classes
    alone = open_folder(str(tmp_path / "val"), (8, 8))
    assert alone.test_split is None


def test_images_beside_folders_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "ant" / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    folder = open_folder(str(tmp_path), (8, 8))
    assert folder.num_classes is None
    assert folder.labels_of([0, 1]) is None
