"""Registration: every machine is asked which clients it hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from polyrank.data import ClientData, Clients, RowsElsewhere
from polyrank.errors import PacketError, RecipeError
from polyrank.protocol.client_info import PARTS, ClientInfo, NodeInfo, read_node_info
from polyrank.remote.message_channel import Message, MessageChannel, Reply
from polyrank.training.client_data import ClientWork

SETTLED = 3.0
"""Seconds without a new machine after which all are there, where their number is not known."""


@dataclass
class ClientRegistry:
    """The machines' descriptions of themselves; `node_of` is the machine that hosts a client.

    With `names`, no other clients train.
    """

    names: Collection[str] | None = None
    nodes: dict[int, NodeInfo] = field(default_factory=dict)
    node_of: dict[str, int] = field(default_factory=dict)

    @property
    def clients(self) -> list[ClientInfo]:
        """All registered clients, by name."""
        registered = [
            client
            for node, info in self.nodes.items()
            for client in info.clients
            if self.node_of.get(client.name) == node
        ]
        return sorted(registered, key=lambda client: client.name)

    def register(self, node: int, info: NodeInfo) -> list[str]:
        """Register a machine and its clients; return lines that say what came of it."""
        self.nodes[node] = info
        lines = []
        if info.refusal is not None:
            lines.append(f"machine {node} takes no part: {info.refusal}")
        for client in info.clients:
            name = client.name
            if name in self.node_of:
                lines.append(
                    f"{name}: machine {node} hosts it too, and machine {self.node_of[name]} was "
                    "first; its name must be its own"
                )
                continue
            if self.names is not None and client.seen and name not in self.names:
                lines.append(f"{name}: fleet.clients does not name it, so it takes no part")
                continue
            self.node_of[name] = node
            rows = client.counts["train"].rows
            kind = f"{rows} training examples" if client.seen else "held out"
            device = f", {info.device.name}" if info.device is not None else ""
            lines.append(f"{name}: {kind}{device}")
        return lines


def discover(
    channel: MessageChannel,
    names: Collection[str] | None,
    count: int,
    seconds: float,
    tell: Callable[[str], None],
    check_stop: Callable[[], None],
    fits: Callable[[NodeInfo], str | None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> ClientRegistry:
    """Ask every machine that appears which clients it hosts, until the wanted clients are there.

    Wanted are the clients of these `names`, or so many (`count`), or, where neither is known, all
    machines that appear before none has appeared for a moment. Where `names` are given, other
    clients of these machines do not train. `fits` says why a machine cannot take part. Machines
    that were asked are waited for; after `seconds` the run begins without those that are silent.
    In a simulation all machines are there from the start: once they have answered, no others are
    waited for. Raises RecipeError if wanted clients are missing then.
    """
    registry, began = ClientRegistry(names), clock()
    asked: dict[str, int] = {}
    known: set[int] = set()
    last = began
    while True:
        check_stop()
        new = [node for node in channel.nodes() if node not in known]
        if new:
            ids = channel.send([Message(node, "hello", b"") for node in new], seconds)
            for node, message_id in zip(new, ids, strict=True):
                if message_id is not None:
                    asked[message_id] = node
                    known.add(node)
                    last = clock()
        for reply in channel.receive(asked):
            last = clock()
            node = asked.pop(reply.message_id)
            for line in registry.register(node, _node_info(reply, fits)):
                tell(line)
        settled = clock() - last > SETTLED
        missing = _missing(registry, names, count, settled=settled)
        if not missing and not asked:
            return registry
        complete = channel.simulated and settled and not asked and bool(registry.nodes)
        if clock() <= began + seconds and not complete:
            continue
        if missing:
            waited = None if complete else min(clock() - began, seconds)
            raise RecipeError(_too_few(registry, missing, asked.values(), waited))
        tell(f"machines {sorted(asked.values())} take no part: they have not answered")
        return registry


def _node_info(reply: Reply, fits: Callable[[NodeInfo], str | None]) -> NodeInfo:
    """Return what a machine has told of itself, or that it takes no part and why."""
    if reply.payload is None:
        return NodeInfo((), refusal=reply.error)
    try:
        info = read_node_info(reply.payload)
    except PacketError as error:
        return NodeInfo((), refusal=str(error))
    refusal = info.refusal or fits(info)
    return info if refusal is None else NodeInfo((), refusal=refusal)


def _missing(
    registry: ClientRegistry, names: Collection[str] | None, count: int, *, settled: bool
) -> str | None:
    """Say which clients are not there yet; None if none is missing."""
    if names is not None:
        absent = sorted(set(names) - registry.node_of.keys())
        return f"the clients {absent[:10]} are not there" if absent else None
    training = sum(client.seen for client in registry.clients)
    if count:
        return f"{training} of {count} clients are there" if training < count else None
    return None if settled and training else f"{training} clients are there"


def _too_few(
    registry: ClientRegistry, missing: str, silent: Collection[int], seconds: float | None
) -> str:
    """Say which clients are missing, which are there, and what may be the reason.

    `seconds` were waited; None: all machines have answered, and there will be no others.
    """
    refusals = sorted({info.refusal for info in registry.nodes.values() if info.refusal})
    there = f"; there are {sorted(registry.node_of)}" if registry.node_of else ""
    reasons = [f"a machine takes no part: {refusal}" for refusal in refusals[:10]]
    if silent:
        reasons.append(f"machines {sorted(silent)[:10]} were asked and have not answered yet")
    why = "".join(f"\n  {reason}" for reason in reasons)
    if seconds is None:
        return f"simulation: {missing}{there}; all its machines have answered{why}"
    todo = "put these right, or start others" if refusals else "start the others"
    return f"app.wait: after {seconds:.0f} s {missing}{there}; {todo}, or raise app.wait{why}"


def work_of(client: ClientInfo) -> ClientWork:
    """Return a client whose rows are counted and cannot be read here."""
    rows = {
        part: RowsElsewhere(client.name, counts.rows, counts.tokens, counts.targets)
        for part, counts in client.counts.items()
    }
    examples = dict.fromkeys(PARTS, ())
    return ClientWork(client.name, client.category, client.seen, rows, examples, client.fingerprint)


def clients_of(clients: Iterable[ClientInfo]) -> Clients:
    """Return the clients without their examples: their names, categories, and who is held out."""
    return Clients(
        ClientData(client.name, (), (), (), client.category, client.seen) for client in clients
    )
