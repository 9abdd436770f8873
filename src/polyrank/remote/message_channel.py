"""The message channel to the clients' machines, over any network library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["hello", "train", "evaluate"]
"""The kinds of messages; see `polyrank.protocol`."""


@dataclass(frozen=True)
class Message:
    """A message to one machine: `node` is its number, `payload` a packet."""

    node: int
    kind: Kind
    payload: bytes


@dataclass(frozen=True)
class Reply:
    """The reply to the message of this id: a packet, or `error`, the reason why there is none."""

    message_id: str
    payload: bytes | None
    error: str | None = None


class MessageChannel(Protocol):
    """Carries messages to machines; brings back one reply to each, or says why there is none."""

    @property
    def simulated(self) -> bool:
        """Whether the machines are simulated: all are there from the start."""
        ...

    def nodes(self) -> Sequence[int]:
        """Return the machines that can be reached now."""
        ...

    def send(self, messages: Iterable[Message], seconds: float) -> list[str | None]:
        """Send messages that need no reply after so many seconds; return an id for each.

        None where the machine cannot be reached. Messages are taken one by one: they are large.
        """
        ...

    def receive(self, message_ids: Mapping[str, int]) -> Iterable[Reply]:
        """Yield the replies to these messages that have come since; wait a moment if none has.

        `message_ids` give each message's machine. No reply is yielded twice.
        """
        ...
