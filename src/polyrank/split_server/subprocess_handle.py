"""One child process of the split server: its start, its packets, its log and its end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import IO

from polyrank.errors import PacketError, SplitServerError
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import SizeLimits
from polyrank.split_server.pipe import Pipe
from polyrank.split_server.settings import SplitServerSettings

COMMAND = [sys.executable, "-P", "-m", "polyrank.split_server.worker"]
LINES = 20
"""How many of the last lines of its standard error an error message quotes."""
SECONDS_TO_STOP = 8.0
ANSWERS = SizeLimits(2**26, 2**26, 0)
"""Size limits of an answer without tensors; it may hold each client's certificate."""

log = logging.getLogger(__name__)


class SubprocessHandle:
    """A process of the split server. An error ends the process."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        # A process group of its own: the terminal's Ctrl-C is for the parent to handle.
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
        self._broken: str | None = None
        self._pipe = Pipe(_detached(self.process.stdout), _detached(self.process.stdin))
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        """Whether the process has ended, or cannot be talked to any more."""
        return self._broken is not None or self.process.poll() is not None

    def start(self, settings: SplitServerSettings, seconds: float) -> None:
        """Send its settings and wait until it listens; SplitServerError if it cannot start."""
        try:
            self.send(pack("settings", {"settings": settings.to_dict()}, {}), seconds)
            self.address = self.answer("ready", seconds).fields.text("address")
        except SplitServerError as error:
            raise SplitServerError(f"the split server cannot start: {error}") from error

    def send(self, block: bytes, seconds: float) -> None:
        """Send a packet; on an error the process is killed."""
        try:
            self._pipe.send(block, seconds)
        except SplitServerError as error:
            raise self._kill(str(error)) from error

    def receive(self, seconds: float, most: int = ANSWERS.nbytes) -> bytearray:
        """Return the next packet; a packet ``failed`` raises SplitServerError with its reason."""
        try:
            block = self._pipe.receive(max(most, ANSWERS.nbytes), seconds)
        except SplitServerError as error:
            raise self._kill(str(error)) from error
        if block is None:
            raise self._kill("it has closed its output")
        with suppress(PacketError):
            raise SplitServerError(Packet(block, "failed", ANSWERS).fields.text("reason", 2**20))
        return block

    def answer(self, kind: str, seconds: float) -> Packet:
        """Return the next packet; if it is not of this kind, the process is killed."""
        block = self.receive(seconds)
        try:
            return Packet(block, kind, ANSWERS)
        except PacketError as error:
            raise self._kill(str(error)) from error

    def why(self) -> str:
        """Return how the process ended, with the last lines of its standard error."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)  # Its output ends a moment before it does.
        self._reader.join(1.0)
        code = self.process.poll()
        ended = "it was killed" if code is None else f"its exit status is {code}"
        lines = "".join(f"\n    {line}" for line in self._lines)
        last = "; its last lines:" + lines if lines else ""
        return f"{self._broken or 'it has ended'}; {ended}{last}"

    def stop(self) -> None:
        """End the process: its input is closed, then it gets SIGTERM, then SIGKILL."""
        self._broken = self._broken or "it was stopped"
        self._pipe.close()
        for act in (lambda: None, self.process.terminate, self.process.kill):
            act()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_STOP)
                break
        self._reader.join(SECONDS_TO_STOP)

    def _kill(self, reason: str) -> SplitServerError:
        """Kill the process, which cannot be talked to any more; return the error that says why."""
        self._broken = reason
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # It may be ending by itself: its exit status then tells more.
        self.process.kill()
        return SplitServerError(self.why())

    def _listen(self) -> None:
        """Log its standard error line by line, and its end."""
        stream = self.process.stderr
        if stream is None:
            return
        with stream:
            for line in stream:
                text = line.decode("utf-8", "replace").rstrip()
                self._lines.append(text[:1000])
                log.info("split server %d: %s", self.process.pid, text)
        code = self.process.wait()
        if self._broken is None:
            self._broken = "it has died"
            log.error("the split server has died, with exit status %s", code)


def _detached(stream: IO[bytes] | None) -> int:
    """Return a duplicate of a pipe's descriptor, and close the pipe's file."""
    if stream is None:
        raise SplitServerError("the split server's pipes could not be made")
    with stream:
        return os.dup(stream.fileno())
