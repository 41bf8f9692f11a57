"""What came back from a device: checked, named by its condition, put into results/ and the claims."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bring_home, claims, networks_cuda, pack, table4_cuda, train_cuda
from benchmarks.runs import Run
from bgcbench.results.document import document_of
from bgcbench.theory.paper import WORKLOAD
from tests.conftest import ROOT
from tests.stored import stored

COMMIT = "0123456789abcdef0123456789abcdef01234567"
H100 = {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "sm_count": 132, "l2_bytes": 52428800,
        "total_bytes": 85000000000}  # fmt: skip
KERNELS = {"command": "python -m benchmarks.kernels_cuda --quick", "environment": {"device": H100}, "complete": True,
           "rehearsal": False}  # fmt: skip


def measured(source: str, run: Run) -> dict[str, Any]:
    """A committed file of a CPU as if ``run`` had made it on a CUDA device without a checkout."""
    document = stored(ROOT / "results" / source)
    document["environment"]["device"] = H100
    document["argv"] = [*run.words(device="cuda"), "--out", "/somewhere/else/r.json", "--force"]
    document["tool"] |= {"git_commit": None, "git_dirty": None}
    options = {name: value for name, value in run.options.items() if name in ("precision", "layout", "mode")}
    document["config"] |= options
    return document


TABLE4 = measured("table4-cpu-bf16-nchw.json", table4_cuda.RUNS[0])
NETWORK = measured("network-wrn_28_10-cpu-fp32-nchw.json", networks_cuda.RUNS[0])


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with empty results, whose claims are written by nobody."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "write", lambda: (tmp_path / "claims").write_text("written"))
    monkeypatch.setattr(pack, "AGAIN", tmp_path / ".pack" / "again.txt")
    return tmp_path


@pytest.fixture
def bring(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Packs files into an archive and brings it home; documents are written as JSON."""

    def call(files: dict[str, Any], *options: str) -> int:
        archive = root / "results.tgz"
        with tarfile.open(archive, "w:gz") as opened:
            for name, content in files.items():
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
        monkeypatch.setattr("sys.argv", ["bring_home", str(archive), *options])
        return bring_home.main()

    return call


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "results").iterdir())


def test_whole_files_are_put_under_the_names_of_their_conditions(bring: Any, root: Path, capsys: Any) -> None:
    source = {"git_commit": COMMIT, "git_dirty": False}
    files = {"./source.json": source, "./a.json": TABLE4, "./b.json": NETWORK, "./kernels-cuda.json": KERNELS,
             "./steps.txt": "== table4: exit code 0\n", "./a.log": "{}"}  # fmt: skip
    assert bring(files) == 0
    names = ["kernels-cuda.json", networks_cuda.RUNS[0].file, table4_cuda.RUNS[0].file]
    assert kept(root) == names
    found = stored(root / "results" / names[-1])
    assert found["tool"] == {**TABLE4["tool"], **source}
    assert found["argv"][-2:] == [f"results/{names[-1]}", "--force"]
    assert found["results"] == TABLE4["results"]
    assert (root / "claims").read_text() == "written"
    out = capsys.readouterr().out
    assert out.startswith("== table4: exit code 0\n")
    assert "3 files taken, 0 refused; 0 tests, 0 failed, 0 skipped" in out


def test_a_commit_that_the_file_knows_is_kept(bring: Any, root: Path) -> None:
    tool = {**TABLE4["tool"], "git_commit": "f" * 40, "git_dirty": False}
    assert bring({"source.json": {"git_commit": COMMIT, "git_dirty": True}, "a.json": {**TABLE4, "tool": tool}}) == 0
    assert stored(root / "results" / table4_cuda.RUNS[0].file)["tool"] == tool


def changed(**changes: Any) -> dict[str, Any]:
    return {**TABLE4, **changes}


