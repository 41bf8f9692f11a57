"""Documents as pictures get them, and what is looked for in a picture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'plot'")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from bgcbench import plots
from bgcbench.plots import pictures
from bgcbench.results.document import document_of

Json = dict[str, Any]


def figure_of(document: Json, picture: str | None = None, *, placed: bool = False) -> Figure:
    """A figure as :func:`plots.figure` makes it; where data is looked at not ``placed``, which takes the time."""
    with pytest.MonkeyPatch.context() as patch:
        if not placed:
            patch.setattr(pictures, "lay_out", lambda figure: None)
        return plots.figure(document_of(document, "r.json"), picture)


@functools.cache
def shared_figure(make: Callable[..., Json], picture: str | None = None, **options: Any) -> Figure:
    """The figure of ``make(**options)``, drawn once for all tests that only look at it."""
    return figure_of(make(**options), picture)


def draw(document: Json, path: Path, picture: str | None = None) -> None:
    plots.draw(document_of(document, "r.json"), path, picture)


def found(axes: Axes, label: str) -> Line2D:
    (line,) = all_found(axes, label)
    return line


def all_found(axes: Axes, label: str) -> list[Line2D]:
    return [line for line in axes.get_lines() if line.get_label() == label]


def lines(figure: Figure) -> dict[str, Line2D]:
    return {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in _legends(figure) for text in box.get_texts()]


def _legends(figure: Any) -> list[Any]:
    return [*figure.legends, *itertools.chain.from_iterable(_legends(below) for below in figure.subfigs)]


def texts(figure: Figure) -> list[str]:
    """Every text, each in one line."""
    return [" ".join(text.split()) for found in figure.findobj(Text) if (text := found.get_text())]


def assert_nothing_is_cut_off_or_lies_on_another(figure: Figure) -> None:
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        beyond = {id(tick.label1) for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
        shown = [text for text in shown if id(text) not in beyond]  # which is not drawn
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) > 4
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
    for (text, box), (other, there) in itertools.combinations(boxes, 2):
        across = min(box.x1, there.x1) - max(box.x0, there.x0)
        down = min(box.y1, there.y1) - max(box.y0, there.y0)
        assert min(across, down) < 2, (text, other)
