"""The tables of a ``transfer`` document: errors before and after training, and BGC versus GC."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from bgcbench.measure.statistics import Interval
from bgcbench.report import training
from bgcbench.report.compare import PHASE_TITLES, Comparison
from bgcbench.report.format import label_of, listed, loss_text
from bgcbench.report.notes import chosen_algorithms, notes
from bgcbench.report.table import Column, Report, Table
from bgcbench.results.aggregate import (
    MIN_SEEDS,
    Conversion,
    Conversions,
    Moment,
    Pair,
    difference_of,
    planned_seeds,
    ratio_of,
)
from bgcbench.results.document import Document
from bgcbench.results.rows import (
    CalibratedLayer,
    Calibration,
    NetworkTime,
    TransferRow,
    WhiteLoss,
)
from bgcbench.theory import paper

NOTHING = 1e-6  # a share of a layer's output that is rounding
TITLES: dict[Moment, str] = {"initial": "initial", "final": "last"}


def transfer_report(document: Document) -> Report:
    """A row a variant, N and start over its seeds, and BGC versus GC at equal N and at equal parameters."""
    run = Conversions.of(document)
    weights = next((row.params.weights for row in run.rows), "none")
    title = training.title_lines(document, "" if weights == "none" else f" (weights {weights})")
    tables = [Table(title, transfer_columns(run, planned_seeds(document)), run.cells)]
    pairs = [pair for start in run.starts for pair in (*run.at_equal_n(start), *run.at_equal_params(start))]
    pairs = [pair for pair in pairs if ratio_of(pair[0].params, pair[1].params)]  # without those that failed
    if pairs:
        tables.append(Table(["BGC versus GC, at equal N and at equal parameters"], pair_columns(run), pairs))
    noted = notes(document, _facts(document, run), training.endings(run.cells), training.QUICK)
    return Report(tables, noted, [_record(run, row) for row in run.rows])


# -------------------------------------------------------------------------------------------------------------- columns


def transfer_columns(run: Conversions, seeds: int) -> list[Column[Conversion]]:
    """Without images what layers lose by the closed form, else errors; neither where labels mean nothing."""
    unseen, synthetic = training.without_images(run.rows), training.is_synthetic(run.rows)
    columns = [
        *training.VARIANT_COLUMNS,
        Column("init", lambda cell: None if cell.dense else cell.start.init, meaning=INIT, right=False, lead=True),
        *_rebn(run, lambda cell: cell),
        *training.count_columns(run.rows),
    ]
    if unseen:
        columns += _loss_columns()
    elif not synthetic:
        columns += _error_columns(run)
    columns += [_speed_up_column(phase, partial(_speed_up, phase=phase)) for phase in run.phases]
    columns.append(training.SPEED)
    if not unseen:
        columns.append(Column("seeds", partial(_seeds, planned=seeds), meaning=training.SEEDS))
    return [*columns, training.flags_column(lambda row: "not trained" if _untrained(row) else row.status)]


INIT = (
    "Weights that the conversion starts from: copy, as in the paper; white, the closed-form optimum for white input; "
    "calibrated, least squares on the network's own activations; scratch, random."
)
LAYER_LOSS = (
    "Share of a layer's output that its weights lose, the median of the layers: with images, on images held out; "
    "without, ||W - D||^2 / ||W||^2 on white input for the network's kernel W and the weights D in its place."
)
SPEED_UP = (
    "Time of the untouched network, or of GC, over the row's, with its 95 % confidence interval; versus GC at least "
    "95 %. A start does not change it."
)


def _rebn(run: Conversions, cell_of: Callable[[Any], Conversion]) -> list[Column[Any]]:
    """Whether batch norm's statistics were re-estimated, where that is not the same everywhere."""

    def text(row: Any) -> str | None:
        cell = cell_of(row)
        return None if cell.dense else "yes" if cell.start.rebn else "no"

    meaning = "Whether batch norm's statistics were re-estimated on training images without labels."
    return [Column("rebn", text, meaning=meaning, right=False, lead=True)] if run.norms_differ else []


