"""The tables of a ``transfer`` document: errors before and after training, and BGC beside GC."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bgcbench.measure.statistics import Interval
from bgcbench.report import PHASE_TITLES, Column, Report, bounds_text, ratio_text, significant
from bgcbench.report.errors import (
    Cell,
    count_text,
    difference_of,
    error_of,
    error_text,
    flags,
    masked,
    planned,
    spread_text,
    synthetic,
    title_lines,
    unseen,
)
from bgcbench.report.transfer_cells import (
    AFTER,
    BEFORE,
    PAIRINGS,
    Conversion,
    Pair,
    Run,
    judge,
    kept_white,
    speed_up,
    times,
    untrained,
)
from bgcbench.report.transfer_notes import transfer_notes
from bgcbench.report.transfer_words import findings, loss_text, starts_worth
from bgcbench.results import Json


def transfer_report(document: Json) -> Report:
    """A row a variant, N and start over its seeds; BGC beside GC; what that shows, and what to know of it."""
    run = Run.of(document)
    sections = {
        "What this shows": findings(run),
        "What each start is worth": starts_worth(run),
        "Notes": transfer_notes(run),
    }
    pairs = [pair for start in run.starts for _, pairs_of, _ in PAIRINGS for pair in pairs_of(run, start)]
    pairs = [pair for pair in pairs if times(*pair, "params") is not None]  # the others are not there
    weights = next((row["params"]["weights"] for row in run.rows), "none")
    title = title_lines(document, run.rows, "" if weights == "none" else f" (weights {weights})")
    records = [_record(run, row) for row in run.rows]
    sections = {heading: lines for heading, lines in sections.items() if lines}
    return Report(title, _columns(run), sections, records, [_beside(run, pairs)] if pairs else [])


def _columns(run: Run) -> list[Column]:
    cells = run.cells
    columns = [
        Column("variant", [cell.label for cell in cells], right=False, lead=True),
        Column("N", [str(cell.groups) for cell in cells], lead=True),
        Column("init", ["-" if cell.dense else cell.init for cell in cells], right=False, lead=True),
        *_rebn(run, cells),
        Column("params", [count_text(cell.count("params")) for cell in cells]),
        Column("MACs", [count_text(cell.count("macs")) for cell in cells]),
    ]
    if masked(run.rows):
        columns.append(Column("trained params", [count_text(cell.count("params_training")) for cell in cells]))
    if unseen(run.rows):
        columns += _loss_columns(run)
    elif not synthetic(run.rows):
        columns += _error_columns(run)
    for phase in run.phases:
        columns.append(Column(f"speed-up {PHASE_TITLES[phase]}", [_speed_up(cell, phase) for cell in cells]))
    if any(cell.images_per_s is not None for cell in cells):
        speeds = ["-" if (speed := cell.images_per_s) is None else significant(speed) for cell in cells]
        columns.append(Column("images/s", speeds))
    wanted = planned(run.document)
    if unseen(run.rows):
        return [*columns, Column("flags", [", ".join(flags(cell, _ending)) for cell in cells], right=False)]
    return [
        *columns,
        Column("seeds", ["-" if _fixed(cell) else f"{len(cell.done)}/{wanted}" for cell in cells]),
        Column("flags", [", ".join(flags(cell, _ending)) for cell in cells], right=False),
    ]


def _loss_columns(run: Run) -> list[Column]:
    """What layers lose by the closed form, and what the paper prints after training."""
    cells = run.cells
    losses = [cell.white_losses for cell in cells]
    columns = [Column("expected loss %", [loss_text(cell.expected_loss) for cell in cells])]
    if any(losses):
        worst = [max(found, key=found.__getitem__, default="-") for found in losses]
        columns += [
            Column("layer loss %", [loss_text(statistics.median(f.values()) if f else None) for f in losses]),
            Column("worst %", [loss_text(max(found.values(), default=None)) for found in losses]),
            Column("worst layer", worst, right=False),
        ]
    if any(cell.printed is not None for cell in cells):
        columns.append(Column("paper error %", [error_text(cell.printed) for cell in cells]))
    return columns


def _error_columns(run: Run) -> list[Column]:
    """Errors, what is lost, and what the paper prints; those that are empty are left out."""
    cells = run.cells
    columns = [Column("error initial %", [_initial(run, cell) for cell in cells])]
    top5 = [cell.known("error_initial_top5") for cell in cells]
    if run.epochs:
        columns += [
            Column("error last %", [spread_text(cell.errors(AFTER)) for cell in cells]),
            Column("error best %", [spread_text(cell.by_seed("error_best")) for cell in cells]),
        ]
        top5 = [cell.by_seed("error_final_top5") for cell in cells]
    if any(top5):
        columns.append(Column("top-5 %", [spread_text(by_seed) for by_seed in top5]))
    if any(cell.agreement for cell in cells):
        columns.append(Column("agrees %", [spread_text(cell.agreement) for cell in cells]))
    if any(cell.layers for cell in cells):
        columns.append(Column("layer loss %", [loss_text(cell.lost("after")) for cell in cells]))
    if any(cell.printed is not None for cell in cells):
        columns.append(Column("paper %", [error_text(cell.printed) for cell in cells]))
    columns.append(Column("to SC", [_to_untouched(run, cell) for cell in cells]))
    if run.control:
        columns.append(Column("to SC trained", [_to_control(run, cell) for cell in cells]))
    return columns


def _rebn(run: Run, cells: Sequence[Conversion]) -> list[Column]:
    """Whether batch norm was estimated again, where that is not the same everywhere."""
    if not run.norms_differ:
        return []
    return [Column("rebn", ["-" if c.dense else "yes" if c.rebn else "no" for c in cells], right=False, lead=True)]


def _fixed(cell: Conversion) -> bool:
    """Whether a cell is the untouched network and no control, which has no seeds."""
    return cell.dense and not any(row["params"]["epochs"] for row in cell.rows)


def _initial(run: Run, cell: Conversion) -> str:
    """The error before training; the untouched network's is one, whatever the seeds."""
    return error_text(run.untouched) if cell.dense else spread_text(cell.errors(BEFORE))


