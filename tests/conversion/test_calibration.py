"""Calibrated conversion against brute force: explicit patch matrices, torch.linalg.lstsq, float64."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn import functional as F

import bgcbench
from bgcbench.conversion import solve
from bgcbench.conversion.calibration import Stopped, reestimate_norms
from bgcbench.conversion.convert import convert, load_converted, save_converted
from bgcbench.conversion.lockstep import Stop, run_in_step
from bgcbench.conversion.norms import NormMoments
from bgcbench.conversion.survey import survey
from bgcbench.convs import CONVS
from bgcbench.errors import BgcbenchError, UsageError
from bgcbench.measure.undisturbed import RandomState
from bgcbench.results.rows import Record
from bgcbench.specs import SOLVED
from bgcbench.theory.moments import RegressionMoments

LINEAR = ("gc", "shuffle", "bgc")
IMAGES, SIDE = 24, 6


class Net(nn.Module):
    """Two convolutions to be replaced, a bare one after a norm and one with a bias, behind one that reads the image."""

    def __init__(self, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, stride=stride, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 1)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(self.stem(x).relu())).relu()
        scores: Tensor = self.out(self.second(x).relu().mean((2, 3)))
        return scores


def images(count: int = IMAGES) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.5


def network(**shape: int) -> nn.Module:
    """In float64, with statistics of the norm that are those of the images."""
    model = Net(**shape).double().eval()
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
        model.norm.bias.uniform_(-0.5, 0.5)
    reestimate_norms(model, [images()])
    return model


def seen_by(model: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a module and what comes out of it."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: found.append((a[0], y)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


def patches(x: Tensor, conv: Any) -> Tensor:
    """(nK, positions)."""
    cut = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return cut.transpose(0, 1).flatten(1)


def regressors(variant: str, groups: int, u: Tensor, k: int) -> Tensor:
    """What the outputs of group k see of the patches."""
    parts = u.chunk(groups)
    return parts[k] if variant == "gc" else torch.cat([parts[k], torch.stack(parts).mean(0)])


def best_outputs(variant: str, groups: int, u: Tensor, y: Tensor) -> Tensor:
    """y (m, P) as well as it can be made, about the means, by lstsq on the explicit matrix."""
    made = []
    for k, rows in enumerate((y - y.mean(1, keepdim=True)).chunk(groups)):
        z = regressors(variant, groups, u - u.mean(1, keepdim=True), k)
        made.append((z.T @ torch.linalg.lstsq(z.T, rows.T, driver="gelsd").solution).T)
    return torch.cat(made) + y.mean(1, keepdim=True)


@pytest.fixture
def no_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "RIDGES", (0.0,))


# ---------------------------------------------------------------------------------------------------- the whole of it


@pytest.mark.parametrize(
    ("variant", "groups", "rebn", "shape"),
    [("gc", 2, True, {}), ("bgc", 4, True, {"stride": 2}), ("bgc", 4, False, {"padding": 0}), ("gc", 4, False, {})],
)
def test_every_layer_is_lstsq_of_the_originals_outputs_on_what_the_converted_network_makes(
    variant: str, groups: int, rebn: bool, shape: dict[str, int], no_ridge: None
) -> None:
    model, x = network(**shape), images()
    converted = convert(model, variant, groups, init="calibrated", calibration=x.split(7), rebn=rebn).model
    for name in ("first", "second"):
        u = patches(seen_by(converted, name, x)[0], model.get_submodule(name))
        wanted = seen_by(model, name, x)[1].transpose(0, 1).flatten(1)
        expected = best_outputs(variant, groups, u, wanted)
        got = seen_by(converted, name, x)[1].transpose(0, 1).flatten(1)
        if name == "first":  # it has no bias: what is constant is taken care of by the norm
            got, expected = (part - part.mean(1, keepdim=True) for part in (got, expected))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_refit_solves_what_stays_anew_where_something_before_it_was_replaced(no_ridge: None, tmp_path: Any) -> None:
    model, x = network(), images()
    plan = {"first": {"variant": "gc", "groups": 4}}
    calibrated, refit = (convert(model, plan=plan, init=init, calibration=x.split(7)) for init in SOLVED)
    net, found = refit.model, refit.record.calibration
    assert found is not None
    assert (refit.record.replaced, [layer.name for layer in found.refitted]) == (("first",), ["second"])
    assert type(net.second) is nn.Conv2d
    assert "of the kept, solved anew: second" in str(refit)
    assert "solved anew" not in str(calibrated)
    assert torch.equal(net.stem.weight, model.stem.weight)
    wanted, got = (seen_by(each, "second", x)[1].transpose(0, 1).flatten(1) for each in (model, net))
    u = patches(seen_by(net, "second", x)[0], model.second)
    torch.testing.assert_close(got, best_outputs("gc", 1, u, wanted), rtol=1e-6, atol=1e-6)
    off = (float((seen_by(each.model, "second", x)[1] - seen_by(model, "second", x)[1]).square().sum())
           for each in (refit, calibrated))  # fmt: skip
    assert next(off) < 0.9 * next(off)
    save_converted(refit, tmp_path / "net.pt")
    assert torch.equal(load_converted(tmp_path / "net.pt", model)(x), net(x))


def test_refit_leaves_alone_what_is_excluded_and_what_nothing_changes() -> None:
    model, x = network(), images()
    given: dict[str, Any] = {"init": "refit", "calibration": [x]}
    excluded = convert(model, "gc", 4, exclude="second", **given)
    same = convert(model, plan={"first": {"variant": "bgc", "groups": 2}}, **given)  # which is the layer itself
    assert torch.equal(excluded.model.second.weight, model.second.weight)
    assert excluded.record.calibration is not None
    assert excluded.record.calibration.refitted == ()
    behind = convert(model, plan={"second": {"variant": "gc", "groups": 4}}, **given)
    assert behind.record.calibration is not None
    assert behind.record.calibration.refitted == ()
    torch.testing.assert_close(same.model(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rebn", [True, False])
def test_the_norm_gives_out_the_mean_that_it_gave_out_before(rebn: bool) -> None:
    """Re-estimated it also gives the variance; else the mean of the layer before it is corrected in it."""
    model, x = network(), images()
    converted = convert(model, "gc", 4, init="calibrated", calibration=[x], rebn=rebn)
    before, after = (seen_by(net, "norm", x)[1].transpose(0, 1).flatten(1) for net in (model, converted.model))
    torch.testing.assert_close(after.mean(1), before.mean(1), rtol=1e-9, atol=1e-9)
    if rebn:
        torch.testing.assert_close(after.var(1), before.var(1), rtol=1e-2, atol=0.0)  # but for eps
    assert converted.record.calibration is not None
    assert converted.record.calibration.norms == int(rebn)


def test_norms_before_the_first_replaced_layer_are_left_alone() -> None:
    early = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
                          nn.ReLU(), nn.Flatten(), nn.Linear(4 * SIDE * SIDE, 2)).double().eval()  # fmt: skip
    converted = convert(early, "gc", 2, calibration=[images()])
    assert converted.record.calibration is not None
    assert converted.record.calibration.norms == 1
    assert torch.equal(converted.model[1].running_mean, early[1].running_mean)


def test_a_bias_is_corrected_so_that_the_mean_output_stays(no_ridge: None) -> None:
    model, x = network(), images()
    converted = convert(model, "gc", 4, init="calibrated", calibration=[x], include="second", where="none").model
    before, after = (seen_by(net, "second", x)[1].mean((0, 2, 3)) for net in (model, converted))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert not torch.equal(converted.second.bias, model.second.bias)


def test_a_constant_that_nothing_takes_away_is_fitted_about_zero(no_ridge: None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 16, 3)).double()  # fmt: skip
    x = images()
    converted = convert(model, "gc", 4, init="calibrated", calibration=[x])
    (layer,) = converted.record.calibration.layers
    assert not layer.centred
    u, wanted = (part.transpose(0, 1).flatten(1) for part in seen_by(model, "2", x))
    solution = [torch.linalg.lstsq(z.T, y.T).solution.T for z, y in zip(u.chunk(4), wanted.chunk(4), strict=True)]
    torch.testing.assert_close(converted.model[2].weight[:, :, 0, 0], torch.cat(solution), rtol=1e-6, atol=1e-6)


def test_bgc_of_two_groups_is_the_network_itself_and_leaves_its_norms_alone() -> None:
    model, x = network(), images()
    with torch.no_grad():
        model.norm.running_mean += 0.3  # as if it had been trained on other images
    converted = convert(model, "bgc", 2, init="calibrated", calibration=[x]).model
    torch.testing.assert_close(converted(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(converted.norm.running_mean, model.norm.running_mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", [name for name in CONVS if name != "standard"])
def test_every_variant_loses_less_than_its_white_optimum_on_images_held_out(variant: str) -> None:
    model = network()
    converted = convert(model, variant, 4, init="calibrated", calibration=[images()])
    layers = converted.record.calibration.layers
    assert [layer.name for layer in layers] == ["first", "second"]
    for layer in layers:
        assert 0.0 <= layer.after <= layer.before
        assert (layer.ridge is None) == (layer.condition is None)
        assert layer.rows == 3 * layer.held_out_rows
    assert layers[0].after < layers[0].before


def test_the_order_and_the_batches_of_the_images_do_not_matter_but_the_first_images_do() -> None:
    model, x = network(), images()
    one, other, fewer = (
        convert(model, "bgc", 4, init="calibrated", calibration=given, calibration_images=count).model(x)
        for given, count in ((x.split(5), 16), ([(x, torch.zeros(IMAGES))], 16), (x.split(5), 12))
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(one, fewer)


def test_a_network_is_run_once_whatever_the_number_of_layers() -> None:
    model = network()
    runs = {name: 0 for name, _ in model.named_children()}

    def counted(name: str) -> Any:
        def hook(*_: Any) -> None:
            runs[name] += 1

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(counted(name))
    convert(model, "gc", 2, init="calibrated", calibration=[images(8)], example_input=(3, SIDE, SIDE))
    # Two parts (of 6 and of 2 images) through the original and, as its hooks are taken over, the converted network;
    # twice before that, without numbers, to see what runs, and once to see what norms take away.
    assert set(runs.values()) <= {2 + 2 + 1, 2 + 2 + 1 + 1, 2 + 2 + 1 + 2}


def test_nothing_of_the_original_changes_and_mode_and_random_state_stay() -> None:
    model = network().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    converted = convert(model, "bgc", 4, init="calibrated", calibration=[images()])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert converted.model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.model.modules())
    in_place = convert(model, "bgc", 4, init="calibrated", calibration=[images()], inplace=True).model
    torch.testing.assert_close(in_place.state_dict(), converted.model.state_dict())


def test_what_was_found_is_in_the_record_and_a_saved_network_loads(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Flatten(), nn.Linear(8 * 16, 3)).double().eval()  # fmt: skip
    converted = convert(model, "tlgc", 2, init="calibrated", calibration=[images()], calibration_images=20)
    found = converted.record.calibration
    assert found is not None
    assert (found.images, found.held_out, found.rebn) == (20, 5, True)
    assert found.in_flight_bytes > 0 < found.moment_bytes
    assert Record.from_json(converted.record.to_json()) == converted.record
    older = {k: v for k, v in converted.record.to_json().items() if k not in ("rebn", "calibration")}
    assert Record.from_json(older) == replace(converted.record, rebn=False, calibration=None)
    save_converted(converted, tmp_path / "net.pt")
    loaded = load_converted(tmp_path / "net.pt", model)
    assert torch.equal(loaded(images()), converted.model.eval()(images()))


# ------------------------------------------------------------------------------------- optimality of the least squares


def moments_of(u: Tensor, y: Tensor) -> RegressionMoments:
    found = RegressionMoments(u.mean(1), y.mean(1))
    for some, of in zip(u.split(17, dim=1), y.split(17, dim=1), strict=True):
        found.add(some, of)
    return found


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("seed", range(6))
def test_at_ridge_0_calibrated_is_never_above_white_or_copy(variant: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    groups, kernel = (2, 4, 8)[seed % 3], (1, 3)[seed % 2]
    stride, padding = 1 + seed // 3, seed % 2
    weight = torch.randn(8, 8, kernel, kernel, dtype=torch.float64, generator=random)
    x = torch.randn(6, 8, 9, 9, dtype=torch.float64, generator=random).relu()
    u = F.unfold(x, kernel, 1, padding, stride).transpose(0, 1).flatten(1)
    # The inputs are no longer those that the outputs were made from, as behind converted layers.
    y = weight.flatten(1) @ (u + 0.3 * torch.randn(u.shape, dtype=torch.float64, generator=random)) + 0.2
    moments = moments_of(u, y)
    for means in (moments.means, tuple(map(torch.zeros_like, moments.means))):
        regression = moments.about(*means)
        lost = []
        for projection in ("copy", "white", "least_squares"):
            given = {"second_moment": regression.moment, "cross_moment": regression.cross}
            layer = CONVS[variant].from_dense(
                weight, groups, projection=projection, **(given if projection == "least_squares" else {})
            )
            lost.append(regression.error(layer.dense_weight()))
        assert lost[2] <= min(lost) + 1e-9 * lost[0]
        rest = (y - means[1][:, None]) - layer.dense_weight().detach().flatten(1) @ (u - means[0][:, None])
        assert lost[2] == pytest.approx(float(rest.square().sum(0).mean()), rel=1e-9)


@pytest.mark.parametrize("groups", [2, 4])
def test_with_the_exact_moments_of_exchangeable_groups_it_is_the_white_optimum(groups: int) -> None:
    p = 3
    own, between = torch.randn(2, p, 2 * p, dtype=torch.float64)
    everywhere, within = between @ between.T, own @ own.T  # C_kl for all k, l; what C_kk has besides
    ones, eye = torch.ones(groups, groups, dtype=torch.float64), torch.eye(groups, dtype=torch.float64)
    moment = torch.kron(ones, everywhere) + torch.kron(eye, within)
    weight = torch.randn(8, groups * p, 1, 1, dtype=torch.float64)
    white = CONVS["bgc"].from_dense(weight, groups).dense_weight()
    solved = CONVS["bgc"].from_dense(
        weight,
        groups,
        projection="least_squares",
        second_moment=moment,
        cross_moment=weight.flatten(1) @ moment,
    )
    torch.testing.assert_close(solved.dense_weight(), white, rtol=1e-9, atol=1e-9)


def test_moments_keep_their_digits_where_means_are_large() -> None:
    u = torch.randn(300, 40, dtype=torch.float64) + 1e6
    y = torch.randn(3, 40, dtype=torch.float64) - 1e6
    moments = moments_of(u, y)
    about = moments.about(*moments.means)
    u0, y0 = u - u.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    torch.testing.assert_close(about.moment, u0 @ u0.T / 40, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(about.cross, y0 @ u0.T / 40, rtol=1e-8, atol=1e-8)
    assert about.power == pytest.approx(float(y0.square().sum() / 40), rel=1e-8)
    plain = moments.about(torch.zeros(300), torch.zeros(3))
    torch.testing.assert_close(plain.moment, u @ u.T / 40, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(plain.cross, y @ u.T / 40, rtol=1e-12, atol=0.0)


def test_norm_moments_are_those_of_all_batches_together() -> None:
    x = torch.randn(9, 4, 5, 5, dtype=torch.float64) * 3 + 1e4
    moments = NormMoments(4, torch.device("cpu"))
    for part in x.split(2):
        moments.add(part)
    rows = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments.mean, rows.mean(1))
    torch.testing.assert_close(moments.variance, rows.var(1))


# ------------------------------------------------------------------------------- what norms take away, and what is held


def test_the_survey_knows_which_constants_norms_take_away() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.three = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(4))
            self.norm, self.last = nn.BatchNorm2d(4), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.two(self.norm(self.one(x)).relu())
            three = self.three(x.relu())  # where the constants of stem and two matter
            return self.last(torch.cat([three, x], 1)).relu()

    model, x = PreActivation().eval(), torch.randn(1, 4, 5, 5)
    found = survey(model, {"stem", "one", "two", "three"}, lambda: model(x))
    assert found.absorbed == {"one", "three"}
    assert found.norms == {"one": "norm"}
    assert found.live_bytes >= 4 * 4 * 25


def test_a_constant_may_pass_residual_additions_on_its_way_to_norms() -> None:
    from bgcbench.models import build_model
    from bgcbench.specs import NetSpec

    model, x = build_model(NetSpec("wrn_10_1", 10, 8, 8)).eval(), torch.randn(1, 3, 8, 8)
    assert survey(model, {"stem"}, lambda: model(x)).live_bytes > 0
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert survey(model, names, lambda: model(x)).absorbed == names


def test_too_little_memory_takes_fewer_images_and_says_so_or_is_refused() -> None:
    model, x = network(), images()
    full = convert(model, "gc", 2, init="calibrated", calibration=[x]).record
    held = full.calibration.in_flight_bytes + full.calibration.moment_bytes
    less = convert(model, "gc", 2, init="calibrated", calibration=[x], memory_bytes=held - 1).record
    assert less.calibration.images < IMAGES
    assert "would not fit" in less.notes[-1]
    with pytest.raises(UsageError, match="allow more memory"):
        convert(model, "gc", 2, init="calibrated", calibration=[x], memory_bytes=1000)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_images_that_are_missing_too_few_useless_or_not_finite_are_refused() -> None:
    model, x = network(), images()
    for text, options in (
        ("needs images", {"init": "calibrated"}),
        ("needs images", {"rebn": True}),
        ("there is none", {"calibration_images": 4}),
        ("of no use", {"calibration": [x], "rebn": False}),
        ("too few", {"init": "calibrated", "calibration": [x[:3]]}),
        ("no calibration images", {"init": "calibrated", "calibration": []}),
        ("a batch is a str", {"init": "calibrated", "calibration": ["x"]}),
        ("not finite", {"init": "calibrated", "calibration": [x * float("nan")]}),
        ("unknown init", {"init": "exact", "calibration": [x]}),
    ):
        with pytest.raises(BgcbenchError, match=text):
            convert(model, "gc", 2, **options)  # type: ignore[arg-type]


def test_a_run_that_is_asked_to_stop_ends_at_the_next_stop_with_no_thread_left() -> None:
    asked = itertools.count()
    model = network()
    with pytest.raises(Stopped):
        convert(model, "gc", 2, init="calibrated", calibration=[images()], stop=lambda: next(asked) > 3)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bgcbench")]
    assert not model.first._forward_hooks


class _Choosy(nn.Module):
    """Takes one of two ways by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 10:
            raise ValueError("no such way")
        way: Tensor = self.ways[int(x.sum() > 0)](x)
        return way


