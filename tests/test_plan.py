"""``bgcbench plan`` as a user meets it: stages, resume, what is saved, what is said and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bgcbench
from bgcbench.cli import main
from bgcbench.experiments import plan_run
from bgcbench.measure.timing import Rules
from bgcbench.planning.execution import Execution
from bgcbench.planning.plan import Plan
from tests.brisk import shorten
from tests.deployment.example import needs_onnx
from tests.example_plan import plan_document
from tests.reporting import report_of
from tests.stored import stored

RUN = [
    "plan", "wrn_10_1", "--weights", "none", "--data", "digits", "--size", "8", "--calibration-images", "24",
    "--test-images", "40", "--batch", "2", "--device", "cpu", "--threads", "1",
]  # fmt: skip
ASKED = [*RUN, "--variants", "gc,bgc,lowrank", "--groups", "2,8", "--exclude", "stages.2.*"]


STAGES = ["cost", "loss", "trial", "choice", "proof"]


def rows_of(document: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in document["results"] if row["params"]["stage"] == stage}


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Networks are timed for a moment only, and without --quick, which would also try out fewer of them."""
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched.setattr)
        of_device = Rules.for_device
        patched.setattr(Rules, "for_device", lambda *given, **options: of_device(*given, **options | {"quick": True}))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: p.json and the folder saved."""
    made = tmp_path_factory.mktemp("plan")
    words = [*ASKED, "--params", "0.4", "--out", str(made / "p.json"), "--save", str(made / "saved"), "--quiet"]
    assert main(words) == 0
    return made


def test_every_stage_leaves_its_rows(folder: Path) -> None:
    document = stored(folder / "p.json")
    costs, losses = rows_of(document, "cost"), rows_of(document, "loss")
    choices, proof = rows_of(document, "choice"), rows_of(document, "proof")
    layers = {row["params"]["layer"] for row in costs.values()}
    assert all({row["params"]["layer"] for row in found.values()} == layers for found in (losses, choices))
    assert len(costs) == len(losses)
    assert {row["key"] for row in document["results"] if row["status"] != "ok"} <= {"trial-again"}
    plan, own = document["plan"], proof["proof-plan"]
    assert (plan["kind"], plan["asked"]) == ("params", 0.4)
    assert own["params_ratio"] == pytest.approx(plan["predicted"]) == pytest.approx(plan["measured"])
    assert own["params_ratio"] <= 0.4
    chosen = {row["params"]["layer"]: row["counts"]["params"] for row in choices.values()}
    originals = [row for row in costs.values() if row["params"]["variant"] == "standard"]
    dense = {row["params"]["layer"]: row["counts"]["params"] for row in originals}
    assert own["params_ratio"] == pytest.approx(sum(chosen.values()) / sum(dense.values()))
    assert proof["proof-dense"]["agreement"] == 100
    for subject in ("gc", "bgc", "lowrank"):
        assert proof[f"proof-{subject}"]["params_ratio"] <= 0.4
        assert proof[f"proof-{subject}"]["time_ratio"] > 0
    tried = {row["key"]: row for row in rows_of(document, "trial").values() if row["status"] == "ok"}
    assert set(tried) >= {f"trial-{name}" for name in ("felt", "plain", "gc", "bgc", "lowrank")}
    best = min(tried.values(), key=lambda row: row["logit_error"])
    assert plan["by"] == best["key"].removeprefix("trial-")
    assert best["params_ratio"] == pytest.approx(plan["predicted"])
    assert all(row["test_images"] == 6 for row in tried.values())
    assert {row["error"] for row in proof.values()} <= {100 * n / 40 for n in range(41)}
    assert plan["curve"][-1] == {"cost": pytest.approx(1.0), "loss": 0.0}


def test_what_is_saved_is_the_plan_and_its_network(folder: Path) -> None:
    plan = Plan.load(folder / "saved" / "plan.json")
    document = stored(folder / "p.json")
    assert {name: choice.to_json() for name, choice in plan.choices.items()} == document["plan"]["choices"]
    network = bgcbench.load_converted(folder / "saved" / "network.pt")
    replaced = {name for name, choice in plan.choices.items() if not choice.is_dense}
    assert {name for name, module in network.named_modules() if hasattr(module, "dense_weight")} == replaced


def test_it_is_shown_with_the_answer_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(folder / "p.json"), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "0.4 of the parameters was asked" in shown
    assert "the best single choice at that budget" in shown
    assert main(["show", str(folder / "p.json"), "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("key,stage,model")
    assert main(["show", str(folder / "p.json"), "--explain"]) == 0
    assert "felt" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_in_a_stage_goes_on_to_the_same_plan(stage: str, folder: Path, tmp_path: Path) -> None:
    """Everything from the middle of that stage on is taken away."""
    document = json.loads((folder / "p.json").read_text())
    after = [row for row in document["results"] if STAGES.index(row["params"]["stage"]) >= STAGES.index(stage)]
    here = [row for row in after if row["params"]["stage"] == stage]
    gone = {row["key"] for row in after} - {row["key"] for row in here[: len(here) // 2]}
    document["results"] = [row for row in document["results"] if row["key"] not in gone]
    document |= {"complete": False, "exit_reason": "interrupted"}
    document["config"]["save"] = None
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps(document))
    assert main(["plan", "--resume", str(torn), "--quiet"]) == 0
    again, before = stored(torn), stored(folder / "p.json")
    assert again["plan"]["choices"] == before["plan"]["choices"]
    assert again["plan"]["curve"] == before["plan"]["curve"]
    assert again["complete"]
    for row in rows_of(before, "loss").values():
        assert rows_of(again, "loss")[row["key"]]["felt"] == pytest.approx(row["felt"], rel=1e-4, abs=1e-9)


def test_costs_and_losses_of_another_run_are_taken_over(folder: Path, tmp_path: Path) -> None:
    out, monkeypatch = tmp_path / "other.json", pytest.MonkeyPatch()
    words = [*ASKED, "--params", "0.6", "--measured", str(folder / "p.json"), "--out", str(out), "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(plan_run, "score", lambda *_, **__: pytest.fail("measured again"))
        assert main(words) == 0
    for stage in ("cost", "loss"):
        assert rows_of(stored(out), stage) == rows_of(stored(folder / "p.json"), stage)
    assert 0.4 < stored(out)["plan"]["predicted"] <= 0.6


def test_costs_and_losses_of_something_else_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*ASKED, "--params", "0.6", "--measured", str(folder / "p.json"), "--out", str(tmp_path / "x.json")]
    assert main([*words, "--calibration-images", "28"]) != 0
    assert "its calibration_images is 24, and 28 is asked for; leave --measured out" in capsys.readouterr().err
    assert main([*words[:-4], "--measured", str(tmp_path / "none.json"), "--out", str(tmp_path / "x.json")]) != 0
    assert "none.json" in capsys.readouterr().err


def test_a_quick_run_tries_two_networks_out(tmp_path: Path) -> None:
    out = tmp_path / "quick.json"
    assert main([*ASKED, "--params", "0.4", "--quick", "--out", str(out), "--quiet"]) == 0
    for stage, others in (("trial", {"felt"}), ("proof", {"dense", "plan"})):
        done = {row["key"].split("-")[1] for row in rows_of(stored(out), stage).values() if row["status"] == "ok"}
        assert done >= others
        assert len(done - others) == 1
        assert done - others < {"gc", "bgc", "lowrank"}


def test_time_is_measured_and_a_budget_of_time_is_planned(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    words = [*RUN, "--quick", "--variants", "gc", "--groups", "2", "--precision", "bf16", "--layout", "nhwc"]
    assert main([*words, "--time", "1", "--out", str(out), "--quiet"]) == 0
    document = stored(out)
    assert (document["settings"]["precision"], document["settings"]["layout"]) == ("bf16", "nhwc")
    assert all(row["seconds"] is not None for row in rows_of(document, "cost").values())
    assert document["plan"]["predicted"] <= 1 + 1e-9
    assert document["plan"]["measured"] > 0
    assert "gc" in document["plan"]["factors"]


def which(row: dict[str, Any]) -> tuple[Any, ...]:
    """The layer and the choice that a row is about."""
    params = row["params"]
    return (params["layer"], params["variant"], params["groups"], params.get("rank"))


def test_a_plan_for_a_time_is_measured_once_and_chosen_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the finished run, with a layer's time as its parameters; its network saves 0.8 times as much."""
    document = json.loads((folder / "p.json").read_text())
    document["results"] = [row for row in document["results"] if row["params"]["stage"] in ("cost", "loss")]
    for row in rows_of(document, "cost").values():
        row["seconds"] = row["counts"]["params"] * 1e-6
    document["config"] |= {"save": None, "params": None, "time": 0.6}
    document["plan"] = {"kind": "time", "asked": 0.6}
    document |= {"complete": False, "exit_reason": "interrupted"}
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps(document))
    asked = []
    monkeypatch.setattr(plan_run, "saved_by_its_network", lambda *given, **_: (asked.append(given[2]), (0.8, "so"))[1])
    monkeypatch.setattr(plan_run.PlanRun, "_time", lambda self, networks: None)
    for _ in range(2):  # where it was stopped before its proof, nothing is measured again
        assert main(["plan", "--resume", str(torn), "--quiet"]) != 0
    again = stored(torn)
    assert asked == [0.6]
    assert again["plan"]["scale"] == 0.8
    assert "so" in again["warnings"]
    alone = {which(row): row["seconds"] for row in rows_of(again, "cost").values()}
    dense_s = chosen_s = 0.0
    for row in rows_of(again, "choice").values():
        own, dense = alone[which(row)], alone[row["params"]["layer"], "standard", 1, None]
        assert row["seconds"] == pytest.approx(dense - 0.8 * (dense - own))
        dense_s, chosen_s = dense_s + dense, chosen_s + row["seconds"]
    assert chosen_s / dense_s == pytest.approx(again["plan"]["predicted"])
    assert again["plan"]["predicted"] <= 0.6


