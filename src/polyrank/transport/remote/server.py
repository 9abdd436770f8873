"""The gRPC split server: clients' streams over TLS, and server parts called on one thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TypeVar

import grpc

from polyrank.errors import FrameError
from polyrank.planning.traffic import WireBytes
from polyrank.training.split.link import ServerPart
from polyrank.transport.layout import FrameLimits
from polyrank.transport.remote.admission import AdmissionControl
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.identity import Identity
from polyrank.transport.remote.scheduler import Scheduler
from polyrank.transport.remote.server_stream import ServerStream, StreamLimits
from polyrank.transport.remote.sessions import SessionId, Sessions
from polyrank.transport.remote.wire import MESSAGE_BYTES, SERVICE
from polyrank.transport.serving import ServingSettings

T = TypeVar("T")

UNAUTHENTICATED = 32
"""The most open streams of clients that are not authenticated yet."""


class SplitServer:
    """Serves one round at a time to split clients on other machines.

    It binds to exactly `address` (host:port; port 0 picks a free port) and speaks TLS only, with
    `identity`. Clients dial `advertise` (host, or host:port), by default the bound address.
    `clock` is in seconds. As a context manager it starts on entering and stops on leaving.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        run: str,
        settings: ServingSettings | None = None,
        *,
        advertise: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._identity, self._run = address, identity, run
        self._settings = settings or ServingSettings()
        self._advertise = advertise
        self._sessions = Sessions(clock)
        self._scheduler = Scheduler(clock, self._settings.streams)
        self._admission = AdmissionControl(UNAUTHENTICATED)
        self._server: grpc.Server | None = None
        self._bound = ""
        self._open = self._stopped = False

    def start(self) -> str:
        """Listen and return host:port as bound; FrameError if the address cannot be bound."""
        if self._server is not None:
            raise FrameError("split server: it was started already")
        if self._stopped:
            raise FrameError("split server: it was stopped; make a new one")
        most = self._settings.streams + 2 * UNAUTHENTICATED  # refused streams end a moment later
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="split stream")
        options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", 2 * most))
        server = grpc.server(self._pool, maximum_concurrent_rpcs=most, options=options)
        handler = grpc.stream_stream_rpc_method_handler(
            self._train
        )  # bytes, read by `ServerStream`
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Train": handler}),)
        )
        pair = (self._identity.key, self._identity.certificate)
        credentials = grpc.ssl_server_credentials([pair])
        try:
            port = server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise FrameError(
                f"split server: cannot listen on {self._address!r}; expected host:port of this "
                "machine that is free"
            ) from error
        self._bound = f"{self._address.rpartition(':')[0]}:{port}"
        self._server = server
        self._scheduler.start()
        self._admission.start()
        server.start()
        return self._bound

    def stop(self) -> None:
        """Close the round, if one is open, and stop listening."""
        if self._server is None:
            return
        self.close()
        self._server.stop(grace=0.5).wait()
        self._pool.shutdown(wait=False)
        self._scheduler.stop()
        self._admission.stop()
        self._server, self._stopped = None, True

    def __enter__(self) -> SplitServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def open(
        self,
        server_parts: Sequence[tuple[ServerPart, Sequence[str]]],
        round: int,
        attempt: int,
        limits: Mapping[str, FrameLimits],
        seconds: float,
        *,
        patience: float | None = None,
    ) -> dict[str, Credentials]:
        """Serve server parts, each to its clients, until `close`; return the clients' credentials.

        Tokens are accepted for `seconds`; a client that has not connected by then has left.
        `patience` is how many seconds a client waits for a reply, by default `seconds` too.

        Raises FrameError if a round is open, or a client is named twice or has no limits.
        """
        if self._server is None or self._open:
            raise FrameError("split server: expected it to run with no round open; close it first")
        names = [client for _, clients in server_parts for client in clients]
        if len(set(names)) < len(names) or not all(len(clients) for _, clients in server_parts):
            raise FrameError(
                "split server: expected every client once, and no server part without one"
            )
        if missing := sorted(set(names) - set(limits)):
            raise FrameError(f"split server: expected limits of every client; not of {missing[:5]}")
        if not (math.isfinite(seconds) and seconds > 0):
            raise FrameError(f"split server: expected seconds above 0; {seconds} came")
        settings = self._settings
        sessions = {client: SessionId(self._run, round, attempt, client) for client in names}
        stream_limits = {
            client: StreamLimits(settings.credit, limits[client].nbytes, settings.silence)
            for client in names
        }
        batcher = partial(Batcher, gather=settings.gather, turns=settings.turns)
        self._scheduler.start_round(server_parts, sessions, limits, stream_limits, batcher, seconds)
        self._open = True
        return {
            client: Credentials(
                address=self._dialled_address(),
                certificate=self._identity.certificate,
                run=self._run,
                round=round,
                attempt=attempt,
                client=client,
                token=self._sessions.issue(sessions[client], seconds),
                limits=limits[client],
                patience=seconds if patience is None else patience,
            )
            for client in names
        }

    def call(self, fn: Callable[[], T]) -> T:
        """Run a function on the thread that uses the model; return or raise what it does."""
        return self._scheduler.call(fn)

    def traffic(self, client: str) -> WireBytes:
        """Return the bytes of a client's frames, received and sent, until the next round."""
        return self._scheduler.traffic(client)

    def failed(self, client: str) -> str | None:
        """Return why a client's work was ended against its will, or None; until the next round.

        Its server part raised, it was silent, it broke the protocol, or the run gave it up. Its
        work may be finished all the same: the server part knows.
        """
        return self._scheduler.failed(client)

    def leave(self, client: str, reason: str = "the run has given this client up") -> None:
        """End a client's work and its stream, with a reason; unfinished work is discarded."""
        self._scheduler.leave(client, reason)

    def close(self) -> None:
        """End the round and all its streams; returns when no server part is called any more."""
        if not self._open:
            return
        self._open = False
        self._sessions.clear()
        self._scheduler.leave_all("the round has ended")

    def _dialled_address(self) -> str:
        given = self._advertise
        if given is None:
            return self._bound
        port = given.rpartition(":")[2]
        whole = port.isdigit() and (given.count(":") == 1 or given.startswith("["))
        return given if whole else f"{given}:{self._bound.rpartition(':')[2]}"

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Serve one stream; its messages are read on a thread of its own."""
        stream = ServerStream(self._scheduler, self._sessions, context.cancel)

        def closed() -> None:
            stream.end()
            self._admission.remove(stream)

        self._admission.add(stream)
        try:
            if not context.add_callback(closed):
                closed()
                return
            threading.Thread(
                target=_read_messages, args=(requests, stream), name="split reader", daemon=True
            ).start()
            yield from stream.messages()
        finally:
            stream.end()
            self._scheduler.disconnected(stream)
        if stream.status is not None:
            context.set_code(stream.status[0])
            context.set_details(stream.status[1])


def _read_messages(requests: Iterator[bytes], stream: ServerStream) -> None:
    """Hand messages to the stream, until it is over or breaks."""
    try:
        for message in requests:
            stream.receive(message)
            if stream.over:
                return
    except grpc.RpcError:
        pass  # the connection has closed; `closed` is called next
    finally:
        stream.end()


_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a message must not grow
    ("grpc.max_concurrent_streams", 4),  # per connection: a stream, and its replacement
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30_000),  # without streams
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
