"""Which pictures a command's results have, and a figure of one or of all that fit a document."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from bgcbench.errors import UsageError
from bgcbench.plots import (
    conversions,
    curves,
    errors,
    figure1,
    figure2,
    heatmap,
    layers,
    pareto,
    plan,
    speedups,
    times,
    tradeoff,
)
from bgcbench.plots.inline import inline_svg
from bgcbench.plots.style import DPI, MARKED, SLIDE, NothingToDraw, Paint, styled
from bgcbench.results.document import Document
from bgcbench.specs import check_choice

# By command, in the order in which they stand in a figure of all.
PICTURES_OF: dict[str, dict[str, Callable[[Document], Paint]]] = {
    "profile": {"speedups": speedups.part, "cost": times.part},
    "approx": {"figure1": figure1.part, "figure2": figure2.part, "pareto": pareto.part, "heatmap": heatmap.part},
    "plan": {"plans": plan.curve, "cost": plan.cost, "tradeoff": tradeoff.of_plan},
    "train": {"errors": errors.part, "curves": curves.part},
    "transfer": {"errors": conversions.part, "layers": layers.part, "tradeoff": tradeoff.of_transfer},
}
PICTURES = tuple(dict.fromkeys(picture for pictures in PICTURES_OF.values() for picture in pictures))
NOTHING = {
    "profile": "the result has no row with an interval beside the standard convolution's",
    "approx": "the result has no finished row with an error above 0; run approx first",
    "plan": "the result has no plan yet; resume it",
    "train": "the result has no test error, which only finished trainings on real images have",
    "transfer": "the result has neither the test error of a conversion, which takes real images, nor a calibration",
}


def figure(document: Document, picture: str | None = None) -> Figure:
    """``picture`` of the document, or all that fit it; raises UsageError where it has none."""
    if picture is not None:
        check_choice("picture", picture, PICTURES)
    pictures = PICTURES_OF[document.command]
    if picture is None:
        return _composed(_fitting(document))
    if picture not in pictures:
        has = ", ".join(pictures)
        raise UsageError(f"{picture} is no picture of '{document.command}' results; they have {has}")
    try:
        return _composed([pictures[picture](document)])
    except NothingToDraw as missing:
        raise UsageError(f"nothing to draw: {picture} needs {missing}") from missing


def inline_pictures(document: Document, prefix: str, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, ``<svg>`` element) of each picture that fits the document; ``prefix`` begins their ids."""
    drawn = []
    for name, part_of in PICTURES_OF.get(document.command, {}).items():
        with contextlib.suppress(NothingToDraw):
            drawn.append((name, inline_svg(_composed([part_of(document)]), f"{prefix}-{name}", metadata)))
    return drawn


def _fitting(document: Document) -> list[Paint]:
    parts = []
    for part_of in PICTURES_OF[document.command].values():
        with contextlib.suppress(NothingToDraw):
            parts.append(part_of(document))
    if not parts:
        raise UsageError(f"nothing to draw: {NOTHING[document.command]}")
    return parts


def _composed(paints: Sequence[Paint]) -> Figure:
    """The pictures, one below the other, each as large as a slide."""
    width, height = SLIDE
    with styled():
        drawn = Figure(figsize=(width, height * len(paints)), dpi=DPI, layout="constrained")
        panels = drawn.subfigures(len(paints), 1, squeeze=False)
        for paint, panel in zip(paints, panels.flat, strict=True):
            paint(panel)
        lay_out(drawn)
    return drawn


def lay_out(drawn: Figure) -> None:
    """Place everything once, to a millionth: the solver adds up in an order that differs from run to run.

    Names of points move to a corner where they touch no point and no earlier name. Those that find none are hidden.
    """
    layout: Any = drawn.get_layout_engine()
    layout.execute(drawn)
    drawn.set_layout_engine("none")
    for axes in drawn.axes:
        place = axes.get_position(original=True)
        place.set_points(place.get_points().round(6))
        axes.set_position(place)
        points, names = _points(axes), list[Any]()
        texts: list[Any] = [text for text in axes.texts if isinstance(text, Annotation)]
        for text in texts:
            here = (*text.xyann, text.get_ha())
            for dx, dy, side in MARKED if here == MARKED[0] else [here]:
                text.xyann = dx, dy
                text.set(ha=side)
                box = text.get_window_extent()
                text.set_visible(not any(map(box.overlaps, names + points * (here == MARKED[0]))))
                if text.get_visible():
                    names.append(box)
                    break


def _points(axes: Axes) -> list[Bbox]:
    """Where the markers and the caps of error bars are, in pixels."""
    found = []
    for line in [line for line in axes.get_lines() if line.get_marker() not in ("", "None", None)]:
        half = line.get_markersize() * DPI / 144
        for x, y in axes.transData.transform(line.get_xydata()):
            found.append(Bbox([[x - half, y - half], [x + half, y + half]]))
    return found