def _to_untouched(run: Run, cell: Conversion) -> str:
    """The last error, or where nothing is trained the initial one, less that of the untouched network."""
    if _fixed(cell):
        return "0"
    errors, untouched = cell.errors(run.moments[-1]), run.untouched
    found = None if untouched is None else difference_of(errors, dict.fromkeys(errors, untouched))
    return "-" if found is None else found.text


def _to_control(run: Run, cell: Conversion) -> str:
    if cell.dense:
        return "0"
    found = difference_of(cell.errors(AFTER), run.control)
    return "-" if found is None else found.text


def _ending(row: Json) -> str:
    return "not trained" if untrained(row) else str(row["status"])


def _speed_up(cell: Conversion, phase: str) -> str:
    measured = cell.time(phase)
    if measured is None or measured["ratio"] is None:
        return "-"
    if cell.dense:
        return "1"
    ends = measured["ratio_ci95"]
    return ratio_text(measured["ratio"]) + bounds_text(Interval(*ends) if ends else None, ratio_text)


# -------------------------------------------------------------------------------------------------------- BGC beside GC


def _beside(run: Run, pairs: Sequence[Pair]) -> Report:
    """Every pair with its differences, costs and times."""
    columns = [
        Column("BGC", [one.name for one, _ in pairs], right=False, lead=True),
        Column("beside", [other.name for _, other in pairs], right=False, lead=True),
        Column("init", [one.init for one, _ in pairs], right=False, lead=True),
        *_rebn(run, [one for one, _ in pairs]),
        Column("params", [_times_text(*pair, "params") for pair in pairs]),
        Column("MACs", [_times_text(*pair, "macs") for pair in pairs]),
    ]
    for moment, title in ((BEFORE, "initial"), (AFTER, "last")):
        verdicts = [judge(run, *pair, moment) for pair in pairs]
        if any(verdicts):
            texts = ["-" if verdict is None else verdict.difference.text for verdict in verdicts]
            lower = ["-" if verdict is None else verdict.text for verdict in verdicts]
            columns += [Column(f"{title} points", texts), Column(f"{title} lower", lower, right=False)]
    for phase in run.phases:
        ratios = [speed_up(run, *pair, phase) for pair in pairs]
        texts = ["-" if r is None else ratio_text(r.value) + bounds_text(r.ci95, ratio_text) for r in ratios]
        columns.append(Column(f"speed-up {PHASE_TITLES[phase]}", texts))
    return Report(["BGC beside GC, at equal N and at equal parameters"], columns)


