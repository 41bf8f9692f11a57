"""What to know of a ``transfer`` document before its numbers are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bgcbench.report import chosen_forms, mebibytes, notes, significant
from bgcbench.report.errors import TELLING, dense_lines, ending_of, planned, recipe_line, synthetic, unseen
from bgcbench.report.transfer_cells import Conversion, Run, kept_white
from bgcbench.report.transfer_words import joined, listed
from bgcbench.results import Json
from bgcbench.theory import paper

WITHOUT_IMAGES = (
    "layer loss: share of a layer's output that the weights D in its place lose on white input, ||W - D||^2 / ||W||^2 "
    "with the network's own kernel W; the median of the layers and the worst. expected: of a kernel of independent "
    "entries",
    "images would add the test error of every conversion, and calibrated weights, which lose far less: least squares "
    "on the network's own activations, for which no labels are needed",
    "give them with --data-dir DIR (or BGCBENCH_DATA_DIR, or as ./data or ./imagenet): train/ and val/, or val/ alone, "
    "with a folder for each class",
)
NOTHING = 1e-6  # a share of a layer's output that is rounding


def transfer_notes(run: Run) -> list[str]:
    rows = run.rows
    trained = [row for row in rows if row["params"]["epochs"]]
    lines = [recipe_line(run.document, trained)] if trained else []
    if rows and not trained and not unseen(rows):
        lines.append("nothing was trained: the errors are those of the conversions")
    if any(row["params"].get("distill") for row in trained):
        lines.append("distilled: the untouched network's outputs were targets beside the labels")
    if synthetic(rows):
        lines.append("synthetic images: the speed is all that is measured; there is no error to show")
    elif unseen(rows):
        lines += WITHOUT_IMAGES
    elif rows:
        lines += _about_errors(run)
    lines += [*_about_norms(run), *_about_calibration(run), *_about_times(run), *_about_paper(run)]
    lines += chosen_forms(rows, lambda row: str(row["key"]))
    lines += dense_lines(list({cell.name: cell for cell in run.converted}.values()))
    if any(cell.done and len(cell.done) < len(cell.rows) for cell in run.cells):
        lines.append(
            "where a seed did not finish, the mean is of those that did, which flatters if it failed in training"
        )
    return lines + _endings(rows) + notes(run.document, [], quick="few epochs or images, no claim; run without --quick")


def _about_errors(run: Run) -> list[str]:
    line = "error: top-1 on the test images, mean ± standard deviation over the seeds. initial: as converted, before "
    line += "any training"
    if run.epochs:
        line += ". last: after the last epoch, the figure to quote; best: of the epoch that was best on these same "
        line += "test images, which flatters"
    line += f". to SC: {'last' if run.epochs else 'initial'} error less the untouched network's, in percentage points"
    if run.control:
        line += "; to SC trained: less that of the control, the untouched network trained as long, seed by seed"
    if any(cell.agreement for cell in run.cells):
        line += ". agrees: test images on which the first guess is the untouched network's"
    lines = [line]
    if run.epochs and not run.control:
        lines.append(
            "no control: the untouched network was not trained any further, so to SC also holds what the training did; "
            "--control trains it as long"
        )
    if run.image:
        data = run.rows[0]["params"]["dataset"]
        lines.append(f"{data}: {100 / run.image:.0f} test images, so one image is {significant(run.image, 2)} points")
    return lines + _about_telling(run)


def _about_telling(run: Run) -> list[str]:
    """What has to be so for one error to be called lower than another."""
    if len(run.converted) < 2 or not run.image:
        return []
    by_seeds = (
        "the mean of the differences by seed is more than twice its standard error, and more than one image; all seeds "
        "are judged on the same images: what others would say is not in it"
    )
    by_images = (
        "the difference is more than two standard errors of the draw of test images, even if the two err on different "
        "ones as often as they can"
    )
    seeds = planned(run.document)
    line = f"lower, before training: {by_images}"
    if seeds >= TELLING:
        line = f"lower: {by_seeds}. Before training, where all seeds end alike: {by_images}"
    elif run.epochs:
        line += f"; after training: it takes {TELLING} seeds to tell"
    return [line]


def _about_norms(run: Run) -> list[str]:
    """What became of the statistics of batch norm."""
    if not run.starts:
        return []
    found = [calibration for cell in run.converted for calibration in cell.calibrations if calibration["rebn"]]
    if not any(rebn for _, rebn in run.starts):
        return ["statistics of batch norm are the untouched network's (--no-rebn)"]
    norms = f" ({_span([calibration['norms'] for calibration in found])} layers)" if found else ""
    images = f"{_span([calibration['images'] for calibration in found])} " if found else ""
    where = "where it says rebn" if run.norms_differ else "in each conversion"
    return [f"statistics of batch norm{norms} are estimated again {where}, on {images}training images without labels"]


def _about_calibration(run: Run) -> list[str]:
    """On what was calibrated, how long that took, and where there was little to go by."""
    cells = [cell for cell in run.converted if cell.layers]
    if not cells:
        return []
    found = [calibration for cell in cells for calibration in cell.calibrations]
    ridges = [layer["ridge"] for cell in cells for layer in cell.layers if not kept_white(layer)]
    images, held_out = (_span([calibration[name] for calibration in found]) for name in ("images", "held_out"))
    ridge = f"the ridge ({_span(ridges)})" if ridges else "the ridge"
    line = (
        f"calibrated: least squares on {images} training images without labels, layer by layer on what the converted "
        f"network gives; {held_out} of them are held out: they choose {ridge} towards the white form and judge the "
        "layer loss, the share of a layer's output that is lost (median of the layers)"
    )
    seconds = [row["convert_seconds"] for cell in cells for row in cell.rows if row.get("convert_seconds") is not None]
    if seconds:
        line += f". A conversion took {_span([float(significant(s, 2)) for s in seconds])} s"
        line += f" and up to {mebibytes(max(c['moment_bytes'] for c in found))} MiB of second moments"
    lines = [line]
    for words, chosen in (
        ("few images for as many weights (more --calibration-images)", lambda layer: layer["scarce"]),
        ("white weights were kept, nothing calibrated did better on the images held out", _in_vain),
    ):
        named = [text for cell in cells if (text := _those(run, cell, chosen))]
        lines += [f"{words}: {listed(named)}"] if named else []
    return lines


def _in_vain(layer: Json) -> bool:
    """Whether white was kept although it loses something."""
    return kept_white(layer) and layer["before"] > NOTHING


def _those(run: Run, cell: Conversion, chosen: Callable[[Json], Any]) -> str:
    """How many layers of a cell are of a kind, and which."""
    names = list(dict.fromkeys(layer["name"] for layer in cell.layers if chosen(layer)))
    every = len({layer["name"] for layer in cell.layers})
    which = "" if len(names) == every else f": {listed(names)}"
    return f"{run.named(cell)} ({len(names)} of {every} layers{which})" if names else ""


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def _about_times(run: Run) -> list[str]:
    ran = next((row["time"] for row in run.rows if row.get("time")), None)
    if ran is None:
        return []
    how = ", ".join(str(ran[name]) for name in ("precision", "layout", "mode") if ran.get(name))
    how += f", memory {ran['memory']}" if ran.get("memory") else ""
    return [
        "speed-up: time of the untouched network, or of GC, over that of the row [95% CI; beside GC at least that]; "
        f"{ran['batch']} images at once, {how}; a start does not change it"
    ]


def _about_paper(run: Run) -> list[str]:
    """How what ran differs from what the paper ran, and what its best row does not say."""
    if not any(cell.printed is not None for cell in run.cells):
        return []
    epochs, best, dense = paper.TABLE3_EPOCHS, paper.TABLE3["bgc", 2], paper.TABLE3["standard", 1]
    line = (
        f"paper: Table 3 of Lee, Park & Lee, ResNet-50 after {epochs} epochs of training from copied weights, "
        "batch norm as it was; it does not say over how many trainings"
    )
    here = [f"{run.epochs} epochs" if run.epochs else "no training"] if run.epochs != epochs else []
    recipes = {row["params"]["recipe"] for row in run.rows}
    here += [f"recipe {joined(sorted(recipes))}"] if run.epochs and recipes != {"paper"} else []
    if run.starts and ("copy", False) not in run.starts:
        here.append(f"weights {joined([run.start(start) for start in run.starts])}")
        here += ["batch norm estimated again"] if all(rebn for _, rebn in run.starts) else []
    line += f"; here: {', '.join(here)}" if here else ""
    if unseen(run.rows):
        return [line]
    return [
        line,
        f"Table 3's BGC N=2 ({best:.2f} %) is below its baseline ({dense:.2f} %), which did not have those "
        f"{epochs} epochs more" + ("" if run.control else "; --control trains it as long"),
    ]


def _endings(rows: Sequence[Json]) -> list[str]:
    """The rows that are not done, those that ended alike in one line."""
    ended: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            ended.setdefault(ending_of(row), []).append(row["key"])
    return [f"{listed(keys)}: {how}" for how, keys in ended.items()]
