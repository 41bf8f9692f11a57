"""The table of a ``train`` document: errors over the seeds, versus the standard convolution's and the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bgcbench.report import training
from bgcbench.report.format import share_words, significant
from bgcbench.report.notes import chosen_algorithms, kept_dense, notes, together
from bgcbench.report.table import Column, Report, Table
from bgcbench.results.aggregate import (
    MIN_SEEDS,
    Cell,
    Difference,
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

Cells = Sequence[Cell]
Compared = tuple[Cell, Cell, Difference]
# Epochs and table of the paper's trainings, by data set.
PAPERS = {"cifar10": (5, paper.TABLE5_EPOCHS), "imagenet": (6, paper.TABLE6_EPOCHS)}


def train_report(document: Document) -> Report:
    """A row a variant and N over its seeds, what BGC has on GC, and what to know before the numbers are used."""
    rows: Sequence[TrainRow] = document.results
    cells = training_cells(rows)
    standard = next((cell for cell in cells if cell.dense), None)
    compared = _compared(cells)
    sections = {"What this shows": [_sentence(*each, image_points(rows)) for each in compared]} if compared else {}
    table = Table(training.title_lines(document), train_columns(document, standard), cells, sections)
    noted = notes(document, _facts(document, cells, compared), training.endings(cells), training.QUICK)
    return Report([table], noted, [_record(row, standard) for row in rows])


def train_columns(document: Document, standard: Cell | None) -> list[Column[Cell]]:
    def to_standard(cell: Cell) -> str | None:
        if cell is standard:
            return "0"
        return training.difference_text(difference_of(cell.errors, standard.errors)) if standard else None

    rows, seeds = document.results, planned_seeds(document)
    synthetic = training.is_synthetic(rows)
    return [
        *training.VARIANT_COLUMNS,
        *training.count_columns(rows),
        *([] if synthetic else training.FINAL_COLUMNS),
        training.FINAL_TOP5,
        Column("seeds", lambda cell: f"{len(cell.done)}/{seeds}", training.SEEDS),
        training.SPEED,
        Column("of peak", lambda cell: cell.matmul_fraction, OF_PEAK, "{:.0%}".format, optional=True),
        training.PAPER,
        *([] if synthetic else [Column("to SC", to_standard, TO_SC)]),
        training.flags_column(),
    ]


OF_PEAK = (
    "Multiply-adds done (three forward passes a step) over those of the device's best matrix product in the same "
    "precision, measured in this run."
)
TO_SC = "Last error less that of SC, in percentage points; of the same seeds, where there are two or more."


# ------------------------------------------------------------------------------------------------------- what it shows


def _compared(cells: Cells) -> list[Compared]:
    """BGC with GC at equal N and at equal parameters, by the N of GC, where both have an error."""
    at = {(cell.variant, cell.groups): cell for cell in cells}
    pairs = sorted(at_equal_n(at) + at_equal_params(at), key=lambda pair: (pair[1].groups, pair[0].groups))
    found = [(one, other, difference_of(one.errors, other.errors)) for one, other in pairs]
    return [(one, other, difference) for one, other, difference in found if difference]


def _sentence(one: Cell, other: Cell, difference: Difference, image: float) -> str:
    """Two cells in plain words: how large, which has the lower error, and whether that is more than scatter."""
    share = ratio_of(one.params, other.params)
    size = f" ({share_words(share)})" if share else ""
    how = "lower by" if difference.value < 0 else "higher by" if difference.value > 0 else "apart by"
    line = (
        f"{training.cell_name(one)} versus {training.cell_name(other)}{size}: {difference.ours:.2f} % against "
        f"{difference.theirs:.2f} %, {how} {abs(difference.value):.2f}{training.scatter(difference.sd)} points"
    )
    if difference.seeds < MIN_SEEDS:
        are = "1 common seed is" if difference.seeds == 1 else f"{difference.seeds or 'no'} common seeds are"
        return f"{line}; {are} too few to tell"
    return f"{line} over {difference.seeds} seeds: {'' if difference.significant(image) else 'not '}significant"


# ----------------------------------------------------------------------------------------------- notes and records


def _facts(document: Document, cells: Cells, compared: Sequence[Compared]) -> list[str]:
    rows = document.results
    lines = [training.recipe_line(document, rows)] if rows else []
    lines += [training.SPEED_ALONE] if training.is_synthetic(rows) else training.image_note(rows)
    lines += training.some_unfinished(cells)
    lines += together((training.cell_name(cell), learnt) for cell in cells if (learnt := _learnt(cell)))
    lines += kept_dense((training.cell_name(cell), cell.indivisible) for cell in cells) + _about_paper(rows)
    lines += chosen_algorithms(rows, lambda row: row.key)
    return lines + ([SCATTER] if any(difference.seeds >= MIN_SEEDS for *_, difference in compared) else [])


SCATTER = (
    "significant: the mean of the differences by seed is more than twice its standard error, and more than one image. "
    "Where nothing differs, chance does that in about 18 % of comparisons with 3 seeds, 12 % with 5, 8 % with 10; all "
    "seeds share the test images, whose own scatter is not in it"
)


def _last(row: TrainRow, name: str) -> float | None:
    """What was learnt, at the end of the last epoch; None where it is not known."""
    return (row.epochs[-1].learnt or {}).get(name) if row.epochs else None


def _learnt(cell: Cell) -> str:
    """What a learned grouping left behind that the counts do not tell: outputs without inputs, inputs not dropped."""

    def last(name: str, least: float) -> list[float]:
        return [share for row in cell.done if (share := _last(row, name)) is not None and share > least]

    texts = []
    moved = last("moved", -1)
    if any(moved):
        texts.append(f"{_mean(moved)} of the channels changed their group")
    elif moved:
        fixed = "so it trained as a group convolution with random, fixed groups"
        texts.append(f"no channel ever changed its group, {fixed}")
    if dead := last("dead_outputs", 0):
        seeds = f"{len(dead)} of {len(cell.done)} seeds"
        texts.append(f"{_mean(dead)} of the outputs ended dead, without inputs ({seeds})")
    elif kept := last("kept", 1.01 / cell.groups):
        over = f"and not {significant(100 / cell.groups, 2)} % ({len(kept)} of {len(cell.done)} seeds)"
        texts.append(f"its groups ended with {_mean(kept)} of the inputs {over}")
    return "; ".join(texts)


def _mean(shares: Sequence[float]) -> str:
    return f"{significant(100 * statistics.fmean(shares), 2)} %"


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


def _record(row: TrainRow, standard: Cell | None) -> dict[str, Any]:
    """One training, flat."""
    same = standard.errors.get(row.params.seed) if standard and row.status == "ok" else None
    return {
        **training.training_record(row),
        "to_standard": training.less(row.error_final, same),
        **{name: _last(row, name) for name in ("dead_outputs", "kept", "moved")},
    }
