"""What the networks of ``bgcbench transfer --time`` cost: measured in turn, each beside the standard one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from bgcbench.experiments import profile_run
from bgcbench.experiments.network import NetworkConfig
from bgcbench.experiments.network_run import plan_network
from bgcbench.measure.statistics import Series, ratio_of_medians
from bgcbench.results import Document, new_document
from bgcbench.results.rows import CellKey, NetworkTime, Phase, ProfileRow, Ratio

STANDARD: CellKey = ("standard", 1, None)
MEASURED_AS = {"fwd": "deployed", "train_step": "masked"}  # the algorithm, where a network is measured in both


@dataclass
class NetworkTimes:
    """The networks of ``config`` that belong to ``cells``, and the standard one; ``times`` are known after ``run``."""

    config: NetworkConfig
    cells: Iterable[CellKey]
    stop: Callable[[], bool]
    times: dict[CellKey, NetworkTime | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def run(self) -> Iterator[str]:
        """Measure, and say what is done at the moment; raises whatever keeps all of it from being measured."""
        planned = plan_network(self.config)
        session = profile_run.open_session(self.config)
        wanted = [row for row in planned.rows if row.params.cell in {*self.cells, STANDARD}]
        run = profile_run.ProfileRun(self.config, session, wanted, stop=self.stop)
        for update in run.run():
            yield update.doing
        if self.stop():
            return
        measured = new_document("profile", (), {}, session.environment, session.conditions, quick=self.config.quick)
        run.take_into(measured)
        failed = [row for row in measured.results if row.status != "ok"]
        self.warnings += measured.measurement_warnings
        self.warnings += [f"{row.params.choice.label} could not be measured: {row.reason}" for row in failed]
        self.times = {cell: network_time(measured, cell) for cell in self.cells}


def network_time(measured: Document, cell: CellKey) -> NetworkTime | None:
    """Median times of a network (seconds), and the standard network's over them; None where none was measured."""
    phases: dict[str, Ratio] = {}
    for phase, algorithm in MEASURED_AS.items():
        row = _measured(measured.results, cell, algorithm, phase)
        if row is not None:
            phases[phase] = _ratio(_measured(measured.results, STANDARD, algorithm, phase), row, phase)
    if not phases:
        return None
    params = measured.results[0].params
    return NetworkTime(
        phase=phases,
        batch=params.batch,
        precision=params.precision,
        layout=params.layout,
        mode=params.mode,
        memory=measured.settings.memory,
    )


def _measured(rows: Sequence[ProfileRow], cell: CellKey, algorithm: str, phase: str) -> ProfileRow | None:
    """The row of a cell with this phase: that of ``algorithm``, where it was measured in several."""
    found = [row for row in rows if row.params.cell == cell and phase in row.phases and phase not in row.failures]
    return next((row for row in found if row.params.algorithm == algorithm), found[0] if found else None)


def _ratio(standard: ProfileRow | None, row: ProfileRow, phase: str) -> Ratio:
    own = row.phases[phase]
    summary = own.summary
    times = Ratio(summary.median_s, summary.ci95_s, summary.n, None, None)
    if standard is None:
        return times
    paired = row.interleaved == standard.interleaved
    ratio = ratio_of_medians(_series(standard.phases[phase]), _series(own), paired=paired)
    bounds = None if ratio.ci95 is None else (ratio.ci95.low, ratio.ci95.high)
    return Ratio(summary.median_s, summary.ci95_s, summary.n, ratio.value, bounds)


def _series(phase: Phase) -> Series:
    return Series(phase.samples_s, phase.rounds)
