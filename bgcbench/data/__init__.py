"""Images by name, or from any folder: to calibrate networks with."""

from __future__ import annotations

import os
from collections.abc import Callable

from bgcbench.data.base import Images
from bgcbench.data.digits import open_digits
from bgcbench.data.folder import open_folder
from bgcbench.errors import UsageError
from bgcbench.specs import Pair, check_choice

__all__ = ["DATASETS", "Images", "open_images"]

# The one registration of the data sets. A new one is its file here and its line.
DATASETS: dict[str, Callable[[Pair | None], Images]] = {"digits": open_digits}


def open_images(data: str, size: Pair | None = None) -> Images:
    """The images that ``data`` names: one of DATASETS or, where it is none of these names, the path of a folder.

    size: (height, width) in px, None for the source's own: 16 x 16 for digits, 224 x 224 for a folder. Raises
    UsageError for what is neither name nor folder, for a folder without images and for a package that is missing.
    """
    if data not in DATASETS and (os.path.exists(data) or os.path.dirname(data)):
        return open_folder(data, size)
    try:
        name = check_choice("data set", data, DATASETS)
    except UsageError as unknown:
        raise UsageError(f"{unknown}, or give the path of a folder of images") from None
    return DATASETS[name](size)
