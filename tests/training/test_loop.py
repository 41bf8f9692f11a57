from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bgcbench.convs import autotune
from bgcbench.convs.base import VariantConv2d
from bgcbench.convs.bgc import BalancedGroupConv2d
from bgcbench.convs.lgc import LearnedGroupConv2d
from bgcbench.data.feeds import ResidentFeed, epoch_order
from bgcbench.data.labelled import ResidentData
from bgcbench.errors import BgcbenchError, ResultFileError, UsageError
from bgcbench.results.rows import Record
from bgcbench.training.checkpoint import Checkpoints
from bgcbench.training.distributed import World
from bgcbench.training.loop import NotFinite, Options, Prepared, Scores, Training, check_batch, subset_of
from tests.training.example import MEAN, STD, tiny_data, tiny_network, tiny_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def training(network: nn.Module, data: ResidentData | None = None, **given: Any) -> Training:
    """A training of the tiny network, in float64 unless its recipe says otherwise."""
    recipe = given.pop("recipe", tiny_recipe())
    if recipe.precision == "fp64":
        network = network.double()
    return Training(network, data or tiny_data(), recipe, World(), seed=given.pop("seed", 5), **given)


def trained(network: nn.Module, data: ResidentData | None = None, **given: Any) -> Training:
    run = training(network, data, **given)
    for _ in run.run():
        pass
    return run


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


# ---------------------------------------------------------------------------------------------- what a step computes


def crop(data: ResidentData, number: int, down: int, right: int, mirrored: int) -> Tensor:
    """One augmented image, by hand: zeros around it, cut, mirrored."""
    image = F.pad(data.train_images[number], (data.pad,) * 4)
    image = image[:, down : down + data.size[0], right : right + data.size[1]]
    return image.flip(2) if mirrored else image


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def plain_loop(network: nn.Module, data: ResidentData, epochs: int, batch: int, seed: int, **sgd: Any) -> list[float]:
    """The same training as a plain loop, image by image; the mean loss of each epoch."""
    network = network.double().train()
    recipe = tiny_recipe(epochs=epochs)
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4, **sgd)
    feed = ResidentFeed(
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
        torch.device("cpu"),
        pad=data.pad,
        flip=data.flip,
    )
    steps, means = len(data.train_labels) // batch, []
    for epoch in range(epochs):
        order = epoch_order(len(data.train_labels), seed, epoch)
        down, right, mirrored = (values.tolist() for values in feed.draws(seed, epoch))
        losses = []
        for step in range(steps):
            numbers = order[step * batch : (step + 1) * batch].tolist()
            images = torch.stack([crop(data, n, down[n], right[n], mirrored[n]) for n in numbers])
            optimiser.param_groups[0]["lr"] = recipe.lr_at(epoch * steps + step, steps)
            loss = F.cross_entropy(network(normalised(images)), data.train_labels[numbers])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        means.append(sum(losses) / len(losses))
    return means


@pytest.mark.parametrize("variant", ["standard", "bgc"])
def test_the_loop_trains_as_a_plain_loop_over_single_images_does(variant: str) -> None:
    data, groups = tiny_data(), 1 if variant == "standard" else 4
    expected = tiny_network(variant, groups)
    means = plain_loop(expected, data, epochs=3, batch=6, seed=5)
    run = trained(tiny_network(variant, groups), data)
    for name, value in run.network.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[name], rtol=1e-9, atol=1e-12), name
    assert [epoch.train_loss for epoch in run.state.history] == pytest.approx(means, rel=1e-5)


def test_what_fills_no_batch_is_left_out_and_differs_from_epoch_to_epoch() -> None:
    run = training(tiny_network(), tiny_data(train=26))
    assert run.steps == 4
    left = [set(range(26)) - set(torch.cat(run._shares(epoch_order(26, 5, epoch))).tolist()) for epoch in range(3)]
    assert [len(numbers) for numbers in left] == [2, 2, 2]
    assert left[0] != left[1]


