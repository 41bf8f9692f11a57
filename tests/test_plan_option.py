"""``--plan FILE`` of profile, train and transfer: the planned network as a row beside the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bgcbench
from bgcbench.cli import main
from bgcbench.convs import VariantConv2d
from bgcbench.experiments.network_run import plan_network
from bgcbench.experiments.profile import NetworkConfig
from bgcbench.models import build_empty
from bgcbench.specs import PLANNED, Choice
from tests.example_plan import with_plan
from tests.example_train import train_document
from tests.example_transfer import transfer_document
from tests.reporting import report_of
from tests.stored import stored

pytestmark = pytest.mark.usefixtures("brisk", "one_thread", "tried_once")

CHOICES = {
    "stages.0.0.conv1": {"variant": "gc", "groups": 2},
    "stages.1.0.conv2": {"variant": "bgc", "groups": 4},
    "stages.2.0.conv1": {"variant": "standard"},
    "stages.2.0.conv2": {"variant": "lowrank", "rank": 8},
}
REPLACED = [name for name, choice in CHOICES.items() if choice["variant"] != "standard"]
PROFILE = ["profile", "--model", "wrn_10_1", "--size", "8", "--batch", "2", "--device", "cpu", "--threads", "1",
           "--quick", "--max-time", "0.01", "--plan"]  # fmt: skip
DIGITS = [
    "--data",
    "digits",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--subset",
    "64",
    "--epochs",
    "1",
    "--batch-size",
    "32",
]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plan in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return written(CHOICES)


def written(choices: Any, name: str = "mine.json") -> str:
    Path(name).write_text(json.dumps(choices))
    return name


def rows_of(path: str) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["params"]["variant"], row["params"]["groups"]): row for row in stored(Path(path))["results"]}


def planned_params() -> int:
    """Of the planned network: the dense one's, and what Table 1's formulas save in these three 3x3 convolutions."""
    network = build_empty(NetworkConfig(model="wrn_10_1", height=8).spec)
    dense = sum(parameter.numel() for parameter in network.parameters())
    saved_by_gc = 9 * 16 * 16 - 9 * 16 * 16 // 2
    saved_by_bgc = 9 * 32 * 32 - 2 * 9 * 32 * 32 // 4
    saved_by_low_rank = 9 * 64 * 64 - 8 * (9 * 64 + 64)
    return dense - saved_by_gc - saved_by_bgc - saved_by_low_rank


class TestProfile:
    def test_the_planned_network_is_measured_beside_the_dense_one_alone(
        self, plan: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*PROFILE, plan, "--phases", "fwd", "--out", "p.json"]) == 0
        rows = rows_of("p.json")
        assert set(rows) == {("standard", 1), ("plan", 1)}
        row = rows["plan", 1]
        assert (row["status"], row["key"]) == ("ok", "wrn_10_1-plan-auto-b2-8x8-fp32-nchw-eager")
        assert row["counts"]["params"] == planned_params()
        made = {layer["name"]: (layer["variant"], layer["groups"], layer["rank"]) for layer in row["convert"]["layers"]}
        assert made == {REPLACED[0]: ("gc", 2, None), REPLACED[1]: ("bgc", 4, None), REPLACED[2]: ("lowrank", 7, 8)}
        shown = capsys.readouterr().out
        assert "replaced: as planned\nplan: 3 convolutions replaced, GC N=2 x1, BGC N=4 x1, LR r=8 x1" in shown
        assert "| plan | - | 3 |" in shown
        assert "plan N=1" not in shown
        assert main(["show", "p.json", "--format", "csv"]) == 0
        assert ",plan,1," in capsys.readouterr().out

    def test_beside_what_variants_and_groups_ask_for(self, plan: str) -> None:
        config = NetworkConfig(model="wrn_10_1", plan=CHOICES, variants=("gc",), groups=(2,), where="3x3")
        keys = [row.key.split("-auto")[0].split("-3x3")[0] for row in plan_network(config).rows]
        assert keys == ["wrn_10_1-standard-n1", "wrn_10_1-plan", "wrn_10_1-gc-n2"]

    def test_in_each_mode_that_is_asked_for(self) -> None:
        asked: dict[str, Any] = {"variants": ("standard",), "phases": ("fwd",), "mode": "eager,onnxruntime"}
        rows = plan_network(NetworkConfig(model="wrn_10_1", plan=CHOICES, **asked)).rows
        planned = [row for row in rows if row.params.variant == "plan"]
        assert [(row.params.mode, row.params.algorithm) for row in planned] == [
            ("eager", "auto"),
            ("onnxruntime", "auto"),
        ]

    def test_layers_has_what_the_plan_makes_of_each_shape(self, plan: str) -> None:
        config = NetworkConfig(model="wrn_10_1", plan=CHOICES, variants=("standard",), layers=True)
        layers = [row for row in plan_network(config).rows if row.params.layer is not None]
        others = {row.params.choice for row in layers if row.params.variant != "standard"}
        assert {(each.variant, each.rank) for each in others} == {("gc", None), ("bgc", None), ("lowrank", 8)}
        assert all(row.row.layer and row.row.layer.replaced for row in layers if row.params.variant != "standard")

    @pytest.mark.parametrize(("algorithm", "masked"), [("masked", True), ("deployed", False)])
    def test_a_plan_with_masked_layers_is_measured_as_it_trains_and_deployed(
        self, algorithm: str, masked: bool
    ) -> None:
        choices = {REPLACED[0]: {"variant": "lgc", "groups": 2}, REPLACED[1]: {"variant": "bgc", "groups": 4}}
        config = NetworkConfig(model="wrn_10_1", plan=choices, variants=("standard",))
        found = {row.params.algorithm: row for row in plan_network(config).rows if row.params.variant == "plan"}
        assert set(found) == {"masked", "deployed"}
        row = found[algorithm].row
        assert row.convert is not None
        assert [layer.algorithm for layer in row.convert.layers] == [algorithm, "auto"]
        assert row.memory is not None
        assert (row.memory.params_bytes > 4 * row.counts.params + 4096) == masked  # type: ignore[union-attr]

    def test_the_file_needs_no_plan_file_to_be_gone_on_with_and_takes_no_other_one(
        self, plan: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*PROFILE, plan, "--phases", "fwd", "--out", "p.json", "--quiet"]) == 0
        document = stored("p.json")
        assert document["config"]["plan"] == CHOICES
        document["results"] = [row for row in document["results"] if row["params"]["variant"] == "standard"]
        Path("p.json").write_text(json.dumps(document | {"complete": False, "exit_reason": "interrupted"}))
        other = written({REPLACED[0]: {"variant": "gc", "groups": 4}}, "other.json")
        capsys.readouterr()
        assert main(["profile", "--resume", "p.json", "--plan", other]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"its plan of {REPLACED[0]} is {{'variant': 'gc', 'groups': 2}} and" in line
        os.remove(plan)
        assert main(["profile", "--resume", "p.json", "--quiet"]) == 0
        assert rows_of("p.json")["plan", 1]["status"] == "ok"


@pytest.mark.parametrize(
    ("choices", "more", "message"),
    [
        ({"stages.0.0.conv9": {"variant": "gc", "groups": 2}}, [],
         "--plan: the plan is for another network: it names stages.0.0.conv9, which is not there; there are stages."),
        ({REPLACED[0]: {"variant": "gc", "groups": 7}}, [],
         f"--plan: the plan does not fit the network: {REPLACED[0]} as GC N=7: in_channels=16 is not divisible by"),
        ({REPLACED[0]: {"variant": "gc", "groups": 7}}, ["--skip-invalid", "--groups", "2"], "plan does not fit"),
        ({REPLACED[0]: {"variant": "standard"}}, [], "--plan keeps every convolution as it is"),
        ([1], [], "--plan bad.json is no plan: it must be"),
        (CHOICES, ["--where", "3x3"], "--where is for variants, and --plan names each convolution"),
        (CHOICES, ["--skip-invalid"], "--skip-invalid is for variants"),
        (CHOICES, ["--algorithm", "masked"], "--algorithm masked: no variant asked for has it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    plan: str, choices: Any, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PROFILE, written(choices, "bad.json"), *more, "--out", "x.json", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("x.json").exists()


def test_a_layer_has_no_plan(plan: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--channels", "8", "--plan", plan]) == 2
    assert "--plan is for a network; name it with --model" in capsys.readouterr().err


def test_a_bad_plan_is_refused_before_torch_is_imported(plan: str) -> None:
    program = (
        "import sys; from bgcbench.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    words = [sys.executable, "-c", program, *PROFILE, written([], "bad.json")]
    assert subprocess.run(words, check=False, capture_output=True).returncode == 2


def test_plan_is_no_variant_and_no_choice_of_a_convolution() -> None:
    with pytest.raises(bgcbench.BgcbenchError, match="unknown variant 'plan'"):
        Choice("plan")
    with pytest.raises(bgcbench.BgcbenchError, match="unknown variant 'plan'"):
        NetworkConfig(variants=("plan",))
    assert (PLANNED.key, PLANNED.label, PLANNED.is_dense) == ("plan", "plan", False)
    assert PLANNED not in NetworkConfig(variants=("gc",)).choices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained dense and as planned, then transferred to the plan, trained on and timed."""
    place = tmp_path_factory.mktemp("planned")
    before = Path.cwd()
    os.chdir(place)
    try:
        plan = written(CHOICES)
        train = ["train", "wrn_10_1", "--size", "8", *DIGITS, "--plan", plan, "--quiet"]
        assert main([*train, "--out", "t.json", "--plot", "t.png"]) == 0
        (dense,) = Path("t.checkpoints/wrn_10_1-digits-standard-n1-s0").glob("final-*.pt")
        transfer = ["transfer", str(dense), *DIGITS, "--calibration-images", "16", "--plan", plan, "--quiet"]
        more = [
            "--variants",
            "gc",
            "--groups",
            "2",
            "--distill",
            "--time",
            "--quick",
            "--save",
            "nets",
            "--plot",
            "r.png",
        ]
        assert main([*transfer, *more, "--out", "r.json"]) == 0
    finally:
        os.chdir(before)
    return place


