"""How busy other processes keep the CPU. No torch here."""

from __future__ import annotations

import os
import time

import psutil

LEAST_S = 0.5  # the system counts in hundredths of a second


class Contention:
    """How much too few CPU cores there are, while it lives, for ``threads`` of this process and all that others do."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Seconds of the clock, and seconds that cores spent on other processes, or that the host took."""
        own, every = psutil.Process().cpu_times(), psutil.cpu_times()
        busy = sum(every) - every.idle - getattr(every, "iowait", 0.0)
        # What guests ran is in user and nice, too.
        busy -= getattr(every, "guest", 0.0) + getattr(every, "guest_nice", 0.0)
        return time.monotonic(), busy - own.user - own.system

    @property
    def others(self) -> float | None:
        """How many cores others used, on average; None before there is anything to tell by."""
        (began, before), (now, after) = self._began, self._now()
        return None if now - began < LEAST_S else max(0.0, (after - before) / (now - began))

    @property
    def cores(self) -> float | None:
        """How many more cores were wanted, on average, than there are; None before there is anything to tell by."""
        others = self.others
        return None if others is None else max(0.0, self._threads + others - (psutil.cpu_count() or self._threads))


def free_cores() -> int:
    """How many of the cores that this process may use others leave, as the next second goes: at least one."""
    watched = Contention(0)
    time.sleep(2 * LEAST_S)
    every = psutil.cpu_count() or 1
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return max(1, min(own, round(every - (watched.others or 0.0))))
