from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import bgcbench
from bgcbench.conversion.convert import convert, load_converted, save_converted
from bgcbench.convs import CONVS, VariantConv2d
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.errors import ResultFileError, ShapeError, UsageError
from bgcbench.results.rows import Record
from tests.conftest import ROOT


class OwnForward(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class NoForward(nn.Conv2d):
    pass


class Hand(nn.Module):
    """A module as people write them: nested Sequentials, a shared convolution, functional ones, subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.shared
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(OwnForward(8, 8, 1), NoForward(8, 8, (3, 1), padding=(1, 0))),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.same = nn.Conv2d(8, 8, 3, padding="same", dilation=2)
        self.uneven = nn.Conv2d(8, 8, 2, padding="same")
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.lent = nn.Conv2d(8, 8, 1)
        self.unused = nn.Conv2d(8, 8, 3)
        self.flat = nn.Conv1d(8, 8, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.shared(self.stem(x)).relu())
        x = self.blocks(x)
        x = x * self.gate(x).sigmoid()
        x = self.uneven(self.same(x))
        x = F.conv2d(F.conv2d(x, self.kernel), self.lent.weight, self.lent.bias)
        x = self.flat(x.flatten(2)).reshape(x.shape)
        return self.out(x.mean((2, 3)))


def resnet18() -> nn.Module:
    """Without numbers, where only its shape matters."""
    with torch.device("meta"):
        return torchvision.models.resnet18()


def build_small() -> nn.Module:
    return bgcbench.build_model("wrn_10_1")


def reasons(record: Record) -> dict[str, str]:
    return {kept.name: kept.reason for kept in record.kept}


def bgc(model: nn.Module, **options: object) -> bgcbench.Converted:
    return convert(model, "bgc", 2, **options)  # type: ignore[arg-type]


class TestWhatIsReplaced:
    def test_a_hand_written_network_is_converted_as_its_parts_allow(self) -> None:
        model = Hand()
        converted = bgc(model)
        record = converted.record
        assert [layer.name for layer in record.layers] == ["shared", "blocks.0.0", "blocks.1.1", "same"]
        kept = reasons(record)
        assert kept["stem"] == "the first convolution"
        assert kept["blocks.1.0"] == "OwnForward has a forward of its own"
        assert kept["blocks.2"] == "already grouped (depthwise)"
        assert "squeeze-and-excitation" in kept["gate.1"]
        assert "squeeze-and-excitation" in kept["gate.3"]
        assert kept["uneven"] == "padding='same' is uneven for its kernel"
        assert kept["lent"] == "its weight is used outside of it"
        assert kept["unused"] == "not reached by a forward pass"
        assert kept["flat"] == "a Conv1d; only Conv2d has these variants"
        assert len(kept) + len(record.layers) == 13
        assert record.functional == ("in the network: 8 -> 8, 1x1",) * 2
        # BGC at N = 2 is exact, so the whole network still computes the same.
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(converted.model.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)

    def test_a_module_used_twice_is_converted_once_and_stays_one(self) -> None:
        converted = bgc(Hand())
        assert converted.model.shared is converted.model.again
        assert type(converted.model.shared) is BalancedGroupConv2d
        layer = converted.record.layers[0]
        assert (layer.also, layer.calls, layer.height, layer.width) == (("again",), 2, 224, 224)

    def test_a_sequential_that_holds_one_convolution_three_times_too(self) -> None:
        conv = nn.Conv2d(4, 4, 3, padding=1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), conv, nn.ReLU(), conv, nn.Sequential(conv))
        converted = bgc(model)
        assert len({id(m) for m in converted.model.modules() if isinstance(m, VariantConv2d)}) == 1
        assert converted.record.layers[0].also == ("3", "4.0")

    def test_tied_weights_are_kept(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
        model[2].weight = model[1].weight
        record = bgc(model).record
        assert reasons(record)["1"] == "its weight is shared with 2"
        assert [layer.name for layer in record.layers] == ["3"]

    def test_parametrised_and_lazy_convolutions_are_kept(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
            nn.Conv2d(4, 4, 3),
        )
        kept = reasons(bgc(model).record)
        assert "parametrised" in kept["1"]
        assert "parametrised" in kept["2"]
        lazy = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.LazyConv2d(4, 3))
        assert "no weight yet" in reasons(bgc(lazy).record)["2"]

    def test_a_converted_network_is_not_converted_again(self) -> None:
        once = bgc(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        with pytest.raises(UsageError, match=r"nothing to replace.*already a BalancedGroupConv2d"):
            bgc(once.model)

    def test_a_network_that_cannot_be_run_is_still_converted_and_says_so(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
                self.downsample = nn.Conv2d(4, 4, 1)

            def forward(self, words: dict[str, torch.Tensor]) -> torch.Tensor:
                return self.b(self.a(words["image"]))

        record = bgc(Odd()).record
        assert [layer.name for layer in record.layers] == ["b"]
        assert record.layers[0].height is None
        assert "could not be run" in record.notes[0]
        assert reasons(record) == {"a": "the first convolution", "downsample": "a shortcut"}
        with pytest.raises(UsageError, match="does not run on its input"):
            bgc(Odd(), example_input=(3, 8, 8))

    def test_an_example_input_gives_the_shapes(self) -> None:
        for example in ((3, 20, 12), torch.zeros(1, 3, 20, 12)):
            layer = bgc(Hand(), example_input=example).record.layers[0]
            assert (layer.height, layer.width) == (20, 12)

    def test_timm_networks_keep_their_own_kinds_of_convolution(self) -> None:
        timm = pytest.importorskip("timm")
        model = timm.create_model("tf_efficientnet_b0", num_classes=7)
        converted = bgc(model, example_input=(3, 64, 64))
        kept = reasons(converted.record)
        same = [name for name, reason in kept.items() if reason == "Conv2dSame has a forward of its own"]
        assert "conv_stem" in same
        assert len(same) == 5  # the stem and the four strided depthwise ones
        assert len(converted.record.layers) == 31
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(converted.model.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)
        with torch.device("meta"):
            standardised = timm.create_model("resnetv2_50x1_bit", num_classes=7)
        with pytest.raises(UsageError, match="StdConv2d has a forward of its own"):
            bgc(standardised, example_input=(3, 64, 64))


def kept_in(*layers: nn.Module) -> dict[str, str]:
    """Why convolutions after a stem stay, with one more that is always replaced (in place: some cannot be copied)."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    return reasons(bgc(model, example_input=(3, 16, 16), inplace=True).record)


class TestWhatOnlyLooksLikeAConv2d:
    """Replacing any of these would silently compute something else."""

    def test_changed_forwards_are_kept(self) -> None:
        class Called(nn.Conv2d):
            def __call__(self, x: torch.Tensor) -> torch.Tensor:
                return super().__call__(x) * 2

        patched = nn.Conv2d(8, 8, 1)
        patched._conv_forward = lambda x, w, b: F.conv2d(x, w, b) * 2  # type: ignore[method-assign]
        assert kept_in(Called(8, 8, 1))["1"] == "Called has a forward of its own"
        assert kept_in(patched)["1"] == "Conv2d has a forward of its own"

    def test_computed_and_shared_biases_are_kept_like_weights(self) -> None:
        class Twice(nn.Module):
            def forward(self, b: torch.Tensor) -> torch.Tensor:
                return 2 * b

        parametrised, pruned, a, b = (nn.Conv2d(8, 8, 1) for _ in range(4))
        nn.utils.parametrize.register_parametrization(parametrised, "bias", Twice())
        prune.l1_unstructured(pruned, "bias", 0.5)
        b.bias = a.bias
        kept = kept_in(parametrised, pruned, a, b)
        assert "its bias is computed" in kept["1"]
        assert "its bias is computed" in kept["2"]
        assert (kept["3"], kept["4"]) == ("its bias is shared with 4", "its bias is shared with 3")

    def test_weights_tied_by_their_storage_are_kept(self) -> None:
        a, b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        b.weight.data = a.weight.data
        assert kept_in(a, b)["1"] == "its weight is shared with 2"

    def test_tensors_and_hooks_of_their_own_are_kept_and_plain_attributes_taken_over(self) -> None:
        scaled, hooked, named = (nn.Conv2d(8, 8, 1) for _ in range(3))
        scaled.register_buffer("scale", torch.ones(1))
        hooked.weight.register_hook(lambda gradient: gradient * 0)
        named.label = "neck"
        kept = kept_in(scaled, hooked, named)
        assert kept["1"] == "it holds more than a weight and a bias (scale)"
        assert kept["2"] == "its weight has a hook"
        converted = bgc(nn.Sequential(nn.Conv2d(3, 8, 3), named, nn.BatchNorm2d(8)))
        assert converted.model[1].label == "neck"

    def test_a_convolution_that_a_list_holds_too_is_kept(self) -> None:
        class Planned(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
                self.plan = [("a", self.a)]

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _, layer in self.plan:
                    x = layer(self.stem(x))
                return self.b(x)

        converted = convert(Planned(), "gc", 2)
        assert reasons(converted.record)["a"] == "called from outside of the module tree"
        assert [layer.name for layer in converted.record.layers] == ["b"]

    def test_weights_used_by_any_other_function_are_kept(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.a, self.b, self.c = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.c(self.b(self.a(self.stem(x))))
                return F.conv2d(F.conv_transpose2d(x, self.a.weight), self.b.weight * 2).relu()

        record = bgc(Tied(), where="all").record
        assert {name for name, reason in reasons(record).items() if "outside of it" in reason} == {"a", "b"}

    @pytest.mark.parametrize(
        "squeeze",
        [
            lambda x: F.avg_pool2d(x, x.shape[-1]),
            lambda x: x.sum((2, 3), keepdim=True),
            lambda x: x.flatten(2).mean(2)[:, :, None, None],
            nn.AdaptiveMaxPool2d(1),
        ],
    )
    def test_squeeze_and_excitation_is_known_however_it_squeezes(self, squeeze) -> None:
        class Gated(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)
                self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x = self.body(self.stem(x))
                return x * self.expand(self.reduce(squeeze(x)).relu()).sigmoid()

        kept = reasons(bgc(Gated()).record)
        assert "squeeze" in kept["reduce"]
        assert "squeeze" in kept["expand"]


class TestRoles:
    def test_a_network_inside_a_wrapper_or_a_subclass_is_converted_as_by_itself(self) -> None:
        class Mine(torchvision.models.ResNet):
            pass

        with torch.device("meta"):
            block = torchvision.models.resnet.BasicBlock
            wrapped = nn.Sequential(nn.Identity(), torchvision.models.resnet18())
            subclass = Mine(block, [2, 2, 2, 2])
            small = nn.Sequential(nn.Identity(), torchvision.models.mobilenet_v2())
        assert len(bgc(wrapped).record.layers) == len(bgc(subclass).record.layers) == 16
        assert len(bgc(small).record.layers) == 33

    def test_every_head_of_a_segmentation_network_stays(self) -> None:
        with torch.device("meta"):
            model = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, aux_loss=True)
        kept = reasons(convert(model, "gc", 4).record)
        assert kept["classifier.4"] == kept["aux_classifier.4"] == "the classifier"

    def test_a_convolution_that_writes_an_image_stays(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3), nn.Tanh())
        assert reasons(bgc(model).record)["3"] == "writes the image"

    def test_wrappers_are_refused_with_what_to_do(self) -> None:
        small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        for wrapped, message in (
            (torch.compile(small), "convert the original one"),
            (nn.DataParallel(small), "convert its .module"),
            (torch.jit.script(small), "before torch.jit.script"),
        ):
            with pytest.raises(UsageError, match=message):
                bgc(wrapped)

    def test_an_example_that_is_no_input_is_refused(self) -> None:
        small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        assert bgc(small, example_input=[3, 9, 9]).record.size == (3, 9, 9)
        with pytest.raises(UsageError, match="example_input is a str"):
            bgc(small, example_input="image.png")

    def test_a_network_that_needs_its_own_hook_is_run_with_it(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        model.register_forward_pre_hook(lambda _, arguments: (arguments[0].expand(-1, 3, -1, -1),))
        record = bgc(model, example_input=(1, 9, 9)).record
        assert (record.layers[0].height, record.layers[0].width) == (7, 7)


class TestChoosing:
    def test_where_chooses_by_kernel(self) -> None:
        model = resnet18()
        assert all(layer.kernel == (3, 3) for layer in bgc(model, where="3x3").record.layers)
        with pytest.raises(UsageError, match=r"nothing to replace with where='1x1' .*downsample.0: a shortcut"):
            bgc(model, where="1x1")  # its only 1x1 are shortcuts
        everything = {layer.name for layer in bgc(model, where="all").record.layers}
        assert "layer2.0.downsample.0" in everything
        assert "conv1" not in everything

    def test_include_adds_and_exclude_keeps(self) -> None:
        model = resnet18()
        record = bgc(model, where="none", include=["layer1.*", "*.downsample.0"], exclude="layer1.0.*").record
        assert [layer.name for layer in record.layers] == [
            "layer1.1.conv1", "layer1.1.conv2",
            "layer2.0.downsample.0", "layer3.0.downsample.0", "layer4.0.downsample.0"]  # fmt: skip
        assert reasons(record)["layer1.0.conv1"] == "excluded"
        assert reasons(record)["conv1"] == "not included"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"include": "layer9.*"}, "no convolution of the network is called 'layer9"),
            ({"exclude": "layer1.0.conv3"}, "there are layer1.0.conv"),
            ({"where": "5x5"}, "unknown where '5x5'.*choose from auto"),
            ({"init": "whit"}, "did you mean 'white'"),
            ({"on_indivisible": "ignore"}, "raise, skip, gcd"),
            ({"algorithm": "masked"}, "unknown algorithm of bgc"),
        ],
    )
    def test_what_means_nothing_is_refused(self, options: dict[str, str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            bgc(resnet18(), **options)

    def test_including_what_cannot_be_replaced_is_refused_by_name_and_passed_over_by_pattern(self) -> None:
        with pytest.raises(UsageError, match=r"blocks\.2 cannot be replaced: already grouped"):
            bgc(Hand(), include="blocks.2")
        assert reasons(bgc(Hand(), include="blocks.*").record)["blocks.2"] == "already grouped (depthwise)"

    def test_n_1_and_standard_replace_nothing(self) -> None:
        model = resnet18()
        for variant in ("bgc", "standard"):
            converted = convert(model, variant, 1)
            assert not converted.record.layers
            assert not any(isinstance(m, VariantConv2d) for m in converted.model.modules())
        with pytest.raises(ShapeError, match="groups=1, not 2"):
            convert(model, "standard", 2)

    def test_indivisible_channels_raise_are_skipped_or_take_the_gcd(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 7, 3))
        with pytest.raises(ShapeError, match=r"2 convolutions: 1 \(6 -> 8\), 3 \(8 -> 7\); no other N fits all"):
            convert(model, "gc", 4)
        even = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3), nn.Conv2d(24, 36, 3))
        with pytest.raises(ShapeError, match=r"1 \(12 -> 24\), 2 \(24 -> 36\); N that fits all: 2, 3, 4, 6, 12; keep"):
            convert(even, "gc", 8)
        skipped = convert(model, "gc", 4, on_indivisible="skip").record
        assert [layer.name for layer in skipped.layers] == ["2"]
        gcd = convert(model, "gc", 4, on_indivisible="gcd").record
        assert [(layer.name, layer.groups) for layer in gcd.layers] == [("1", 2), ("2", 4)]
        assert reasons(gcd)["3"] == "N=4 does not divide 8 -> 7 channels"
        narrowing = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6))
        assert [layer.groups for layer in convert(narrowing, "gc", 4, on_indivisible="gcd").record.layers] == [2]
        assert len(convert(model, "flgc", 4).record.layers) == 3  # its groups may be uneven

    def test_low_rank_need_not_divide_the_channels_and_says_where_it_leaves_no_rank(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 9, 3), nn.Conv2d(9, 15, 3, padding=1), nn.Conv2d(15, 4, 1), nn.Conv2d(4, 5, 1)
        )
        converted = convert(model, "lowrank", 2, where="all", exclude=["0", "3"], on_indivisible="raise")
        assert [layer.name for layer in converted.record.layers] == ["1", "2"]
        assert converted.model[1].rank == 9 * 9 * 15 // (2 * (81 + 15))  # type: ignore[union-attr]
        kept = convert(model, "lowrank", 8, where="all", exclude=["0", "3"], on_indivisible="skip").record
        assert reasons(kept)["2"] == "N=8 leaves no rank for 15 -> 4 channels"
        with pytest.raises(ShapeError, match="groups=8 leaves no rank for the channels of a convolution: 2"):
            convert(model, "lowrank", 8, where="all", exclude=["0", "3"])


