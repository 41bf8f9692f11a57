"""The run behind ``bgcbench transfer``: what is judged, converted, kept and trained, and what stays when it fails."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import bgcbench
from bgcbench.conversion.calibration import Stopped
from bgcbench.conversion.convert import INITS as CONVERT_INITS
from bgcbench.convs import VariantConv2d
from bgcbench.data import open_labelled
from bgcbench.experiments import network_run, transfer_run
from bgcbench.experiments.train_run import open_session
from bgcbench.experiments.transfer import INITS, TransferConfig, identity, plan, preset
from bgcbench.experiments.transfer_run import TransferPrepared, TransferRun, prepare
from bgcbench.measure.timing import Rules
from bgcbench.models import build_model, files
from bgcbench.results.rows import TransferRow
from bgcbench.specs import NetSpec, Preprocessing
from bgcbench.theory import paper
from bgcbench.training import checkpoint
from bgcbench.training.distributed import World
from bgcbench.training.loop import Prepared, Training
from bgcbench.training.recipes import HYPER

pytestmark = pytest.mark.usefixtures("one_thread", "tried_once")

Json = dict[str, Any]
Known = dict[str, TransferRow]
SPEC = NetSpec("wrn_10_1", 10, 8)  # the smallest digits there are


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that knows the digits of 8 x 8 px a little, as a state dict."""
    torch.manual_seed(0)
    data, model = open_labelled("digits", (8, 8), []), build_model(SPEC)
    seen = Prepared(model, data.mean, data.std, torch.float32, "nchw").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for start in range(0, 1280, 64):
        loss = torch.nn.functional.cross_entropy(
            seen(data.train_images[start : start + 64]),
            data.train_labels[start : start + 64],  # type: ignore[attr-defined]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save(model.state_dict(), path)
    return str(path)


Make = Callable[..., TransferRun]


@pytest.fixture
def make(weights: str, tmp_path: Path) -> Make:
    """Makes a run with checkpoints in ``tmp_path``."""

    def made(*, kept: Known | None = None, stop: Callable[[], bool] = lambda: False, folder: bool = True,
             **given: Any) -> TransferRun:  # fmt: skip
        config = config_of(given.pop("weights", weights), **given)
        where = tmp_path / "checkpoints" if folder else None
        return TransferRun(
            prepare(config, World()), open_session(config), World(), kept=kept, folder=where, stop=stop,
            afresh=kept is None,
        )  # fmt: skip

    return made


def config_of(weights: str, **given: Any) -> TransferConfig:
    values: Json = {
        "model": "wrn_10_1", "weights": weights, "data": "digits", "height": 8, "width": 8, "variants": ("gc", "bgc"),
        "groups": (2,), "inits": ("white",), "calibration_images": 16, "epochs": 0, "batch_size": 64, "subset": 128,
        "device": "cpu", **given,
    }  # fmt: skip
    return TransferConfig(**values)


def done(run: TransferRun) -> Known:
    """Everything that is known when the run is over, by key."""
    run.make_room()
    for _ in run.run():
        pass
    return run.known


def row(known: Known, variant: str, init: str = "white") -> TransferRow:
    return next(r for r in known.values() if r.params.variant == variant
                and r.params.init in (init, "none"))  # fmt: skip


def timeless(part: Any) -> Any:
    """A part of a row as JSON, without the times that it took."""
    plain = msgspec.to_builtins(part)
    if isinstance(plain, (list, tuple)):
        return [timeless(one) for one in plain]
    if not isinstance(plain, dict):
        return plain
    return {k: timeless(v) for k, v in plain.items() if "seconds" not in k and k not in ("images_per_s", "time")}


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_initialisations_are_those_of_convert() -> None:
    assert set(INITS) == set(CONVERT_INITS)


def test_a_row_is_every_conversion_of_every_seed_after_the_untouched_network(weights: str) -> None:
    config = config_of(weights, inits=("copy", "calibrated"), groups=(4, 2), seeds=(0, 3), epochs=2, control=False)
    rows = plan(config, "mine.pth", 9)
    conversions = [f"{v}-n{n}-{i}" for n in (2, 4) for v in ("gc", "bgc") for i in ("copy", "calibrated")]
    assert [r.key for r in rows] == [
        f"wrn_10_1-digits-{what}-s{seed}" for seed in (0, 3) for what in ("standard-n1", *conversions)
    ]
    assert [r.params.epochs for r in rows] == 2 * [0, *8 * [2]]
    assert [r.params.calibration_images for r in rows[:3]] == [None, 9, 9]
    assert {r.params.weights for r in rows} == {"mine.pth"}
    plain = plan(replace(config, rebn=False, control=True, distill=True))
    assert plain[0].key == "wrn_10_1-digits-standard-n1-s0"
    assert plain[1].key == "wrn_10_1-digits-gc-n2-copy-s0-norebn"
    assert [r.params.calibration_images for r in plain[:3]] == [None, None, 16]
    assert [(r.params.epochs, r.params.distill) for r in plain[:2]] == [(2, True), (2, True)]
    judged = plan(replace(config, distill=True))[0]
    assert (judged.params.epochs, judged.params.distill, judged.params.rebn) == (0, False, False)


def test_the_preset_is_the_papers_table_3() -> None:
    config = TransferConfig(**preset("table3", {"data_dirs": ("d",)}))
    assert {(cell.variant, cell.groups) for cell in config.cells} == set(paper.TABLE3)
    assert (config.model, config.data, config.weights) == (paper.TABLE3_MODEL, paper.TABLE3_DATA, "default")
    assert (config.inits, config.rebn, config.epochs) == (("copy",), False, paper.TABLE3_EPOCHS)
    assert (config.recipe, config.lr, config.spec.size) == ("paper", 0.01, (3, 224, 224))
    fast = TransferConfig(**preset("table3", {"data_dirs": ("d",), "recipe": "fast", "quick": True, "weights": "w"}))
    assert (fast.recipe, fast.epochs, fast.weights, fast.calibration_images) == ("fast", 2, "w", 64)


def test_a_checkpoint_agrees_on_the_recipe_the_conversion_and_the_weights(weights: str) -> None:
    config = config_of(weights, epochs=1, seeds=(3, 4), time=True, save="nets", control=True)
    found = identity(config, plan(config)[-1].params, "abc")
    assert {*HYPER, "recipe", "rebn", "calibration_images", "distill", "where", "height", "data"} <= set(found)
    assert (found["init"], found["weights_sha256"], found["variant"], found["seed"]) == ("white", "abc", "bgc", 4)
    assert not {"weights", "inits", "control", "time", "save", "seeds", "variants", "data_dirs"} & set(found)


# --------------------------------------------------------------------------------------------- judged before training


def judged_by_hand(model: torch.nn.Module) -> tuple[float, torch.Tensor]:
    data = open_labelled("digits", (8, 8), [])
    with torch.no_grad():
        scores = Prepared(model, data.mean, data.std, torch.float32, "nchw").eval()(data.test_images)  # type: ignore[attr-defined]
    guesses = scores.argmax(1)
    return 100 * float((guesses != data.test_labels).double().mean()), guesses


def test_a_conversion_is_what_convert_makes_of_the_same_images(make: Make, weights: str) -> None:
    known = done(make(inits=("copy", "calibrated"), seeds=(0, 1), variants=("gc",)))
    dense = build_model(SPEC)
    dense.load_state_dict(torch.load(weights, weights_only=True))
    untouched, guesses = judged_by_hand(dense.eval())
    assert row(known, "standard").error_initial == pytest.approx(untouched)
    assert row(known, "standard").agreement_initial is None
    assert untouched < 40
    images = open_labelled("digits", (8, 8), []).calibration()
    for seed in (0, 1):
        for init in ("copy", "calibrated"):
            converted = bgcbench.convert(
                dense, "gc", 2, init=init, calibration=list(images.batches(16, 64, seed)), seed=seed
            )
            error, other = judged_by_hand(converted.model)
            found = known[f"wrn_10_1-digits-gc-n2-{init}-s{seed}"]
            assert found.error_initial == pytest.approx(error)
            assert found.agreement_initial == pytest.approx(100 * float((other == guesses).double().mean()))
            assert (found.status, found.epochs, found.error_final, found.checkpoints) == ("ok", (), None, None)
            assert timeless(found.convert) == timeless(converted.record)
    draws = [known[f"wrn_10_1-digits-gc-n2-calibrated-s{seed}"] for seed in (0, 1)]
    assert draws[0].loss_initial != draws[1].loss_initial


def is_converted(training: Training) -> bool:
    return any(isinstance(module, VariantConv2d) for module in training.network.modules())


def test_the_untouched_network_is_judged_once_and_stays_untouched(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[bool] = []
    begin = Training.begin
    monkeypatch.setattr(Training, "begin", lambda self: judged.append(is_converted(self)) or begin(self))  # type: ignore[func-returns-value]
    run = make(seeds=(0, 1), epochs=1, control=True, distill=True, variants=("gc",))
    before = {name: value.clone() for name, value in run.prepared.network.state_dict().items()}
    state = torch.get_rng_state()
    known = done(run)
    assert judged == [False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in run.original.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    standard = [known[f"wrn_10_1-digits-standard-n1-s{seed}"] for seed in (0, 1)]
    assert standard[0].error_initial == standard[1].error_initial
    assert standard[0].epochs[0].train_loss != standard[1].epochs[0].train_loss
    assert [r.status for r in known.values()] == 4 * ["ok"]


def test_conversions_are_in_the_file_before_anything_is_trained(make: Make) -> None:
    run = make(epochs=1, control=True)
    run.make_room()
    seen = []
    for update in run.run():
        if update.doing == "evaluated":
            seen.append((update.row.params.cell, [(r.status, r.reason) for r in run.results]))
        if update.doing == "":
            break
    waiting, converted = (("interrupted", text) for text in ("not trained yet", "converted, not trained yet"))
    assert seen == [
        (("standard", 1, None), [waiting]),
        (("gc", 2, None), [waiting, converted]),
        (("bgc", 2, None), [waiting, converted, converted]),
    ]


def test_a_conversion_that_fails_is_a_row_and_the_others_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transfer_run.convert

    def refuse(model: Any, variant: str, *rest: Any, **options: Any) -> Any:
        if variant == "gc":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return whole(model, variant, *rest, **options)

    monkeypatch.setattr(transfer_run, "convert", refuse)
    known = done(make(epochs=1))
    failed = row(known, "gc")
    assert failed.status == "oom"
    assert failed.reason.endswith("3221225472 bytes asked for; use fewer --calibration-images")
    assert (failed.convert_seconds, failed.error_initial, failed.epochs) == (None, None, ())
    assert len(row(known, "bgc").epochs) == 1
    # It is tried again, and what there is stays.
    monkeypatch.undo()
    again = done(make(epochs=1, kept=known))
    assert again[failed.key].status == "ok"
    assert row(again, "bgc") == row(known, "bgc")


def test_a_picture_that_cannot_be_read_ends_the_run_with_what_is_known(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> Any:
        raise bgcbench.errors.UsageError("a.png cannot be read as an image")

    run = make()
    monkeypatch.setattr(type(run.prepared.images), "read", unreadable)
    with pytest.raises(bgcbench.errors.UsageError, match=r"a\.png cannot be read"):
        done(run)
    assert list(run.known) == ["wrn_10_1-digits-standard-n1-s0"]


def test_random_labels_have_nothing_to_show(make: Make) -> None:
    run = make(epochs=1, variants=("gc",))
    object.__setattr__(run.prepared.data, "meaningful", False)
    for found in done(run).values():
        names = (
            "error_initial",
            "error_initial_top5",
            "loss_initial",
            "agreement_initial",
            "error_final",
            "error_best",
        )
        assert [getattr(found, name) for name in names] == [None] * 6


# -------------------------------------------------------------------------------------------- stopped and gone on with


def stopped_after(calls: int) -> Callable[[], bool]:
    left = iter(range(calls))
    return lambda: next(left, None) is None


def comparable(known: Known) -> dict[str, Json]:
    """Rows without the times that they took."""
    return {key: timeless(found) for key, found in known.items()}


def test_stopped_anywhere_and_gone_on_with_it_ends_alike_and_converts_nothing_twice(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: Json = {"inits": ("calibrated",), "epochs": 2, "control": True, "distill": True}
    whole = done(make(**given))
    finals = {path.parent.name: path.name for path in tmp_path.rglob("final-*.pt")}
    assert len(finals) == 3
    (tmp_path / "checkpoints").rename(tmp_path / "whole")
    conversions: list[str] = []
    convert = transfer_run.convert

    def counted(model: Any, variant: str, *rest: Any, **options: Any) -> Any:
        found = convert(model, variant, *rest, **options)
        conversions.append(variant)
        return found

    monkeypatch.setattr(transfer_run, "convert", counted)
    known, runs = None, 0
    budget = 3
    while known is None or len(known) < 3 or any(r.status != "ok" for r in known.values()):
        known = done(make(**given, kept=known, stop=stopped_after(budget)))
        budget, runs = budget + 6, runs + 1
    assert runs > 4
    assert sorted(conversions) == ["bgc", "gc"]
    assert comparable(known) == comparable(whole)
    # The same digits in the name: the same weights, to the last bit.
    assert {path.parent.name: path.name for path in tmp_path.glob("checkpoints/*/final-*.pt")}.keys() == finals.keys()
    for key, name in finals.items():
        mine, theirs = (torch.load(next((tmp_path / where / key).glob("final-*.pt")), weights_only=True)["model"]
                        for where in ("checkpoints", "whole"))  # fmt: skip
        assert all(torch.equal(value, theirs[part]) for part, value in mine.items()), name


def test_a_network_that_is_only_judged_waits_in_a_checkpoint_until_it_is(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: Json = {"variants": ("gc",), "inits": ("calibrated",)}
    whole = done(make(**given))
    with monkeypatch.context() as patched:
        judge = Training.begin
        patched.setattr(Training, "begin", lambda self: None if is_converted(self) else judge(self))
        known = done(make(**given))
    found = row(known, "gc", "calibrated")
    assert (found.status, found.reason) == ("interrupted", "converted, not evaluated yet")
    assert found.convert.calibration.layers
    assert len(list(tmp_path.rglob("*.pt"))) == 1
    monkeypatch.setattr(transfer_run, "convert", None)  # it is not converted again
    assert comparable(done(make(**given, kept=known))) == comparable(whole)
    assert list(tmp_path.iterdir()) == []


def test_a_stop_within_a_conversion_leaves_no_row_of_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **options: Any) -> Any:
        assert options["stop"]() is False
        raise Stopped

    monkeypatch.setattr(transfer_run, "convert", stopped)
    assert list(done(make(epochs=1))) == ["wrn_10_1-digits-standard-n1-s0"]


def test_without_a_result_file_converted_networks_wait_in_memory(make: Make, tmp_path: Path) -> None:
    kept = done(make(epochs=1, variants=("gc",)))
    held = done(make(epochs=1, variants=("gc",), folder=False))
    assert row(held, "gc").checkpoints is None
    without = [{k: v for k, v in r.items() if k != "checkpoints"} for r in comparable(held).values()]
    assert without == [{k: v for k, v in r.items() if k != "checkpoints"} for r in comparable(kept).values()]


def test_a_full_disk_costs_the_checkpoints_and_nothing_else(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = done(make(epochs=1, folder=False, variants=("gc",)))
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    run = make(epochs=1, variants=("gc",))
    found = done(run)
    assert row(found, "gc").epochs[0].train_loss == row(expected, "gc").epochs[0].train_loss
    assert any("No space left on device" in text for text in run.warnings)


def test_a_network_whose_checkpoint_is_gone_is_converted_again_and_that_is_said(make: Make, tmp_path: Path) -> None:
    whole = done(make(epochs=1, variants=("gc",)))
    waiting = {"status": "interrupted", "reason": "converted, not trained yet", "epochs": (), "stage": "evaluated"}
    known = whole | {row(whole, "gc").key: msgspec.structs.replace(row(whole, "gc"), **waiting)}
    for path in (tmp_path / "checkpoints").rglob("*.pt"):
        path.unlink()
    run = make(epochs=1, variants=("gc",), kept=known)
    assert comparable(done(run)) == comparable(whole)
    assert "wrn_10_1-digits-gc-n2-white-s0: no checkpoint is there, so it is converted again" in run.warnings


def test_a_training_that_fails_keeps_what_is_known_from_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_step", refuse)
        known = done(make(epochs=1, variants=("gc",)))
    failed = row(known, "gc")
    assert failed.status == "oom"
    assert "use --accumulate 2 or more" in failed.reason
    assert failed.agreement_initial > 0
    assert failed.error_initial is not None
    assert failed.convert.calibration.norms > 0
    again = done(make(epochs=1, variants=("gc",), kept=known))
    assert row(again, "gc").status == "ok"
    assert row(again, "gc").convert_seconds == failed.convert_seconds


def test_a_control_and_other_starts_can_be_added_to_what_is_there(make: Make) -> None:
    known = done(make(epochs=1, variants=("gc",)))
    assert row(known, "standard").epochs == ()
    assert row(known, "standard").status == "ok"
    conversion = row(known, "gc")
    more = done(make(epochs=1, variants=("gc",), inits=("white", "copy"), control=True, kept=known))
    assert len(row(more, "standard").epochs) == 1
    assert row(more, "gc") == conversion
    assert row(more, "gc", "copy").agreement_initial is not None


# ------------------------------------------------------------------------------------------------------ saved and timed


@pytest.mark.parametrize(("epochs", "variants"), [(0, ("gc", "lgc")), (1, ("bgc", "flgc", "lgc"))])
def test_saved_networks_are_those_that_were_judged_last(
    make: Make, tmp_path: Path, epochs: int, variants: tuple[str, ...]
) -> None:
    known = done(make(epochs=epochs, variants=variants, save=str(tmp_path / "nets"), inits=("calibrated",)))
    for variant in variants:
        found = row(known, variant, "calibrated")
        assert found.saved == f"{found.key}.pt"
        model = bgcbench.load_converted(tmp_path / "nets" / found.saved)
        error = found.error_final if epochs else found.error_initial
        assert judged_by_hand(model)[0] == pytest.approx(error)
    assert row(known, "standard").saved is None
    assert sorted(path.suffix for path in (tmp_path / "nets").iterdir()) == [".pt"] * len(variants)


def test_a_folder_that_can_no_longer_be_written_costs_the_saved_file_only(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer_run, "write_atomically", full)
    run = make(variants=("gc",), save=str(tmp_path / "nets"))
    found = row(done(run), "gc")
    assert (found.status, found.saved) == ("ok", None)
    assert any("No space left on device); the run goes on" in text for text in run.warnings)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch, brisk: None) -> list[str]:
    """The shortest measurements; yields the networks that were built to be measured."""
    built: list[str] = []
    for_device = Rules.for_device
    shortest: Json = {"max_time_s": 0.01, "min_rounds": 1, "warmup_min_calls": 1}
    monkeypatch.setattr(Rules, "for_device", lambda *given, **more: replace(for_device(*given, **more), **shortest))
    build = network_run.plan_network

    def planned(config: Any) -> Any:
        found = build(config)
        built.extend(r.params.variant for r in found.rows)
        return found

    monkeypatch.setattr(network_run, "plan_network", planned)
    return built


def test_what_networks_cost_is_measured_once_for_each_variant_and_n(make: Make, quickly: list[str]) -> None:
    given: Json = {"quick": True, "epochs": 0, "subset": 128, "time": True, "seeds": (0, 1), "variants": ("gc",)}
    known = done(make(**given))
    gc, again = (known[f"wrn_10_1-digits-gc-n2-white-s{seed}"].time for seed in (0, 1))
    assert gc is not None
    assert gc == again
    assert set(gc.phase) == {"fwd", "train_step"}
    assert (gc.batch, gc.precision, gc.layout, gc.mode) == (32, "fp32", "nchw", "eager")
    assert gc.memory in ("kept", None)  # None: not glibc
    standard = row(known, "standard").time.phase  # type: ignore[union-attr]
    for phase in ("fwd", "train_step"):
        assert standard[phase].ratio == 1.0
        assert gc.phase[phase].ratio == pytest.approx(standard[phase].median_s / gc.phase[phase].median_s)
    # What is there is not measured again, what is new is.
    quickly.clear()
    assert done(make(**given, kept=known)) == known
    assert quickly == []
    more = done(make(**{**given, "seeds": (0,), "variants": ("gc", "lgc")}, kept=known))
    lgc = row(more, "lgc").time.phase  # type: ignore[union-attr]
    assert lgc["fwd"].ratio is not None
    assert lgc["fwd"].median_s < lgc["train_step"].median_s
    assert row(more, "gc").time == gc


def test_a_measurement_that_fails_leaves_conversions_and_trainings(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(network_run, "plan_network", refuse)
    run = make(epochs=1, variants=("gc",), time=True)
    found = row(done(run), "gc")
    assert (found.status, found.time, len(found.epochs)) == ("ok", None, 1)
    assert "--time: the networks could not be measured: RuntimeError: no clock" in run.warnings


# --------------------------------------------------------------------------------------------------- before it begins


def test_what_the_user_should_know_is_said_before(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepare(config_of(weights, calibration_images=5000), World())
    assert any("digits has 1297 training images, fewer than the 5000 to calibrate with" in t for t in few.warnings)
    assert {r.params.calibration_images for r in few.rows} == {None, 1297}
    assert isinstance(few, TransferPrepared)
    assert few.settings["weights_sha256"] == few.loaded.sha256
    none = prepare(config_of("none"), World())
    assert any(text.startswith("--weights none: the network is untrained") for text in none.warnings)
    how = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, source="weights")
    monkeypatch.setattr(files, "_own_preprocessing", lambda _: how)
    other = prepare(config_of(weights), World())
    assert any("mine.pth of wrn_10_1 is for images of 224x224 px, and 8x8 are" in text for text in other.warnings)


# ------------------------------------------------------------------------------------------------- damaged networks


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [("bn", -1.0, r"bn puts out numbers that are not finite \(running_var has negative ones\)"),
     ("stages.0.0.bn2", float("nan"), r"stages.0.0.bn2 puts out .* \(running_var holds such\)")],
)  # fmt: skip
def test_a_network_with_damaged_weights_is_an_error_that_names_where(
    make: Make, weights: str, tmp_path: Path, name: str, value: float, where: str
) -> None:
    state = torch.load(weights)
    state[f"{name}.running_var"][0] = value
    torch.save(state, tmp_path / "damaged.pth")
    known = done(make(weights=str(tmp_path / "damaged.pth"), inits=("white", "calibrated")))
    assert {r.status for r in known.values()} == {"error"}
    assert all(r.error_initial is None for r in known.values())
    for found in known.values():
        assert re.search(where, found.reason), found.reason


def test_a_conversion_that_damages_the_network_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = transfer_run.convert

    def damaging(model: Any, variant: str, *arguments: Any, **options: Any) -> Any:
        made = convert(model, variant, *arguments, **options)
        if variant == "gc":
            made.model.fc.weight.data[0] = float("inf")
        return made

    monkeypatch.setattr(transfer_run, "convert", damaging)
    known = done(make())
    assert [row(known, name).status for name in ("standard", "gc", "bgc")] == ["ok", "error", "ok"]
    assert "fc puts out numbers that are not finite (weight holds such)" in row(known, "gc").reason
