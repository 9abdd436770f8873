"""How messages reach the machines of clients, whoever carries them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["hello", "train", "evaluate"]
"""What a message asks for; see `polyrank.protocol`."""


@dataclass(frozen=True)
class Message:
    """A message to one machine: `node` is its number, `payload` a packet."""

    node: int
    kind: Kind
    payload: bytes


@dataclass(frozen=True)
class Reply:
    """What came back for the letter of this ticket: a packet, or the reason why there is none."""

    ticket: str
    payload: bytes | None
    lost: str | None = None


class MessageChannel(Protocol):
    """Carries letters to machines, and brings back one answer to each, or says that it is lost."""

    @property
    def simulated(self) -> bool:
        """Whether the machines are simulated: all are there from the start."""
        ...

    def nodes(self) -> Sequence[int]:
        """Return the machines that can be reached now."""
        ...

    def send(self, letters: Iterable[Message], seconds: float) -> list[str | None]:
        """Send letters that need no answer after so many seconds; return a ticket for each.

        None where the machine cannot be reached. Letters are taken one by one, as they are large.
        """
        ...

    def receive(self, tickets: Mapping[str, int]) -> Iterable[Reply]:
        """Yield what has come for these tickets since; waits a moment if there is nothing.

        Nothing is delivered twice.
        """
        ...