NETWORK = """
from torch import nn

def make():
    convs = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
"""
ONE_LAYER = ["plan", "net.py:make", *RUN[2:], "--quick", "--variants", "gc", "--groups", "2", "--time", "1", "--quiet"]


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phase", "train_step"], "timed in eager, train step"),
        pytest.param(["--mode", "onnxruntime"], "timed in onnxruntime ", marks=needs_onnx),
    ],
)
def test_time_is_measured_in_the_mode_and_phase_that_are_asked_for(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    ready, of_layers, of_networks = Execution.layers, set[Execution](), set[Execution]()
    network = Execution.network
    monkeypatch.setattr(Execution, "layers", lambda self, *a: (of_layers.add(self), ready(self, *a))[1])
    monkeypatch.setattr(Execution, "network", lambda self, *a: (of_networks.add(self), network(self, *a))[1])
    assert main([*ONE_LAYER, *words, "--out", str(tmp_path / "t.json")]) == 0
    document = stored(tmp_path / "t.json")
    asked = Execution(document["config"]["mode"], document["config"]["phase"])
    assert of_layers == of_networks == {asked} != {Execution()}
    assert rows_of(document, "proof")["proof-plan"]["time_ratio"] > 0
    assert not [text for text in document["warnings"] if "measured:" in text or "could not be timed" in text]
    assert said in capsys.readouterr().out


@pytest.mark.usefixtures("brisk")
def test_losses_of_another_mode_are_taken_over_and_times_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    first, other = tmp_path / "first.json", tmp_path / "other.json"
    assert main([*ONE_LAYER, "--out", str(first)]) == 0
    monkeypatch.setattr(plan_run, "score", lambda *_, **__: pytest.fail("losses were measured again"))
    words = ["--phase", "train_step", "--precision", "bf16", "--batch", "3", "--measured", str(first)]
    assert main([*ONE_LAYER, *words, "--out", str(other)]) == 0
    assert rows_of(stored(other), "loss") == rows_of(stored(first), "loss")
    assert rows_of(stored(other), "cost") != rows_of(stored(first), "cost")
    (said,) = (text for text in stored(other)["warnings"] if text.startswith("--measured"))
    assert "its precision is fp32, not bf16, its batch is 2, not 3, its phase is fwd, not train_step" in said
    again = tmp_path / "again.json"
    assert main([*ONE_LAYER, *words[:-1], str(other), "--out", str(again)]) == 0
    assert rows_of(stored(again), "cost") == rows_of(stored(other), "cost")


@pytest.mark.usefixtures("brisk")
def test_a_time_that_cannot_be_met_is_refused_before_losses_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_run, "score", lambda *_, **__: pytest.fail("losses were measured"))
    words = [*RUN, "--quick", "--variants", "gc", "--groups", "2", "--time", "0.001", "--out", str(tmp_path / "t.json")]
    assert main(words) == 2
    assert "time=0.001 cannot be met: the least is" in capsys.readouterr().err
    assert rows_of(stored(tmp_path / "t.json"), "cost")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--params", "0.5", "--macs", "0.5"], "--params and --macs are two budgets; give one"),
        (["--params", "0"], "--params 0 must be above 0 and at most 1"),
        (["--params", "0.01"], "params=0.01 cannot be met: the least is"),
        (["--data", "nowhere/at/all"], "--data nowhere/at/all is not there"),
        (["--calibration-images", "2"], "--calibration-images 2 must be at least 4"),
        (["--most-variants", "0"], "most_variants=0 must be a whole number"),
        (["--precision", "tf32"], "--precision tf32 is a mode of CUDA devices"),
        (["--layout", "nhcw"], "unknown layout 'nhcw'"),
        (["--mode", "graph"], "unknown mode 'graph'"),
        (["--mode", "onnxruntime", "--phase", "train_step"], "--mode onnxruntime has --phase fwd alone"),
        (["--mode", "onnxruntime", "--precision", "bf16"], "--mode onnxruntime has --precision fp32 alone"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*ASKED, "--out", str(tmp_path / "x.json"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "x.json").exists()


def test_an_edited_plan_is_not_replaced_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text("{}")
    words = [*ASKED, "--params", "0.4", "--out", str(tmp_path / "q.json"), "--save", str(tmp_path)]
    assert main(words) != 0
    assert "plan.json exist; --force replaces them" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text() == "{}"


def test_networks_that_were_not_timed_are_not_done(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the networks are measured: a resumed run converts them again and has their times."""
    document = json.loads((folder / "p.json").read_text())
    document["results"] = [row for row in document["results"] if row["params"]["stage"] != "proof"]
    document |= {"complete": False, "exit_reason": "interrupted"}
    document["config"]["save"] = None
    torn = tmp_path / "torn.json"
    torn.write_text(json.dumps(document))
    with monkeypatch.context() as patched:
        patched.setattr(plan_run.PlanRun, "_time", lambda self, networks: None)
        assert main(["plan", "--resume", str(torn), "--quiet"]) != 0
    assert not stored(torn)["complete"]
    assert main(["plan", "--resume", str(torn), "--quiet"]) == 0
    assert all(row["time_ratio"] > 0 for row in rows_of(stored(torn), "proof").values())


def test_an_existing_network_is_not_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*ASKED, "--params", "0.4", "--out", str(tmp_path / "q.json"), "--save", str(folder / "saved")]
    assert main(words) != 0
    assert "exist; --force replaces them" in capsys.readouterr().err


def test_the_answer_in_words_has_what_was_asked_what_is_measured_and_the_best_other() -> None:
    (table, *_) = report_of(plan_document()).tables
    assert table.sections["In words"] == [
        "0.7 of the time was asked, 0.71 (95% CI 0.69-0.73) is measured",
        "the first guess agrees with the original's on 95.0 % of 40 images",
        "the best single choice at that budget, GC N=2, on 84.0 %",
    ]
    assert table.by_title["time"] == ["1.000", "0.710 [0.69, 0.73]", "0.700"]


def test_comparing_says_what_it_says() -> None:
    z = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]], dtype=torch.float64)
    same = plan_run.compare(z, z)
    assert (same["agreement"], same["top5"], same["logit_error"]) == (100, 100, 0)
    assert same["kl"] == pytest.approx(0, abs=1e-12)
    swapped = plan_run.compare(z, z.flip(0))
    assert swapped["agreement"] == 0
    centred = z - z.mean(0)
    assert swapped["logit_error"] == pytest.approx(float((z - z.flip(0)).square().sum() / centred.square().sum()))
    p, q = z.softmax(1), z.flip(0).softmax(1)
    assert swapped["kl"] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
