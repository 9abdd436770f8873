"""The split server in a process of its own, as the process that starts it handles it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from polyrank.algebra import Adapter, Dense
from polyrank.errors import FrameError, PacketError, SplitServerError
from polyrank.protocol.json_fields import Fields
from polyrank.protocol.packet import Packet, pack
from polyrank.split_server.interface import ClientStatus, Collected
from polyrank.split_server.messages import Dealt, manner, write_job, write_merged
from polyrank.split_server.settings import SplitServerSettings
from polyrank.split_server.subprocess_handle import ANSWERS, SubprocessHandle
from polyrank.training.split import ServerPartJob
from polyrank.transport.remote.credentials import Credentials

log = logging.getLogger(__name__)


class SplitServerProcess:
    """Starts the split server, asks it, and sees it die: a `Desk`.

    It is started by the first `open`, and again by one that finds it dead, at most `restarts` times
    in one round. It may take `start` seconds to load its model, and `reply` seconds for an answer;
    one that takes longer is ended. Its standard error goes to this module's log. It ends with this
    process, however this process ends. Linux and macOS.
    """

    def __init__(
        self,
        settings: SplitServerSettings,
        *,
        start: float = 900.0,
        reply: float = 300.0,
        restarts: int = 2,
    ):
        self._settings, self._start_in, self._reply_in = settings, start, reply
        self._restarts = restarts
        self._lock = threading.Lock()
        self._child: SubprocessHandle | None = None
        self._served = False
        self._again: tuple[int, int] = (-1, 0)
        self._dealt: dict[str, Dealt] = {}
        self._lost: str | None = None
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

    def open(  # noqa: D102
        self,
        round: int,
        attempt: int,
        jobs: Sequence[ServerPartJob],
        merged: Adapter[Dense],
        tokens: Mapping[str, int],
        seconds: float,
    ) -> Mapping[str, Credentials | str]:
        with self._lock:
            self._dealt, self._lost, self._status = {}, None, {}
            while True:
                try:
                    child = self._there(round)
                except SplitServerError as error:
                    if not self._served:
                        raise
                    log.error("%s", error)
                    return {job.client: str(error) for job in jobs}
                try:
                    found = self._asked_to_open(
                        child, round, attempt, jobs, merged, tokens, seconds
                    )
                except SplitServerError as error:
                    if child.ended:  # It had died, or did so at this.
                        continue
                    return {job.client: str(error) for job in jobs}
                self._dealt = {
                    job.client: Dealt.of(job)
                    for job in jobs
                    if not isinstance(found[job.client], str)
                }
                return found

    def collect(self, client: str) -> Collected:  # noqa: D102
        with self._lock:
            dealt = self._dealt.get(client)
            if dealt is None:
                raise SplitServerError(f"client {client!r}: no tail of it is open")
            child = self._living(f"client {client!r}: what the server trained for it is lost")
            block = self._ask(child, "collect", dealt.bounds.nbytes, client=client)
            try:
                return dealt.read(block)
            except PacketError as error:
                raise SplitServerError(f"client {client!r}, its tail: {error}") from error

    def leave(self, client: str) -> None:  # noqa: D102
        with self._lock:
            if client in self._dealt and self._child is not None and not self._child.ended:
                with suppress(SplitServerError):
                    self._ask(self._child, "leave", client=client)

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._dealt, self._status = {}, {}
            if self._child is not None and not self._child.ended:
                with suppress(SplitServerError):
                    self._ask(self._child, "close")

    def stop(self) -> None:  # noqa: D102
        with self._lock:
            child, self._child = self._child, None
            self._dealt, self._status = {}, {}
            if child is not None:
                child.stop()

    def status(self) -> Mapping[str, ClientStatus]:
        """Return how far each client of the round is; never raises, and waits for no other call.

        While the server is busy with another question it is what was last known, and without a
        server nobody is connected.
        """
        if self._lock.acquire(blocking=False):
            try:
                child = self._child
                if child is None or child.ended:
                    gone = {c: replace(one, connected=False) for c, one in self._status.items()}
                    self._status = gone
                elif self._dealt:
                    with suppress(SplitServerError, PacketError):
                        self._status = _statuses(self._ask(child, "status"))
            finally:
                self._lock.release()
        return dict(self._status)

    def _there(self, round: int) -> SubprocessHandle:
        """Return a child that lives, started now if there was none."""
        if self._child is not None and not self._child.ended:
            return self._child
        again = self._again[1] if self._again[0] == round else 0
        if self._served and again >= self._restarts:
            raise SplitServerError(
                f"the split server was started {again} times more in round {round}, and has died "
                f"each time; {self._child.why() if self._child else 'it cannot start'}"
            )
        self._again = (round, again + self._served)
        if self._child is not None:
            self._child.stop()
        self._child = SubprocessHandle()
        try:
            self._child.start(self._settings, self._start_in)
        except BaseException:
            self._child.stop()
            raise
        log.info("split server %d listens at %s", self._child.process.pid, self._child.address)
        self._served = True
        return self._child

    def _living(self, lost: str) -> SubprocessHandle:
        """Return the child that has this round's tails; SplitServerError if it has died."""
        child = self._child
        if child is None or child.ended:
            self._lost = self._lost or (child.why() if child else "it was stopped")
        if child is None or self._lost is not None:
            raise SplitServerError(f"{lost}: the split server has died; {self._lost}")
        return child

    def _asked_to_open(
        self,
        child: SubprocessHandle,
        round: int,
        attempt: int,
        jobs: Sequence[ServerPartJob],
        merged: Adapter[Dense],
        tokens: Mapping[str, int],
        seconds: float,
    ) -> dict[str, Credentials | str]:
        wanted = {site for job in jobs for site in job.assignment.start}
        sums = [(site, dense) for site, dense in merged.items() if site in wanted]
        about = {
            "round": round,
            "attempt": attempt,
            "tokens": {job.client: tokens[job.client] for job in jobs},
            "seconds": seconds,
            "merged": len(sums),
            "jobs": [manner(job) for job in jobs],
        }
        blocks = [write_job(job) for job in jobs]
        child.send(pack("question", {"what": "open", "about": about}, {}), self._reply_in)
        for site, dense in sums:
            child.send(write_merged(site, dense), self._reply_in)
        for block in blocks:
            child.send(block, self._reply_in)
        fields = child.answer("opened", self._reply_in).fields.table("clients")
        found: dict[str, Credentials | str] = {}
        for client, one, _ in fields.named():
            try:
                found[client] = one if isinstance(one, str) else Credentials.from_dict(one)
            except FrameError as error:
                found[client] = f"the split server gave no way to its tail: {error}"
        return {job.client: found.get(job.client, "the split server forgot it") for job in jobs}

    def _ask(
        self, child: SubprocessHandle, what: str, most: int = ANSWERS.nbytes, **about: Any
    ) -> bytearray:
        """Ask a question and return the packet of its answer."""
        child.send(pack("question", {"what": what, **about}, {}), self._reply_in)
        return child.receive(self._reply_in, most)


def _statuses(block: bytearray) -> dict[str, ClientStatus]:
    found = {}
    for client, one, place in Packet(block, "status", ANSWERS).fields.table("clients").named():
        table = Fields(one, place)
        numbers = {name: table.whole(name) for name in ("step", "steps", "up", "down")}
        found[client] = ClientStatus(connected=table.flag("connected"), **numbers)
    return found
