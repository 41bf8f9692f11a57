"""The table of a ``train`` document: errors over the seeds, beside the standard convolution's and the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bgcbench.report import Column, Report, chosen_forms, notes, share_words, significant
from bgcbench.report.errors import (
    TELLING,
    Cell,
    Difference,
    count_text,
    dense_lines,
    difference_of,
    ended_lines,
    error_of,
    error_text,
    flags,
    image_of,
    masked,
    place_of,
    planned,
    recipe_line,
    spread_text,
    synthetic,
    title_lines,
)
from bgcbench.results import Json
from bgcbench.theory import paper

# Epochs and table of the paper's trainings, by data set.
PAPERS = {"cifar10": (5, paper.TABLE5_EPOCHS), "imagenet": (6, paper.TABLE6_EPOCHS)}


def train_report(document: Json) -> Report:
    """A row a variant and N over its seeds, what BGC has on GC, and what to know before the numbers are used."""
    rows: list[Json] = document["results"]
    cells = _cells(rows)
    standard = next((cell for cell in cells if cell.variant == "standard"), None)
    columns = [
        Column("variant", [cell.label for cell in cells], right=False, lead=True),
        Column("N", [str(cell.groups) for cell in cells], lead=True),
        Column("params", [count_text(cell.count("params")) for cell in cells]),
        Column("MACs", [count_text(cell.count("macs")) for cell in cells]),
    ]
    if masked(rows):
        columns.append(Column("trained params", [count_text(cell.count("params_training")) for cell in cells]))
    if not synthetic(rows):
        columns += [
            Column("error last %", [spread_text(cell.by_seed()) for cell in cells]),
            Column("error best %", [spread_text(cell.by_seed("error_best")) for cell in cells]),
        ]
    if any(cell.by_seed("error_final_top5") for cell in cells):
        columns.append(Column("top-5 %", [spread_text(cell.by_seed("error_final_top5")) for cell in cells]))
    wanted = planned(document)
    columns += [
        Column("seeds", [f"{len(cell.done)}/{wanted}" for cell in cells]),
        Column("images/s", ["-" if (v := cell.images_per_s) is None else significant(v) for cell in cells]),
    ]
    if any(cell.matmul_fraction is not None for cell in cells):
        columns.append(
            Column("of peak", ["-" if (v := cell.matmul_fraction) is None else f"{v:.0%}" for cell in cells])
        )
    if any(cell.printed is not None for cell in cells):
        columns.append(Column("paper %", [error_text(cell.printed) for cell in cells]))
    if not synthetic(rows):
        columns.append(Column("to SC", [_to_standard(cell, standard) for cell in cells]))
    columns.append(Column("flags", [", ".join(flags(cell)) for cell in cells], right=False))
    sections = {"What this shows": _findings(cells, rows), "Notes": _notes(document, rows, cells)}
    records = [_record(row, standard) for row in rows]
    return Report(title_lines(document, rows), columns, {k: v for k, v in sections.items() if v}, records)


def _cells(rows: Sequence[Json]) -> list[Cell]:
    """In the order of :func:`place_of`."""
    found: dict[tuple[str, int], list[Json]] = {}
    for row in rows:
        found.setdefault((row["params"]["variant"], row["params"]["groups"]), []).append(row)
    return sorted((Cell(*at, mine) for at, mine in found.items()), key=place_of)


def _last(row: Json, field: str) -> Any:
    """What was learnt, at the end of the last epoch; None where it is not known."""
    return (row["epochs"][-1].get("learnt") or {}).get(field) if row["epochs"] else None


def _against(one: Cell, other: Cell) -> Difference | None:
    """Their last errors."""
    return difference_of(one.by_seed(), other.by_seed())


def _to_standard(cell: Cell, standard: Cell | None) -> str:
    if cell is standard:
        return "0"
    found = None if standard is None else _against(cell, standard)
    return "-" if found is None else found.text


# ------------------------------------------------------------------------------------------------------- what it shows


def _pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """BGC beside GC at the same N and, at twice its N, beside GC; a GC of one group is the standard convolution."""
    at = {(cell.variant, cell.groups): cell for cell in cells}
    plain = {cell.groups: cell for cell in cells if cell.variant in ("standard", "gc")}
    return [(at["bgc", n], plain[k]) for k in sorted(plain) for n in (k, 2 * k) if ("bgc", n) in at]


def _findings(cells: Sequence[Cell], rows: Sequence[Json]) -> list[str]:
    found = [(one, other, _against(one, other)) for one, other in _pairs(cells)]
    return [_beside(one, other, difference, image_of(rows)) for one, other, difference in found if difference]


def _beside(one: Cell, other: Cell, difference: Difference, image: float) -> str:
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


# ----------------------------------------------------------------------------------------------- notes and records


def _notes(document: Json, rows: Sequence[Json], cells: Sequence[Cell]) -> list[str]:
    lines = [recipe_line(document, rows)] if rows else []
    if synthetic(rows):
        lines.append("synthetic images: the speed is all that is measured; there is no error to show")
    else:
        lines += _about_errors(rows, cells)
    if masked(rows):
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
    lines += chosen_forms(rows, lambda row: str(row["key"]))
    lines += _about_paper(rows)
    lines += dense_lines(cells)
    if any(cell.done and len(cell.done) < len(cell.rows) for cell in cells):
        lines.append(
            "where a seed did not finish, the mean is of those that did, which flatters if it failed in training"
        )
    lines += [line for cell in cells for line in ended_lines(cell)]
    return lines + notes(document, [], quick="few epochs or images, no claim; run without --quick")


def _about_errors(rows: Sequence[Json], cells: Sequence[Cell]) -> list[str]:
    lines = [
        "error: top-1 on the test images, mean ± standard deviation over the seeds. last: after the last epoch, the "
        "figure to quote; best: of the epoch that was best on these same test images, which flatters. to SC: last "
        "error less SC's, in percentage points; of the same seeds, where there are two or more"
    ]
    if image := image_of(rows):
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


def _learnt(cell: Cell) -> str | None:
    """What a learned grouping left behind that the counts do not tell."""
    lines = [text for text in (_moved(cell), _left_behind(cell)) if text]
    return "; ".join(lines) and f"{cell.name}: {'; '.join(lines)}"


def _moved(cell: Cell) -> str | None:
    """How many channels are in another group than at the start."""
    moved = [share for row in cell.done if (share := _last(row, "moved")) is not None]
    if not moved:
        return None
    if not any(moved):
        return "no channel ever changed its group, so it trained as a group convolution with random, fixed groups"
    return f"{_percent(moved)} of the channels changed their group"


def _left_behind(cell: Cell) -> str | None:
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


def _seeds(number: int, cell: Cell) -> str:
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


def _record(row: Json, standard: Cell | None) -> Json:
    """One training, flat."""
    theirs = {} if standard is None else standard.by_seed()
    final, seed = error_of(row, "error_final"), row["params"]["seed"]
    same = theirs.get(seed) if row["status"] == "ok" else None
    names = ("error_initial", "error_final", "error_best", "error_final_top5")
    return {
        "key": row["key"],
        **row["params"],
        "status": row["status"],
        "reason": row["reason"],
        **(row["counts"] or {}),
        **{name: error_of(row, name) for name in names},
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
