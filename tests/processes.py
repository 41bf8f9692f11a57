"""Processes of the command line, forked from one that has imported torch: to import it takes each seconds.

They are like ``python -m bgcbench ARGUMENTS`` from then on: with an environment, signals and an end of their own. What
is tested of a start itself, of torchrun or of Python's hash seed needs a real one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOSED = "&-"


# --------------------------------------------------------------------------------------------------- what tests call


class Forked:
    """A process of the command line in ``folder``, with as much of subprocess.Popen as tests need.

    brisk: as tests.brisk. out, errors: where its stdout and stderr go instead of to ``communicate``; CLOSED as by >&-.
    """

    def __init__(
        self, folder: Path, *arguments: str, brisk: bool = False, out: str = "", errors: str = "", **variables: str
    ) -> None:
        self.files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 - open as long as this is
        wanted = {"argv": arguments, "cwd": str(folder), "env": {**os.environ, **variables}, "brisk": brisk}
        files = [given or file.name for given, file in zip((out, errors), self.files, strict=True)]
        self.pid: int = _ask({**wanted, "files": files})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What stands on stderr by now."""
        return Path(self.files[1].name).read_text(encoding="utf-8")

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("bgcbench", timeout)
            time.sleep(0.01)
        return Path(self.files[0].name).read_text(encoding="utf-8"), self.said()


def together(folder: Path, *arguments: str) -> tuple[list[int | None], str, str]:
    """Two processes run the same command, with what torchrun would tell them; exit codes, stdout and stderr of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [Forked(folder, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=180) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], *("".join(texts) for texts in zip(*said, strict=True))


@contextlib.contextmanager
def signalled(number: int, when: Callable[[], bool], delay: float = 0.0) -> Iterator[None]:
    """This very process gets a signal ``delay`` seconds after ``when`` is so; a run in it takes that as its own.

    The signal for a run that was faster, and has put back what it found, goes nowhere.
    """
    over = threading.Event()

    def watch() -> None:
        while not when():
            if over.wait(0.01):
                return
        if not over.wait(delay):
            os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: None)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join(60)
        time.sleep(0.01)  # one that is on its way arrives
        signal.signal(number, before)


# ------------------------------------------------------------------------------------------------------- the other end


@functools.cache
def _server() -> subprocess.Popen[str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    one["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a look for devices would spoil them for what is forked
    return subprocess.Popen(
        [sys.executable, "-m", "tests.processes"], env={**os.environ, "PYTHONPATH": str(ROOT), **one},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(found[1])
            print(json.dumps(ended.get(pid)), flush=True)
            continue
        if sys.platform == "linux":
            if (pid := os.fork()) == 0:
                _become(**request)
        else:  # what the system's own libraries have begun may not be forked
            pid = _start(**request)
        print(pid, flush=True)


def _start(argv: list[str], cwd: str, env: dict[str, str], files: list[str], brisk: bool) -> int:
    module = "tests.brisk" if brisk else "bgcbench"
    with open(files[0], "w") as out, open(files[1], "w") as errors:
        started = subprocess.Popen(
            [sys.executable, "-m", module, *argv], cwd=cwd, env={**env, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
        )  # fmt: skip
    return started.pid


def _become(argv: list[str], cwd: str, env: dict[str, str], files: list[str], brisk: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(files, 1):
        if name == CLOSED:
            os.close(number)
            setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
        else:
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["bgcbench", *argv]
    if brisk:
        from tests.brisk import shorten

        shorten(setattr)
    from bgcbench.cli import run

    try:
        run()
    except SystemExit as end:  # as Python ends, but for taking torch apart, which takes longer than most runs
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    import gc

    import sklearn.datasets  # noqa: F401
    import torch.distributed

    from bgcbench.data import digits  # noqa: F401
    from bgcbench.experiments import network_run, profile_run, train_run, transfer_run  # noqa: F401
    from bgcbench.measure.trace import trace
    from bgcbench.models import build_empty
    from bgcbench.specs import NetSpec

    trace(build_empty(NetSpec("wrn_10_1")), (3, 8, 8))  # torch imports more when it computes without numbers
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    _serve()
