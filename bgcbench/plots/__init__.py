"""Figures from ``approx``, ``train`` and ``transfer`` documents. Only here is matplotlib imported, when one is drawn.

    figure1   log E against log(1 - 1/N), as Figure 1 of Lee, Park & Lee       sampled convolutions
    figure2   the error over (1 - 1/N)^p against N, as their Figure 2          sampled convolutions
    pareto    the share of the output that is lost against parameters and multiply-adds
    heatmap   the same by layer and N                                          a network's layers
    errors    the test error against N and against parameters                  trained networks
              before and after training against parameters                     converted networks
    curves    the test error by epoch                                          trained networks
    layers    what each layer loses with copied, white, calibrated weights     converted networks

A figure is a stack of parts, each with its own size in inches and small notes under it. Nothing of matplotlib's global
state is left changed, and the same document gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgcbench.errors import OutputError, UsageError
from bgcbench.results import Json, printable, write_atomically
from bgcbench.specs import VARIANTS, check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

# By command, in the order in which they stand in a figure of all.
PICTURES_OF = {
    "approx": ("figure1", "figure2", "pareto", "heatmap"),
    "train": ("errors", "curves"),
    "transfer": ("errors", "layers"),
}
PICTURES = tuple(dict.fromkeys(picture for pictures in PICTURES_OF.values() for picture in pictures))
# What a file's date and the drawing program's name would be written as; None leaves them out.
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
MISSING = "--plot needs matplotlib, which is not installed; pip install 'bgcbench[plot]'"

DPI = 150
WIDTH = 7.5  # inches; a README shows about 900 px of it
SMALL = 7.0  # points, as are all sizes of letters
GREY = "#666666"
WIDE = 10.0  # how often the least the largest error is from which on their axis is logarithmic
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "bgcbench",
    "text.parse_math": False,  # a folder's name may have $ in it
}

# ------------------------------------------------------------------------------------------------------------- files


def check_plot(path: Path, *, replace: bool) -> None:
    """Raise now what :func:`draw` would raise after everything is computed, but for a missing matplotlib.

    UsageError for a suffix that names no format, OutputError for a file that exists (unless ``replace``) and for a
    folder that cannot be written.
    """
    _metadata(path)
    try:
        if path.is_dir():
            raise OutputError(f"--plot {path} is a folder; name a file in it")
        if path.exists() and not replace:
            raise OutputError(f"--plot {path} exists; use --force to replace it, or another name")
        if path.parent.exists() and not path.parent.is_dir():
            raise OutputError(f"--plot {path} cannot be written: {path.parent} is no folder; choose one")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def draw(document: Json, path: Path, picture: str | None = None) -> None:
    """Draw ``picture`` (None: everything that fits the document) into ``path``, whole or not at all.

    The suffix decides the format. Raises UsageError as :func:`figure`, OutputError if the file cannot be written.
    """
    metadata = _metadata(path)
    drawn = figure(document, picture)
    image = io.BytesIO()
    with _style():
        drawn.savefig(image, format=path.suffix[1:].lower(), dpi=DPI, metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, image.getvalue())
    except OSError as error:
        raise _unwritable(path, error) from error


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in {', '.join(FORMATS)}; the ending decides the format")
    return FORMATS[path.suffix.lower()]


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"--plot {path} cannot be written ({error.strerror or error}); choose another folder")


# ------------------------------------------------------------------------------------------------------------ figures


@dataclass(frozen=True)
class Part:
    """One picture: its size (inches), what paints it, and what stands under it."""

    width: float
    height: float
    paint: Callable[[SubFigure], None]
    notes: Sequence[str]

    @property
    def footer(self) -> str:
        """The notes in lines as long as the picture is wide."""
        return "\n".join(line for note in self.notes for line in textwrap.wrap(note, int(19 * self.width)))

    @property
    def heights(self) -> tuple[float, float]:
        """Inches of the picture and of its notes."""
        return self.height, 0.135 * (self.footer.count("\n") + 1) + 0.1


class NothingToDraw(Exception):
    """What a picture needs and the document does not have."""


def figure(document: Json, picture: str | None = None) -> Figure:
    """``picture`` of an ``approx``, ``train`` or ``transfer`` document, or all that fit it in one figure.

    Raises UsageError if matplotlib is missing, if the picture is another command's, or if the document has no rows for
    it.
    """
    if picture is not None:
        check_choice("picture", picture, PICTURES)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(MISSING) from error
    parts = _parts(_printable(document), picture)
    heights = [height for part in parts for height in part.heights]
    with _style():
        size = max(part.width for part in parts), sum(heights)
        drawn = Figure(figsize=size, dpi=DPI, layout="constrained")
        layout: Any = drawn.get_layout_engine()
        layout.set(w_pad=0.06, h_pad=0.06)
        panels: list[SubFigure] = list(drawn.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        for part, panel, foot in zip(parts, panels[::2], panels[1::2], strict=True):
            part.paint(panel)
            foot.text(0.012, 1, part.footer, fontsize=SMALL, color=GREY, va="top", linespacing=1.25)
        _lay_out(drawn, layout, panels)
    return drawn


def _printable(value: Any) -> Any:
    """``value`` with every text in it fit to be drawn."""
    if isinstance(value, dict):
        return {name: _printable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _lay_out(drawn: Figure, layout: Any, panels: Sequence[SubFigure]) -> None:
    """Place everything once, to a millionth: the solver adds up in an order that differs from run to run."""
    layout.execute(drawn)
    drawn.set_layout_engine("none")
    for panel in panels:
        corners = panel.bbox_relative.get_points().round(6)
        panel.bbox_relative.set_points(corners)
    for axes in drawn.axes:
        place = axes.get_position(original=True)
        place.set_points(place.get_points().round(6))
        axes.set_position(place)


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's settings are, for as long as something is drawn."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update(STYLE)
        yield


def _parts(document: Json, picture: str | None) -> list[Part]:
    command = document["command"]
    if command not in PICTURES_OF:
        *others, last = (f"'{name}'" for name in PICTURES_OF)
        known = f"{', '.join(others)} and {last}"
        raise UsageError(f"--plot draws {known} results, and this is a '{command}' run; give another file")
    if picture is not None and picture not in PICTURES_OF[command]:
        has = ", ".join(PICTURES_OF[command])
        raise UsageError(f"{picture} is no picture of '{command}' results; they have {has}")
    from bgcbench.plots import approx, train, transfer

    module = {"approx": approx, "train": train, "transfer": transfer}[command]
    if picture is not None:
        try:
            return [module.MAKERS[picture](document)]
        except NothingToDraw as missing:
            raise UsageError(f"nothing to draw: {picture} needs {missing}") from missing
    parts = []
    for make in module.makers(document).values():
        with contextlib.suppress(NothingToDraw):
            parts.append(make(document))
    if not parts:
        raise UsageError(f"nothing to draw: {module.NOTHING}")
    return parts


# --------------------------------------------------------------------------------------------- what the pictures share


def groups_of(rows: Sequence[Json]) -> list[int]:
    return sorted({row["params"]["groups"] for row in rows})


def label_of(variant: str) -> str:
    return VARIANTS[variant].label if variant in VARIANTS else variant


def look_of(variant: str) -> dict[str, Any]:
    """How a variant's line and markers look in every picture of trained networks."""
    colour, marker, size = VARIANTS[variant].look
    return {"color": colour, "marker": marker, "markersize": size, "linewidth": 0.9, "zorder": 3 + 1 / size}


