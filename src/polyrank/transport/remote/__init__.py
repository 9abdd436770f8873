"""Split training across machines: one gRPC stream per client, over TLS."""

from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.identity import Identity, new_identity
from polyrank.transport.remote.link import GrpcLink
from polyrank.transport.remote.server import SplitServer

__all__ = [
    "Credentials",
    "GrpcLink",
    "Identity",
    "SplitServer",
    "new_identity",
]
