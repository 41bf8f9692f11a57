"""Two things compared, in a cell and in words; and ``bgcbench compare``."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from bgcbench.errors import UsageError
from bgcbench.measure.statistics import Ratio
from bgcbench.report.format import bounds_text, ratio_text, significant, time_unit
from bgcbench.report.table import Column, Report, Table, label, words
from bgcbench.results.document import Document
from bgcbench.results.rows import ProfileRow
from bgcbench.results.times import BUSY, ratio_between, time_ratio
from bgcbench.specs import FINGERPRINT_FIELDS, PHASE_TITLES


@dataclass(frozen=True)
class Comparison(Ratio):
    """How many times faster one thing is than another, the other's time over its own, in a cell and in words."""

    @classmethod
    def of(cls, ratio: Ratio) -> Comparison:
        return cls(ratio.value, ratio.ci95, ratio.paired)

    @property
    def faster(self) -> bool:
        """Whether the one is known to be faster: not by what may be chance, and from rounds enough to tell."""
        return self.value > 1 and self.is_significant is True

    @property
    def text(self) -> str:
        """ "2.00 [1.90, 2.10]", and "2.00 [?]" from too few rounds for an interval."""
        if self.ci95 is None:
            return f"{ratio_text(self.value)} [?]"
        return ratio_text(self.value) + bounds_text((self.ci95.low, self.ci95.high), ratio_text)

    @property
    def _bound(self) -> float:
        """How far from 1 the interval reaches."""
        return 0.0 if self.ci95 is None else max(abs(self.ci95.low - 1), abs(self.ci95.high - 1))

    def versus(self, other: str) -> str:
        """ "2.9x faster than standard (95% CI 2.8-3.0)" """
        if self.ci95 is None:
            return f"not compared with {other}: too few rounds for an interval"
        how = "faster" if self.value >= 1 else "slower"
        value = max(self.value, 1 / self.value)
        low, high = self.ci95.low, self.ci95.high
        apart = "" if self.paired else ", measured apart"
        if not self.is_significant and self._bound > 0.1:
            span = f"{ratio_text(low)}-{ratio_text(high)}"
            return f"not significantly different from {other} (95% CI of the speed-up {span}{apart})"
        if not self.is_significant:
            return f"as fast as {other}: no detectable difference (< {significant(100 * self._bound, 2)} %{apart})"
        if how == "slower":
            low, high = 1 / high, 1 / low
        digits = 2 if value < 1.95 or high - low < 0.1 else 1
        return f"{value:.{digits}f}x {how} than {other} (95% CI {low:.{digits}f}-{high:.{digits}f}{apart})"

    @property
    def change(self) -> str:
        """The ratio as that of the time after a change to the time before it."""
        if self.ci95 is None:
            return "not known: too few rounds for an interval"
        if not self.is_significant and self._bound > 0.1:
            return f"not significantly different (95% CI {self.ci95.low:.2f}-{self.ci95.high:.2f})"
        if not self.is_significant:
            return f"no detectable difference (< {significant(100 * self._bound, 2)} %)"
        return f"{self.value:.2f}x the time (95% CI {self.ci95.low:.2f}-{self.ci95.high:.2f})"


def speed_up(row: ProfileRow | None, other: ProfileRow | None, phase: str) -> Comparison | None:
    """Time of ``other`` over time of ``row``; None where one of them was not measured."""
    ratio = time_ratio(row, other, phase)
    return Comparison.of(ratio) if ratio else None


def ratio_record(compared: Ratio | None, name: str) -> dict[str, float | None]:
    """For a record: a ratio and its interval."""
    ends = compared.ci95 if compared else None
    return {
        name: compared.value if compared else None,
        f"{name}_low": ends.low if ends else None,
        f"{name}_high": ends.high if ends else None,
    }


# ----------------------------------------------------------------------------------------------------- two result files


@dataclass(frozen=True)
class Change:
    """A phase of a row in two files. ratio: the time after over the time before."""

    key: str
    phase: str
    before_s: float
    after_s: float
    ratio: Comparison
    slower: bool

    @property
    def verdict(self) -> str:
        return self.ratio.change + (" (over the limit)" if self.slower else "")

    @property
    def record(self) -> dict[str, object]:
        times = {"before_s": self.before_s, "after_s": self.after_s}
        return {"key": self.key, "phase": self.phase, **times, **ratio_record(self.ratio, "ratio"),
                "verdict": self.verdict}  # fmt: skip


def settings_that_differ(before: Document, after: Document) -> list[tuple[str, str, str]]:
    """(name, before, after) of every setting that makes two files' times different things."""
    names = ("precision", "layout", "mode", "runtime", "cache", "memory", "input_grad", "tf32", "cudnn_benchmark")
    pairs = [(name, getattr(before.settings, name), getattr(after.settings, name)) for name in names]
    pairs.append(("quality", before.quality, after.quality))

    def plain(value: object) -> str:
        return json.dumps(msgspec.to_builtins(value))

    return [(name, plain(one), plain(other)) for name, one, other in pairs if one != other]