def test_bytes_are_normalised_as_zero_for_black_and_one_for_white() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    for layout, form in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        for given in (images, images.contiguous(memory_format=torch.channels_last)):
            seen = Prepared(nn.Identity(), MEAN, STD, torch.float64, layout)(given)
            assert torch.allclose(seen, normalised(images), rtol=1e-13, atol=1e-14)
            assert seen.is_contiguous(memory_format=form)


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    whole = trained(tiny_network(norm=False))
    parts = trained(tiny_network(norm=False), options=Options(accumulate=3))
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-13)
    losses = [[epoch.train_loss for epoch in run.state.history] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_label_smoothing_reaches_the_loss() -> None:
    network = tiny_network().double()
    images, labels = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8), torch.arange(6) % 4
    loss = training(network, recipe=tiny_recipe(label_smoothing=0.3))._loss(images, labels)
    logs = network(normalised(images)).log_softmax(1)
    expected = -(0.7 * logs[torch.arange(6), labels] + 0.3 * logs.mean(1)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_weight_decay_acts_on_everything_but_learnt_assignments() -> None:
    network = tiny_network("flgc", 2)
    flgc = network[3]
    run = training(network, recipe=tiny_recipe(weight_decay=0.01))
    decays = {id(p): g["weight_decay"] for g in run.optimiser.param_groups for p in g["params"]}
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[key] for key, decay in decays.items() if decay == 0} == {"3.logits_in", "3.logits_out"}
    assert {decay for decay in decays.values() if decay} == {0.01}
    assert isinstance(flgc, VariantConv2d)
    assert len(decays) == len(list(network.parameters()))


# ------------------------------------------------------------------------------------------------ learnt structures


def test_lgc_drops_its_inputs_in_the_first_half_of_the_training() -> None:
    network = tiny_network("lgc", 4)
    lgc = network[3]
    assert isinstance(lgc, LearnedGroupConv2d)
    run = training(network, recipe=tiny_recipe(epochs=6))
    kept = []
    for progress in run.run():
        if progress.ended:
            kept.append(run.state.history[-1].learnt["kept"])
    # Drops at 1/6, 2/6 and 3/6, which is where epochs end: each is judged as it goes on.
    assert kept == [0.75, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert lgc.stage == 3
    assert run.state.best_epoch is not None
    assert run.state.best_epoch >= 3  # before, it was another network
    lgc.deploy()  # which refuses a layer that has not dropped everything


def test_layers_are_told_the_progress_before_every_step_and_every_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(LearnedGroupConv2d, "set_progress", lambda self, fraction: told.append(fraction))
    trained(tiny_network("lgc", 2), recipe=tiny_recipe(epochs=2))
    steps = [number / 8 for number in range(8)]
    assert told == [*steps[:4], 0.5, *steps[4:], 1.0]


def test_one_epoch_is_enough_for_all_drops() -> None:
    network = tiny_network("lgc", 8)
    run = trained(network, tiny_data(train=6), recipe=tiny_recipe(epochs=1, batch_size=6))
    assert network[3].stage == 7  # type: ignore[union-attr]
    assert run.state.history[0].learnt == {"kept": 0.125}  # and it is the sparse network that is judged


def test_the_group_lasso_is_weighted_and_added_to_the_loss() -> None:
    network = tiny_network("lgc", 4).double()
    lgc = network[3]
    assert isinstance(lgc, LearnedGroupConv2d)
    images, labels = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8), torch.arange(6) % 4
    plain = training(network)._loss(images, labels)
    weighted = training(network, recipe=tiny_recipe(group_lasso=0.25))._loss(images, labels)
    assert float((weighted - plain).detach()) == pytest.approx(0.25 * float(lgc.group_lasso().detach()), rel=1e-9)


