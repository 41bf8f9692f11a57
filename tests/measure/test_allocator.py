"""Where the memory of a CPU's tensors comes from, counted by the system itself."""

from __future__ import annotations

import ctypes
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bgcbench.errors import UsageError
from bgcbench.measure import allocator
from bgcbench.measure.allocator import memory_state, resolve_memory
from bgcbench.measure.environment import diagnose
from tests.conftest import ROOT

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GLIBC = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or (HUGE.exists() and "[always]" in HUGE.read_text()),
    reason="another C library than glibc, or pages of 2 MiB",
)
PAGES = 2**20 // resource.getpagesize()  # of 1 MiB


@pytest.fixture(scope="module")
def found() -> Any:
    """What a new process has counted."""
    code = """
import json
import torch
from bgcbench.measure import allocator
from bgcbench.measure.allocator import memory_state, minor_faults
from bgcbench.measure.device import CpuStopwatch
from bgcbench.measure.environment import diagnose
from bgcbench.measure.workload import Cell

def call():
    return torch.ones(2**18)

def faults(calls):
    counted = []
    for _ in range(calls):
        before = minor_faults()
        call()
        counted.append(minor_faults() - before)
    return counted

def doctor():
    return next(rest for what, *rest in diagnose(torch.device("cpu")) if "page faults" in what)

found = {}
own, allocator.set_memory = allocator.set_memory, lambda _: own("fresh")
found["deaf doctor"] = doctor()
allocator.set_memory = own
found["doctor"] = doctor()
for name, state in (("fresh", "fresh"), ("kept", "kept"), ("again", "kept"), ("later", "fresh")):
    with memory_state(state):
        found[name] = faults(16)

with memory_state("kept"):
    faults(16)
    with memory_state("kept"):
        pass
    found["inside"] = faults(8)  # nothing was given back
    with memory_state("fresh"):
        found["inner fresh"] = faults(8)
    found["outer"] = faults(16)

held, watch = [], CpuStopwatch(torch.device("cpu"))
cells = {"prepared": Cell(call=held.clear, prepare=lambda: held.append(call())), "called": Cell(call=call)}
with memory_state("fresh"):
    for name, cell in cells.items():
        found[name] = []
        watch.sample(cell, 5, found[name])
        watch.sample(cell, 2)  # nobody wants to know

print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True,
                          timeout=60)  # fmt: skip
    return json.loads(done.stdout)


@GLIBC
def test_fresh_memory_has_a_fault_a_page_at_each_call_and_kept_memory_none_after_some(found: Any) -> None:
    for name in ("fresh", "later"):  # before anything was kept, and after
        assert all(PAGES <= count < 1.1 * PAGES for count in found[name][1:])
    for name in ("kept", "again"):  # what was kept has been given back in between
        assert found[name][0] >= 0.9 * PAGES
        assert found[name][-8:] == [0] * 8


@GLIBC
def test_blocks_in_one_another_leave_the_outer_ones_state(found: Any) -> None:
    assert found["inside"] == [0] * 8
    assert min(found["inner fresh"][1:]) >= PAGES
    assert found["outer"][-8:] == [0] * 8


@GLIBC
def test_the_faults_of_a_sample_are_those_of_the_call_alone(found: Any) -> None:
    assert len(found["prepared"]) == len(found["called"]) == 5
    assert max(found["prepared"]) < 0.1 * PAGES
    assert min(found["called"]) >= PAGES


def test_a_state_that_cannot_be_set_is_refused_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_memory(None, "cuda") is None
    with pytest.raises(UsageError, match="--memory kept is about the C library of a CPU"):
        resolve_memory("kept", "cuda")
    monkeypatch.setattr(allocator, "_c_function", lambda name: None)  # musl, macOS, Windows
    assert resolve_memory(None, "cpu") is None
    with pytest.raises(UsageError, match="--memory fresh needs glibc"):
        resolve_memory("fresh", "cpu")
    with memory_state("kept"):
        pass
    found = {what: (state, advice) for what, state, advice in diagnose(torch.device("cpu"))}
    assert found["minor page faults a call of 1 MiB"] == ("unknown", None)


@GLIBC
def test_the_doctor_counts_them_and_sees_another_allocator(found: Any) -> None:
    state, advice = found["doctor"]
    assert re.fullmatch(rf"0 kept, {PAGES // 10}\d fresh", state)
    assert advice is None
    assert "another allocator" in found["deaf doctor"][1]  # one that mallopt says nothing to
