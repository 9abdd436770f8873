"""The split server's program: ``python -m polyrank.split_server.worker``.

`SplitServerProcess` starts it. Packets come over its standard input and go over its standard
output, as the blocks of `Pipe`; printed text goes to standard error. It ends when its input does,
when its parent has ended, or on SIGTERM; Ctrl-C is left to its parent. After ``settings`` and its
answer ``ready`` it answers each question with one packet:

    settings (SplitServerSettings)            ready: the address it listens on
    open (an OpenRound), then a `merged`      opened: credentials or a reason for each client
      for each site and an `order`
      for each job
    collect (client)                          an `answer`
    status                                    status: of each client
    leave (client), close                     done

A question that fails is answered with ``failed`` and the reason.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.errors import PolyrankError
from polyrank.protocol.json_fields import Fields
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import WITH_TENSORS, WITHOUT_TENSORS
from polyrank.split_server.messages import ExpectedResult, read_round
from polyrank.split_server.pipe import Pipe

if TYPE_CHECKING:
    from polyrank.split_server.host import ServerPartHost

SECONDS_TO_END = 5.0
"""How long its threads may take to end; then the process exits without them."""
SECONDS_BETWEEN_CHECKS = 0.5
"""How often it checks whether its parent still runs."""

log = logging.getLogger(__name__)


def main() -> int:
    """Serve until the input ends; return the exit status."""
    pipe, parent = _take_over_standard_streams(), os.getppid()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_on_signal)
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    try:
        host = _start_host(pipe)
    except SystemExit:
        raise
    except BaseException as error:
        log.exception("the split server cannot start")
        pipe.send(pack("failed", {"reason": _describe(error)}, {}))
        return 1
    try:
        _WorkerLoop(pipe, host).serve()
    finally:
        threading.Thread(target=_exit_late, daemon=True).start()
        host.stop()
    return 0


def _take_over_standard_streams() -> Pipe:
    """Return the pipe to the parent; from here on, printed text goes to standard error."""
    reading, writing = os.dup(0), os.dup(1)
    with Path(os.devnull).open("rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)
    return Pipe(reading, writing)


def _end_on_signal(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def _watch_parent(parent: int) -> None:
    """End the process when its parent has ended, also while it is busy."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    os._exit(1)


def _exit_late() -> None:
    time.sleep(SECONDS_TO_END)
    os._exit(1)


def _start_host(pipe: Pipe) -> ServerPartHost:
    """Read the settings, start the server, and say that it is ready."""
    from polyrank.split_server.host import ServerPartHost
    from polyrank.split_server.settings import SplitServerSettings

    block = pipe.receive(WITHOUT_TENSORS.nbytes)
    if block is None:
        raise SystemExit(0)
    packet = Packet(block, "settings", WITHOUT_TENSORS)
    host = ServerPartHost(SplitServerSettings.from_dict(packet.fields.take("settings")))
    pipe.send(pack("ready", {"address": host.address}, {}))
    return host


class _WorkerLoop:
    """Answers the parent's questions, one after the other."""

    def __init__(self, pipe: Pipe, host: ServerPartHost):
        self._pipe, self._host = pipe, host
        self._expected: dict[str, ExpectedResult] = {}
        self._answers = {
            "open": self._open,
            "collect": self._collect,
            "status": self._status,
            "leave": self._leave,
            "close": self._close,
        }

    def serve(self) -> None:
        """Answer until the parent has closed its end."""
        while (block := self._pipe.receive(WITH_TENSORS.nbytes)) is not None:
            fields = Packet(block, "question", WITH_TENSORS).fields
            what = fields.choice("what", self._answers)
            try:
                answer = self._answers[what](fields)
            except PolyrankError as error:
                answer = pack("failed", {"reason": str(error)}, {})
            except Exception as error:
                log.exception("the question %s has failed", what)
                answer = pack("failed", {"reason": _describe(error)}, {})
            self._pipe.send(answer)

    def _open(self, fields: Fields) -> bytes:
        about = fields.take("about")
        # All packets are received before one is read: reading may fail, and the next block after
        # these is a question.
        count = about["merged"] + len(about["jobs"])
        work = read_round(about, deque(self._next_packet() for _ in range(count)))
        self._expected = {job.client: ExpectedResult.of(job) for job in work.jobs}
        clients = {
            client: given if isinstance(given, str) else given.to_dict()
            for client, given in self._host.open(work).items()
        }
        return pack("opened", {"clients": clients}, {})

    def _collect(self, fields: Fields) -> bytes:
        client = fields.text("client")
        result = self._host.collect(client)
        return self._expected[client].write(result)

    def _status(self, _: Fields) -> bytes:
        clients = {client: asdict(status) for client, status in self._host.status().items()}
        return pack("status", {"clients": clients}, {})

    def _leave(self, fields: Fields) -> bytes:
        self._host.leave(fields.text("client"))
        return pack("done", {}, {})

    def _close(self, _: Fields) -> bytes:
        self._expected = {}
        self._host.close()
        return pack("done", {}, {})

    def _next_packet(self) -> bytearray:
        block = self._pipe.receive(WITH_TENSORS.nbytes)
        if block is None:
            raise SystemExit(0)
        return block


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
