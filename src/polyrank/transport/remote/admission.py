"""The streams that are open at a server, and how long each may stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from grpc import StatusCode

from polyrank.transport.remote.server_stream import ServerStream

TOO_MANY = "too many streams are open; try again later"
_SECONDS_BETWEEN_LOOKS = 0.5


class AdmissionControl:
    """Sends away whom nobody knows when others come, and breaks off streams that outstay.

    At most `strangers` streams are open that are not welcome yet; one more takes the place of the
    oldest, as an honest client is a stranger for a moment only. A stream that is over ends when its
    client has read what was written to it; who does not read would hold it for ever, so that it is
    broken off at its `until`. `clock` is in seconds and that of the streams.
    """

    def __init__(self, strangers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._strangers, self._clock = strangers, clock
        self._open: dict[ServerStream, None] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="split door", daemon=True)

    def start(self) -> None:
        """Start to look who outstays."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def enter(self, stream: ServerStream) -> None:
        """Take note of a new stream."""
        with self._lock:
            known = [one for one in self._open if not (one.welcomed or one.over)]
            self._open[stream] = None
        for one in known[: max(0, len(known) + 1 - self._strangers)]:
            one.refuse(StatusCode.RESOURCE_EXHAUSTED, TOO_MANY)

    def leave(self, stream: ServerStream) -> None:
        """Take note that a stream is gone from the network."""
        with self._lock:
            self._open.pop(stream, None)

    def look(self) -> None:
        """Break off the streams whose time is over."""
        now = self._clock()
        with self._lock:
            late = [one for one in self._open if one.until is not None and now > one.until]
        for one in late:
            one.cut()

    def _work(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()