def state_of(document: Json) -> str:
    """What a title adds of a run that was quick or did not end."""
    quick = ", a quick run" if document.get("quality") == "quick" else ""
    return quick + ("" if document.get("complete", True) else ", not complete")


def legend(panel: SubFigure, handles: Sequence[Line2D], columns: int) -> None:
    """A legend below the axes, filled by columns."""
    panel.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL,
        numpoints=1,
        handlelength=1.6,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def legend_height(entries: int, columns: int) -> float:
    return 0.165 * math.ceil(entries / columns) + 0.1


def log_ticks(
    axis: Axis, values: Sequence[float], text: Callable[[float], str], steps: Sequence[float] | None = None
) -> None:
    """Ticks of a logarithmic ``axis`` at these ``steps`` of a decade; None: as many as ``values`` have room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if steps is None:
        decades = math.log10(max(values) / min(values))
        steps = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 4 else (1.0,)
    axis.set_major_locator(LogLocator(10, subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def scale_errors(axes: Axes, errors: Sequence[float], ends: Sequence[float] = ()) -> None:
    """The axis of ``errors`` (percent) and of what bars end at; logarithmic if errors span more than ``WIDE``."""
    low, high = min(errors), max([*errors, *ends])
    if low > 0 and max(errors) / low > WIDE:
        low = min([low, *(end for end in ends if end > low / 2)])
        axes.set_yscale("log")
        room = (high / low) ** 0.06
        axes.set_ylim(low / room, high * room)
        log_ticks(axes.yaxis, [low, high], lambda value: f"{value:g}")
    else:
        low = min([low, *ends])
        room = max(0.08 * (high - low), 0.02 * high, 0.05)
        axes.set_ylim(max(0.0, low - room), high + room)


def counted(value: float) -> str:
    """A count at a tick: 500, 20 k, 5 M."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"
