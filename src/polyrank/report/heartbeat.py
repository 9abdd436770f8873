"""A line now and then where no bar is shown, so that a run in a pipe is seen to go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console

SECONDS = 30.0
"""The longest time without a line."""


class Heartbeat:
    """Prints `status()` whenever nothing else was printed for `seconds`; nothing on a terminal.

    A thread of its own prints, so that a long step inside a phase is no silence.
    """

    def __init__(self, console: Console, status: Callable[[], str], seconds: float = SECONDS):
        self._console, self._status, self._seconds = console, status, seconds
        self._ended = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to print, unless the console is a terminal."""
        self.printed()
        if not self._console.is_terminal:
            self._thread.start()

    def stop(self) -> None:
        """Print no more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def printed(self) -> None:
        """Note that a line was printed."""
        self._last = time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(max(0.01, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds and (status := self._status()):
                self._console.print(status, markup=False, highlight=False, soft_wrap=True)
                self.printed()
