"""An exported network runs in an environment that has one runtime and nothing else.

The environments are made of nothing but Python, and links to the installed distribution of the runtime and to those
that it requires: what ``pip install`` would put there, without fetching gigabytes.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import venv
from pathlib import Path

import pytest
import torch

import bgcbench
from bgcbench.specs import TARGETS
from tests.deployment.example import TARGETS as WRITABLE
from tests.deployment.example import converted

RUN = {
    "onnx": """
import numpy, onnxruntime
x, right = numpy.load("x.npy"), numpy.load("y.npy")
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
y = session.run(None, {session.get_inputs()[0].name: x})[0]
print("error", float(numpy.linalg.norm(y - right) / numpy.linalg.norm(right)))
""",
    "torch": """
import torch
from net import load
x, right = torch.load("x.pt"), torch.load("y.pt")
with torch.no_grad():
    print("error", float((load()(x) - right).norm() / right.norm()))
""",
    "exported": """
import torch
x, right = torch.load("x.pt"), torch.load("y.pt")
with torch.no_grad():
    print("error", float((torch.export.load("net.pt2").module()(x) - right).norm() / right.norm()))
""",
}


def required(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """Collect the distribution ``name`` and those that it requires here."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        found[key] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # for another system
        return
    for requirement in found[key].requires or ():
        if "extra ==" not in requirement:
            required(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0], found)


def environment(folder: Path, *distributions: str) -> Path:
    """The interpreter of a new environment with these distributions alone."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    found: dict[str, importlib.metadata.Distribution] = {}
    for name in distributions:
        required(name, found)
    for distribution in found.values():
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("to", WRITABLE)
def test_it_gives_the_outputs_that_it_gave(to: str, tmp_path: Path) -> None:
    network = converted("resnet18", "bgc", 64).eval()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        y = network(x)
    bgcbench.export(network, tmp_path / f"net{TARGETS[to]}", to, example_input=(3, 64, 64))
    if to == "onnx":
        import numpy

        numpy.save(tmp_path / "x.npy", x.numpy())
        numpy.save(tmp_path / "y.npy", y.numpy())
    torch.save(x, tmp_path / "x.pt")
    torch.save(y, tmp_path / "y.pt")
    python = environment(tmp_path / "venv", *(("onnxruntime", "numpy") if to == "onnx" else ("torch",)))

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-c", code]
        return subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=False, timeout=300)

    for absent in ("bgcbench", "torchvision", *(("torch", "onnx") if to == "onnx" else ("onnx", "onnxruntime"))):
        assert "ModuleNotFoundError" in run(f"import {absent}").stderr
    done = run(RUN[to])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-5
