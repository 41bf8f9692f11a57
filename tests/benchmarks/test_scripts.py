"""The benchmark scripts: the state they measure in, what they choose to measure, and how they end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import (
    bgc_forms,
    convert_resnet50,
    files,
    kernels_cuda,
    networks_cuda,
    runs,
    runtimes,
    table4_cuda,
    train_cuda,
)
from benchmarks.runs import Run
from bgcbench.cli import main as bgcbench
from bgcbench.errors import DeviceError
from bgcbench.measure.device import tf32_state
from bgcbench.models import build_model
from bgcbench.results.document import read
from bgcbench.specs import VARIANTS
from tests.example import example_document

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def called(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """The command line that a script reads."""
    monkeypatch.setattr("sys.argv", ["script", *map(str, words)])


# ---------------------------------------------------------------------------------------------------------- bgc_forms


@pytest.mark.parametrize("device", DEVICES)
def test_the_algorithms_are_measured_in_the_state_that_a_result_records(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    shape = files.DistinctLayer(8, 8, kernel=1, stride=1, height=2, width=2, networks={})

    def measured(*_: Any) -> files.AlgorithmCell:
        seen.append((tf32_state(), torch.backends.cudnn.benchmark, torch.get_num_threads()))
        seconds = {"auto": 1.0, "dense": 1.0, "gc": 1.0, "gc_half": 1.0}
        return files.AlgorithmCell(
            in_channels=8, out_channels=8, kernel=1, stride=1, size=(1, 8, 2, 2), groups=2, layout="nchw", phase="fwd",
            chosen="dense", median_s=seconds, samples={}, seen_by_auto_s={},
        )  # fmt: skip

    monkeypatch.setattr(bgc_forms, "measured", measured)
    monkeypatch.setattr(bgc_forms, "distinct", lambda networks: [shape])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    out = tmp_path / "r.json"
    called(monkeypatch, "--device", device, "--threads", 1, "--out", out)
    assert bgc_forms.main() == 0
    assert seen == [({"conv": False, "matmul": False}, True, 1)] * len(seen)
    assert len(seen) == 12
    assert not torch.backends.cudnn.benchmark
    assert json.loads(out.read_text())["environment"]["device"]["type"] == device


# --------------------------------------------------------------------------------------------------- convert_resnet50


@pytest.mark.parametrize("device", DEVICES)
def test_a_conversion_is_timed_on_the_device_that_was_asked_for(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[torch.nn.Module] = []

    def small() -> torch.nn.Module:
        models.append(build_model("wrn_10_1"))
        return models[0]

    monkeypatch.setattr(torchvision.models, "resnet50", small)
    monkeypatch.setattr(convert_resnet50, "SIDE", 8)
    called(monkeypatch, "--images", 32, "--threads", 1, "--device", device, "--out", tmp_path / "r.json")
    assert convert_resnet50.main() == 0
    assert {p.device.type for p in models[0].parameters()} == {device}
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["environment"]["device"]["type"] == device
    assert ("--device cuda" in found["command"]) == (device == "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
@pytest.mark.parametrize("script", [convert_resnet50, bgc_forms], ids=lambda script: script.__name__)
def test_a_device_that_is_not_there_is_one_line(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    called(monkeypatch, "--device", "cuda")
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == DeviceError.exit_code
    assert "no CUDA device here" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- kernels_cuda


def test_every_cell_of_a_layer_has_the_standard_convolution_group_convolution_and_our_kernels() -> None:
    for job in kernels_cuda.layer_jobs(quick=False):
        kinds = {(subject.variant, subject.algorithm == "triton") for subject in job.subjects}
        assert kinds == {("standard", False), ("gc", False), ("bgc", False), ("gc", True), ("bgc", True)}
        assert {kernels_cuda.spec_of(job.shape, s.variant, s.algorithm).groups for s in job.subjects} == {
            1,
            job.shape.groups,
        }


def test_a_quick_look_is_a_part_of_the_whole_and_compiles_nothing() -> None:
    quick, whole = (kernels_cuda.layer_jobs(quick) for quick in (True, False))
    assert whole[: len(quick)] == quick
    assert {job.section for job in quick} == {"table4", "resnet50"}
    assert not any(subject.compiled for job in quick for subject in job.subjects)
    assert len(whole) == len({(job.section, job.shape, job.precision) for job in whole}) == 30 + 12


@pytest.fixture
def rehearse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs kernels_cuda on one tiny cell; returns its exit code and its file."""
    jobs = kernels_cuda.layer_jobs(quick=True)
    monkeypatch.setattr(kernels_cuda, "layer_jobs", lambda quick: [jobs[0], jobs[2]])
    monkeypatch.setattr(kernels_cuda, "measure_ceilings", lambda *_, **__: kernels_cuda.Ceilings(1e12, 1e11, (1,), 1))

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "kernels.json"
        called(monkeypatch, "--rehearse", "--out", out, *words)
        return kernels_cuda.main(), json.loads(out.read_text())

    return run


