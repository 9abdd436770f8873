"""One gRPC stream at the server: checks what its client sends, and queues what it gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Protocol

from google.protobuf.message import DecodeError
from grpc import StatusCode

from polyrank.errors import FrameError
from polyrank.transport.layout import NAME_BYTES
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.credentials import TOKEN_BYTES
from polyrank.transport.remote.sessions import NONCE_BYTES, SECRET_BYTES, SessionId, Sessions
from polyrank.transport.remote.wire import (
    HELLO_SECONDS,
    VERSION,
    FrameAssembler,
    frame_parts,
    truncated,
)

LINGER_SECONDS = 5.0
"""How long a client may take to read the end of its stream."""
MOST_ALIVE = 64
"""The most Alive messages within the seconds of silence; a client sends four."""


@dataclass(frozen=True)
class StreamLimits:
    """Limits of a welcomed client: frames without reply, bytes of a frame, seconds of silence."""

    credit: int
    longest: int
    silence: float


class StreamHandler(Protocol):
    """Receives the frames and events of streams; called from the streams' threads."""

    def admit(self, stream: ServerStream, session: SessionId) -> StreamLimits | str | None:
        """Make a stream its client's only one and return its limits.

        Returns the reason if the client's work has ended, and None if too many streams are open.
        """
        ...

    def heard(self, stream: ServerStream) -> None:
        """Note that the client has sent something."""
        ...

    def submit(self, stream: ServerStream, frame: bytes) -> None:
        """Queue a request."""
        ...

    def bye(self, stream: ServerStream, failure: str | None) -> None:
        """End the work of a client that has said Bye or broken the protocol (`failure`)."""
        ...


@dataclass(frozen=True)
class _Reply:
    frame: bytes = field(repr=False)


