"""The columns of what ``profile`` measures, and what its rows hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from bgcbench.report.compare import speed_up
from bgcbench.report.format import bounds_text, label_of, mebibytes, scaled, significant, size_text, time_unit
from bgcbench.report.table import Column, group_columns, label, words
from bgcbench.results.rows import Phase, ProfileRow
from bgcbench.results.times import BUSY, is_doubtful
from bgcbench.specs import PHASE_TITLES, PLAN
from bgcbench.theory import paper

Rows = Sequence[ProfileRow]
THREE = "{:.3f}".format


def profile_columns(
    first: str, rows: Rows, phases: Sequence[str], reference: ProfileRow | None
) -> list[Column[ProfileRow]]:
    """Of a layer or a network; what only one of them has is left out of the other's table."""

    def replaced(row: ProfileRow) -> int | None:
        return len(row.convert.replaced) if row.convert else None

    return [
        label(first, lambda row: variant_name(row, rows), VARIANT),
        *group_columns(lambda row: row.params),
        Column("replaced", replaced, "Number of convolutions that are replaced.", optional=True),
        Column("params", lambda row: row.ran and row.ran.params, PARAMS, scaled),
        Column("MACs", lambda row: row.ran and row.ran.macs, MACS, scaled),
        Column("white err", white_error, WHITE_ERROR, THREE, optional=True),
        *(column for phase in phases for column in _phase_columns(rows, phase, reference)),
        Column("x+W MiB", lambda row: row.memory and row.memory.paper_bytes, PAPER_BYTES, mebibytes, optional=True),
        Column("peak MiB", peak, PEAK, mebibytes),
        Column("roofline", lambda row: _roofline(row, phases), ROOFLINE),
        Column("paper ms", lambda row: row.paper and row.paper.time_s * 1e3, PAPER_TIME, THREE, optional=True),
        Column("paper MiB", lambda row: row.paper and row.paper.memory_bytes, PAPER_MEMORY, mebibytes, optional=True),
        Column("paper err %", lambda row: row.paper and row.paper.error, PAPER_ERROR, "{:.2f}".format, optional=True),
        flags_column(phases, reference),
    ]


def _phase_columns(rows: Rows, phase: str, reference: ProfileRow | None) -> list[Column[ProfileRow]]:
    def faster(row: ProfileRow) -> str | None:
        compared = speed_up(row, reference, phase)
        return "1" if row is reference else compared.text if compared else None

    title, images = PHASE_TITLES[phase], "Images a second."
    return [
        time_column(rows, phase),
        Column(f"{title} images/s", lambda row: network_speed(row, phase), images, name="images/s", optional=True),
        Column(f"speed-up {title}", faster, SPEED_UP, name="speed-up"),
    ]


VARIANT = (
    "SC: the standard convolution; dense: the network as it is; plan: as --plan has it, layer by layer. masked: the "
    "algorithm that is trained, with a dense kernel; deployed: what runs afterwards."
)
PARAMS = "Parameters of the algorithm that ran."
MACS = "Multiply-accumulate operations of one image, forward, in convolutions and fully connected layers."
WHITE_ERROR = "Smallest share of the output's energy that the variant loses on white input (closed form)."
SPEED_UP = (
    "Time of the standard convolution, or dense network, over the row's, with its 95 % confidence interval; [?]: too "
    "few rounds for one."
)
PAPER_BYTES = "Input, weights and, for BGC, the mean: what the paper calls memory."
PEAK = (
    "Weights, momentum and input, and the most that one step held beyond them: by CUDA's allocator, or on the CPU by "
    "sampled resident memory. Not of ONNX Runtime, which keeps what it has taken."
)
ROOFLINE = (
    "Share of what the measured ceilings allow for the row's own work in the last phase: C compute-bound, M "
    "memory-bound. It exceeds 100 % where padding is skipped or the convolution beats the matrix product; doubtful: "
    "over 400 %, and something held the ceilings down."
)
PAPER_TIME = f"Time that Table 4 of Lee, Park & Lee prints, of an {paper.DEVICE}, forward and backward."
PAPER_MEMORY = "Memory that Table 4 prints (as Mb), which is input, weights and mean, and no peak."
PAPER_ERROR = "Error of ResNet-50 after transfer (Table 3), not of this layer."
FLAGS = (
    "n=: samples, where the speed-up is not known to 5 % (2 % with --max-time), or without a reference the median. "
    "uneven, noisy: the middle half of the samples spreads over more than 3 %, 10 % of the median. launch-bound: the "
    "host is the limit. page faults: memory came anew from the system although it was to be kept, which takes over 1 % "
    "of the time. kept dense: convolutions that N or the rank does not fit. busy CPU: this run and other processes "
    "wanted more cores than there are. doubtful: the speed-up is over twice what the parameters, MACs and bytes "
    "explain, or under 0.5 % of the roofline is reached in 10 ms or more, or a network's convolutions of one shape "
    "take longer than the network, in two measurements; measure again."
)


def time_form(rows: Rows, phase: str) -> tuple[str, Callable[..., str]]:
    """The unit of the times in ``phase``, and the form of a time in it: with as many decimals as give ``like``, or
    itself, four digits."""
    factor, unit = time_unit(filter(None, (row.median_s(phase) for row in rows)))

    def form(seconds: float, like: float | None = None) -> str:
        digits = 3 - math.floor(math.log10((like or seconds) * factor))
        return f"{seconds * factor:.{min(max(0, digits), 4)}f}"

    return unit, form


