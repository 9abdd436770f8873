"""One stream at the server: what its client sends is judged here, and what it gets waits here."""

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
from polyrank.transport.remote.sessions import NONCE_BYTES, SECRET_BYTES, Sessions, Work
from polyrank.transport.remote.wire import HELLO_SECONDS, VERSION, Joined, parts, shortened

LINGER_SECONDS = 5.0
"""How long a client may take to read that its stream is over."""
ALIVES = 64
"""The most Alive within the seconds of silence; a client sends four."""


@dataclass(frozen=True)
class Terms:
    """What a welcomed client may do: frames without reply, bytes of a frame, seconds of silence."""

    credit: int
    longest: int
    silence: float


class Floor(Protocol):
    """Where the frames of welcomed streams go; called from the streams' threads."""

    def enter(self, stream: ServerStream, work: Work) -> Terms | str | None:
        """Take a stream in as its client's only one; why the work is over; None without room."""
        ...

    def heard(self, stream: ServerStream) -> None:
        """Take note that something came."""
        ...

    def add(self, stream: ServerStream, frame: bytes) -> None:
        """Take in a request."""
        ...

    def bye(self, stream: ServerStream, failure: str | None) -> None:
        """Take note that the client leaves for good, or is put out for a reason."""
        ...


@dataclass(frozen=True)
class _Reply:
    frame: bytes = field(repr=False)


