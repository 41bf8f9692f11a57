"""How images are prepared for a network. Truth is what its library itself evaluates it with; nothing is downloaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bgcbench.data.base import prepared_as
from bgcbench.data.folder import IMAGENET_EVALUATION, load_image, open_folder
from bgcbench.errors import ShapeError, UsageError
from bgcbench.models.preprocessing import members, of_published, own_size, published, stated
from bgcbench.models.zoo import torchvision_names
from bgcbench.specs import Preprocessing
from tests.data.test_folder import save

# One of each kind: short sides, crops, interpolations and means that differ.
TORCHVISION = ("resnet50", "mobilenet_v2", "inception_v3", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_l",
               "regnet_y_400mf", "swin_v2_t", "vit_b_16", "vit_h_14", "mnasnet0_5")  # fmt: skip
TIMM = ("test_resnet", "resnet18", "test_convnext", "resnet50.tv_in1k", "coat_lite_medium_384", "tf_efficientnetv2_s",
        "convnextv2_nano.fcmae_ft_in22k_in1k_384", "maxvit_tiny_tf_512.in1k", "nasnetalarge")  # fmt: skip
PICTURES = ((301, 217), (200, 640), (700, 511))  # (width, height)


def seen(how: Preprocessing, path: Path) -> Tensor:
    """What a network gets of the image: as in :meth:`bgcbench.data.base.Images.batches`."""
    folder = prepared_as(open_folder(str(path.parent)), how)
    return next(folder.batches(1, 1, 0))[0]


@pytest.mark.parametrize("name", TORCHVISION)
def test_pixels_are_those_that_torchvisions_own_transforms_give(name: str, tmp_path: Path) -> None:
    for width, height in PICTURES:
        path = save(tmp_path / f"{width}" / "a.png", width, height)
        expected = published(name).transforms()(Image.open(path))
        torch.testing.assert_close(seen(of_published(published(name)), path), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", TIMM)
def test_pixels_are_those_that_timms_own_transforms_give(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    config = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config, is_training=False)
    how = stated(f"timm/{name}")
    assert how is not None
    for width, height in PICTURES:
        path = save(tmp_path / f"{width}" / "a.png", width, height)
        torch.testing.assert_close(seen(how, path), transform(Image.open(path)), rtol=0, atol=2e-6)


def test_the_networks_cover_what_libraries_do_differently() -> None:
    hows = [of_published(published(name)) for name in TORCHVISION]
    assert len({how.resize for how in hows}) > 5
    assert len({how.size for how in hows}) > 4
    assert {how.interpolation for how in hows} == {"bilinear", "bicubic"}
    assert {how.mean for how in hows} == {(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)}


def test_every_network_of_torchvision_with_weights_says_how_its_images_are_prepared() -> None:
    for name in torchvision_names():
        for weights in members(name):
            transforms = weights.transforms()
            how = of_published(weights)
            assert (how.size, how.resize) == (2 * tuple(transforms.crop_size), 2 * tuple(transforms.resize_size))
            assert (list(how.mean), list(how.std)) == (transforms.mean, transforms.std)
            assert transforms.antialias
        how = stated(name)
        assert how is not None
        assert (how.source, own_size(name)) == ("library", how.size)


def test_a_network_of_our_own_says_nothing() -> None:
    for name in ("wrn_28_10", "resnext29_8x64d", "wide_resnet34_2", "no_such"):
        assert stated(name) is None
        assert own_size(name) is None


def test_what_timm_does_and_is_not_offered_here_is_refused() -> None:
    timm = pytest.importorskip("timm")
    odd = [name for name in timm.list_models() if (timm.models.get_pretrained_cfg(name) or {}) and
           timm.models.get_pretrained_cfg(name).crop_mode == "border"]  # fmt: skip
    for name in odd[:1]:
        with pytest.raises(UsageError, match="images with a border around them, which bgcbench does not make"):
            stated(f"timm/{name}")
        assert own_size(f"timm/{name}") is not None
    with pytest.raises(UsageError, match=r"timm/test_resnet.none: Invalid pretrained tag .*; leave the tag out"):
        own_size("timm/test_resnet.none")


def test_another_size_is_resized_in_proportion() -> None:
    assert IMAGENET_EVALUATION.at((112, 224)).resize == (128, 256)
    how = Preprocessing((160, 160), (0.5,) * 3, (0.5,) * 3, (168, 168), "bicubic", "squash", "library")
    assert how.at((80, 160)) == dataclasses.replace(how, size=(80, 160), resize=(84, 168))
    assert how.at((160, 160)) == how


def test_squashed_images_lose_their_proportions(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 90, 60)
    how = Preprocessing((20, 10), (0.5,) * 3, (0.5,) * 3, (20, 10), "box", "squash")
    expected = Image.open(path).resize((10, 20), Image.Resampling.BOX)
    assert load_image(path, how).permute(1, 2, 0).tolist() == torch.tensor(
        [[list(expected.getpixel((x, y))) for x in range(10)] for y in range(20)]
    ).tolist()  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (123.7, 116.3, 103.5)}, "--mean 123.7,116.3,103.5 must be one number or three, .*, not to 255"),
        ({"mean": (0.5, 0.5)}, "--mean 0.5,0.5 must be one number or three"),
        ({"mean": (float("nan"),) * 3}, "--mean nan,nan,nan must be"),
        ({"std": (0.0, 1.0, 1.0)}, "--std 0,1,1 must be one positive number or three"),
        ({"std": (float("inf"),) * 3}, "--std inf,inf,inf must be"),
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean 'bicubic'"),
        ({"crop": "centre"}, "unknown crop 'centre': did you mean 'center'"),
        ({"resize": (200, 300)}, "--resize 200x300 is less than the 224 px that are cut out; give more, or a smaller"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        dataclasses.replace(IMAGENET_EVALUATION, **changes)  # type: ignore[arg-type]


def test_a_size_without_pixels_is_refused() -> None:
    with pytest.raises(ShapeError, match="size=0"):
        Preprocessing((0, 4), (0.5,) * 3, (0.5,) * 3)


def test_it_survives_a_file_and_newer_keys() -> None:
    for how in (IMAGENET_EVALUATION, Preprocessing((16, 16), (0.3,) * 3, (0.4,) * 3)):
        assert Preprocessing.from_json({**how.to_json(), "gamma": 2.2}) == how


def test_it_reads_as_a_sentence() -> None:
    assert str(IMAGENET_EVALUATION) == (
        "short side resized to 256 (bilinear), centre 224 px, mean 0.485,0.456,0.406, std 0.229,0.224,0.225"
    )
    wide = IMAGENET_EVALUATION.at((112, 224))
    assert str(wide).startswith("resized to 128x256 (bilinear), centre 112x224 px, mean")
    assert str(Preprocessing((16, 16), (0.3,) * 3, (0.4,) * 3)) == "16 px, mean 0.3,0.3,0.3, std 0.4,0.4,0.4"
