"""What a ``transfer`` document shows, in plain words: which variant is better for what, and what a start is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bgcbench.measure.statistics import Ratio
from bgcbench.report import ratio_text
from bgcbench.report.errors import TELLING, Cell, spread_text, synthetic
from bgcbench.report.transfer_cells import (
    AFTER,
    ALIKE,
    BEFORE,
    PAIRINGS,
    Conversion,
    Run,
    Start,
    Verdict,
    at_equal_n,
    at_equal_size,
    judge,
    means,
    speed_up,
    times,
    undecided,
    whatever_start,
)

NEAR = 1.0  # points above the untouched network that count as near it
NAMED = 4  # of layers, rows or cells that a line names
PHASES = {"fwd": "inference", "train_step": "a training step"}


def findings(run: Run) -> list[str]:
    """What there is to say of errors, cost and time; nothing of errors where images mean nothing."""
    if synthetic(run.rows):
        return [*_costs(run), *_times(run)]
    return [*_near(run), *_beside(run), *_of_all(run), *_costs(run), *_times(run), *_longer(run)]


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """The names, or so many of them and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def joined(texts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)


def loss_text(share: float | None) -> str:
    """A share as percent: 31, 3.1, 0.3, <0.1, 0."""
    if share is None:
        return "-"
    percent = 100 * share
    if 1e-9 < percent < 0.05:
        return "<0.1"
    return f"{percent:.1f}" if 1e-9 < percent < 9.95 else f"{percent:.0f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _numbers(cells: Iterable[Cell]) -> list[int]:
    return sorted({cell.groups for cell in cells})


def _told(run: Run, start: Start) -> list[str]:
    """The moments at which errors of a start say something: two untrained networks do not."""
    return [moment for moment in run.moments if moment == AFTER or start[0] != "scratch"]


# --------------------------------------------------------------------------------------------------------------- errors


def _near(run: Run) -> list[str]:
    """Which conversions can be used as they are."""
    untouched, tried = run.untouched, means(run.converted, BEFORE)
    if untouched is None or not tried:
        return []
    as_it_was = f"of the untouched network ({untouched:.2f} %)"
    near: dict[tuple[Start, str], list[int]] = {}
    for cell in sorted(tried, key=lambda cell: run.starts.index(cell.start)):
        if tried[cell] <= untouched + NEAR + 1e-9:
            near.setdefault((cell.start, cell.label), []).append(cell.groups)
    if not near:
        best = min(tried, key=lambda cell: tried[cell])
        nearest = f"the nearest is {run.named(best)} ({tried[best]:.2f} %)"
        return [f"Without any training no conversion comes within {NEAR:g} point {as_it_was}; {nearest}"]
    several = len(run.starts) > 1
    texts = [
        f"{label}{f' {run.start(start)}' if several else ''} N={', '.join(map(str, groups))}"
        for (start, label), groups in near.items()
    ]
    return [f"Without any training, within {NEAR:g} point {as_it_was}: {'; '.join(texts)}"]


def _beside(run: Run) -> list[str]:
    """BGC and GC, at every start and moment: which has the lower error where."""
    lines = []
    for start in run.starts:
        for pairing, pairs_of, place in PAIRINGS:
            for moment in _told(run, start):
                verdicts = [found for pair in pairs_of(run, start) if (found := judge(run, *pair, moment))]
                if verdicts:
                    heading = _capital(f"{run.which(start)}{pairing}, {run.when(moment)}")
                    lines.append(f"{heading} (BGC / GC): {_sorted_out(verdicts, place)}")
    return lines


def _sorted_out(verdicts: Sequence[Verdict], place: Callable[[Conversion, Conversion], str]) -> str:
    """Where each of the two has the lower error, where that cannot be told, and where there are too few seeds."""
    kinds: dict[str, list[str]] = {}
    for verdict in sorted(verdicts, key=lambda v: (v.few, v.lower is None, v.lower is not v.one)):
        kind = "too few seeds to tell at" if verdict.few else "nothing can be told at"
        if verdict.lower is not None:
            kind = f"{verdict.lower.label} has the lower error at"
        found = verdict.difference
        text = f"{place(verdict.one, verdict.other)} ({found.ours:.2f} / {found.theirs:.2f} %)"
        kinds.setdefault(kind, []).append(text)
    return "; ".join(f"{kind} {joined(places)}" for kind, places in kinds.items())


def _of_all(run: Run) -> list[str]:
    """The lowest error at each N, where there is more than GC and BGC."""
    lines = []
    for start in run.starts:
        cells = [cell for cell in run.converted if cell.start == start]
        if {cell.variant for cell in cells} <= {"gc", "bgc"}:
            continue
        for moment in _told(run, start):
            texts = [_lowest(run, [c for c in cells if c.groups == n], moment) for n in _numbers(cells)]
            if any(texts):
                heading = f"Lowest of all variants at one N, {run.which(start)}{run.when(moment)}"
                lines.append(f"{heading}: {'; '.join(filter(None, texts))}")
    return lines


def _lowest(run: Run, cells: Sequence[Conversion], moment: str) -> str:
    errors = means(cells, moment)
    if len(errors) < 2:
        return ""
    ranked = sorted(errors, key=lambda cell: errors[cell])
    others = undecided(run, ranked[0], ranked, moment)
    text = f"N={ranked[0].groups} {ranked[0].label} ({errors[ranked[0]]:.2f} %)"
    return text + (f", not told from {joined([cell.label for cell in others])}" if others else "")