ROWS = TABLE4["results"]
LAYER = {**TABLE4["config"], "in_channels": 64}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (changed(quality="quick"), "of quick quality"),
        (changed(complete=False, exit_reason="interrupted"), "not complete: interrupted"),
        (changed(results=[*ROWS[:-1], {**ROWS[-1], "status": "oom", "reason": "out of memory"}]), "out of memory"),
        (changed(schema={"name": "bgcbench.result", "version": "2.0"}), "schema version 2.0"),
        (changed(results="none"), "is damaged: results"),
        (changed(warnings=["the file is in /home/me/results"]), "it names a place on a machine"),
        (changed(config=LAYER), "has no name here"),
        (stored(ROOT / "results" / "approx-figures-cpu.json"), "has no name here"),
        (changed(config={}), "it has no 'precision'"),
        ('{"schema": {"name": ', "not complete JSON"),
        ({**KERNELS, "rehearsal": True}, "a rehearsal"),
        ({**KERNELS, "complete": False}, "not complete"),
        ([1, 2], "is not a bgcbench result"),
    ],
)
def test_what_is_not_whole_is_refused_and_the_others_are_kept(
    bring: Any, root: Path, capsys: Any, content: Any, why: str
) -> None:
    assert bring({"bad.json": content, "good.json": NETWORK}) == 1
    assert kept(root) == [networks_cuda.RUNS[0].file]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("refused ")]
    assert line.startswith("refused bad.json: ")
    assert why in line


def test_a_file_that_is_there_is_replaced_only_when_that_is_asked_for(bring: Any, root: Path) -> None:
    path = root / "results" / table4_cuda.RUNS[0].file
    path.write_text("older")
    assert bring({"a.json": TABLE4}) == 1
    assert path.read_text() == "older"
    assert bring({"a.json": TABLE4}, "--force") == 0
    assert stored(path)["environment"]["device"] == H100


def test_a_dry_run_writes_nothing(bring: Any, root: Path, capsys: Any) -> None:
    assert bring({"a.json": TABLE4}, "--dry-run") == 0
    assert sorted(path.name for path in root.iterdir()) == ["results", "results.tgz"]
    assert kept(root) == []
    assert f"would take a.json as results/{table4_cuda.RUNS[0].file}" in capsys.readouterr().out


def test_an_archive_writes_nowhere_else(bring: Any, root: Path) -> None:
    assert bring({"../outside.json": TABLE4, "deep/inside.json": TABLE4, "/absolute.json": TABLE4}) == 0
    assert kept(root) == []
    assert not (root.parent / "outside.json").exists()


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_an_archive_that_cannot_be_read_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, content: bytes | None
) -> None:
    if content is not None:
        (root / "x.tgz").write_bytes(content)
    monkeypatch.setattr("sys.argv", ["bring_home", str(root / "x.tgz")])
    with pytest.raises(SystemExit) as stopped:
        bring_home.main()
    assert stopped.value.code == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_tests_that_failed_can_be_run_again(bring: Any, root: Path, capsys: Any) -> None:
    report = """<testsuites><testsuite>
        <testcase classname="tests.test_gpu" name="test_one[fp32-a, b]"><failure message="no"/></testcase>
        <testcase classname="tests.test_profile.TestPlan" name="test_two"><error message="no"/></testcase>
        <testcase classname="tests.kernels.test_kernels" name="test_three"><skipped message="no"/></testcase>
        <testcase classname="tests.test_gpu" name="test_four"/></testsuite></testsuites>"""
    assert bring({"tests.xml": report, "alone.xml": "<testsuites><test"}) == 0
    again = ["tests/test_gpu.py::test_one[fp32-a, b]", "tests/test_profile.py::TestPlan::test_two"]
    assert (root / ".pack" / "again.txt").read_text().splitlines() == again
    out = capsys.readouterr().out
    assert "refused alone.xml" in out
    assert "0 files taken, 0 refused; 4 tests, 2 failed, 1 skipped" in out
    assert not (root / "claims").exists()


@pytest.mark.parametrize("run", [*table4_cuda.RUNS, *networks_cuda.RUNS, *train_cuda.RUNS], ids=lambda run: run.name)
def test_a_run_names_its_file_as_its_condition_does(run: Run) -> None:
    config = {"mode": "eager", "compile": run.options.get("recipe") == "fast", **run.options}
    config = {**WORKLOAD, **config} if "preset" in config else config
    document = document_of({**TABLE4, "command": run.command, "config": config, "results": []}, run.file)
    assert bring_home.condition(document) == run.file


# ------------------------------------------------------------------------------------------------------------- claims


