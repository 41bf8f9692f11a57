"""What the reports of ``train`` and ``transfer`` share: errors over seeds, differences, recipes, how rows ended."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bgcbench.report import label_of, scaled, where_line
from bgcbench.results import Json
from bgcbench.specs import VARIANTS

SYNTHETIC = "synthetic"  # a data set without anything to be right about
NO_IMAGES = "none"  # as a data set: nothing was judged
TELLING = 3  # seeds from which on a difference may be called one
# The terms of a recipe in the order in which they are told; those that are off or unknown are left out.
TERMS = {
    "epochs": "{} epochs",
    "batch_size": "batch {}",
    "accumulate": "in {} parts",
    "subset": "{} training images",
    "lr": "SGD at lr {}",
    "schedule": "{}",
    "milestones": "at epochs {}",
    "gamma": "times {}",
    "momentum": "momentum {}",
    "nesterov": "Nesterov",
    "weight_decay": "weight decay {}",
    "label_smoothing": "label smoothing {}",
    "group_lasso": "group lasso {} (LGC)",
    "pad": "crops of images padded by {}",
    "flip": "flipped at random",
    "algorithm": "{}",
}


# ---------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True, eq=False)
class Cell:
    """One variant at one N: a row a seed."""

    variant: str
    groups: int
    rows: list[Json]

    @property
    def label(self) -> str:
        return label_of(self.variant)

    @property
    def name(self) -> str:
        return self.label if self.variant == "standard" else f"{self.label} N={self.groups}"

    @property
    def done(self) -> list[Json]:
        return [row for row in self.rows if row["status"] == "ok"]

    def by_seed(self, field: str = "error_final") -> dict[int, float]:
        """What is known of ``field`` in the finished rows, by seed."""
        return {row["params"]["seed"]: value for row in self.done if (value := error_of(row, field)) is not None}

    def count(self, name: str) -> float | None:
        """A count of the deployed form, or with _training of what was trained; the mean where seeds differ."""
        every = [row["counts"] for row in self.rows if row["counts"]]
        known = [counts.get(name) or counts[name.removesuffix("_training")] for counts in every]
        return statistics.fmean(known) if known else None

    @property
    def images_per_s(self) -> float | None:
        return self._median("images_per_s")

    @property
    def matmul_fraction(self) -> float | None:
        """Arithmetic done over what the device's best matrix product does in the same time."""
        return self._median("matmul_fraction")

    @property
    def printed(self) -> float | None:
        """The paper's error (percent), where it has one."""
        return next((row["paper"]["error"] for row in self.rows if row.get("paper")), None)

    @property
    def indivisible(self) -> list[str]:
        """Convolutions that stayed dense only because N does not divide their channels."""
        record: Json = next((row["convert"] for row in self.rows if row.get("convert")), {"kept": []})
        return [kept["name"] for kept in record["kept"] if kept.get("code") == "indivisible"]

    def _median(self, field: str) -> float | None:
        known = [row[field] for row in self.rows if row.get(field) is not None]
        return statistics.median(known) if known else None


def error_of(row: Json, field: str) -> float | None:
    """An error of a row (percent); None where there is none, and for images that mean nothing."""
    value = row.get(field)
    return None if value is None or synthetic([row]) else float(value)


def synthetic(rows: Sequence[Json]) -> bool:
    return any(row["params"]["dataset"] == SYNTHETIC for row in rows)


def unseen(rows: Sequence[Json]) -> bool:
    """Whether conversions were made without images."""
    return any(row["params"]["dataset"] == NO_IMAGES for row in rows)


def masked(rows: Sequence[Json]) -> bool:
    """Whether a form is trained that is not the one that is deployed."""
    return any((row["counts"] or {}).get("params_training") for row in rows)


def place_of(cell: Cell) -> tuple[int, int]:
    """By N, and the variants as they are registered, which puts the standard convolution first."""
    order = {name: number for number, name in enumerate(VARIANTS)}
    return cell.groups, order.get(cell.variant, len(order))


def planned(document: Json) -> int:
    """Seeds that a cell was to have."""
    return len(document.get("config", {}).get("seeds") or {row["params"]["seed"] for row in document["results"]})


# ---------------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """Mean errors of two cells (percent) over ``seeds`` common ones; ``sd`` is that of the differences by seed."""

    ours: float
    theirs: float
    seeds: int
    sd: float | None

    @property
    def value(self) -> float:
        """In percentage points; what floating point makes of 0 is 0."""
        return round(self.ours - self.theirs, 9) + 0.0

    @property
    def text(self) -> str:
        """ "+0.40 ± 0.20"."""
        return f"{self.value:+.2f}" + ("" if self.sd is None else f" ± {self.sd:.2f}")

    def beyond_doubt(self, image: float) -> bool:
        """Whether the difference is more than two standard errors, and more than one test image."""
        if self.sd is None or self.seeds < TELLING:
            return False
        return abs(self.value) > max(2 * self.sd / math.sqrt(self.seeds), image * (1 + 1e-6))


