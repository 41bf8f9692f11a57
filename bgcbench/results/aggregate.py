"""What tables and pictures compute over several rows: means over seeds, pairs of variants, differences. Numbers only.

A cell holds the rows that differ in nothing but their seed. BGC is compared with GC in two ways: at equal N, and at
equal parameters, which BGC at 2N and GC at N have.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from bgcbench.measure.statistics import Interval, Ratio
from bgcbench.results.document import Document
from bgcbench.results.rows import CalibratedLayer, Calibration, CellKey, Counts, SampledRow, TrainRow, TransferRow
from bgcbench.results.rows import Ratio as TimeRatio
from bgcbench.specs import NETWORK_PHASES, PLAN, SOLVED, VARIANTS
from bgcbench.theory.pareto import front, uncertainty

SYNTHETIC, NO_IMAGES = "synthetic", "none"  # data sets: of labels that mean nothing; of no images at all
INITS = ("none", "copy", "white", *SOLVED, "scratch")  # in the order of tables; the untouched network has 'none'
MIN_SEEDS = 3  # fewer seeds make no difference significant
EQUAL = 0.02  # two counts that differ by no larger share are equal

T = TypeVar("T")
Row = TypeVar("Row", bound=TrainRow)
BySeed = dict[int, float]
Moment = Literal["initial", "final"]  # before any training, after the last epoch


# ---------------------------------------------------------------------------------------------------- over the seeds


class Spread(NamedTuple):
    """Mean and sample standard deviation of ``n`` values; ``sd`` is None for a single one."""

    mean: float
    sd: float | None
    n: int


def spread_of(values: Iterable[float]) -> Spread | None:
    """The spread of ``values``; None where there are none."""
    known = list(values)
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


class Start(NamedTuple):
    """What a network begins with: its weights, and whether batch norm's statistics were re-estimated."""

    init: str
    rebn: bool

    @property
    def place(self) -> tuple[int, bool]:
        """Sorts as tables do; initialisations of a newer version come last."""
        return INITS.index(self.init) if self.init in INITS else len(INITS), self.rebn


