"""The device, the versions of what measures on it, the source's commit, and bgcbench doctor. Tens of lines.

python -m benchmarks.facts [--device cuda] [--out source.json]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import pack
from bgcbench.cli import main as bgcbench

PACKAGES = ("torch", "triton", "torchvision", "numpy", "typer", "rich", "psutil", "jsonschema", "pytest",
            "pytest-xdist", "pytest-timeout", "timm", "scikit-learn", "matplotlib")  # fmt: skip


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="where the source's commit is written")
    options = parser.parse_args()
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False, timeout=20)
    source = pack.source()
    if options.out is not None:
        options.out.write_text(json.dumps(source) + "\n", encoding="utf-8")
    print(f"python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    print(f"commit {source['git_commit']}" + (", changed since" if source["git_dirty"] else ""), flush=True)
    return bgcbench(["doctor", "--device", options.device])


if __name__ == "__main__":
    raise SystemExit(main())
