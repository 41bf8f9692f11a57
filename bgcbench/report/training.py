"""The table of a ``train`` document: errors over the seeds, versus the standard convolution's and the paper's.

The report of ``transfer`` shares its columns of cells, the title, the recipe, and how rows ended.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from bgcbench.report.format import label_of, listed, named, scaled, share_words, significant
from bgcbench.report.notes import chosen_algorithms, kept_dense, notes, replaced_lines, together
from bgcbench.report.side_by_side import errors_table
from bgcbench.report.table import Column, Report, Table, flat, group_columns, label, with_all_columns, words
from bgcbench.results.aggregate import (
    MIN_SEEDS,
    NO_IMAGES,
    SYNTHETIC,
    BySeed,
    Cell,
    Difference,
    at_equal_n,
    at_equal_params,
    difference_of,
    image_points,
    planned_seeds,
    ratio_of,
    spread_of,
    training_cells,
)
from bgcbench.results.document import Document
from bgcbench.results.rows import Config, Counts, TrainParams, TrainRow
from bgcbench.specs import UNLABELLED, VARIANTS
from bgcbench.theory import paper

Rows = Sequence[TrainRow]
Cells = Sequence[Cell]
Compared = tuple[Cell, Cell, Difference]
# Epochs and table of the paper's trainings, by data set.
PAPERS = {"cifar10": (5, paper.TABLE5_EPOCHS), "imagenet": (6, paper.TABLE6_EPOCHS)}
QUICK = "few epochs or images"
SPEED_ALONE = "synthetic images: the speed is all that is measured; there is no error to show"
WITHOUT_IMAGES = (
    "no images: --data-dir DIR (or BGCBENCH_DATA_DIR, ./data or ./imagenet) with train/ and val/, or val/ alone, and a "
    "folder for each class, would add test errors and calibrated weights"
)
FLATTERS = "where a seed did not finish, the mean is of those that did, which flatters if it failed in training"


def cell_name(cell: Cell) -> str:
    return label_of(cell.variant) if cell.dense else named(*cell.asked)


def on(rows: Rows, dataset: str) -> bool:
    """Whether the images are ``dataset``: SYNTHETIC, UNLABELLED or NO_IMAGES, of which no error is known."""
    return any(row.params.dataset == dataset for row in rows)


def train_report(document: Document) -> Report:
    """A row a variant and N over its seeds, what BGC has on GC, and what to know before the numbers are used."""
    rows: Rows = document.results
    cells = training_cells(rows)
    trained = next((cell.errors for cell in cells if cell.dense), {})
    compared = _compared(cells)
    sections = {"What this shows": [_sentence(*each, image_points(rows)) for each in compared]}
    title, caption = title_lines(document), "test error % after the last epoch, by N:"
    by_n = errors_table(title, caption, cells, lambda cell: spread_text(cell.errors))
    whole = Table(title, train_columns(document, trained), cells, sections)
    tables = with_all_columns([by_n] if by_n else [], whole)
    noted = notes(document, _facts(document, cells, compared), endings(cells), QUICK)
    return Report(tables, noted, [_record(row, trained) for row in rows])


def train_columns(document: Document, trained: BySeed) -> list[Column[Cell]]:
    """trained: the errors of the standard convolution."""
    rows = document.results
    to_sc: Column[Cell] = Column("to SC", partial(to_trained, errors=trained), TO_SC)
    return [
        *VARIANT_COLUMNS,
        *count_columns(rows),
        *([] if on(rows, SYNTHETIC) else FINAL_COLUMNS),
        FINAL_TOP5,
        seeds_column(planned_seeds(document)),
        SPEED,
        Column("of peak", lambda cell: cell.matmul_fraction, OF_PEAK, "{:.0%}".format, optional=True),
        PAPER,
        *([] if on(rows, SYNTHETIC) else [to_sc]),
        flags_column(),
    ]


OF_PEAK = (
    "Multiply-adds done (three forward passes a step) over those of the device's best matrix product in the same "
    "precision, measured in this run."
)
TO_SC = "Last error less that of SC, in percentage points; of the same seeds, where there are two or more."


# -------------------------------------------------------------------------------------------------------- what it shows


def _compared(cells: Cells) -> list[Compared]:
    """BGC with GC at equal N and at equal parameters, by the N of GC, where both have an error."""
    at = {(cell.variant, cell.groups): cell for cell in cells if cell.rank is None}
    pairs = sorted(at_equal_n(at) + at_equal_params(at), key=lambda pair: (pair[1].groups, pair[0].groups))
    found = [(one, other, difference_of(one.errors, other.errors)) for one, other in pairs]
    return [(one, other, difference) for one, other, difference in found if difference]


def _sentence(one: Cell, other: Cell, difference: Difference, image: float) -> str:
    """Two cells in plain words: how large, which has the lower error, and whether that is more than scatter."""
    share = ratio_of(one.params, other.params)
    size = f" ({share_words(share)})" if share else ""
    how = "lower by" if difference.value < 0 else "higher by" if difference.value > 0 else "apart by"
    line = (
        f"{cell_name(one)} versus {cell_name(other)}{size}: {difference.ours:.2f} % against "
        f"{difference.theirs:.2f} %, {how} {abs(difference.value):.2f}{scatter(difference.sd)} points"
    )
    if difference.seeds < MIN_SEEDS:
        are = "1 common seed is" if difference.seeds == 1 else f"{difference.seeds or 'no'} common seeds are"
        return f"{line}; {are} too few to tell"
    return f"{line} over {difference.seeds} seeds: {'' if difference.significant(image) else 'not '}significant"


# -------------------------------------------------------------------------------------------------------------- columns


def spread_text(by_seed: BySeed) -> str | None:
    """The mean, with the standard deviation over the seeds from two on."""
    spread = spread_of(by_seed.values())
    return spread and f"{spread.mean:.2f}{scatter(spread.sd)}"


def difference_text(difference: Difference | None) -> str | None:
    """ "+0.40 ± 0.20" """
    return None if difference is None else f"{difference.value:+.2f}{scatter(difference.sd)}"


def to_trained(cell: Cell, errors: BySeed) -> str | None:
    """How far the errors of a cell's trainings are from ``errors``, those of the dense network's."""
    return "0" if cell.dense else difference_text(difference_of(cell.errors, errors))


def scatter(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.2f}"


def error_column(title: str, by_seed: Callable[[Any], BySeed], meaning: str, optional: bool = False) -> Column[Any]:
    meaning += " Percent, mean ± standard deviation over the seeds."
    return Column(title, lambda cell: spread_text(by_seed(cell)), meaning, optional=optional)


TRAINED = "Parameters while training: LGC and FLGC are trained masked, with dense kernels."
LAST = "Top-1 error on the test images after the last epoch: the figure to quote."
BEST = "Error of the epoch that was best on these same test images, which flatters."
TOP5 = "Top-5 error, after the last epoch where there is one."
FLAGS = "How seeds ended that are not done (s0: seed 0). kept dense: convolutions that N or the rank does not fit."
VARIANT = "SC: the standard convolution, or the untouched network; plan: as --plan has it, layer by layer."
VARIANT_COLUMNS: list[Column[Any]] = [
    label("variant", lambda cell: label_of(cell.variant), VARIANT),
    *group_columns(lambda cell: cell),
]
FINAL_COLUMNS = [
    error_column("error last %", lambda cell: cell.errors, LAST),
    error_column("error best %", lambda cell: cell.by_seed(lambda row: row.error_best), BEST),
]
FINAL_TOP5 = error_column("top-5 %", lambda cell: cell.by_seed(lambda row: row.error_final_top5), TOP5, optional=True)
INITIAL_TOP5 = error_column("top-5 %", lambda cell: cell.known(lambda row: row.error_initial_top5), TOP5, optional=True)
PAPER: Column[Any] = Column(
    "paper %", lambda cell: cell.paper_error, "Error that the paper prints, in percent.", "{:.2f}".format, optional=True
)
IMAGES_A_SECOND = "Training images a second, the median of the seeds."
SPEED: Column[Any] = Column("images/s", lambda cell: cell.images_per_s, IMAGES_A_SECOND, significant, optional=True)


def count_columns(rows: Rows) -> list[Column[Any]]:
    masked = any(row.counts and row.counts.params_training for row in rows)
    return [
        Column("params", lambda cell: cell.params, "Parameters as deployed; the mean where seeds differ.", scaled),
        Column("MACs", lambda cell: cell.macs, "Multiply-accumulate operations of one image, as deployed.", scaled),
        Column("trained params", lambda cell: cell.params_training if masked else None, TRAINED, scaled, optional=True),
    ]


def seeds_column(planned: int) -> Column[Cell]:
    def done(cell: Cell) -> str | None:
        return None if cell.untrained else f"{len(cell.done)}/{planned}"

    return Column("seeds", done, "Finished trainings of those that were planned.")


def flags_column(ending: Callable[[Any], str] = lambda row: str(row.status)) -> Column[Any]:
    def flags(cell: Cell) -> str:
        ended: dict[str, list[str]] = {}
        for row in cell.rows:
            if row.status != "ok":
                ended.setdefault(ending(row), []).append(f"s{row.params.seed}")
        every = len(ended) == 1 and not cell.done
        found = [how if every else f"{how} ({', '.join(seeds)})" for how, seeds in ended.items()]
        return ", ".join([*found, *([f"{len(cell.indivisible)} kept dense"] if cell.indivisible else [])])

    return words("flags", flags, FLAGS)


# ------------------------------------------------------------------------------------------------------ title and notes


def title_lines(document: Document, weights: str = "") -> list[str]:
    """The network, with its ``weights``; the data, and on what it ran."""
    rows, asked = document.results, document.asked
    about: TrainParams | Config = rows[0].params if rows else asked
    dataset, classes = (rows[0].params.dataset, rows[0].params.classes) if rows else (asked.data, None)
    height, width, classes = about.height or asked.height, about.width or asked.width, classes or asked.num_classes
    line = f"{about.model or 'a network'}{weights} " + ("without images" if dataset == NO_IMAGES else f"on {dataset}")
    line += f", {height} x {width} px" if height else ""
    line += f", {classes} classes" if height and classes else ""
    where, planned = replaced_lines(rows, about.where)
    line += f"; convolutions: {where}" if where else ""
    processes = max((row.world_size for row in rows), default=1)
    ran = [about.precision or asked.precision, about.layout or asked.layout]
    ran += ["compiled" if asked.compile else "", f"{processes} processes" if processes > 1 else ""]
    return [line, *planned, f"{', '.join(filter(None, ran))}; {document.environment.where}"]


def recipe_line(document: Document, rows: Rows) -> str:
    """The recipe and its terms in one line, as they ran; those that are off or unknown are left out."""
    asked, settings, params = document.asked, document.settings, rows[0].params
    layers = [layer for row in rows if row.convert for layer in row.convert.layers]  # a plan has several variants
    names = {row.params.variant for row in rows} | {layer.variant for layer in layers}
    penalised = any(VARIANTS[name].has_lasso for name in names if name in VARIANTS)
    terms = {
        "{} epochs": params.epochs,
        "batch {}": params.batch_size or asked.batch_size,
        "in {} parts": asked.accumulate if asked.accumulate > 1 else None,
        "{} training images": params.subset,
        "SGD at lr {:g}": asked.lr,
        "{}": asked.schedule,
        "at epochs {}": ", ".join(map(str, asked.milestones)),
        "times {:g}": asked.gamma if asked.milestones else None,
        "momentum {:g}": asked.momentum,
        "Nesterov": asked.nesterov,
        "weight decay {:g}": asked.weight_decay,
        "label smoothing {:g}": asked.label_smoothing,
        "group lasso {:g} (LGC)": asked.group_lasso if penalised else None,
        "crops of images padded by {}": asked.pad if settings.pad is None else settings.pad,
        "flipped at random": asked.flip if settings.flip is None else settings.flip,
    }
    # Of variants that have more than one exact algorithm; what 'auto' has found stands by itself.
    chosen = [row.params for row in rows if row.params.algorithm not in (None, "stock", "masked", "auto")]
    algorithms = dict.fromkeys(f"{label_of(params.variant)} as {params.algorithm}" for params in chosen)
    told = [text.format(value) for text, value in terms.items() if value]
    return f"recipe {params.recipe}: {', '.join([*told, *algorithms])}"


def endings(cells: Iterable[Cell]) -> list[str]:
    """Why rows are not done, and how far they came."""
    return together((row.key, _ending(row)) for cell in cells for row in cell.rows if row.status != "ok")


def _ending(row: TrainRow) -> str:
    line = f"{row.status}: {row.reason}"
    if row.epochs:
        line += f"; {len(row.epochs)} of {row.params.epochs} epochs"
        error = row.epochs[-1].test_error
        line += "" if error is None or on([row], SYNTHETIC) else f", the last test error {error:.2f} %"
    return line


def error_notes(rows: Rows, cells: Iterable[Cell], *more: str) -> list[str]:
    """What the errors are of, with what there is ``more`` to say of them, or why there are none."""
    image = image_points(rows)
    if on(rows, SYNTHETIC):
        lines = [SPEED_ALONE]
    elif on(rows, NO_IMAGES):
        lines = [WITHOUT_IMAGES]
    elif on(rows, UNLABELLED):
        lines = [f"{rows[0].test_images} images without labels: networks are evaluated by their agreement"]
    else:
        about = f"test images, so one image is {significant(image, 2)} points"
        lines = [*more, *([f"{rows[0].params.dataset}: {100 / image:.0f} {about}"] if image else [])]
    partly = any(cell.done and len(cell.done) < len(cell.rows) for cell in cells)
    return lines + ([FLATTERS] if partly else [])


def at_chance(rows: Rows, errors: Mapping[str, Iterable[float]]) -> list[str]:
    """Which of ``errors`` (percent, over the seeds, by name) are those of guesses: nothing follows from them."""
    classes = rows[0].params.classes if rows else None
    if not classes or on(rows, SYNTHETIC):
        return []
    guessed = 100 * (1 - 1 / classes)
    means = {name: statistics.fmean(found) for name, values in errors.items() if (found := list(values))}
    names = [f"{name} ({mean:.2f} %)" for name, mean in means.items() if mean >= CHANCE * guessed]
    told = f"as good as guessing, which errs on {guessed:.0f} %: {listed(names)}; nothing follows from such a network"
    return [told] if names else []


CHANCE = 0.9  # of the error of guesses


def _facts(document: Document, cells: Cells, compared: Sequence[Compared]) -> list[str]:
    rows = document.results
    lines = [recipe_line(document, rows)] if rows else []
    lines += error_notes(rows, cells, *at_chance(rows, {cell_name(cell): cell.errors.values() for cell in cells}))
    lines += together((cell_name(cell), learnt) for cell in cells if (learnt := _learnt(cell)))
    lines += kept_dense((cell_name(cell), cell, cell.indivisible) for cell in cells) + _about_paper(rows)
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


def _about_paper(rows: Rows) -> list[str]:
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


# -------------------------------------------------------------------------------------------------------------- records


NESTED = ("params", "counts", "epochs", "paper", "convert", "forms", "time", "white_loss", "judged")


def less(error: float | None, other: float | None) -> float | None:
    return None if error is None or other is None else round(error - other, 9)


def training_record(row: TrainRow) -> dict[str, Any]:
    """What a row says of itself, flat; no errors of images whose labels mean nothing."""
    known = flat(row, type(row), without=NESTED)
    if on([row], SYNTHETIC):
        known |= {name: None for name in known if name.startswith(("error", "loss", "agreement"))}
    return {
        "key": row.key,
        **flat(row.params, TrainParams),
        **flat(row.counts, Counts),
        **known,
        "epochs_done": len(row.epochs),
        "paper_error": row.paper.error if row.paper else None,
        "replaced": len(row.convert.replaced) if row.convert else None,
    }


def _record(row: TrainRow, trained: BySeed) -> dict[str, Any]:
    """One training, flat."""
    return {
        **training_record(row),
        "to_standard": less(row.error_final, trained.get(row.params.seed) if row.status == "ok" else None),
        **{name: _last(row, name) for name in ("dead_outputs", "kept", "moved")},
    }