def test_sections_can_be_chosen(rehearse: Any) -> None:
    code, found = rehearse("--sections", "resnet50")
    assert (code, found["complete"], found["rehearsal"]) == (0, True, True)
    assert "table4" not in found
    (cell,) = found["resnet50"]
    assert [row["subject"] for row in cell["rows"]] == [subject.name for subject in kernels_cuda.FEW]
    for row in cell["rows"]:
        assert max(row["errors"].values()) < 1e-6
        assert {*row["device_s"], *row["host_s"], *row["roofline"]} == {"fwd", "fwd_bwd"}


def test_an_unknown_section_is_refused(rehearse: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        rehearse("--sections", "table4,tables")
    assert stopped.value.code == 2
    assert "--sections tables: choose from table4" in capsys.readouterr().err


@pytest.mark.parametrize("error", [1e-4, math.inf, math.nan])
def test_a_large_error_is_the_exit_code(
    rehearse: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: float
) -> None:
    monkeypatch.setattr(kernels_cuda.Prepared, "errors", lambda self: {"y": error, "x": 1e-7})
    assert rehearse("--sections", "resnet50")[0] == 1
    assert f"{len(kernels_cuda.FEW)} subjects failed or are wrong" in capsys.readouterr().out


def test_a_subject_that_fails_costs_the_others_nothing_but_the_exit_code(
    rehearse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = kernels_cuda.build_conv

    def broken(spec: Any) -> Any:
        if spec.algorithm == "dense":
            raise RuntimeError("no such form here")
        return build(spec)

    monkeypatch.setattr(kernels_cuda, "build_conv", broken)
    code, found = rehearse("--sections", "resnet50")
    assert code == 1
    rows = found["resnet50"][0]["rows"]
    assert [row["subject"] for row in rows if "failed" in row] == ["bgc dense nhwc"]
    assert sum("device_s" in row for row in rows) == len(rows) - 1


def test_what_there_is_no_time_for_is_named(rehearse: Any) -> None:
    code, found = rehearse("--seconds", "0")
    assert code == 0
    assert [cell["section"] for cell in found["skipped"]] == ["table4", "resnet50"]


# -------------------------------------------------------------------------------------------------------------- runs

LISTS = {module.__name__.split(".")[1]: module.RUNS for module in (table4_cuda, networks_cuda, train_cuda)}


@pytest.mark.parametrize("run", [*table4_cuda.RUNS, networks_cuda.RUNS[0], *train_cuda.RUNS], ids=lambda run: run.name)
def test_the_command_line_of_a_run_is_valid(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # of the networks one, because planning takes seconds and all have the same options
    there = (
        0 if torch.cuda.is_available() else DeviceError.exit_code
    )  # options are checked before the device is looked for
    assert bgcbench([*run.words(device="cuda"), "--dry-run", "--quiet"]) == there


@pytest.mark.parametrize("name", LISTS)
def test_all_runs_of_a_script_fit_its_time(name: str) -> None:
    found = LISTS[name]
    assert sum(run.seconds for run in found) <= runs.SECONDS
    assert len({run.file for run in found}) == len(found)
    assert all(name.split("_", maxsplit=1)[0].removesuffix("s") in run.name for run in found)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What bgcbench would have been called with; a run of 'a' writes a result, of 'b' raises, of 'c' ends with 130."""
    seen: list[list[str]] = []

    def command(words: list[str]) -> int:
        seen.append(words)
        out = Path(words[words.index("--out") + 1])
        if out.stem == "b":
            raise RuntimeError("a fault of our own")
        if out.stem == "a":
            out.write_text(json.dumps(example_document()))
        return 130 if out.stem == "c" else 0

    monkeypatch.setattr(runs, "bgcbench", command)
    return seen


def made(*names: str, seconds: float = 1) -> list[Run]:
    return [Run(name, seconds, "profile", {"preset": "table4", "skip_invalid": True, "mode": None}) for name in names]


def test_a_run_that_breaks_costs_the_others_nothing(commands: Any, tmp_path: Path, capsys: Any) -> None:
    assert runs.main("", made("b", "a"), ["--folder", str(tmp_path)]) == 1
    assert len(commands) == 2
    assert commands[1] == ["profile", "--preset", "table4", "--skip-invalid", "--device", "cuda", "--out",
                           str(tmp_path / "a.json"), "--force"]  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("b: exit code 1")
    assert last[0].endswith("no file")
    assert "fwd_bwd ms: standard 1 " in last[1]


def test_no_run_is_begun_after_an_interrupt(commands: Any, tmp_path: Path) -> None:
    assert runs.main("", made("c", "a"), ["--folder", str(tmp_path)]) == 130
    assert len(commands) == 1


def test_a_run_that_would_end_too_late_is_left_out_and_named(commands: Any, tmp_path: Path, capsys: Any) -> None:
    assert runs.main("", [*made("a", seconds=100), *made("d")], ["--folder", str(tmp_path), "--seconds", "50"]) == 0
    assert [Path(words[-2]).stem for words in commands] == ["d"]
    assert "a: skipped, it may take 100 s and 50 s are left" in capsys.readouterr().out


def test_runs_are_chosen_by_name_and_by_what_is_missing(commands: Any, tmp_path: Path, capsys: Any) -> None:
    found = made("a", "aa", "d")
    options = ["--folder", str(tmp_path)]
    assert runs.main("", found, [*options, "--only", "a*"]) == 0
    assert runs.main("", found, [*options, "--only", "a*,d", "--missing-in", str(tmp_path)]) == 0
    assert [Path(words[-2]).stem for words in commands] == ["a", "aa", "aa", "d"]
    assert runs.main("", found, [*options, "--only", "a", "--missing-in", str(tmp_path)]) == 0
    assert len(commands) == 4
    with pytest.raises(SystemExit) as stopped:
        runs.main("", found, ["--only", "a,x"])
    assert stopped.value.code == 2
    assert "--only x matches none of a, aa, d" in capsys.readouterr().err


def test_a_file_is_whole_when_its_run_was_done(tmp_path: Path) -> None:
    path, document = tmp_path / "r.json", example_document()
    assert not runs.is_whole(path)
    for change, whole in (({}, True), ({"complete": False}, False)):
        path.write_text(json.dumps({**document, **change}))
        assert runs.is_whole(path) is whole
    document["results"][0]["status"] = "oom"
    path.write_text(json.dumps(document))
    assert not runs.is_whole(path)
    path.write_text("{")
    assert not runs.is_whole(path)


# --------------------------------------------------------------------------------------------------------------- help


def test_the_help_of_profile_names_every_algorithm(capsys: Any) -> None:
    bgcbench(["profile", "--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)  # without the panel's borders
    found = re.search(
        r"--algorithm .* BGC (.*), or auto, the fastest; GC (.*); LGC, FLGC (.*); LR (.*); all measures", shown
    )
    assert found is not None
    for names, variant in zip(found.groups(), ("bgc", "gc", "lgc", "lowrank"), strict=True):
        shown_names = re.sub(r" \(.*?\)", "", names).split(", ")
        assert shown_names == [name for name in VARIANTS[variant].algorithms if name != "stock"]


# ----------------------------------------------------------------------------------------------------------- runtimes


@pytest.mark.usefixtures("brisk", "one_thread")
def test_the_rows_at_half_of_the_parameters_are_measured_in_the_modes_asked_for(tmp_path: Path) -> None:
    words = ["wrn_10_1", "--quick", "--size", "8", "--mode", "eager", "--folder", str(tmp_path)]
    assert runtimes.main(words) == 0
    document = read(tmp_path / "runtimes-wrn_10_1-cpu.json")
    assert document.complete
    assert {(row.params.variant, row.params.groups, row.params.mode) for row in document.results} == {
        (*cell, "eager") for cell in runtimes.CELLS
    }
    dense, *others = [row.counts.params for row in document.results]
    assert all(0.4 * dense < params < 0.6 * dense for params in others)
