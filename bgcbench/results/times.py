"""How the times of two rows of ``profile`` compare, and whether a time can be. Tables and pictures ask here."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bgcbench.measure.statistics import Ratio, Series, ratio_of_medians
from bgcbench.results.rows import ProfileRow

BUSY = 0.25  # of a core too few, from which on a row is flagged
FAR = 2.0  # times what there is less to do: no variant is so much faster
SLOW, LONG_S = 0.005, 0.01  # so little of the roofline is doubtful in a call that takes so long
LAYER_PHASES = {"fwd": "fwd", "fwd_bwd": "train_step"}  # of a layer by itself, with the network's phase that it is in
POSSIBLE = 1.5  # of the network's time; its convolutions by themselves lack what is fused with them


def time_ratio(row: ProfileRow | None, other: ProfileRow | None, phase: str) -> Ratio | None:
    """Time of ``other`` over time of ``row``, paired if they were interleaved; None where one was not measured."""
    if row is None or other is None or phase not in row.phases or phase not in other.phases:
        return None
    paired = row.interleaved is not None and row.interleaved == other.interleaved
    return ratio_between(other, row, phase, paired=paired)


def ratio_between(over: ProfileRow, under: ProfileRow, phase: str, *, paired: bool) -> Ratio:
    """Time of ``over`` over time of ``under``."""
    return _ratio(_series(over, phase), _series(under, phase), paired)


def _series(row: ProfileRow, phase: str) -> Series:
    measured = row.phases[phase]
    return Series(measured.samples_s, measured.rounds)


@functools.lru_cache(maxsize=2048)  # the table, the verdict, the records and the picture all ask for it
def _ratio(over: Series, under: Series, paired: bool) -> Ratio:
    return ratio_of_medians(over, under, paired=paired)


def is_doubtful(row: ProfileRow, phase: str, reference: ProfileRow | None) -> bool:
    """Whether a time cannot be: by far shorter than what there is to do explains, or by far longer than it takes."""
    derived, seconds = row.phases[phase].derived, row.median_s(phase) or 0.0
    if derived.roofline_fraction is not None and derived.roofline_fraction < SLOW and seconds >= LONG_S:
        return True
    ratio = time_ratio(row, reference, phase)
    if ratio is None or reference is None or not (row.ran and reference.ran and row.counts and reference.counts):
        return False
    less = (
        (reference.ran.macs, row.ran.macs),
        (reference.ran.params, row.ran.params),
        (reference.counts.bytes_min, row.counts.bytes_min),
    )
    return ratio.value > FAR * max(theirs / ours for theirs, ours in less if theirs and ours)


# ------------------------------------------------------------------------------------------- a network's convolutions


class LayerTime(NamedTuple):
    """All convolutions of one shape in a call of the network: the row of ``own``, and the rows of what stands there
    afterwards, each with the seconds that all of its kind take; seconds before and after."""

    own: ProfileRow
    parts: tuple[tuple[ProfileRow, float], ...]
    before_s: float
    after_s: float


def fastest_in_place(own: ProfileRow, rows: Iterable[ProfileRow], phase: str) -> tuple[ProfileRow, Ratio] | None:
    """The fastest of what was measured in the place of the network's convolution ``own``, and its speed-up.

    None without an interval. It may be slower than ``own``, or not significantly faster.
    """
    there = [row for row in rows if row is not own and row.params.layer == own.params.layer]
    known = [(row, ratio) for row in there if (ratio := time_ratio(row, own, phase)) and ratio.ci95]
    return max(known, key=lambda pair: pair[1].value, default=None)


def layer_times(every: Sequence[ProfileRow], phase: str) -> list[LayerTime]:
    """Where the time of a network goes by shape in the first mode of the rows, each convolution by itself.

    After: as planned where a planned network was measured, otherwise with the fastest variant wherever that is
    significantly faster. Empty where nothing was measured, or where what was cannot be (POSSIBLE).
    """
    rows = [row for row in every if row.params.mode == every[0].params.mode]
    plan = next((row.convert for row in rows if row.convert and row.convert.planned), None)
    chosen = {layer.name: (layer.variant, layer.groups, layer.rank) for layer in plan.layers} if plan else {}
    found = []
    for own in rows:
        if own.layer is None or own.params.variant != "standard" or phase not in own.phases:
            continue
        there = {
            (row.params.variant, row.params.groups, row.params.rank): row
            for row in rows
            if row.params.layer == own.params.layer and phase in row.phases
        }
        each = [there.get(chosen.get(name, ("standard", 1, None)), own) for name in own.layer.names]
        best = fastest_in_place(own, there.values(), phase)
        if plan is None and best and best[1].value > 1 and best[1].is_significant:
            each = [best[0]] * len(each)
        calls = own.layer.count / len(each)
        parts = {row.key: (row, calls * each.count(row) * (row.median_s(phase) or 0.0)) for row in each}
        before_s, after_s = own.layer.count * (own.median_s(phase) or 0.0), sum(part_s for _, part_s in parts.values())
        found.append(LayerTime(own, tuple(parts.values()), before_s, after_s))
    whole = next((row.median_s(LAYER_PHASES[phase]) for row in rows if row.layer is None), None)
    return found if whole and sum(one.before_s for one in found) <= POSSIBLE * whole else []
