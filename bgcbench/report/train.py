"""The table of a ``train`` document: errors over the seeds, beside the standard convolution's and the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bgcbench.report import Column, Report, notes, scaled, share_words, significant, where_line
from bgcbench.results import Json
from bgcbench.specs import VARIANTS
from bgcbench.theory import paper

SYNTHETIC = "synthetic"  # a data set without anything to be right about
TELLING = 3  # seeds from which on a difference may be called one
# Epochs and table of the paper's trainings, by data set.
PAPERS = {"cifar10": (5, paper.TABLE5_EPOCHS), "imagenet": (6, paper.TABLE6_EPOCHS)}
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
}


@dataclass(frozen=True)
class _Cell:
    """One variant at one N: a row a seed."""

    variant: str
    groups: int
    rows: list[Json]

    @property
    def label(self) -> str:
        return VARIANTS[self.variant].label if self.variant in VARIANTS else self.variant

    @property
    def name(self) -> str:
        return self.label if self.variant == "standard" else f"{self.label} N={self.groups}"

    @property
    def done(self) -> list[Json]:
        return [row for row in self.rows if row["status"] == "ok"]

    def by_seed(self, field: str = "error_final") -> dict[int, float]:
        """What is known of ``field`` in the finished rows, by seed."""
        return {row["params"]["seed"]: value for row in self.done if (value := _error(row, field)) is not None}

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

    def _median(self, field: str) -> float | None:
        known = [row[field] for row in self.rows if row.get(field) is not None]
        return statistics.median(known) if known else None


@dataclass(frozen=True)
class _Difference:
    """Mean errors of two cells (percent) over ``seeds`` common ones; ``sd`` is that of the differences by seed."""

    ours: float
    theirs: float
    seeds: int
    sd: float | None

    @property
    def value(self) -> float:
        """In percentage points; what floating point makes of 0 is 0."""
        return round(self.ours - self.theirs, 9) + 0.0

    def beyond_doubt(self, image: float) -> bool:
        """Whether the difference is more than two standard errors, and more than one test image."""
        if self.sd is None or self.seeds < TELLING:
            return False
        return abs(self.value) > max(2 * self.sd / math.sqrt(self.seeds), image * (1 + 1e-6))


def train_report(document: Json) -> Report:
    """A row a variant and N over its seeds, what BGC has on GC, and what to know before the numbers are used."""
    rows: list[Json] = document["results"]
    cells = _cells(rows)
    standard = next((cell for cell in cells if cell.variant == "standard"), None)
    columns = [
        Column("variant", [cell.label for cell in cells], right=False, lead=True),
        Column("N", [str(cell.groups) for cell in cells], lead=True),
        Column("params", [_scaled(cell.count("params")) for cell in cells]),
        Column("MACs", [_scaled(cell.count("macs")) for cell in cells]),
    ]
    if _masked(rows):
        columns.append(Column("trained params", [_scaled(cell.count("params_training")) for cell in cells]))
    if not _synthetic(rows):
        columns += [
            Column("error last %", [_spread(cell.by_seed()) for cell in cells]),
            Column("error best %", [_spread(cell.by_seed("error_best")) for cell in cells]),
        ]
    if any(cell.by_seed("error_final_top5") for cell in cells):
        columns.append(Column("top-5 %", [_spread(cell.by_seed("error_final_top5")) for cell in cells]))
    planned = _planned(document)
    columns += [
        Column("seeds", [f"{len(cell.done)}/{planned}" for cell in cells]),
        Column("images/s", ["-" if (v := cell.images_per_s) is None else significant(v) for cell in cells]),
    ]
    if any(cell.matmul_fraction is not None for cell in cells):
        columns.append(
            Column("of peak", ["-" if (v := cell.matmul_fraction) is None else f"{v:.0%}" for cell in cells])
        )
    if any(_printed(cell) is not None for cell in cells):
        columns.append(Column("paper %", ["-" if (e := _printed(cell)) is None else f"{e:.2f}" for cell in cells]))
    if not _synthetic(rows):
        columns.append(Column("to SC", [_to_standard(cell, standard) for cell in cells]))
    columns.append(Column("flags", [", ".join(_flags(cell)) for cell in cells], right=False))
    sections = {"What this shows": _findings(cells, rows), "Notes": _notes(document, rows, cells)}
    records = [_record(row, standard) for row in rows]
    return Report(_title(document, rows), columns, {k: v for k, v in sections.items() if v}, records)


def _cells(rows: Sequence[Json]) -> list[_Cell]:
    """By N, and the variants as they are registered, which puts the standard convolution first."""
    found: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        found.setdefault((row["params"]["variant"], row["params"]["groups"]), []).append(row)
    order = {name: number for number, name in enumerate(VARIANTS)}
    places = sorted(found, key=lambda at: (at[1], order.get(at[0], len(order))))
    return [_Cell(*at, found[at]) for at in places]


def _planned(document: Json) -> int:
    """Seeds that a cell was to have."""
    return len(document.get("config", {}).get("seeds") or {row["params"]["seed"] for row in document["results"]})


def _synthetic(rows: Sequence[Json]) -> bool:
    return any(row["params"]["dataset"] == SYNTHETIC for row in rows)


def _masked(rows: Sequence[Json]) -> bool:
    """Whether a form is trained that is not the one that is deployed."""
    return any((row["counts"] or {}).get("params_training") for row in rows)


def _error(row: Json, field: str) -> float | None:
    """An error of a row (percent); None where there is none, and for images that mean nothing."""
    value = row.get(field)
    return None if value is None or _synthetic([row]) else float(value)


def _last(row: Json, field: str) -> Any:
    """What was learnt, at the end of the last epoch; None where it is not known."""
    return (row["epochs"][-1].get("learnt") or {}).get(field) if row["epochs"] else None


# ---------------------------------------------------------------------------------------------------------------- cells


def _scaled(value: float | None) -> str:
    return "-" if value is None else scaled(value)


def _spread(by_seed: dict[int, float], sign: str = "") -> str:
    """The mean, with the standard deviation over the seeds from two on."""
    values = list(by_seed.values())
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{spread}"


def _against(one: _Cell, other: _Cell) -> _Difference | None:
    """Last errors of two cells: of the seeds that both have if they are two or more, else of what each has."""
    ours, theirs = one.by_seed(), other.by_seed()
    common = sorted(ours.keys() & theirs.keys())
    sd = None
    if len(common) > 1:
        ours, theirs = {s: ours[s] for s in common}, {s: theirs[s] for s in common}
        sd = statistics.stdev([ours[s] - theirs[s] for s in common])
    if not ours or not theirs:
        return None
    return _Difference(statistics.fmean(ours.values()), statistics.fmean(theirs.values()), len(common), sd)


def _to_standard(cell: _Cell, standard: _Cell | None) -> str:
    if cell is standard:
        return "0"
    found = None if standard is None else _against(cell, standard)
    if found is None:
        return "-"
    return f"{found.value:+.2f}" + ("" if found.sd is None else f" ± {found.sd:.2f}")


def _printed(cell: _Cell) -> float | None:
    return next((row["paper"]["error"] for row in cell.rows if row.get("paper")), None)


def _flags(cell: _Cell) -> list[str]:
    """How the rows that are not done ended, and what stayed dense because N does not divide it."""
    ended: dict[str, list[str]] = {}
    for row in cell.rows:
        if row["status"] != "ok":
            ended.setdefault(row["status"], []).append(f"s{row['params']['seed']}")
    every = len(ended) == 1 and not cell.done
    found = [status if every else f"{status} ({', '.join(seeds)})" for status, seeds in ended.items()]
    dense = _indivisible(cell)
    return [*found, *([f"{len(dense)} kept dense"] if dense else [])]


def _indivisible(cell: _Cell) -> list[str]:
    record: Json = next((row["convert"] for row in cell.rows if row.get("convert")), {"kept": []})
    return [kept["name"] for kept in record["kept"] if "does not divide" in kept["reason"]]


# ------------------------------------------------------------------------------------------------------- what it shows


def _pairs(cells: Sequence[_Cell]) -> list[tuple[_Cell, _Cell]]:
    """BGC beside GC at the same N and, at twice its N, beside GC; a GC of one group is the standard convolution."""
    at = {(cell.variant, cell.groups): cell for cell in cells}
    plain = {cell.groups: cell for cell in cells if cell.variant in ("standard", "gc")}
    return [(at["bgc", n], plain[k]) for k in sorted(plain) for n in (k, 2 * k) if ("bgc", n) in at]


def _findings(cells: Sequence[_Cell], rows: Sequence[Json]) -> list[str]:
    found = [(one, other, _against(one, other)) for one, other in _pairs(cells)]
    return [_beside(one, other, difference, _image(rows)) for one, other, difference in found if difference]


def _beside(one: _Cell, other: _Cell, difference: _Difference, image: float) -> str:
    """Two cells in plain words: how large, which has the lower error, and whether that is more than scatter."""
    ours, theirs = one.count("params"), other.count("params")
    size = f" ({share_words(ours / theirs)})" if ours and theirs else ""
    line = f"{one.name} beside {other.name}{size}: {difference.ours:.2f} % against {difference.theirs:.2f} %, "
    line += "lower by" if difference.value < 0 else "higher by" if difference.value > 0 else "apart by"
    line += f" {abs(difference.value):.2f}" + ("" if difference.sd is None else f" ± {difference.sd:.2f}") + " points"
    if difference.seeds < TELLING:
        are = "1 common seed is" if difference.seeds == 1 else f"{difference.seeds or 'no'} common seeds are"
        return f"{line}; {are} too few to tell"
    told = "more than the seeds scatter" if difference.beyond_doubt(image) else "not told apart"
    return f"{line} over {difference.seeds} seeds: {told}"


def _image(rows: Sequence[Json]) -> float:
    """How much one test image changes an error (percentage points); 0 where that is not known."""
    images = next((row["test_images"] for row in rows if row.get("test_images")), None)
    return 100 / images if images else 0.0


# ----------------------------------------------------------------------------------------- title, notes and records


def _title(document: Json, rows: Sequence[Json]) -> list[str]:
    config = document.get("config", {})
    about = {**config, "dataset": config.get("data"), **(rows[0]["params"] if rows else {})}
    line = f"{about.get('model', 'a network')} on {about['dataset']}"
    if "height" in about:
        line += f", {about['height']} x {about['width']} px, {about['classes']} classes"
    line += f"; convolutions: {about['where']}" if "where" in about else ""
    ran = [str(about[name]) for name in ("precision", "layout") if about.get(name)]
    ran += ["compiled"] if about.get("compile") else []
    processes = max((row.get("world_size") or 1 for row in rows), default=1)
    ran += [f"{processes} processes"] if processes > 1 else []
    return [line, f"{', '.join(ran)}; {where_line(document)}"]


def _notes(document: Json, rows: Sequence[Json], cells: Sequence[_Cell]) -> list[str]:
    lines = [_recipe(document, rows)] if rows else []
    if _synthetic(rows):
        lines.append("synthetic images: the speed is all that is measured; there is no error to show")
    else:
        lines += _about_errors(rows, cells)
    if _masked(rows):
        lines.append(
            "LGC and FLGC are trained masked, with dense kernels (trained params); params and MACs are of the form "
            "that is deployed afterwards"
        )
    if any(row.get("matmul_fraction") for row in rows):
        lines.append(
            "of peak: multiply-adds done (three forward passes a step) over those of the device's best matrix product "
            "in the same precision, measured in this run"
        )
    lines += [line for cell in cells if (line := _learnt(cell))]
    lines += _about_paper(rows)
    for cell in cells:
        told = any(text.startswith(f"{cell.name}: ") and "kept dense" in text for text in document["warnings"])
        if (dense := _indivisible(cell)) and not told:
            lines.append(f"{cell.name}: N does not divide, kept dense: {', '.join(dense)}")
    if any(cell.done and len(cell.done) < len(cell.rows) for cell in cells):
        lines.append(
            "where a seed did not finish, the mean is of those that did, which flatters if it failed in training"
        )
    lines += [line for cell in cells for line in _ended(cell)]
    return lines + notes(document, [], quick="few epochs or images, no claim; run without --quick")


def _recipe(document: Json, rows: Sequence[Json]) -> str:
    """The recipe and its terms in one line, as they ran."""
    ran = {name: value for name, value in document["settings"].items() if value is not None}
    values = {
        **document.get("config", {}),
        **{name: rows[0]["params"].get(name) for name in ("epochs", "subset")},
        **ran,
    }
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


def _about_errors(rows: Sequence[Json], cells: Sequence[_Cell]) -> list[str]:
    lines = [
        "error: top-1 on the test images, mean ± standard deviation over the seeds. last: after the last epoch, the "
        "figure to quote; best: of the epoch that was best on these same test images, which flatters. to SC: last "
        "error less SC's, in percentage points; of the same seeds, where there are two or more"
    ]
    if image := _image(rows):
        data = rows[0]["params"]["dataset"]
        lines.append(f"{data}: {100 / image:.0f} test images, so one image is {significant(image, 2)} points")
    if any(d and d.seeds >= TELLING for one, other in _pairs(cells) if (d := _against(one, other))):
        lines.append(
            "more than the seeds scatter: the mean of the differences by seed is more than twice its standard error, "
            "and more than one image. Where nothing differs, chance does that in about 18 % of comparisons with 3 "
            "seeds, 12 % with 5, 8 % with 10; and all seeds are judged on the same images: what others would say is "
            "not in it"
        )
    return lines


def _learnt(cell: _Cell) -> str | None:
    """What a learned grouping left behind that the counts do not tell."""
    lines = [text for text in (_moved(cell), _left_behind(cell)) if text]
    return "; ".join(lines) and f"{cell.name}: {'; '.join(lines)}"


def _moved(cell: _Cell) -> str | None:
    """How many channels are in another group than at the start."""
    moved = [share for row in cell.done if (share := _last(row, "moved")) is not None]
    if not moved:
        return None
    if not any(moved):
        return "no channel ever changed its group, so it trained as a group convolution with random, fixed groups"
    return f"{_percent(moved)} of the channels changed their group"


def _left_behind(cell: _Cell) -> str | None:
    """Outputs without inputs; inputs that should have been dropped."""
    dead = [share for row in cell.done if (share := _last(row, "dead_outputs"))]
    if dead:
        return f"{_percent(dead)} of the outputs ended dead, without inputs ({_seeds(len(dead), cell)})"
    kept = [share for row in cell.done if (share := _last(row, "kept")) and share > 1.01 / cell.groups]
    if kept:
        over = f"and not {significant(100 / cell.groups, 2)} %"
        return f"its groups ended with {_percent(kept)} of the inputs {over} ({_seeds(len(kept), cell)})"
    return None


def _percent(shares: Sequence[float]) -> str:
    return f"{significant(100 * statistics.fmean(shares), 2)} %"


def _seeds(number: int, cell: _Cell) -> str:
    return f"{number} of {len(cell.done)} seeds"


def _about_paper(rows: Sequence[Json]) -> list[str]:
    """How what ran differs from what the paper ran."""
    printed = [row for row in rows if row.get("paper")]
    if not printed:
        return []
    params = printed[0]["params"]
    table, epochs = PAPERS.get(params["dataset"], (None, None))
    of = f"Table {table} of Lee, Park & Lee" if table else "Lee, Park & Lee"
    line = f"paper: {of}, which does not say over how many trainings"
    if epochs and params["epochs"] != epochs:
        line += f"; it trained {epochs} epochs, this run {params['epochs']}"
    if params["recipe"] != "paper":
        line += f"; recipe {params['recipe']} is not its own"
    return [line]


def _ended(cell: _Cell) -> list[str]:
    """The rows that are not done, why, and how far they came; in one line where that is the same for all seeds."""
    lines = []
    for row in cell.rows:
        if row["status"] == "ok":
            continue
        line = f"{row['status']}: {row['reason']}"
        if row["epochs"]:
            line += f"; {len(row['epochs'])} of {row['params']['epochs']} epochs"
            if (error := _error({**row["epochs"][-1], "params": row["params"]}, "test_error")) is not None:
                line += f", the last test error {error:.2f} %"
        lines.append((row["key"], line))
    if len(lines) == len(cell.rows) > 1 and len({line for _, line in lines}) == 1:
        return [f"{cell.name}, all seeds: {lines[0][1]}"]
    return [f"{key}: {line}" for key, line in lines]


def _record(row: Json, standard: _Cell | None) -> Json:
    """One training, flat."""
    theirs = {} if standard is None else standard.by_seed()
    final, seed = _error(row, "error_final"), row["params"]["seed"]
    same = theirs.get(seed) if row["status"] == "ok" else None
    names = ("error_initial", "error_final", "error_best", "error_final_top5")
    return {
        "key": row["key"],
        **row["params"],
        "status": row["status"],
        "reason": row["reason"],
        **(row["counts"] or {}),
        **{name: _error(row, name) for name in names},
        **{
            name: row.get(name)
            for name in ("epoch_best", "test_images", "images_per_s", "matmul_fraction", "train_seconds")
        },
        "epochs_done": len(row["epochs"]),
        "to_standard": None if final is None or same is None else round(final - same, 9),
        "paper_error": row["paper"]["error"] if row.get("paper") else None,
        "dead_outputs": _last(row, "dead_outputs"),
        "kept": _last(row, "kept"),
        "moved": _last(row, "moved"),
        "replaced": len(row["convert"]["replaced"]) if row.get("convert") else None,
        "checkpoints": row.get("checkpoints"),
    }
