"""Several runs of the command line in one process, the most valuable first, within a given time.

table4_cuda, networks_cuda and train_cuda are lists of runs; this is what they do with them. One process, because what
cuDNN's search and the tuner of our kernels have found is kept, and a CUDA context takes seconds to make.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bgcbench.cli import main as bgcbench
from bgcbench.errors import ResultFileError
from bgcbench.results.document import read
from bgcbench.results.rows import ProfileRow

SECONDS = 480
INTERRUPTED = (130, 143)
# On a CPU, and so small that it takes seconds: the same command runs, and its figures mean nothing.
LAYER = {"preset": None, "channels": 16, "batch": 2, "groups": 4}
NETWORK = {"model": "wrn_10_1", "batch": 2}
TRAINING = {"model": "wrn_10_1", "size": 16, "classes": 10, "subset": 64, "batch_size": 32, "epochs": 1,
            "compile": False}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One result file, the command and options that make it, and the seconds that it may take.

    ``seconds`` are generous for an H100: the run is not begun with less left. An option that is True or False is a
    switch; None leaves it out.
    """

    name: str
    seconds: float
    command: str
    options: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"{self.name}.json"

    def words(self, **more: Any) -> list[str]:
        """What follows ``bgcbench`` on the command line."""
        words = [self.command]
        for name, value in {**self.options, **more}.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{'' if value else 'no-'}{option}")
            elif value is not None:
                words += [str(value)] if (self.command, name) == ("train", "model") else [f"--{option}", str(value)]
        return words

    def rehearsal(self) -> Run:
        """The same on a CPU in seconds."""
        small = TRAINING if self.command == "train" else NETWORK if "model" in self.options else LAYER
        cpu = {"precision": "fp32", "mode": None, "max_time": None, "quick": True}
        return Run(self.name, 0, self.command, {**self.options, **small, **cpu})


def main(description: str | None, runs: Sequence[Run], argv: Sequence[str] | None = None) -> int:
    """Do the runs that ``argv`` asks for; the exit code is the worst run's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="*", help="of which files: names or patterns, separated by commas")
    parser.add_argument("--missing-in", type=Path, metavar="FOLDER", help="leave out what FOLDER holds whole already")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no run that could take longer than this")
    parser.add_argument("--rehearse", action="store_true", help="tiny runs on the CPU: do the commands work?")
    parser.add_argument("--list", action="store_true", help="print the runs and what each may take, and stop")
    options = parser.parse_args(argv)
    patterns = options.only.split(",")
    for pattern in patterns:
        if not fnmatch.filter([run.name for run in runs], pattern):
            parser.error(f"--only {pattern} matches none of {', '.join(run.name for run in runs)}")
    runs = [run for run in runs if any(fnmatch.fnmatch(run.name, pattern) for pattern in patterns)]
    if options.missing_in is not None:
        runs = [run for run in runs if not is_whole(options.missing_in / run.file)]
        if not runs:
            print(f"{options.missing_in} has every one of them whole")
            return 0
    if options.list:
        for run in runs:
            print(f"{run.seconds:4.0f} s  {run.file}  bgcbench {' '.join(run.words(device=options.device))}")
        return 0
    if options.rehearse:
        runs, options.device = [run.rehearsal() for run in runs], "cpu"
    return do(runs, options.folder, options.device, options.seconds)


def do(runs: Sequence[Run], folder: Path, device: str, seconds: float) -> int:
    """Do ``runs`` as far as ``seconds`` go, and say in a line or two what each found."""
    deadline, told, worst = time.monotonic() + seconds, [], 0
    for run in runs:
        left = deadline - time.monotonic()
        if left < run.seconds:
            told.append(f"{run.name}: skipped, it may take {run.seconds:.0f} s and {left:.0f} s are left")
            continue
        words = [*run.words(device=device), "--out", str(folder / run.file), "--force"]
        print("bgcbench", *words, flush=True)
        begin = time.monotonic()
        try:
            code = bgcbench(words)
        except Exception:  # noqa: BLE001 - one run's failure must not cost the others
            traceback.print_exc()
            code = 1
        told.append(f"{run.name}: exit code {code}, {time.monotonic() - begin:.0f} s; {digest(folder / run.file)}")
        worst = max(worst, code)
        if code in INTERRUPTED:
            break
    print(*told, sep="\n", flush=True)
    return worst


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a result whose run was done to the end."""
    try:
        document = read(path)
    except ResultFileError:
        return False
    return document.complete and all(row.is_done for row in document.results)


def digest(path: Path) -> str:
    """The figures of a file in one line: milliseconds of the last phase, or images a second of a training."""
    try:
        document = read(path)
    except ResultFileError:
        return "no file"
    parts, unit = [], ""
    for row in document.results:
        name = f"{row.params.variant} {row.params.groups}"
        if row.status != "ok":
            parts.append(f"{name} {row.status}")
        elif isinstance(row, ProfileRow):
            phase, timing = list(row.phases.items())[-1]
            unit = f"{phase} ms: "
            parts.append(f"{name} {timing.summary.median_s * 1e3:.3g}")
        else:
            unit = "images/s: "
            parts.append(f"{name} {row.images_per_s:.0f}")
    return unit + ", ".join(parts)
