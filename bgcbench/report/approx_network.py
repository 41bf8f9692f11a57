"""The tables of ``approx --model``: what each layer of a network loses as each variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from bgcbench.report.format import label_of, named, scaled, shape_text
from bgcbench.report.notes import notes
from bgcbench.report.table import Column, Report, Table, flat, group_columns, label, row_record, words
from bgcbench.results.aggregate import at_equal_params
from bgcbench.results.document import Document
from bgcbench.results.rows import CellKey, LayerErrors, LayerParams, LayerRow
from bgcbench.theory.exact import white_error

TOLERATED = (0.05, 0.10, 0.20)  # shares of a layer's output energy
PERCENT = "{:.2%}".format
ByCell = dict[CellKey, LayerRow]


def network_report(document: Document, rows: Sequence[LayerRow]) -> Report:
    by_layer: dict[str, ByCell] = {}
    for row in rows:
        by_layer.setdefault(row.params.layer, {})[row.params.cell] = row
    cells = list(dict.fromkeys(row.params.cell for row in rows))
    order = sorted(by_layer, key=lambda name: -statistics.fmean(_calibrated(by_layer[name]).values() or [-1.0]))
    layers = [by_layer[name] for name in order]
    sections = {"Which layers tolerate what": _tolerant(by_layer, cells)}
    tables = [Table(_title(document, rows), layer_columns(cells), layers, sections)]
    if rows:
        listed = sorted(rows, key=lambda row: order.index(row.params.layer))
        tables.append(Table(["Lost output energy by weights"], weight_columns(), listed))
    moments, facts = document.network and document.network.moments, []
    if moments:
        took = f"{moments.bytes / 2**30:.2g} GiB at once, in {moments.passes} run(s) over the images"
        facts = [f"second moments took up to {took}"]
    return Report(tables, notes(document, facts), list(map(_record, rows)))


def layer_columns(cells: Sequence[CellKey]) -> list[Column[ByCell]]:
    def lost(of: ByCell, at: CellKey) -> str | None:
        if at not in of:
            return ""
        error = _calibrated(of).get(at)
        return None if error is None else f"{error:.1%}"

    def any_row(of: ByCell) -> LayerRow:
        return next(iter(of.values()))

    return [
        label("layer", lambda of: any_row(of).params.layer, LAYER),
        words("convolution", lambda of: _shape(any_row(of).params), "Kernel, channels and stride.", drop=2),
        Column("MACs share", lambda of: any_row(of).macs_share, "Of the convolutions in this table.", PERCENT, drop=1),
        *(Column(named(*at), partial(lost, at=at), LOST, name="VARIANT N=..") for at in cells),
    ]


LAYER = "A convolution; those that lose most on average come first."
LOST = (
    "Share of the layer's output energy that the variant loses on the network's own inputs, with calibrated weights: "
    "E||Wu - Vu||^2 / E||Wu||^2 on one image in four that is held out. The rest of the network is dense."
)
CALIBRATED = (
    "Share lost with least squares on the activations, pulled towards white by the ridge that serves best on images "
    "held out. TLGC, FLGC and LGC are searches, with one fixed ridge."
)
POSITIONS = "Output positions solved on + evaluated on."


def weight_columns() -> list[Column[LayerRow]]:
    def lost(title: str, share: Callable[[LayerErrors], float], meaning: str) -> Column[LayerRow]:
        def value(row: LayerRow) -> float | None:
            return share(row.output_relative_error) if row.output_relative_error else None

        return Column(title, value, meaning, PERCENT)

    return [
        label("layer", lambda row: row.params.layer, LAYER),
        label("variant", lambda row: label_of(row.params.variant), "The variant."),
        *group_columns(lambda row: row.params),
        Column("params", lambda row: row.counts and row.counts.params, "Parameters.", scaled),
        lost("copied", lambda errors: errors.copy, "Share of the output lost with copied weights, as in the paper."),
        lost("white", lambda errors: errors.white, "Share lost with the closed-form optimum for uncorrelated inputs."),
        lost("calibrated", lambda errors: errors.calibrated, CALIBRATED),
        Column("ridge", lambda row: row.ridge, "Of that least squares, relative.", "{:g}".format, drop=2),
        Column("positions", lambda row: f"{row.rows:,} + {row.held_out_rows:,}", POSITIONS, drop=3),
        words("why not", lambda row: row.reason, "Why a row has no numbers.", optional=True),
    ]


def _calibrated(of: ByCell) -> dict[CellKey, float]:
    """What a layer loses with calibrated weights, where that is known."""
    return {at: row.output_relative_error.calibrated for at, row in of.items() if row.output_relative_error}


def _shape(p: LayerParams) -> str:
    return shape_text((p.kernel, p.kernel_width), p.in_channels, p.out_channels, p.stride)


def _tolerant(by_layer: Mapping[str, ByCell], cells: Sequence[CellKey]) -> list[str]:
    """For each variant and N, or rank: how many layers, with which share of the MACs, lose at most 5, 10, 20 %."""
    lines = []
    for at in cells:
        known = {name: lost[at] for name, of in by_layer.items() if at in (lost := _calibrated(of))}
        if not known:
            continue
        parts = []
        for limit in TOLERATED:
            within = [by_layer[name][at].macs_share or 0.0 for name, error in known.items() if error <= limit]
            parts.append(f"{len(within)} at most {limit:.0%} ({sum(within):.0%} of the MACs)")
        worst, white = max(known, key=known.__getitem__), white_error(*at)
        line = f"{named(*at)}, of {len(known)} layers: {', '.join(parts)}; most is lost in {worst} ({known[worst]:.1%})"
        lines.append(line + ("" if white is None else f"; white input would lose {white:.1%}"))
    return lines + _at_equal_size(by_layer, cells)


def _at_equal_size(by_layer: Mapping[str, ByCell], cells: Sequence[CellKey]) -> list[str]:
    """BGC at 2N versus GC at N, which have as many parameters, layer by layer."""
    lines = []
    for bgc, gc in at_equal_params({at[:2]: at for at in cells if at[0] != "standard" and at[2] is None}):
        ratios = [lost[bgc] / lost[gc] for lost in map(_calibrated, by_layer.values()) if bgc in lost and lost.get(gc)]
        if ratios:
            fewer = sum(ratio < 1 for ratio in ratios)
            lines.append(
                f"at equal parameters, {named(*bgc)} loses less than {named(*gc)} in {fewer} of {len(ratios)} layers "
                f"(calibrated; median {statistics.median(ratios):.2f} of GC's loss)"
            )
    return lines


def _title(document: Document, rows: Sequence[LayerRow]) -> list[str]:
    asked, network = document.asked, document.network
    lines = [f"{document.settings.precision}; {document.environment.where}"]
    if asked.model is None:
        return lines
    images = next((row.params.calibration_images for row in rows), asked.calibration_images)
    weights = network.weights if network else "unknown"
    about = f"{asked.model} (weights: {weights}) on {images} images of {asked.data}"
    return [f"{about}, {asked.height} x {asked.width} px; convolutions: {asked.where}", *lines]


def _record(row: LayerRow) -> dict[str, Any]:
    errors = flat(row.output_relative_error, LayerErrors).items()
    about = row_record(row, ("params", "macs"), LayerRow.__struct_fields__)
    about |= {f"output_relative_error_{weights}": error for weights, error in errors}
    return about | row_record(row, ("params", "macs"), ("output_relative_error",))