class ServerStream:
    """The server's end of one stream.

    `receive` handles one message and never raises, whatever it is; it belongs to the reading
    thread. `messages` yields what is to be written, and ends with the stream; it belongs to the
    writing thread. `status` is then the gRPC status for a client that was not welcomed. A client
    that does not read can block the writing thread: the stream is to be aborted after `deadline`,
    unless that is None.
    """

    def __init__(
        self,
        handler: StreamHandler,
        sessions: Sessions,
        cancel: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self.deadline: float | None = clock() + HELLO_SECONDS + LINGER_SECONDS
        self.client = ""
        self.over = False
        self.welcomed = False
        self.status: tuple[StatusCode, str] | None = None
        self.count: Callable[[int], None] = _ignore
        """Called with the bytes of each reply that is written."""
        self._handler, self._sessions, self._cancel = handler, sessions, cancel
        self._out: SimpleQueue[pb.Down | _Reply | None] = SimpleQueue()
        self._expected: Mapping[str, Callable[[pb.Up], None]] = {"hello": self._hello}
        self._lock = threading.Lock()
        self._unanswered = 0
        self._nonce = b""

    def receive(self, message: bytes) -> None:
        """Handle a message; one that breaks the protocol ends the stream."""
        if self.over:
            return
        try:
            up = pb.Up.FromString(message)
        except DecodeError:
            self._protocol_error("a message that cannot be read came")
            return
        what = up.WhichOneof("what")
        handle = self._expected.get(what or "")
        if handle is None:
            self._protocol_error(
                f"expected {' or '.join(self._expected)}; {what or 'nothing'} came"
            )
            return
        try:
            handle(up)
        except FrameError as error:
            self._protocol_error(str(error))

    def messages(self) -> Iterator[bytes]:
        """Yield what is to be written, as it comes, until the stream is over.

        A client that is not welcomed within `HELLO_SECONDS` is refused.
        """
        hello_deadline = self._clock() + HELLO_SECONDS
        while True:
            try:
                timeout = None if self.welcomed else max(0.0, hello_deadline - self._clock())
                item = self._out.get(timeout=timeout)
            except Empty:
                if not self.welcomed:  # it may have been welcomed meanwhile
                    self.refuse(StatusCode.DEADLINE_EXCEEDED, "no Hello, or no Proof, came in time")
                continue
            if item is None:
                return
            if isinstance(item, _Reply):
                for part in frame_parts(item.frame):
                    if part.last:  # the client may have read it before this generator goes on
                        with self._lock:
                            self._unanswered -= 1
                        self.count(len(item.frame))
                    yield pb.Down(part=part).SerializeToString()
            else:
                yield item.SerializeToString()

    def reply(self, frame: bytes) -> None:
        """Queue a reply to be written."""
        self._out.put(_Reply(frame))

    def end(self, reason: str | None = None) -> None:
        """End the stream after what is queued; with a reason, an Ended message is sent first."""
        with self._lock:
            if self.over:
                return
            self._finish()
        if reason is not None:
            self._out.put(pb.Down(ended=pb.Ended(reason=truncated(reason))))
        self._out.put(None)

    def abort(self) -> None:
        """Cancel the stream: a newer one has taken its place, or its client does not read."""
        self.end()
        self._cancel()

    def refuse(self, code: StatusCode, reason: str) -> None:
        """End a stream that was not welcomed, with a gRPC status."""
        with self._lock:
            if self.over:
                return
            self._finish()
            self.status = (code, truncated(reason))
        self._out.put(None)

    def _finish(self) -> None:
        self.over, self.deadline = True, self._clock() + LINGER_SECONDS

    def _hello(self, up: pb.Up) -> None:
        hello = up.hello
        if hello.version != VERSION:
            raise FrameError(f"hello, version: expected {VERSION}; {hello.version} came")
        for name, text in (("run", hello.run), ("client", hello.client)):
            length = len(text.encode())
            if not 0 < length <= NAME_BYTES:
                raise FrameError(f"hello, {name}: expected 1 to {NAME_BYTES} bytes; {length} came")
        session = SessionId(hello.run, hello.round, hello.attempt, hello.client)
        way = hello.WhichOneof("way")
        if way == "resume":
            self._nonce = self._sessions.challenge()
            self._expected = {"proof": lambda up: self._proof(session, up)}
            self._out.put(pb.Down(challenge=pb.Challenge(nonce=self._nonce)))
            return
        if way is None:
            raise FrameError("hello: expected a token or resume; neither came")
        token, secret = hello.first.token, hello.first.secret
        _check_length("hello, token", token, TOKEN_BYTES)
        _check_length("hello, secret", secret, SECRET_BYTES)
        try:
            self._sessions.redeem(session, token, secret)
        except FrameError as error:
            self.refuse(StatusCode.UNAUTHENTICATED, str(error))
            return
        self._admit(session)

    def _proof(self, session: SessionId, up: pb.Up) -> None:
        _check_length("proof", up.proof.hmac, NONCE_BYTES)
        try:
            self._sessions.prove(session, self._nonce, up.proof.hmac)
        except FrameError as error:
            self.refuse(StatusCode.NOT_FOUND, str(error))
            return
        self._admit(session)

    def _admit(self, session: SessionId) -> None:
        limits = self._handler.admit(self, session)
        if limits is None:
            self.refuse(StatusCode.RESOURCE_EXHAUSTED, "too many streams are open; try again later")
            return
        if isinstance(limits, str):
            self.end(limits)
            return
        self._assembler = FrameAssembler(limits.longest)
        self._credit, self._silence = limits.credit, limits.silence
        self._alive_count, self._counted_since = 0, self._clock()
        self._expected = {"part": self._part, "alive": self._alive, "bye": self._bye}

    def welcome(self, client: str, limits: StreamLimits) -> None:
        """Tell the client that it may send requests; called within `StreamHandler.admit`."""
        with self._lock:
            self.client, self.welcomed = client, True
            if not self.over:
                self.deadline = None
        self._out.put(
            pb.Down(
                welcome=pb.Welcome(
                    credit=limits.credit, longest=limits.longest, silence=limits.silence
                )
            )
        )

    def _part(self, up: pb.Up) -> None:
        self._handler.heard(self)
        frame = self._assembler.add(up.part)
        if frame is None:
            return
        with self._lock:
            self._unanswered += 1
            if self._unanswered > self._credit:
                raise FrameError(
                    f"expected at most {self._credit} requests without reply; more came"
                )
        self._handler.submit(self, frame)

    def _alive(self, up: pb.Up) -> None:  # noqa: ARG002
        now = self._clock()
        if now - self._counted_since > self._silence:
            self._alive_count, self._counted_since = 0, now
        self._alive_count += 1
        if self._alive_count > MOST_ALIVE:
            raise FrameError(
                f"expected at most {MOST_ALIVE} Alive in {self._silence:g} s; more came"
            )
        self._handler.heard(self)

    def _bye(self, up: pb.Up) -> None:  # noqa: ARG002
        self._handler.bye(self, None)
        self.end()

    def _protocol_error(self, what: str) -> None:
        """End the stream of a client that breaks the protocol, and its work if it was welcomed."""
        if self.welcomed:
            self._handler.bye(self, what)
            self.end(what)
        else:
            self.refuse(StatusCode.INVALID_ARGUMENT, what)


def _check_length(what: str, value: bytes, expected: int) -> None:
    if len(value) != expected:
        raise FrameError(f"{what}: expected {expected} bytes; {len(value)} came")


def _ignore(nbytes: int) -> None:
    """Do not count replies."""
