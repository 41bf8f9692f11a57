"""The tables of a ``transfer`` document: errors before and after training, and BGC versus GC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bgcbench.measure.statistics import Interval
from bgcbench.report import training
from bgcbench.report.compare import Comparison, ratio_record
from bgcbench.report.format import label_of, listed, loss_text
from bgcbench.report.notes import chosen_algorithms, kept_dense, notes
from bgcbench.report.side_by_side import YES, errors_table
from bgcbench.report.table import Column, Report, Table, label, with_all_columns, words
from bgcbench.results.aggregate import (
    MIN_SEEDS,
    NO_IMAGES,
    SYNTHETIC,
    Cell,
    Conversions,
    Moment,
    Pair,
    difference_of,
    median_of,
    planned_seeds,
    ratio_of,
)
from bgcbench.results.document import Document
from bgcbench.results.rows import CalibratedLayer, Ratio, TransferRow
from bgcbench.specs import PHASE_TITLES, UNLABELLED
from bgcbench.theory import paper

BY_N: dict[Moment, str] = {
    "initial": "test error % before any training, by N:",
    "final": "test error % after the last epoch, by N:",
}
NOTHING = 1e-6  # a share of a layer's output that is rounding
TITLES: dict[Moment, str] = {"initial": "initial", "final": "last"}
TWICE = "{:.2f}x".format


def transfer_report(document: Document) -> Report:
    """A row a variant, N and start over its seeds, and BGC versus GC at equal N and at equal parameters."""
    run = Conversions.of(document)
    weights = next((row.params.weights for row in run.rows), "none")
    title = training.title_lines(document, "" if weights == "none" else f" (weights {weights})")
    by_n = [
        errors_table([] if number else title, BY_N[moment], run.cells, partial(_errors, moment=moment))
        for number, moment in enumerate(run.moments)
    ]
    whole = Table(title, transfer_columns(run, planned_seeds(document)), run.cells)
    tables = with_all_columns([*filter(None, by_n)], whole)
    pairs = [pair for start in run.starts for pair in (*run.at_equal_n(start), *run.at_equal_params(start))]
    pairs = [pair for pair in pairs if ratio_of(pair[0].params, pair[1].params)]  # without those that failed
    if pairs:
        tables.append(Table(["BGC versus GC, at equal N and at equal parameters"], pair_columns(run), pairs))
    noted = notes(document, _facts(document, run), training.endings(run.cells), training.QUICK)
    return Report(tables, noted, [_record(run, row) for row in run.rows])


def _errors(cell: Cell, moment: Moment) -> str | None:
    return training.spread_text(cell.errors_at(moment))


# -------------------------------------------------------------------------------------------------------------- columns


def transfer_columns(run: Conversions, seeds: int) -> list[Column[Cell]]:
    """Without images what layers lose by the closed form, else errors; neither where labels mean nothing."""

    def faster(cell: Cell, phase: str) -> str | None:
        compared = _to_dense(cell.time(phase))
        return None if compared is None else "1" if cell.dense else compared.text

    unseen, synthetic = training.on(run.rows, NO_IMAGES), training.on(run.rows, SYNTHETIC)
    return [
        *training.VARIANT_COLUMNS,
        *_start_columns(run, lambda cell: cell),
        *training.count_columns(run.rows),
        *(LOSS_COLUMNS if unseen else [] if synthetic else _error_columns(run)),
        *_speed_up_columns(run, faster),
        training.SPEED,
        *([] if unseen else [training.seeds_column(seeds)]),
        training.flags_column(_ending),
    ]


INIT = (
    "Weights that the conversion starts from: copy, as in the paper; white, the closed-form optimum for white input; "
    "calibrated, least squares on the network's own activations; refit, the same of the convolutions that stay, too; "
    "scratch, random."
)
REBN = "Whether batch norm's statistics were re-estimated on training images without labels."
LAYER_LOSS = (
    "Share of a layer's output that its weights lose, the median of the layers: with images, on images held out; "
    "without, ||W - D||^2 / ||W||^2 on white input for the network's kernel W and the weights D in its place."
)
SPEED_UP = (
    "Time of the untouched network, or of GC, over the row's, with its 95 % confidence interval; versus GC at least "
    "95 %. A start does not change it."
)
WORST = "Largest loss of a layer."
EXPECTED_LOSS = "Layer loss on white input of a kernel of independent entries."
LOSS_COLUMNS: list[Column[Cell]] = [
    Column("expected loss %", lambda cell: cell.expected_loss, EXPECTED_LOSS, loss_text),
    Column("layer loss %", lambda cell: median_of(cell.white_losses.values()), LAYER_LOSS, loss_text, optional=True),
    Column("worst %", lambda cell: max(cell.white_losses.values(), default=None), WORST, loss_text, optional=True),
    words("worst layer", lambda cell: cell.worst_layer, "The layer that loses most.", optional=True),
    training.PAPER,
]


def _start_columns(run: Conversions, cell_of: Callable[[Any], Cell]) -> list[Column[Any]]:
    """The weights; and batch norm's statistics where they are not everywhere the same."""

    def start(of: Any) -> tuple[str | None, str | None]:
        cell = cell_of(of)
        return (None, None) if cell.dense else (cell.start.init, YES[cell.start.rebn])

    init: Column[Any] = label("init", lambda of: start(of)[0], INIT)
    return [init, label("rebn", lambda of: start(of)[1], REBN)] if run.norms_differ else [init]