@dataclass(frozen=True, eq=False)
class Cell:
    """One variant at one N, or of one rank, from one start: a row a seed. Errors are in percent."""

    variant: str
    groups: int
    rank: int | None
    start: Start
    rows: tuple[TrainRow, ...]

    @property
    def asked(self) -> CellKey:
        return self.variant, self.groups, self.rank

    @property
    def dense(self) -> bool:
        return self.variant == "standard"

    @property
    def planned(self) -> bool:
        """Whether a plan says what each convolution becomes: there is no N or rank to compare it at."""
        return self.variant == PLAN

    @property
    def done(self) -> list[TrainRow]:
        return [row for row in self.rows if row.status == "ok"]

    @property
    def conversions(self) -> list[TransferRow]:
        """The rows of ``transfer``."""
        return [row for row in self.rows if isinstance(row, TransferRow)]

    @property
    def untrained(self) -> bool:
        """Whether this is the untouched network and no control, which has no seeds."""
        return self.dense and not any(row.params.epochs for row in self.rows)

    def known(self, value: Callable[[TrainRow], float | None]) -> BySeed:
        """``value`` of all rows that have it, however they ended; nothing where labels mean nothing."""
        return _by_seed(self.rows, value)

    def by_seed(self, value: Callable[[TrainRow], float | None]) -> BySeed:
        """The same of the finished rows."""
        return _by_seed(self.done, value)

    @property
    def errors(self) -> BySeed:
        """Errors after the last epoch, of the finished trainings."""
        return self.by_seed(lambda row: row.error_final)

    def errors_at(self, moment: Moment) -> BySeed:
        """Initial errors of all conversions that were evaluated, or final ones of all trainings that have ended."""
        return self.errors if moment == "final" else self.known(lambda row: row.error_initial)

    @property
    def agreement(self) -> BySeed:
        """Percent of the test images to which it gives the untouched network's class."""
        return _by_seed(self.conversions, lambda row: row.agreement_initial)

    @property
    def agreement_trained(self) -> BySeed:
        """The same after training, where images have no labels."""
        return _by_seed(self.conversions, lambda row: row.agreement_final)

    def _count(self, value: Callable[[Counts], float]) -> float | None:
        """A count, the mean where seeds differ."""
        known = [value(row.counts) for row in self.rows if row.counts]
        return statistics.fmean(known) if known else None

    @property
    def params(self) -> float | None:
        return self._count(lambda counts: counts.params)

    @property
    def macs(self) -> float | None:
        return self._count(lambda counts: counts.macs)

    @property
    def params_training(self) -> float | None:
        """Parameters of what was trained, which differ from those that are deployed where a layer is masked."""
        return self._count(lambda counts: counts.params_training or counts.params)

    @property
    def images_per_s(self) -> float | None:
        """Median over the seeds."""
        return median_of(row.images_per_s for row in self.rows)

    @property
    def matmul_fraction(self) -> float | None:
        """Median over the seeds."""
        return median_of(row.matmul_fraction for row in self.rows)

    @property
    def paper_error(self) -> float | None:
        """What the paper prints, where it does."""
        return next((row.paper.error for row in self.rows if row.paper), None)

    @property
    def indivisible(self) -> list[str]:
        """Convolutions that stayed dense only because N does not divide their channels."""
        return next((row.convert.indivisible for row in self.rows if row.convert), [])

    @property
    def calibrations(self) -> list[Calibration]:
        return [row.convert.calibration for row in self.rows if row.convert and row.convert.calibration]

    @property
    def layers(self) -> list[CalibratedLayer]:
        """What the calibrations of all seeds say of each layer."""
        return [layer for calibration in self.calibrations for layer in calibration.layers]

    def lost(self, weights: Callable[[CalibratedLayer], float | None]) -> float | None:
        """Median over the layers of the share of their output that is lost with those ``weights``."""
        return median_of(map(weights, self.layers))

    @property
    def white_losses(self) -> dict[str, float]:
        """What each layer loses on white input by the closed form."""
        every = [row.white_loss.layers for row in self.conversions if row.white_loss]
        return {layer.name: layer.loss for layer in next(filter(None, every), ())}

    @property
    def worst_layer(self) -> str | None:
        """The layer that loses most on white input."""
        return max(self.white_losses, key=self.white_losses.__getitem__, default=None)

    @property
    def expected_loss(self) -> float | None:
        """What a layer whose kernel has independent entries loses on white input."""
        every = [row.white_loss.expected for row in self.conversions if row.white_loss]
        return next((expected for expected in every if expected is not None), None)

    def time(self, phase: str) -> TimeRatio | None:
        found = [row.time.phase.get(phase) for row in self.conversions if row.time]
        return next(filter(None, found), None)


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def training_cells(rows: Iterable[TrainRow]) -> list[Cell]:
    """Rows of ``train`` or ``transfer`` as cells: the standard convolution, by N, start and variant, and by rank."""
    found: dict[tuple[str, int, int | None, Start], list[TrainRow]] = {}
    for row in rows:
        found.setdefault((*row.params.cell, Start(row.params.init, row.params.rebn)), []).append(row)
    cells = [Cell(*at, tuple(mine)) for at, mine in found.items()]
    return sorted(cells, key=lambda c: (not c.dense, c.rank or 0, c.groups, c.start.place, variant_place(c.variant)))


def _by_seed(rows: Iterable[Row], value: Callable[[Row], float | None]) -> BySeed:
    real = [row for row in rows if row.params.dataset != SYNTHETIC]
    return {row.params.seed: found for row in real if (found := value(row)) is not None}


def variant_place(variant: str) -> int:
    """Sorts as variants are registered; those of a newer version come last."""
    return list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)


def planned_seeds(document: Document) -> int:
    """Seeds that a cell was to have."""
    return len(document.config.get("seeds") or {row.params.seed for row in document.results})


def image_points(rows: Iterable[TrainRow]) -> float:
    """What one test image changes an error by (percentage points); 0 where that is not known."""
    images = next((row.test_images for row in rows if row.test_images), None)
    return 100 / images if images else 0.0


