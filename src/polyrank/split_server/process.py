"""The split server in a process of its own: started, asked, and started again when it dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from polyrank.errors import FrameError, PacketError, SplitServerError
from polyrank.protocol.json_fields import Fields
from polyrank.protocol.packet import Packet, pack
from polyrank.split_server.interface import ClientStatus, OpenRound, ServerPartResult
from polyrank.split_server.messages import ExpectedResult, write_round
from polyrank.split_server.settings import SplitServerSettings
from polyrank.split_server.subprocess_handle import ANSWERS, SubprocessHandle
from polyrank.transport.remote.credentials import Credentials

log = logging.getLogger(__name__)


class SplitServerProcess:
    """Runs the split server in a child process: a `SplitServerHandle`.

    The first `open` starts the server; an `open` that finds it dead starts it again, at most
    `restarts` times in one round. The server may take `start` seconds to load its model and `reply`
    seconds for an answer, and is killed if it takes longer. Its standard error goes to this
    module's log. It ends with this process, however this process ends. Linux and macOS.
    """

    def __init__(
        self,
        settings: SplitServerSettings,
        *,
        start: float = 900.0,
        reply: float = 300.0,
        restarts: int = 2,
    ):
        self._settings, self._start_seconds, self._reply_seconds = settings, start, reply
        self._restarts = restarts
        self._lock = threading.Lock()
        self._child: SubprocessHandle | None = None
        self._has_run = False
        self._restarted: tuple[int, int] = (-1, 0)
        """The last round in which the server was started, and how often it was a restart."""
        self._expected: dict[str, ExpectedResult] = {}
        self._death: str | None = None
        """Why the server that had this round's work has died."""
        self._status: dict[str, ClientStatus] = {}

    def __enter__(self) -> SplitServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process's id; None if there is none."""
        child = self._child
        return None if child is None or child.ended else child.process.pid

    @property
    def address(self) -> str | None:
        """Where it listens; None if there is no process."""
        child = self._child
        return None if child is None else child.address

    def open(self, work: OpenRound) -> Mapping[str, Credentials | str]:  # noqa: D102
        with self._lock:
            self._expected, self._death, self._status = {}, None, {}
            while True:
                try:
                    child = self._running_child(work.round)
                except SplitServerError as error:
                    if not self._has_run:
                        raise
                    log.error("%s", error)
                    return {job.client: str(error) for job in work.jobs}
                try:
                    credentials = self._ask_to_open(child, work)
                except SplitServerError as error:
                    if child.ended:  # It had died before, or dies of this.
                        continue
                    return {job.client: str(error) for job in work.jobs}
                self._expected = {
                    job.client: ExpectedResult.of(job)
                    for job in work.jobs
                    if not isinstance(credentials[job.client], str)
                }
                return credentials

    def collect(self, client: str) -> ServerPartResult:  # noqa: D102
        with self._lock:
            expected = self._expected.get(client)
            if expected is None:
                raise SplitServerError(f"client {client!r}: it has no work open at the server")
            child = self._child_of_round(client)
            block = self._ask(child, "collect", expected.size_limits.nbytes, client=client)
            try:
                return expected.read(block)
            except PacketError as error:
                raise SplitServerError(f"client {client!r}, its server part: {error}") from error

    def leave(self, client: str) -> None:  # noqa: D102
        with self._lock:
            if client in self._expected and self._child is not None and not self._child.ended:
                with suppress(SplitServerError):
                    self._ask(self._child, "leave", client=client)

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._expected, self._status = {}, {}
            if self._child is not None and not self._child.ended:
                with suppress(SplitServerError):
                    self._ask(self._child, "close")

    def stop(self) -> None:  # noqa: D102
        with self._lock:
            child, self._child = self._child, None
            self._expected, self._status = {}, {}
            if child is not None:
                child.stop()

    def status(self) -> Mapping[str, ClientStatus]:
        """Return how far each client of the round is; never raises, and waits for no other call.

        While the server is busy with another question this is what was last known. Without a
        server no client is connected.
        """
        if self._lock.acquire(blocking=False):
            try:
                child = self._child
                if child is None or child.ended:
                    self._status = {
                        client: replace(status, connected=False)
                        for client, status in self._status.items()
                    }
                elif self._expected:
                    with suppress(SplitServerError, PacketError):
                        self._status = _statuses(self._ask(child, "status"))
            finally:
                self._lock.release()
        return dict(self._status)

    def _running_child(self, round: int) -> SubprocessHandle:
        """Return the child, started if it does not run; SplitServerError if it cannot start."""
        if self._child is not None and not self._child.ended:
            return self._child
        restarts = self._restarted[1] if self._restarted[0] == round else 0
        if self._has_run and restarts >= self._restarts:
            raise SplitServerError(
                f"the split server was restarted {restarts} times in round {round}, and has died "
                f"each time; {self._child.why() if self._child else 'it cannot start'}"
            )
        self._restarted = (round, restarts + self._has_run)
        if self._child is not None:
            self._child.stop()
        self._child = SubprocessHandle()
        try:
            self._child.start(self._settings, self._start_seconds)
        except BaseException:
            self._child.stop()
            raise
        log.info("split server %d listens at %s", self._child.process.pid, self._child.address)
        self._has_run = True
        return self._child

    def _child_of_round(self, client: str) -> SubprocessHandle:
        """Return the child that has this round's work; SplitServerError if it has died."""
        child = self._child
        if child is None or child.ended:
            self._death = self._death or (child.why() if child else "it was stopped")
        if child is None or self._death is not None:
            raise SplitServerError(
                f"client {client!r}: what the server trained for it is lost: the split server has "
                f"died; {self._death}"
            )
        return child

    def _ask_to_open(
        self, child: SubprocessHandle, work: OpenRound
    ) -> dict[str, Credentials | str]:
        fields, packets = write_round(work)
        child.send(pack("question", {"what": "open", "about": fields}, {}), self._reply_seconds)
        for packet in packets:
            child.send(packet, self._reply_seconds)
        answer = child.answer("opened", self._reply_seconds).fields.table("clients")
        opened: dict[str, Credentials | str] = {}
        for client, given, _ in answer.named():
            try:
                opened[client] = given if isinstance(given, str) else Credentials.from_dict(given)
            except FrameError as error:
                opened[client] = f"the split server gave credentials that cannot be: {error}"
        missing = "the split server gave no credentials"
        return {job.client: opened.get(job.client, missing) for job in work.jobs}

    def _ask(
        self, child: SubprocessHandle, what: str, most: int = ANSWERS.nbytes, **about: Any
    ) -> bytearray:
        """Ask a question and return the packet of its answer."""
        child.send(pack("question", {"what": what, **about}, {}), self._reply_seconds)
        return child.receive(self._reply_seconds, most)


def _statuses(block: bytearray) -> dict[str, ClientStatus]:
    statuses = {}
    for client, given, place in Packet(block, "status", ANSWERS).fields.table("clients").named():
        fields = Fields(given, place)
        numbers = {name: fields.whole(name) for name in ("step", "steps", "up", "down")}
        statuses[client] = ClientStatus(connected=fields.flag("connected"), **numbers)
    return statuses
