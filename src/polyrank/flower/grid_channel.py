"""Letters carried by Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Array, ArrayRecord, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from polyrank.errors import PacketError
from polyrank.remote.message_channel import Kind, Message, Reply

TYPES: dict[Kind, str] = {
    "hello": MessageType.QUERY,
    "train": MessageType.TRAIN,
    "evaluate": MessageType.EVALUATE,
}
RECORD, FORM = "packet", "polyrank.packet"
PAUSE = 0.2
"""Seconds between two looks at the grid: asking costs a request."""
TOGETHER = 16
"""So many answers at most are in memory at the same time."""


class GridChannel:
    """Carries letters over Flower.

    Flower delivers a message once at most, and its answer once. What it says of lost ones (a
    machine that is gone, a process that died) becomes the reason why there is no answer.
    """

    def __init__(self, grid: Grid):
        self._grid = grid

    @property
    def simulated(self) -> bool:
        """Whether it is the grid of Flower's simulation."""
        return isinstance(self._grid, InMemoryGrid)

    def nodes(self) -> Sequence[int]:
        """Return the nodes that Flower holds to be alive."""
        return sorted(self._grid.get_node_ids())

    def send(self, letters: Iterable[Message], seconds: float) -> list[str | None]:
        """Push messages that live a little longer than `seconds`, so that late answers are seen."""
        alive = set(self._grid.get_node_ids())
        tickets: list[str | None] = []
        for letter in letters:  # One at a time: the grid does not say which of several failed.
            if letter.node not in alive:
                tickets.append(None)
                continue
            message = FlowerMessage(
                content=packed(letter.payload),
                dst_node_id=letter.node,
                message_type=TYPES[letter.kind],
                group_id=letter.kind,
                ttl=2 * seconds + 60.0,
            )
            pushed = list(self._grid.push_messages([message]))
            tickets.append(pushed[0] if pushed and pushed[0] else None)
        return tickets

    def receive(self, tickets: Mapping[str, int]) -> Iterator[Reply]:
        """Pull what has come, a few packets at a time; pause a little if nothing has."""
        left, found = list(tickets), False
        while left:
            few, left = left[:TOGETHER], left[TOGETHER:]
            for message in self._grid.pull_messages(few):
                found = True
                if message.metadata.reply_to_message_id in few:
                    yield _delivered(message)
        if not found:
            time.sleep(PAUSE)


def packed(payload: bytes) -> RecordDict:
    """Return a packet as a Flower record; arrays travel in pieces, so that it may be large."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=FORM, data=payload)
    return RecordDict({RECORD: ArrayRecord({RECORD: array})})


def unpacked(content: RecordDict) -> bytes:
    """Return the packet of a Flower record; PacketError if it holds none."""
    record = content.array_records.get(RECORD)
    array = None if record is None else record.get(RECORD)
    if array is None or array.stype != FORM:
        raise PacketError(f"message: expected one packet of polyrank, got {[*content]}")
    return array.data


def _delivered(message: FlowerMessage) -> Reply:
    ticket = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return Reply(ticket, None, f"Flower's error {error.code}: {error.reason}")
    try:
        return Reply(ticket, unpacked(message.content))
    except PacketError as error:
        return Reply(ticket, None, str(error))
