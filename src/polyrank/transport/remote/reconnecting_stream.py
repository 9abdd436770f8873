"""Frames to a split server and back, over streams that are made anew when they break."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError

from polyrank.errors import FrameError
from polyrank.training.split.link import Traffic
from polyrank.transport.layout import LONGEST_WAIT
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.channel import channel, hopeless
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.sessions import NONCE_BYTES, SECRET_BYTES, Work, proof
from polyrank.transport.remote.wire import METHOD, Joined, first_words, parts

_SOONEST, _LATEST = 0.05, 2.0
"""Seconds until a broken stream is tried again: doubled each time, from and up to."""
_GOODBYE = 2.0
"""The most seconds that saying Bye may take."""
_SHORTEST = 0.01
"""The fewest seconds of silence that a server may ask for: four Alive are sent in them."""


@dataclass(eq=False)
class _Stream:
    """One stream of a line. `sent` of the frames without reply went out on it."""

    resumes: bool
    joined: Joined
    call: grpc.Call | None = None
    nonce: bytes | None = None
    credit: int = 0
    silence: float = 0.0
    sent: int = 0
    said_bye: bool = False
    over: bool = False


class ReconnectingStream:
    """Sends frames in order and takes in one reply for each, across breaks.

    A thread connects, and takes replies in; gRPC's own asks `_messages` for what to send.
    """

    def __init__(self, access: Credentials) -> None:
        self.access = access
        self._work = Work(access.run, access.round, access.attempt, access.client)
        self._secret = os.urandom(SECRET_BYTES)
        self._changed = threading.Condition()
        self._unanswered: deque[bytes] = deque()
        self._replies: deque[bytes] = deque()
        self._credit = 1
        self._stream = self._new_stream(resumes=False)
        self._hellos = 0
        """How often the token was sent."""
        self._known = False
        """Whether the server has welcomed this client."""
        self._last_chance = False
        self._closing = False
        self._dead = False
        self._failure: str | None = None
        self._state = "it could not be reached yet"
        self._progress = time.monotonic()
        self._lost: float | None = None
        """Since when a client that was welcome has had no stream."""
        self._silence = 0.0
        self._up = self._down = 0
        self._thread = threading.Thread(
            target=self._run, name=f"split link of {access.client}", daemon=True
        )
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Have a frame sent; waits while as many are without reply as may be."""
        since = time.monotonic()
        with self._changed:
            while len(self._unanswered) >= self._credit and self._failure is None:
                self._wait(since)
            if self._failure is not None:
                raise FrameError(f"{self._failure}; open a new one")
            self._unanswered.append(frame)
            self._changed.notify_all()

    def receive(self, since: float) -> bytes:
        """Wait for the next reply; FrameError if the line has failed."""
        with self._changed:
            while not self._replies and self._failure is None:
                self._wait(since)
            if not self._replies:
                raise FrameError(self._failure)
            return self._replies.popleft()

    @property
    def traffic(self) -> Traffic:
        """The bytes of all frames as they were sent and came."""
        with self._changed:
            return Traffic(self._up, self._down)

    def close(self) -> None:
        """Say Bye within 2 s, and end."""
        with self._changed:
            self._closing = True
            hears = self._failure is None or self._stream.credit > 0
            self._changed.notify_all()
        if hears:
            self._thread.join(_GOODBYE)
        with self._changed:
            self._dead = self._stream.over = True
            call = self._stream.call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        self._thread.join(_GOODBYE)

    def _new_stream(self, resumes: bool) -> _Stream:
        return _Stream(resumes, Joined(self.access.limits.nbytes))

    def _wait(self, since: float) -> None:
        """Wait for a change; the line fails once patience is at its end.

        A server that could not be reached for as long as it waits for silent clients has given
        this one up.
        """
        now = time.monotonic()
        left = max(since, self._progress) + self.access.patience - now
        seconds = self.access.patience
        if self._lost is not None and self._lost + self._silence - now < left:
            left, seconds = self._lost + self._silence - now, self._silence
        if left > 0:
            self._changed.wait(left)
        else:
            self._failure = (
                f"nothing came from the split server at {self.access.address} for {seconds:g} s: "
                f"{self._state}"
            )

    def _fail(self, reason: str) -> None:
        """Give up: there is no use in trying again."""
        self._failure = self._failure or f"the split server at {self.access.address}: {reason}"
        self._dead = True
        self._changed.notify_all()

    def _run(self) -> None:
        pause = _SOONEST
        while True:
            stream = self._stream
            ended = self._carry(stream)
            with self._changed:
                if self._dead or (stream.said_bye and ended):
                    return
                closing = self._closing
                soon = closing or stream.credit
                pause = _SOONEST if soon else min(_LATEST, 2 * pause)
                self._changed.wait_for(
                    lambda: self._dead or self._closing > closing,  # noqa: B023
                    pause * random.uniform(0.5, 1.0),
                )
                if self._dead:
                    return

    def _carry(self, stream: _Stream) -> bool:
        """Carry one stream, and say whether the server ended it in order; make the next one."""
        error = None
        dialled = channel(self.access)
        try:
            call = dialled.stream_stream(METHOD)(self._messages(stream))
            with self._changed:
                stream.call = call
                if self._dead:
                    return False
            for message in call:
                with self._changed:
                    self._take(stream, message)
                    self._changed.notify_all()
                    if self._dead:
                        break
        except grpc.RpcError as raised:
            error = raised
        finally:
            with self._changed:
                stream.over = True
                if self._known and self._lost is None:
                    self._lost = time.monotonic()
                self._changed.notify_all()
            dialled.close()
        with self._changed:
            if self._dead:
                return error is None
            resumes = self._resumes(stream, error)
            if not self._dead:
                self._stream = self._new_stream(resumes)
            self._changed.notify_all()
        return error is None

    def _resumes(self, stream: _Stream, error: grpc.RpcError | None) -> bool:
        """Say whether the next stream is to resume, after this one has ended."""
        code = None if error is None else error.code()
        details = "" if error is None else error.details() or ""
        self._state = (
            f"the last stream ended with {code.name}: {details}"
            if code
            else ("the last stream was closed by the server")
        )
        if code is grpc.StatusCode.NOT_FOUND:
            if self._known or self._last_chance:
                self._fail(details)
            return False
        if code is grpc.StatusCode.UNAUTHENTICATED:
            # A token that was sent before may have been redeemed after all.
            if stream.resumes or self._hellos < 2 or self._last_chance:
                self._fail(details)
            self._last_chance = True
            return True
        if (why := hopeless(code, details)) is not None:
            self._fail(why)
        return self._hellos > 0

    def _take(self, stream: _Stream, message: bytes) -> None:
        """Judge a message of the server and act on it."""
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
            if down.welcome.credit > 0 and _SHORTEST <= down.welcome.silence <= LONGEST_WAIT:
                self._known = True
                self._state = "it is connected, and has not answered"
                self._silence = stream.silence = down.welcome.silence
                self._lost = None
                self._credit = stream.credit = down.welcome.credit
                return
        elif what == "part" and stream.credit:
            self._take_part(stream, down.part)
            return
        elif what == "ended":
            self._fail(f"it has ended the work: {down.ended.reason}")
            return
        self._fail(f"a message that is not due came: {what}")

    def _take_part(self, stream: _Stream, part: pb.Part) -> None:
        self._progress = time.monotonic()
        try:
            frame = stream.joined.add(part)
        except FrameError as error:
            self._fail(str(error))
            return
        if frame is None:
            return
        if not stream.sent:
            self._fail("a reply came to what was not asked")
            return
        stream.sent -= 1
        self._unanswered.popleft()
        self._replies.append(frame)
        self._down += len(frame)

    def _messages(self, stream: _Stream) -> Iterator[bytes]:
        """Give what is to be sent on a stream, as it is due."""
        access = self.access
        hello = first_words(access.run, access.round, access.attempt, access.client)
        if stream.resumes:
            hello.resume.SetInParent()
            yield pb.Up(hello=hello).SerializeToString()
            if not self._until(stream, lambda: stream.nonce is not None):
                return
            hmac = proof(self._secret, stream.nonce or b"", self._work)
            yield pb.Up(proof=pb.Proof(hmac=hmac)).SerializeToString()
        else:
            with self._changed:
                self._hellos += 1
            hello.first.token, hello.first.secret = access.token, self._secret
            yield pb.Up(hello=hello).SerializeToString()
        if not self._until(stream, lambda: stream.credit > 0):
            return
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: stream.over or self._dead or self._closing or self._next(stream),
                    stream.silence / 4,
                )
                if stream.over or self._dead:
                    return
                if self._closing:
                    break
                frame = self._next(stream)
            if frame is None:
                yield pb.Up(alive=pb.Alive()).SerializeToString()
                continue
            for part in parts(frame):
                with self._changed:
                    if stream.over or self._closing:
                        break
                    if part.last:  # its reply may come before this generator goes on
                        stream.sent += 1
                        self._up += len(frame)
                yield pb.Up(part=part).SerializeToString()
        stream.said_bye = True
        yield pb.Up(bye=pb.Bye()).SerializeToString()

    def _next(self, stream: _Stream) -> bytes | None:
        """Return the oldest frame that was not sent on this stream."""
        if stream.sent < min(len(self._unanswered), stream.credit):
            return self._unanswered[stream.sent]
        return None

    def _until(self, stream: _Stream, reached: Callable[[], bool]) -> bool:
        """Wait until something is reached; False if the stream ends before."""
        with self._changed:
            self._changed.wait_for(lambda: reached() or stream.over or self._dead)
            return reached() and not (stream.over or self._dead)