def _speed_up_columns(run: Conversions, value: Callable[..., str | None]) -> list[Column[Any]]:
    drops = dict.fromkeys(run.phases, 6) | dict.fromkeys(run.phases[:1], 1)
    return [
        Column(f"speed-up {PHASE_TITLES[phase]}", partial(value, phase=phase), SPEED_UP, name="speed-up", drop=drop)
        for phase, drop in drops.items()
    ]


def _to_dense(measured: Ratio | None) -> Comparison | None:
    """Time of the untouched network over that of a conversion."""
    if measured is None or measured.ratio is None:
        return None
    return Comparison(measured.ratio, Interval(*measured.ratio_ci95) if measured.ratio_ci95 else None, paired=True)


def _error_columns(run: Conversions) -> list[Column[Cell]]:
    agrees = training.error_column("agrees %", lambda cell: cell.agreement, AGREES, optional=True)
    trained = training.error_column(
        "agrees trained %", lambda cell: cell.agreement_trained, AGREES_TRAINED, optional=True
    )
    loss: Column[Cell] = Column(
        "layer loss %", lambda cell: cell.lost(lambda layer: layer.after), LAYER_LOSS, loss_text, optional=True
    )
    if training.on(run.rows, UNLABELLED):
        return [agrees, trained, loss]
    untouched = run.untouched

    def initial(cell: Cell) -> str | None:
        if cell.dense:  # one error, whatever the seeds
            return None if untouched is None else f"{untouched:.2f}"
        return _errors(cell, "initial")

    def to_untouched(cell: Cell) -> str | None:
        if cell.untrained or untouched is None:
            return "0" if cell.untrained else None
        errors = cell.errors_at(run.moments[-1])
        return training.difference_text(difference_of(errors, dict.fromkeys(errors, untouched)))

    to_control: Column[Cell] = Column("to SC trained", partial(training.to_trained, errors=run.control), TO_CONTROL)
    return [
        Column("error initial %", initial, "Top-1 error on the test images as converted, before any training."),
        *(training.FINAL_COLUMNS if run.epochs else ()),
        training.FINAL_TOP5 if run.epochs else training.INITIAL_TOP5,
        agrees,
        loss,
        training.PAPER,
        Column("to SC", to_untouched, TO_SC),
        *([to_control] if run.control else []),
    ]


