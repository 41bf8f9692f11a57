"""Collects in .pack/ what a device without a network and without a checkout lacks.

    python -m benchmarks.pack [--python 3.12]

.pack/wheels holds, for that Python on x86-64 Linux, what bgcbench needs to read result files. .pack/source.json holds
the commit and a digest of the package's files: result files that were measured without a checkout get the commit by it
(see bring_home), and one that was packed before the last change is told apart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bgcbench.results.document import git_state

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / ".pack"
SOURCE, AGAIN = PACK / "source.json", PACK / "again.txt"
# msgspec; jsonschema and what it needs beside attrs and typing-extensions, which come with other packages.
WHEELS = ("msgspec", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def digest() -> str:
    """SHA-256 over the package's files: what decides what a measurement measures."""
    found = hashlib.sha256()
    for path in sorted([*(ROOT / "bgcbench").rglob("*.py"), ROOT / "pyproject.toml"]):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def source() -> dict[str, Any]:
    """Commit of the files here and whether they were changed since, from the checkout or from .pack/source.json."""
    tool = git_state()
    if tool["git_commit"] is not None or not SOURCE.exists():
        return tool
    packed = json.loads(SOURCE.read_text(encoding="utf-8"))
    return {"git_commit": packed["git_commit"], "git_dirty": packed["git_dirty"] or packed["digest"] != digest()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="the device's")
    options = parser.parse_args()
    folder = PACK / "wheels"
    shutil.rmtree(folder, ignore_errors=True)  # two versions of one package would stop the installation
    folder.mkdir(parents=True)
    SOURCE.write_text(json.dumps({**source(), "digest": digest()}, indent=1) + "\n", encoding="utf-8")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", options.python, *platforms, "--dest", str(folder)]
    code = subprocess.run([*command, *WHEELS], check=False).returncode
    print(f"{len(list(folder.glob('*.whl')))} of {len(WHEELS)} wheels in {folder.relative_to(ROOT)}")
    if source()["git_dirty"]:
        print("the package has uncommitted changes: what is measured with it says so")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
