"""benchmarks/on_device.sh: whatever a step does, what was done before comes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "on_device.sh"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the script is for Linux: bash 4, GNU timeout, env and tar"
)


def script(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    """A shell with the script's functions, which runs ``code``.

    A shell cannot catch a signal that it was started to ignore, as SIGINT is where the tests run in the background.
    """
    return subprocess.Popen(
        ["env", "--default-signal=INT", "bash", "-c", f"source {SCRIPT}\n{code}"],
        env={**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def brought(tmp_path: Path) -> dict[str, str]:
    """The files of the archive."""
    with tarfile.open(tmp_path / "out" / "results.tgz") as archive:
        opened = {member.name: archive.extractfile(member) for member in archive.getmembers() if member.isfile()}
        return {name.removeprefix("./"): file.read().decode() for name, file in opened.items() if file is not None}


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only not waited for."""
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_steps_that_fail_hang_and_are_killed_cost_the_others_nothing(tmp_path: Path) -> None:
    hang = 'import time\ntry:\n time.sleep(99)\nexcept KeyboardInterrupt:\n print("asked to stop", flush=True)'
    deaf = (
        'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print("deaf", flush=True); time.sleep(99)'
    )
    # What bgcbench has: a pipe that takes each signal. A second one means: leave at once, with nothing saved.
    count = (
        "import os, signal, time; r, w = os.pipe(); os.set_blocking(w, False); signal.set_wakeup_fd(w); "
        "signal.signal(signal.SIGINT, lambda *_: None); time.sleep(1.5); print(list(os.read(r, 9)), flush=True)"
    )
    process = script(
        tmp_path,
        f"""
        GRACE=1
        begin 60
        step good 9 2 bash -c 'printf "1\\n2\\n3\\n"; echo kept > "$0/figures.json"; mkdir "$0/x.checkpoints"; \
            echo large > "$0/x.checkpoints/weights"' "$FOUND"
        step bad 9 1 bash -c 'sleep 50 & echo $! why; exit 7'
        step hangs 1 1 {sys.executable} -c '{hang}'
        step deaf 1 1 {sys.executable} -c '{deaf}'
        step twice 1 1 {sys.executable} -c '{count}'
        step dies 9 1 bash -c 'kill -KILL $$'
        step missing 9 1 no-such-command
        echo failed $FAILED; echo in "$WORK"
        """,
    )
    out, _ = process.communicate(timeout=60)
    files = brought(tmp_path)
    codes = dict(re.findall(r"== (\w+): exit code (\d+(?: \(cut off\))?),", files["steps.txt"]))
    assert codes == {"good": "0", "bad": "7", "hangs": "0 (cut off)", "deaf": "137 (cut off)", "dies": "137",
                     "missing": "127", "twice": "0 (cut off)"}  # fmt: skip
    assert files["twice.log"] == "[2]\n"
    assert has_ended(int(files["bad.log"].split()[0]))
    assert files["figures.json"] == "kept\n"
    assert files["hangs.log"] == "asked to stop\n"
    assert files["deaf.log"] == "deaf\n"
    assert "x.checkpoints/weights" not in files
    assert out.splitlines()[1:3] == ["2", "3"]  # the end of a log, and no more
    assert "failed 1" in out
    (work,) = re.findall(r"^in (.*)$", out, re.MULTILINE)
    assert not Path(work).exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_is_told_to_stop_brings_back_what_it_has(tmp_path: Path, signum: int) -> None:
    process = script(
        tmp_path,
        """
        GRACE=1
        begin 60
        step good 9 1 bash -c 'echo kept > "$0/figures.json"' "$FOUND"
        step long 50 1 bash -c 'echo $$ > "$0/pid"; sleep 50; echo survived' "$FOUND"
        step never 9 1 echo never
        """,
    )
    archive = tmp_path / "out" / "results.tgz"
    pids: list[Path] = []
    for _ in range(400):
        pids = list(tmp_path.glob("tmp.*/found/pid"))
        if archive.exists() and pids and pids[0].read_text():
            break
        time.sleep(0.05)
    child = int(pids[0].read_text())
    process.send_signal(signum)
    process.communicate(timeout=20)
    assert process.returncode == 143
    files = brought(tmp_path)
    assert files["figures.json"] == "kept\n"
    assert "stopped after" in files["steps.txt"]
    assert "never" not in files["steps.txt"]
    assert has_ended(child)


def test_what_was_packed_survives_a_kill(tmp_path: Path) -> None:
    process = script(tmp_path, "begin 60\nstep good 9 1 echo fine\nstep long 5 1 sleep 5")
    archive = tmp_path / "out" / "results.tgz"
    for _ in range(400):
        if archive.exists():
            break
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=20)
    assert brought(tmp_path)["good.log"] == "fine\n"


