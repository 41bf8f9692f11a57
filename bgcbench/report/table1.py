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


@dataclass(frozen=True)
class Line:
    """One method at one N."""

    variant: str
    groups: int
    counts: Counts

    @property
    def record(self) -> dict[str, Any]:
        names = ("intergroup", "channels_per_group", "grouping")
        return {
            "variant": self.variant,
            "groups": self.groups,
            **dict(zip(names, VARIANTS[self.variant].table1, strict=True)),
            **dataclasses.asdict(self.counts),
            "white_error": white_error(self.variant, self.groups),
        }


def table1_report(
    in_channels: int, out_channels: int, kernel: int, size: tuple[int, int], groups: Sequence[int]
) -> Report:
    """Table 1 of the paper evaluated for one layer: all variants at every N. Nothing is measured.

    Raises ShapeError for an N that does not divide the channels.
    """
    wanted = [("standard", 1)]
    wanted += [(name, number) for number in sorted(set(groups) - {1}) for name in VARIANTS if name != "standard"]
    lines = []
    for name, number in wanted:
        if not indivisible(in_channels, out_channels, number) and unfit(
            name, in_channels, out_channels, number, kernel**2
        ):
            continue  # LR where N leaves no rank
        spec = ConvSpec(name, in_channels, out_channels, kernel, padding=(kernel - 1) // 2, groups=number, bias=False)
        lines.append(Line(name, number, count(spec, *size)))
    title = (
        f"Table 1 for a {kernel}x{kernel} convolution, {in_channels} -> {out_channels} channels, "
        f"input {size[0]} x {size[1]}"
    )
    table = Table([title], table1_columns(lines[0].counts.paper_ops), lines, {"Notes": [DEPLOYED]})
    return Report([table], records=[line.record for line in lines])


def table1_columns(dense_ops: int) -> list[Column[Line]]:
    thousands = "{:,}".format
    return [
        label("method", lambda x: label_of(x.variant), "The variant."),
        Column("N", lambda x: x.groups, "Groups.", lead=True),
        words("intergroup", lambda x: VARIANTS[x.variant].table1[0], "Whether groups exchange data."),
        words(
            "channels", lambda x: VARIANTS[x.variant].table1[1], "Input channels that one output sees directly, of n."
        ),
        words("grouping", lambda x: VARIANTS[x.variant].table1[2], "How the groups are found."),
        Column(
            "params (Table 1)",
            lambda x: x.counts.paper_params,
            "The paper's count: LGC's includes its 0/1 mask, FLGC's its assignments.",
            thousands,
        ),
        Column("params deployed", lambda x: x.counts.params, "Parameters after deployment.", thousands),
        Column("MACs deployed", lambda x: x.counts.macs, "Multiply-accumulate operations of one image.", thousands),
        Column("ops (paper)", lambda x: x.counts.paper_ops, PAPER_OPS, thousands),
        Column("ops / SC", lambda x: x.counts.paper_ops / dense_ops, "ops (paper) over those of SC.", significant),
        Column("white err", lambda x: white_error(x.variant, x.groups), WHITE_ERROR, "{:.3f}".format),
    ]


PAPER_OPS = (
    "Formula (3.14) and section 4 as printed; the set-up terms of LGC and FLGC happen once, not in every forward pass."
)