AGREES = "Test images to which it gives the untouched network's class."
AGREES_TRAINED = "The same after the last epoch."
TO_SC = "Last error, or initial where nothing is trained, less the untouched network's, in percentage points."
TO_CONTROL = "Last error less that of the control, the untouched network trained as long, seed by seed."


def _ending(row: TransferRow) -> str:
    """A row's status; of a conversion that its training has not come to, that."""
    waits = row.status == "interrupted" and row.stage == "evaluated" and not row.epochs
    return "not trained" if waits else row.status


# ------------------------------------------------------------------------------------------------------ BGC versus GC


def pair_columns(run: Conversions) -> list[Column[Pair[Cell]]]:
    """Differences, costs and times of each pair."""

    def points(pair: Pair[Cell], moment: Moment) -> str | None:
        verdict = run.compare(*pair, moment)
        return verdict and training.difference_text(verdict.difference)

    def lower(pair: Pair[Cell], moment: Moment) -> str | None:
        verdict = run.compare(*pair, moment)
        if verdict is None or verdict.too_few:
            return verdict and "too few seeds"
        return label_of(verdict.lower.variant) if verdict.lower else "not significant"

    def faster(pair: Pair[Cell], phase: str) -> str | None:
        ratio = run.speed_up(*pair, phase)
        return Comparison.of(ratio).text if ratio else None

    columns: list[Column[Pair[Cell]]] = [
        label("BGC", lambda pair: training.cell_name(pair[0]), "The conversion."),
        label("versus", lambda pair: training.cell_name(pair[1]), VERSUS),
        *_start_columns(run, lambda pair: pair[0]),
        Column("params", lambda pair: ratio_of(pair[0].params, pair[1].params), COSTS, TWICE, "params, pair", drop=4),
        Column("MACs", lambda pair: ratio_of(pair[0].macs, pair[1].macs), COSTS, TWICE, "MACs, pair", drop=5),
    ]
    for moment, title in TITLES.items():
        before = int(moment != run.moments[-1])
        columns += [
            Column(
                f"{title} points", partial(points, moment=moment), POINTS, name="points", optional=True, drop=3 * before
            ),
            words(f"{title} lower", partial(lower, moment=moment), LOWER, name="lower", optional=True, drop=2 * before),
        ]
    return columns + _speed_up_columns(run, faster)


VERSUS = "GC at equal N or at equal parameters, of which GC with N=1 is SC."
COSTS = "Those of BGC over those of GC."
POINTS = "Error of BGC less that of GC, in percentage points: mean ± standard deviation over the seeds."
LOWER = (
    f"Which error is significantly lower. After training it takes {MIN_SEEDS} seeds, with a mean difference of more "
    "than two standard errors and more than one image. Before training, where all seeds end alike, it is more than two "
    "standard errors of the draw of test images, even if the two err on different ones as often as they can."
)


# ---------------------------------------------------------------------------------------------------------------- notes


def _facts(document: Document, run: Conversions) -> list[str]:
    rows = run.rows
    trained = [row for row in rows if row.params.epochs]
    lines = [training.recipe_line(document, trained)] if trained else []
    if rows and not trained and not training.on(rows, NO_IMAGES):
        what = "agreements" if training.on(rows, UNLABELLED) else "errors"
        lines.append(f"nothing was trained: the {what} are those of the conversions")
    if any(row.params.distill for row in trained):
        alone = "the only targets" if training.on(rows, UNLABELLED) else "targets beside the labels"
        lines.append(f"distilled: the untouched network's outputs were {alone}")
    guesses = training.at_chance(rows, {"the untouched network": filter(None, [run.untouched])})
    lines += training.error_notes(rows, run.cells, *guesses, *([NO_CONTROL] if run.epochs and not run.control else []))
    lines += kept_dense((training.cell_name(cell), cell, cell.indivisible) for cell in run.converted)
    lines += _about_calibration(run)
    if ran := next((row.time for row in rows if row.time), None):
        memory = f", memory {ran.memory}" if ran.memory else ""
        lines.append(f"times: {ran.batch} images at once, {ran.precision}, {ran.layout}, {ran.mode}{memory}")
    if any(cell.paper_error is not None for cell in run.cells):
        lines.append(ABOUT_PAPER)
    return lines + chosen_algorithms(rows, lambda row: row.key)


