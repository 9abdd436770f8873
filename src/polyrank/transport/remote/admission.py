"""Limits on the streams at a split server: how many are unauthenticated, how long each may stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from grpc import StatusCode

from polyrank.transport.remote.server_stream import ServerStream

TOO_MANY = "too many streams are open; try again later"
_SECONDS_BETWEEN_CHECKS = 0.5


class AdmissionControl:
    """Refuses unauthenticated streams beyond a limit, and aborts streams that stay too long.

    At most `unauthenticated` streams are open that were not welcomed yet; a further one takes the
    place of the oldest, because an honest client is unauthenticated for a moment only. A stream
    that is over ends when its client has read what was written to it; a client that does not read
    would hold it for ever, so it is aborted after its `deadline`. `clock` is in seconds, the same
    as that of the streams.
    """

    def __init__(self, unauthenticated: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._unauthenticated, self._clock = unauthenticated, clock
        self._open: dict[ServerStream, None] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="split admission", daemon=True)

    def start(self) -> None:
        """Start the thread that checks deadlines."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        self._thread.join()

    def add(self, stream: ServerStream) -> None:
        """Count a new stream."""
        with self._lock:
            waiting = [open for open in self._open if not (open.welcomed or open.over)]
            self._open[stream] = None
        for oldest in waiting[: max(0, len(waiting) + 1 - self._unauthenticated)]:
            oldest.refuse(StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)

    def remove(self, stream: ServerStream) -> None:
        """Count a stream no more: its connection has closed."""
        with self._lock:
            self._open.pop(stream, None)

    def check(self) -> None:
        """Abort the streams whose deadline has passed."""
        now = self._clock()
        with self._lock:
            late = [s for s in self._open if s.deadline is not None and now > s.deadline]
        for stream in late:
            stream.abort()

    def _run(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_CHECKS):
            self.check()