def time_column(rows: Rows, phase: str, drop: int = 0) -> Column[ProfileRow]:
    unit, form = time_form(rows, phase)

    def time(measured: Phase) -> str:
        median = measured.summary.median_s
        return form(median) + bounds_text(measured.summary.ci95_s, partial(form, like=median))

    meaning = "Median time of a batch, with its 95 % confidence interval."
    return Column(f"{PHASE_TITLES[phase]} {unit}", lambda row: row.phases.get(phase), meaning, time, "time", drop=drop)


def flags_column(
    phases: Sequence[str], reference: ProfileRow | None, network: ProfileRow | None = None, drop: int = 0
) -> Column[ProfileRow]:
    return words("flags", lambda row: ", ".join(flags(row, phases, reference, network)), FLAGS, drop=drop)


# ---------------------------------------------------------------------------------------------------- what a row holds


def reference_of(rows: Rows) -> ProfileRow | None:
    """The standard convolution's row, or the dense network's."""
    return next((row for row in rows if row.params.variant == "standard" and row.phases), None)


def measured_phases(rows: Rows, among: Iterable[str] = PHASE_TITLES) -> list[str]:
    return [phase for phase in among if any(phase in row.phases for row in rows)]


def variant_name(row: ProfileRow, rows: Rows) -> str:
    """The variant's label, with its algorithm where several are in the table; a network without one is dense."""
    variant = row.params.variant
    if row.params.model and variant == "standard":
        return "dense"
    algorithms = {other.params.algorithm for other in rows if other.params.variant == variant}
    return label_of(variant) if len(algorithms) < 2 else f"{label_of(variant)} {row.params.algorithm}"


def numbered(row: ProfileRow, rows: Rows) -> str:
    name, (variant, groups, rank) = variant_name(row, rows), row.params.cell
    return name if variant == PLAN else f"{name} {size_text(groups, rank)}"


def white_error(row: ProfileRow) -> float | None:
    return row.approximability.white_error if row.approximability else None


def peak(row: ProfileRow) -> int | None:
    """Layer (or network, with its momentum) and input, and the most that a step held beyond them."""
    memory = row.memory
    if memory is None or memory.peak_delta_bytes is None:
        return None
    return memory.params_bytes + memory.input_bytes + memory.optimizer_bytes + memory.peak_delta_bytes


def network_speed(row: ProfileRow, phase: str) -> str | None:
    """Images a second of a network."""
    if row.params.model is None or phase not in row.phases:
        return None
    return significant(row.phases[phase].derived.images_per_s, 4)


def _roofline(row: ProfileRow, phases: Sequence[str]) -> str | None:
    derived = row.phases[phases[-1]].derived if phases and phases[-1] in row.phases else None
    if derived is None or derived.roofline_fraction is None:
        return None
    if derived.roofline_fraction > BEYOND:
        return "doubtful"
    letter = {"compute": "C", "memory": "M"}.get(derived.bound or "", "")
    return f"{derived.roofline_fraction:.0%} {letter}"


def flags(
    row: ProfileRow, phases: Sequence[str], reference: ProfileRow | None = None, network: ProfileRow | None = None
) -> list[str]:
    """What to know before a row's numbers are used. reference, network: as in ``is_doubtful``."""
    dense = row.convert.indivisible if row.convert else []
    kept = [f"{len(dense)} kept dense"] if dense else []
    if not (row.status == "ok" or (row.status == "interrupted" and row.phases)):
        return _failed(row) + kept
    by_phase = {
        PHASE_TITLES[phase]: ["doubtful"] * is_doubtful(row, phase, reference, network)
        + _phase_flags(row.phases[phase])
        for phase in phases
        if phase in row.phases
    }
    first, *others = by_phase.values() or [[]]
    alike = all(found == first for found in others)
    found = first if alike else [f"{title} {flag}" for title, raised in by_phase.items() for flag in raised]
    return [*found, *(["interrupted"] if row.status != "ok" else []), *kept]


def _failed(row: ProfileRow) -> list[str]:
    if all(ending(row, phase) == row.status for phase in row.phases):
        return [row.status]
    return [f"{PHASE_TITLES.get(phase, phase)} {failure.status}" for phase, failure in row.failures.items()]


def _phase_flags(measured: Phase) -> list[str]:
    summary, derived = measured.summary, measured.derived
    spread = (summary.q3_s - summary.q1_s) / summary.median_s
    found = {
        "noisy": spread > 0.10,
        "uneven": 0.03 < spread <= 0.10,
        f"n={summary.n}": not measured.converged,
        "launch-bound": derived.launch_bound,
        "page faults": derived.page_faults,
        "busy CPU": (derived.contended_cores or 0.0) > BUSY,
    }
    return [flag for flag, raised in found.items() if raised]


BEYOND = 4.0  # times the roofline: so much no algorithm saves, and something held the ceilings down


def ending(row: ProfileRow, phase: str) -> str:
    """The status that ``phase`` ended with: the row's, unless only others of its phases have failed."""
    if row.status == "interrupted":  # what there are samples of counts
        return "ok" if phase in row.phases else row.status
    if not row.failures:
        return row.status
    return row.failures[phase].status if phase in row.failures else "ok"
