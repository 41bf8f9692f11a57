"""Where a CPU's tensors come from: memory that the C library has kept, or fresh pages of the system at each call.

glibc's malloc takes large blocks from the system and gives them back when they are freed, and each call pays for the
kernel clearing their pages one by one ('fresh'). Once a process has freed a few large blocks malloc reuses them up to a
threshold that it moves by itself ('kept'), so what a measurement finds depends on what ran before it. Here the state is
set, by mallopt(3), and its page faults are counted.

Kept memory is new for up to seven calls of a size: glibc's caches hold so many of the small rests that cutting an
aligned block leaves, and as long as they do, the freed blocks around them cannot grow together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from bgcbench.errors import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

FAULT_S = 1e-6  # what a page fault takes at least, roughly: the kernel clears 4 KiB
# Of malloc.h; a threshold of -1 is the largest there is.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_STATES = {
    "fresh": {_TRIM_THRESHOLD: 128 * 2**10, _MMAP_THRESHOLD: 128 * 2**10, _MMAP_MAX: 65536},
    # New threads share one heap: what one of them frees is there for the next. glibc settles that once for a process.
    "kept": {_TRIM_THRESHOLD: -1, _MMAP_THRESHOLD: 128 * 2**10, _MMAP_MAX: 0, _ARENA_MAX: 1},
    # Where glibc's own adaptation ends, which mallopt switches off for good.
    "adapted": {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536},
}
_SET: list[str] = []  # the states that blocks have set, the innermost last


def _c_function(name: str) -> Callable[..., Any] | None:
    """A function of the C library; None where it has none of this name."""
    with suppress(OSError, TypeError):
        return getattr(ctypes.CDLL(None), name, None)
    return None


def resolve_memory(asked: str | None, device_type: str) -> str | None:
    """The state to measure in: the one asked for, by default 'kept'; None where there is none to set.

    Raises UsageError for a state that is asked for and cannot be set.
    """
    if device_type != "cpu":
        problem = "is about the C library of a CPU's tensors; on CUDA leave it out"
    elif _c_function("mallopt") is None:
        problem = "needs glibc, whose malloc can be told so; leave it out"
    else:
        return asked or "kept"
    if asked is not None:
        raise UsageError(f"--memory {asked} {problem}")
    return None


def set_memory(state: str) -> None:
    """Have freed memory 'kept' for the next call, or taken 'fresh' from the system; glibc only."""
    if mallopt := _c_function("mallopt"):
        for name, value in _STATES[state].items():
            mallopt(name, value)


@contextmanager
def memory_state(state: str | None) -> Iterator[None]:
    """Set ``state`` for the block, then the one before it, and give back what was kept. None leaves the current state.

    Also what many passes of a network run in: 'kept' spares them most page faults.
    """
    if state is None or _SET[-1:] == [state]:
        yield
        return
    _SET.append(state)
    set_memory(state)
    try:
        with _holes_plugged() if state == "fresh" else nullcontext():
            yield
    finally:
        _SET.pop()
        set_memory(_SET[-1] if _SET else "adapted")
        trim_heap()


class _MallocInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


@contextmanager
def _holes_plugged() -> Iterator[None]:
    """What the heap has free in pieces of 128 KiB and more, which goes before fresh memory, is taken, and not touched.

    Nothing is where there is no mallinfo2 (glibc before 2.33).
    """
    malloc, free, info = (_c_function(name) for name in ("malloc", "free", "mallinfo2"))
    if malloc is None or free is None or info is None:
        yield
        return
    malloc.restype, info.restype = ctypes.c_void_p, _MallocInfo  # type: ignore[attr-defined]
    plugs: list[ctypes.c_void_p] = []
    left = info().fordblks
    for size in (2**power for power in range(30, 16, -1)):
        while left >= size:
            mapped = info().hblks
            block = ctypes.c_void_p(malloc(ctypes.c_size_t(size)))
            if block.value is None or info().hblks > mapped:  # no hole is so large: the system has given it
                free(block)
                break
            plugs.append(block)
            left -= size
    try:
        yield
    finally:
        for block in plugs:
            free(block)


def trim_heap() -> None:
    """Give freed memory back to the system; glibc only."""
    if trim := _c_function("malloc_trim"):
        trim(0)


def minor_faults() -> int | None:
    """Pages that this process was given so far without a disk being read; None where the system does not count."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
