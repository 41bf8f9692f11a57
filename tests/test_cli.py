"""The command line as a user meets it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import bgcbench
from bgcbench import results
from bgcbench.cli import main, output
from bgcbench.cli.output import Said
from bgcbench.convs.gc import GroupConv2d
from bgcbench.experiments.profile_run import ProfileRun, Update
from bgcbench.results import files
from tests.conftest import ROOT
from tests.example import example_document
from tests.processes import CLOSED, Forked
from tests.stored import stored

Cli = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ["profile", "--channels", "16", "--batch", "4", "--size", "5", "--groups", "2", "--device", "cpu",
         "--max-time", "0.01"]  # fmt: skip
LIGHT = [*SMALL, "--quick"]

pytestmark = pytest.mark.usefixtures("brisk", "one_thread")


@pytest.fixture
def example(here: Path) -> Path:
    path = here / "example.json"
    results.ResultWriter(path).write(example_document())
    return path


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a finished run has written."""
    path = tmp_path_factory.mktemp("light") / "r.json"
    assert main([*LIGHT, "--out", str(path), "--quiet"]) == 0
    return path.read_text(encoding="utf-8")


@pytest.fixture
def finished(here: Path, light: str) -> Path:
    """Its file, in the current folder."""
    (here / "r.json").write_text(light, encoding="utf-8")
    return here / "r.json"


def in_shell(arguments: list[str], ending: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``bgcbench ARGUMENTS ENDING``, typed into a shell."""
    line = f"{shlex.join([sys.executable, '-m', 'bgcbench', *arguments])} {ending}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False, timeout=120)  # fmt: skip


def while_measuring(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do ``action`` once a run has begun to measure."""
    look = ProfileRun._look_at_each

    def looking(*arguments: Any) -> Iterator[Update]:
        action()
        yield from look(*arguments)

    monkeypatch.setattr(ProfileRun, "_look_at_each", looking)


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["profile", "--groups", "3"],
                "in_channels=1024 is not divisible by groups=3; groups that divide 1024 -> 1024 channels: 1, 2, 4",
            ),
            (["profile", "--groups", "2,x"], "--groups 2,x must be whole numbers separated by commas"),
            (["profile", "--groups", "0"], "groups=0 must be a whole number of at least 1"),
            (["profile", "--groups", "-2"], "groups=-2"),
            (["profile", "--variants", "bcg"], "unknown variant 'bcg': did you mean 'bgc'?"),
            (["profile", "--channels", "0"], "in_channels=0"),
            (["profile", "--batch", "-1"], "batch=-1"),
            (["profile", "--kernel", "9", "--size", "0"], "height=0"),
            (["profile", "--kernel", "8", "--size", "1"], "leaves no output"),
            (["profile", "--size", "7x7x7"], "--size 7x7x7"),
            (["profile", "--size", "\u00b2"], "--size \u00b2"),
            (["profile", "--algorithm", "concat", "--variants", "gc"], "no variant asked for has it"),
            (["profile", "--out", "-", "--format", "csv"], "--out - prints JSON, not csv"),
            (["profile", "--force"], "--force replaces an existing --out file"),
            (["profile", "--no-reference", "--variants", "standard,gc"], "--no-reference leaves the standard"),
            (["profile", "--no-reference", "--groups", "1,2"], "--no-reference leaves the standard"),
            (["profile", "--chanels", "4"], "--chanels"),
            (["profile", "--channels", "many"], "many"),
            (["profile", "--precision", "tf32", "--device", "cpu"], "tf32 is a mode of CUDA devices"),
            (["profile", "--device", "tpu"], "unknown device 'tpu'"),
            (["profile", "--preset", "table5"], "did you mean 'table4'"),
            (["profile", "--preset", "table4", "--channels", "64"], "--channels changes it"),
            (["profile", "--format", "yaml"], "unknown format 'yaml'"),
            (["profile", "--resume", "missing.json"], "missing.json cannot be read"),
            (["profile", "--resume", "a.json", "--out", "b.json"], "--resume writes to the file it continues"),
            (["profil"], "No such command 'profil'"),
            (["show"], "show needs a result FILE"),
            (["show", "missing.json"], "missing.json cannot be read"),
            (["show", "--channels", "8"], "--channels describes a layer for --table1"),
            (["show", "--table1", "--groups", "7"], "not divisible by groups=7"),
            (["doctor", "--device", "moon"], "unknown device 'moon'"),
            (["compare", "a.json", "b.json"], "a.json cannot be read"),
            (["compare", "a.json", "b.json", "--fail-on", "-1"], "--fail-on -1.0"),
            (["compare", "a.json"], "Missing argument"),
        ],
    )
    def test_a_mistake_is_one_clear_line_and_exit_2(self, arguments, message, here, capsys) -> None:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert message in err
        assert list(here.iterdir()) == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    @pytest.mark.parametrize("command", [["profile"], ["doctor"]])
    def test_a_device_that_is_not_there_is_exit_3(self, command: list[str], here: Path, capsys) -> None:
        assert main([*command, "--device", "cuda:1"]) == 3
        assert "--device cuda:1: no CUDA device here" in capsys.readouterr().err
        assert list(here.iterdir()) == []

    def test_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"bgcbench {bgcbench.__version__}\n"
        assert main([]) == 0
        assert "profile" in capsys.readouterr().out
        assert main(["profile", "--help"]) == 0
        assert "--groups" in capsys.readouterr().out


