"""Links between two processes of one machine, over connections of `multiprocessing`.

Only bytes pass, by `send_bytes` and `recv_bytes`: nothing is pickled. Both ends must be of one
`Pipe()` (duplex), and each process must close its copy of the other's end, or it will never see
that the other has gone. The other process is trusted to finish a frame that it has begun: half a
frame makes its reader wait.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart, Traffic
from polyrank.training.split.messages import Request, Returned, Stepped
from polyrank.transport.awaited import Awaited, write_request
from polyrank.transport.layout import Limits
from polyrank.transport.serving import Serving


def serve_pipe(tail: ServerPart, connections: Mapping[str, Connection], limits: Limits) -> None:
    """Answer the requests of all clients until every connection is closed.

    Requests that are there together go to the tail in one call, one of each client; none waits for
    others unless the tail says so. A client whose connection breaks leaves, and the others go on. A
    malformed frame is refused, and its connection goes on; one that is longer than `limits` allow
    is refused too, but ends its connection, for what follows it cannot be read. The connections are
    closed at the end, also when the tail raises.
    """
    serving = Serving(tail, limits)
    clients: dict[object, str] = {connection: client for client, connection in connections.items()}
    try:
        while clients:
            frames: dict[str, bytes] = {}
            for ready in wait([connections[client] for client in clients.values()]):
                client = clients[ready]
                try:
                    frames[client] = connections[client].recv_bytes(limits.nbytes)
                except (EOFError, OSError):
                    _end(serving, client, connections[client], limits)
                    del clients[ready]
            while replies := serving.answer(frames):
                frames = {}
                for client, reply in replies:
                    connection = connections[client]
                    try:
                        connection.send_bytes(reply)
                    except OSError:  # it has gone while its answer was made
                        if connection in clients:
                            _end(serving, client, connection, limits)
                            del clients[connection]
    finally:
        for connection in connections.values():
            connection.close()


def _end(serving: Serving, client: str, connection: Connection, limits: Limits) -> None:
    """Give up a connection that has ended, or whose next frame is too long to be read."""
    if not connection.readable:  # that is how `recv_bytes` leaves it after too long a frame
        reason = f"frame, length: expected at most {limits.nbytes} bytes; more came"
        with suppress(OSError):  # it may have gone as well
            connection.send_bytes(serving.refuse(client, f"{reason}; the connection is closed"))
    connection.close()
    serving.leave(client)


class PipeLink:
    """A client's link to `serve_pipe` at the other end of a connection.

    A thread takes the answers in as they come, so that the two ends never wait for each other to
    read; all else is to be used from one thread. The connection is closed with the link.
    """

    def __init__(self, connection: Connection, client: str, limits: Limits) -> None:
        self.client = client
        self.limits = limits
        self._connection = connection
        self._waiting: deque[PipeTicket] = deque()
        self._frames: SimpleQueue[bytes | str] = SimpleQueue()
        self._ended: str | None = None
        self._up = 0
        self._down = 0
        self._wake, self._woken = Pipe(duplex=False)
        self._reader = threading.Thread(
            target=_take_in,
            args=(connection, self._wake, self._frames, limits.nbytes),
            name=f"answers to {client}",
            daemon=True,
        )
        self._reader.start()

    def submit(self, request: Request) -> PipeTicket:
        """Encode a request and send it; FrameError if it cannot be sent, or after `close`."""
        if self._ended is not None:
            raise FrameError(f"{request.at}: {self._ended}; open a new one")
        frame = write_request(request, self.limits)
        try:
            self._connection.send_bytes(frame)
        except OSError as error:
            raise FrameError(f"{request.at}: the pipe to the server is broken: {error}") from error
        self._up += len(frame)
        ticket = PipeTicket(self, Awaited.of(request))
        self._waiting.append(ticket)
        return ticket

    @property
    def traffic(self) -> Traffic:
        """The bytes of all requests that were sent and all replies that were waited for."""
        return Traffic(self._up, self._down)

    def receive(self) -> None:
        """Wait for the next reply and give it to the oldest request that has none."""
        if self._ended is None:
            frame = self._frames.get()
            if isinstance(frame, bytes):
                self._down += len(frame)
                if self._waiting:
                    self._waiting.popleft().deliver(frame)
                return
            self._ended = frame
        for ticket in self._waiting:
            ticket.fail(self._ended)
        self._waiting.clear()

    def close(self) -> None:
        """Give the link up; the server discards the tail of unfinished work."""
        if self._connection.closed:
            return
        self._ended = "the link is closed"
        self._woken.send_bytes(b"close")
        self._reader.join()
        for end in (self._connection, self._wake, self._woken):
            end.close()


class PipeTicket:
    """An answer that is on its way through a `PipeLink`."""

    def __init__(self, link: PipeLink, awaited: Awaited) -> None:
        self._link = link
        self._awaited = awaited
        self._reply: bytes | None = None
        self._failure: str | None = None
        self._answer: Returned | Stepped | None = None

    def deliver(self, reply: bytes) -> None:
        """Keep the reply until it is asked for."""
        self._reply = reply

    def fail(self, reason: str) -> None:
        """Say that no reply will come."""
        self._failure = reason

    def result(self) -> Returned | Stepped:
        """Wait for the answer and return it."""
        if self._answer is None:
            while self._reply is None and self._failure is None:
                self._link.receive()
            if self._reply is None:
                raise FrameError(f"{self._awaited.at}: no answer came: {self._failure}")
            self._answer = self._awaited.read(self._reply, self._link.limits)
            self._reply = b""
        return self._answer


def _take_in(
    connection: Connection, wake: Connection, frames: SimpleQueue[bytes | str], longest: int
) -> None:
    """Put every frame that comes into the queue, then the reason why no more will come."""
    while True:
        ready = wait([connection, wake])
        if wake in ready:
            return
        try:
            frames.put(connection.recv_bytes(longest))
        except EOFError:
            frames.put("the server has closed the pipe")
            return
        except OSError as error:
            frames.put(f"the pipe to the server is broken: {error}")
            return
