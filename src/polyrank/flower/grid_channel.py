"""Messages carried by Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flwr.app import Array, ArrayRecord, MessageType, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.serverapp import Grid

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
"""So many replies at most are in memory at the same time."""


class GridChannel:
    """Carries messages over Flower.

    Flower delivers a message once at most, and its reply once. What it says of lost messages (a
    machine that is gone, a process that died) becomes the error of the reply.
    """

    def __init__(self, grid: Grid):
        self._grid = grid

    @property
    def simulated(self) -> bool:
        """Whether it is the grid of Flower's simulation."""
        from flwr.superlink.grid import InMemoryGrid  # 0.7 s that a ClientApp need not spend.

        return isinstance(self._grid, InMemoryGrid)

    def nodes(self) -> Sequence[int]:
        """Return the nodes that are alive, as far as Flower knows."""
        return sorted(self._grid.get_node_ids())

    def send(self, messages: Iterable[Message], seconds: float) -> list[str | None]:
        """Push messages that live a little longer than `seconds`, so late replies are seen."""
        alive = set(self._grid.get_node_ids())
        ids: list[str | None] = []
        for message in messages:  # One at a time: the grid does not say which of several failed.
            if message.node not in alive:
                ids.append(None)
                continue
            flower_message = FlowerMessage(
                content=packed(message.payload),
                dst_node_id=message.node,
                message_type=TYPES[message.kind],
                group_id=message.kind,
                ttl=2 * seconds + 60.0,
            )
            pushed = list(self._grid.push_messages([flower_message]))
            ids.append(pushed[0] if pushed and pushed[0] else None)
        return ids

    def receive(self, message_ids: Mapping[str, int]) -> Iterator[Reply]:
        """Pull the replies that have come, a few at a time; pause a little if none has."""
        left, pulled = list(message_ids), False
        while left:
            few, left = left[:TOGETHER], left[TOGETHER:]
            for message in self._grid.pull_messages(few):
                pulled = True
                if message.metadata.reply_to_message_id in few:
                    yield _reply(message)
        if not pulled:
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


def _reply(message: FlowerMessage) -> Reply:
    message_id = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return Reply(message_id, None, f"Flower's error {error.code}: {error.reason}")
    try:
        return Reply(message_id, unpacked(message.content))
    except PacketError as error:
        return Reply(message_id, None, str(error))
