"""What a node says of itself: whom it hosts, what it offers, on which terms. Never a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from polyrank.errors import RecipeError
from polyrank.planning import DeviceProfile
from polyrank.protocol import json_fields as reading
from polyrank.protocol.json_fields import Fields, refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import PROFILES, SizeLimits
from polyrank.protocol.train_result import REASON_BYTES
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

    client: str
    category: str
    seen: bool
    counts: Mapping[Part, Counts]
    fingerprint: str


@dataclass(frozen=True)
class ClientPolicy:
    """What a node agrees to; None: whatever is asked.

    `largest_rank` at any site, `lowest_cut` as the fewest blocks that it runs itself, whether
    labels may leave it, and `smallest_count`: scores over fewer rows are not told.
    """

    largest_rank: int | None = None
    lowest_cut: int | None = None
    labels_may_leave: bool = True
    smallest_count: int = 0


@dataclass(frozen=True)
class Profile:
    """A node: its clients, its device if it was measured, its terms, versions of its libraries.

    `refusal` is why it cannot take part, if it cannot.
    """

    hosted: tuple[ClientInfo, ...]
    device: DeviceProfile | None = None
    terms: ClientPolicy = field(default_factory=ClientPolicy)
    versions: Mapping[str, str] = field(default_factory=dict)
    refusal: str | None = None


def write_profile(profile: Profile) -> bytes:
    """Return the packet of a profile; PacketError if a part is missing or a text is odd."""
    refused = profile.refusal
    fields = {
        "hosted": [_written(one) for one in profile.hosted],
        "device": None if profile.device is None else asdict(profile.device),
        "terms": asdict(profile.terms),
        "versions": dict(profile.versions),
        "refusal": None
        if refused is None
        else refused.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore"),
    }
    return pack("profile", fields, {})


def _written(one: ClientInfo) -> dict[str, Any]:
    if one.counts.keys() != set(PARTS):
        raise refusal(
            f"profile packet, client {one.client!r}, counts", f"{[*PARTS]}", [*one.counts]
        )
    return {
        "client": one.client,
        "category": one.category,
        "seen": one.seen,
        "counts": {
            part: [one.counts[part].rows, one.counts[part].tokens, one.counts[part].targets]
            for part in PARTS
        },
        "fingerprint": one.fingerprint,
    }


def read_profile(data: bytes | bytearray | memoryview, bounds: SizeLimits = PROFILES) -> Profile:
    """Return the profile of a packet, its clients all distinct.

    Raises PacketError for everything that `write_profile` did not write.
    """
    packet = Packet(data, "profile", bounds)
    fields = packet.fields
    at = fields.at("hosted")
    hosted = [
        _hosted(Fields(one, f"{at}, number {number}"))
        for number, one in enumerate(fields.items("hosted"))
    ]
    names = [one.client for one in hosted]
    if len(set(names)) < len(names):
        raise refusal(at, "each client once", "one that is there twice")
    device = None if fields.gone("device") else _device(fields.table("device"))
    terms = _terms(fields.table("terms"))
    versions = {
        reading.name(name, place): reading.name(version, place, 64)
        for name, version, place in fields.table("versions").named()
    }
    refused = (
        None if fields.gone("refusal") else reading.told(fields.text("refusal", REASON_BYTES, 0))
    )
    packet.close()
    return Profile(tuple(hosted), device, terms, versions, refused)


def _hosted(fields: Fields) -> ClientInfo:
    client, category = fields.name("client"), fields.name("category", least=0)
    seen, table = fields.flag("seen"), fields.table("counts")
    counts = {part: _counts(table.items(part), table.at(part)) for part in PARTS}
    table.close()
    hosted = ClientInfo(client, category, seen, counts, fields.name("fingerprint", 128, 0))
    fields.close()
    return hosted


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


def _terms(fields: Fields) -> ClientPolicy:
    largest = None if fields.gone("largest_rank") else fields.whole("largest_rank", 1)
    lowest = None if fields.gone("lowest_cut") else fields.whole("lowest_cut", 1)
    terms = ClientPolicy(
        largest, lowest, fields.flag("labels_may_leave"), fields.whole("smallest_count")
    )
    fields.close()
    return terms
