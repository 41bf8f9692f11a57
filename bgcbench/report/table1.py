"""Table 1 of the paper evaluated for one layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bgcbench.measure.counts import Counts, count
from bgcbench.report.format import label_of, significant
from bgcbench.report.measured import WHITE_ERROR
from bgcbench.report.table import Column, Report, Table, label, words
from bgcbench.specs import VARIANTS, ConvSpec, indivisible, unfit
from bgcbench.theory.exact import white_error

DEPLOYED = (
    "per image, forward. LGC and FLGC train dense kernels and deploy Kmn/N parameters; LGC is taken at condensation N, "
    "FLGC with balanced groups. LR is not one of the paper's methods: its rank is the largest with at most Kmn/N "
    "parameters"
)
PAPER = ("intergroup", "channels_per_group", "grouping")  # what the paper's table says of a variant
THOUSANDS = "{:,}".format


@dataclass(frozen=True)
class Line:
    """One method at one N."""

    variant: str
    groups: int
    counts: Counts

    @property
    def said(self) -> tuple[str, str, str]:
        return VARIANTS[self.variant].table1

    @property
    def white_error(self) -> float | None:
        return white_error(self.variant, self.groups)

    @property
    def record(self) -> dict[str, Any]:
        about = {"variant": self.variant, "groups": self.groups, **dict(zip(PAPER, self.said, strict=True))}
        return {**about, **dataclasses.asdict(self.counts), "white_error": self.white_error}


def table1_report(
    in_channels: int, out_channels: int, kernel: int, size: tuple[int, int], groups: Sequence[int]
) -> Report:
    """Table 1 of the paper evaluated for one layer: all variants at every N. Nothing is measured.

    Raises ShapeError for an N that does not divide the channels.
    """
    wanted = [("standard", 1)]
    wanted += [(name, number) for number in sorted(set(groups) - {1}) for name in VARIANTS if name != "standard"]
    shape, lines = (in_channels, out_channels), []
    for name, number in wanted:
        if not indivisible(*shape, number) and unfit(name, *shape, number, kernel**2):
            continue  # LR where N leaves no rank
        spec = ConvSpec(name, *shape, kernel, padding=(kernel - 1) // 2, groups=number, bias=False)
        lines.append(Line(name, number, count(spec, *size)))
    about = f"{kernel}x{kernel} convolution, {in_channels} -> {out_channels} channels, input {size[0]} x {size[1]}"
    columns = table1_columns(lines[0].counts.paper_ops)
    table = Table([f"Table 1 for a {about}"], columns, lines, {"Notes": [DEPLOYED]})
    return Report([table], records=[line.record for line in lines])


def table1_columns(dense_ops: int) -> list[Column[Line]]:
    return [
        label("method", lambda line: label_of(line.variant), "The variant."),
        Column("N", lambda line: line.groups, "Groups.", lead=True),
        words("intergroup", lambda line: line.said[0], "Whether groups exchange data."),
        words("channels", lambda line: line.said[1], "Input channels that one output sees directly, of n."),
        words("grouping", lambda line: line.said[2], "How the groups are found."),
        Column("params (Table 1)", lambda line: line.counts.paper_params, PAPER_PARAMS, THOUSANDS),
        Column("params deployed", lambda line: line.counts.params, "Parameters after deployment.", THOUSANDS),
        Column("MACs deployed", lambda line: line.counts.macs, MACS, THOUSANDS),
        Column("ops (paper)", lambda line: line.counts.paper_ops, PAPER_OPS, THOUSANDS),
        Column(
            "ops / SC", lambda line: line.counts.paper_ops / dense_ops, "ops (paper) over those of SC.", significant
        ),
        Column("white err", lambda line: line.white_error, WHITE_ERROR, "{:.3f}".format),
    ]


MACS = "Multiply-accumulate operations of one image."
PAPER_PARAMS = "The paper's count: LGC's includes its 0/1 mask, FLGC's its assignments."
PAPER_OPS = (
    "Formula (3.14) and section 4 as printed; the set-up terms of LGC and FLGC happen once, not in every forward pass."
)
