"""Pictures of result files. matplotlib is imported when one is drawn, and only here.

    speedups     how much faster a variant is, against its parameters              a layer, a network
    cost         each layer's cost before and after                               a network's layers, plans
    figure1      log E against log(1 - 1/N), as Figure 1 of Lee, Park & Lee       sampled convolutions
    figure2      the error over (1 - 1/N)^p against N, as their Figure 2          sampled convolutions
    pareto       the share of the output that is lost against parameters          sampled convolutions
    heatmap      the same by layer and N                                          a network's layers
    plans        predicted loss against cost, with the networks measured          plans
    errors       the test error against N and against parameters                  trained networks
                 before and after training against parameters                     converted networks
    curves       the test error by epoch                                          trained networks
    layers       what each layer loses with copied, white, calibrated weights     converted networks
    tradeoff     time saved against accuracy lost                                 converted networks, plans

Each fits a slide, 8 by 4.5 inches, with at most six panels.
Nothing of matplotlib's global state is left changed, and the same document gives the same bytes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bgcbench.errors import UsageError
from bgcbench.results.document import Document
from bgcbench.results.files import check_new, write_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By suffix, metadata that would differ from run to run; None leaves it out.
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
MISSING = "pictures need matplotlib, which is not installed; pip install 'bgcbench[plot]'"


def check_plot(path: Path, *, replace: bool) -> None:
    """Raise now what :func:`draw` would raise after everything is computed, but for a missing matplotlib.

    UsageError for a suffix that names no format, OutputError for a file that exists (unless ``replace``) and for a
    folder that cannot be written.
    """
    _metadata(path)
    check_new(path, "--plot", replace=replace)


def draw(document: Document, path: Path, picture: str | None = None) -> None:
    """Draw ``picture`` (None: everything that fits the document) into ``path``, whole or not at all.

    The suffix decides the format. Raises UsageError as :func:`figure`, OutputError if the file cannot be written.
    """
    metadata, image = _metadata(path), io.BytesIO()
    drawn = figure(document, picture)
    from bgcbench.plots.style import styled

    with styled():
        drawn.savefig(image, format=path.suffix[1:].lower(), dpi=drawn.dpi, metadata=metadata)
    write_named(path, "--plot", image.getvalue())


def _metadata(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in {', '.join(FORMATS)}; the ending decides the format")
    return FORMATS[path.suffix.lower()]


def figure(document: Document, picture: str | None = None) -> Figure:
    """``picture`` of a document (see above for whose there are), or all that fit it, one below the other.

    Raises UsageError if matplotlib is missing, if the picture is another command's, or if the document has no rows for
    it.
    """
    drawn: Figure = _pictures().figure(document, picture)
    return drawn


def inline_pictures(document: Document, prefix: str) -> list[tuple[str, str]]:
    """(name, ``<svg>`` element with alternative text) of each picture that fits a document of any command.

    prefix: what the ids begin with, for a page that has several. Raises UsageError if matplotlib is missing.
    """
    drawn: list[tuple[str, str]] = _pictures().inline_pictures(document, prefix, FORMATS[".svg"])
    return drawn


def _pictures() -> Any:
    """The module that draws; raises UsageError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(MISSING) from error
    from bgcbench.plots import pictures

    return pictures
