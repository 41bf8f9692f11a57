"""What ``bgcbench convert`` did: what was replaced and kept, why, and what the network costs before and after."""

from __future__ import annotations

from dataclasses import dataclass

from bgcbench.report.format import label_of, loss_text, named, scaled, shape_text, share_words
from bgcbench.report.notes import together
from bgcbench.report.table import Column, Report, Table, label, words
from bgcbench.results.rows import CalibratedLayer, Conversion, Replaced


@dataclass(frozen=True)
class Line:
    """A convolution that was replaced, and what its weights lose, where images told."""

    layer: Replaced
    loss: CalibratedLayer | None

    @property
    def shape(self) -> str:
        layer = self.layer
        return shape_text(layer.kernel, layer.in_channels, layer.out_channels, max(layer.stride))


def conversion_report(done: Conversion) -> Report:
    """A row for each convolution that was replaced, and what was kept."""
    record, before, after = done.record, done.before, done.after
    losses = {layer.name: layer for layer in record.calibration.layers} if record.calibration else {}
    lines = [Line(layer, losses.get(layer.name)) for layer in record.layers]
    what = "as planned" if record.planned else named(record.variant, record.groups, record.rank)
    summary = [
        f"{len(record.layers)} of {len(record.layers) + len(record.kept)} convolutions are {what} now ({record.init} "
        "weights)",
        f"parameters: {scaled(after.params)} instead of {scaled(before.params)}, "
        f"{share_words(after.params / before.params)}",
        f"MACs an image: {scaled(after.macs)} instead of {scaled(before.macs)}",
    ]
    if record.calibration and record.calibration.refitted:
        summary.append(f"{len(record.calibration.refitted)} of those kept are solved anew ({record.init})")
    kept = together((layer.name, layer.reason) for layer in record.kept)
    sections = {"Summary": summary, "Kept": kept, "Notes": [*done.notes, *record.notes]}
    where = "planned" if record.planned else record.where
    title = f"{done.model} (weights: {done.weights}), converted; convolutions: {where}"
    return Report([Table([title], COLUMNS, lines, sections)], records=list(map(_record, lines)))


LOST = "Share of its output that is lost on images held out."
COLUMNS: list[Column[Line]] = [
    label("layer", lambda line: line.layer.name, "The convolution that was replaced."),
    words("convolution", lambda line: line.shape, "Its kernel, channels and stride."),
    words("variant", lambda line: label_of(line.layer.variant), "What stands in its place."),
    Column("N", lambda line: line.layer.groups, "Groups."),
    Column("rank", lambda line: line.layer.rank, "Rank of LR, where it was asked for.", optional=True),
    words("init", lambda line: line.layer.init, "How its weights were found."),
    Column("lost %", lambda line: line.loss and line.loss.after, LOST, loss_text, optional=True),
]


def _record(line: Line) -> dict[str, object]:
    layer = line.layer
    about = {"layer": layer.name, "variant": layer.variant, "groups": layer.groups, "rank": layer.rank}
    return {**about, "init": layer.init, "lost": line.loss.after if line.loss else None}
