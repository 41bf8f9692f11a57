"""``bgcbench approx`` as a user meets it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch
from PIL import Image

from bgcbench import plots, results
from bgcbench.cli import main
from bgcbench.models import build_model
from bgcbench.specs import Choice
from tests.stored import stored

SMALL = ["approx", "--channels", "16", "--groups", "2,4", "--length", "8", "--samples", "60", "--device", "cpu"]
NETWORK = ["approx", "--model", "wrn_10_1", "--weights", "none", "--groups", "2,4", "--calibration-images", "8",
           "--device", "cpu"]  # fmt: skip


@pytest.fixture
def photos(here: Path) -> Path:
    """A folder with eight small images of noise."""
    folder = here / "photos"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        pixels = torch.randint(0, 256, (40, 36, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a network's run that nothing disturbed."""
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("whole") / "r.json"
    assert main([*NETWORK, "--data", "digits", "--quiet", "--out", str(path)]) == 0
    return path


def part_of(whole: Path, rows: int) -> list[dict[str, Any]]:
    """All rows of a run, of which r.json holds as many as are told."""
    document = results.read(whole)
    results.ResultWriter(Path("r.json")).write(msgspec.structs.replace(document, results=document.results[:rows]))
    found: list[dict[str, Any]] = stored(whole)["results"]
    return found


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["--groups", "3"],
                "in_channels=256 is not divisible by groups=3; groups that divide 256 -> 256 channels: 1, 2, 4",
            ),
            (["--groups", "x"], "--groups x must be whole numbers"),
            (["--variants", "bcg"], "did you mean 'bgc'?"),
            (["--input", "gauss"], "unknown input 'gauss': choose from normal, uniform, normal:MU, relu, factor:RHO"),
            (["--input", "factor:2"], "RHO is the share of a common factor, a number from 0 to 1"),
            (["--input", "normal:much"], "MU is a mean in standard deviations, a number from -1000 to 1000"),
            (["--input", ","], "--input is empty"),
            (["--dims", "3"], "--dims 3 must be 1 or 2"),
            (["--samples", "0"], "--samples 0 must be a whole number of at least 1"),
            (["--samples", "11"], "11 gives 352 positions for 384 unknowns an output of BGC N=4: fewer than one"),
            (["--samples", "11"], "use at least 12"),
            (["--length", "1", "--kernel", "4"], "leaves no output"),
            (["--search-samples", "0"], "search_samples=0"),
            (["--stride", "0"], "stride=0 must be a whole number"),
            (["--variants", ","], "--variants is empty"),
            (
                ["--input", "normal:20", "--precision", "fp32"],
                "'normal:20' has too large a mean for --precision fp32: use fp64, or at most 10",
            ),
            (["--precision", "bf16"], "--precision bf16 is not for this command; use fp64, fp32"),
            (["--precision", "fp65"], "unknown precision 'fp65'"),
            (["--preset", "figure3"], "choose from figure1, figure2"),
            (
                ["--preset", "figure1", "--channels", "64"],
                "--preset figure1 fixes the experiment, and --channels changes",
            ),
            (["--preset", "figure1", "--model", "resnet18"], "and --model changes it"),
            (["--plot", "figure.gif"], ".gif"),
            (["--data", "digits"], "--data is for a network; name it with --model"),
            (["--memory", "3"], "--memory is for a network"),
            (["--model", "resnet18"], "--model needs images to run: --data digits, or --data FOLDER"),
            (["--model", "resnet18", "--data", "digits", "--samples", "9"], "--samples describes a layer"),
            (["--model", "resnet18", "--data", "digits", "--input", "relu"], "--input describes a layer"),
            (["--model", "resnet18", "--data", "digits", "--calibration-images", "3"], "must be at least 4"),
            (["--model", "resnet18", "--data", "digits", "--memory", "0"], "--memory 0.0 must be a positive number"),
            (["--model", "resnet18", "--data", "digits", "--where", "5x5"], "unknown where '5x5'"),
            (
                ["--model", "resnet18", "--data", "digits", "--groups", "1"],
                "a standard convolution (N = 1) loses nothing",
            ),
            (["--model", "wrn_11_1", "--data", "digits"], "wrn_11_1: a wide residual network has 6 b + 4 layers"),
            (["--resume", "missing.json"], "missing.json cannot be read"),
            (["--force"], "--force replaces an existing --out file"),
        ],
    )
    def test_a_mistake_is_one_clear_line_before_torch_is_needed(self, arguments, message, here, capsys) -> None:
        assert main(["approx", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert message in err
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--data", "digitz"], "unknown data set 'digitz': did you mean 'digits'?"),
            (["--data", "./nowhere"], "nowhere is not there"),
            (["--data", "empty"], "empty has no images, in its subfolders neither"),
            (["--data", "broken"], "cannot be read as an image"),
            (["--data", "few"], "has 3 images; at least 4 are needed"),
            (["--data", "digits", "--exclude", "layer9.*"], "no convolution of the network is called 'layer9.*'"),
            (["--data", "digits", "--include", "stages.0.0.conv9"], "there are stages.0.0.conv"),
            (["--data", "digits", "--groups", "3"], "groups=3 does not divide stages.0.0.conv1 (16 -> 16)"),
            (["--data", "digits", "--weights", "torn.pth"], "torn.pth is truncated, damaged or not a file that torch"),
            (["--data", "digits", "--weights", "gone.pth"], "there is no such file"),
            (["--data", "digits", "--weights", "other.pth"], "other.pth does not fit wrn_10_1 with 10 classes"),
            (["--data", "digits", "--weights", "default"], "there are no published weights of wrn_10_1"),
            (["--data", "digits", "--memory", "0.001"], "raise --memory, or leave it out with --exclude"),
        ],
    )  # fmt: skip
    def test_what_a_network_run_cannot_use_is_one_line_too(self, arguments, message, here, photos, capsys) -> None:
        (here / "empty").mkdir()
        for name, count in (("few", 3), ("broken", 8)):
            (here / name).mkdir()
            for number in range(count):
                (here / name / f"{number}.png").write_bytes(
                    (photos / "0.png").read_bytes()[: None if name == "few" else 99]
                )
        torch.save(build_model("wrn_10_1").state_dict(), here / "whole.pth")
        torch.save(build_model("wrn_10_2").state_dict(), here / "other.pth")
        (here / "torn.pth").write_bytes((here / "whole.pth").read_bytes()[:5000])
        code = main(["approx", "--model", "wrn_10_1", "--size", "16", "--device", "cpu", "--out", "r.json", *arguments])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_a_device_that_is_not_there_is_exit_3(self, here: Path, capsys) -> None:
        assert main(["approx", "--device", "cuda"]) == 3
        assert "no CUDA device here" in capsys.readouterr().err


