"""Ctrl-C and SIGTERM: the first asks the run to stop, the second leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Context manager that turns signals into a flag; ``requested`` is what a run asks between samples.

    Python runs signal handlers between its own instructions, so a second Ctrl-C would wait for the current call into
    a library, which may take seconds. The operating system's wake-up pipe is written at once, and a thread reads it.

    patient: a second signal does not leave. A launcher of several processes sends the same request on, so that two
    arrive for one Ctrl-C, and it has a way of its own to end what does not stop.

    leaving: called before a second signal leaves; what a ``finally`` would do is not done then.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.signum: int | None = None
        self.leaving: Callable[[], None] = lambda: None
        self._old: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None

    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to the main thread; a caller elsewhere handles its own
        for number in self.SIGNALS:
            self._old[number] = signal.signal(number, self._first)
        # Where a system has no wake-up pipe the handler alone serves.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            self._pipe = (read, write)
            threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])  # ends the watcher

    def _first(self, number: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = number

    def _watch(self, read: int) -> None:
        """Leave on the second signal. Every write of a result is atomic, so the file stays valid."""
        seen = 0
        while byte := os.read(read, 1):
            if byte[0] not in self.SIGNALS:
                continue
            seen += 1
            if seen == 2 and not self.patient:
                self.leaving()
                os._exit(128 + byte[0])
        os.close(read)