NO_CONTROL = "no control: to SC holds what the training did, too; --control trains the untouched network as long"
ABOUT_PAPER = (  # how what ran differs from what the paper ran, and what its best row does not say
    f"paper: Table 3 of Lee, Park & Lee, ResNet-50 after {paper.TABLE3_EPOCHS} epochs from copied weights, norms as "
    f"they were. Its BGC N=2 ({paper.TABLE3['bgc', 2]:.2f} %) is below its baseline "
    f"({paper.TABLE3['standard', 1]:.2f} %), which was not trained those epochs more"
)


def _about_calibration(run: Conversions) -> list[str]:
    """On how much was calibrated, and where there was little to go by."""
    calibrations = [calibration for cell in run.converted for calibration in cell.calibrations]
    if not calibrations:
        return []
    lines = [
        f"calibration: {_span([c.images for c in calibrations])} training images without labels, "
        f"{_span([c.held_out for c in calibrations])} of them held out; {_span([c.norms for c in calibrations])} batch "
        f"norms; up to {max(c.moment_bytes for c in calibrations) / 2**20:.2f} MiB of second moments"
    ]
    few = _those(run, lambda layer: layer.scarce)
    white = _those(run, lambda layer: layer.is_white and (layer.before or 0.0) > NOTHING)
    lines += [f"few images for as many weights (more --calibration-images): {listed(few)}"] if few else []
    return lines + ([f"white weights kept, because least squares did no better: {listed(white)}"] if white else [])


def _those(run: Conversions, chosen: Callable[[CalibratedLayer], bool]) -> list[str]:
    """How many layers of a cell are of a kind."""
    texts = []
    for cell in run.converted:
        names, every = {layer.name for layer in cell.layers if chosen(layer)}, {layer.name for layer in cell.layers}
        if names:
            texts.append(f"{training.cell_name(cell)} ({len(names)} of {len(every)} layers)")
    return list(dict.fromkeys(texts))


def _span(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{end:g}" for end in (min(values), max(values))))


# -------------------------------------------------------------------------------------------------------------- records


def _record(run: Conversions, row: TransferRow) -> dict[str, Any]:
    """One conversion and its training, flat."""
    final = row.error_final if row.status == "ok" else None
    calibration = row.convert.calibration if row.convert else None
    layers = calibration.layers if calibration else ()
    ridges = [layer.ridge for layer in layers if layer.ridge is not None]
    white = row.white_loss
    lost = [layer.loss for layer in (white and white.layers) or ()]
    record = {
        **training.training_record(row),
        "initial_to_untouched": training.less(row.error_initial, run.untouched),
        "final_to_untouched": training.less(final, run.untouched),
        "final_to_control": training.less(final, run.control.get(row.params.seed)),
        "calibration_held_out": calibration.held_out if calibration else None,
        "calibration_norms": calibration.norms if calibration else None,
        "calibration_seconds": calibration.seconds if calibration else None,
        "layer_loss_copied": median_of(layer.copied for layer in layers),
        "layer_loss_white": median_of(layer.before for layer in layers),
        "layer_loss_calibrated": median_of(layer.after for layer in layers),
        "ridge_min": min(ridges, default=None),
        "ridge_max": max(ridges, default=None),
        "layers_scarce": sum(layer.scarce for layer in layers) if layers else None,
        "layers_kept_white": sum(layer.is_white for layer in layers) if layers else None,
        "white_loss_expected": white.expected if white else None,
        "white_loss_median": median_of(lost),
        "white_loss_worst": max(lost, default=None),
    }
    for phase, measured in row.time.phase.items() if row.time else ():
        record[f"{phase}_s"] = measured.median_s
        record |= ratio_record(_to_dense(measured), f"{phase}_speed_up")
    return record
