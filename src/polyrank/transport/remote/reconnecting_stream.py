"""Frames to a split server and back, over a gRPC stream that is opened again when it breaks."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.settings import LONGEST_WAIT
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.client_session import ClientSession, new_channel
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.sessions import NONCE_BYTES
from polyrank.transport.remote.wire import METHOD, FrameAssembler, frame_parts

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds until a broken stream is opened again; the pause doubles up to the longest."""
_BYE_SECONDS = 2.0
"""The most seconds that saying Bye may take."""
_LEAST_SILENCE = 0.01
"""The fewest seconds of silence that a server may set: four Alive are sent in them."""


@dataclass(eq=False)
class _Stream:
    """One gRPC stream, on which `sent` of the frames without reply were sent."""

    resumes: bool
    assembler: FrameAssembler
    call: grpc.Call | None = None
    nonce: bytes | None = None
    credit: int = 0
    silence: float = 0.0
    sent: int = 0
    said_bye: bool = False
    over: bool = False


class ReconnectingStream:
    """Sends frames in order and receives one reply for each, across broken connections.

    A thread connects and receives replies; a thread of gRPC takes what to send from `_messages`.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self._session = ClientSession(credentials)
        self._changed = threading.Condition()
        self._unanswered: deque[bytes] = deque()
        self._replies: deque[bytes] = deque()
        self._credit = 1
        self._stream = self._new_stream(resumes=False)
        self._closing = False
        self._stopped = False
        self._failure: str | None = None
        self._state = "it could not be reached yet"
        self._progress = time.monotonic()
        self._disconnected: float | None = None
        """When a welcomed client lost its stream; None while it has one."""
        self._silence = 0.0
        self._up = self._down = 0
        self._thread = threading.Thread(
            target=self._run, name=f"split link of {credentials.client}", daemon=True
        )
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Queue a frame to be sent; waits while the server's credit is used up."""
        since = time.monotonic()
        with self._changed:
            while len(self._unanswered) >= self._credit and self._failure is None:
                self._wait(since)
            if self._failure is not None:
                raise FrameError(f"{self._failure}; open a new one")
            self._unanswered.append(frame)
            self._changed.notify_all()

    def receive(self, since: float) -> bytes:
        """Wait for the next reply; FrameError if the connection has failed for good."""
        with self._changed:
            while not self._replies and self._failure is None:
                self._wait(since)
            if not self._replies:
                raise FrameError(self._failure)
            return self._replies.popleft()

    @property
    def traffic(self) -> WireBytes:
        """The bytes of all frames, sent and received."""
        with self._changed:
            return WireBytes(self._up, self._down)

    def close(self) -> None:
        """Say Bye within `_BYE_SECONDS`, and end."""
        with self._changed:
            self._closing = True
            can_say_bye = self._failure is None or self._stream.credit > 0
            self._changed.notify_all()
        if can_say_bye:
            self._thread.join(_BYE_SECONDS)
        with self._changed:
            self._stopped = self._stream.over = True
            call = self._stream.call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        self._thread.join(_BYE_SECONDS)

    def _new_stream(self, resumes: bool) -> _Stream:
        return _Stream(resumes, FrameAssembler(self.credentials.limits.nbytes))

    def _wait(self, since: float) -> None:
        """Wait for a change; fail if none has come within the patience.

        A server that was out of reach for longer than its limit of silence has given this client
        up.
        """
        now = time.monotonic()
        left = max(since, self._progress) + self.credentials.patience - now
        seconds = self.credentials.patience
        if self._disconnected is not None and self._disconnected + self._silence - now < left:
            left, seconds = self._disconnected + self._silence - now, self._silence
        if left > 0:
            self._changed.wait(left)
        else:
            self._failure = (
                f"nothing came from the split server at {self.credentials.address} for "
                f"{seconds:g} s: {self._state}"
            )

    def _fail(self, reason: str) -> None:
        """Fail for good."""
        self._failure = self._failure or f"the split server at {self.credentials.address}: {reason}"
        self._stopped = True
        self._changed.notify_all()

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            stream = self._stream
            ended = self._run_stream(stream)
            with self._changed:
                if self._stopped or (stream.said_bye and ended):
                    return
                closing = self._closing
                soon = closing or stream.credit
                pause = _FIRST_PAUSE if soon else min(_LONGEST_PAUSE, 2 * pause)
                self._changed.wait_for(
                    lambda: self._stopped or self._closing > closing,  # noqa: B023
                    pause * random.uniform(0.5, 1.0),
                )
                if self._stopped:
                    return

    def _run_stream(self, stream: _Stream) -> bool:
        """Run one stream to its end and prepare the next; return whether the server closed it."""
        error = None
        channel = new_channel(self.credentials)
        try:
            call = channel.stream_stream(METHOD)(self._messages(stream))
            with self._changed:
                stream.call = call
                if self._stopped:
                    return False
            for message in call:
                with self._changed:
                    self._receive(stream, message)
                    self._changed.notify_all()
                    if self._stopped:
                        break
        except grpc.RpcError as raised:
            error = raised
        finally:
            with self._changed:
                stream.over = True
                if self._session.welcomed and self._disconnected is None:
                    self._disconnected = time.monotonic()
                self._changed.notify_all()
            channel.close()
        with self._changed:
            if self._stopped:
                return error is None
            resumes = self._next_resumes(stream, error)
            if not self._stopped:
                self._stream = self._new_stream(resumes)
            self._changed.notify_all()
        return error is None

    def _next_resumes(self, stream: _Stream, error: grpc.RpcError | None) -> bool:
        """Return whether the next stream resumes the session, after this one has ended."""
        code = None if error is None else error.code()
        details = "" if error is None else error.details() or ""
        self._state = (
            f"the last stream ended with {code.name}: {details}"
            if code
            else ("the last stream was closed by the server")
        )
        resumes, final = self._session.resumes_after(stream.resumes, code, details)
        if final is not None:
            self._fail(final)
        return resumes

    def _receive(self, stream: _Stream, message: bytes) -> None:
        """Handle a message of the server."""
        try:
            down = pb.Down.FromString(message)
        except DecodeError:
            self._fail("a message that cannot be read came")
            return
        what = down.WhichOneof("what")
        if what == "challenge" and stream.nonce is None and stream.resumes:
            if len(down.challenge.nonce) == NONCE_BYTES:
                stream.nonce = down.challenge.nonce
                return
        elif what == "welcome" and not stream.credit:
            if down.welcome.credit > 0 and _LEAST_SILENCE <= down.welcome.silence <= LONGEST_WAIT:
                self._session.welcomed = True
                self._state = "it is connected, and has not answered"
                self._silence = stream.silence = down.welcome.silence
                self._disconnected = None
                self._credit = stream.credit = down.welcome.credit
                return
        elif what == "part" and stream.credit:
            self._receive_part(stream, down.part)
            return
        elif what == "ended":
            self._fail(f"it has ended the work: {down.ended.reason}")
            return
        self._fail(f"a message that is not due came: {what}")

    def _receive_part(self, stream: _Stream, part: pb.Part) -> None:
        self._progress = time.monotonic()
        try:
            frame = stream.assembler.add(part)
        except FrameError as error:
            self._fail(str(error))
            return
        if frame is None:
            return
        if not stream.sent:
            self._fail("a reply came without a request")
            return
        stream.sent -= 1
        self._unanswered.popleft()
        self._replies.append(frame)
        self._down += len(frame)

    def _messages(self, stream: _Stream) -> Iterator[bytes]:
        """Yield what is to be sent on a stream, when it is due."""
        if stream.resumes:
            yield pb.Up(hello=self._session.resuming_hello()).SerializeToString()
            if not self._wait_until(stream, lambda: stream.nonce is not None):
                return
            yield pb.Up(proof=self._session.proof(stream.nonce or b"")).SerializeToString()
        else:
            with self._changed:
                hello = self._session.first_hello()
            yield pb.Up(hello=hello).SerializeToString()
        if not self._wait_until(stream, lambda: stream.credit > 0):
            return
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: stream.over or self._stopped or self._closing or self._next(stream),
                    stream.silence / 4,
                )
                if stream.over or self._stopped:
                    return
                if self._closing:
                    break
                frame = self._next(stream)
            if frame is None:
                yield pb.Up(alive=pb.Alive()).SerializeToString()
                continue
            for part in frame_parts(frame):
                with self._changed:
                    if stream.over or self._closing:
                        break
                    if part.last:  # its reply may come before this generator resumes
                        stream.sent += 1
                        self._up += len(frame)
                yield pb.Up(part=part).SerializeToString()
        stream.said_bye = True
        yield pb.Up(bye=pb.Bye()).SerializeToString()

    def _next(self, stream: _Stream) -> bytes | None:
        """Return the oldest frame without reply that was not sent on this stream."""
        if stream.sent < min(len(self._unanswered), stream.credit):
            return self._unanswered[stream.sent]
        return None

    def _wait_until(self, stream: _Stream, holds: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False if the stream ends before."""
        with self._changed:
            self._changed.wait_for(lambda: holds() or stream.over or self._stopped)
            return holds() and not (stream.over or self._stopped)
