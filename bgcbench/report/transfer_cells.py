"""The cells of a ``transfer`` document, which of them stand beside each other, and when two of them differ."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bgcbench.measure.statistics import Interval, Ratio
from bgcbench.report import PHASE_TITLES
from bgcbench.report.errors import TELLING, Cell, Difference, difference_of, error_of, image_of, place_of
from bgcbench.results import Json

# What a network starts from, in words, in the order of the table; the untouched network has no start.
INITS = {"none": "", "copy": "copied", "white": "white", "calibrated": "calibrated", "scratch": "from scratch"}
ALIKE = 0.02  # two counts that differ by no larger share are equal
BEFORE, AFTER = "before training", "after training"
Start = tuple[str, bool]  # init, and whether batch norm was estimated again


# ---------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True, eq=False)
class Conversion(Cell):
    """One variant at one N and one start: a row a seed. The untouched network is one too."""

    init: str
    rebn: bool

    @property
    def start(self) -> Start:
        return self.init, self.rebn

    @property
    def dense(self) -> bool:
        return self.variant == "standard"

    def known(self, field: str) -> dict[int, float]:
        """What is known of ``field`` by seed, however the row ended."""
        return {row["params"]["seed"]: value for row in self.rows if (value := error_of(row, field)) is not None}

    def errors(self, moment: str) -> dict[int, float]:
        """By seed: of every conversion that was judged, or of every training that has ended."""
        return self.by_seed() if moment == AFTER else self.known("error_initial")

    @property
    def agreement(self) -> dict[int, float]:
        """Test images (percent) on which the first guess is the untouched network's, by seed."""
        return self.known("agreement_initial")

    @property
    def calibrations(self) -> list[Json]:
        found = [(row.get("convert") or {}).get("calibration") for row in self.rows]
        return [calibration for calibration in found if calibration]

    @property
    def layers(self) -> list[Json]:
        """What the calibrations of all seeds say of each layer."""
        return [layer for calibration in self.calibrations for layer in calibration["layers"]]

    @property
    def white_losses(self) -> dict[str, float]:
        """What each layer loses on white input by the closed form, where nothing but its kernel was looked at."""
        every = [(row.get("white_loss") or {}).get("layers") for row in self.rows]
        return {layer["name"]: layer["loss"] for layer in next(filter(None, every), ())}

    @property
    def expected_loss(self) -> float | None:
        """That of a kernel of independent entries."""
        every = [(row.get("white_loss") or {}).get("expected") for row in self.rows]
        return next((expected for expected in every if expected is not None), None)

    def lost(self, name: str) -> float | None:
        """Median over the layers of the share of their output that is lost: 'copied', 'before' (white) or 'after'."""
        shares = [layer[name] for layer in self.layers if layer[name] is not None]
        return statistics.median(shares) if shares else None

    def time(self, phase: str) -> Json | None:
        found = [(row.get("time") or {"phase": {}})["phase"].get(phase) for row in self.rows]
        return next((measured for measured in found if measured), None)


def kept_white(layer: Json) -> bool:
    """Whether a layer was left with the white closed form, because no least squares did better."""
    return layer["ridge"] is None


def untrained(row: Json) -> bool:
    """Whether a row is a conversion that its training has not come to."""
    return row["status"] == "interrupted" and row["stage"] == "evaluated" and not row["epochs"]


