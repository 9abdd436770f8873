"""What the split server's process is told to train and what it hands back, as packets.

Both are packets that travel to clients too: a tail's job is an order, and what was trained an
answer to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from polyrank.aggregation import Assignment, Update
from polyrank.algebra import Adapter, Dense
from polyrank.errors import PacketError, PolyrankError
from polyrank.protocol.adapters import read_adapter, write_adapter
from polyrank.protocol.json_fields import refusal
from polyrank.protocol.packet import Packet, pack
from polyrank.protocol.size_limits import ORDERS, SizeLimits
from polyrank.protocol.train_request import TrainRequest, read_order, write_order
from polyrank.protocol.train_result import read_answer, write_answer
from polyrank.rounds.messages import TrainTask
from polyrank.split_server.interface import Collected
from polyrank.training import LocalTraining, Scoring
from polyrank.training.split import ServerPartJob, Traffic


def write_job(job: ServerPartJob) -> bytes:
    """Return the order of a tail, which says all but how it is trained: see `manner`."""
    task = TrainTask(job.client, job.round, job.attempt, job.seed, job.assignment, job.cut)
    whole, scoring = job.assignment.hash(), job.scoring
    return write_order(TrainRequest(task, whole, scoring.every, scoring.metric, 0.0))


def manner(job: ServerPartJob) -> dict[str, Any]:
    """Return how a tail is trained, and in how many steps, as JSON."""
    return {"local": asdict(job.local), "steps": job.steps}


def read_job(data: bytes | bytearray, told: object) -> ServerPartJob:
    """Return the job of an order and what `manner` told; PacketError for anything else."""
    order = read_order(data)
    task = order.task
    if task.cut is None or not isinstance(told, Mapping):
        raise refusal("order packet, cut", "that of a split client", "none")
    try:
        given = dict(told["local"])
        local = LocalTraining(**{**given, "betas": tuple(given["betas"])})
        steps = int(told["steps"])
    except (PolyrankError, KeyError, TypeError, ValueError) as error:
        raise PacketError(f"tail of {task.client!r}: no training can be read: {error}") from error
    return ServerPartJob(
        client=task.client,
        round=task.round,
        attempt=task.attempt,
        cut=task.cut,
        assignment=task.assignment,
        local=local,
        seed=task.seed,
        steps=steps,
        scoring=Scoring(order.score_every, order.metric),
    )


def write_merged(site: str, dense: Dense) -> bytes:
    """Return the packet of what is merged into the base at one site."""
    return pack("merged", {}, write_adapter("merged", {site: dense}))


def read_merged(data: bytes | bytearray) -> dict[str, Dense]:
    """Return what `write_merged` wrote; PacketError for anything else."""
    packet = Packet(data, "merged", ORDERS)
    found: dict[str, Dense] = {}
    for site, delta in read_adapter(packet, "merged").items():
        if not isinstance(delta, Dense):
            raise refusal(f"{packet.place}, {site!r}", "Dense", type(delta).__name__)
        found[site] = delta
    packet.close()
    return found


@dataclass(frozen=True)
class Dealt:
    """What an opened tail was dealt, and so what may come of it."""

    client: str
    round: int
    attempt: int
    assignment: Assignment

    @staticmethod
    def of(job: ServerPartJob) -> Dealt:
        """Return what a job deals."""
        return Dealt(job.client, job.round, job.attempt, job.assignment)

    @property
    def bounds(self) -> SizeLimits:
        """How large the answer may be."""
        return SizeLimits.of(self.assignment, len(self.assignment.start))

    def write(self, collected: Collected) -> bytes:
        """Return what was trained as an answer to what was dealt."""
        traffic = collected.traffic
        update = Update(
            client=self.client,
            round=self.round,
            attempt=self.attempt,
            assignment=self.assignment.hash(),
            examples=1,  # Only the client knows how many there are.
            adapter=Adapter(collected.adapter),
            metrics={"up": float(traffic.up), "down": float(traffic.down)},
            importance=dict(collected.importance),
        )
        return write_answer(update, self.assignment)

    def read(self, data: bytes | bytearray) -> Collected:
        """Return what `write` wrote; PacketError for what is no answer to this."""
        update = read_answer(data, self.bounds, self.assignment)
        mine = (self.client, self.round, self.attempt)
        came = (update.client, update.round, update.attempt)
        if not isinstance(update, Update) or came != mine:
            raise refusal("answer packet", f"what was trained of {mine}", repr(came))
        extra = update.importance.keys() - self.assignment.start.keys()
        if extra:
            raise refusal("answer packet, importance", "sites that were dealt", sorted(extra)[:3])
        traffic = Traffic(int(update.metrics["up"]), int(update.metrics["down"]))
        return Collected(update.adapter, update.importance, traffic)