def _speed_up_column(phase: str, value: Callable[[Any], str | None]) -> Column[Any]:
    return Column(f"speed-up {PHASE_TITLES[phase]}", value, meaning=SPEED_UP, name="speed-up")


def _loss_columns() -> list[Column[Conversion]]:
    expected = "Layer loss on white input of a kernel of independent entries."
    return [
        Column("expected loss %", lambda cell: cell.expected_loss, loss_text, expected),
        Column("layer loss %", lambda cell: _median(cell.white_losses.values()), loss_text, LAYER_LOSS, optional=True),
        Column("worst %", _worst_loss, loss_text, "Largest loss of a layer.", optional=True),
        Column("worst layer", _worst, meaning="The layer that loses most.", right=False, optional=True),
        training.PAPER,
    ]


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def _worst(cell: Conversion) -> str | None:
    losses = cell.white_losses
    return max(losses, key=losses.__getitem__, default=None)


def _worst_loss(cell: Conversion) -> float | None:
    return max(cell.white_losses.values(), default=None)


def _error_columns(run: Conversions) -> list[Column[Conversion]]:
    initial = "Top-1 error on the test images as converted, before any training."
    agrees = "Test images to which it gives the untouched network's class."
    control = "Last error less that of the control, the untouched network trained as long, seed by seed."
    to_sc = "Last error, or initial where nothing is trained, less the untouched network's, in percentage points."
    return [
        Column("error initial %", lambda cell: _initial(run, cell), meaning=initial),
        *(training.FINAL_COLUMNS if run.epochs else ()),
        training.FINAL_TOP5 if run.epochs else training.INITIAL_TOP5,
        training.error_column("agrees %", lambda cell: cell.agreement, agrees, optional=True),
        Column("layer loss %", lambda cell: cell.lost(lambda layer: layer.after), loss_text, LAYER_LOSS, optional=True),
        training.PAPER,
        Column("to SC", lambda cell: _to_untouched(run, cell), meaning=to_sc),
        Column("to SC trained", lambda cell: _to_control(run, cell), meaning=control, optional=True),
    ]


def _initial(run: Conversions, cell: Conversion) -> str | None:
    """The error before training; the untouched network's is one, whatever the seeds."""
    if cell.dense:
        return None if run.untouched is None else f"{run.untouched:.2f}"
    return training.spread_text(cell.errors_at("initial"))


def _fixed(cell: Conversion) -> bool:
    """Whether a cell is the untouched network and no control, which has no seeds."""
    return cell.dense and not any(row.params.epochs for row in cell.rows)


def _seeds(cell: Conversion, planned: int) -> str | None:
    return None if _fixed(cell) else f"{len(cell.done)}/{planned}"


def _untrained(row: TransferRow) -> bool:
    """Whether a row is a conversion that its training has not come to."""
    return row.status == "interrupted" and row.stage == "evaluated" and not row.epochs


def _to_untouched(run: Conversions, cell: Conversion) -> str | None:
    if _fixed(cell) or run.untouched is None:
        return "0" if _fixed(cell) else None
    errors = cell.errors_at(run.moments[-1])
    return training.difference_text(difference_of(errors, dict.fromkeys(errors, run.untouched)))


def _to_control(run: Conversions, cell: Conversion) -> str | None:
    if not run.control:
        return None
    return "0" if cell.dense else training.difference_text(difference_of(cell.errors, run.control))


def _speed_up(cell: Conversion, phase: str) -> str | None:
    measured = cell.time(phase)
    if measured is None or measured.ratio is None:
        return None
    ends = Interval(*measured.ratio_ci95) if measured.ratio_ci95 else None
    return "1" if cell.dense else Comparison(measured.ratio, ends, paired=True).text


# ------------------------------------------------------------------------------------------------------ BGC versus GC


