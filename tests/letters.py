"""A post within one process: machines that answer letters, late, wrongly or not at all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from polyrank.errors import PolyrankError
from polyrank.remote.client import ClientSide
from polyrank.remote.message_channel import Message, Reply


@dataclass(frozen=True)
class After:
    """An answer that arrives once the clock shows this time; None: never."""

    payload: bytes
    time: float | None


@dataclass(frozen=True)
class Lost:
    """What the post says where there will be no answer."""

    reason: str


Trouble = Callable[[Message, bytes], bytes | After | Lost]
"""(letter, its answer) -> what becomes of the answer."""


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Letters:
    """Delivers letters to `ClientSide`s at once, and their answers as `trouble` says.

    Machines in `unreachable` get none. With a `clock`, looking for answers that are not there takes
    one second. With `singly` each look finds one answer at most; with `together` so many machines
    answer at the same time, each on a thread.
    """

    def __init__(
        self,
        machines: Mapping[int, ClientSide],
        trouble: Trouble | None = None,
        *,
        clock: Clock | None = None,
        singly: bool = False,
        together: int = 0,
    ):
        self.machines, self.trouble, self.clock = dict(machines), trouble, clock
        self.unreachable: set[int] = set()
        self.sent: list[Message] = []
        self._singly = singly
        self._pool = ThreadPoolExecutor(together) if together else None
        self._working: dict[str, tuple[Message, Future[bytes | Lost]]] = {}
        self._arriving: dict[str, tuple[float, Reply]] = {}

    simulated = False

    def nodes(self) -> Sequence[int]:
        return sorted(self.machines)

    def send(self, letters: Iterable[Message], seconds: float) -> list[str | None]:
        return [self._send(letter) for letter in letters]

    def receive(self, tickets: Mapping[str, int]) -> Iterator[Reply]:
        """Yield what has come; a look that finds nothing takes a second of the clock."""
        if self._working:
            futures = [future for _, future in self._working.values()]
            wait(futures, 0.0 if self._arriving else 1.0, "FIRST_COMPLETED")
            for ticket in [t for t, (_, future) in self._working.items() if future.done()]:
                letter, future = self._working.pop(ticket)
                self._arrives(ticket, letter, future.result())
        now = self.clock() if self.clock else 0.0
        ready = [t for t in tickets if t in self._arriving and self._arriving[t][0] <= now]
        if not ready and self.clock is not None:
            self.clock.now += 1.0
        for ticket in ready[: 1 if self._singly else None]:
            yield self._arriving.pop(ticket)[1]

    def _send(self, letter: Message) -> str | None:
        machine = self.machines.get(letter.node)
        if machine is None or letter.node in self.unreachable:
            return None
        ticket = f"t{len(self.sent)}"
        self.sent.append(letter)
        if self._pool is not None:
            self._working[ticket] = letter, self._pool.submit(_answer, machine, letter)
        else:
            self._arrives(ticket, letter, _answer(machine, letter))
        return ticket

    def _arrives(self, ticket: str, letter: Message, answer: bytes | Lost) -> None:
        came: bytes | After | Lost = answer
        if isinstance(answer, bytes) and self.trouble is not None:
            came = self.trouble(letter, answer)
        if isinstance(came, Lost):
            self._arriving[ticket] = 0.0, Reply(ticket, None, came.reason)
        elif isinstance(came, bytes):
            self._arriving[ticket] = 0.0, Reply(ticket, came)
        elif came.time is not None:
            self._arriving[ticket] = came.time, Reply(ticket, came.payload)


def _answer(machine: ClientSide, letter: Message) -> bytes | Lost:
    try:
        return machine.answer(letter.kind, letter.payload)
    except PolyrankError as error:
        return Lost(str(error))