def difference_of(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Errors by seed: of the seeds that both have if they are two or more, else of what each has."""
    common = sorted(ours.keys() & theirs.keys())
    sd = None
    if len(common) > 1:
        ours, theirs = {s: ours[s] for s in common}, {s: theirs[s] for s in common}
        sd = statistics.stdev([ours[s] - theirs[s] for s in common])
    if not ours or not theirs:
        return None
    return Difference(statistics.fmean(ours.values()), statistics.fmean(theirs.values()), len(common), sd)


def image_of(rows: Sequence[Json]) -> float:
    """How much one test image changes an error (percentage points); 0 where that is not known."""
    images = next((row["test_images"] for row in rows if row.get("test_images")), None)
    return 100 / images if images else 0.0


# ------------------------------------------------------------------------------------------------------ texts of a cell


def count_text(value: float | None) -> str:
    return "-" if value is None else scaled(value)


def error_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread_text(by_seed: Mapping[int, float]) -> str:
    """The mean, with the standard deviation over the seeds from two on."""
    values = list(by_seed.values())
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def flags(cell: Cell, ending: Callable[[Json], str] = lambda row: str(row["status"])) -> list[str]:
    """How the rows that are not done ended, and what stayed dense because N does not divide it."""
    ended: dict[str, list[str]] = {}
    for row in cell.rows:
        if row["status"] != "ok":
            ended.setdefault(ending(row), []).append(f"s{row['params']['seed']}")
    every = len(ended) == 1 and not cell.done
    found = [how if every else f"{how} ({', '.join(seeds)})" for how, seeds in ended.items()]
    dense = cell.indivisible
    return [*found, *([f"{len(dense)} kept dense"] if dense else [])]


# ------------------------------------------------------------------------------------------------------ title and notes


def title_lines(document: Json, rows: Sequence[Json], network: str = "") -> list[str]:
    """The network (with ``network`` after its name), the data, and on what it ran."""
    config = document.get("config", {})
    own = {"dataset": config.get("data"), "classes": config.get("num_classes")}
    about = {**config, **own, **(rows[0]["params"] if rows else {})}
    images = "without images" if about["dataset"] == NO_IMAGES else f"on {about['dataset']}"
    line = f"{about.get('model', 'a network')}{network} {images}"
    if "height" in about:
        line += f", {about['height']} x {about['width']} px" + (f", {n} classes" if (n := about.get("classes")) else "")
    line += f"; convolutions: {about['where']}" if "where" in about else ""
    ran = [str(about[name]) for name in ("precision", "layout") if about.get(name)]
    ran += ["compiled"] if about.get("compile") else []
    processes = max((row.get("world_size") or 1 for row in rows), default=1)
    ran += [f"{processes} processes"] if processes > 1 else []
    return [line, f"{', '.join(ran)}; {where_line(document)}"]


def recipe_line(document: Json, rows: Sequence[Json]) -> str:
    """The recipe and its terms in one line, as they ran."""
    ran = {name: value for name, value in document["settings"].items() if value is not None}
    values = {
        **document.get("config", {}),
        **{name: rows[0]["params"].get(name) for name in ("epochs", "subset")},
        **ran,
    }
    # Of variants that have more than one exact form; what 'auto' has found stands by itself.
    forms = [row["params"] for row in rows if row["params"].get("algorithm") not in (None, "stock", "masked", "auto")]
    values["algorithm"] = list(dict.fromkeys(f"{label_of(p['variant'])} as {p['algorithm']}" for p in forms))
    if not any(row["params"]["variant"] == "lgc" for row in rows):
        values.pop("group_lasso", None)
    if not values.get("milestones"):
        values.pop("gamma", None)
    if values.get("accumulate") == 1:
        values.pop("accumulate")
    told = [term.format(_plain(values[name])) for name, term in TERMS.items() if values.get(name)]
    return f"recipe {rows[0]['params']['recipe']}: {', '.join(told)}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def dense_lines(cells: Sequence[Cell]) -> list[str]:
    """What stayed dense because N does not divide it."""
    return [f"{c.name}: N does not divide, kept dense: {', '.join(c.indivisible)}" for c in cells if c.indivisible]


def ended_lines(cell: Cell) -> list[str]:
    """The rows that are not done, why, and how far they came; in one line where that is the same for all seeds."""
    lines = [(row["key"], ending_of(row)) for row in cell.rows if row["status"] != "ok"]
    if len(lines) == len(cell.rows) > 1 and len({line for _, line in lines}) == 1:
        return [f"{cell.name}, all seeds: {lines[0][1]}"]
    return [f"{key}: {line}" for key, line in lines]


def ending_of(row: Json) -> str:
    """Why a row is not done, and how far it came."""
    line = f"{row['status']}: {row['reason']}"
    if row["epochs"]:
        line += f"; {len(row['epochs'])} of {row['params']['epochs']} epochs"
        if (error := error_of({**row["epochs"][-1], "params": row["params"]}, "test_error")) is not None:
            line += f", the last test error {error:.2f} %"
    return line
