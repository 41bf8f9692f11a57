"""Pictures of ``approx``, ``train`` and ``transfer`` results. matplotlib is imported when one is drawn, and only here.

    figure1      log E against log(1 - 1/N), as Figure 1 of Lee, Park & Lee       sampled convolutions
    figure2      the error over (1 - 1/N)^p against N, as their Figure 2          sampled convolutions
    pareto       the share of the output that is lost against parameters and MACs
    heatmap      the same by layer and N                                          a network's layers
    errors       the test error against N and against parameters                  trained networks
                 before and after training against parameters                     converted networks
    curves       the test error by epoch                                          trained networks
    layers       what each layer loses with copied, white, calibrated weights     converted networks

Nothing of matplotlib's global state is left changed, and the same document gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgcbench.errors import OutputError, UsageError
from bgcbench.plots import conversions, curves, errors, figure1, figure2, heatmap, layers, pareto
from bgcbench.plots.style import DPI, WIDTH, NothingToDraw, Part, lay_out, styled
from bgcbench.results.document import Document
from bgcbench.results.files import write_atomically
from bgcbench.specs import check_choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By command, in the order in which they stand in a figure of all.
PICTURES_OF: dict[str, dict[str, Any]] = {
    "approx": {"figure1": figure1, "figure2": figure2, "pareto": pareto, "heatmap": heatmap},
    "train": {"errors": errors, "curves": curves},
    "transfer": {"errors": conversions, "layers": layers},
}
PICTURES = tuple(dict.fromkeys(picture for pictures in PICTURES_OF.values() for picture in pictures))
NOTHING = {
    "approx": "the result has no finished row with an error above 0; run approx first",
    "train": "the result has no test error, which only finished trainings on real images have",
    "transfer": "the result has neither the test error of a conversion, which takes real images, nor a calibration",
}
# By suffix, metadata that would differ from run to run; None leaves it out.
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
MISSING = "--plot needs matplotlib, which is not installed; pip install 'bgcbench[plot]'"


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


def draw(document: Document, path: Path, picture: str | None = None) -> None:
    """Draw ``picture`` (None: everything that fits the document) into ``path``, whole or not at all.

    The suffix decides the format. Raises UsageError as :func:`figure`, OutputError if the file cannot be written.
    """
    metadata = _metadata(path)
    drawn = figure(document, picture)
    image = io.BytesIO()
    with styled():
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


def figure(document: Document, picture: str | None = None) -> Figure:
    """``picture`` of an ``approx``, ``train`` or ``transfer`` document, or all that fit it, one below the other.

    Raises UsageError if matplotlib is missing, if the picture is another command's, or if the document has no rows for
    it.
    """
    if picture is not None:
        check_choice("picture", picture, PICTURES)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(MISSING) from error
    parts = _parts(document, picture)
    heights = [part.height for part in parts]
    with styled():
        drawn = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI, layout="constrained")
        panels = drawn.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)
        for part, panel in zip(parts, panels.flat, strict=True):
            part.paint(panel)
        lay_out(drawn)
    return drawn


def _parts(document: Document, picture: str | None) -> list[Part]:
    pictures = PICTURES_OF.get(document.command)
    if pictures is None:
        *others, last = (f"'{name}'" for name in PICTURES_OF)
        known = f"{', '.join(others)} and {last}"
        raise UsageError(f"--plot draws {known} results, and this is a '{document.command}' run; give another file")
    if picture is not None:
        if picture not in pictures:
            has = ", ".join(pictures)
            raise UsageError(f"{picture} is no picture of '{document.command}' results; they have {has}")
        try:
            return [pictures[picture].part(document)]
        except NothingToDraw as missing:
            raise UsageError(f"nothing to draw: {picture} needs {missing}") from missing
    parts = []
    for module in pictures.values():
        with contextlib.suppress(NothingToDraw):
            parts.append(pareto.short(document) if module is pareto else module.part(document))
    if not parts:
        raise UsageError(f"nothing to draw: {NOTHING[document.command]}")
    return parts
