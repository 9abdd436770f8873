"""A node's description of itself: its clients, their data's sizes, its device, its policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Annotated, Any, get_args

from annotated_types import Ge

from polyrank.errors import RecipeError
from polyrank.planning import DeviceProfile, Limits
from polyrank.protocol import json_fields as reading
from polyrank.protocol.json_fields import Fields, refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import WITHOUT_TENSORS, SizeLimits
from polyrank.protocol.train_result import REASON_BYTES, shortened
from polyrank.training.client_data import Part

PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Counts:
    """Sizes of one part of a client's data.

    `rows` is how many it has, `tokens` those of the longest, `targets` the most tokens of one row
    that carry loss.
    """

    rows: int
    tokens: int
    targets: int


@dataclass(frozen=True)
class ClientInfo:
    """A client as its node describes it; `counts` has all three parts, `fingerprint` is opaque."""

    name: str
    category: str
    seen: bool
    counts: Mapping[Part, Counts]
    fingerprint: str


@dataclass(frozen=True)
class ClientPolicy(Limits):
    """What the client consents to; what goes beyond is refused here, and the server told why."""

    smallest_count: Annotated[int, Ge(0)] = 1
    """The smallest number of examples that a count or a score may stand on. What stands on fewer is
    not told, and with fewer training examples the client takes no part."""


ANYTHING = ClientPolicy(smallest_count=0)
"""The policy of a client that consents to whatever is asked."""


@dataclass(frozen=True)
class NodeInfo:
    """A node: its clients, its device if it was measured, its policy, versions of its libraries.

    `refusal` is why it cannot take part, if it cannot.
    """

    clients: tuple[ClientInfo, ...]
    device: DeviceProfile | None = None
    policy: ClientPolicy = ANYTHING
    versions: Mapping[str, str] = field(default_factory=dict)
    refusal: str | None = None


def write_node_info(info: NodeInfo) -> bytes:
    """Return the packet of a node's description; PacketError if a client lacks a part's counts."""
    fields = {
        "hosted": [_written(client) for client in info.clients],
        "device": None if info.device is None else asdict(info.device),
        "terms": asdict(info.policy),
        "versions": dict(info.versions),
        "refusal": None if info.refusal is None else shortened(info.refusal),
    }
    return pack("profile", fields, {})


def _written(client: ClientInfo) -> dict[str, Any]:
    if client.counts.keys() != set(PARTS):
        raise refusal(
            f"registration packet, client {client.name!r}, counts", f"{[*PARTS]}", [*client.counts]
        )
    return {
        "client": client.name,
        "category": client.category,
        "seen": client.seen,
        "counts": {part: [*astuple(client.counts[part])] for part in PARTS},
        "fingerprint": client.fingerprint,
    }


def read_node_info(
    data: bytes | bytearray | memoryview, limits: SizeLimits = WITHOUT_TENSORS
) -> NodeInfo:
    """Return the node that a packet describes, its clients all distinct.

    Raises PacketError for everything that `write_node_info` did not write.
    """
    packet = Packet(data, "profile", limits)
    fields = packet.fields
    at = fields.at("hosted")
    clients = [
        _client(Fields(item, f"{at}, number {number}"))
        for number, item in enumerate(fields.items("hosted"))
    ]
    if len({client.name for client in clients}) < len(clients):
        raise refusal(at, "each client once", "one that is there twice")
    device = None if fields.gone("device") else _device(fields.table("device"))
    policy = _policy(fields.table("terms"))
    versions = {
        reading.name(name, place): reading.name(version, place, 64)
        for name, version, place in fields.table("versions").named()
    }
    why = (
        None
        if fields.gone("refusal")
        else reading.displayable(fields.text("refusal", REASON_BYTES, 0))
    )
    packet.close()
    return NodeInfo(tuple(clients), device, policy, versions, why)


def _client(fields: Fields) -> ClientInfo:
    client, category = fields.name("client"), fields.name("category", least=0)
    seen, table = fields.flag("seen"), fields.table("counts")
    counts = {part: _counts(table.items(part), table.at(part)) for part in PARTS}
    table.close()
    info = ClientInfo(client, category, seen, counts, fields.name("fingerprint", 128, 0))
    fields.close()
    return info


def _counts(values: list[Any], place: str) -> Counts:
    if len(values) != 3:
        raise refusal(place, "rows, tokens and targets", f"{len(values)} numbers")
    rows, tokens, targets = (reading.whole(value, place, 0, 2**31 - 1) for value in values)
    if (rows == 0) != (tokens == 0) or targets > tokens:
        raise refusal(
            place,
            "tokens where there are rows, and no more targets than tokens",
            f"{rows} rows, {tokens} tokens, {targets} targets",
        )
    return Counts(rows, tokens, targets)


def _device(fields: Fields) -> DeviceProfile:
    name, memory = fields.name("name"), fields.whole("memory_bytes", 1)
    flops, up, down = (
        None if fields.gone(key) else fields.number(key) for key in ("flops", "up", "down")
    )
    latency = fields.number("latency")
    fields.close()
    try:
        return DeviceProfile(name, memory, flops, up, down, latency)
    except RecipeError as error:
        raise refusal(fields.place, "what a device can offer", error) from error


def _policy(fields: Fields) -> ClientPolicy:
    largest = None if fields.gone("largest_rank") else fields.whole("largest_rank", 1)
    lowest = None if fields.gone("lowest_cut") else fields.whole("lowest_cut", 1)
    policy = ClientPolicy(
        largest, lowest, fields.flag("labels_may_leave"), fields.whole("smallest_count")
    )
    fields.close()
    return policy