class TestWhatSurvives:
    def test_the_original_is_untouched_unless_in_place(self) -> None:
        model = build_small()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        converted = bgc(model)
        assert not any(isinstance(m, VariantConv2d) for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert converted.model is not model
        assert bgc(model, inplace=True).model is model
        assert any(isinstance(m, VariantConv2d) for m in model.modules())

    def test_training_mode_dtype_layout_and_requires_grad_are_taken_over(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).double()
        model.to(memory_format=torch.channels_last)
        model[1].eval()
        model[1].weight.requires_grad_(False)
        converted = bgc(model).model
        assert [module.training for module in converted] == [True, False, True]
        assert not converted[1].kernel.requires_grad
        assert not converted[1].weight_mean.requires_grad
        assert converted[1].bias.requires_grad
        assert converted[2].weight_mean.requires_grad
        assert converted[1].kernel.dtype == torch.float64
        assert converted[1].kernel.is_contiguous(memory_format=torch.channels_last)

    def test_hooks_go_on_and_their_handles_still_remove_them(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        seen: list[str] = []
        handle = model[1].register_forward_hook(lambda *_: seen.append("after"))
        model[1].register_forward_pre_hook(lambda *_: seen.append("before"))
        model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
        converted = bgc(model, inplace=True).model
        assert not seen  # finding out about the network runs none of them
        converted(torch.randn(1, 3, 7, 7)).sum().backward()
        assert seen == ["before", "after", "backward"]
        handle.remove()
        converted(torch.randn(1, 3, 7, 7))
        assert seen[3:] == ["before"]

    def test_stride_dilation_padding_mode_and_bias_are_taken_over(self) -> None:
        conv = nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1), padding_mode="reflect")
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="valid"), conv)
        x = torch.randn(2, 3, 11, 10)
        torch.testing.assert_close(bgc(model).model(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("variant", [name for name in CONVS if name != "standard"])
    def test_every_variant_can_be_put_in_copied_solved_or_fresh(self, variant: str) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        x = torch.randn(2, 3, 9, 9)
        for init in ("copy", "white", "scratch"):
            converted = convert(model, variant, 4, init=init)
            assert type(converted.model[2]) is CONVS[variant]
            assert converted.model(x).shape == model(x).shape
        white = convert(model, variant, 4, init="white").model
        expected = CONVS[variant].from_dense(model[2].weight, 4, bias=model[2].bias, padding=1)
        torch.testing.assert_close(white[2].dense_weight(), expected.dense_weight())

    def test_the_random_state_is_left_alone(self) -> None:
        before = torch.get_rng_state()
        convert(build_small(), "flgc", 2)  # building the network draws, converting it must not
        torch.manual_seed(0)
        build_small()
        expected = torch.get_rng_state()
        torch.manual_seed(0)
        convert(build_small(), "flgc", 2)
        assert torch.equal(torch.get_rng_state(), expected)
        torch.set_rng_state(before)

    def test_a_convolution_alone_is_converted_too(self) -> None:
        converted = bgc(nn.Conv2d(8, 8, 3), where="none", include="")
        assert type(converted.model) is BalancedGroupConv2d

    @pytest.mark.parametrize(("variant", "algorithm"), [("bgc", "auto"), ("flgc", "deployed")])
    def test_compile_and_export_see_one_graph(self, variant: str, algorithm: str) -> None:
        few = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3))
        model = convert(few, variant, 4, algorithm=algorithm).model.eval()
        x = torch.randn(2, 3, 12, 12)
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


