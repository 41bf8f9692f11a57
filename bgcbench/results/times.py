"""How the times of two rows of ``profile`` compare, and whether a time can be. Tables and pictures ask here."""

from __future__ import annotations

import functools

from bgcbench.measure.statistics import Ratio, Series, ratio_of_medians
from bgcbench.results.rows import ProfileRow

BUSY = 0.25  # of a core too few, from which on a row is flagged
FAR = 2.0  # times what there is less to do: no variant is so much faster
SLOW, LONG_S = 0.005, 0.01  # so little of the roofline is doubtful in a call that takes so long


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


NETWORK_PHASE = {"fwd": "fwd", "fwd_bwd": "train_step"}  # the network's phase that goes with a layer's


def is_doubtful(row: ProfileRow, phase: str, reference: ProfileRow | None, network: ProfileRow | None = None) -> bool:
    """Whether a time cannot be: by far shorter than what there is to do explains, or by far longer than it takes.

    network: the dense one, of which the convolutions of one shape are but a part.
    """
    derived, seconds = row.phases[phase].derived, row.median_s(phase) or 0.0
    whole = network.median_s(NETWORK_PHASE.get(phase, "")) if network else None
    if whole and row.layer and row.params.variant == "standard" and row.layer.count * seconds > whole:
        return True
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