@dataclass(frozen=True)
class Run:
    """A document as cells: the untouched network, then by N, start and variant, so that GC and BGC are neighbours."""

    document: Json
    rows: list[Json]
    cells: list[Conversion]

    @classmethod
    def of(cls, document: Json) -> Run:
        found: dict[tuple[str, int, str, bool], list[Json]] = {}
        for row in document["results"]:
            p = row["params"]
            found.setdefault((p["variant"], p["groups"], p["init"], bool(p["rebn"])), []).append(row)
        cells = [Conversion(variant, n, rows, init, rebn) for (variant, n, init, rebn), rows in found.items()]

        def place(cell: Conversion) -> tuple[Any, ...]:
            n, variant = place_of(cell)
            return not cell.dense, n, _order(cell.start), variant

        return cls(document, document["results"], sorted(cells, key=place))

    @property
    def standard(self) -> Conversion | None:
        return next((cell for cell in self.cells if cell.dense), None)

    @property
    def converted(self) -> list[Conversion]:
        return [cell for cell in self.cells if not cell.dense]

    @property
    def untouched(self) -> float | None:
        """Error of the network as it was, which all seeds have in common."""
        errors = self.standard.errors(BEFORE) if self.standard else {}
        return statistics.fmean(errors.values()) if errors else None

    @property
    def control(self) -> dict[int, float]:
        """Errors of the untouched network once it is trained for as long; empty without --control."""
        return self.standard.errors(AFTER) if self.standard else {}

    @property
    def epochs(self) -> int:
        """Of the trainings; 0 where nothing is trained."""
        return max((row["params"]["epochs"] for row in self.rows), default=0)

    @property
    def moments(self) -> tuple[str, ...]:
        return (BEFORE, AFTER) if self.epochs else (BEFORE,)

    @property
    def image(self) -> float:
        """What one test image changes an error by, in percentage points; 0 where that is not known."""
        return image_of(self.rows)

    @functools.cached_property
    def starts(self) -> list[Start]:
        return sorted({cell.start for cell in self.converted}, key=_order)

    @functools.cached_property
    def phases(self) -> list[str]:
        """What was timed."""
        return [phase for phase in PHASE_TITLES if any(cell.time(phase) for cell in self.cells)]

    @property
    def norms_differ(self) -> bool:
        """Whether batch norm was estimated again in some conversions only."""
        return len({rebn for _, rebn in self.starts}) > 1

    # -------------------------------------------------------------------------------------------------------- in words

    def when(self, moment: str) -> str:
        return moment if moment == BEFORE else f"after {self.epochs} epoch{'s' * (self.epochs > 1)}"

    def start(self, start: Start) -> str:
        """A start, with its batch norm where both are there."""
        return INITS.get(start[0], start[0]) + (" + rebn" if start[1] and self.norms_differ else "")

    def which(self, start: Start) -> str:
        """The start and a comma, where there are several."""
        return f"{self.start(start)}, " if len(self.starts) > 1 else ""

    def named(self, cell: Conversion) -> str:
        """The cell, with its start where there are several."""
        return cell.name + (f" {self.start(cell.start)}" if len(self.starts) > 1 and not cell.dense else "")


def _order(start: Start) -> tuple[int, bool]:
    order = list(INITS)
    return order.index(start[0]) if start[0] in order else len(order), start[1]


def means(cells: Iterable[Conversion], moment: str) -> dict[Conversion, float]:
    """Mean errors (percent) over the seeds, of the cells that have one."""
    return {cell: statistics.fmean(errors.values()) for cell in cells if (errors := cell.errors(moment))}


# ---------------------------------------------------------------------------------------------------------------- pairs

Pair = tuple[Conversion, Conversion]


def at_equal_n(run: Run, start: Start) -> list[Pair]:
    """BGC beside GC of the same N."""
    at = {(cell.variant, cell.groups): cell for cell in run.converted if cell.start == start}
    return [(at["bgc", n], at["gc", n]) for variant, n in at if variant == "gc" and ("bgc", n) in at]


def at_equal_size(run: Run, start: Start) -> list[Pair]:
    """BGC beside GC of half its N; a GC of one group is the standard convolution.

    Without those that differ in size after all, as where one N divides fewer convolutions than the other.
    """
    at = {(cell.variant, cell.groups): cell for cell in run.converted if cell.start == start}
    plain = {1: run.standard, **{n: cell for (variant, n), cell in at.items() if variant == "gc"}}
    pairs = [(at["bgc", 2 * n], cell) for n, cell in plain.items() if cell is not None and ("bgc", 2 * n) in at]
    return [(one, other) for one, other in pairs if abs((times(one, other, "params") or 1.0) - 1) <= ALIKE]


# A way of pairing: in words, the pairs of a start, and how one of them is named.
PAIRINGS: tuple[tuple[str, Callable[[Run, Start], list[Pair]], Callable[[Conversion, Conversion], str]], ...] = (
    ("at equal N", at_equal_n, lambda one, _: f"N={one.groups}"),
    ("at equal parameters", at_equal_size, lambda one, other: f"{one.name} / {other.name}"),
)


def whatever_start(run: Run, pairs_of: Callable[[Run, Start], list[Pair]]) -> list[Pair]:
    """The pairs for what a start does not change: size and time."""
    found = {(one.groups, other.groups): (one, other) for start in run.starts for one, other in pairs_of(run, start)}
    return [found[at] for at in sorted(found)]


