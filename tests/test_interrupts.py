"""Ctrl-C and SIGTERM in the middle of a run, in a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bgcbench.cli import main
from tests.processes import ROOT, Forked
from tests.stored import stored

ARGUMENTS = ["profile", "--channels", "32", "--batch", "8", "--size", "7", "--groups", "2", "--device", "cpu",
             "--phases", "fwd", "--out", "r.json"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("brisk", "one_thread")


def start(folder: Path, *arguments: str) -> Forked:
    return Forked(folder, *arguments, brisk=True)


def start_anew(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bgcbench", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_round(path: Path, number: int, process: Forked) -> None:
    """Until the file holds that many rounds; a reader at any moment finds a whole file."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            if any(entry.get("rounds", 0) >= number for entry in document["interleaved"]):
                return
        time.sleep(0.02)
    pytest.fail(f"no round {number} in {path}: {process.communicate()}")


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of a run that nobody interrupts."""
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, "--max-time", "0.01", "--out", "whole.json"]) == 0
    return [row["key"] for row in stored(tmp_path / "whole.json")["results"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_a_valid_file_and_resumes_to_the_same_rows(
    number: int, code: int, tmp_path: Path, whole: list[str]
) -> None:
    process = start(tmp_path, *ARGUMENTS, "--max-time", "0.5")
    path = tmp_path / "r.json"
    wait_for_round(path, 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    document = stored(path)
    assert document["exit_reason"] == "interrupted"
    assert {row["status"] for row in document["results"]} == {"interrupted"}
    assert all(row["phases"] for row in document["results"])
    assert "saved 3/3 to r.json; resume with --resume r.json" in err
    assert "Traceback" not in err
    assert "this run is not complete" in out

    stopped = document["results"]
    assert main(["profile", "--resume", "r.json"]) == 0
    document = stored(path)
    for before, after in zip(stopped, document["results"], strict=True):  # it went on with what there was
        for name, phase in before["phases"].items():
            assert after["phases"][name]["samples_s"][0] == phase["samples_s"][0]
            assert max(after["phases"][name]["rounds"]) >= 6
    assert [row["key"] for row in document["results"]] == whole
    assert {row["status"] for row in document["results"]} == {"ok"}
    assert document["exit_reason"] == "ok"


def test_a_second_ctrl_c_leaves_at_once_with_a_valid_file(tmp_path: Path) -> None:
    # One call of this layer takes seconds, so the first signal alone would wait for its end.
    process = start(tmp_path, "profile", "--channels", "512", "--batch", "64", "--size", "28", "--groups", "2",
                    "--device", "cpu", "--out", "r.json")  # fmt: skip
    path = tmp_path / "r.json"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "plan:" not in process.said():
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 1.0
    if path.exists():
        stored(path)
    assert [p for p in tmp_path.iterdir() if p != path] == []


def test_a_killed_run_leaves_a_valid_resumable_file(tmp_path: Path, whole: list[str]) -> None:
    process = start(tmp_path, *ARGUMENTS, "--max-time", "0.5")
    path = tmp_path / "r.json"
    wait_for_round(path, 2, process)
    process.kill()
    process.communicate()
    document = stored(path)
    assert document["exit_reason"] == "running"
    assert {row["status"] for row in document["results"]} == {"interrupted"}
    assert main(["profile", "--resume", "r.json", "--quiet"]) == 0
    assert [row["key"] for row in stored(path)["results"]] == whole


def test_ctrl_c_before_anything_is_measured_writes_nothing(tmp_path: Path) -> None:
    process = start_anew(tmp_path, *ARGUMENTS)
    maps = Path(f"/proc/{process.pid}/maps")
    deadline = time.monotonic() + (60 if maps.exists() else 0.5)
    while time.monotonic() < deadline and not (maps.exists() and "torch" in maps.read_text()):  # it is being imported
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "r.json").exists()
