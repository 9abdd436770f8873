"""The channel to a split server, and what its errors mean."""

from __future__ import annotations

import grpc

from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.wire import MESSAGE_BYTES

_REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
_ANOTHER_SERVER = (
    "CERTIFICATE_VERIFY_FAILED",
    "WRONG_VERSION_NUMBER",
    "Hostname Verification Check failed",
    "is not in peer certificate",
)
"""What gRPC says of a server that is another one than the certificate says, or speaks no TLS."""


def channel(access: Credentials) -> grpc.Channel:
    """Return a channel of its own to the server, over TLS, that trusts its certificate alone."""
    credentials = grpc.ssl_channel_credentials(root_certificates=access.certificate)
    options = [
        ("grpc.use_local_subchannel_pool", 1),  # no connection or pause is shared between links
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is small must not grow
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 15_000),
    ]
    host = access.address.rpartition(":")[0].strip("[]")
    if host in ("localhost", "::1") or host.startswith("127."):
        options.append(("grpc.enable_http_proxy", 0))
    return grpc.secure_channel(access.address, credentials, options)


def hopeless(code: grpc.StatusCode | None, details: str) -> str | None:
    """Return why there is no use in trying again after a stream has ended so; None if there is."""
    if any(words in details for words in _ANOTHER_SERVER):
        return f"it is not the server of the certificate in the order, or speaks no TLS: {details}"
    return details if code in _REFUSALS else None