# --------------------------------------------------------------------------------------------------------------- pairs

Pair = tuple[T, T]  # BGC, and the GC that it is compared with


def at_equal_n(at: Mapping[tuple[str, int], T]) -> list[Pair[T]]:
    """BGC and GC of the same N, ascending, of what stands ``at`` (variant, N)."""
    return _pairs(at, 1)


def at_equal_params(at: Mapping[tuple[str, int], T]) -> list[Pair[T]]:
    """BGC at 2N and GC at N, ascending, of what stands ``at`` (variant, N)."""
    return _pairs(at, 2)


def _pairs(at: Mapping[tuple[str, int], T], times: int) -> list[Pair[T]]:
    dense = {1: at["standard", 1]} if ("standard", 1) in at else {}  # which a GC of one group is
    plain = dense | {groups: gc for (variant, groups), gc in at.items() if variant == "gc"}
    return [(at["bgc", times * n], plain[n]) for n in sorted(plain) if ("bgc", times * n) in at]


def ratio_of(ours: float | None, theirs: float | None) -> float | None:
    """ours / theirs; None where one is unknown or 0."""
    return ours / theirs if ours and theirs else None


# --------------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """Mean errors of two cells (percent) over ``seeds`` common ones; ``sd`` is that of the differences by seed."""

    ours: float
    theirs: float
    seeds: int
    sd: float | None

    @property
    def value(self) -> float:
        """ours - theirs in percentage points; what floating point makes of 0 is 0."""
        return round(self.ours - self.theirs, 9) + 0.0

    def significant(self, image: float) -> bool:
        """Whether the difference is more than two standard errors, and more than one test ``image`` (points)."""
        if self.sd is None or self.seeds < MIN_SEEDS:
            return False
        return abs(self.value) > max(2 * self.sd / math.sqrt(self.seeds), image * (1 + 1e-6))


