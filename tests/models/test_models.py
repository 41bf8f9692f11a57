"""Networks and their converted forms, held against parameter and multiply-add counts worked out elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from bgcbench.conversion import convert as conversions
from bgcbench.conversion import selection
from bgcbench.conversion.convert import convert
from bgcbench.errors import ShapeError, UsageError
from bgcbench.measure.batches import Passing
from bgcbench.measure.trace import trace
from bgcbench.models import build_model, identify
from bgcbench.specs import NetSpec


def without_numbers(spec: NetSpec) -> nn.Module:
    with torch.device("meta"):
        return build_model(spec)


def stored(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("spec", "params", "giga_macs"),
    [
        (NetSpec("wrn_28_10"), 36_479_194, 5.243),
        (NetSpec("wide_resnet34_2"), 86_036_008, 14.09),
        (NetSpec("wrn_34_2"), 1_855_578, 0.271),
        (NetSpec("resnext29_8x64d"), 34_426_698, 5.387),
        (NetSpec("efficientnet_b0", num_classes=10, height=32), 4_020_358, 0.0320),
        (NetSpec("efficientnet_b0", num_classes=10, height=32, stem_stride=2), 4_020_358, 0.0085),
        (NetSpec("efficientnet_b0"), 5_288_548, 0.386),
        (NetSpec("mobilenet_v2"), 3_504_872, 0.301),
        (NetSpec("resnet50"), 25_557_032, 4.089),
    ],
)
def test_a_network_has_its_published_size(spec: NetSpec, params: int, giga_macs: float) -> None:
    model = without_numbers(spec)
    assert stored(model) == params
    digits = len(f"{giga_macs}".split(".")[1])
    assert round(trace(model, spec.size).macs / 1e9, digits) == giga_macs


def millions(text: str) -> list[float]:
    return [float(number) for number in text.split("/")]


# Whole-network parameters in millions by the least and the greatest N: GC and Shuffle, TLGC, BGC, FLGC (as trained).
ORACLE = [
    ("resnet50", "auto", (2, 16), "19.898/14.947", "19.940/15.042", "25.557/15.654", "25.572/25.678"),
    ("resnet50", "all", (2, 16), "13.834/3.577", "13.940/4.054", "25.557/5.042", "25.655/26.341"),
    ("wrn_28_10", "auto", (2, 16), "18.381/2.546", "18.474/2.764", "36.479/4.808", "36.514/36.756"),
    ("wide_resnet34_2", "auto", (2, 8), "43.900/12.299", "44.058/12.547", "86.036/22.833", "86.095/86.270"),
    ("resnext29_8x64d", "auto", (2, 16), "26.874/20.265", "26.921/20.538", "34.427/21.209", "34.489/34.927"),
    ("mobilenet_v2", "auto", (2, 8), "2.647/2.004", "2.673/2.081", "3.505/2.219", "3.539/3.640"),
    ("efficientnet_b0", "auto", (2, 8), "3.920/2.894", "3.952/2.990", "5.289/3.236", "5.331/5.458"),
]  # fmt: skip
ROWS = [
    pytest.param(name, where, variant, counts, row, id=f"{name}-{where}-{variant}")
    for name, where, counts, *rows in ORACLE
    for variant, row in zip(("gc", "shuffle", "tlgc", "bgc", "flgc"), (rows[0], *rows), strict=True)
]


@functools.cache
def seen(name: str) -> tuple[Any, list[str]]:
    """What a look at the network finds, whatever it is converted to."""
    return selection.look(without_numbers(NetSpec(name)), None, Passing())


def looked_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, notes = seen(name)
    monkeypatch.setattr(conversions, "look", lambda *_: (found, list(notes)))


@pytest.mark.parametrize(("name", "where", "variant", "counts", "row"), ROWS)
def test_a_converted_network_has_the_parameters_worked_out_elsewhere(
    name: str, where: str, variant: str, counts: tuple[int, ...], row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at_once(name, monkeypatch)
    if (name, where) != ("resnet50", "all"):  # that the layers of the others can be exchanged is tried below
        monkeypatch.setattr(conversions, "keep_what_cannot_be_exchanged", lambda *_, **__: [])
    for groups, expected in zip(counts, millions(row), strict=True):
        converted = convert(without_numbers(NetSpec(name)), variant, groups, where=where, inplace=True)
        assert stored(converted.model) / 1e6 == pytest.approx(expected, abs=5.001e-4)
        # Whether its layers can be exchanged does not depend on N, and has been tried now.
        monkeypatch.setattr(conversions, "keep_what_cannot_be_exchanged", lambda *_, **__: [])


@pytest.mark.parametrize(
    ("name", "where", "convs"),
    [("resnet50", "auto", 16), ("resnet50", "all", 52), ("wrn_28_10", "auto", 24), ("wide_resnet34_2", "auto", 32),
     ("resnext29_8x64d", "auto", 18), ("mobilenet_v2", "auto", 33), ("mobilenet_v2", "1x1", 34),
     ("efficientnet_b0", "auto", 31), ("efficientnet_b0", "1x1", 32)],
)  # fmt: skip
def test_as_many_convolutions_are_replaced_as_the_paper_replaces(
    name: str, where: str, convs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at_once(name, monkeypatch)
    record = convert(without_numbers(NetSpec(name)), "bgc", 2, where=where, inplace=True).record
    assert len(record.layers) == convs


def test_efficientnet_b0_at_n_16_is_refused_naming_exactly_its_eight_convolutions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at_once("efficientnet_b0", monkeypatch)
    model = without_numbers(NetSpec("efficientnet_b0"))
    with pytest.raises(ShapeError, match="the channels of 8 convolutions") as refused:
        convert(model, "bgc", 16)
    shapes = [(96, 24), (24, 144), (144, 24), (24, 144), (144, 40), (40, 240), (240, 40), (40, 240)]
    assert [tuple(map(int, part.split(")")[0].split(" -> "))) for part in str(refused.value).split(" (")[1:9]] == shapes
    assert "on_indivisible='skip'" in str(refused.value)
    record = convert(model, "bgc", 16, on_indivisible="skip").record
    assert len(record.layers) == 31 - 8
    assert sum("N=16 does not divide" in kept.reason for kept in record.kept) == 8
    gcd = convert(model, "bgc", 16, on_indivisible="gcd").record
    assert [layer.groups for layer in gcd.layers if layer.groups != 16] == [8] * 8


def test_mobilenet_v2_at_n_16_fails_in_four_convolutions() -> None:
    with pytest.raises(ShapeError, match="4 convolutions"):
        convert(without_numbers(NetSpec("mobilenet_v2")), "gc", 16)


@pytest.mark.parametrize(
    "spec", [NetSpec("efficientnet_b0", 10, 32), NetSpec("efficientnet_b0", 10, 32, stem_stride=2)]
)
def test_maps_that_strides_bring_down_to_one_pixel_are_not_taken_for_squeeze_and_excitation(spec: NetSpec) -> None:
    record = convert(without_numbers(spec), "gc", 2, example_input=spec.size).record
    assert len(record.layers) == 31
    assert sum("squeeze" in kept.reason for kept in record.kept) == 32


@pytest.mark.parametrize("name", ["wrn_10_2", "resnext29_2x4d", "wide_resnet34_2"])
def test_our_networks_run_and_train(name: str) -> None:
    spec = NetSpec(name, num_classes=7, height=32)
    model = build_model(spec)
    scores = model(torch.randn(2, *spec.size))
    assert scores.shape == (2, 7)
    scores.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_wrn_shortcuts_read_the_shared_norm_and_identity_reads_x() -> None:
    # Unit by hand: with a shortcut y = conv(x') + branch(x'), x' = relu(bn(x)); without one y = x + branch.
    model = build_model("wrn_10_2").eval()
    first = model.stages[0][0]
    x = torch.randn(1, 16, 8, 8)
    active = torch.relu(first.bn1(x))
    branch = first.conv2(torch.relu(first.bn2(first.conv1(active))))
    torch.testing.assert_close(first(x), first.shortcut(active) + branch)
    same = build_model("wrn_16_1").eval().stages[0][0]
    assert same.shortcut is None
    branch = same.conv2(torch.relu(same.bn2(same.conv1(torch.relu(same.bn1(x))))))
    torch.testing.assert_close(same(x), x + branch)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("wrn_27_10", {}, ShapeError, "6 b \\+ 4 layers, not 27; next to it are 22 and 28"),
        ("wrn_4_1", {}, ShapeError, "not 4; next to it are 10"),
        ("resnet51", {}, UsageError, "did you mean 'resnet50'"),
        ("resnet50", {"stem_stride": 1}, UsageError, "resnet50 is neither"),
        ("resnet50", {"num_classes": 0}, ShapeError, "num_classes=0"),
        ("timm/no_such_network", {}, UsageError, "timm has no network"),
    ],
)
def test_a_name_that_is_no_network_is_refused(name: str, options: dict[str, int], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(name, **options)


def test_a_stem_stride_follows_the_images_and_can_be_chosen() -> None:
    assert NetSpec("efficientnet_b0").stem_stride == 2
    assert NetSpec("efficientnet_b0", height=32).stem_stride == 1
    assert NetSpec("resnet50", height=32).stem_stride is None
    model = build_model("mobilenet_v2", stem_stride=4)
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).stride == (4, 4)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), "resnet18"),
        (torchvision.models.mobilenet_v2, "mobilenet_v2"),
        (lambda: build_model("wrn_10_2"), "wrn_10_2"),
    ],
)
def test_a_network_of_a_library_is_recognised_by_its_structure(build, name: str) -> None:
    model = build()
    source = identify(model)
    assert source is not None
    assert source["name"] == name
    assert repr(build_model(NetSpec(**source))) == repr(model)


def test_a_network_that_was_changed_is_not_taken_for_the_librarys() -> None:
    model = torchvision.models.resnet18()
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 5, padding=2, bias=False)
    assert identify(model) is None
    ours = build_model("wrn_10_2")
    ours.stem = nn.Conv2d(3, 16, 1)
    assert identify(ours) is None