def test_layers_that_learn_no_structure_have_nothing_to_say() -> None:
    run = trained(tiny_network("bgc", 4), recipe=tiny_recipe(epochs=1))
    assert run.state.history[0].learnt is None
    learnt = trained(tiny_network("flgc", 4), recipe=tiny_recipe(epochs=1)).state.history[0].learnt
    assert learnt == {"dead_outputs": 0.0, "moved": 0.0}


def test_channels_that_changed_their_group_are_counted_also_after_a_break(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    run = training(tiny_network("flgc", 2), checkpoints=checkpoints)
    flgc = run.network[3]
    with torch.no_grad():  # two of the 16 channels
        flgc.logits_in[0] = -flgc.logits_in[0]
        flgc.logits_out[5] = -flgc.logits_out[5]
    run.stop = lambda: run.state.step == 2
    list(run.run())
    again = trained(tiny_network("flgc", 2), checkpoints=checkpoints)
    assert [epoch.learnt["moved"] for epoch in again.state.history] == [2 / 16] * 3


# -------------------------------------------------------------------------------------------------- the evaluation


class Fixed(nn.Module):
    """Says what it was told, image by image, and holds a parameter to train."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores, self.seen = scores, 0
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.scores[: len(x)] + self.weight
        begin, self.seen = self.seen, self.seen + len(x)
        return self.scores[begin : self.seen] + self.weight


def test_an_evaluation_counts_every_image_once() -> None:
    generator = torch.Generator().manual_seed(0)
    data = tiny_data(test=113, classes=12)
    scores = torch.randn(113, 12, generator=generator, dtype=torch.float64)
    found = training(Fixed(scores), data).evaluate()
    wrong = missed = 0
    losses = []
    for row, label in zip(scores.tolist(), data.test_labels.tolist(), strict=True):
        ranking = sorted(range(12), key=lambda c: -row[c])
        wrong += ranking[0] != label
        missed += label not in ranking[:5]
        losses.append(math.log(sum(math.exp(v) for v in row)) - row[label])
    assert found == Scores(pytest.approx(sum(losses) / 113), 100 * wrong / 113, 100 * missed / 113, 113)


def test_top_5_is_left_out_below_ten_classes() -> None:
    assert training(tiny_network()).evaluate().top5 is None
    assert training(tiny_network(classes=10), tiny_data(classes=10)).evaluate().top5 is not None


def test_an_evaluation_leaves_the_network_as_it_was() -> None:
    run = training(tiny_network())
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    first, second = run.evaluate(), run.evaluate()
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in run.network.state_dict().items())
    assert run.network.training


def test_images_that_are_lost_on_the_way_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training(tiny_network())
    whole = ResidentFeed.test
    monkeypatch.setattr(ResidentFeed, "test", lambda self, batches: whole(self, batches[:-1]))
    with pytest.raises(BgcbenchError, match="6 test images were evaluated, and there are 11"):
        run.evaluate()


def test_the_best_epoch_is_the_first_of_the_least_error() -> None:
    run = trained(tiny_network(), recipe=tiny_recipe(epochs=6))
    errors = [epoch.test_error for epoch in run.state.history]
    assert run.state.best == min(errors)
    assert run.state.best_epoch == errors.index(min(errors)) + 1
    assert run.state.initial is not None


def test_of_equal_epochs_the_first_is_the_best() -> None:
    run = trained(Fixed(torch.zeros(200, 4, dtype=torch.float64)), tiny_data(test=8))
    assert len({epoch.test_error for epoch in run.state.history}) == 1
    assert run.state.best_epoch == 1


def test_the_recipe_reaches_the_optimiser() -> None:
    run = training(tiny_network(), recipe=tiny_recipe(momentum=0.5, nesterov=False, weight_decay=0.03))
    (group,) = run.optimiser.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, False, 0.03)


def test_the_epochs_take_no_longer_than_the_run() -> None:
    import time

    begin = time.perf_counter()
    run = trained(tiny_network(), recipe=tiny_recipe(epochs=6))
    spent = [epoch.seconds + epoch.test_seconds for epoch in run.state.history]
    assert 0 < sum(spent) < time.perf_counter() - begin
    for epoch in run.state.history:
        assert epoch.images_per_s * epoch.seconds == pytest.approx(4 * 6)


def test_random_labels_have_no_error_to_show() -> None:
    data = tiny_data()
    object.__setattr__(data, "meaningful", False)
    run = trained(tiny_network(), data)
    assert run.state.initial is run.state.best is None
    assert {epoch.test_error for epoch in run.state.history} == {None}
    assert {epoch.test_loss for epoch in run.state.history} == {None}
    assert run.state.history[0].images_per_s > 0


# ----------------------------------------------------------------------------------------- a network that is trained on


def test_a_teachers_outputs_are_targets_beside_the_labels() -> None:
    network, teacher = tiny_network().double(), tiny_network(dropout=0.5).double()
    with torch.no_grad():
        teacher[0].weight.mul_(-2)
    images, labels = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8), torch.arange(6) % 4
    loss = training(network, teacher=teacher)._loss(images, labels)
    x = normalised(images)
    mine, theirs = network(x).softmax(1), teacher.eval()(x).softmax(1)
    divergence = (theirs * (theirs / mine).log()).sum(1).mean()
    expected = F.cross_entropy(network(x), labels) + divergence
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_without_labels_a_teachers_outputs_are_the_only_targets() -> None:
    network, teacher, data = tiny_network().double(), tiny_network().double(), tiny_data()
    object.__setattr__(data, "labelled", False)
    with torch.no_grad():
        teacher[0].weight.mul_(-2)
    images, labels = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8), torch.arange(6) % 4
    loss = training(network, data, teacher=teacher)._loss(images, labels)
    x = normalised(images)
    mine, theirs = network(x).softmax(1), teacher.eval()(x).softmax(1)
    expected = (theirs * (theirs / mine).log()).sum(1).mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_a_teacher_that_is_the_network_itself_says_nothing_new() -> None:
    images, labels = torch.randint(0, 256, (6, 3, 6, 5), dtype=torch.uint8), torch.arange(6) % 4
    network = tiny_network(norm=False).double()
    losses = [training(network, teacher=teacher)._loss(images, labels) for teacher in (None, network)]
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(0, abs=1e-14)


def test_a_distilled_training_leaves_its_teacher_alone_and_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    teacher = tiny_network(dropout=0.5).double()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    plain, whole = trained(tiny_network("bgc", 4)), trained(tiny_network("bgc", 4), teacher=teacher)
    assert not same(plain.network, whole.network)
    first = training(tiny_network("bgc", 4), teacher=teacher, checkpoints=Checkpoints(tmp_path))
    first.stop = lambda: first.state.epoch == 1 and first.state.step == 2
    list(first.run())
    assert first.stopped
    again = trained(tiny_network("bgc", 4), teacher=teacher, checkpoints=Checkpoints(tmp_path))
    assert same(again.network, whole.network)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_network_that_was_judged_before_is_trained_from_its_checkpoint(tmp_path: Path) -> None:
    network = tiny_network("lgc", 2)
    start = {name: value.clone() for name, value in network.double().state_dict().items()}
    judged = training(network, recipe=tiny_recipe(epochs=0), checkpoints=Checkpoints(tmp_path), record=Record((), ()))
    judged.keep()
    scores = judged.begin()
    assert scores is not None
    assert scores == judged.evaluate()
    assert judged.state.initial == scores.error
    assert len(judged.guesses) == 11
    assert 100 * (judged.guesses != tiny_data().test_labels).double().mean() == pytest.approx(scores.error)
    assert all(torch.equal(value, start[name]) for name, value in network.state_dict().items())
    (name,) = Checkpoints(tmp_path).names
    assert name.startswith("e0000-s000000-")
    other = tiny_network("lgc", 2)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    again = training(other, checkpoints=Checkpoints(tmp_path))
    whole, judgements = again.evaluate, []
    again.evaluate = lambda: judgements.append(1) or whole()  # type: ignore[func-returns-value,method-assign]
    list(again.run())
    assert len(judgements) == 3  # after each epoch, and not before
    assert same(again.network, trained(tiny_network("lgc", 2)).network)


def test_a_judgement_that_was_stopped_says_nothing() -> None:
    run = training(tiny_network(), stop=lambda: True)
    assert run.begin() is None
    assert run.stopped
    assert run.state.initial is None


def test_no_epochs_take_no_batch_to_be_filled() -> None:
    run = training(tiny_network(), tiny_data(train=3), recipe=tiny_recipe(epochs=0))
    assert run.steps == 0
    assert list(run.run()) == []
    assert run.state.initial is not None
    assert run.estimate() > 0


# ------------------------------------------------------------------------------------------- stopped and gone on with


@pytest.mark.parametrize("variant", ["bgc", "lgc", "flgc"])
def test_a_training_that_is_stopped_after_any_step_ends_with_the_same_weights(tmp_path: Path, variant: str) -> None:
    data = tiny_data(train=18)
    whole = trained(tiny_network(variant, 2, dropout=0.3), data)
    for number in range(1, 9):
        checkpoints = Checkpoints(tmp_path / str(number))
        first = training(tiny_network(variant, 2, dropout=0.3), data, checkpoints=checkpoints)
        first.stop = lambda run=first, after=number: 3 * run.state.epoch + run.state.step >= after  # type: ignore[misc]
        list(first.run())
        assert first.stopped
        assert checkpoints.names[-1].startswith(f"e{(number - 1) // 3:04d}-s{(number - 1) % 3 + 1:06d}-")
        # Another seed for the weights and the random numbers: everything must come from the checkpoint.
        torch.manual_seed(99)
        network = tiny_network(variant, 2, dropout=0.3)
        for parameter in network.parameters():
            nn.init.normal_(parameter)
        second = trained(network, data, checkpoints=checkpoints)
        assert not second.stopped
        assert same(second.network, whole.network), number
        for mine, theirs in zip(second.state.history, whole.state.history, strict=True):
            timeless = {"seconds": 0.0, "test_seconds": None, "images_per_s": None}
            assert msgspec.structs.replace(mine, **timeless) == msgspec.structs.replace(theirs, **timeless)
        assert (second.state.best, second.state.initial) == (whole.state.best, whole.state.initial)


def test_a_training_can_be_stopped_while_it_judges_the_network(tmp_path: Path) -> None:
    whole = trained(tiny_network())
    checkpoints = Checkpoints(tmp_path)
    asked_in = training(tiny_network(), checkpoints=checkpoints)
    # 4 steps ask, then the evaluation after them: it is the first batch of that which is not done.
    count = iter(range(100))
    asked_in.stop = lambda: asked_in.state.step == 4 and next(count) >= 1
    assert [progress for progress in asked_in.run() if progress.ended] == []
    assert asked_in.stopped
    assert checkpoints.names[-1].startswith("e0000-s000004-")
    again = trained(tiny_network(), checkpoints=checkpoints)
    assert same(again.network, whole.network)
    assert [e.train_loss for e in again.state.history] == [e.train_loss for e in whole.state.history]


def test_a_training_in_parts_is_gone_on_with_at_the_right_image(tmp_path: Path) -> None:
    options, checkpoints = Options(accumulate=3), Checkpoints(tmp_path)
    whole = trained(tiny_network(), options=options)
    first = training(tiny_network(), options=options, checkpoints=checkpoints)
    first.stop = lambda: first.state.step == 2
    list(first.run())
    assert same(trained(tiny_network(), options=options, checkpoints=checkpoints).network, whole.network)


class Noisy(nn.Module):
    """Draws a number in every forward pass in training, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drawn = nn.Linear(3, 4), []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def test_every_step_of_every_epoch_has_random_numbers_of_its_own() -> None:
    drawn = trained(Noisy()).network.drawn
    assert len(drawn) == len(set(drawn)) == 12
    assert trained(Noisy()).network.drawn == drawn
    assert set(trained(Noisy(), seed=6).network.drawn).isdisjoint(drawn)


def test_a_training_that_lost_its_newest_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    whole = trained(tiny_network())
    checkpoints = Checkpoints(tmp_path)
    for progress in training(tiny_network(), checkpoints=checkpoints).run():
        if progress.ended and progress.epoch == 2:
            break
    newest = tmp_path / checkpoints.names[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    again = trained(tiny_network(), checkpoints=checkpoints, warn=said.append)
    assert len(said) == 1
    assert str(newest) in said[0]
    assert same(again.network, whole.network)


def test_checkpoints_within_an_epoch_do_not_change_the_training(tmp_path: Path) -> None:
    whole = trained(tiny_network(dropout=0.5))
    often = trained(tiny_network(dropout=0.5), checkpoints=Checkpoints(tmp_path), options=Options(save_every_s=1e-9))
    assert same(often.network, whole.network)


def test_a_training_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = trained(tiny_network(), checkpoints=checkpoints)
    names = checkpoints.names
    again = training(tiny_network(), checkpoints=checkpoints)
    assert list(again.run()) == []
    assert same(again.network, first.network)
    assert again.state == first.state
    assert checkpoints.names == names


@pytest.mark.parametrize(
    ("changed", "field"), [({"identity": {"lr": 0.2}}, "lr"), ({"data": tiny_data(27)}, "data_sha256")]
)
def test_a_checkpoint_of_another_training_is_refused_by_field(
    tmp_path: Path, changed: dict[str, Any], field: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    trained(tiny_network(), identity={"lr": 0.1}, checkpoints=checkpoints)
    with pytest.raises(ResultFileError, match=f"cannot be resumed: its {field} was .* and is .* now; start a new file"):
        trained(tiny_network(), **{"identity": {"lr": 0.1}, **changed}, checkpoints=checkpoints)


def test_a_form_that_was_measured_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(form: str) -> None:
        """As if ``form`` were the fastest, in a process that has measured nothing yet."""
        autotune.forget()
        monkeypatch.setattr(BalancedGroupConv2d, "candidates", lambda *_: (form,))

    checkpoints = Checkpoints(tmp_path)
    only("concat")
    stopped = training(tiny_network("bgc", 4), checkpoints=checkpoints)
    stopped.stop = lambda: stopped.state.step == 1
    list(stopped.run())
    assert stopped.network[3].chosen["training"] == "concat"
    only("dense")
    trained(network := tiny_network("bgc", 4), checkpoints=checkpoints)
    assert network[3].chosen["training"] == "concat"
    only("dense")
    trained(network := tiny_network("bgc", 4))
    assert network[3].chosen["training"] == "dense"
    autotune.forget()


def test_a_form_that_was_asked_for_is_kept_in_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    network = tiny_network("bgc", 4)
    network[3].spec = replace(network[3].spec, algorithm="concat")
    stopped = training(network, checkpoints=checkpoints)
    stopped.stop = lambda: stopped.state.step == 1
    list(stopped.run())
    trained(network := tiny_network("bgc", 4), checkpoints=checkpoints)
    assert network[3].algorithm == "concat"


def test_a_full_disk_does_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "row").write_text("a file where the folder should be")
    said: list[str] = []
    run = trained(tiny_network(), checkpoints=Checkpoints(tmp_path / "row"), warn=said.append)
    assert len(run.state.history) == 3
    assert all("could not be written" in text and "training goes on" in text for text in said)
    assert said


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_no_number_stops_the_training_with_a_diagnosis(tmp_path: Path) -> None:
    network = tiny_network(norm=False)
    with pytest.raises(NotFinite, match=r"no longer finite in epoch \d, step \d of 4 \(learning rate .*lower --lr"):
        trained(network, recipe=tiny_recipe(lr=1e30, precision="fp32"), checkpoints=Checkpoints(tmp_path))
    diagnosis = json.loads((tmp_path / "diagnosis.json").read_text())
    step = diagnosis["step"] - 1
    order = epoch_order(26, 5, diagnosis["epoch"] - 1)
    assert diagnosis["images"] == order[step * 6 : step * 6 + 6].tolist()
    assert len(diagnosis["losses"]) == step + 1
    assert diagnosis["losses"][-1] in ("nan", "inf")
    assert all(isinstance(loss, float) for loss in diagnosis["losses"][:-1])
    assert diagnosis["lr"] == tiny_recipe(lr=1e30).lr_at((diagnosis["epoch"] - 1) * 4 + step, 4)
    assert diagnosis["not_finite"]


class Exploding(nn.Module):
    """Finite in training, no number when it is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.trained = nn.Linear(3, 4), False

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(x.mean((2, 3)))
        self.trained |= self.training
        return scores * float("nan") if self.trained and not self.training else scores


def test_outputs_that_are_no_numbers_before_any_training_end_it() -> None:
    network = Exploding()
    network.trained = True
    with pytest.raises(NotFinite, match="the network's outputs are not finite: the network puts out numbers"):
        trained(network)


def test_a_test_loss_that_is_no_number_stops_the_training_before_it_is_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(NotFinite, match="the test loss was no longer finite in epoch 1"):
        trained(Exploding(), checkpoints=checkpoints)
    assert checkpoints.names == []
    assert (tmp_path / "diagnosis.json").exists()


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_a_loss_that_is_no_number_is_seen_at_the_next_look_and_at_the_end_of_the_epoch(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    from bgcbench.training import loop

    monkeypatch.setitem(loop.LOOK_STEPS, "cpu", every)
    run = training(tiny_network(norm=False), recipe=tiny_recipe(lr=1e30, precision="fp32", schedule="constant"))
    with pytest.raises(NotFinite, match="in epoch 1, step 2 of 4"):
        list(run.run())
    assert run.state.step == {1: 2, 3: 3, 1000: 4}[every]


def test_a_poisoned_network_is_never_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(NotFinite):
        trained(tiny_network(norm=False), recipe=tiny_recipe(lr=1e30, precision="fp32"), checkpoints=checkpoints,
                options=Options(save_every_s=1e-9))  # fmt: skip
    found = checkpoints.latest(lambda _: None)
    assert found is None or found.extra["losses"][: found.meta["state"]["step"]].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "images", "message"),
    [
        (10, 4, 1, 100, "--batch-size 10 cannot be divided by --accumulate 4; use --batch-size 8"),
        (10, 1, 4, 100, "--batch-size 10 cannot be divided by 4 processes; use --batch-size 8"),
        (2, 3, 2, 100, "--batch-size 2 cannot be divided by 2 processes x --accumulate 3; use --batch-size 6"),
        (128, 1, 1, 100, "--batch-size 128 is more than the 100 training images; use a smaller one"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    batch: int, accumulate: int, processes: int, images: int, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        check_batch(tiny_recipe(batch_size=batch), Options(accumulate=accumulate), images, processes)
    assert str(caught.value) == message


def test_a_subset_has_of_every_class_the_same_share() -> None:
    data = tiny_data(train=40)
    run = training(tiny_network(), data, options=Options(subset=18))
    assert len(run.numbers) == 18
    assert run.numbers.tolist() == sorted(set(run.numbers.tolist()))
    assert sorted(torch.bincount(data.train_labels[run.numbers]).tolist()) == [4, 4, 5, 5]
    other = training(tiny_network(), data, options=Options(subset=18), seed=6)
    assert torch.equal(other.numbers, run.numbers)
    trained(tiny_network(), data, options=Options(subset=18))
    rare = torch.tensor([0] * 20 + [1] * 60 + [2] * 20)
    assert torch.bincount(rare[subset_of(rare, 25)]).tolist() == [5, 15, 5]
    with pytest.raises(UsageError, match="--subset 41 must be at most the 40 training images"):
        training(tiny_network(), data, options=Options(subset=41))


# -------------------------------------------------------------------------------------------------- how it is run


def test_autocast_trains_in_bf16_and_keeps_weights_in_fp32() -> None:
    full = trained(tiny_network().float(), recipe=tiny_recipe(precision="fp32"))
    half = trained(tiny_network().float(), recipe=tiny_recipe(precision="bf16", layout="nhwc"))
    assert {p.dtype for p in half.network.parameters()} == {torch.float32}
    losses = [run.state.history[-1].train_loss for run in (full, half)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_compiled_training_follows_what_lgc_drops() -> None:
    eager, compiled = (
        trained(tiny_network("lgc", 4, norm=False), recipe=tiny_recipe(epochs=4, compile=on)) for on in (False, True)
    )
    losses = [[epoch.train_loss for epoch in run.state.history] for run in (eager, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert [e.test_error for e in eager.state.history] == [e.test_error for e in compiled.state.history]
    assert compiled.state.history[-1].learnt == {"kept": 0.25}


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_each_kind_of_step_is_compiled_once_in_the_form_that_was_measured(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiler(module, backend=backend))
    # A step of 6 images in one form and a test batch of 6 in another; of the last 5 test images a third would be.
    forms = {(6, True): "split", (6, False): "dense"}
    monkeypatch.setattr(autotune, "choose", lambda case, *_: forms.get((case.batch, "w" in case.gradients), "concat"))
    torch.compiler.reset()
    recipe = tiny_recipe(precision=precision, layout="nhwc", compile=True, epochs=2)
    network = tiny_network("bgc", 4) if precision == "fp64" else tiny_network("bgc", 4).float()
    compiled = trained(network, recipe=recipe)
    (tested, stepped) = graphs
    assert ".repeat(" in tested  # the folded kernel
    assert ".select(" in stepped  # group by group
    assert compiled.network[3].chosen == {"training": "split", "inference": "dense"}
    if precision == "fp64":
        eager = trained(tiny_network("bgc", 4), recipe=replace(recipe, compile=False))
        for own, other in zip(compiled.state.history, eager.state.history, strict=True):
            for what in ("train_loss", "test_loss", "test_error"):
                assert getattr(own, what) == pytest.approx(getattr(other, what), rel=1e-9)
        torch.testing.assert_close(compiled.network.state_dict(), eager.network.state_dict())


def test_progress_is_told_and_ends_with_every_epoch() -> None:
    run = training(tiny_network())
    seen = [progress for progress in run.run() if progress.ended]
    assert [progress.epoch for progress in seen] == [1, 2, 3]
    assert [progress.done for progress in seen] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert all(progress.loss is not None and progress.error is not None for progress in seen)
    assert run.state.history[1].lr == tiny_recipe().lr_at(7, 4)


def test_an_estimate_is_the_time_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    from bgcbench.training import loop

    # The first step takes 500 ticks, as a compiled one does; then each takes one, and so does a test batch.
    clock = iter([0, *range(500, 1000)])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(clock)))
    run = training(tiny_network(), tiny_data(train=60, test=24))
    assert run.estimate(budget_s=100.0) == 10 * 1.0 + 4 * 1.0


def test_one_step_is_enough_for_an_estimate() -> None:
    assert training(tiny_network(), tiny_data(train=6, test=2)).estimate(budget_s=0.0) > 0