# Without --algorithm a training runs the first of each variant, so that two runs give the same bits.
FIXED = {"gc": "auto", "bgc": "two_conv", "lowrank": "two_conv"}


def algorithms_of(row: dict[str, Any]) -> dict[str, str]:
    return {layer["variant"]: layer["algorithm"] for layer in row["convert"]["layers"]}


class TestTraining:
    def test_a_planned_network_is_trained_beside_the_dense_one(self, folder: Path) -> None:
        rows = rows_of(str(folder / "t.json"))
        assert set(rows) == {("standard", 1), ("plan", 1)}
        row = rows["plan", 1]
        assert (row["status"], row["key"], row["paper"]) == ("ok", "wrn_10_1-digits-plan-s0", None)
        assert row["counts"]["params"] == planned_params()
        assert algorithms_of(row) == FIXED

    def test_a_trained_network_is_converted_by_the_plan_and_trained_on(self, folder: Path) -> None:
        rows = rows_of(str(folder / "r.json"))
        assert set(rows) == {("standard", 1), ("plan", 1), ("gc", 2)}
        row = rows["plan", 1]
        assert (row["status"], row["stage"]) == ("ok", "trained")
        assert row["key"] == "wrn_10_1-digits-plan-calibrated-s0"
        assert row["params"]["distill"]
        assert row["error_initial"] is not None
        assert {layer["name"] for layer in row["convert"]["calibration"]["layers"]} == set(REPLACED)
        assert algorithms_of(row) == FIXED
        assert set(row["time"]["phase"]) == {"fwd", "train_step"}
        network = bgcbench.load_converted(folder / "nets" / row["saved"])
        made = {name for name, layer in network.named_modules() if isinstance(layer, VariantConv2d)}
        assert made == set(REPLACED)

    @pytest.mark.parametrize("name", ["t", "r"])
    def test_tables_and_pictures_show_it_by_its_name(
        self, name: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["show", str(folder / f"{name}.json"), "--format", "markdown"]) == 0
        shown = capsys.readouterr().out
        assert "| plan | - |" in shown
        assert "plan: 3 convolutions replaced, GC N=2 x1, BGC N=4 x1, LR r=8 x1" in shown
        assert "plan N=1" not in shown
        assert (folder / f"{name}.png").stat().st_size > 10_000

    def test_other_rows_go_on_with_their_checkpoints_whatever_the_plan(self) -> None:
        """The dense network's checkpoint is that of a run without a plan."""
        from bgcbench.experiments.train import TrainConfig, identity, plan

        asked: dict[str, Any] = {"model": "wrn_10_1", "data": "digits", "groups": (2,)}
        without, planned = TrainConfig(**asked), TrainConfig(**asked, plan=CHOICES)
        for row in plan(without):
            assert identity(without, row.params) == identity(planned, row.params)
        (row,) = [row for row in plan(planned) if row.params.variant == "plan"]
        assert identity(planned, row.params)["plan"] == CHOICES

    def test_without_images_the_plan_is_converted_by_the_closed_form(
        self, plan: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["transfer", "wrn_10_1", "--weights", "none", "--data", "none", "--device", "cpu", "--plan", plan]
        assert main([*words, "--out", "c.json", "--quiet"]) == 0
        white = rows_of("c.json")["plan", 1]["white_loss"]
        assert white["expected"] is None  # its layers differ
        losses = {layer["name"]: layer["loss"] for layer in white["layers"]}
        assert set(losses) == set(REPLACED)
        assert losses[REPLACED[0]] == pytest.approx(1 - 1 / 2, abs=0.05)
        assert losses[REPLACED[1]] == pytest.approx(1 - 2 / 4, abs=0.05)
        assert "plan: 3 convolutions replaced" in capsys.readouterr().out


class TestReports:
    """A plan is no variant at an N: it stands beside all of them, and in none of their comparisons."""

    def test_trainings(self) -> None:
        document = train_document(variants=("standard", "gc", "bgc"), groups=(2, 4))
        without, planned = report_of(document), report_of(with_plan(document))
        (side_by_side, table), (before, _) = planned.tables, without.tables
        assert side_by_side.by_title["N"] == ["1", "plan", "2", "4"]
        assert {cells[1] for title, cells in side_by_side.by_title.items() if title != "N"} == {"3.40 ± 0.40"}
        assert table.by_title["variant"][:2] == ["SC", "plan"]
        assert table.by_title["N"][:2] == ["1", "-"]
        assert side_by_side.title[1] == "plan: 3 convolutions replaced, GC N=4 x2, LR r=8 x1"
        assert before.sections["What this shows"]
        assert side_by_side.sections == before.sections

    def test_conversions(self) -> None:
        document = transfer_document(("gc", "bgc"), epochs=3, control=True)
        without, planned = report_of(document), report_of(with_plan(document))
        pairs = planned.tables[-1]
        assert pairs.title[0].startswith("BGC versus GC")
        assert pairs.cells == without.tables[-1].cells
        assert planned.tables[0].by_title["N"] == ["1", "plan", "2", "4", "8"]

    def test_layers_stand_in_the_order_of_the_network(self) -> None:
        pytest.importorskip("matplotlib", reason="needs matplotlib, the extra 'plot'")
        from bgcbench.plots import heatmap

        whole, some = ["b", "a", "d", "c"], ["b", "c"]
        assert heatmap._in_order([some, whole, whole * 2]) == whole
