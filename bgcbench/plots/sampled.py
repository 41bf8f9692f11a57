"""What the pictures of sampled convolutions share: rows by variant and input, their looks, exact values as lines."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from bgcbench.errors import UsageError
from bgcbench.plots.style import GREY, Look, label_of, look_of, title
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document, printable
from bgcbench.results.rows import SampledRow
from bgcbench.specs import LINEAR, VARIANTS
from bgcbench.theory.fits import EXACT
from bgcbench.theory.inputs import InputLaw

# By input: how a marker is filled, how lines are dashed, how much larger markers are.
INPUT_LOOKS: tuple[tuple[str, Any, float], ...] = (
    ("full", "-", 1.0),
    ("none", "--", 1.35),
    ("left", ":", 1.0),
    ("top", "-.", 1.0),
    ("right", (0, (8, 2)), 1.0),
    ("bottom", (0, (4, 1, 1, 1, 1, 1)), 1.0),
)
SMOOTH = 100  # points of a curve
ENTRIES = 24  # of a legend beside a picture


def finished(document: Document) -> list[SampledRow]:
    return [row for row in document.results if isinstance(row, SampledRow) and row.status == "ok"]


def by_groups(document: Document) -> list[SampledRow]:
    """The finished rows but those of a rank, which is no N."""
    return [row for row in finished(document) if row.params.rank is None]


def lossy(rows: Iterable[SampledRow]) -> list[SampledRow]:
    """Those with an error to take the logarithm of, as in :mod:`bgcbench.theory.fits`."""
    return [row for row in rows if row.params.groups > 1 and (row.relative_error or 0.0) > EXACT]


@dataclass(frozen=True)
class Series:
    """The rows of a variant on one input, ascending in N; place: of the input among all."""

    variant: str
    input: str
    place: int
    rows: list[SampledRow]

    @property
    def label(self) -> str:
        return f"{label_of(self.variant)}, {printable(self.input)}"

    def look(self, **more: Any) -> Look:
        """Markers of the variant on this input, but for what is given."""
        look = look_of(self.variant)
        fill, _, larger = INPUT_LOOKS[self.place % len(INPUT_LOOKS)]
        look |= {"markersize": larger * look["markersize"], "markeredgewidth": 1.0, "linestyle": "none"}
        return {**look, "fillstyle": fill, "markerfacecoloralt": "white", **more}

    def draw_exact(self, axes: Axes, x: Callable[[float], float], y: Callable[[float, float], float]) -> bool:
        """Exact values at x(N), y(N, relative error) as a thin line, a single one as a dash; False if none is known."""
        exact = self._exact()
        if exact:
            _, dashes, _ = INPUT_LOOKS[self.place % len(INPUT_LOOKS)]
            look: Look = {"color": look_of(self.variant)["color"], "linestyle": dashes, "linewidth": 0.9, "zorder": 2}
            look |= {"marker": "_" if len(exact) == 1 else "", "markersize": 14}
            label = f"_exact {self.variant}, {self.input}"
            axes.plot([x(n) for n in exact], [y(n, error) for n, error in exact.items()], label=label, **look)
        return bool(exact)

    def _exact(self) -> dict[float, float]:
        """Exact relative errors by N, between the smallest and the largest N.

        A curve through real N where the closed form is c (1 - 1/N), or c (1 - 2/N) for BGC, which has that on every
        input (theory.exchangeable); otherwise the values at the measured N.
        """
        known = {row.params.groups: row.exact_relative_error or 0.0 for row in self.rows}
        exact = {float(n): error for n, error in known.items() if error > EXACT}
        if len(exact) < 2 or self.variant not in LINEAR or not (self.variant == "bgc" or _white(self.input)):
            return exact
        kept = VARIANTS[self.variant].unknowns(1, 1)
        constant = statistics.fmean(error / (1 - kept / n) for n, error in exact.items())
        first, last = min(exact), max(exact)
        numbers = [first * (last / first) ** (i / (SMOOTH - 1)) for i in range(SMOOTH)]
        return {n: constant * (1 - kept / n) for n in numbers}


def series_of(rows: Iterable[SampledRow]) -> list[Series]:
    """Inputs in order of appearance, variants in the registered order."""
    names = list(dict.fromkeys(row.params.input for row in rows))
    found: dict[tuple[int, str], list[SampledRow]] = {}
    for row in sorted(rows, key=lambda row: row.params.groups):
        found.setdefault((names.index(row.params.input), row.params.variant), []).append(row)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], variant_place(item[0][1])))
    return [Series(variant, names[place], place, mine) for (place, variant), mine in ordered]


def in_short(rows: Iterable[SampledRow], looks: dict[str, Look]) -> dict[str, Look]:
    """``looks`` by series, or where they are too many for a legend those of the variants and of the inputs."""
    if len(looks) <= ENTRIES:
        return looks
    series = series_of(rows)
    inputs = {printable(one.input): one.look(color=GREY, marker="o") for one in series}
    return {label_of(one.variant): look_of(one.variant, linestyle="none") for one in series} | inputs


def _white(name: str) -> bool:
    try:
        return InputLaw.parse(name).is_white
    except UsageError:  # a law of a newer version
        return False


def sampled_title(panel: SubFigure, document: Document, what: str) -> None:
    """The convolutions and their number under ``what``."""
    p = finished(document)[0].params
    size = f"length {p.length}" if p.dims == 1 else f"{p.length} x {p.length} px"
    stride = f", stride {p.stride}" if p.stride != 1 else ""
    channels = f"{p.dims}-D convolutions, {p.in_channels} to {p.out_channels} channels, k = {p.kernel}"
    title(panel, document, what, f"{channels}{stride}, {size}; S = {p.samples}")


def notes_of(rows: Sequence[SampledRow]) -> list[str]:
    """What markers and thin lines are, how far apart they have to be, and which rows have no logarithm."""
    drawn = lossy(rows)
    exact = [row for row in drawn if row.exact_relative_error is not None]
    lowest = 1 - min(row.in_sample_factor or 1.0 for row in exact or drawn)
    below = f", which is lower by up to {100 * lowest:.2g} %" if lowest > 0.001 else ""
    notes = [f"Markers: measured, least squares within the sample{below}.", "Thin lines: exact." if exact else ""]
    gone = dict.fromkeys(label_of(row.params.variant, row.params.groups) for row in rows if row not in drawn)
    return [*notes, f"Not drawn, because nothing is lost: {', '.join(gone)}." if gone else ""]
