"""The message that asks a client to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from polyrank.aggregation import TRAINED, Assignment, Penalty
from polyrank.algebra import Adapter, Delta, Dense, LowRank
from polyrank.errors import PacketError, PolyrankError
from polyrank.planning import CutPoint
from polyrank.planning.importance import METRICS
from polyrank.protocol import json_fields as reading
from polyrank.protocol.adapters import negatives, read_adapter, write_adapter
from polyrank.protocol.json_fields import Fields, refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import WITH_TENSORS, SizeLimits
from polyrank.rounds.messages import TrainTask
from polyrank.settings import LONGEST_WAIT

if TYPE_CHECKING:
    from polyrank.transport.remote.credentials import Credentials

D = TypeVar("D", bound=Delta)


@dataclass(frozen=True)
class TrainRequest:
    """A client's task, with what its machine must know beside its own settings.

    `task.assignment` is what the client holds of the assignment: of a split client the part of its
    own sites. `assignment` is the hash of the whole one, which its update must carry. Every
    `score_every`-th step measures importance by `metric`. `seconds` are left until the deadline.
    `access` tells a split client how to reach its tail.
    """

    task: TrainTask
    assignment: str
    score_every: int
    metric: str
    seconds: float
    access: Credentials | None = None


def write_train_request(request: TrainRequest) -> bytes:
    """Return the packet of a request.

    A frozen term that is the negative of its start is left out, and made again by the reader.
    Raises PacketError for a request that no packet can hold.
    """
    task, assignment = request.task, request.task.assignment
    if assignment.scale.keys() != assignment.start.keys():
        raise refusal(
            "train request packet, scale", "one of each site that starts", len(assignment.scale)
        )
    reading.number(
        request.seconds, "train request packet, seconds (faults.deadline)", 0.0, LONGEST_WAIT
    )
    sites, derived = [*assignment.start], negatives(assignment)
    frozen = {site: d for site, d in assignment.frozen.items() if site not in set(derived)}
    penalty = assignment.penalty
    fields = {
        "client": task.client,
        "round": task.round,
        "attempt": task.attempt,
        "seed": task.seed,
        "cut": None if task.cut is None else [task.cut.lower, task.cut.upper],
        "train": assignment.train,
        "scale": [assignment.scale[site] for site in sites],
        "negatives": [sites.index(site) for site in derived],
        "penalty": None
        if penalty is None
        else {"strength": penalty.strength, "keep": dict(penalty.keep)},
        "part": assignment.hash(),
        "assignment": request.assignment,
        "score_every": request.score_every,
        "metric": request.metric,
        "seconds": request.seconds,
        "access": None if request.access is None else request.access.to_dict(),
    }
    tensors = {
        **write_adapter("start", assignment.start),
        **write_adapter("frozen", frozen),
        **write_adapter("merged", assignment.merged),
    }
    return pack("order", fields, tensors)


def read_train_request(
    data: bytes | bytearray | memoryview, limits: SizeLimits = WITH_TENSORS
) -> TrainRequest:
    """Return the request of a packet, its assignment as it was sent, bit by bit.

    Raises PacketError for everything that `write_train_request` did not write, also for an
    assignment whose hash is not the one that was sent with it.
    """
    packet = Packet(data, "order", limits)
    fields = packet.fields
    assignment = _assignment(packet)
    part, whole = fields.hash("part"), fields.hash("assignment")
    if assignment.hash() != part:
        raise refusal(
            f"{packet.place}, assignment",
            f"one with the hash {part[:12]}…",
            f"one with the hash {assignment.hash()[:12]}…; it was damaged on its way: ask again; "
            "nothing is trained from what",
        )
    cut = _cut(fields)
    if cut is None and part != whole:
        raise refusal(
            fields.at("assignment"), f"{part[:12]}…, as the client runs the whole model", whole
        )
    task = TrainTask(
        fields.text("client"),
        fields.whole("round"),
        fields.whole("attempt"),
        fields.whole("seed", -reading.WHOLE),
        assignment,
        cut,
    )
    request = TrainRequest(
        task,
        whole,
        fields.whole("score_every"),
        fields.choice("metric", METRICS),
        fields.number("seconds", 0.0, LONGEST_WAIT),
        _access(fields, task),
    )
    packet.close()
    return request


def _assignment(packet: Packet) -> Assignment:
    fields = packet.fields
    start = read_adapter(packet, "start")
    frozen = _only("frozen", LowRank, read_adapter(packet, "frozen"), packet)
    merged = _only("merged", Dense, read_adapter(packet, "merged"), packet)
    frozen = Adapter({**_negatives(fields, start, frozen), **frozen})
    for role, term in (("frozen", frozen), ("merged", merged)):
        for site in term.keys() & start.keys():
            if term[site].shape != start[site].shape:
                place = f"{packet.place}, {role} at {site!r}"
                raise refusal(place, f"the start's shape {start[site].shape}", term[site].shape)
    scales, at = fields.items("scale"), fields.at("scale")
    if len(scales) != len(start):
        raise refusal(at, f"{len(start)} numbers, one of each site", len(scales))
    scale = {site: _real(value, at) for site, value in zip(start, scales, strict=True)}
    train = fields.choice("train", TRAINED)
    return Assignment(start, scale, frozen, merged, train, _penalty(fields, start))


def _only(role: str, kind: type[D], adapter: Adapter[Delta], packet: Packet) -> Adapter[D]:
    terms = {}
    for site, delta in adapter.items():
        if not isinstance(delta, kind):
            place = f"{packet.place}, {role} at {site!r}"
            raise refusal(place, kind.__name__, type(delta).__name__)
        terms[site] = delta
    return Adapter(terms)


def _negatives(
    fields: Fields, start: Adapter[Delta], frozen: Mapping[str, Delta]
) -> dict[str, LowRank]:
    """Make the frozen terms that did not travel: −B, A of the start."""
    sites, at = [*start], fields.at("negatives")
    made = {}
    for item in fields.items("negatives"):
        site = sites[reading.whole(item, at, 0, len(sites) - 1)]
        delta = start[site]
        if not isinstance(delta, LowRank) or site in frozen or site in made:
            raise refusal(at, "sites with a low-rank start and no other frozen term", repr(site))
        made[site] = LowRank(-delta.b, delta.a)
    return made


def _penalty(fields: Fields, start: Adapter[Delta]) -> Penalty | None:
    if fields.gone("penalty"):
        return None
    table = fields.table("penalty")
    strength = _real(table.take("strength"), table.at("strength"))
    keep = {}
    for site, rank, place in table.table("keep").named():
        if site not in start:
            raise refusal(place, "a site that starts", "another")
        keep[site] = reading.whole(rank, place, 0, start[site].rank)
    table.close()
    return Penalty(strength, keep)


def _real(value: object, place: str) -> float:
    """Return a number with a point: a whole one has no bits to hash."""
    if not isinstance(value, float):
        raise refusal(place, "a floating-point number", reading.shown(value))
    return reading.number(value, place)


def _cut(fields: Fields) -> CutPoint | None:
    if fields.gone("cut"):
        return None
    cuts, at = fields.items("cut"), fields.at("cut")
    if len(cuts) != 2:
        raise refusal(at, "a lower and an upper cut", f"{len(cuts)} numbers")
    lower = reading.whole(cuts[0], at, 1)
    return CutPoint(lower, None if cuts[1] is None else reading.whole(cuts[1], at, lower + 1))


def _access(fields: Fields, task: TrainTask) -> Credentials | None:
    if fields.gone("access"):
        return None
    at = fields.at("access")
    table: Any = fields.take("access")
    Fields(table, at)
    from polyrank.transport.remote.credentials import Credentials

    try:
        access = Credentials.from_dict(table)
    except PacketError:
        raise
    except (PolyrankError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise PacketError(f"{at}: {str(error)[:500]}") from error
    for name in ("client", "round", "attempt"):
        if getattr(access, name) != getattr(task, name):
            raise refusal(
                f"{at}, {name}", f"the task's {getattr(task, name)!r}", repr(getattr(access, name))
            )
    return access