class TestRecord:
    def test_it_goes_to_json_and_back(self) -> None:
        record = bgc(Hand(), exclude="same").record
        text = json.dumps(record.to_json(), allow_nan=False)
        assert Record.from_json(json.loads(text)) == record
        plain = record.to_json()
        assert plain["replaced"] == ["shared", "blocks.0.0", "blocks.1.1"]
        assert {"name": "same", "reason": "excluded", "code": "excluded"} in plain["kept"]
        assert plain["layers"][0]["in_channels"] == 8
        with pytest.raises(ResultFileError, match="no record"):
            Record.from_json({"variant": "bgc"})

    def test_the_networks_source_is_found(self) -> None:
        assert bgc(torchvision.models.resnet18(num_classes=3)).record.source == {"name": "resnet18", "num_classes": 3}
        assert bgc(Hand()).record.source is None


LOAD = """
import sys, torch, bgcbench
x, expected = torch.load("expected.pt")
models = {name: bgcbench.load_converted(f"{name}.pt") for name in expected}
sys.exit(str([name for name, m in models.items() if m.training or not torch.equal(m(x), expected[name])] or ""))
"""


class TestRoundTrip:
    def test_a_new_process_computes_the_same(self, tmp_path: Path) -> None:
        x, expected = torch.randn(2, 3, 32, 32), {}
        for variant, options in (
            ("bgc", {"algorithm": "two_conv"}),  # 'auto' may find another algorithm to be the fastest there
            ("tlgc", {"on_indivisible": "gcd"}),
            ("flgc", {"algorithm": "deployed"}),
            ("lgc", {"algorithm": "masked"}),
        ):
            converted = convert(build_small(), variant, 4, **options)
            save_converted(converted, tmp_path / f"{variant}.pt")
            expected[variant] = converted.model.eval()(x).detach()
        torch.save((x, expected), tmp_path / "expected.pt")
        done = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              check=False, capture_output=True, text=True, timeout=240)  # fmt: skip
        assert done.stderr.strip() == ""

    def test_a_plain_torch_save_of_state_and_record_loads(self, tmp_path: Path) -> None:
        converted = bgc(build_small())
        as_json = converted.record.to_json()
        x = torch.randn(1, 3, 32, 32)
        expected = converted.model.eval()(x)
        for record in (converted.record, as_json, json.dumps(as_json)):
            torch.save({"state_dict": converted.model.state_dict(), "record": record}, tmp_path / "net.pt")
            assert torch.equal(load_converted(tmp_path / "net.pt")(x), expected)

    def test_a_network_that_is_not_known_is_passed_in(self, tmp_path: Path) -> None:
        converted = bgc(Hand().double())
        save_converted(converted, tmp_path / "net.pt")
        with pytest.raises(ResultFileError, match=r"pass a dense one: load_converted\(path, model\)"):
            load_converted(tmp_path / "net.pt")
        dense = Hand()
        loaded = load_converted(tmp_path / "net.pt", dense)
        assert type(dense.shared) is nn.Conv2d
        x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
        assert torch.equal(loaded(x), converted.model.eval()(x))

    def test_uneven_learnt_groups_survive(self, tmp_path: Path) -> None:
        converted = convert(build_small(), "flgc", 4)
        layers = [m for m in converted.model.modules() if isinstance(m, CONVS["flgc"])]
        with torch.no_grad():
            for layer in layers:
                layer.logits_in.normal_()
                layer.logits_out.normal_()
        save_converted(converted, tmp_path / "net.pt")
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(load_converted(tmp_path / "net.pt")(x), converted.model.eval()(x))

    def test_behaviour_that_names_and_shapes_do_not_show_is_not_lost(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            plain = torchvision.models.googlenet(init_weights=False)
            changed = torchvision.models.googlenet(init_weights=False, transform_input=True)
        assert convert(plain, "bgc", 2, where="3x3").record.source == {"name": "googlenet", "num_classes": 1000}
        assert convert(changed, "bgc", 2, where="3x3").record.source is None
        hooked = build_small()
        hooked.register_forward_hook(lambda module, x, y: 3 * y)
        assert bgc(hooked).record.source is None

    def test_frozen_parameters_dtypes_and_layouts_survive(self, tmp_path: Path) -> None:
        model = build_small().to(memory_format=torch.channels_last)
        model.stages[0][0].conv1.weight.requires_grad_(False)
        model.fc.to(torch.float64)
        converted = bgc(model)
        save_converted(converted, tmp_path / "net.pt")
        loaded = load_converted(tmp_path / "net.pt")
        for (name, own), (_, other) in zip(loaded.named_parameters(), converted.model.named_parameters(), strict=True):
            assert own.requires_grad == other.requires_grad, name
            assert own.dtype == other.dtype, name
            assert own.stride() == other.stride(), name

    def test_extra_state_is_saved(self, tmp_path: Path) -> None:
        class Extra(nn.Sequential):
            def get_extra_state(self) -> dict[str, int]:
                return {"steps": 3}

            def set_extra_state(self, state: dict[str, int]) -> None:
                self.steps = state["steps"]

        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]
        save_converted(bgc(Extra(*layers)), tmp_path / "net.pt")
        assert load_converted(tmp_path / "net.pt", Extra(*layers)).steps == 3

    @pytest.mark.parametrize("record", ["garbage", "{}", {"variant": "bgc"}])
    def test_a_record_that_is_none_is_refused(self, tmp_path: Path, record: object) -> None:
        torch.save({"record": record, "state_dict": {}}, tmp_path / "net.pt")
        with pytest.raises(ResultFileError, match="no record of a conversion"):
            load_converted(tmp_path / "net.pt")

    def test_another_network_or_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        save_converted(bgc(Hand()), tmp_path / "net.pt")
        with pytest.raises(ResultFileError, match="no Conv2d called 'shared'"):
            load_converted(tmp_path / "net.pt", nn.Sequential(nn.Conv2d(3, 8, 3)))
        (tmp_path / "bad.pt").write_bytes(b"not a network")
        with pytest.raises(ResultFileError, match="no saved network"):
            load_converted(tmp_path / "bad.pt")
        with pytest.raises(ResultFileError, match="is not there"):
            load_converted(tmp_path / "missing.pt")
        torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
        with pytest.raises(ResultFileError, match="no 'record'"):
            load_converted(tmp_path / "other.pt")


