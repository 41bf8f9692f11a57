"""The table of a ``train`` document: errors over the seeds, versus the standard convolution's and the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bgcbench.report import training
from bgcbench.report.format import percent, share_words, significant
from bgcbench.report.notes import chosen_algorithms, notes, together
from bgcbench.report.table import Column, Report, Table
from bgcbench.results.aggregate import (
    MIN_SEEDS,
    Cell,
    Difference,
    Pair,
    at_equal_n,
    at_equal_params,
    difference_of,
    image_points,
    planned_seeds,
    ratio_of,
    training_cells,
)
from bgcbench.results.document import Document
from bgcbench.results.rows import TrainRow
from bgcbench.theory import paper

Cells = Sequence[Cell[TrainRow]]
# Epochs and table of the paper's trainings, by data set.
PAPERS = {"cifar10": (5, paper.TABLE5_EPOCHS), "imagenet": (6, paper.TABLE6_EPOCHS)}


def train_report(document: Document) -> Report:
    """A row a variant and N over its seeds, what BGC has on GC, and what to know before the numbers are used."""
    rows: Sequence[TrainRow] = document.results
    cells = training_cells(rows)
    standard = next((cell for cell in cells if cell.dense), None)
    findings = _findings(cells, image_points(rows))
    sections = {"What this shows": findings} if findings else {}
    table = Table(training.title_lines(document), train_columns(document, standard), cells, sections)
    noted = notes(document, _facts(document, cells), training.endings(cells), training.QUICK)
    return Report([table], noted, [_record(row, standard) for row in rows])


def train_columns(document: Document, standard: Cell[TrainRow] | None) -> list[Column[Cell[TrainRow]]]:
    rows, seeds = document.results, planned_seeds(document)
    columns = [*training.VARIANT_COLUMNS, *training.count_columns(rows)]
    if not training.is_synthetic(rows):
        columns += training.FINAL_COLUMNS
    columns += [
        training.FINAL_TOP5,
        Column("seeds", lambda cell: f"{len(cell.done)}/{seeds}", meaning=training.SEEDS),
        training.SPEED,
        Column("of peak", lambda cell: cell.matmul_fraction, percent(0), OF_PEAK, optional=True),
        training.PAPER,
    ]
    if not training.is_synthetic(rows):
        columns.append(Column("to SC", lambda cell: _to_standard(cell, standard), meaning=TO_SC))
    return [*columns, training.flags_column()]


OF_PEAK = (
    "Multiply-adds done (three forward passes a step) over those of the device's best matrix product in the same "
    "precision, measured in this run."
)
TO_SC = "Last error less that of SC, in percentage points; of the same seeds, where there are two or more."


def _to_standard(cell: Cell[TrainRow], standard: Cell[TrainRow] | None) -> str | None:
    if cell is standard:
        return "0"
    return training.difference_text(difference_of(cell.errors, standard.errors)) if standard else None


# ------------------------------------------------------------------------------------------------------- what it shows


def _pairs(cells: Cells) -> list[Pair[Cell[TrainRow]]]:
    """BGC with GC at equal N and at equal parameters, by the N of GC."""
    at = {(cell.variant, cell.groups): cell for cell in cells}
    return sorted(at_equal_n(at) + at_equal_params(at), key=lambda pair: (pair[1].groups, pair[0].groups))


def _findings(cells: Cells, image: float) -> list[str]:
    found = [(pair, difference_of(pair[0].errors, pair[1].errors)) for pair in _pairs(cells)]
    return [_sentence(*pair, difference, image) for pair, difference in found if difference]


def _sentence(one: Cell[TrainRow], other: Cell[TrainRow], difference: Difference, image: float) -> str:
    """Two cells in plain words: how large, which has the lower error, and whether that is more than scatter."""
    share = ratio_of(one.params, other.params)
    size = f" ({share_words(share)})" if share else ""
    how = "lower by" if difference.value < 0 else "higher by" if difference.value > 0 else "apart by"
    scatter = "" if difference.sd is None else f" ± {difference.sd:.2f}"
    line = (
        f"{training.cell_name(one)} beside {training.cell_name(other)}{size}: {difference.ours:.2f} % against "
        f"{difference.theirs:.2f} %, {how} {abs(difference.value):.2f}{scatter} points"
    )
    if difference.seeds < MIN_SEEDS:
        are = "1 common seed is" if difference.seeds == 1 else f"{difference.seeds or 'no'} common seeds are"
        return f"{line}; {are} too few to tell"
    told = "more than the seeds scatter" if difference.significant(image) else "not told apart"
    return f"{line} over {difference.seeds} seeds: {told}"


# ----------------------------------------------------------------------------------------------- notes and records


def _facts(document: Document, cells: Cells) -> list[str]:
    rows = document.results
    lines = [training.recipe_line(document, rows)] if rows else []
    lines += [training.SPEED_ALONE] if training.is_synthetic(rows) else training.image_note(rows)
    lines += training.some_unfinished(cells)
    lines += together((training.cell_name(cell), learnt) for cell in cells if (learnt := _learnt(cell)))
    lines += training.dense_notes(cells) + _about_paper(rows)
    lines += chosen_algorithms(rows, lambda row: row.key)
    if any(
        d and d.seeds >= MIN_SEEDS for pair in _pairs(cells) if (d := difference_of(pair[0].errors, pair[1].errors))
    ):
        lines.append(SCATTER)
    return lines


SCATTER = (
    "more than the seeds scatter: the mean of the differences by seed is more than twice its standard error, and more "
    "than one image. Where nothing differs, chance does that in about 18 % of comparisons with 3 seeds, 12 % with 5, "
    "8 % with 10; all seeds share the test images, whose own scatter is not in it"
)


def _learnt(cell: Cell[TrainRow]) -> str:
    """What a learned grouping left behind that the counts do not tell."""
    return "; ".join(text for text in (_moved(cell), _left_behind(cell)) if text)


def _last(row: TrainRow, name: str) -> float | None:
    """What was learnt, at the end of the last epoch; None where it is not known."""
    return (row.epochs[-1].learnt or {}).get(name) if row.epochs else None


def _moved(cell: Cell[TrainRow]) -> str | None:
    """How many channels are in another group than at the start."""
    moved = [share for row in cell.done if (share := _last(row, "moved")) is not None]
    if not moved:
        return None
    if not any(moved):
        return "no channel ever changed its group, so it trained as a group convolution with random, fixed groups"
    return f"{training.mean_percent(moved)} of the channels changed their group"


def _left_behind(cell: Cell[TrainRow]) -> str | None:
    """Outputs without inputs; inputs that should have been dropped."""
    dead = [share for row in cell.done if (share := _last(row, "dead_outputs"))]
    if dead:
        return f"{training.mean_percent(dead)} of the outputs ended dead, without inputs ({_seeds(dead, cell)})"
    kept = [share for row in cell.done if (share := _last(row, "kept")) and share > 1.01 / cell.groups]
    if kept:
        over = f"and not {significant(100 / cell.groups, 2)} %"
        return f"its groups ended with {training.mean_percent(kept)} of the inputs {over} ({_seeds(kept, cell)})"
    return None


def _seeds(found: Sequence[float], cell: Cell[TrainRow]) -> str:
    return f"{len(found)} of {len(cell.done)} seeds"


def _about_paper(rows: Sequence[TrainRow]) -> list[str]:
    """How what ran differs from what the paper ran."""
    params = next((row.params for row in rows if row.paper), None)
    if params is None:
        return []
    table, epochs = PAPERS.get(params.dataset, (None, None))
    of = f"Table {table} of Lee, Park & Lee" if table else "Lee, Park & Lee"
    line = f"paper: {of}, which does not say over how many trainings"
    if epochs and params.epochs != epochs:
        line += f"; it trained {epochs} epochs, this run {params.epochs}"
    if params.recipe != "paper":
        line += f"; recipe {params.recipe} is not its own"
    return [line]


def _record(row: TrainRow, standard: Cell[TrainRow] | None) -> dict[str, Any]:
    """One training, flat."""
    final = training.error_of(row, row.error_final)
    same = standard.errors.get(row.params.seed) if standard and row.status == "ok" else None
    return {
        **training.training_record(row, TrainRow),
        "to_standard": None if final is None or same is None else round(final - same, 9),
        "dead_outputs": _last(row, "dead_outputs"),
        "kept": _last(row, "kept"),
        "moved": _last(row, "moved"),
    }