def pair_columns(run: Conversions) -> list[Column[Pair[Conversion]]]:
    """Differences, costs and times of each pair."""
    columns: list[Column[Pair[Conversion]]] = [
        Column("BGC", lambda pair: training.cell_name(pair[0]), meaning="The conversion.", right=False, lead=True),
        Column("versus", lambda pair: training.cell_name(pair[1]), meaning=VERSUS, right=False, lead=True),
        Column("init", lambda pair: pair[0].start.init, meaning=INIT, right=False, lead=True),
        *_rebn(run, lambda pair: pair[0]),
        Column(
            "params", lambda pair: ratio_of(pair[0].params, pair[1].params), "{:.2f}x".format, COSTS, "params, pair"
        ),
        Column("MACs", lambda pair: ratio_of(pair[0].macs, pair[1].macs), "{:.2f}x".format, COSTS, "MACs, pair"),
    ]
    for moment, title in TITLES.items():
        points, lower = partial(_points, run=run, moment=moment), partial(_lower, run=run, moment=moment)
        columns += [
            Column(f"{title} points", points, meaning=POINTS, name="points", optional=True),
            Column(f"{title} lower", lower, meaning=LOWER, name="lower", right=False, optional=True),
        ]
    times = [_speed_up_column(phase, partial(_pair_speed_up, run=run, phase=phase)) for phase in run.phases]
    return columns + times


VERSUS = "GC at equal N or at equal parameters, of which GC with N=1 is SC."
COSTS = "Those of BGC over those of GC."
POINTS = "Error of BGC less that of GC, in percentage points: mean ± standard deviation over the seeds."
LOWER = (
    f"Which error is significantly lower. After training it takes {MIN_SEEDS} seeds, with a mean difference of more "
    "than two standard errors and more than one image. Before training, where all seeds end alike, it is more than two "
    "standard errors of the draw of test images, even if the two err on different ones as often as they can."
)


def _points(pair: Pair[Conversion], run: Conversions, moment: Moment) -> str | None:
    verdict = run.compare(*pair, moment)
    return training.difference_text(verdict.difference) if verdict else None


def _lower(pair: Pair[Conversion], run: Conversions, moment: Moment) -> str | None:
    verdict = run.compare(*pair, moment)
    if verdict is None:
        return None
    if verdict.too_few:
        return "too few seeds"
    return label_of(verdict.lower.variant) if verdict.lower else "not told"


def _pair_speed_up(pair: Pair[Conversion], run: Conversions, phase: str) -> str | None:
    ratio = run.speed_up(*pair, phase)
    return Comparison.of(ratio).text if ratio else None


# ---------------------------------------------------------------------------------------------------------------- notes


def _facts(document: Document, run: Conversions) -> list[str]:
    rows = run.rows
    trained = [row for row in rows if row.params.epochs]
    lines = [training.recipe_line(document, trained)] if trained else []
    if rows and not trained and not training.without_images(rows):
        lines.append("nothing was trained: the errors are those of the conversions")
    if any(row.params.distill for row in trained):
        lines.append("distilled: the untouched network's outputs were targets beside the labels")
    if training.is_synthetic(rows):
        lines.append(training.SPEED_ALONE)
    elif training.without_images(rows):
        lines.append(WITHOUT_IMAGES)
    elif rows:
        lines += [NO_CONTROL] if run.epochs and not run.control else []
        lines += training.image_note(rows)
    lines += training.some_unfinished(run.cells) + training.dense_notes(run.converted)
    lines += [*_about_calibration(run), *_about_times(run), *_about_paper(run)]
    return lines + chosen_algorithms(rows, lambda row: row.key)