class TestProfile:
    def test_a_run_prints_a_table_and_writes_a_valid_file(self, here: Path, capsys) -> None:
        assert main(SMALL) == 0
        out, err = capsys.readouterr()
        (path,) = (here / "results").iterdir()
        assert re.fullmatch(r"profile-conv16x16k3-fp32-nchw-cpu-\d{8}T\d{6}Z\.json", path.name)
        document = stored(path)
        jsonschema.validate(document, results.schema())
        assert document["complete"]
        assert document["exit_reason"] == "ok"
        assert document["environment"]["device"]["type"] == "cpu"
        assert document["argv"] == SMALL
        assert document["settings"]["tf32"] == {"conv": False, "matmul": False}
        assert [row["params"]["variant"] for row in document["results"]] == ["standard", "gc", "bgc"]
        assert "| BGC | 2 |" in out
        assert "Verdict (fwd+bwd)" in out
        assert "\x1b[" not in out
        assert f"saved 3/3 to results/{path.name}" in err
        main(["show", str(path)])
        assert capsys.readouterr().out == out

    def test_json_on_stdout_is_the_document_and_leaves_no_file(self, here: Path, capsys) -> None:
        assert main([*LIGHT, "--out", "-"]) == 0
        document = json.loads(capsys.readouterr().out)
        jsonschema.validate(document, results.schema())
        assert document["quality"] == "quick"
        assert list(here.iterdir()) == []

    def test_quiet_says_nothing_on_stderr(self, here: Path, capsys) -> None:
        assert main([*LIGHT, "--quiet", "--format", "csv"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert {row["phase"] for row in csv.DictReader(io.StringIO(out))} == {"fwd"}

    def test_threads_may_be_as_many_as_others_leave_cores(self, here: Path, capsys, monkeypatch) -> None:
        monkeypatch.setattr("bgcbench.measure.load.free_cores", lambda: 3)
        assert main([*LIGHT, "--threads", "auto", "--out", "r.json"]) == 0
        assert "(3 threads)" in capsys.readouterr().err
        document = stored(here / "r.json")
        assert (document["config"]["threads"], document["environment"]["cpu"]["threads"]) == (3, 3)
        for text in ("some", "1,2", "0"):
            assert main([*LIGHT, "--threads", text]) == 2
            assert "threads" in capsys.readouterr().err

    def test_a_dry_run_says_the_plan_and_touches_nothing(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--dry-run", "--out", "new/x.json"]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        assert "plan: 3 rows x fwd, fwd_bwd" in err
        assert "bgc-n2-16x16" in err
        assert list(here.iterdir()) == []

    def test_after_one_round_there_is_a_first_table_with_the_final_columns(self, here: Path, capsys) -> None:
        assert main([*SMALL, "--out", "r.json", "--format", "table"]) == 0
        out, err = capsys.readouterr()
        _, found, first = err.partition("so far, and it goes on:\n")
        assert found
        assert "so far" not in first
        for text in (first, out):  # their units may differ
            (heads,) = [line for line in text.splitlines() if line.startswith("N  ")]
            assert {"N", "GC", "BGC", "speed-up", "params"} <= set(heads.split())
        for more in (["--quick"], ["--quiet"]):
            assert main([*SMALL, *more, "--out", "r.json", "--force"]) == 0
            assert "so far" not in capsys.readouterr().err

    def test_a_picture_is_drawn_or_it_is_said_why_not(self, here: Path, capsys) -> None:
        pytest.importorskip("matplotlib")
        assert main([*SMALL, "--out", "r.json", "--plot", "p.png"]) == 0
        assert "drawn to p.png" in capsys.readouterr().err
        assert (here / "p.png").exists()
        for row in (document := stored(here / "r.json"))["results"]:  # as a quick look at a slow layer leaves it
            for phase in row["phases"].values():
                phase["rounds"] = [1] * len(phase["rounds"])
        (here / "few.json").write_text(json.dumps(document))
        assert main(["profile", "--resume", "few.json", "--plot", "q.png"]) == 0
        assert "q.png is not drawn: no row has what a picture shows" in capsys.readouterr().err
        assert not (here / "q.png").exists()

    def test_a_log_hears_of_a_long_wait(self, monkeypatch, capsys) -> None:
        times = iter([0.0, 1.0, 16.0, 17.0, 18.0, 31.5, 40.0])
        monkeypatch.setattr(output.time, "monotonic", lambda: next(times))
        output.with_progress(
            iter([Said("first call"), Said("second call"), Said("round 1"), Said("round 2")]), quiet=False
        )
        assert capsys.readouterr().err.splitlines() == ["second call"]

    def test_a_log_has_the_table_once_and_a_terminal_as_often_as_costs_little(self, monkeypatch) -> None:
        clock = iter([0.0, 0.5, 11.0, 12.0, 12.5, 30.0])  # begun, drawn in 0.5 s, ...
        monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(output, "look", lambda document: ("a table",))
        document: Any = None
        looks = output.Looks()
        assert [looks.of(document, quick=False) for _ in range(2)] == [("a table",), ()]
        assert output.Looks().of(document, quick=True) == ()
        clock = iter([0.0, 0.5, 10.0, 11.0, 11.5, 21.0])  # 20 times what it costs: 5 %
        monkeypatch.setenv("FORCE_COLOR", "1")
        looks = output.Looks()
        found = [looks.of(document, quick=True) for _ in range(4)]
        assert found == [("a table",), (), ("a table",), ()]

    def test_on_a_terminal_the_last_table_stands_below_the_bar(self, monkeypatch, capsys) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        output.with_progress(
            iter([Said("round 1", 0.5, table=("N  [GC]", "1  2.5"), warnings=("beware",)), Said("round 2", 0.7)]),
            quiet=False,
        )
        err = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
        assert "beware" in err
        assert re.search(r"round 2 .*\n *N  \[GC\] *\n *1  2.5", err)

    def test_a_wait_is_told(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(output, "EVERY_S", 0.02)
        for quiet in (False, True):
            with output.waiting("converting", quiet=quiet):
                time.sleep(0.1)
            assert ("converting\n" in capsys.readouterr().err) is not quiet
        monkeypatch.setenv("FORCE_COLOR", "1")
        with output.waiting("converting", quiet=False):
            time.sleep(0.1)
        assert "converting" in capsys.readouterr().err

    def test_an_existing_file_is_refused_without_force(self, here: Path, capsys) -> None:
        (here / "r.json").write_text("mine")
        assert main([*LIGHT, "--out", "r.json", "--dry-run"]) == 4  # what the run would refuse
        assert main([*LIGHT, "--out", "r.json"]) == 4
        assert "exists; use --force" in capsys.readouterr().err
        assert (here / "r.json").read_text() == "mine"
        assert main([*LIGHT, "--out", "r.json", "--force"]) == 0
        assert stored(here / "r.json")["complete"]

    @pytest.mark.parametrize("out", ["/dev/null/r.json", "file/r.json", "."])
    def test_an_unwritable_place_is_exit_4_before_anything_runs(self, out: str, here: Path, capsys) -> None:
        (here / "file").touch()
        assert main([*LIGHT, "--out", out]) == 4
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "--out" in err

    def test_a_row_out_of_memory_is_exit_1_and_the_file_is_valid(self, here: Path, capsys, monkeypatch) -> None:
        def greedy(self: GroupConv2d, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        monkeypatch.setattr(GroupConv2d, "forward", greedy)
        assert main([*LIGHT, "--out", "r.json"]) == 1
        document = stored(here / "r.json")
        assert [row["status"] for row in document["results"]] == ["ok", "oom", "ok"]
        assert document["exit_reason"] == "partial"
        assert "saved 2/3" in capsys.readouterr().err

    def test_a_batch_no_machine_can_hold_is_a_row_and_not_a_crash(self, here: Path, capsys) -> None:
        assert main([*LIGHT, "--batch", "1000000000", "--out", "r.json"]) == 1
        assert {row["status"] for row in stored(here / "r.json")["results"]} == {"oom"}
        assert "use a smaller --batch" in capsys.readouterr().out

    def test_skipped_groups_are_invalid_rows_and_exit_0(self, here: Path) -> None:
        assert main([*LIGHT, "--groups", "2,3", "--skip-invalid", "--out", "r.json", "--quiet"]) == 0
        document = stored(here / "r.json")
        assert [row["status"] for row in document["results"]] == ["ok", "ok", "ok", "invalid", "invalid"]
        assert document["exit_reason"] == "ok"

    def test_a_full_disk_in_the_middle_of_a_run_loses_nothing(self, here: Path, capsys, monkeypatch) -> None:
        write, target = results.write_atomically, here / "r.json"

        def full(path: Path, content: bytes) -> os.stat_result:
            if path.name == target.name:
                raise OSError(28, "No space left on device")
            return write(path, content)

        monkeypatch.setattr(files, "write_atomically", full)
        monkeypatch.setattr("tempfile.tempdir", str(here))
        assert main([*LIGHT, "--out", "r.json"]) == 4
        out, err = capsys.readouterr()
        (rescued,) = here.glob("bgcbench-rescued-*")
        assert stored(rescued)["complete"]
        assert f"r.json could not be written (No space left on device); the result was rescued to {rescued.name}" in err
        assert "| BGC | 2 |" in out

    def test_a_run_that_breaks_off_leaves_a_valid_file_and_one_that_completes_it_no_word_of_that(
        self, here: Path, capsys, monkeypatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patched:
            patched.setattr("bgcbench.experiments.profile_run.ProfileRun._settle", broken)
            with pytest.raises(ZeroDivisionError):
                main([*LIGHT, "--out", "r.json", "--quiet"])
        document = stored(here / "r.json")
        assert (document["exit_reason"], document["failure"]) == ("error", "ZeroDivisionError: a bug")
        assert main(["show", "r.json"]) == 0
        assert "not complete (error): it broke off with ZeroDivisionError: a bug" in capsys.readouterr().out
        assert main(["profile", "--resume", "r.json", "--quiet"]) == 0
        whole = stored(here / "r.json")
        assert (whole["exit_reason"], whole["failure"], whole["complete"]) == ("ok", None, True)
        assert "broke off" not in capsys.readouterr().out

    def test_while_a_resumed_run_measures_its_file_does_not_say_it_has_ended(self, finished: Path, monkeypatch) -> None:
        seen: list[tuple[object, ...]] = []
        write = results.ResultWriter.write

        def watched(self: results.ResultWriter, document: results.Document) -> None:
            seen.append((document.exit_reason, document.complete, document.finished_at is None))
            write(self, document)

        monkeypatch.setattr(results.ResultWriter, "write", watched)
        assert main(["profile", "--resume", "r.json", "--groups", "4", "--quiet"]) == 0
        assert set(seen[:-1]) == {("running", False, True)}
        assert seen[-1] == ("ok", True, False)

    def test_a_second_run_on_the_same_file_is_refused_while_the_first_lives(
        self, here: Path, cli: Cli, monkeypatch
    ) -> None:
        second: list[subprocess.CompletedProcess[str]] = []
        while_measuring(monkeypatch, lambda: second.append(cli(*LIGHT, "--out", "r.json", "--force")))
        assert main([*LIGHT, "--out", "r.json", "--quiet"]) == 0
        assert (second[0].returncode, second[0].stdout) == (4, "")
        (line,) = second[0].stderr.splitlines()
        assert "--out r.json is being written by another run (process " in line
        assert [path.name for path in here.iterdir()] == ["r.json"]

    def test_a_run_whose_file_somebody_else_has_written_is_exit_4_and_keeps_both(
        self, here: Path, capsys, monkeypatch
    ) -> None:
        while_measuring(monkeypatch, lambda: (here / "r.json").write_text("theirs"))
        assert main([*LIGHT, "--out", "r.json"]) == 4
        (rescued,) = here.glob("bgcbench-rescued-*-r.json")
        message = f"(another program has written it meanwhile); the result was rescued to {rescued.name}"
        assert message in capsys.readouterr().err
        assert (here / "r.json").read_text() == "theirs"
        assert stored(rescued)["complete"]

    def test_resume_needs_no_other_option_and_measures_only_what_is_missing(self, finished: Path, capsys) -> None:
        document = stored(finished)
        document["results"][1] |= {"status": "interrupted", "reason": "cut short"}
        results.ResultWriter(finished).write(document)
        assert main(["profile", "--resume", "r.json"]) == 0
        again = stored(finished)
        assert [row["key"] for row in again["results"]] == [row["key"] for row in document["results"]]
        assert again["results"][0] == document["results"][0]
        assert again["results"][1]["status"] == "ok"
        assert again["exit_reason"] == "ok"
        assert [row["interleaved"] for row in again["results"]] == [1, 2, 1]

    def test_a_resumed_grid_may_grow_but_its_settings_may_not_change(self, finished: Path, capsys) -> None:
        before = finished.read_text()
        for change in (
            ["--seed", "5"],
            ["--batch", "8"],
            ["--layout", "nhwc"],
            ["--max-time", "3"],
            ["--threads", "1"],
        ):
            assert main(["profile", "--resume", "r.json", *change]) == 2
            assert "cannot be resumed" in capsys.readouterr().err
        assert finished.read_text() == before
        assert main(["profile", "--resume", "r.json", "--groups", "2,4", "--quiet"]) == 0
        grown = stored(finished)
        assert len(grown["results"]) == 5
        assert main(["profile", "--resume", "r.json", "--groups", "2", "--quiet"]) == 0
        assert stored(finished)["results"] == grown["results"]  # a smaller grid takes nothing away

    def test_a_truncated_or_foreign_file_is_not_resumed_and_not_touched(self, example: Path, capsys) -> None:
        whole = example.read_text()
        for content in (whole[:500], "{}", whole.replace('"profile"', '"train"', 1)):
            example.write_text(content)
            assert main(["profile", "--resume", str(example)]) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1
            assert example.read_text() == content


class TestOtherCommands:
    def test_show_prints_every_format(self, example: Path, capsys) -> None:
        for form, sign in (("markdown", "| BGC | 4 |"), ("csv", "key,variant"), ("json", '"schema"'), ("table", "BGC")):
            assert main(["show", str(example), "--format", form]) == 0
            assert sign in capsys.readouterr().out

    def test_show_leads_with_the_answer_on_a_terminal(self, example: Path, capsys) -> None:
        assert main(["show", str(example), "--format", "table"]) == 0
        out = capsys.readouterr().out
        assert out.index("\nVerdict") < out.index("\nNotes") < out.index("\nN  GC ms")

    def test_show_table1_evaluates_the_papers_table(self, here: Path, capsys) -> None:
        assert main(["show", "--table1", "--channels", "1024", "--groups", "2,4"]) == 0
        out = capsys.readouterr().out
        for label in ("SC", "GC", "Shuffle", "LGC", "FLGC", "TLGC", "BGC"):
            assert f"| {label} |" in out
        assert "9,437,184" in out  # 9 * 1024 * 1024
        assert list(here.iterdir()) == []

    def test_show_table1_of_a_file_takes_its_layer(self, example: Path, capsys) -> None:
        assert main(["show", str(example), "--table1", "--format", "json"]) == 0
        records = json.loads(capsys.readouterr().out)
        assert {record["groups"] for record in records} == {1, 2, 4}

    def test_doctor_prints_the_environment(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "load average" in out
        assert torch.__version__ in out

    def test_compare_is_exit_5_beyond_the_limit(self, example: Path, here: Path, capsys) -> None:
        slow = example_document()
        for row in slow["results"]:
            for phase in row["phases"].values():
                phase["samples_s"] = [2 * sample for sample in phase["samples_s"]]
        results.ResultWriter(here / "slow.json").write(slow)
        assert main(["compare", str(example), "slow.json"]) == 0
        assert "2.00x the time" in capsys.readouterr().out
        assert main(["compare", str(example), "slow.json", "--fail-on", "3"]) == 5
        assert main(["compare", "slow.json", str(example), "--fail-on", "3"]) == 0

    def test_compare_refuses_files_whose_settings_differ(self, example: Path, here: Path, capsys) -> None:
        other = example_document()
        other["settings"]["cache"] = "cold"
        results.ResultWriter(here / "cold.json").write(other)
        assert main(["compare", str(example), "cold.json"]) == 2
        assert 'cache is "warm" in' in capsys.readouterr().err
        assert main(["compare", str(example), "cold.json", "--force"]) == 0
        assert "warning: cache was" in capsys.readouterr().out

    def test_compare_refuses_files_whose_memory_was_another_or_is_not_known(
        self, example: Path, here: Path, capsys
    ) -> None:
        for number, memory in enumerate(("fresh", None)):
            other = example_document()
            other["settings"]["memory"] = memory
            results.ResultWriter(here / f"{number}.json").write(other)
            assert main(["compare", str(example), f"{number}.json"]) == 2
            assert 'memory is "kept" in' in capsys.readouterr().err

    def test_compare_refuses_a_quick_file_against_a_full_one(self, example: Path, here: Path, capsys) -> None:
        results.ResultWriter(here / "quick.json").write({**example_document(), "quality": "quick"})
        assert main(["compare", str(example), "quick.json"]) == 2
        assert "use --force" in capsys.readouterr().err
        assert main(["compare", str(example), "quick.json", "--force"]) == 0


class TestProcess:
    def test_it_runs_as_a_module_from_a_checkout(self, cli: Cli) -> None:
        done = cli("show", "--table1", "--channels", "8", "--groups", "2")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Table 1 for a 3x3 convolution")

    @pytest.mark.parametrize("form", ["table", "json"])
    def test_a_reader_that_goes_away_is_no_error(self, form: str, tmp_path: Path) -> None:
        results.ResultWriter(tmp_path / "r.json").write(example_document())
        done = in_shell(["show", "r.json", "--format", form], "| head -c 5; exit ${PIPESTATUS[0]}", tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout) == 5

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    @pytest.mark.parametrize(
        "arguments",
        [*(["show", "r.json", "--format", form] for form in ("table", "markdown", "csv", "json")), ["--version"],
         ["--help"], ["profile", "--help"], ["compare", "r.json", "r.json"]],
    )  # fmt: skip
    def test_a_full_disk_behind_stdout_is_exit_4_and_one_line(self, arguments: list[str], tmp_path: Path) -> None:
        results.ResultWriter(tmp_path / "r.json").write(example_document())
        done = Forked(tmp_path, *arguments, out="/dev/full")
        assert done.communicate()[1] == "bgcbench: stdout cannot be written (No space left on device)\n"
        assert done.returncode == 4

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    def test_what_was_measured_is_not_lost_with_stdout(self, tmp_path: Path) -> None:
        done = Forked(tmp_path, *LIGHT, "--out", "r.json", "--quiet", brisk=True, out="/dev/full")
        (line,) = done.communicate()[1].splitlines()
        assert done.returncode == 4
        assert line == "bgcbench: stdout cannot be written (No space left on device); the result is in r.json"
        assert stored(tmp_path / "r.json")["complete"]
        done = Forked(tmp_path, *LIGHT, "--out", "-", "--quiet", brisk=True, out="/dev/full")
        _, errors = done.communicate()
        assert done.returncode == 4
        (rescued,) = tmp_path.glob("bgcbench-rescued-*")
        assert f"the result is in {rescued.name}" in errors
        assert stored(rescued)["complete"]

    def test_a_stdout_that_is_closed_is_told_and_no_file_takes_its_place(self, tmp_path: Path) -> None:
        done = Forked(tmp_path, *LIGHT, "--out", "r.json", "--quiet", brisk=True, out=CLOSED)
        assert "stdout cannot be written" in done.communicate()[1]
        assert done.returncode == 4
        assert stored(tmp_path / "r.json")["complete"]
        shown = in_shell(["show", "r.json"], ">&-", tmp_path)
        assert shown.returncode == 4
        assert "stdout cannot be written" in shown.stderr

    def test_a_stderr_that_cannot_be_written_ends_nothing(self, tmp_path: Path) -> None:
        full = Forked(tmp_path, *LIGHT, "--out", "f.json", brisk=True, errors="/dev/full")
        assert "| BGC | 2 |" in full.communicate()[0]
        assert full.returncode == 0
        closed = Forked(tmp_path, *LIGHT, "--out", "r.json", brisk=True, errors=CLOSED)
        assert "| BGC | 2 |" in closed.communicate()[0]
        assert closed.returncode == 0

    @pytest.mark.parametrize("columns", ["60", "80"])
    def test_a_table_fits_the_columns_it_is_given(self, cli: Cli, tmp_path: Path, columns: str) -> None:
        results.ResultWriter(tmp_path / "r.json").write(example_document())
        done = cli("show", "r.json", "--format", "table", COLUMNS=columns)
        assert max(len(line) for line in done.stdout.splitlines()) <= int(columns)

    def test_colour_only_where_it_is_wanted(self, cli: Cli, tmp_path: Path) -> None:
        results.ResultWriter(tmp_path / "r.json").write(example_document())
        forced = cli("show", "r.json", FORCE_COLOR="1").stdout
        assert "\x1b[1m" in forced
        plain = cli("show", "r.json", FORCE_COLOR="1", NO_COLOR="1").stdout
        assert "\x1b[3" not in plain
