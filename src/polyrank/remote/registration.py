"""Which clients there are: what the machines answer that say hello."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from polyrank.data import ClientData, Clients, RowsElsewhere
from polyrank.errors import PacketError, RecipeError
from polyrank.protocol import ClientInfo, Profile, read_profile
from polyrank.remote.message_channel import Message, MessageChannel, Reply
from polyrank.training.client_data import ClientWork, Part

SETTLED = 3.0
"""Seconds without a new machine after which all are there, where their number is not known."""


@dataclass
class ClientRegistry:
    """Who was found: the machines' profiles, and which of them hosts a client.

    With `names`, nobody else trains.
    """

    names: Collection[str] | None = None
    profiles: dict[int, Profile] = field(default_factory=dict)
    homes: dict[str, int] = field(default_factory=dict)

    @property
    def hosted(self) -> list[ClientInfo]:
        """All clients, by name."""
        found = [
            one
            for node, profile in self.profiles.items()
            for one in profile.hosted
            if self.homes.get(one.client) == node
        ]
        return sorted(found, key=lambda one: one.client)

    def note(self, node: int, profile: Profile) -> list[str]:
        """Take a machine in; return what there is to tell of it."""
        self.profiles[node] = profile
        told = []
        if profile.refusal is not None:
            told.append(f"machine {node} takes no part: {profile.refusal}")
        for one in profile.hosted:
            if one.client in self.homes:
                told.append(
                    f"{one.client}: machine {node} hosts it too, and machine "
                    f"{self.homes[one.client]} was first; its name must be its own"
                )
                continue
            if self.names is not None and one.seen and one.client not in self.names:
                told.append(f"{one.client}: fleet.clients does not name it, so it takes no part")
                continue
            self.homes[one.client] = node
            rows = one.counts["train"].rows
            kind = f"{rows} training examples" if one.seen else "held out"
            device = f", {profile.device.name}" if profile.device is not None else ""
            told.append(f"{one.client}: {kind}{device}")
        return told


def call(
    post: MessageChannel,
    names: Collection[str] | None,
    count: int,
    seconds: float,
    tell: Callable[[str], None],
    check_stop: Callable[[], None],
    fits: Callable[[Profile], str | None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    *,
    complete: bool = False,
) -> ClientRegistry:
    """Ask machines as they come who they host, until those that are wanted are there.

    Wanted are the clients of these `names`, or so many (`count`), or, where neither is known, all
    machines that come before none has come for a moment. Where `names` are given, others of these
    machines that would train take no part. `fits` says why a machine cannot take part. Machines
    that were asked are waited for; after `seconds` the run begins without those that are silent.
    With `complete`, as in a simulation, all machines are there from the start: once they have
    answered, no others are waited for.
    Raises RecipeError if clients that are wanted are not there then.
    """
    roll, begun = ClientRegistry(names), clock()
    until = begun + seconds
    asked: dict[str, int] = {}
    tried: set[int] = set()
    last = clock()
    while True:
        check_stop()
        fresh = [node for node in post.nodes() if node not in tried]
        if fresh:
            tickets = post.send([Message(node, "hello", b"") for node in fresh], seconds)
            for node, ticket in zip(fresh, tickets, strict=True):
                if ticket is not None:
                    asked[ticket] = node
                    tried.add(node)
                    last = clock()
        for delivery in post.receive(asked):
            last = clock()
            for line in roll.note(*_profile(asked.pop(delivery.ticket), delivery, fits)):
                tell(line)
        missing = _missing(roll, names, count, settled=clock() - last > SETTLED)
        if not missing and not asked:
            return roll
        settled = clock() - last > SETTLED
        hopeless = complete and settled and not asked and bool(roll.profiles)
        if clock() <= until and not hopeless:
            continue
        if missing:
            waited = None if hopeless else min(clock() - begun, seconds)
            raise RecipeError(_too_few(roll, missing, asked.values(), waited))
        tell(f"machines {sorted(asked.values())} take no part: they have not answered")
        return roll


def _too_few(
    roll: ClientRegistry, missing: str, silent: Collection[int], seconds: float | None
) -> str:
    """Say who is missing, who is there, and what may be the reason.

    `seconds` were waited; None: all machines have answered, and there will be no others.
    """
    refusals = sorted({p.refusal for p in roll.profiles.values() if p.refusal is not None})
    there = f"; there are {sorted(roll.homes)}" if roll.homes else ""
    reasons = [f"a machine takes no part: {why}" for why in refusals[:10]]
    if silent:
        reasons.append(f"machines {sorted(silent)[:10]} were asked and have not answered yet")
    told = "".join(f"\n  {line}" for line in reasons)
    if seconds is None:
        return f"simulation: {missing}{there}; all its machines have answered{told}"
    todo = "put these right, or start others" if refusals else "start the others"
    return f"app.wait: after {seconds:.0f} s {missing}{there}; {todo}, or raise app.wait{told}"


def _profile(
    node: int, delivery: Reply, fits: Callable[[Profile], str | None]
) -> tuple[int, Profile]:
    if delivery.payload is None:
        return node, Profile((), refusal=delivery.lost)
    try:
        profile = read_profile(delivery.payload)
    except PacketError as error:
        return node, Profile((), refusal=str(error))
    refusal = profile.refusal or fits(profile)
    return node, profile if refusal is None else Profile((), refusal=refusal)


def _missing(
    roll: ClientRegistry, names: Collection[str] | None, count: int, *, settled: bool
) -> str | None:
    """Say who is not there yet; None if nobody is missing."""
    if names is not None:
        absent = sorted(set(names) - roll.homes.keys())
        return f"the clients {absent[:10]} are not there" if absent else None
    seen = sum(one.seen for one in roll.hosted)
    if count:
        return f"{seen} of {count} clients are there" if seen < count else None
    return None if settled and seen else f"{seen} clients are there"


PARTS: tuple[Part, ...] = ("train", "validation", "test")


def work_of(hosted: ClientInfo) -> ClientWork:
    """Return a client whose rows are counted and cannot be read here."""
    counts = hosted.counts
    return ClientWork(
        hosted.client,
        hosted.category,
        hosted.seen,
        {
            part: RowsElsewhere(
                hosted.client, counts[part].rows, counts[part].tokens, counts[part].targets
            )
            for part in PARTS
        },
        dict.fromkeys(PARTS, ()),
        hosted.fingerprint,
    )


def clients_of(hosted: Iterable[ClientInfo]) -> Clients:
    """Return the clients without their examples: who there is, and who is held out."""
    return Clients(ClientData(one.client, (), (), (), one.category, one.seen) for one in hosted)
