"""Where an exported network goes. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from bgcbench.errors import OutputError, UsageError
from bgcbench.results.files import check_folder
from bgcbench.specs import TARGETS, check_choice


def files_of(path: Path, to: str, *, force: bool) -> tuple[Path, ...]:
    """The files of an export to ``path``: one, and for 'torch' the code beside it.

    Raises UsageError for an unknown target and a name that its file cannot have, OutputError where a file exists
    (unless ``force``) or cannot be written.
    """
    check_choice("target", to, TARGETS)
    if path.suffix != TARGETS[to]:
        raise UsageError(f"{path}: a file for '{to}' ends with {TARGETS[to]}; name it {path.with_suffix(TARGETS[to])}")
    paths: tuple[Path, ...] = (path,)
    if to == "torch":
        if not path.stem.isidentifier():
            better = path.with_stem(re.sub(r"\W", "_", f"_{path.stem}" if path.stem[:1].isdigit() else path.stem))
            raise UsageError(f"{path}: the module beside it must have a name that Python imports; name it {better}")
        paths = (path, path.with_suffix(".py"))
    check_folder(path, "the file")
    for each in paths:
        if each.exists() and not force:
            raise OutputError(f"{each} exists; --force (force=True) replaces it, or choose another name")
    return paths
