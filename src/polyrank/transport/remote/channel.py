"""The client's gRPC channel to a split server, and which of its errors are final."""

from __future__ import annotations

import grpc

from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.wire import MESSAGE_BYTES

_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
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
        (
            "grpc.compression_enabled_algorithms_bitset",
            1,
        ),  # none: a message must not grow
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 15_000),
    ]
    host = credentials.address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(credentials.address, tls, options)


def final_error(code: grpc.StatusCode | None, details: str) -> str | None:
    """Return why a new stream cannot help after this error; None if it can."""
    if any(text in details for text in _WRONG_SERVER):
        return f"it does not have the pinned certificate, or speaks no TLS: {details}"
    return details if code in _REFUSALS else None