def test_what_was_measured_on_a_device_is_claimed_where_its_file_is_there(root: Path) -> None:
    tables = (claims.layer_speed, claims.networks, claims.training_speed, claims.kernels)
    assert not any(make().claims for make in tables)
    training = measured("train-quickstart-cpu.json", train_cuda.RUNS[0])
    rows = [
        {"subject": f"{variant} {form} nhwc", "variant": variant, "algorithm": form, "errors": {"y": error},
         "device_s": {"fwd_bwd": [seconds]}}
        for variant, form, seconds, error in (
            ("standard", "stock", 6e-4, 0.0), ("gc", "stock", 3e-4, 0.0), ("bgc", "dense", 5e-4, 0.0),
            ("bgc", "two_conv", 4e-4, 0.0), ("bgc", "concat", 1e-4, 0.5), ("gc", "triton", 2e-4, 0.0),
            ("bgc", "triton", 25e-5, 0.0),
        )
    ]  # fmt: skip
    shape = {"n": 1024, "m": 1024, "side": 7, "kernel": 3, "stride": 1, "groups": 4}
    cell = {"precision": "bf16", "shape": shape, "batch": 128, "rows": rows}
    unfinished = {**cell, "rows": rows[:2]}
    files = {
        table4_cuda.RUNS[0].file: TABLE4,
        networks_cuda.RUNS[0].file: NETWORK,
        train_cuda.RUNS[0].file: training,
        "kernels-cuda.json": {**KERNELS, "table4": [cell, unfinished]},
    }
    for name, document in files.items():
        (root / "results" / name).write_text(json.dumps(document))
    layers, nets, trainings, ours = (make() for make in tables)
    assert [table.files for table in (layers, nets, trainings, ours)] == [[name] for name in files]
    assert all(
        H100["name"] in " ".join(claim.row) for table in (layers, nets, trainings, ours) for claim in table.claims
    )
    assert claims.command_of(layers.files[0]) == (
        "bgcbench profile --preset table4 --precision bf16 --layout nhwc --mode graph --max-time 1.5 --device cuda"
    )
    texts = {claim.column: claim.text for claim in layers.claims}
    assert texts["BGC N=4"].startswith("2.3 (")
    speeds = [f"{row['images_per_s']:,.0f}" for row in training["results"]]
    assert [claim.text for claim in trainings.claims if claim.column == "images/s"] == speeds
    # A wrong result is never the fastest, and a cell that lacks one of its sides claims nothing.
    assert [claim.text for claim in ours.claims] == ["250", "400", "200", "300", "600"]


# --------------------------------------------------------------------------------------------------------------- pack


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of one file, with a folder to pack into."""
    (tmp_path / "bgcbench").mkdir()
    (tmp_path / "bgcbench" / "a.py").write_text("a = 1\n")
    (tmp_path / "pyproject.toml").write_text("")
    for name, path in (("ROOT", "."), ("PACK", ".pack"), ("SOURCE", ".pack/source.json")):
        monkeypatch.setattr(pack, name, tmp_path / path)
    return tmp_path


def in_git(monkeypatch: pytest.MonkeyPatch, commit: str | None, dirty: bool | None) -> None:
    tool = {"git_commit": commit, "git_dirty": dirty}
    monkeypatch.setattr(pack, "git_state", lambda: tool)


def test_a_device_without_a_checkout_knows_the_commit_that_was_packed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(
        pack.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    monkeypatch.setattr("sys.argv", ["pack", "--python", "3.12"])
    in_git(monkeypatch, COMMIT, False)
    assert pack.main() == 0
    (command,) = commands
    assert command[-4:] == ["jsonschema", "jsonschema-specifications", "referencing", "rpds-py"]
    assert command[command.index("--python-version") + 1] == "3.12"
    in_git(monkeypatch, None, None)
    assert pack.source() == {"git_commit": COMMIT, "git_dirty": False}
    (checkout / "bgcbench" / "a.py").write_text("a = 2\n")  # mended on the way
    assert pack.source() == {"git_commit": COMMIT, "git_dirty": True}


def test_nothing_is_known_where_nothing_was_packed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_git(monkeypatch, None, None)
    assert pack.source() == {"git_commit": None, "git_dirty": None}
    in_git(monkeypatch, COMMIT, True)
    assert pack.source() == {"git_commit": COMMIT, "git_dirty": True}
