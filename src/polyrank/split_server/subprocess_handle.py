"""The split server's process as its parent holds it: started, talked to, ended."""

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
"""So many of the last lines of its standard error are told when it cannot start, or dies."""
SECONDS_TO_STOP = 8.0
ANSWERS = SizeLimits(2**26, 2**26, 0)
"""Of an answer without tensors; each client's certificate is in one."""

log = logging.getLogger(__name__)


class SubprocessHandle:
    """One process of the split server, from its start to its end; nothing outlives an error."""

    def __init__(self) -> None:
        self.address: str | None = None
        self._lines: deque[str] = deque(maxlen=LINES)
        # A group of its own: Ctrl-C of the terminal is its parent's to decide on.
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            process_group=0,
        )
        self._broken: str | None = None
        self._control = Pipe(_detached(self.process.stdout), _detached(self.process.stdin))
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    @property
    def ended(self) -> bool:
        """Whether it is of no more use."""
        return self._broken is not None or self.process.poll() is not None

    def start(self, settings: SplitServerSettings, seconds: float) -> None:
        """Tell it its settings and wait until it listens; SplitServerError if it cannot."""
        try:
            self.send(pack("settings", {"settings": settings.to_dict()}, {}), seconds)
            self.address = self.answer("ready", seconds).fields.text("address")
        except SplitServerError as error:
            raise SplitServerError(f"the split server cannot start: {error}") from error

    def send(self, block: bytes, seconds: float) -> None:
        """Send a packet, or end the process."""
        try:
            self._control.send(block, seconds)
        except SplitServerError as error:
            raise self._given_up(str(error)) from error

    def receive(self, seconds: float, most: int = ANSWERS.nbytes) -> bytearray:
        """Return the next packet; SplitServerError with the reason of one that says ``failed``."""
        try:
            block = self._control.receive(max(most, ANSWERS.nbytes), seconds)
        except SplitServerError as error:
            raise self._given_up(str(error)) from error
        if block is None:
            raise self._given_up("it has closed its output")
        with suppress(PacketError):
            raise SplitServerError(Packet(block, "failed", ANSWERS).fields.text("reason", 2**20))
        return block

    def answer(self, kind: str, seconds: float) -> Packet:
        """Return the next packet, which must be of this kind."""
        block = self.receive(seconds)
        try:
            return Packet(block, kind, ANSWERS)
        except PacketError as error:
            raise self._given_up(str(error)) from error

    def why(self) -> str:
        """Return how it ended, with the last that it said."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)  # Its output ends a moment before it does.
        self._reader.join(1.0)
        code = self.process.poll()
        ended = "it was ended" if code is None else f"its exit status is {code}"
        said = "".join(f"\n    {line}" for line in self._lines)
        return f"{self._broken or 'it is gone'}; {ended}{'; it said last:' + said if said else ''}"

    def stop(self) -> None:
        """End it: its input closes, then it is asked to, then it is killed."""
        self._broken = self._broken or "it was stopped"
        self._control.close()
        for ask in (lambda: None, self.process.terminate, self.process.kill):
            ask()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(SECONDS_TO_STOP)
                break
        self._reader.join(SECONDS_TO_STOP)

    def _given_up(self, reason: str) -> SplitServerError:
        """Kill a process that cannot be talked to any more; return the error that says why."""
        self._broken = reason
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # It may be about to end by itself, with a status that tells.
        self.process.kill()
        return SplitServerError(self.why())

    def _listen(self) -> None:
        """Pass on what it says, and when it ends."""
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
    """Return a descriptor of a pipe of its own, and close the pipe's file."""
    if stream is None:
        raise SplitServerError("the split server's pipes could not be made")
    with stream:
        return os.dup(stream.fileno())