class ServerStream:
    """What one stream brings and gets.

    `take` judges one message and never raises, whatever it is; it belongs to the thread that reads.
    `messages` gives what is to be written, and ends with the stream; it belongs to the thread that
    writes. `status` is then what the client is to be told, if it was not welcomed. That thread may
    be held up by a client that does not read: after `until`, where it is not None, the stream is to
    be cut.
    """

    def __init__(
        self,
        floor: Floor,
        sessions: Sessions,
        cancel: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self.until: float | None = clock() + HELLO_SECONDS + LINGER_SECONDS
        self.client = ""
        self.over = False
        self.welcomed = False
        self.status: tuple[StatusCode, str] | None = None
        self.count: Callable[[int], None] = _nothing  # of replies as they are written: their bytes
        self._floor, self._sessions, self._cancel = floor, sessions, cancel
        self._out: SimpleQueue[pb.Down | _Reply | None] = SimpleQueue()
        self._due: Mapping[str, Callable[[pb.Up], None]] = {"hello": self._hello}
        self._lock = threading.Lock()
        self._unanswered = 0
        self._nonce = b""

    def take(self, message: bytes) -> None:
        """Judge a message and act on it; what breaks the protocol ends the stream."""
        if self.over:
            return
        try:
            up = pb.Up.FromString(message)
        except DecodeError:
            self._break("a message that cannot be read came")
            return
        what = up.WhichOneof("what")
        act = self._due.get(what or "")
        if act is None:
            self._break(f"expected {' or '.join(self._due)}; {what or 'nothing'} came")
            return
        try:
            act(up)
        except FrameError as error:
            self._break(str(error))

    def messages(self) -> Iterator[bytes]:
        """Give what is to be written, as it comes, until the stream is over.

        A client that is not welcome after 5 seconds is sent away.
        """
        deadline = self._clock() + HELLO_SECONDS
        while True:
            try:
                timeout = None if self.welcomed else max(0.0, deadline - self._clock())
                item = self._out.get(timeout=timeout)
            except Empty:
                if not self.welcomed:  # it may have been in the meantime
                    self.refuse(StatusCode.DEADLINE_EXCEEDED, "no Hello, or no Proof, came in time")
                continue
            if item is None:
                return
            if isinstance(item, _Reply):
                for part in parts(item.frame):
                    if part.last:  # the client may have read it before this generator goes on
                        with self._lock:
                            self._unanswered -= 1
                        self.count(len(item.frame))
                    yield pb.Down(part=part).SerializeToString()
            else:
                yield item.SerializeToString()

    def reply(self, frame: bytes) -> None:
        """Have a reply written."""
        self._out.put(_Reply(frame))

    def end(self, reason: str | None = None) -> None:
        """End the stream after what waits to be written: with Ended, or quietly without reason."""
        with self._lock:
            if self.over:
                return
            self._finish()
        if reason is not None:
            self._out.put(pb.Down(ended=pb.Ended(reason=shortened(reason))))
        self._out.put(None)

    def cut(self) -> None:
        """Break the stream off: a newer one has taken its place, or nobody reads it."""
        self.end()
        self._cancel()

    def refuse(self, code: StatusCode, reason: str) -> None:
        """End a stream that is not welcome."""
        with self._lock:
            if self.over:
                return
            self._finish()
            self.status = (code, shortened(reason))
        self._out.put(None)

    def _finish(self) -> None:
        self.over, self.until = True, self._clock() + LINGER_SECONDS

    def _hello(self, up: pb.Up) -> None:
        hello = up.hello
        if hello.version != VERSION:
            raise FrameError(f"hello, version: expected {VERSION}; {hello.version} came")
        for name, text in (("run", hello.run), ("client", hello.client)):
            length = len(text.encode())
            if not 0 < length <= NAME_BYTES:
                raise FrameError(f"hello, {name}: expected 1 to {NAME_BYTES} bytes; {length} came")
        work = Work(hello.run, hello.round, hello.attempt, hello.client)
        way = hello.WhichOneof("way")
        if way == "resume":
            self._nonce = self._sessions.challenge()
            self._due = {"proof": lambda up: self._proof(work, up)}
            self._out.put(pb.Down(challenge=pb.Challenge(nonce=self._nonce)))
            return
        if way is None:
            raise FrameError("hello: expected a token or resume; neither came")
        token, secret = hello.first.token, hello.first.secret
        _check_length("hello, token", token, TOKEN_BYTES)
        _check_length("hello, secret", secret, SECRET_BYTES)
        try:
            self._sessions.redeem(work, token, secret)
        except FrameError as error:
            self.refuse(StatusCode.UNAUTHENTICATED, str(error))
            return
        self._enter(work)

    def _proof(self, work: Work, up: pb.Up) -> None:
        _check_length("proof", up.proof.hmac, NONCE_BYTES)
        try:
            self._sessions.prove(work, self._nonce, up.proof.hmac)
        except FrameError as error:
            self.refuse(StatusCode.NOT_FOUND, str(error))
            return
        self._enter(work)

    def _enter(self, work: Work) -> None:
        terms = self._floor.enter(self, work)
        if terms is None:
            self.refuse(StatusCode.RESOURCE_EXHAUSTED, "too many streams are open; try again later")
            return
        if isinstance(terms, str):
            self.end(terms)
            return
        self._joined = Joined(terms.longest)
        self._credit, self._silence = terms.credit, terms.silence
        self._alives, self._counted_since = 0, self._clock()
        self._due = {"part": self._part, "alive": self._alive, "bye": self._bye}

    def welcome(self, client: str, terms: Terms) -> None:
        """Tell the client that its requests may come; called within `Floor.enter`."""
        with self._lock:
            self.client, self.welcomed = client, True
            if not self.over:
                self.until = None
        self._out.put(
            pb.Down(
                welcome=pb.Welcome(
                    credit=terms.credit, longest=terms.longest, silence=terms.silence
                )
            )
        )

    def _part(self, up: pb.Up) -> None:
        self._floor.heard(self)
        frame = self._joined.add(up.part)
        if frame is None:
            return
        with self._lock:
            self._unanswered += 1
            if self._unanswered > self._credit:
                raise FrameError(
                    f"expected at most {self._credit} requests without reply; more came"
                )
        self._floor.add(self, frame)

    def _alive(self, up: pb.Up) -> None:  # noqa: ARG002
        now = self._clock()
        if now - self._counted_since > self._silence:
            self._alives, self._counted_since = 0, now
        self._alives += 1
        if self._alives > ALIVES:
            raise FrameError(f"expected at most {ALIVES} Alive in {self._silence:g} s; more came")
        self._floor.heard(self)

    def _bye(self, up: pb.Up) -> None:  # noqa: ARG002
        self._floor.bye(self, None)
        self.end()

    def _break(self, what: str) -> None:
        """End the stream of a client that breaks the protocol, and its work if it is welcome."""
        if self.welcomed:
            self._floor.bye(self, what)
            self.end(what)
        else:
            self.refuse(StatusCode.INVALID_ARGUMENT, what)


def _check_length(what: str, value: bytes, expected: int) -> None:
    if len(value) != expected:
        raise FrameError(f"{what}: expected {expected} bytes; {len(value)} came")


def _nothing(nbytes: int) -> None:
    """Count nothing: nobody has asked for it."""