def runs(model: nn.Module, *values: float) -> list[Any]:
    state = RandomState.of(model)
    return [(functools.partial(model, torch.tensor([value])), state) for value in values]


def test_batches_that_go_different_ways_do_not_wait_for_one_another() -> None:
    model = _Choosy()
    come: dict[int, list[int]] = {}

    def at(way: int) -> Any:
        def settle(batches: list[tuple[int, Tensor]]) -> None:
            come[way] = [number for number, _ in batches]

        return settle

    stops = [Stop(module, at(way)) for way, module in enumerate(model.ways)]
    run_in_step(runs(model, -1.0, 1.0, -2.0), stops, device=torch.device("cpu"))
    assert come == {0: [0, 2], 1: [1]}


def test_what_a_network_raises_comes_out_and_ends_every_thread() -> None:
    model = _Choosy()
    with pytest.raises(ValueError, match="no such way"):
        run_in_step(runs(model, 1.0, 20.0), [Stop(model.ways[1], lambda _: None)], device=torch.device("cpu"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bgcbench")]
    assert not model.ways[1]._forward_pre_hooks


def test_the_public_function_takes_a_loader_as_in_the_readme() -> None:
    loader: Iterator[Any] = iter([(images(), torch.zeros(IMAGES))])
    converted = bgcbench.convert(network(), "bgc", groups=4, init="calibrated", calibration=loader)
    assert converted.record.init == "calibrated"
