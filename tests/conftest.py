from __future__ import annotations

import functools
import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import typer.main

# Several workers share the cores: threads of each beyond its share would only wait for one another.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
# torch is imported within functions, as the process that only hands tests out to workers needs none.

gc.disable()  # until all tests are known: what is read for them stays
os.fsync = lambda _: None  # what tests write need not outlive the machine
# Of hundreds of command lines in this process, each would make all commands and their options anew.
typer.main.get_command = functools.cache(typer.main.get_command)
ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Files run in the order of their names; by their number of tests, those with few and long ones would end a run."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish() -> None:
    import torch

    from bgcbench.convs import autotune

    if not torch.cuda.is_available():
        # torch would remember each seed, and the stack, for the devices that are not there.
        torch.cuda.random._lazy_call = lambda *_, **__: None  # type: ignore[assignment]
        autotune.MIN_S = 0.0  # of algorithms of a few microseconds; there are as many rounds as for long ones
    gc.enable()


_MODULES = [0]


def pytest_runtest_setup() -> None:
    """What lives already (torch's modules, above all) is left out of garbage collections: a run has many of them."""
    if len(sys.modules) > _MODULES[0] + 50:
        gc.collect()
        gc.freeze()
        _MODULES[0] = len(sys.modules)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own, in an empty folder."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bgcbench", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def downloads(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub puts what it downloads, a folder that is not there yet; it reaches nothing."""
    import torch

    def reached(*_: Any) -> Any:
        raise URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(torch.hub, "urlopen", reached)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    home = tmp_path_factory.mktemp("downloads") / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def brisk() -> Iterator[None]:
    """Short warm-ups and no matrix products: what is tested here is not how long they are."""
    from tests.brisk import shorten

    with pytest.MonkeyPatch.context() as patched:
        shorten(patched.setattr)
        patched.setattr(gc, "unfreeze", lambda: None)  # the heap stays small after a measurement
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, much slower beside other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_TRIED: dict[Any, Any] = {}


@pytest.fixture
def tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversions that a run tries without numbers before anything else are tried once in all of a file's tests.

    What is found depends on the network and on what is chosen of it, and nothing changes it afterwards. The digits are
    read once, too.
    """
    from bgcbench.data import digits
    from bgcbench.experiments import network_run, train_run

    def remembered(module: Any, name: str, key: Callable[..., Any]) -> None:
        found = getattr(module, name)

        def recalled(*given: Any, **how: Any) -> Any:
            if how:  # weights are asked for, too
                return found(*given, **how)
            place = (name, key(*given))
            if place not in _TRIED:
                _TRIED[place] = found(*given)
            return _TRIED[place]

        monkeypatch.setattr(module, name, recalled)

    def chosen(config: Any, _: Any, *cell: Any) -> Any:
        return config.spec, config.where, config.include, config.exclude, config.skip_invalid, *cell

    for module in (train_run, network_run):
        remembered(module, "build_empty", lambda spec: spec)
        remembered(module, "traced", lambda _, spec: spec)
        remembered(module, "converted_as_chosen", chosen)
        remembered(module, "trace", lambda model, size: (model, size))
    remembered(train_run, "_all_kept", chosen)
    remembered(digits, "open_digits", lambda *size: (digits.MEAN, *size))
