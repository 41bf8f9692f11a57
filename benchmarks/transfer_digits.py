"""A small network trained on real images, converted without training and with little: what each start is worth.

    python -m benchmarks.transfer_digits [--out results/transfer-wrn_16_4-digits-cpu.json] [--plot FILE] [--work DIR]

wrn_16_4 is trained on scikit-learn's digits by ``bgcbench train``, three times. Each of the networks is converted by
``bgcbench transfer``: every variant and N, weights copied, white and calibrated, batch norm as it is (evaluated only)
and re-estimated (evaluated, and trained for 1 and 3 epochs). What is written is one ``bgcbench transfer`` result of all
these runs; its seeds are the trained networks. With --work the parts stay in that folder, and another call goes on with
them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from bgcbench.plots import draw
from bgcbench.results.document import Document, dumps, read
from bgcbench.results.rows import TransferRow

MODEL = "wrn_16_4"
GROUPS = "2,4,8,16"
# For these three a copy is the white optimum.
STARTS = {"gc,shuffle,lowrank": "copy,calibrated", "bgc": "copy,white,calibrated", "tlgc": "white,calibrated"}
EVERY = "gc,shuffle,tlgc,bgc,lowrank"
# Evaluated with batch norm as it is and re-estimated, and trained from what that gives.
WAYS = {
    "no-rebn": ["--no-rebn", "--epochs", "0"],
    "rebn": ["--rebn", "--epochs", "0"],
    "trained": ["--rebn", "--epochs", "3", "--batch-size", "64", "--control"],
}

READING = Lock()  # msgspec 0.22 crashes where two threads meet a type for the first time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/transfer-wrn_16_4-digits-cpu.json"))
    parser.add_argument("--plot", type=Path, default=Path("results/transfer-wrn_16_4-digits-cpu.png"))
    parser.add_argument("--work", type=Path, help="keep the parts here")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=EVERY)
    parser.add_argument("--train-variants", default=EVERY, help="of these, those that are trained")
    parser.add_argument("--train-groups", default=GROUPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        dense = _dense(work, options.seeds)
        runs = []
        for way, (variants, inits), (seed, weights) in itertools.product(WAYS, STARTS.items(), dense.items()):
            wanted = set(options.variants.split(","))
            wanted &= set(options.train_variants.split(",")) if way == "trained" else wanted
            named = ",".join(name for name in variants.split(",") if name in wanted)
            groups = options.train_groups if way == "trained" else GROUPS
            runs += [(seed, weights, named, groups, inits, way)] if named else []
        with ThreadPoolExecutor(options.jobs) as pool:
            parts = list(pool.map(lambda run: _part(work, *run), runs))
        document = _joined([read(work / part) for part in parts], options.seeds)
    options.out.write_text(dumps(document), encoding="utf-8")
    draw(document, options.plot, None)
    return 0


def _dense(work: Path, seeds: str) -> dict[int, str]:
    """The trained networks by seed: their files, relative to ``work``."""
    if not (work / "dense.json").exists():
        _run(work, ["train", MODEL, "--data", "digits", "--variants", "standard", "--seeds", seeds, "--device", "cpu",
                    "--threads", "1", "--out", "dense.json"])  # fmt: skip
    found = {}
    for row in read(work / "dense.json").results:
        (final,) = (work / row.checkpoints).glob("final-*.pt")
        named = work / f"{MODEL}-digits-s{row.params.seed}.pt"
        if not named.exists():
            shutil.copy(final, named)
        found[row.params.seed] = named.name
    return found


def _part(work: Path, seed: int, weights: str, variants: str, groups: str, inits: str, way: str) -> str:
    """One run of the command, and the name of its file."""
    name = f"part-{variants.replace(',', '-')}-{way}-s{seed}.json"
    with READING:
        document = read(work / name) if (work / name).exists() else None
    if document is None or not document.complete:
        again = ["--resume", name] if document is not None else None
        _run(work, ["transfer", *(again or [weights, "--data", "digits", "--variants", variants, "--groups", groups,
                    "--init", inits, "--seed", str(seed), *WAYS[way], "--device", "cpu", "--threads", "1",
                    "--out", name])])  # fmt: skip
    return name


def _run(work: Path, words: list[str]) -> None:
    here = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{here}"}
    command = [sys.executable, "-m", "bgcbench", *words, "--format", "json"]
    with open(work / "log.txt", "a", encoding="utf-8") as log:
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL, stderr=log, env=environment)


def _joined(documents: list[Document], seeds: str) -> Document:
    """One result of all parts: the rows of all, and what the last of them says of itself."""
    joined = documents[-1]
    rows: dict[str, TransferRow] = {}
    for document in documents:
        # A part that is not trained must not take the place of the same row in one that is.
        rows |= {row.key: row for row in document.results if row.epochs or row.key not in rows}
    merged = {
        field: list(dict.fromkeys(name for document in documents for name in document.config[field]))
        for field in ("variants", "inits")
    }
    joined.config = {**joined.config, **merged, "seeds": [int(seed) for seed in seeds.split(",")]}
    joined.results = tuple(rows.values())
    joined.warnings = tuple(dict.fromkeys(text for document in documents for text in document.warnings))
    return joined


if __name__ == "__main__":
    raise SystemExit(main())