ByName = dict[object, ProfileRow]
SET_BY_ROW = ("precision", "layout", "mode")  # settings that a row's key has


def _by_what_both_have(before: Document, after: Document) -> tuple[ByName, ByName]:
    """The rows by key; where a setting differs that keys have, by all the others: variant, N, shape."""
    differing = {name for name, *_ in settings_that_differ(before, after)} & set(SET_BY_ROW)

    def name_of(row: ProfileRow) -> object:
        if not differing:
            return row.key
        # 'auto' may have found another algorithm there; one that was asked for is part of what was measured.
        found = row.forms or row.params.algorithm in ("auto", "stock")
        algorithm = {"algorithm": "auto"} if found else {}
        return msgspec.structs.replace(row.params, **dict.fromkeys(differing, ""), **algorithm)

    one, other = ({name_of(row): row for row in document.results} for document in (before, after))
    return one, other


def environments_that_differ(before: Document, after: Document) -> list[str]:
    """What decides a measurement and is not the same: "torch was 2.6.0 and is 2.14.1"."""

    def flat(document: Document) -> dict[str, object]:
        found = msgspec.to_builtins(document.environment)
        fields = {name: found[name] for name in FINGERPRINT_FIELDS}
        return {
            f"{name} {part}" if part else name: value
            for name, whole in fields.items()
            for part, value in (whole.items() if isinstance(whole, dict) else [("", whole)])
        }

    one, other = flat(before), flat(after)
    return [f"{name} was {one[name]} and is {other.get(name)}" for name in one if one[name] != other.get(name)]


def _busy(document: Document) -> int:
    """How many rows shared the CPU with other processes."""
    return sum(
        any((phase.derived.contended_cores or 0.0) > BUSY for phase in row.phases.values()) for row in document.results
    )


def compare_report(
    before: Document, after: Document, names: tuple[str, str], limit: float | None
) -> tuple[Report, bool]:
    """Two profile documents row by row, and whether any is significantly slower by more than ``limit`` (a share)."""
    old, new = _by_what_both_have(before, after)
    gone = [
        f"{PHASE_TITLES[phase]} of {row.key}: {new[key].status if key in new else 'not in the file'}"
        for key, row in old.items()
        for phase in row.phases
        if key not in new or phase not in new[key].phases
    ]
    changes = [
        _change(old[key], row, phase, limit)
        for key, row in new.items()
        for phase in row.phases
        if key in old and phase in old[key].phases
    ]
    if not changes:
        raise UsageError(f"{names[0]} and {names[1]} have no measured row in common; compare runs of one workload")
    notes = [f"before: {names[0]}; after: {names[1]}"]
    if before.environment.fingerprint != after.environment.fingerprint:
        told = "; ".join(environments_that_differ(before, after)) or "their fingerprints differ"
        notes.append(f"warning: the two files come from different machines or software: {told}")
    if any(busy := (_busy(before), _busy(after))):
        notes.append(f"warning: other processes kept the CPU busy in {busy[0]} rows before and {busy[1]} after")
    differing = [f"{name} was {one} and is {other}" for name, one, other in settings_that_differ(before, after)]
    notes += [f"warning: {'; '.join(differing)}"] if differing else []
    added = sorted(row.key for key, row in new.items() if key not in old)
    notes += [f"new: {', '.join(added)}"] if added else []
    tripped = any(change.slower for change in changes) or (limit is not None and bool(gone))
    sections = {"Measured before and no longer": gone, "Notes": notes}
    table = Table(["bgcbench compare"], change_columns(changes), changes, sections)
    return Report([table], records=[change.record for change in changes]), tripped


def _change(before: ProfileRow, after: ProfileRow, phase: str, limit: float | None) -> Change:
    # Two files were never measured in one interleaved run, whatever their group numbers say.
    ratio = Comparison.of(ratio_between(after, before, phase, paired=False))
    slower = limit is not None and ratio.ci95 is not None and ratio.ci95.low > 1 + limit
    times = before.phases[phase].summary.median_s, after.phases[phase].summary.median_s
    return Change(after.key, phase, *times, ratio, slower)


def change_columns(changes: list[Change]) -> list[Column[Change]]:
    factor, unit = time_unit(max(change.before_s, change.after_s) for change in changes)

    def time(seconds: float) -> str:
        return significant(seconds * factor, 4)

    return [
        label("row", lambda c: c.key, "The row's key, the same in both files."),
        label("phase", lambda c: PHASE_TITLES[c.phase], "What was timed."),
        Column(f"before {unit}", lambda c: c.before_s, "Median in the first file.", time, "before"),
        Column(f"after {unit}", lambda c: c.after_s, "Median in the second file.", time, "after"),
        Column("difference", lambda c: f"{(c.after_s - c.before_s) * factor:+.3g}", "After less before."),
        words("verdict", lambda c: c.verdict, VERDICT),
    ]


VERDICT = (
    "Time after over time before, with the 95 % confidence interval of the ratio of medians; over the limit: the whole "
    "interval lies above 1 by more than --fail-on."
)