def _longer(run: Run) -> list[str]:
    """Whether what ends below the untouched network owes that to the conversion or to more training."""
    untouched = run.untouched
    if untouched is None or not run.epochs:
        return []
    after = means(run.converted, AFTER)
    below = {cell: f"{run.named(cell)} ({after[cell]:.2f} %)" for cell in after if after[cell] < untouched - 1e-9}
    line = f"The untouched network has {untouched:.2f} %"
    if run.standard is None or not run.control:
        judged = (
            f"{line}. Below that, {run.when(AFTER)}: {listed([*below.values()])}; but it was not trained any further "
            "itself, so whether the conversion or the training did that cannot be judged: --control trains it as long"
        )
        return [judged] if below else []
    line += f", and {spread_text(run.control)} % when it is trained as long (the control)"
    kinds: dict[str, list[str]] = {}
    for cell, text in below.items():
        verdict = judge(run, cell, run.standard, AFTER)
        if verdict is None or verdict.few:
            kind = "too few seeds to tell from the control"
        elif verdict.lower is None:
            kind = "not told from the control, so no better than more training alone"
        else:
            kind = (
                "below the control too"
                if verdict.lower is cell
                else "above the control: more training alone gains more"
            )
        kinds.setdefault(kind, []).append(text)
    if kinds:
        line += ". Of those that end below the untouched one: "
    return [line + "; ".join(f"{listed(texts)}: {kind}" for kind, texts in kinds.items())]


# -------------------------------------------------------------------------------------------------------- cost and time


def _costs(run: Run) -> list[str]:
    """Parameters and multiply-adds at equal N, and multiply-adds at equal parameters."""
    pairs = whatever_start(run, at_equal_n)
    params = [factor for pair in pairs if (factor := times(*pair, "params"))]
    macs = [factor for pair in pairs if (factor := times(*pair, "macs"))]
    if not params:
        return []
    line = f"At equal N BGC has {_range(params)} times GC's parameters and {_range(macs)} times its multiply-adds"
    equal = [factor for pair in whatever_start(run, at_equal_size) if (factor := times(*pair, "macs"))]
    if equal:
        alike = max(abs(factor - 1) for factor in equal) <= ALIKE
        line += f"; at equal parameters {'as many' if alike else _range(equal) + ' times the'} multiply-adds"
    return [line]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _times(run: Run) -> list[str]:
    """BGC and GC, in every phase that was timed: which is faster where."""
    lines = []
    for phase in run.phases:
        for pairing, pairs_of, place in PAIRINGS:
            kinds: dict[str, list[str]] = {}
            for pair in whatever_start(run, pairs_of):
                ratio = speed_up(run, *pair, phase)
                if ratio is not None:
                    kind, factor = _faster(ratio, pair[1])
                    kinds.setdefault(kind, []).append(place(*pair) + factor)
            if kinds:
                text = "; ".join(f"{kind} at {joined(places)}" for kind, places in sorted(kinds.items()))
                lines.append(f"{_capital(pairing)}, {PHASES.get(phase, phase)}: {text}")
    return lines


def _faster(ratio: Ratio, other: Conversion) -> tuple[str, str]:
    """What the time of ``other`` over that of BGC says, and how much."""
    if not ratio.is_significant:
        return "not told apart" if ratio.ci95 else "too few measurements", ""
    factor = f" ({ratio_text(max(ratio.value, 1 / ratio.value))}x)"
    return f"{'BGC' if ratio.value > 1 else other.label} is faster", factor


# ------------------------------------------------------------------------------------------------ what starts are worth


def starts_worth(run: Run) -> list[str]:
    """The starts of each variant and N beside each other, and what the layers lose with each."""
    if synthetic(run.rows):
        return []
    lines = []
    for moment in run.moments:
        for variant in dict.fromkeys(cell.variant for cell in run.converted):
            mine = [cell for cell in run.converted if cell.variant == variant]
            for n in _numbers(mine):
                lines += _worth(run, means([cell for cell in mine if cell.groups == n], moment), moment)
    return lines + _layers(run)


def _worth(run: Run, errors: dict[Conversion, float], moment: str) -> list[str]:
    """The starts of one variant and N at one moment, and what the best of them wins back."""
    if len(errors) < 2:
        return []
    best = min(errors, key=lambda cell: errors[cell])
    texts = ", ".join(f"{run.start(cell.start)} {error:.2f} %" for cell, error in errors.items())
    line = f"{best.name}, {run.when(moment)}: {texts}"
    if others := undecided(run, best, list(errors), moment):
        few = moment == AFTER and max(len(cell.errors(AFTER)) for cell in errors) < TELLING
        if few:
            return [f"{line}; too few seeds to tell"]
        return [f"{line}; not told apart: {joined([run.start(cell.start) for cell in (best, *others)])}"]
    copied = next((cell for cell in errors if cell.init == "copy"), best)
    lost = errors[copied] - (run.untouched if run.untouched is not None else errors[copied])
    if moment == BEFORE and copied is not best and lost > 0:
        back = errors[copied] - errors[best]
        part = f"{back:.2f} of the" if back < lost else "all"
        return [
            f"{line}; {run.start(best.start)} wins back {part} {lost:.2f} points lost when {run.start(copied.start)}"
        ]
    return [f"{line}; {run.start(best.start)} is lowest"]


def _layers(run: Run) -> list[str]:
    """What the layers lose with the three sets of weights that a calibration compares; batch norm hardly enters."""
    lines = []
    for start in [start for start in run.starts if start[0] == "calibrated"][-1:]:
        by_label: dict[str, list[str]] = {}
        for cell in run.converted:
            if cell.start == start and cell.layers:
                shares = [loss_text(cell.lost(name)) for name in ("copied", "before", "after")]
                by_label.setdefault(cell.label, []).append(f"N={cell.groups} {' / '.join(shares)}")
        lines += [
            f"{label}, share of a layer's output that is lost (%, median of the layers), copied / white / calibrated: "
            + ", ".join(texts)
            for label, texts in by_label.items()
        ]
    return lines
