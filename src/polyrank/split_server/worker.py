"""The split server: ``python -m polyrank.split_server.worker``, started by `SplitProcess`.

It is told all over its standard input and answers over its standard output, in blocks that are
packets; what is printed goes to standard error. It ends when its input does, when its parent is
gone, or on SIGTERM, and leaves Ctrl-C to its parent. After ``settings`` and its answer ``ready`` it
answers each question with one packet:

    settings (TailSettings)                   ready: the address it listens on
    open (round, attempt, jobs, …), then      opened: an access or a reason for each client
      a `merged` for each site and an
      `order` for each job
    collect (client)                          an `answer`
    status                                    status: per client
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

from polyrank.algebra import Adapter, Dense
from polyrank.errors import PolyrankError
from polyrank.protocol.json_fields import Fields
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import MARKS, ORDERS
from polyrank.split_server.messages import Dealt, read_job, read_merged
from polyrank.split_server.pipe import Pipe

if TYPE_CHECKING:
    from polyrank.split_server.host import ServerPartHost

SECONDS_TO_END = 5.0
"""How long its threads may take to end before the process goes without waiting for them."""
SECONDS_BETWEEN_LOOKS = 0.5
"""How often it looks whether its parent is there."""

log = logging.getLogger(__name__)


def main() -> int:
    """Serve until the input ends; return the exit status."""
    control, parent = _taken_over(), os.getppid()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    try:
        host = _started(control)
    except SystemExit:
        raise
    except BaseException as error:
        log.exception("the split server cannot start")
        control.send(pack("failed", {"reason": _told(error)}, {}))
        return 1
    try:
        _WorkerLoop(control, host).serve()
    finally:
        threading.Thread(target=_late, daemon=True).start()
        host.stop()
    return 0


def _taken_over() -> Pipe:
    """Return the parent's pipes; what others print goes to standard error from here on."""
    reading, writing = os.dup(0), os.dup(1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return Pipe(reading, writing)


def _end(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def _watch(parent: int) -> None:
    """End the process when its parent is gone, also while it is busy."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _late() -> None:
    time.sleep(SECONDS_TO_END)
    os._exit(1)


def _started(control: Pipe) -> ServerPartHost:
    """Return the split server that the settings ask for, and say that it is ready."""
    from polyrank.split_server.host import ServerPartHost
    from polyrank.split_server.settings import SplitServerSettings

    block = control.receive(MARKS.nbytes)
    if block is None:
        raise SystemExit(0)
    packet = Packet(block, "settings", MARKS)
    host = ServerPartHost(SplitServerSettings.from_dict(packet.fields.take("settings")))
    control.send(pack("ready", {"address": host.address}, {}))
    return host


class _WorkerLoop:
    """Answers the parent's questions, one after the other."""

    def __init__(self, control: Pipe, host: ServerPartHost):
        self._control, self._host = control, host
        self._dealt: dict[str, Dealt] = {}
        self._answers = {
            "open": self._open,
            "collect": self._collect,
            "status": self._status,
            "leave": self._leave,
            "close": self._close,
        }

    def serve(self) -> None:
        """Answer until the parent has closed its end."""
        while (block := self._control.receive(ORDERS.nbytes)) is not None:
            fields = Packet(block, "question", ORDERS).fields
            what = fields.choice("what", self._answers)
            try:
                answer = self._answers[what](fields)
            except PolyrankError as error:
                answer = pack("failed", {"reason": str(error)}, {})
            except Exception as error:
                log.exception("the question %s has failed", what)
                answer = pack("failed", {"reason": _told(error)}, {})
            self._control.send(answer)

    def _open(self, fields: Fields) -> bytes:
        about = fields.take("about")
        # All are taken in before one is read, which may fail: the next block is a question.
        sums = deque(_next(self._control) for _ in range(about["merged"]))
        orders = [_next(self._control) for _ in about["jobs"]]
        merged: dict[str, Dense] = {}
        while sums:
            merged |= read_merged(sums.popleft())
        jobs = [read_job(order, told) for order, told in zip(orders, about["jobs"], strict=True)]
        self._dealt = {job.client: Dealt.of(job) for job in jobs}
        found = self._host.open(
            about["round"],
            about["attempt"],
            jobs,
            Adapter(merged),
            about["tokens"],
            about["seconds"],
        )
        written = {
            client: one if isinstance(one, str) else one.to_dict() for client, one in found.items()
        }
        return pack("opened", {"clients": written}, {})

    def _collect(self, fields: Fields) -> bytes:
        client = fields.text("client")
        found = self._host.collect(client)
        return self._dealt[client].write(found)

    def _status(self, _: Fields) -> bytes:
        found = {client: asdict(one) for client, one in self._host.status().items()}
        return pack("status", {"clients": found}, {})

    def _leave(self, fields: Fields) -> bytes:
        self._host.leave(fields.text("client"))
        return pack("done", {}, {})

    def _close(self, _: Fields) -> bytes:
        self._dealt = {}
        self._host.close()
        return pack("done", {}, {})


def _next(control: Pipe) -> bytearray:
    block = control.receive(ORDERS.nbytes)
    if block is None:
        raise SystemExit(0)
    return block


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
