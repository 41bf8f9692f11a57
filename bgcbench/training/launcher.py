"""Whether torchrun has started this process, read from the environment. No torch here."""

from __future__ import annotations

import os


def launched() -> tuple[int, int, int] | None:
    """(rank, processes, rank on this machine) where torchrun has started this process, else None."""
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(value.isdecimal() for value in values):
        return None
    rank, size, local = map(int, values)
    return rank, size, local


def own_rank() -> int:
    """The rank of this process; 0 where it is alone."""
    found = launched()
    return 0 if found is None else found[0]


def processes() -> int:
    """How many there are."""
    found = launched()
    return 1 if found is None else found[1]