def _times_text(one: Cell, other: Cell, name: str) -> str:
    factor = times(one, other, name)
    return "-" if factor is None else f"{factor:.2f}x"


# -------------------------------------------------------------------------------------------------------------- records

ERRORS = (
    *("error_initial", "error_initial_top5", "loss_initial", "agreement_initial", "error_final", "error_best"),
    "error_final_top5",
)


def _record(run: Run, row: Json) -> Json:
    """One conversion and its training, flat."""
    final = error_of(row, "error_final") if row["status"] == "ok" else None
    convert: Json = row.get("convert") or {}
    return {
        "key": row["key"],
        **row["params"],
        "status": row["status"],
        "reason": row["reason"],
        **(row["counts"] or {}),
        **{name: error_of(row, name) for name in ERRORS},
        **{name: row.get(name) for name in ("epoch_best", "test_images", "images_per_s")},
        **{name: row.get(name) for name in ("convert_seconds", "train_seconds")},
        "epochs_done": len(row["epochs"]),
        "initial_to_untouched": _less(error_of(row, "error_initial"), run.untouched),
        "final_to_untouched": _less(final, run.untouched),
        "final_to_control": _less(final, run.control.get(row["params"]["seed"])),
        "paper_error": row["paper"]["error"] if row.get("paper") else None,
        **_calibration_record(convert.get("calibration") or {}),
        **_white_record(row.get("white_loss")),
        **_time_record(row.get("time")),
        "replaced": len(convert["replaced"]) if convert else None,
        "saved": row.get("saved"),
        "checkpoints": row.get("checkpoints"),
    }


def _less(error: float | None, other: float | None) -> float | None:
    return None if error is None or other is None else round(error - other, 9)


def _calibration_record(calibration: Json) -> Json:
    layers: list[Json] = calibration.get("layers", [])
    ridges = [layer["ridge"] for layer in layers if not kept_white(layer)]
    losses = {"copied": "copied", "white": "before", "calibrated": "after"}
    return {
        **{f"calibration_{name}": calibration.get(name) for name in ("held_out", "norms", "seconds")},
        **{
            f"layer_loss_{words}": statistics.median(layer[name] for layer in layers) if layers else None
            for words, name in losses.items()
        },
        "ridge_min": min(ridges, default=None),
        "ridge_max": max(ridges, default=None),
        "layers_scarce": sum(bool(layer["scarce"]) for layer in layers) if layers else None,
        "layers_kept_white": sum(map(kept_white, layers)) if layers else None,
    }


def _white_record(loss: Json | None) -> Json:
    found = [layer["loss"] for layer in (loss or {}).get("layers") or ()]
    if loss is None:
        return {}
    return {
        "white_loss_expected": loss["expected"],
        "white_loss_median": statistics.median(found) if found else None,
        "white_loss_worst": max(found, default=None),
    }


def _time_record(time: Json | None) -> Json:
    record: Json = {}
    for phase, measured in (time or {"phase": {}})["phase"].items():
        low, high = measured["ratio_ci95"] or (None, None)
        record |= {
            f"{phase}_s": measured["median_s"],
            f"{phase}_speed_up": measured["ratio"],
            f"{phase}_speed_up_low": low,
            f"{phase}_speed_up_high": high,
        }
    return record
