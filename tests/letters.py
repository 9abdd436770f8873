"""A post within one process: machines that answer letters one after the other, or do not."""

from collections.abc import Callable, Mapping, Sequence

from polyrank.errors import PolyrankError
from polyrank.federation.remote.client import ClientSide
from polyrank.federation.remote.post import Delivery, Letter

Trouble = Callable[[Letter, bytes], bytes | None]
"""(letter, its answer) -> what arrives of it; None: nothing ever does."""


class Letters:
    """Delivers letters to `ClientSide`s at once. `trouble` may change or withhold an answer."""

    def __init__(self, machines: Mapping[int, ClientSide], trouble: Trouble | None = None):
        self.machines, self.trouble = dict(machines), trouble
        self.sent: list[tuple[Letter, bytes | None]] = []
        self.waiting: dict[str, Delivery] = {}

    def nodes(self) -> Sequence[int]:
        return sorted(self.machines)

    def send(self, letters: Sequence[Letter], seconds: float) -> list[str | None]:
        tickets: list[str | None] = []
        for letter in letters:
            machine = self.machines.get(letter.node)
            if machine is None:
                tickets.append(None)
                continue
            ticket = f"t{len(self.sent)}"
            payload: bytes | None
            try:
                payload = machine.answer(letter.kind, letter.payload)
            except PolyrankError as error:
                self.waiting[ticket] = Delivery(ticket, None, str(error))
                payload = None
            else:
                if self.trouble is not None:
                    payload = self.trouble(letter, payload)
                if payload is not None:
                    self.waiting[ticket] = Delivery(ticket, payload)
            self.sent.append((letter, payload))
            tickets.append(ticket)
        return tickets

    def receive(self, tickets: Mapping[str, int]) -> list[Delivery]:
        return [self.waiting.pop(ticket) for ticket in tickets if ticket in self.waiting]