def test_the_size_of_a_layers_input_is_that_before_padding_whatever_the_padding() -> None:
    class Padded(nn.Module):
        def __init__(self, mode: str) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=(1, 2), dilation=(1, 2), padding_mode=mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.stem(x)).mean((2, 3)) * 2

    for mode in ("zeros", "circular", "reflect"):
        (layer,) = convert(Padded(mode), "gc", 2, example_input=(3, 12, 10)).record.layers
        assert (layer.height, layer.width) == (12, 10)


def test_printed_a_conversion_is_its_summary() -> None:
    """As GC N=4, 3x3 convolutions of 16 -> 16 channels have a quarter of the parameters and MACs (8 x 8 positions)."""
    model = nn.Sequential(*(nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16, 16, 16)))
    converted = convert(model, "gc", groups=4, include="*", example_input=(3, 8, 8), on_indivisible="skip")
    weights = 4 * 9 * 16 * 16
    assert str(converted).splitlines() == [
        "4 of 5 convolutions replaced: 4 as GC N=4",
        f"of these: parameters {weights:,} -> {weights // 4:,}, MACs of an image {64 * weights:,} -> {16 * weights:,}",
        f"kept, {converted.record.kept[0].reason}: 0",
    ]
    mixed = convert(model, plan={"1": {"variant": "lowrank", "rank": 2}, "4": {"variant": "bgc", "groups": 2}})
    assert repr(mixed).splitlines()[0] == "2 of 5 convolutions replaced: 1 as LR r=2, 1 as BGC N=2"
