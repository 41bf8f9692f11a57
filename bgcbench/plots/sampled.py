"""What the pictures of sampled convolutions share: rows by variant and input, their looks, exact values as lines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bgcbench.errors import UsageError
from bgcbench.plots.style import label_of, look_of, title
from bgcbench.results.aggregate import variant_place
from bgcbench.results.document import Document
from bgcbench.results.rows import SampledRow
from bgcbench.theory.fits import EXACT
from bgcbench.theory.inputs import InputLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

At = tuple[str, str]  # variant, input
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


def finished(document: Document) -> list[SampledRow]:
    return [row for row in document.results if isinstance(row, SampledRow) and row.status == "ok"]


def lossy(rows: Iterable[SampledRow]) -> list[SampledRow]:
    """Those with an error to take the logarithm of, as in :mod:`bgcbench.theory.fits`."""
    return [row for row in rows if row.params.groups > 1 and (row.relative_error or 0.0) > EXACT]


def series_of(rows: Iterable[SampledRow]) -> dict[At, list[SampledRow]]:
    """Rows by (variant, input), ascending in N; inputs in order of appearance, variants in the registered order."""
    found: dict[At, list[SampledRow]] = {}
    for row in sorted(rows, key=lambda row: row.params.groups):
        found.setdefault((row.params.variant, row.params.input), []).append(row)
    names = inputs_of(rows)
    return dict(sorted(found.items(), key=lambda item: (names.index(item[0][1]), variant_place(item[0][0]))))


def inputs_of(rows: Iterable[SampledRow]) -> list[str]:
    return list(dict.fromkeys(row.params.input for row in rows))


def look_on(at: At, names: Sequence[str], **more: Any) -> dict[str, Any]:
    """Markers of a variant on one of the inputs ``names``, but for what is given."""
    look = look_of(at[0])
    fill, _, larger = INPUT_LOOKS[names.index(at[1]) % len(INPUT_LOOKS)]
    look |= {"markersize": larger * look["markersize"], "markeredgewidth": 1.0, "linestyle": "none"}
    return {**look, "fillstyle": fill, "markerfacecoloralt": "white", **more}


def exact_line(axes: Axes, x: Sequence[float], y: Sequence[float], at: At, names: Sequence[str]) -> None:
    """Exact values as a thin line; a single one as a dash."""
    dashes = INPUT_LOOKS[names.index(at[1]) % len(INPUT_LOOKS)][1]
    look = {"color": look_of(at[0])["color"], "linewidth": 0.9, "marker": "_" if len(x) == 1 else "", "markersize": 14}
    axes.plot(x, y, label=f"_exact {at[0]}, {at[1]}", linestyle=dashes, zorder=2, **look)


def exact_curve(at: At, rows: Iterable[SampledRow]) -> tuple[list[float], list[float]]:
    """(N, exact relative error) between the smallest and the largest N of ``rows``; empty where none is known.

    A curve through real N where the closed form is c (1 - 1/N), or c (1 - 2/N) for BGC, which has that on every input
    (theory.exchangeable); otherwise the values at the measured N.
    """
    known = {row.params.groups: row.exact_relative_error for row in rows if (row.exact_relative_error or 0.0) > EXACT}
    exact = {float(n): error for n, error in known.items() if error is not None}
    kept = {"gc": 1, "shuffle": 1, "bgc": 2}.get(at[0])
    if len(exact) < 2 or kept is None or not (at[0] == "bgc" or _white(at[1])):
        return list(exact), list(exact.values())
    constant = statistics.fmean(error / (1 - kept / n) for n, error in exact.items())
    first, last = min(exact), max(exact)
    numbers = [first * (last / first) ** (i / (SMOOTH - 1)) for i in range(SMOOTH)]
    return numbers, [constant * (1 - kept / n) for n in numbers]


def _white(name: str) -> bool:
    """Whether the law's values are uncorrelated and have mean 0."""
    try:
        law = InputLaw.parse(name)
    except UsageError:  # a law of a newer version
        return False
    return law.mean == 0 and law.correlation == 0


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


def at_log_share(groups: float) -> float:
    return math.log(1 - 1 / groups)