NO_CONTROL = "no control: to SC holds what the training did, too; --control trains the untouched network as long"
WITHOUT_IMAGES = (
    "no images: --data-dir DIR (or BGCBENCH_DATA_DIR, ./data or ./imagenet) with train/ and val/, or val/ alone, and a "
    "folder for each class, would add test errors and calibrated weights"
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
    lines += [f"white weights kept, because least squares did no better: {listed(white)}"] if white else []
    return lines


def _those(run: Conversions, chosen: Callable[[CalibratedLayer], bool]) -> list[str]:
    """How many layers of a cell are of a kind."""
    texts = []
    for cell in run.converted:
        names, every = {layer.name for layer in cell.layers if chosen(layer)}, {layer.name for layer in cell.layers}
        if names:
            texts.append(f"{training.cell_name(cell)} ({len(names)} of {len(every)} layers)")
    return list(dict.fromkeys(texts))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _about_times(run: Conversions) -> list[str]:
    ran = next((row.time for row in run.rows if row.time), None)
    if ran is None:
        return []
    memory = f", memory {ran.memory}" if ran.memory else ""
    return [f"times: {ran.batch} images at once, {ran.precision}, {ran.layout}, {ran.mode}{memory}"]


def _about_paper(run: Conversions) -> list[str]:
    """How what ran differs from what the paper ran, and what its best row does not say."""
    if not any(cell.paper_error is not None for cell in run.cells):
        return []
    best, dense, epochs = paper.TABLE3["bgc", 2], paper.TABLE3["standard", 1], paper.TABLE3_EPOCHS
    return [
        f"paper: Table 3 of Lee, Park & Lee, ResNet-50 after {epochs} epochs from copied weights, norms as they were. "
        f"Its BGC N=2 ({best:.2f} %) is below its baseline ({dense:.2f} %), which was not trained those epochs more"
    ]


# -------------------------------------------------------------------------------------------------------------- records


def _record(run: Conversions, row: TransferRow) -> dict[str, Any]:
    """One conversion and its training, flat."""
    initial, final = (training.error_of(row, error) for error in (row.error_initial, row.error_final))
    done = final if row.status == "ok" else None
    return {
        **training.training_record(row, TransferRow),
        "initial_to_untouched": _less(initial, run.untouched),
        "final_to_untouched": _less(done, run.untouched),
        "final_to_control": _less(done, run.control.get(row.params.seed)),
        **_calibration_record(row.convert.calibration if row.convert else None),
        **_white_record(row.white_loss),
        **_time_record(row.time),
    }


def _less(error: float | None, other: float | None) -> float | None:
    return None if error is None or other is None else round(error - other, 9)


def _calibration_record(calibration: Calibration | None) -> dict[str, Any]:
    layers = calibration.layers if calibration else ()
    ridges = [layer.ridge for layer in layers if layer.ridge is not None]
    return {
        "calibration_held_out": calibration.held_out if calibration else None,
        "calibration_norms": calibration.norms if calibration else None,
        "calibration_seconds": calibration.seconds if calibration else None,
        "layer_loss_copied": _median(layer.copied for layer in layers if layer.copied is not None),
        "layer_loss_white": _median(layer.before for layer in layers if layer.before is not None),
        "layer_loss_calibrated": _median(layer.after for layer in layers if layer.after is not None),
        "ridge_min": min(ridges, default=None),
        "ridge_max": max(ridges, default=None),
        "layers_scarce": sum(layer.scarce for layer in layers) if layers else None,
        "layers_kept_white": sum(layer.is_white for layer in layers) if layers else None,
    }


def _white_record(loss: WhiteLoss | None) -> dict[str, Any]:
    found = [layer.loss for layer in (loss.layers if loss else None) or ()]
    return {
        "white_loss_expected": loss.expected if loss else None,
        "white_loss_median": _median(found),
        "white_loss_worst": max(found, default=None),
    }


def _time_record(time: NetworkTime | None) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for phase, measured in time.phase.items() if time else ():
        low, high = measured.ratio_ci95 or (None, None)
        record[f"{phase}_s"], record[f"{phase}_speed_up"] = measured.median_s, measured.ratio
        record[f"{phase}_speed_up_low"], record[f"{phase}_speed_up_high"] = low, high
    return record
