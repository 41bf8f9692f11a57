"""Networks as strangers bring them: layers that run several times, inputs worked on in place, randomness, odd batches.

What a conversion says of them is held against what the converted network really does.
"""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bgcbench
from bgcbench.conversion.calibration import reestimate_norms
from bgcbench.conversion.convert import convert, load_converted, save_converted
from bgcbench.errors import UsageError
from bgcbench.measure.workload import NetworkWorkload

SIDE, IMAGES = 8, 24


def images(count: int = IMAGES, **options: Any) -> Tensor:
    drawn = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=drawn, **options) + 0.5


class Pyramid(nn.Module):
    """A head that the levels of a pyramid share, behind a stem that reads the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        level = self.stem(x).relu()
        outputs = []
        for number in range(3):
            outputs.append(self.second(self.norm(self.head(level * 3**number)).relu()).sigmoid())
            level = F.avg_pool2d(level, 2)
        return outputs


class Recurrent(nn.Module):
    """A block that takes its own output: what comes to its second call depends on what its first has made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(3):
            x = x + self.block(x).tanh()
        return x.mean((2, 3))


def calls_of(model: nn.Module, name: str, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What went into a module and came out of it, call by call."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append((a[0].clone(), y.clone())))
    with torch.no_grad():
        model(x.clone())
    handle.remove()
    return found


def lost(model: nn.Module, converted: nn.Module, name: str, x: Tensor) -> float:
    """The share of the outputs' energy that a layer loses on what the original gives it, over all of its calls."""
    pairs = [(converted.get_submodule(name)(u), y) for u, y in calls_of(model, name, x)]
    with torch.no_grad():
        return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


class TestALayerThatRunsSeveralTimes:
    @pytest.mark.parametrize("variant", ["gc", "bgc"])
    def test_is_solved_for_all_of_its_calls_by_lstsq(self, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The head sees what the original gives it, so explicit least squares over all three levels is the answer."""
        monkeypatch.setattr("bgcbench.conversion.solve.RIDGES", (0.0,))
        model, x = Pyramid().double().eval(), images()
        layer = convert(model, variant, 4, init="calibrated", calibration=[x], include="head", where="none")
        pairs = calls_of(model, "head", x)
        u = torch.cat([F.unfold(given, 3, padding=1).transpose(0, 1).flatten(1) for given, _ in pairs], 1)  # (nK, P)
        y = torch.cat([made.transpose(0, 1).flatten(1) for _, made in pairs], 1)
        u, y = u - u.mean(1, keepdim=True), y - y.mean(1, keepdim=True)  # a norm takes constants away
        expected = []
        for k, rows in enumerate(y.chunk(4)):
            parts = u.chunk(4)
            z = parts[k] if variant == "gc" else torch.cat([parts[k], torch.stack(parts).mean(0)])
            expected.append(torch.linalg.lstsq(z.T, rows.T, driver="gelsd").solution.T @ z)
        got = layer.model.get_submodule("head").dense_weight().flatten(1) @ u
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-6, atol=1e-8)

    def test_the_record_says_what_all_of_its_calls_lose_and_approximability_agrees(self) -> None:
        model, x = Pyramid().double().eval(), images(64)
        converted = convert(model, "gc", 2, init="white", include="head", where="none")
        (row,) = bgcbench.approximability(model, [x], variants=["gc"], groups=[2], include="head", where="none")
        held_out = x[3::4]
        assert row.white == pytest.approx(lost(model, converted.model, "head", held_out), rel=1e-9)
        # About zero, as approximability has it, where there is no norm.
        model.norm = nn.Identity()
        (row,) = bgcbench.approximability(model, [x], variants=["gc"], groups=[2], include="head", where="none")
        record = convert(
            model, "gc", 2, init="calibrated", calibration=[x], rebn=False, include="head", where="none"
        ).record
        assert record.calibration is not None
        (layer,) = record.calibration.layers
        assert layer.before == pytest.approx(row.white, rel=1e-9)
        assert layer.after == pytest.approx(row.calibrated, rel=1e-6)

    def test_is_looked_at_at_the_same_positions_by_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bgcbench.conversion.layer_moments.LEAST_ROWS", 64 * 9)  # 9 of up to 64
        monkeypatch.setattr("bgcbench.conversion.layer_moments.ROWS_AN_ENTRY", 1)
        model, x = Pyramid().double().eval(), images(64)
        model.norm = nn.Identity()
        options: dict[str, Any] = {"include": "head", "where": "none"}
        (row,) = bgcbench.approximability(model, [x], variants=["gc"], groups=[2], **options)
        found = convert(model, "gc", 2, init="calibrated", calibration=[x], rebn=False, **options).record.calibration
        assert found is not None
        assert found.layers[0].rows == row.rows == 48 * (9 + 9 + 4)  # three levels of 8, 4 and 2 pixels a side
        assert found.layers[0].before == pytest.approx(row.white, rel=1e-9)

    def test_loses_as_much_on_every_level_as_the_record_says(self) -> None:
        model, x = Pyramid().double().eval(), images(64)
        converted = convert(model, "bgc", 4, init="calibrated", calibration=[x], include="head", where="none")
        assert converted.record.calibration is not None
        (layer,) = converted.record.calibration.layers
        held_out = x[3::4]
        assert lost(model, converted.model, "head", held_out) < 1.3 * layer.after + 1e-3

    def test_of_a_recurrent_block_counts_what_comes_back_to_it(self) -> None:
        model, x = Recurrent().double().eval(), images(64)
        copied, calibrated = (
            convert(model, "gc", 2, init=init, calibration=[x], rebn=init == "white").model
            for init in ("white", "calibrated")
        )
        assert lost(model, calibrated, "block", x) < lost(model, copied, "block", x)
        exact = convert(model, "bgc", 2, init="calibrated", calibration=[x], rebn=False)
        assert exact.record.calibration is not None
        assert exact.record.calibration.layers[0].before < 1e-12
        torch.testing.assert_close(exact.model(x), model(x), rtol=1e-9, atol=1e-9)

    def test_a_norm_that_is_used_several_times_gets_the_statistics_of_all_calls(self) -> None:
        model, x = Pyramid().double().eval(), images()
        reestimate_norms(model, [x[:10], x[10:]])
        seen = torch.cat([u.transpose(0, 1).flatten(1) for u, _ in calls_of(model, "norm", x)], 1)
        torch.testing.assert_close(model.norm.running_mean, seen.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.norm.running_var, seen.var(1), rtol=1e-9, atol=1e-9)

    def test_a_norm_of_a_converted_network_puts_out_the_mean_of_all_calls_that_it_had(self) -> None:
        model, x = Pyramid().double().eval(), images()
        reestimate_norms(model, [x])
        converted = convert(model, "gc", 4, init="calibrated", calibration=[x], include="head", where="none").model
        means = [
            torch.cat([y.transpose(0, 1).flatten(1) for _, y in calls_of(net, "norm", x)], 1).mean(1)
            for net in (model, converted)
        ]
        torch.testing.assert_close(means[1], means[0], rtol=1e-9, atol=1e-9)


class InPlace(nn.Module):
    """It normalises its input where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.25)
        scores: Tensor = self.out(self.conv(self.stem(x).relu()).relu().mean((2, 3)))
        return scores


class TestANetworkThatWorksInPlaceOnItsInput:
    def test_is_given_copies(self) -> None:
        model, x = InPlace().double().eval(), images()
        before = x.clone()
        converted = convert(model, "bgc", 2, init="calibrated", calibration=[x, x.clone()], example_input=x[:1])
        assert torch.equal(x, before)
        assert converted.record.calibration is not None
        assert converted.record.calibration.layers[0].before < 1e-12
        torch.testing.assert_close(converted.model(x.clone()), model(x.clone()), rtol=1e-9, atol=1e-9)

    def test_in_approximability_too(self) -> None:
        model, x = InPlace().double().eval(), images()
        before = x.clone()
        one, two = (
            bgcbench.approximability(model, [x], variants=["bgc"], groups=[4], memory_bytes=memory)
            for memory in (2**30, 2**28)
        )
        assert torch.equal(x, before)
        assert one == two


@pytest.mark.parametrize("phase", ["fwd", "train_step"])
def test_images_that_are_worked_on_in_place_are_new_ones_in_each_timed_call(phase: str) -> None:
    x = torch.randn(4, 3, SIDE, SIDE)
    cell = NetworkWorkload(InPlace(), x, labels=torch.zeros(4, dtype=torch.int64)).cell(phase)
    for _ in range(30):
        cell.once()
    assert x.abs().max() < 100  # (x - 0.5) / 0.25 thirty times is beyond what fp32 holds


class Drops(nn.Module):
    """Monte-Carlo dropout: random in eval mode."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.draw(self.second(self.draw(self.conv(self.draw(x))))).mean((2, 3))


def torch_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def python_dropout(x: Tensor) -> Tensor:
    import random

    return x * (1.0 if random.random() < 0.5 else 2.0)


OWN_DRAWS = torch.Generator().manual_seed(1)


def own_dropout(x: Tensor) -> Tensor:
    return x * torch.rand(x.shape, generator=OWN_DRAWS, dtype=x.dtype)


class TestRandomnessInEvalMode:
    @pytest.mark.parametrize("draw", [torch_dropout, python_dropout])
    def test_is_told_and_replayed_for_both_networks(self, draw: Any) -> None:
        """BGC N=2 is exact, so nothing may be lost; that holds only where both networks drop the same."""
        model, x = Drops(draw).double().eval(), images(48)
        converted = convert(model, "bgc", 2, init="calibrated", calibration=list(x.split(12)))
        assert any("draws random numbers in eval mode" in note for note in converted.record.notes)
        assert converted.record.calibration is not None
        assert max(layer.before for layer in converted.record.calibration.layers) < 1e-12

    def test_draws_the_same_whatever_was_drawn_before(self) -> None:
        model, x = Drops(torch_dropout).double().eval(), images(48)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            with pytest.warns(UserWarning, match="random numbers"):
                found.append(bgcbench.approximability(model, [x], variants=["gc"], groups=[2]))
        assert found[0] == found[1]

    def test_of_a_kind_that_cannot_be_replayed_is_told(self) -> None:
        converted = convert(Drops(own_dropout).double().eval(), "bgc", 2)
        assert any("each time it is run" in note for note in converted.record.notes)

    def test_approximability_warns_of_it(self) -> None:
        with pytest.warns(UserWarning, match="random numbers in eval mode"):
            bgcbench.approximability(Drops(torch_dropout).double(), [images()], variants=["gc"], groups=[2])

    def test_there_is_no_word_of_it_where_there_is_none(self) -> None:
        assert convert(Recurrent().eval(), "bgc", 2).record.notes == ()


class Asking(nn.Module):
    """It asks its convolution for something and computes with the answer."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.other(self.conv(x) * self.ask(self.conv)).mean((2, 3))


ASKING = {
    "shape": lambda conv: conv.weight.shape[1] ** -0.5,
    "size": lambda conv: conv.weight.size(1) ** -0.5,
    "numel": lambda conv: conv.weight.numel() ** -0.5,
    "groups": lambda conv: 1.0 / conv.groups,
    "type": lambda conv: 1.0 if isinstance(conv, nn.Conv2d) else 2.0,
    "attribute": lambda conv: float(conv.transposed) + 1.0,
}


class TestANetworkThatAsksForItsConvolution:
    @pytest.mark.parametrize("what", ASKING)
    def test_keeps_it_with_the_reason(self, what: str) -> None:
        model = Asking(ASKING[what]).double().eval()
        converted = convert(model, "bgc", 2)
        assert {kept.name: kept.code for kept in converted.record.kept} == {
            "stem": "first", "conv": "shape_read" if what in ("shape", "size", "numel") else "type_read",
        }  # fmt: skip
        x = images(2)
        torch.testing.assert_close(converted.model(x), model(x), rtol=1e-9, atol=1e-9)

    def test_approximability_looks_at_the_same_layers(self) -> None:
        rows = bgcbench.approximability(Asking(ASKING["groups"]).double(), [images()], variants=["gc"], groups=[2])
        assert [row.name for row in rows] == ["other"]

    def test_what_a_variant_answers_alike_may_be_asked(self) -> None:
        model = Asking(lambda conv: conv.out_channels + conv.stride[0] + conv.kernel_size[0]).double()
        assert [layer.name for layer in convert(model, "gc", 2).record.layers] == ["conv", "other"]

    def test_a_convolution_that_is_called_by_another_way_too_is_kept(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)
                self.hidden = [self.conv]

            def forward(self, x: Tensor) -> Tensor:
                return self.hidden[0](self.conv(self.stem(x)).relu())

        with pytest.raises(UsageError, match="called from outside of the module tree"):
            convert(Twice(), "gc", 2, where="all", exclude="stem")


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(input=self.stem(input=x).relu())).mean((2, 3))