def times(one: Cell, other: Cell, name: str) -> float | None:
    """How many times the parameters ('params') or multiply-adds ('macs') of ``other`` the first has."""
    ours, theirs = one.count(name), other.count(name)
    return ours / theirs if ours and theirs else None


def speed_up(run: Run, one: Conversion, other: Conversion, phase: str) -> Ratio | None:
    """Time of ``other`` over time of ``one``. The interval reaches from end to end of theirs: at least 95 %."""
    ours, theirs = (_timed(run, cell).time(phase) for cell in (one, other))
    if ours is None or theirs is None:
        return None
    if ours["ratio"] and theirs["ratio"]:  # of the untouched network's time, round by round
        value, upper, lower = ours["ratio"] / theirs["ratio"], ours["ratio_ci95"], theirs["ratio_ci95"]
    else:
        value, upper, lower = theirs["median_s"] / ours["median_s"], theirs["ci95_s"], ours["ci95_s"]
    ends = Interval(upper[0] / lower[1], upper[1] / lower[0]) if upper and lower else None
    return Ratio(value, ends, paired=True)


def _timed(run: Run, cell: Conversion) -> Conversion:
    """The cell of this variant and N that was timed, whatever its start."""
    alike = [found for found in run.cells if (found.variant, found.groups) == (cell.variant, cell.groups)]
    return next((found for found in alike if any(map(found.time, run.phases))), cell)


# ------------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """Two cells' errors at one moment. told: they differ by more than chance; few: too few seeds to say that."""

    one: Conversion
    other: Conversion
    difference: Difference
    told: bool
    few: bool

    @property
    def lower(self) -> Conversion | None:
        """The cell with the lower error; None where that cannot be told."""
        if not self.told:
            return None
        return self.one if self.difference.value < 0 else self.other

    @property
    def text(self) -> str:
        return "too few seeds" if self.few else "not told" if self.lower is None else self.lower.label


def judge(run: Run, one: Conversion, other: Conversion, moment: str) -> Verdict | None:
    """Which has the lower error; None where one of them has none.

    A training is held against the scatter of the seeds. A conversion's seed only draws the images that it is
    calibrated on: where there are few seeds, or all end alike, the test images are what chance is left in.
    """
    ours, theirs = one.errors(moment), other.errors(moment)
    if other.dense and moment == BEFORE and theirs:
        theirs = dict.fromkeys(ours, statistics.fmean(theirs.values()))
    found = difference_of(ours, theirs)
    if found is None:
        return None
    scatter = found.seeds >= TELLING and any(len({*errors.values()}) > 1 for errors in (ours, theirs))
    if moment == AFTER or scatter:
        return Verdict(one, other, found, found.beyond_doubt(run.image), found.seeds < TELLING)
    return Verdict(one, other, found, _beyond_chance(found, run.image, _apart(one) + _apart(other)), few=False)


def undecided(run: Run, best: Conversion, others: Sequence[Conversion], moment: str) -> list[Conversion]:
    """Those of ``others`` whose error is not surely higher than that of ``best``."""
    verdicts = [(other, judge(run, best, other, moment)) for other in others if other is not best]
    return [other for other, verdict in verdicts if verdict is None or verdict.lower is not best]


def _apart(cell: Conversion) -> float:
    """Share of the test images on which a conversion's guess is not the untouched network's; infinite if unknown."""
    if cell.dense:
        return 0.0
    known = cell.agreement.values()
    return 1 - statistics.fmean(known) / 100 if known else math.inf


def _beyond_chance(found: Difference, image: float, apart: float) -> bool:
    """Whether two errors differ by more than two standard errors of the draw of test images, and more than one image.

    The variance of the difference is (d - difference^2) / images, where d is the share of images that only one of the
    two gets right. That is not known; it is at most the sum of the errors, the sum of the shares right, and ``apart``.
    """
    ours, theirs = found.ours / 100, found.theirs / 100
    most = min(ours + theirs, 2 - ours - theirs, apart)
    variance = max(most - (ours - theirs) ** 2, 0.0) * image / 100
    return bool(image) and abs(ours - theirs) > max(2 * math.sqrt(variance), image / 100 * (1 + 1e-6))
