"""Split clients and their server over gRPC, each end with a model of its own.

    with serving([job("a")]) as place:      # a server on loopback that trains for these jobs
        trained = place.train("a")          # trains the client's blocks through a GrpcLink
        place.server_part("a")              # what the server trained
    undisturbed("a")                        # hashes of both, from the same work in process

Raw(access) is a client that sends what it is told, message by message.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import grpc

import jobs
from models import tiny_loaded
from polyrank.algebra import Adapter
from polyrank.codecs import codec
from polyrank.model import LoadedModel
from polyrank.planning import CutPoint
from polyrank.training import LocalTraining
from polyrank.training.job import Trained
from polyrank.training.split import (
    Link,
    ServerPart,
    ServerParts,
    SplitJob,
    SplitSettings,
    train_client_part,
)
from polyrank.transport import FrameLimits, InProcessLinks, ServingSettings
from polyrank.transport.remote import (
    Credentials,
    GrpcLink,
    SplitServer,
    new_identity,
)
from polyrank.transport.remote import split_pb2 as pb
from polyrank.transport.remote.client_session import new_channel
from polyrank.transport.remote.wire import METHOD

IDENTITY = new_identity(["127.0.0.1", "localhost"])
SOON = 60.0  # seconds until a test gives up; nothing is measured by it
CUT, ROUND, ATTEMPT = CutPoint(1), 3, 1
LOCAL = LocalTraining(lr=0.02, batch=2, accumulation=2, epochs=1, dropout=0.1, clip=0.5)
"""Nine examples make three steps, of two, two and one microbatches."""
OWN = SplitSettings(wire="float32")
SHARED = SplitSettings(wire="float32", adapters="shared")


def model() -> LoadedModel:
    """Return a copy of the model: threads must not share one."""
    return tiny_loaded("llama", num_hidden_layers=3)


def job(client: str, seed: int = 1, count: int = 9) -> SplitJob:
    return SplitJob(
        jobs.job(model(), client, count=count, seed=seed, local=LOCAL), CUT, ROUND, ATTEMPT
    )


def limits(settings: SplitSettings = OWN, tokens: int = 64) -> FrameLimits:
    return FrameLimits(tokens, 16, codec(settings.wire))


@cache
def undisturbed(client: str = "a") -> tuple[str, str]:
    """Return the hashes of what head and server part of a client's job learn in process."""
    server, one = model(), job(client)
    with ServerParts(server, [one.at_server(server)]) as server_parts:
        link = InProcessLinks(server_parts, "float32", 16, 64).link(client)
        trained = train_client_part(model(), one, link, OWN)
        assert trained.failure is None
        return trained.adapter.hash(), server_parts.adapter(client).hash()


class Place:
    """A round that is open at a server."""

    def __init__(
        self,
        server: SplitServer,
        server_parts: ServerParts,
        access: dict[str, Credentials],
        made,
        settings,
    ):
        self.server, self.server_parts, self.access = server, server_parts, access
        self._jobs, self._settings = made, settings

    def link(self, client: str, address: str | None = None) -> GrpcLink:
        access = self.access[client]
        return GrpcLink(access if address is None else replace(access, address=address))

    def train(self, client: str, link: Link | None = None) -> Trained:
        """Train a client's blocks on a model of its own."""
        return train_client_part(
            model(), self._jobs[client], link or self.link(client), self._settings
        )

    def train_all(self, links: dict[str, Link]) -> dict[str, Trained]:
        """Train several clients at the same time."""
        found: dict[str, Trained] = {}

        def train(client: str) -> None:
            found[client] = self.train(client, links[client])

        threads = [threading.Thread(target=train, args=(client,)) for client in links]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        return found

    def server_part(self, client: str) -> Adapter:
        return self.server.call(lambda: self.server_parts.adapter(client))

    def hashes(self, client: str, trained: Trained) -> tuple[str, str]:
        assert trained.failure is None, trained.failure
        return trained.adapter.hash(), self.server_part(client).hash()


@contextmanager
def serving(
    made: Sequence[SplitJob],
    *,
    settings: SplitSettings = OWN,
    serve: ServingSettings | None = None,
    around: Callable[[ServerPart], ServerPart] = lambda server_parts: server_parts,
    seconds: float = SOON,
    tokens: int = 64,
) -> Iterator[Place]:
    """Serve the server parts of these jobs; `around` may stand between the server and them."""
    at_server = model()
    by_client = {one.job.client: one for one in made}
    shared = settings.adapters == "shared"
    with SplitServer(
        "127.0.0.1:0", IDENTITY, "run", serve or ServingSettings(gather=0.0)
    ) as server:
        with ServerParts(
            at_server, [one.at_server(at_server) for one in made], shared=shared
        ) as server_parts:
            own = dict.fromkeys(by_client, limits(settings, tokens))
            access = server.open(
                [(around(server_parts), list(by_client))], ROUND, ATTEMPT, own, seconds
            )
            yield Place(server, server_parts, access, by_client, settings)
            server.close()


class Raw:
    """A stream on which a test sends whatever it likes.

    `received` waits for the next message; at the stream's end it is the status, (code, details).
    """

    def __init__(self, access: Credentials):
        self.access, self._secret = access, b"s" * 32
        self._channel = new_channel(access)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = self._channel.stream_stream(METHOD)(iter(self._out.get, None))

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *error: object) -> None:
        self._out.put(None)
        self._channel.close()

    def send(self, message: bytes | None = None, **what: object) -> None:
        self._out.put(pb.Up(**what).SerializeToString() if message is None else message)

    def hello(self, **changes: object) -> pb.Hello:
        """Return the Hello that the access calls for."""
        fields = {
            "version": 1,
            "run": self.access.run,
            "client": self.access.client,
            "round": self.access.round,
            "attempt": self.access.attempt,
            "first": pb.Hello.First(token=self.access.token, secret=self._secret),
        }
        return pb.Hello(**{**fields, **changes})

    def resume(self, **changes: object) -> pb.Hello:
        hello = self.hello(**changes)
        hello.resume.SetInParent()
        return hello

    def received(self) -> pb.Down | tuple[grpc.StatusCode, str]:
        try:
            return pb.Down.FromString(next(self._call))
        except StopIteration:
            return self._call.code(), self._call.details()
        except grpc.RpcError:
            return self._call.code(), self._call.details()

    def refused(self) -> tuple[grpc.StatusCode, str]:
        """Return the status that the stream ends with; what comes before is let go."""
        while not isinstance(found := self.received(), tuple):
            pass
        return found

    def ended(self) -> str:
        """Return the reason that the server gives for ending the work."""
        while not isinstance(found := self.received(), tuple):
            if found.WhichOneof("what") == "ended":
                return found.ended.reason
        raise AssertionError(f"no Ended came: {found}")