def difference_of(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Errors by seed: of the seeds that both have if they are two or more, else of what each has."""
    common = sorted(ours.keys() & theirs.keys())
    sd = None
    if len(common) > 1:
        ours, theirs = {s: ours[s] for s in common}, {s: theirs[s] for s in common}
        sd = statistics.stdev([ours[s] - theirs[s] for s in common])
    if not ours or not theirs:
        return None
    return Difference(statistics.fmean(ours.values()), statistics.fmean(theirs.values()), len(common), sd)


class Verdict(NamedTuple):
    """Two conversions' errors at one moment. lower: the one with the lower error, None where the difference is not
    significant; too_few: seeds, so that nothing can be."""

    difference: Difference
    lower: Cell | None
    too_few: bool


# --------------------------------------------------------------------------------------------------- a run of transfer


@dataclass(frozen=True)
class Conversions:
    """A run of ``transfer`` as cells: the untouched network, then by N, start and variant, so that GC precedes BGC."""

    rows: tuple[TransferRow, ...]
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, document: Document) -> Conversions:
        return cls(document.results, tuple(training_cells(document.results)))

    @property
    def standard(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.dense), None)

    @property
    def converted(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.dense]

    @property
    def untouched(self) -> float | None:
        """Error of the network as it was, which all seeds have in common."""
        found = spread_of(self.standard.errors_at("initial").values()) if self.standard else None
        return found.mean if found else None

    @property
    def control(self) -> BySeed:
        """Errors of the untouched network trained for as long; empty without --control."""
        return self.standard.errors if self.standard else {}

    @property
    def epochs(self) -> int:
        """Of the trainings; 0 where nothing is trained."""
        return max((row.params.epochs for row in self.rows), default=0)

    @property
    def moments(self) -> tuple[Moment, ...]:
        return ("initial", "final") if self.epochs else ("initial",)

    @functools.cached_property
    def starts(self) -> list[Start]:
        return sorted({cell.start for cell in self.converted}, key=lambda start: start.place)

    @property
    def norms_differ(self) -> bool:
        """Whether batch norm was re-estimated in some conversions only."""
        return len({start.rebn for start in self.starts}) > 1

    @functools.cached_property
    def phases(self) -> list[str]:
        """What was timed."""
        return [phase for phase in NETWORK_PHASES if any(cell.time(phase) for cell in self.cells)]

    def at(self, start: Start) -> dict[tuple[str, int], Cell]:
        """The cells of a start, and the untouched network, by (variant, N); without those of a rank."""
        return {(c.variant, c.groups): c for c in self.cells if c.dense or (c.start == start and c.rank is None)}

    def at_equal_n(self, start: Start) -> list[Pair[Cell]]:
        return at_equal_n(self.at(start))

    def at_equal_params(self, start: Start) -> list[Pair[Cell]]:
        """Without those that differ in size after all, as where one N divides fewer convolutions than the other."""
        pairs = at_equal_params(self.at(start))
        return [(bgc, gc) for bgc, gc in pairs if abs((ratio_of(bgc.params, gc.params) or 1.0) - 1) <= EQUAL]

    def compare(self, one: Cell, other: Cell, moment: Moment) -> Verdict | None:
        """Which has the lower error; None where one of them has none.

        A training is held against the scatter of the seeds. A conversion's seed only draws the images that it is
        calibrated on: where there are few seeds, or all end alike, the test images are what chance is left in.
        """
        ours, theirs = one.errors_at(moment), other.errors_at(moment)
        if other.dense and moment == "initial" and theirs:
            theirs = dict.fromkeys(ours, statistics.fmean(theirs.values()))
        found = difference_of(ours, theirs)
        if found is None:
            return None
        image = image_points(self.rows)
        scatter = found.seeds >= MIN_SEEDS and any(len({*errors.values()}) > 1 for errors in (ours, theirs))
        by_seed = moment == "final" or scatter
        significant = found.significant(image) if by_seed else _beyond_chance(found, image, _apart(one) + _apart(other))
        lower = one if found.value < 0 else other
        return Verdict(found, lower if significant else None, by_seed and found.seeds < MIN_SEEDS)

    def speed_up(self, one: Cell, other: Cell, phase: str) -> Ratio | None:
        """Time of ``other`` over time of ``one``. The interval reaches from end to end of theirs: at least 95 %."""
        ours, theirs = (self._timed(cell).time(phase) for cell in (one, other))
        if ours is None or theirs is None:
            return None
        if ours.ratio and theirs.ratio:  # of the untouched network's time, round by round
            value, upper, lower = ours.ratio / theirs.ratio, ours.ratio_ci95, theirs.ratio_ci95
        else:
            value, upper, lower = theirs.median_s / ours.median_s, theirs.ci95_s, ours.ci95_s
        ends = Interval(upper[0] / lower[1], upper[1] / lower[0]) if upper and lower else None
        return Ratio(value, ends, paired=True)

    def _timed(self, cell: Cell) -> Cell:
        """The cell of this variant and N that was timed, whatever its start."""
        alike = (found for found in self.cells if found.asked == cell.asked)
        return next((found for found in alike if any(map(found.time, self.phases))), cell)


def _apart(cell: Cell) -> float:
    """Share of the test images that it classifies unlike the untouched network; infinite if unknown."""
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


# ---------------------------------------------------------------------------------------------- sampled convolutions


def front_of(rows: Sequence[SampledRow], cost: Callable[[Counts], float]) -> list[SampledRow]:
    """The finished rows on the Pareto front of lost output energy against ``cost``: of one input, in their order."""
    known = [(row, row.counts, row.output_relative_error) for row in rows if row.status == "ok"]
    points = [(row, cost(counts), error) for row, counts, error in known if counts and error is not None]
    chosen = front([at for _, at, _ in points], [e for *_, e in points], [lost_se(row) for row, *_ in points])
    return [row for (row, *_), on in zip(points, chosen, strict=True) if on]


def lost_se(row: SampledRow) -> float:
    """Standard error of the share of the output that a row loses (:func:`bgcbench.theory.pareto.uncertainty`)."""
    params = row.params
    share = (row.relative_error_se or 0.0) / row.relative_error if row.relative_error else 0.0
    values = params.samples * params.in_channels * params.length**params.dims
    return uncertainty(row.output_relative_error or 0.0, share, values)
