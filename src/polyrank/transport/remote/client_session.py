"""A client's session with a split server: channel, authentication, and which errors end it."""

from __future__ import annotations

import os

import grpc

from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.sessions import SECRET_BYTES, SessionId, proof
from polyrank.transport.remote.wire import MESSAGE_BYTES, new_hello

_FINAL_CODES = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
_WRONG_SERVER = (
    "CERTIFICATE_VERIFY_FAILED",
    "WRONG_VERSION_NUMBER",
    "Hostname Verification Check failed",
    "is not in peer certificate",
)
"""Parts of gRPC's messages about a server without the pinned certificate, or without TLS."""


def new_channel(credentials: Credentials) -> grpc.Channel:
    """Return a new channel to the server, over TLS, that trusts its certificate alone."""
    tls = grpc.ssl_channel_credentials(root_certificates=credentials.certificate)
    options = [
        ("grpc.use_local_subchannel_pool", 1),  # links share no connection and no back-off
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: messages must not grow
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 15_000),
    ]
    host = credentials.address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(credentials.address, tls, options)


class ClientSession:
    """Authenticates a client's streams: with its token first, with the session's secret later.

    `welcomed` is to be set once the server has welcomed the client. Not thread-safe.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.id = SessionId(
            credentials.run, credentials.round, credentials.attempt, credentials.client
        )
        self.welcomed = False
        self._token, self._secret = credentials.token, os.urandom(SECRET_BYTES)
        self._tokens_sent = 0
        self._last_chance = False

    def first_hello(self) -> pb.Hello:
        """Return a Hello with the token and a secret for later streams."""
        self._tokens_sent += 1
        hello = new_hello(self.id.run, self.id.round, self.id.attempt, self.id.client)
        hello.first.token, hello.first.secret = self._token, self._secret
        return hello

    def resuming_hello(self) -> pb.Hello:
        """Return a Hello that asks for a challenge."""
        hello = new_hello(self.id.run, self.id.round, self.id.attempt, self.id.client)
        hello.resume.SetInParent()
        return hello

    def proof(self, nonce: bytes) -> pb.Proof:
        """Return the proof that answers a challenge."""
        return pb.Proof(hmac=proof(self._secret, nonce, self.id))

    def resumes_after(
        self, resumed: bool, code: grpc.StatusCode | None, details: str
    ) -> tuple[bool, str | None]:
        """Return whether the next stream is to resume, and why none can help, if none can.

        `resumed` says whether the last stream asked to resume, `code` and `details` how it ended.
        """
        if code is grpc.StatusCode.NOT_FOUND:
            return False, details if self.welcomed or self._last_chance else None
        if code is grpc.StatusCode.UNAUTHENTICATED:
            # A token that was sent before may have been accepted.
            final = resumed or self._tokens_sent < 2 or self._last_chance
            self._last_chance = True
            return True, details if final else None
        reason = details if code in _FINAL_CODES else None
        if any(text in details for text in _WRONG_SERVER):
            reason = f"it does not have the pinned certificate, or speaks no TLS: {details}"
        return self._tokens_sent > 0, reason
