"""What a network's convolutions lose on their own inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bgcbench
from bgcbench.conversion import layer_moments
from bgcbench.conversion.approximability import approximability, misfits, moment_bytes, passes, stream
from bgcbench.conversion.convert import candidates
from bgcbench.conversion.solve import RIDGES
from bgcbench.convs import CONVS
from bgcbench.errors import ShapeError, UsageError
from bgcbench.models import build_model
from bgcbench.results.rows import Replaced
from bgcbench.specs import HELD_OUT, Choice


class Net(nn.Module):
    """A stem, two ordinary convolutions with a rectifier between them, and one that is circular and strided."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 1, bias=False)
        self.third = nn.Conv2d(32, 16, 3, stride=2, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(F.relu(self.stem(x))).relu()
        x = self.third(self.norm(self.second(x)).relu())
        return self.head(x.mean((2, 3)))


def images(count: int = 16, side: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 3, side, side, generator=generator).split(5))


@pytest.fixture
def net() -> Net:
    return Net()


def inputs_of(net: Net, name: str, data: list[Tensor]) -> Tensor:
    """What reaches a convolution, found by a hook of the test's own: (B, C, H, W)."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda module, given, output: seen.append(given[0]))
    net.eval()
    with torch.no_grad():
        for batch in data:
            net(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["first", "second", "third"])
@pytest.mark.parametrize(("variant", "groups"), [("gc", 2), ("bgc", 4), ("shuffle", 4), ("tlgc", 2)])
def test_the_error_is_the_share_of_the_output_that_the_layers_really_differ_by(
    net: Net, name: str, variant: str, groups: int
) -> None:
    data = images()
    (found,) = [
        error
        for error in approximability(net, data, variants=(variant,), groups=(groups,), images=16)
        if error.name == name
    ]
    x = inputs_of(net, name, data).double()
    held = torch.arange(16) % HELD_OUT == HELD_OUT - 1
    dense = net.get_submodule(name)
    options: dict[str, Any] = {"stride": dense.stride, "padding": dense.padding, "padding_mode": dense.padding_mode}
    for projection, reported in (("copy", found.copied), ("white", found.white)):
        layer = CONVS[variant].from_dense(dense.weight.double(), groups, projection=projection, **options)
        plain = CONVS["standard"].from_dense(dense.weight.double(), **options)
        with torch.no_grad():
            y, z = plain(x[held]), layer(x[held])
        assert reported == pytest.approx(float((y - z).square().sum() / y.square().sum()), rel=1e-6)


def test_calibrated_weights_are_the_least_squares_of_the_images_that_are_not_held_out(net: Net) -> None:
    data = images(32)
    found = {
        (error.variant, error.groups): error
        for error in approximability(net, data, groups=(2, 4), images=32)
        if error.name == "second"
    }
    x = inputs_of(net, "second", data).double()
    held = torch.arange(32) % HELD_OUT == HELD_OUT - 1
    weight = net.second.weight.detach().double().flatten(1)  # (32, 16)
    fit, held_out = (x[part].transpose(0, 1).flatten(1) for part in (~held, held))  # (16, positions)
    y = weight @ held_out
    for groups in (2, 4):
        lost = torch.zeros(())
        for k in range(groups):
            rows = slice(k * 32 // groups, (k + 1) * 32 // groups)
            seen = slice(k * 16 // groups, (k + 1) * 16 // groups)
            solved = torch.linalg.lstsq(fit[seen].T, (weight[rows] @ fit).T).solution.T
            lost = lost + (y[rows] - solved @ held_out[seen]).square().sum()
        plain = float(lost / y.square().sum())
        reported = found["gc", groups]
        assert reported.calibrated is not None
        assert reported.white is not None
        # The ridge is small and may only help; with 1,536 positions for 8 unknowns it hardly matters.
        assert plain * 0.98 < reported.calibrated < plain * 1.002
        assert reported.calibrated < 0.9 * reported.white
        assert reported.ridge in RIDGES
    # BGC at N=2 is every convolution: nothing is lost without calibration, so none is taken.
    assert found["bgc", 2].white == pytest.approx(0, abs=1e-12)
    assert found["bgc", 2].ridge is None


def test_calibration_is_never_worse_than_the_white_optimum_even_on_four_images(net: Net) -> None:
    for error in approximability(net, images(4), variants=("gc", "bgc", "tlgc"), groups=(2, 4), images=4):
        assert error.calibrated is not None
        assert error.white is not None
        assert error.calibrated <= error.white
    assert any(error.scarce for error in approximability(net, images(4), variants=("bgc",), groups=(2,), images=4))


def test_what_convert_would_replace_is_looked_at_in_the_order_of_execution(net: Net) -> None:
    found = approximability(net, images(), variants=("standard", "gc"), groups=(2,))
    converted = bgcbench.convert(net, "gc", 2, example_input=(3, 8, 8))
    assert [error.name for error in found] == [layer.name for layer in converted.record.layers]
    # 8x8 positions x 9 x 16 x 16, 8x8 x 16 x 32 and 4x4 x 9 x 32 x 16
    macs = {"first": 64 * 9 * 16 * 16, "second": 64 * 16 * 32, "third": 16 * 9 * 32 * 16}
    assert {error.name: error.share for error in found} == {
        name: pytest.approx(value / sum(macs.values())) for name, value in macs.items()
    }
    assert [error.params for error in found] == [9 * 16 * 16 // 2 + 16, 16 * 32 // 2, 9 * 32 * 16 // 2 + 16]
    only = approximability(net, images(), variants=("gc",), groups=(2,), where="1x1")
    assert [error.name for error in only] == ["second"]


def test_the_network_is_left_as_it_was(net: Net) -> None:
    net.train()
    net.norm.eval()
    net.first.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.random.get_rng_state()
    approximability(net, images(), groups=(2,))
    assert net.training
    assert net.first.training
    assert not net.norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [len(m._forward_hooks) for m in net.modules()] == [m is net.first for m in net.modules()]
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_hooks_go_and_the_mode_comes_back_when_the_images_break_off(net: Net) -> None:
    def torn() -> Iterator[Tensor]:
        yield images()[0]
        raise OSError("the disk is gone")

    net.train()
    with pytest.raises(OSError, match="the disk is gone"):
        approximability(net, torn(), groups=(2,))
    assert net.training
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_labels_beside_the_images_are_left_alone(net: Net) -> None:
    plain = approximability(net, images(), groups=(2,))
    labelled = approximability(net, [(batch, torch.zeros(len(batch))) for batch in images()], groups=(2,))
    assert plain == labelled


def test_only_as_many_images_as_asked_for_are_used(net: Net) -> None:
    few = approximability(net, images(16), groups=(2,), images=8)
    assert few == approximability(net, images(16)[:2], groups=(2,), images=8)
    assert few != approximability(net, images(16), groups=(2,))


def test_layers_that_do_not_fit_the_memory_together_are_done_in_turn_with_the_same_result(net: Net) -> None:
    whole = approximability(net, images(), groups=(2, 4))
    largest = max(moment_bytes(layer) for layer in candidates(net, example_input=(3, 8, 8)).chosen)
    assert largest == 2 * 8 * (9 * 32) ** 2
    room = 4 * largest  # one for the moments, three for solving with them
    portions = passes(candidates(net, example_input=(3, 8, 8)).chosen, room)
    assert [[layer.name for layer in portion] for portion in portions] == [["first", "second"], ["third"]]
    assert approximability(net, images(), groups=(2, 4), memory_bytes=room) == whole
    with pytest.raises(UsageError, match=r"third.*more than the .* GiB allowed; raise --memory"):
        approximability(net, images(), groups=(2,), memory_bytes=room - 1)


def test_a_generator_serves_one_pass_and_not_two(net: Net) -> None:
    assert approximability(net, iter(images()), groups=(2,)) == approximability(net, images(), groups=(2,))
    with pytest.raises(UsageError, match="needed more than once"):
        approximability(net, iter(images()), groups=(2,), memory_bytes=4 * 2 * 8 * (9 * 32) ** 2)


def test_of_large_maps_so_many_positions_are_drawn_as_are_enough(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [torch.randn(2, 3, 64, 64) for _ in range(4)]
    found = candidates(net, example_input=(3, 64, 64))
    counted = {layer.name: moments for layer, moments in stream(net, found.chosen, data, images=8, memory_bytes=2**30)}
    # 16,384 spread over 8 images: 2,048 of the 4,096 positions of each, and 6 images to solve on
    assert counted["second"].fit.positions == 6 * 2048
    assert counted["second"].held_out.positions == 2 * 2048
    monkeypatch.setattr(layer_moments, "LEAST_ROWS", 1)
    counted = {layer.name: moments for layer, moments in stream(net, found.chosen, data, images=8, memory_bytes=2**30)}
    # 20 for each of the 16 entries of a 1x1 patch, and of the 144 of a 3x3 one
    assert counted["second"].fit.positions == 6 * 40
    assert counted["first"].fit.positions == 6 * 360


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "no calibration images"),
        (images(3), {"images": 3}, "3 calibration images are too few; use at least 4"),
        ([torch.zeros(3, 8, 8)], {}, "does not run on its input"),
        ([{"picture": images()}], {}, "a batch has picture, and the network's forward takes x; pass forward_fn"),
        ([{1, 2}], {}, "a batch is a set; pass tensors"),
        (images(), {"variants": ("bcg",)}, "did you mean 'bgc'"),
        (images(), {"where": "5x5"}, "unknown where"),
        (images(), {"exclude": "nothing*"}, "no convolution of the network is called 'nothing"),
    ],
)
def test_mistakes_get_one_clear_line(net: Net, data: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        approximability(net, data, **{"groups": (2,), **options})


def test_an_n_that_does_not_fit_a_layer_says_so_there_and_nowhere_else(net: Net) -> None:
    found = approximability(net, images(), variants=("gc",), groups=(32,))
    reasons = {error.name: error.reason for error in found}
    assert reasons["first"] is not None
    assert "16 is not divisible by groups=32" in reasons["first"]
    assert all(error.calibrated is None for error in found)
    layers = candidates(net, example_input=(3, 8, 8)).chosen
    choices = [Choice("gc", 2), Choice("gc", 32), Choice("lowrank", 32), Choice("lowrank", rank=17)]
    # 16 -> 16 channels, 3x3: r = 9 16 16 / (N (9 16 + 16)) = 14.4 / N
    assert misfits(layers[:1], choices) == [
        "groups=32 does not divide first (16 -> 16); N that fits all: 2, 4, 8, 16",
        "groups=32 leaves no rank for first (16 -> 16); N that fits all: 2 to 14",
        "rank=17 is too high for first (16 -> 16); rank that fits all: 1 to 16",
    ]


def test_a_layer_that_runs_twice_is_evaluated_on_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.shared = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(self.stem(x)).relu()).mean()

    found = candidates(Twice(), example_input=(3, 8, 8), include="shared")
    ((_, moments),) = stream(Twice(), found.chosen, images(8), images=8, memory_bytes=2**30)
    assert found.chosen[0].calls == 2
    assert moments.fit.positions == 2 * 6 * 6 * 6


def test_the_dead_layer_of_a_network_that_puts_out_nothing_loses_nothing() -> None:
    net = Net()
    nn.init.zeros_(net.second.weight)
    (found,) = approximability(net, images(), variants=("gc",), groups=(2,), where="1x1")
    assert (found.copied, found.calibrated) == (0.0, 0.0)


def test_candidates_are_what_convert_replaces_in_the_papers_networks() -> None:
    for name, size in (("wrn_10_1", 32), ("resnet18", 64), ("mobilenet_v2", 64)):
        model = build_model(name)
        found = candidates(model, example_input=(3, size, size))
        converted = bgcbench.convert(model, "gc", 2, example_input=(3, size, size), init="scratch")
        assert [layer.name for layer in found.chosen] == [layer.name for layer in converted.record.layers]
        assert all(isinstance(layer, Replaced) and layer.groups == 1 for layer in found.chosen)
        assert found.kept == converted.record.kept


def test_which_positions_are_drawn_depends_on_neither_batches_nor_other_layers_nor_memory(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_moments, "LEAST_ROWS", 100)
    monkeypatch.setattr(layer_moments, "ROWS_AN_ENTRY", 1)
    data = torch.randn(12, 3, 16, 16)
    options: dict[str, Any] = {"groups": (2, 4), "seed": 3}
    whole = approximability(net, list(data.split(12)), **options)
    assert whole[0].rows == 9 * 12  # of 256 positions of each of nine images
    again = approximability(net, list(data.split(5)), **options)
    assert [e.calibrated for e in again] == pytest.approx([e.calibrated for e in whole], rel=1e-6)
    alone = approximability(net, list(data.split(12)), exclude="first", **options)
    assert alone[0].calibrated == next(e for e in whole if e.name == "second").calibrated
    turns = approximability(net, list(data.split(12)), memory_bytes=4 * 2 * 8 * (9 * 32) ** 2, **options)
    assert turns[-1].calibrated == whole[-1].calibrated
    assert approximability(net, list(data.split(12)), groups=(2, 4), seed=4) != whole


def test_without_a_number_all_images_there_are_are_used(net: Net) -> None:
    data = images(12)
    loader = torch.utils.data.DataLoader(torch.cat(data), batch_size=4)
    whole = approximability(net, data, groups=(2,), images=12)
    assert approximability(net, data, groups=(2,)) == approximability(net, tuple(data), groups=(2,)) == whole
    loaded = approximability(net, loader, groups=(2,))  # in batches of its own, so it adds up in another order
    assert [e.calibrated for e in loaded] == pytest.approx([e.calibrated for e in whole], rel=1e-6)
    assert [e.rows for e in loaded] == [e.rows for e in whole]
    # A generator does not say how many come; 256 are reckoned with, which here makes no difference.
    assert approximability(net, iter(data), groups=(2,)) == approximability(net, data, groups=(2,), images=12)


def test_a_shuffling_loader_leaves_the_random_state_alone(net: Net) -> None:
    loader = torch.utils.data.DataLoader(torch.cat(images()), batch_size=4, shuffle=True)
    state = torch.random.get_rng_state()
    approximability(net, loader, groups=(2,))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_in_another_precision_takes_float_images(net: Net, dtype: torch.dtype) -> None:
    plain = approximability(net, images(), groups=(2,))
    other = approximability(net.to(dtype), images(), groups=(2,))
    assert [e.calibrated for e in other] == pytest.approx([e.calibrated for e in plain], abs=0.03)


class TestNetworksThatCallTheirConvolutionsInTheirOwnWay:
    class Odd(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.way = way
            self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            if self.way == "stacked":  # an image and its mirror image in one batch
                x = self.body(torch.cat([x, x.flip(3)]))
            elif self.way == "one by one":
                x = torch.stack([self.body(image) for image in x])
            else:
                x = self.body(input=x)
            return x.mean((2, 3)) * 2

    @pytest.mark.parametrize(("way", "calls"), [("stacked", 2), ("one by one", 1), ("by name", 1)])
    def test_every_input_is_counted_once_and_held_out_with_its_image(self, way: str, calls: int) -> None:
        network = self.Odd(way)
        found = candidates(network, example_input=(3, 8, 8), where="none", include="body")
        ((_, moments),) = stream(network, found.chosen, images(8), images=8, memory_bytes=2**30)
        assert (moments.fit.positions, moments.held_out.positions) == (16 * 6 * calls, 16 * 2 * calls)


def test_inputs_and_weights_that_are_no_numbers_are_refused_by_layer(net: Net) -> None:
    with torch.no_grad():
        net.second.weight[3, 2] = torch.nan
    with pytest.raises(UsageError, match="the weights of second are not finite"):
        approximability(net, images(), groups=(2,), where="1x1")
    with pytest.raises(UsageError, match="the inputs of third are not finite"):
        approximability(net, images(), groups=(2,), where="none", include="third")


@pytest.mark.parametrize("variant", ["gc", "shuffle", "bgc", "tlgc", "flgc", "lgc"])
def test_inputs_that_are_always_zero_do_no_harm(net: Net, variant: str) -> None:
    with torch.no_grad():
        net.first.weight[:9].zero_()
        net.first.bias[:9] = -1.0  # whole groups of the next layer's inputs are dead
    for error in approximability(net, images(), variants=(variant,), groups=(2, 4, 8, 16), where="1x1"):
        assert error.calibrated is not None
        assert error.white is not None
        assert 0 <= error.calibrated <= error.white


@pytest.mark.parametrize(("options", "message"), [({"groups": ()}, "nothing to look at"),
                                                  ({"variants": ("standard",)}, "nothing to look at")])  # fmt: skip
def test_nothing_asked_for_is_said(net: Net, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        approximability(net, images(), **options)
    with pytest.raises(ShapeError, match="groups=0"):
        approximability(net, images(), groups=(0,))


def test_a_row_is_scarce_below_ten_positions_for_each_number_that_an_output_has(net: Net) -> None:
    # 12 images solved on, 64 positions each: 768. A 3x3 on 16 channels has 144 numbers: GC N=2 asks for 720 positions,
    # BGC N=2 for 1440 and BGC N=4 for 720.
    found = {
        (e.variant, e.groups): e.scarce for e in approximability(net, images(), groups=(2, 4)) if e.name == "first"
    }
    assert found == {("gc", 2): False, ("gc", 4): False, ("bgc", 2): True, ("bgc", 4): False}


def test_a_layer_that_runs_twice_counts_twice_in_the_shares() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.twice, self.once = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.once(self.twice(self.twice(self.stem(x)).relu()).relu()).mean((2, 3)) * 2

    found = approximability(Shared(), images(8), variants=("gc",), groups=(2,), where="none", include=("twice", "once"))
    assert {e.name: e.share for e in found} == {"twice": pytest.approx(2 / 3), "once": pytest.approx(1 / 3)}


def test_padding_of_another_kind_and_other_sides_is_that_of_the_layer() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.body = nn.Conv2d(8, 8, (1, 3), padding=(2, 1), padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.stem(x)).mean((2, 3)) * 2

    network, data = Padded(), images(8)
    (found,) = approximability(network, data, variants=("gc",), groups=(2,), where="none", include="body")
    with torch.no_grad():
        x = network.stem(torch.cat(data)[3::4])
        dense = network.body(x) - network.body.bias[:, None, None]
        options: dict[str, Any] = {"padding": (2, 1), "padding_mode": "reflect"}
        lost = dense - CONVS["gc"].from_dense(network.body.weight, 2, **options)(x)
    assert found.copied == pytest.approx(float(lost.square().sum() / dense.square().sum()), rel=1e-5)


@pytest.mark.gpu
def test_on_a_cuda_device_the_errors_are_those_of_the_cpu() -> None:
    net = Net().double()
    data = [batch.double() for batch in images()]
    here = approximability(net, data, groups=(2, 4))
    there = approximability(net.cuda(), data, groups=(2, 4))
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.calibrated == pytest.approx(ours.calibrated, rel=1e-6)