@pytest.mark.parametrize("variant", [name for name in bgcbench.specs.VARIANTS if name != "standard"])
def test_a_convolution_that_is_called_by_keyword(variant: str) -> None:
    model, x = ByKeyword().double().eval(), images()
    converted = convert(model, variant, 2, init="calibrated", calibration=[x])
    assert [layer.name for layer in converted.record.layers] == ["conv"]
    assert converted.model(x).shape == (IMAGES, 8)
    if variant == "bgc":
        torch.testing.assert_close(converted.model(x), model(x), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- batches of any kind


class Two(nn.Module):
    """Images and a vector for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Linear(5, 8)

    def forward(self, pixel_values: Tensor, facts: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stem(pixel_values).relu() * self.mix(facts)[:, :, None, None]
        return self.conv(x).mean((2, 3))


class Detector(nn.Module):
    """It takes a list of images of different sizes, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, images: list[Tensor], targets: Any = None) -> dict[str, Tensor]:
        x = torch.stack([F.interpolate(image[None], (SIDE, SIDE))[0] for image in images])
        return {"boxes": self.conv(self.stem(x).relu()).mean((2, 3))}


def facts() -> Tensor:
    return torch.randn(IMAGES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def batches_of(kind: str) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    x, labels = images(), torch.arange(IMAGES)
    pairs = list(zip(x.split(5), facts().split(5), labels.split(5), strict=True))
    if kind in ("list", "detection"):
        batches: list[Any] = [list(some) for some in x.split(5)]
        if kind == "detection":  # collate_fn=lambda batch: tuple(zip(*batch))
            batches = [(tuple(some), tuple({"boxes": torch.zeros(1, 4)} for _ in some)) for some in batches]
        return Detector(), batches, {}
    if kind == "tuple":
        return Two(), [(a, b) for a, b, _ in pairs], {}
    if kind == "with labels":
        return Two(), [[a, b, c] for a, b, c in pairs], {}
    if kind == "dict":
        return Two(), [{"pixel_values": a, "facts": b, "name": ["x"] * len(a)} for a, b, _ in pairs], {}
    if kind == "mapping":
        return Two(), [UserDict(pixel_values=a, facts=b, labels=c) for a, b, c in pairs], {}
    nested = [{"image": a, "more": {"facts": b}} for a, b, _ in pairs]
    if kind == "opaque":  # cannot be taken apart: each batch counts as one image
        nested = [{**batch, "meta": torch.zeros(2)} for batch in nested]
    return Two(), nested, {"forward_fn": lambda model, batch: model(batch["image"], batch["more"]["facts"])}


def test_a_batch_with_a_list_of_facts_is_not_taken_apart() -> None:
    """The boxes of an image are as many as there are images, by chance: that does not make them one for each image."""
    x = images(4)
    batches = [[x, [{"boxes": torch.zeros(4, 4)} for _ in range(4)]] for _ in range(4)]
    found = convert(
        InPlace().double(), "bgc", 2, calibration=batches, forward_fn=lambda model, batch: model(batch[0])
    ).record.calibration
    assert found is not None
    assert found.images == 4


KINDS = ("list", "detection", "tuple", "with labels", "dict", "mapping", "forward_fn", "opaque")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:not an argument")
def test_batches_of_any_kind_calibrate(kind: str) -> None:
    model, batches, options = batches_of(kind)
    model = model.double().eval()
    converted = convert(model, "bgc", 2, init="calibrated", calibration=batches, **options)
    found = converted.record.calibration
    assert found is not None
    assert (found.images, found.held_out) == ((5, 1) if kind == "opaque" else (IMAGES, IMAGES // 4))
    assert [layer.name for layer in found.layers] == ["conv"]
    assert found.layers[0].before < 1e-12
    rows = bgcbench.approximability(model, batches, variants=["gc"], groups=[2], **options)
    assert [row.name for row in rows] == ["conv"]


@pytest.mark.parametrize("kind", ["tuple", "opaque"])
def test_a_generator_is_gone_through_once(kind: str) -> None:
    model, batches, options = batches_of(kind)
    found = convert(model.double(), "bgc", 2, init="calibrated", calibration=iter(batches), **options).record
    assert found.calibration is not None
    assert found.calibration.images == (5 if kind == "opaque" else IMAGES)


def test_the_same_images_in_any_wrapping_give_the_same_weights() -> None:
    model, _, _ = batches_of("tuple")
    model = model.double().eval()
    found = [
        convert(model, "gc", 2, init="calibrated", calibration=batches, **options).model.conv.dense_weight()
        for _, batches, options in (batches_of(kind) for kind in ("tuple", "with labels", "dict", "forward_fn"))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_what_does_not_fit_the_call_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="pass forward_fn=lambda model, batch") as caught:
        convert(Two(), "bgc", 2, init="calibrated", calibration=[images().float()])
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="a batch has image, and the network's forward takes pixel_values, facts"):
        convert(Two(), "bgc", 2, init="calibrated", calibration=[{"image": images().float()}])


def test_inputs_besides_those_that_forward_requires_are_told() -> None:
    class Masked(InPlace):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    x = images().float()
    record = convert(Masked(), "bgc", 2, calibration=[(x, x > 0)]).record
    assert any("the first 1 of 2 parts" in note for note in record.notes)
    assert convert(Masked(), "bgc", 2, calibration=[(x, torch.arange(len(x)))]).record.notes == ()


def test_memory_that_is_too_little_names_the_layers_that_take_it() -> None:
    with pytest.raises(UsageError, match=r"exclude the layers that take most \(conv 0.00\d+ GiB"):
        convert(InPlace(), "gc", 2, init="calibrated", calibration=[images().float()], memory_bytes=2**10)


# ------------------------------------------------------------------------------------------------ conversions add up


def test_two_conversions_of_one_network_are_one_record_and_one_file(tmp_path: Any) -> None:
    model = bgcbench.build_model("wrn_10_1")
    names = [layer.name for layer in convert(model, "gc", 2).record.layers]
    first = convert(model, "bgc", 4, include=names[:2], where="none", algorithm="concat")
    both = convert(first.model, "tlgc", 2, include=names[2:4], where="none", init="copy")
    save_converted(both, tmp_path / "both.pt")
    loaded = load_converted(tmp_path / "both.pt")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), both.model.eval()(x), rtol=0, atol=0)
    kinds = [(layer.name, layer.variant, layer.groups, layer.algorithm, layer.init)
             for layer in (*both.record.earlier, *both.record.layers)]  # fmt: skip
    assert kinds == [(names[0], "bgc", 4, "concat", "white"), (names[1], "bgc", 4, "concat", "white"),
                     (names[2], "tlgc", 2, "auto", "copy"), (names[3], "tlgc", 2, "auto", "copy")]  # fmt: skip
    third = convert(loaded, "gc", 2, include=names[4:5], where="none")
    assert [layer.name for layer in third.record.earlier] == names[:4]
    assert {kept.code for kept in third.record.kept if kept.name in names[:4]} == {"variant"}
    save_converted(third, tmp_path / "third.pt")
    torch.testing.assert_close(load_converted(tmp_path / "third.pt")(x), third.model.eval()(x), rtol=0, atol=0)
    # A network that bgcbench cannot build by itself is passed in, dense.
    again = load_converted(tmp_path / "third.pt", copy.deepcopy(model))
    torch.testing.assert_close(again(x), third.model.eval()(x), rtol=0, atol=0)


def test_a_dict_of_variants_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="variant is a dict"):
        convert(Pyramid(), {"head": "bgc"}, 2)  # type: ignore[arg-type]