class TestSampled:
    def test_a_run_prints_a_table_and_writes_a_valid_file(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--variants", "all"]) == 0
        out, err = capsys.readouterr()
        (path,) = (here / "results").iterdir()
        assert re.fullmatch(r"approx-conv1d-16x16k3-fp64-cpu-\d{8}T\d{6}Z\.json", path.name)
        document = stored(path)
        jsonschema.validate(document, results.schema())
        assert (document["complete"], document["exit_reason"]) == (True, "ok")
        assert document["argv"] == [*SMALL, "--variants", "all"]
        assert len(document["results"]) == 2 * (1 + 7 * 2)  # two inputs; standard, and seven variants at two N
        assert {(fit["variant"], fit["input"]) for fit in document["fits"]} >= {("gc", "normal"), ("bgc", "uniform")}
        methods = {row["params"]["variant"]: row["params"]["solver"] for row in document["results"]}
        assert methods["tlgc"] == "als"
        assert methods["flgc"] == "partition-search"
        assert "search for a partition" in out
        assert "BGC at N=2 can be every standard convolution" in out
        assert (
            "BGC, normal: a slope needs two N with an error above 0; N = 2 has no error to take the logarithm of" in out
        )
        assert "saved 30/30" in err
        assert main(["show", str(path)]) == 0
        assert capsys.readouterr().out == out

    def test_the_table_says_what_was_solved_and_what_theory_says(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--out", "r.json", "--input", "normal,factor:0.5", "--format", "csv"]) == 0
        rows = {
            (r["variant"], r["groups"], r["input"]): r for r in csv.DictReader(io.StringIO(capsys.readouterr().out))
        }
        white = rows["gc", "4", "normal"]
        # 1-D, three taps, length 8 with zero padding: rho = (3 * 8 - 2) / (3 * 8) / 16
        assert float(white["exact_relative_error"]) == pytest.approx(0.75 * 22 / 24 / 16)
        assert float(white["bound_zero_mean"]) == pytest.approx(3 / 16 * 0.75)
        assert float(white["bound_general"]) == pytest.approx(3 * 0.75**2)
        assert float(white["in_sample_factor"]) == pytest.approx(1 - 12 / (60 * 8))
        assert rows["bgc", "4", "factor:0.5"]["bound_general"] == ""
        assert main(["show", "r.json"]) == 0
        assert "Assumption 3.1 (ii) fails: the channels of 'factor:0.5' are not independent" in capsys.readouterr().out

    def test_json_on_stdout_is_the_document_and_leaves_no_file(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--out", "-", "--quick"]) == 0
        document = json.loads(capsys.readouterr().out)
        jsonschema.validate(document, results.schema())
        assert document["quality"] == "quick"
        assert list(here.iterdir()) == []

    def test_quick_draws_fewer_samples_unless_told_how_many(self, here: Path, capsys) -> None:
        quick = ["approx", "--channels", "16", "--groups", "4", "--quick", "--device", "cpu", "--out", "-"]
        assert main(quick) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["params"]["samples"] == 64
        assert main([*quick, "--samples", "70"]) == 0
        assert json.loads(capsys.readouterr().out)["results"][0]["params"]["samples"] == 70

    def test_a_dry_run_says_the_plan_and_touches_nothing(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--dry-run", "--out", "new/x.json", "--plot", "x.png"]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert "plan: 4 rows" not in err  # two inputs
        assert "plan: 8 rows, 60 convolutions and inputs (480 positions)" in err
        assert list(here.iterdir()) == []

    def test_few_data_are_warned_of_with_the_reason(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--samples", "12", "--out", "r.json"]) == 0  # 96 positions, 48 unknowns
        err = capsys.readouterr().err
        assert "only 2.0 data an unknown for BGC N=2" in err
        assert "low by a factor of about 0.50" in err
        assert any("only 2.0 data" in warning for warning in stored(here / "r.json")["warnings"])

    def test_an_n_that_does_not_divide_is_a_row_where_it_is_to_be_skipped(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--groups", "3,4", "--skip-invalid", "--out", "r.json"]) == 0
        document = stored(here / "r.json")
        assert [row["status"] for row in document["results"]] == ["invalid", "invalid", "ok", "ok"] * 2
        assert "not divisible by groups=3" in capsys.readouterr().out

    def test_an_existing_file_is_refused_without_force(self, here: Path, capsys) -> None:
        for option in ("--out", "--plot"):
            (here / "mine.png").write_text("mine")
            assert main([*SMALL, option, "mine.png"]) == 4
            assert "mine.png exists" in capsys.readouterr().err
            assert (here / "mine.png").read_text() == "mine"
        assert main([*SMALL, "--out", "mine.png", "--force"]) == 0

    def test_a_resumed_run_keeps_its_rows_and_adds_what_is_asked_for(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--input", "normal", "--groups", "4", "--out", "r.json"]) == 0
        before = stored(here / "r.json")
        assert main(["approx", "--resume", "r.json", "--groups", "2", "--input", "relu"]) == 0
        after = stored(here / "r.json")
        assert len(after["results"]) == 2 * 2 * 2
        kept = {row["key"]: row for row in after["results"]}
        assert all(kept[row["key"]] == row for row in before["results"])
        assert main([*SMALL, "--input", "normal,relu", "--groups", "2,4", "--out", "whole.json"]) == 0
        assert stored(here / "whole.json")["results"] == after["results"]
        capsys.readouterr()
        assert main(["approx", "--resume", "r.json", "--samples", "61"]) == 2
        assert "its samples is 60 and 61 is asked for" in capsys.readouterr().err
        assert main(["profile", "--resume", "r.json"]) == 2
        assert "holds a 'approx' run, not 'profile'" in capsys.readouterr().err

    def test_numbers_do_not_depend_on_threads(self, here: Path) -> None:
        errors = []
        for threads in ("1", "2"):
            assert main([*SMALL, "--threads", threads, "--out", f"{threads}.json", "--quiet"]) == 0
            errors.append([row["relative_error"] for row in stored(here / f"{threads}.json")["results"]])
        assert errors[0] == pytest.approx(errors[1], rel=1e-12, abs=1e-20)

    def test_table1_and_compare_are_for_profile_files(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--out", "r.json", "--quiet", "--quick"]) == 0
        capsys.readouterr()
        for arguments in (["show", "r.json", "--table1"], ["compare", "r.json", "r.json"]):
            assert main(arguments) == 2
            assert "holds a 'approx' run, not 'profile'" in capsys.readouterr().err


class TestNetwork:
    def test_a_run_prints_a_table_and_writes_a_valid_file(self, here: Path, capsys) -> None:
        pytest.importorskip("sklearn")
        assert main([*NETWORK, "--data", "digits"]) == 0
        out, err = capsys.readouterr()
        (path,) = (here / "results").iterdir()
        assert re.fullmatch(r"approx-wrn_10_1-digits-cpu-\d{8}T\d{6}Z\.json", path.name)
        document = stored(path)
        jsonschema.validate(document, results.schema())
        assert document["network"]["weights"] == "none"
        assert {kept["reason"] for kept in document["network"]["kept"]} == {"the first convolution", "a shortcut"}
        layers = list(dict.fromkeys(row["params"]["layer"] for row in document["results"]))
        assert layers == [f"stages.{stage}.0.conv{conv}" for stage in range(3) for conv in (1, 2)]
        assert len(document["results"]) == 6 * 4
        for row in document["results"]:
            errors = row["output_relative_error"]
            assert errors["calibrated"] <= errors["white"]
            if (row["params"]["variant"], row["params"]["groups"]) == ("bgc", 2):
                assert errors["white"] < 1e-12
        assert "Which layers tolerate what" in out
        assert "at equal parameters, BGC N=4 loses less than GC N=2" in out
        assert "16 x 16 px" in out
        assert "saved 24/24" in err
        assert main(["show", str(path)]) == 0
        assert capsys.readouterr().out == out
        # Layers that lose most come first.
        table = re.findall(r"^\| (stages\S+) \| 3x3", out, re.MULTILINE)
        loss = {name: sum(r["output_relative_error"]["calibrated"] for r in document["results"]
                          if r["params"]["layer"] == name) for name in layers}  # fmt: skip
        assert table == sorted(layers, key=lambda name: -loss[name])

    def test_a_folder_of_images_a_file_of_weights_and_a_choice_of_layers(self, here: Path, photos, capsys) -> None:
        torch.save({"state_dict": build_model("wrn_10_1").state_dict()}, here / "mine.pth")
        arguments = ["approx", "--model", "wrn_10_1", "--weights", "mine.pth", "--data", "photos", "--size", "20x24",
                     "--where", "none", "--include", "stages.1.0.conv2", "--groups", "4", "--device", "cpu",
                     "--variants", "gc,tlgc,flgc,lgc,shuffle", "--out", "r.json"]  # fmt: skip
        assert main(arguments) == 0
        document = stored(here / "r.json")
        assert {row["params"]["layer"] for row in document["results"]} == {"stages.1.0.conv2"}
        assert [row["params"]["variant"] for row in document["results"]] == ["gc", "shuffle", "lgc", "flgc", "tlgc"]
        assert {row["params"]["weights"] for row in document["results"]} == {"mine.pth"}
        assert {row["params"]["calibration_images"] for row in document["results"]} == {8}
        assert document["network"]["weights_sha256"] == document["settings"]["weights_sha256"]
        assert any("photos has 8 images, fewer than the 256 asked for" in warning for warning in document["warnings"])
        gc, shuffled, *_ = document["results"]
        assert gc["output_relative_error"] != shuffled["output_relative_error"]  # other rows see other groups

    def test_a_rank_has_its_column_and_each_layer_its_n(self, here: Path, photos, capsys) -> None:
        arguments = ["approx", "--model", "wrn_10_1", "--weights", "none", "--data", "photos", "--size", "12",
                     "--where", "none", "--include", "stages.?.0.conv2", "--variants", "gc", "--groups", "4",
                     "--ranks", "17,5,4", "--device", "cpu", "--out", "r.json"]  # fmt: skip
        assert main(arguments) == 2
        refused = (
            "bgcbench: rank=17 is too high for stages.0.0.conv2 (16 -> 16); rank that fits all: 1 to 16; drop what does"
        )
        assert refused in capsys.readouterr().err
        assert main([*arguments, "--skip-invalid"]) == 0
        out = capsys.readouterr().out
        assert "| GC N=4 | LR r=4 | LR r=5 | LR r=17 |" in out
        rows = {row["key"]: row for row in stored(here / "r.json")["results"]}
        assert len(rows) == 3 * 4
        at = {(row["params"]["layer"], row["params"].get("rank")): row for row in rows.values()}
        assert [at[f"stages.{stage}.0.conv2", 5]["params"]["groups"] for stage in range(3)] == [2, 5, 11]
        assert [at[f"stages.{stage}.0.conv2", 17]["status"] for stage in range(3)] == ["invalid", "ok", "ok"]
        for stage in range(3):
            four, five = (at[f"stages.{stage}.0.conv2", rank]["output_relative_error"] for rank in (4, 5))
            assert four["white"] > five["white"]
        assert main(["show", "r.json", "--format", "csv"]) == 0
        lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [line["rank"] for line in lines[:4]] == ["", "4", "5", "17"]
        assert main(["show", "r.json"]) == 0
        assert capsys.readouterr().out == out

    def test_without_published_weights_the_run_says_that_the_network_is_untrained(self, here: Path, capsys) -> None:
        arguments = [word for word in NETWORK if word not in ("--weights", "none")]
        assert main([*arguments, "--data", "digits", "--groups", "2", "--out", "r.json"]) == 0
        assert "no published weights: the network is untrained" in capsys.readouterr().err

    def test_weights_that_are_nowhere_name_the_file_and_the_ways_out(self, here: Path, monkeypatch, capsys) -> None:
        def offline(*_: object, **__: object) -> None:
            raise OSError("Network is unreachable")

        monkeypatch.setenv("TORCH_HOME", str(here / "cache"))
        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        assert main(["approx", "--model", "resnet18", "--data", "digits", "--device", "cpu"]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        for part in ("resnet18-", ".pth is not in", "Network is unreachable", "--weights FILE", "--weights none"):
            assert part in message

    def test_a_resumed_run_computes_only_the_layers_that_are_missing(
        self, here: Path, whole: Path, monkeypatch, capsys
    ) -> None:
        rows = part_of(whole, 9)
        from bgcbench.conversion.approximability import Evaluator

        seen: list[str] = []
        evaluate = Evaluator.evaluate
        monkeypatch.setattr(
            Evaluator, "evaluate", lambda self, *cell: seen.append(self.layer.name) or evaluate(self, *cell)
        )
        assert main(["approx", "--resume", "r.json"]) == 0
        assert stored(here / "r.json")["results"] == rows
        assert len(seen) == len(rows) - 9

    def test_a_resumed_run_refuses_other_weights(self, here: Path, capsys) -> None:
        torch.save(build_model("wrn_10_1").state_dict(), here / "mine.pth")
        arguments = [*NETWORK, "--weights", "mine.pth", "--data", "digits", "--groups", "2", "--out", "r.json"]
        assert main(arguments) == 0
        torch.save(build_model("wrn_10_1").state_dict(), here / "mine.pth")
        assert main(["approx", "--resume", "r.json"]) == 2
        assert "its weights_sha256 was" in capsys.readouterr().err

    def test_a_resumed_run_refuses_other_images_of_the_same_name(self, here: Path, photos: Path, capsys) -> None:
        arguments = [*NETWORK, "--data", "photos", "--size", "16", "--groups", "2", "--out", "r.json"]
        assert main(arguments) == 0
        (photos / "0.png").rename(photos / "9.png")
        assert main(["approx", "--resume", "r.json", "--groups", "4"]) == 2
        assert "its data_sha256 was" in capsys.readouterr().err

    def test_batches_and_memory_may_change_on_resume_and_change_no_row(self, here: Path, whole: Path, capsys) -> None:
        rows = part_of(whole, 3)
        assert main(["approx", "--resume", "r.json", "--batch", "5", "--memory", "0.1"]) == 0
        again = stored(here / "r.json")["results"]
        for before, after in zip(rows, again, strict=True):
            errors = after["output_relative_error"]
            assert errors == pytest.approx(before["output_relative_error"], rel=1e-6, abs=1e-9)

    def test_a_row_that_fails_is_recorded_and_the_others_are_computed(self, here: Path, monkeypatch, capsys) -> None:
        from bgcbench.conversion.approximability import Evaluator

        evaluate = Evaluator.evaluate

        def failing(self: Evaluator, choice: Choice) -> Any:
            if (self.layer.name, choice.variant) == ("stages.1.0.conv1", "gc"):
                raise torch.linalg.LinAlgError("the matrix is singular")
            return evaluate(self, choice)

        monkeypatch.setattr(Evaluator, "evaluate", failing)
        assert main([*NETWORK, "--data", "digits", "--out", "r.json"]) == 1
        document = stored(here / "r.json")
        failed = [row for row in document["results"] if row["status"] == "error"]
        assert [row["params"]["layer"] for row in failed] == ["stages.1.0.conv1"] * 2
        assert {row["reason"] for row in failed} == {"_LinAlgError: the matrix is singular"}
        assert document["exit_reason"] == "partial"
        out, err = capsys.readouterr()
        assert "the matrix is singular" in out
        assert "saved 22/24" in err
        monkeypatch.undo()
        monkeypatch.chdir(here)
        assert main(["approx", "--resume", "r.json"]) == 0
        assert stored(here / "r.json")["exit_reason"] == "ok"

    def test_weights_that_are_no_numbers_end_the_rows_of_the_layers_that_they_reach(self, here: Path, capsys) -> None:
        model = build_model("wrn_10_1")
        with torch.no_grad():
            model.stages[1][0].conv1.weight[0, 0] = torch.nan
        torch.save(model.state_dict(), here / "nan.pth")
        arguments = [*NETWORK, "--weights", "nan.pth", "--data", "digits", "--out", "r.json"]
        assert main(arguments) == 1
        rows = stored(here / "r.json")["results"]
        reasons = {row["params"]["layer"]: row["reason"] for row in rows if row["status"] == "error"}
        assert list(reasons) == ["stages.1.0.conv1", "stages.1.0.conv2", "stages.2.0.conv1", "stages.2.0.conv2"]
        assert reasons["stages.1.0.conv1"].startswith("the weights of stages.1.0.conv1 are not finite")
        where = "stages.1.0.conv1 puts out numbers that are not finite (weight holds such)"
        assert reasons["stages.1.0.conv2"].startswith(f"the inputs of stages.1.0.conv2 are not finite: {where}")
        assert {row["status"] for row in rows if row["params"]["layer"] not in reasons} == {"ok"}
        assert where in capsys.readouterr().out

    def test_a_dry_run_names_what_is_looked_at_and_what_is_kept(self, here: Path, capsys) -> None:
        assert main([*NETWORK, "--data", "digits", "--dry-run"]) == 0
        err = capsys.readouterr().err
        assert "  stages.0.0.conv1: 16 -> 16" in err
        assert "  kept: stem (the first convolution)" in err
        assert list(here.iterdir()) == []

    def test_groups_that_fit_nowhere_are_refused_even_where_they_may_be_skipped(self, here: Path, capsys) -> None:
        assert main([*NETWORK, "--data", "digits", "--groups", "7", "--skip-invalid"]) == 2
        assert "no N of --groups divides the channels of any convolution" in capsys.readouterr().err

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_leaves_a_valid_file_that_can_be_resumed(
        self, number: signal.Signals, here: Path, whole: Path, monkeypatch, capsys
    ) -> None:
        write = results.ResultWriter.write

        def interrupted(writer: results.ResultWriter, document: results.Document) -> None:
            write(writer, document)
            monkeypatch.setattr(results.ResultWriter, "write", write)
            os.kill(os.getpid(), number)

        monkeypatch.setattr(results.ResultWriter, "write", interrupted)
        assert main([*NETWORK, "--data", "digits", "--out", "r.json"]) == 128 + number
        document = stored(here / "r.json")
        assert document["exit_reason"] == "interrupted"
        assert 4 <= len(document["results"]) < 24
        assert "resume with --resume r.json" in capsys.readouterr().err
        assert main(["approx", "--resume", "r.json"]) == 0
        assert stored(here / "r.json")["results"] == stored(whole)["results"]


def test_inputs_whose_channels_are_all_equal_leave_nothing_to_divide_by(here: Path, capsys) -> None:
    for seed in ("0", "1", "2", "3"):
        assert main(["approx", "--channels", "8", "--samples", "40", "--groups", "4,8", "--input", "factor:1", "--seed",
                     seed, "--device", "cpu", "--out", f"{seed}.json"]) == 0  # fmt: skip
        assert main(["show", f"{seed}.json"]) == 0


def test_a_large_mean_costs_no_digits_of_the_standard_error(here: Path) -> None:
    errors = {}
    for law in ("normal", "normal:1000"):
        assert main([*SMALL, "--channels", "32", "--samples", "200", "--input", law, "--out", "r.json", "--force",
                     "--quiet"]) == 0  # fmt: skip
        errors[law] = {
            (row["params"]["variant"], row["params"]["groups"]): row for row in stored(here / "r.json")["results"]
        }
    # BGC does not see what the channels share, so its error and its spread are those of the same inputs without a mean.
    plain, shifted = errors["normal"]["bgc", 4], errors["normal:1000"]["bgc", 4]
    assert shifted["error_se"] == pytest.approx(plain["error_se"], rel=0.1)
    assert shifted["error"] == pytest.approx(plain["error"], rel=0.1)


def test_taps_that_only_meet_padding_are_no_unknowns(here: Path, capsys) -> None:
    # kernel 7 on 3 values: taps 1 to 5 of 0..6 meet the input
    assert main(["approx", "--channels", "8", "--kernel", "7", "--length", "3", "--groups", "4", "--samples", "60",
                 "--variants", "bgc", "--input", "normal", "--device", "cpu", "--out", "-"]) == 0  # fmt: skip
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert row["in_sample_factor"] == pytest.approx(1 - 2 * 5 * 8 / 4 / (60 * 3))


class TestPlot:
    def test_the_picture_comes_after_the_file_and_also_from_show(self, here: Path, capsys) -> None:
        pytest.importorskip("matplotlib")
        assert main([*SMALL, "--groups", "2,4,8", "--out", "r.json", "--plot", "now.svg"]) == 0
        assert "drawn to now.svg" in capsys.readouterr().err
        assert main(["show", "r.json", "--plot", "later.svg"]) == 0
        assert (here / "now.svg").read_bytes() == (here / "later.svg").read_bytes()
        assert main(["show", "r.json", "--plot", "later.svg"]) == 4
        assert main(["show", "r.json", "--plot", "later.svg", "--force", "--picture", "figure2"]) == 0
        assert (here / "now.svg").read_bytes() != (here / "later.svg").read_bytes()

    def test_without_matplotlib_the_result_is_safe_and_one_line_names_the_command(
        self, here, monkeypatch, capsys
    ) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main([*SMALL, "--out", "r.json", "--plot", "x.png"]) == 2
        out, err = capsys.readouterr()
        assert "| BGC | 4 |" in out.replace("normal | ", "")
        assert "pip install 'bgcbench[plot]'" in err.splitlines()[-1]
        assert stored(here / "r.json")["complete"]
        assert not (here / "x.png").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--picture", "figure1"], "--picture is for --plot FILE"),
            (["--force"], "--force is for --plot FILE"),
            (["--plot", "x.doc"], ".doc"),
            (["--plot", "x.png", "--table1"], "without --table1"),
            (["--plot", "x.png", "--picture", "heatmap"], "heatmap"),
        ],
    )
    def test_show_refuses_pictures_that_make_no_sense(self, arguments, message, here, capsys) -> None:
        assert main([*SMALL, "--out", "r.json", "--quiet", "--quick"]) == 0
        capsys.readouterr()
        assert main(["show", "r.json", *arguments]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not any(path.suffix == ".png" for path in here.iterdir())

    def test_a_figure_preset_draws_that_figure(self, here: Path, monkeypatch) -> None:
        drawn: list[str | None] = []
        monkeypatch.setattr(plots, "draw", lambda document, path, picture: drawn.append(picture))
        assert main(["approx", "--preset", "figure2", "--samples", "16", "--device", "cpu", "--quiet",
                     "--out", "figure2.json", "--plot", "figure2.png"]) == 0  # fmt: skip
        assert drawn == ["figure2"]
        document = stored(here / "figure2.json")
        assert (document["config"]["in_channels"], document["config"]["groups"]) == (256, [4, 8, 16, 32, 64])
