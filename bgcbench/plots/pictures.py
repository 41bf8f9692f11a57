"""Which pictures a command's results have, and a figure of one or of all that fit a document."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from bgcbench.errors import UsageError
from bgcbench.plots.inline import inline_svg
from bgcbench.plots.style import DPI, MARKED, SLIDE, NothingToDraw, Paint, styled
from bgcbench.results.document import Document
from bgcbench.results.rows import COMMANDS
from bgcbench.specs import check_choice, load


def figure(document: Document, picture: str | None = None) -> Figure:
    """``picture`` of the document, or all that fit it; raises UsageError where it has none."""
    of = COMMANDS[document.command]
    if picture is None:
        parts = _fitting(document)
        if not parts:
            raise UsageError(f"nothing to draw: {of.nothing}")
        return _composed(list(parts.values()))
    check_choice("picture", picture, dict.fromkeys(name for each in COMMANDS.values() for name in each.pictures))
    if picture not in of.pictures:
        has = ", ".join(of.pictures) or "none"
        raise UsageError(f"{picture} is no picture of '{document.command}' results; they have {has}")
    try:
        return _composed([load(of.pictures[picture])(document)])
    except NothingToDraw as missing:
        raise UsageError(f"nothing to draw: {picture} needs {missing}") from missing


def inline_pictures(document: Document, prefix: str, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, ``<svg>`` element) of each picture that fits the document; ``prefix`` begins their ids."""
    parts = _fitting(document)
    return [(name, inline_svg(_composed([part]), f"{prefix}-{name}", metadata)) for name, part in parts.items()]


def _fitting(document: Document) -> dict[str, Paint]:
    """What paints each picture that there is something for, by its name."""
    parts = {}
    for name, place in COMMANDS[document.command].pictures.items():
        with contextlib.suppress(NothingToDraw):
            parts[name] = load(place)(document)
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