@pytest.mark.parametrize("seconds", [10, 40])
def test_a_step_takes_its_limit_or_what_is_left_and_too_little_is_not_begun(tmp_path: Path, seconds: int) -> None:
    process = script(
        tmp_path,
        f"""
        command_of() {{ COMMAND=(echo "$2"); }}
        install_wheels() {{ :; }}
        MODE=first LIMIT[facts]=20
        begin {seconds}
        do_steps facts kernels
        """,
    )
    out, _ = process.communicate(timeout=30)
    files = brought(tmp_path)
    assert process.returncode == 0
    if seconds == 10:
        assert re.search(r"facts: skipped, \d s left\n== kernels: skipped", out)
        assert set(files) <= {"steps.txt", "clocks.csv"}
    else:
        assert files["facts.log"] == "20\n"
        assert 20 <= int(files["kernels.log"]) <= 40 - 6  # the grace of a step that does not stop is kept free


def test_the_second_call_does_what_failed_or_is_missing(tmp_path: Path) -> None:
    (tmp_path / ".pack").mkdir()
    (tmp_path / "results").mkdir()
    code = f"""
        cd {tmp_path}; FOUND=found
        told() {{ COMMAND=(); command_of "$1" 100; printf '%s|' "$1" "${{COMMAND[@]}}"; echo; }}
        for MODE in first second; do told again; told cells; told networks; done
        touch results/kernels-cuda.json
        printf '%s\\n' 'tests/a.py::one[x, y]' 'tests/b.py::two' > .pack/again.txt
        for MODE in first second; do told again; told cells; done
        """
    out, _ = script(tmp_path, code).communicate(timeout=60)
    again, cells, networks, _, missing_cells, missing_networks, some, *rest = out.splitlines()
    assert again == "again|"
    assert "|--seconds|95|" in cells
    assert "--missing-in" not in networks
    assert "|--missing-in|results|" in missing_networks
    assert missing_cells == cells
    assert "|-n|4|tests/a.py::one[x, y]|tests/b.py::two|" in some
    assert rest == [cells, some, "cells|"]


def lists() -> dict[str, list[str]]:
    """The names in the script's lists."""
    text = SCRIPT.read_text()
    return {
        name: found.split() for name, found in re.findall(r"^(FIRST|SECOND|REHEARSAL)=\((.*)\)$", text, re.MULTILINE)
    }


def test_a_call_shows_less_than_a_reader_gets(tmp_path: Path) -> None:
    code = "for s in {}; do echo ${{LIMIT[$s]}} ${{LINES[$s]}} ${{WHAT[$s]:+told}}; done; echo $WIDTH"
    for name in ("FIRST", "SECOND"):
        out, _ = script(tmp_path, code.format(" ".join(lists()[name]))).communicate(timeout=20)
        *steps, width = out.splitlines()
        assert all(line.endswith("told") for line in steps)
        shown = sum(int(line.split()[1]) for line in steps)
        assert (shown * (int(width) + 1)) + 70 * len(steps) < 12_000


def test_every_name_that_the_script_selects_tests_by_is_there() -> None:
    names = re.findall(r'^(?:ALONE|SLOW)="(.*)"$', SCRIPT.read_text(), re.MULTILINE)
    tests = "".join((ROOT / "tests" / path).read_text() for path in ("test_gpu.py", "kernels/test_kernels.py"))
    for name in re.findall(r"\w+_\w+", " ".join(names)):
        assert len(re.findall(rf"def test_\w*{name}\w*\(", tests)) == 1, name


def test_the_script_says_what_it_does(tmp_path: Path) -> None:
    def told(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, check=False, timeout=20)

    assert told("--help").stdout == told().stdout
    assert "at most 480 s" in told("--help").stdout
    listed = told("--list").stdout
    assert [line.split()[0] for line in listed.splitlines()[:-2]] == lists()["REHEARSAL"]
    assert set(lists()["FIRST"] + lists()["SECOND"]) == set(lists()["REHEARSAL"])
    refused = told("tabel4")
    assert refused.returncode == 2
    assert "no step is called 'tabel4'; choose from facts" in refused.stderr


def test_a_rehearsal_runs_the_commands_on_a_cpu(tmp_path: Path) -> None:
    """Two steps; all of them take minutes: bash benchmarks/on_device.sh --rehearse."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "--rehearse", "facts", "train"],
        env={**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "results.tgz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"steps.txt", "source.json", "facts.log", "train-wrn_28_10-synthetic-cuda-fast-eager.json"} <= names
    assert re.search(r"images/s: standard 1 \d+, gc 4 \d+, bgc 4 \d+", done.stdout)
