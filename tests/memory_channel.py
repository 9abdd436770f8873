"""A message channel within one process: replies come at once, late, damaged or not at all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from polyrank.errors import PolyrankError
from polyrank.remote.client import ClientNode
from polyrank.remote.message_channel import Message, Reply


@dataclass(frozen=True)
class After:
    """A reply that arrives once the clock shows this time; None: never."""

    payload: bytes
    time: float | None


@dataclass(frozen=True)
class NoReply:
    """The channel says that there will be no reply, and why."""

    reason: str


Trouble = Callable[[Message, bytes], bytes | After | NoReply]
"""(message, payload of its reply) -> what arrives."""


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class MemoryChannel:
    """Delivers messages to `ClientNode`s at once, and their replies as `trouble` says.

    Machines in `unreachable` get none. With a `clock`, a look that finds no reply takes one second.
    With `singly` each look finds one reply at most; with `together` so many machines answer at the
    same time, each on a thread.
    """

    def __init__(
        self,
        machines: Mapping[int, ClientNode],
        trouble: Trouble | None = None,
        *,
        clock: Clock | None = None,
        singly: bool = False,
        together: int = 0,
        simulated: bool = False,
    ):
        self.machines, self.trouble, self.clock = dict(machines), trouble, clock
        self.simulated = simulated
        self.unreachable: set[int] = set()
        self.sent: list[Message] = []
        self._singly = singly
        self._pool = ThreadPoolExecutor(together) if together else None
        self._working: dict[str, tuple[Message, Future[bytes | NoReply]]] = {}
        self._arriving: dict[str, tuple[float, Reply]] = {}

    def nodes(self) -> Sequence[int]:
        return sorted(self.machines)

    def send(self, messages: Iterable[Message], seconds: float) -> list[str | None]:
        return [self._send(message) for message in messages]

    def receive(self, message_ids: Mapping[str, int]) -> Iterator[Reply]:
        """Yield the replies that have come; a look that finds none takes a second of the clock."""
        if self._working:
            futures = [future for _, future in self._working.values()]
            wait(futures, 0.0 if self._arriving else 1.0, "FIRST_COMPLETED")
            for message_id in [id for id, (_, future) in self._working.items() if future.done()]:
                message, future = self._working.pop(message_id)
                self._arrives(message_id, message, future.result())
        now = self.clock() if self.clock else 0.0
        ready = [id for id in message_ids if id in self._arriving and self._arriving[id][0] <= now]
        if not ready and self.clock is not None:
            self.clock.now += 1.0
        for message_id in ready[: 1 if self._singly else None]:
            yield self._arriving.pop(message_id)[1]

    def _send(self, message: Message) -> str | None:
        machine = self.machines.get(message.node)
        if machine is None or message.node in self.unreachable:
            return None
        message_id = f"m{len(self.sent)}"
        self.sent.append(message)
        if self._pool is not None:
            self._working[message_id] = message, self._pool.submit(_answer, machine, message)
        else:
            self._arrives(message_id, message, _answer(machine, message))
        return message_id

    def _arrives(self, message_id: str, message: Message, payload: bytes | NoReply) -> None:
        came: bytes | After | NoReply = payload
        if isinstance(payload, bytes) and self.trouble is not None:
            came = self.trouble(message, payload)
        if isinstance(came, NoReply):
            self._arriving[message_id] = 0.0, Reply(message_id, None, came.reason)
        elif isinstance(came, bytes):
            self._arriving[message_id] = 0.0, Reply(message_id, came)
        elif came.time is not None:
            self._arriving[message_id] = came.time, Reply(message_id, came.payload)


def _answer(machine: ClientNode, message: Message) -> bytes | NoReply:
    try:
        return machine.answer(message.kind, message.payload)
    except PolyrankError as error:
        return NoReply(str(error))
