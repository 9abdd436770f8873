"""The split server: clients' streams come in over TLS, and their tails are asked on one thread."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TypeVar

import grpc

from polyrank.errors import FrameError
from polyrank.training.split.link import ServerPart, Traffic
from polyrank.transport.layout import Limits
from polyrank.transport.remote.admission import AdmissionControl
from polyrank.transport.remote.batching import Batcher
from polyrank.transport.remote.credentials import Credentials
from polyrank.transport.remote.identity import Identity
from polyrank.transport.remote.scheduler import Scheduler
from polyrank.transport.remote.server_stream import ServerStream, Terms
from polyrank.transport.remote.sessions import Sessions, Work
from polyrank.transport.remote.wire import MESSAGE_BYTES, SERVICE

T = TypeVar("T")

STRANGERS = 32
"""The most streams that are open without being welcome yet."""


@dataclass(frozen=True)
class ServeSettings:
    """How a split server treats its clients.

    `gather` is how many seconds the first request waits for those of other clients of its tail;
    None: until all who are at work have asked. With `turns` the clients of a tail are served one
    after the other instead, each until the tail waits for the next. A client of which nothing comes
    for `silence` seconds leaves. `credit` requests of a client may be without reply at a time, and
    `streams` clients may be connected. Raises FrameError for values that cannot be.
    """

    gather: float | None = 0.02
    silence: float = 60.0
    credit: int = 8
    streams: int = 64
    turns: bool = False

    def __post_init__(self) -> None:
        if self.gather is not None and not (math.isfinite(self.gather) and self.gather >= 0):
            raise FrameError(f"split server, gather: expected 0 s or more; {self.gather} came")
        if not (math.isfinite(self.silence) and self.silence > 0):
            raise FrameError(f"split server, silence: expected more than 0 s; {self.silence} came")
        for name in ("credit", "streams"):
            if not 0 < getattr(self, name) < 2**16:
                raise FrameError(
                    f"split server, {name}: expected 1 to 65535; {getattr(self, name)} came"
                )


class SplitServer:
    """Serves the tails of one round at a time to split clients on other machines.

    It binds to exactly `address` (host:port; port 0 picks a free one) and speaks TLS only, with
    `identity`. Clients dial `advertise` (host, or host:port), or the bound address without it.
    `clock` is in seconds. A context manager, which stops on leaving.

    Raises FrameError for an address that cannot be.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        run: str,
        settings: ServeSettings | None = None,
        *,
        advertise: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._identity, self._run = address, identity, run
        self._settings = settings or ServeSettings()
        self._advertise = advertise
        self._sessions = Sessions(clock)
        self._bench = Scheduler(clock, self._settings.streams)
        self._door = AdmissionControl(STRANGERS)
        self._server: grpc.Server | None = None
        self._bound = ""
        self._open = self._stopped = False

    def start(self) -> str:
        """Listen and return host:port as bound; FrameError if the address cannot be had."""
        if self._server is not None:
            raise FrameError("split server: it was started already")
        if self._stopped:
            raise FrameError("split server: it was stopped; make a new one")
        most = self._settings.streams + 2 * STRANGERS  # those who are sent away leave a bit later
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
        self._bench.start()
        self._door.start()
        server.start()
        return self._bound

    def stop(self) -> None:
        """Close the round, if one is open, and stop listening."""
        if self._server is None:
            return
        self.close()
        self._server.stop(grace=0.5).wait()
        self._pool.shutdown(wait=False)
        self._bench.stop()
        self._door.stop()
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
        tails: Sequence[tuple[ServerPart, Sequence[str]]],
        round: int,
        attempt: int,
        limits: Mapping[str, Limits],
        seconds: float,
        *,
        patience: float | None = None,
    ) -> dict[str, Credentials]:
        """Serve these tails, each to its clients, until `close`; return how clients reach them.

        Tokens are accepted for `seconds`; who has not come by then has left. `patience` is how long
        a client waits for an answer of a server that it can reach, by default `seconds` too.

        Raises FrameError if a round is open, or a client is named twice or has no limits.
        """
        if self._server is None or self._open:
            raise FrameError("split server: expected it to run with no round open; close it first")
        names = [client for _, clients in tails for client in clients]
        if len(set(names)) < len(names) or not all(len(clients) for _, clients in tails):
            raise FrameError("split server: expected every client once, and no tail without one")
        if missing := sorted(set(names) - set(limits)):
            raise FrameError(f"split server: expected limits of every client; not of {missing[:5]}")
        if not (math.isfinite(seconds) and seconds > 0):
            raise FrameError(f"split server: expected seconds above 0; {seconds} came")
        settings = self._settings
        works = {client: Work(self._run, round, attempt, client) for client in names}
        terms = {
            client: Terms(settings.credit, limits[client].nbytes, settings.silence)
            for client in names
        }
        gathering = partial(Batcher, gather=settings.gather, turns=settings.turns)
        self._bench.seat(tails, works, limits, gathering, terms, seconds)
        self._open = True
        return {
            client: Credentials(
                address=self._dialled(),
                certificate=self._identity.certificate,
                run=self._run,
                round=round,
                attempt=attempt,
                client=client,
                token=self._sessions.issue(works[client], seconds),
                limits=limits[client],
                patience=seconds if patience is None else patience,
            )
            for client in names
        }

    def call(self, fn: Callable[[], T]) -> T:
        """Run a function on the thread that touches the model; return or raise what it does."""
        return self._bench.call(fn)

    def traffic(self, client: str) -> Traffic:
        """Return the bytes of a client's frames as they came and went, until the next round."""
        return self._bench.traffic(client)

    def failed(self, client: str) -> str | None:
        """Return why a client's work was ended against its will, until the next round; or None.

        Its tail raised, it was silent, it broke the protocol, or its owner let it go. Finished work
        may be there all the same: it is the tail that says so.
        """
        return self._bench.failed(client)

    def leave(self, client: str, reason: str = "the run has given this client up") -> None:
        """End a client's work: its stream ends with the reason, an unfinished tail is discarded."""
        self._bench.leave(client, reason)

    def close(self) -> None:
        """End the round: all streams end; returns when no tail is asked any more."""
        if not self._open:
            return
        self._open = False
        self._sessions.clear()
        self._bench.leave_all("the round has ended")

    def _dialled(self) -> str:
        given = self._advertise
        if given is None:
            return self._bound
        port = given.rpartition(":")[2]
        whole = port.isdigit() and (given.count(":") == 1 or given.startswith("["))
        return given if whole else f"{given}:{self._bound.rpartition(':')[2]}"

    def _train(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Carry one stream; its messages are read on a thread of its own."""
        stream = ServerStream(self._bench, self._sessions, context.cancel)

        def gone() -> None:
            stream.end()
            self._door.leave(stream)

        self._door.enter(stream)
        try:
            if not context.add_callback(gone):
                gone()
                return
            threading.Thread(
                target=_take_in, args=(requests, stream), name="split reader", daemon=True
            ).start()
            yield from stream.messages()
        finally:
            stream.end()
            self._bench.gone(stream)
        if stream.status is not None:
            context.set_code(stream.status[0])
            context.set_details(stream.status[1])


def _take_in(requests: Iterator[bytes], stream: ServerStream) -> None:
    """Hand what comes to the stream, until it is over or breaks."""
    try:
        for message in requests:
            stream.take(message)
            if stream.over:
                return
    except grpc.RpcError:
        pass  # the client has gone; `gone` follows
    finally:
        stream.end()


_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is small must not grow
    ("grpc.max_concurrent_streams", 4),  # per connection: a client has one, or is replacing it
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 30_000),  # without streams
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
