"""The record of a round: one line of rounds.jsonl."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyrank.aggregation import SiteReport
from polyrank.errors import RunError
from polyrank.rounds.round import Round, added

SCHEMA = 1
"""Version of the records' layout; a reader refuses what it does not know."""


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl. Bytes are the tensors' of all clients; `seconds` is by phase.

    `loss` is the mean training loss per target token over the accepted clients' local steps;
    `energy` gives per site [‖D‖², what the cut to the server's rank took away]; `ranks` says how
    many of the round's clients were of each LoRA type; `evaluation` is null where none was made.
    `rejected` gives the reason per client without an accepted update, `abandoned` the same for each
    attempt before, which had too few; tokens and bytes count those attempts too. `cuts` says how
    many of the round's clients run their whole model, or the blocks below which cut (``2–6``: a
    U-shape); `wire_up` and `wire_down` are the bytes of activations and gradients within
    `bytes_up` and `bytes_down`. `benchmark` gives the loss and perplexity on a held-out source,
    where they were taken; `modelled_seconds` how long the round takes by the cost model, where
    there is one, and `planned_anew` that ranks and cuts were planned again after it. Only `seconds`
    may differ between a run and its repetition in one process.

    `turned_away` has every answer of all attempts that was not aggregated, as client, kind
    (`polyrank.rounds.messages.RejectionKind`) and reason; `clipped` the share of its increment
    that counted, per client whose update was shortened; `traffic` the bytes ``up`` and ``down`` per
    client, which sum to `bytes_up` and `bytes_down`. Old records lack these three: `traffic` is
    then None.

    `loss` is of other clients in every round. `losses` gives each accepted client's own, and
    `loss_change` compares like with like: the mean, over those of these clients that had an
    accepted update in an earlier round, of their loss now minus their loss then; below 0 is better.
    It is None where there is no such client. Records of version 0.1 lack both.
    """

    schema: int
    round: int
    attempt: int
    clients: list[str]
    ranks: dict[str, int]
    loss: float
    tokens: int
    bytes_down: int
    bytes_up: int
    energy: dict[str, list[float]]
    rejected: dict[str, str]
    abandoned: list[dict[str, str]]
    evaluation: dict[str, Any] | None
    seconds: dict[str, float]
    cuts: dict[str, int] = field(default_factory=dict)
    wire_up: int = 0
    wire_down: int = 0
    benchmark: dict[str, Any] | None = None
    modelled_seconds: float | None = None
    planned_anew: bool = False
    turned_away: list[dict[str, str]] = field(default_factory=list)
    clipped: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] | None = None
    losses: dict[str, float] = field(default_factory=dict)
    loss_change: float | None = None

    @staticmethod
    def of(
        attempts: Sequence[Round],
        types: Mapping[str, str],
        reports: Mapping[str, SiteReport],
        evaluation: dict[str, Any] | None,
        seconds: dict[str, float],
        *,
        benchmark: dict[str, Any] | None = None,
        modelled_seconds: float | None = None,
        planned_anew: bool = False,
        last_losses: Mapping[str, float] | None = None,
    ) -> RoundRecord:
        """Return the record of a round, given its attempts; the last is the one that succeeded.

        `last_losses` are the clients' losses of the last earlier round with an update of theirs.
        """
        round, before = attempts[-1], last_losses or {}
        accepted = dict(sorted(round.accepted.items()))
        losses = {client: update.metrics["loss"] for client, update in accepted.items()}
        changes = [loss - before[client] for client, loss in losses.items() if client in before]
        targets = {client: update.metrics["target_tokens"] for client, update in accepted.items()}
        present = [types[client] for client in round.clients]
        return RoundRecord(
            schema=SCHEMA,
            round=round.number,
            attempt=round.attempt,
            clients=list(round.clients),
            ranks={name: present.count(name) for name in sorted(set(present))},
            loss=sum(losses[client] * targets[client] for client in losses) / sum(targets.values()),
            tokens=int(
                sum(
                    update.metrics["tokens"]
                    for attempt in attempts
                    for update in attempt.accepted.values()
                )
            ),
            bytes_down=sum(attempt.bytes_down for attempt in attempts),
            bytes_up=sum(attempt.bytes_up for attempt in attempts),
            energy={
                site: [report.energy, report.discarded] for site, report in sorted(reports.items())
            },
            rejected=dict(sorted(round.rejected.items())),
            abandoned=[dict(sorted(attempt.rejected.items())) for attempt in attempts[:-1]],
            evaluation=evaluation,
            seconds=seconds,
            cuts=round.cuts,
            wire_up=sum(attempt.wire_up for attempt in attempts),
            wire_down=sum(attempt.wire_down for attempt in attempts),
            benchmark=benchmark,
            modelled_seconds=modelled_seconds,
            planned_anew=planned_anew,
            turned_away=[
                dataclasses.asdict(rejection)
                for attempt in attempts
                for rejection in attempt.rejections
            ],
            clipped={
                client: update.clipped for client, update in accepted.items() if update.clipped < 1
            },
            traffic=added(attempt.traffic for attempt in attempts),
            losses=losses,
            loss_change=statistics.fmean(changes) if changes else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> RoundRecord:
        """Return the record that `to_json` gave; RunError for one of another layout."""
        if content.get("schema") != SCHEMA:
            raise RunError(
                f"rounds.jsonl: expected records of schema {SCHEMA}, got {content.get('schema')}; "
                "another version wrote them"
            )
        return RoundRecord(**content)

    @property
    def late(self) -> list[str]:
        """The clients that were late in the round, once for each attempt."""
        return [answer["client"] for answer in self.turned_away if answer["kind"] == "late"]

    @property
    def discarded(self) -> float:
        """The share of the aggregate's energy that the cut to the server's rank took away."""
        total = sum(energy for energy, _ in self.energy.values())
        return sum(lost for _, lost in self.energy.values()) / total if total else 0.0

    @property
    def validation_loss(self) -> float | None:
        """The global adapter's loss on the training clients' validation parts, if evaluated."""
        return self.evaluation["server"]["seen"]["loss"] if self.evaluation else None

    @property
    def perplexity(self) -> float | None:
        """The global adapter's perplexity on the benchmark, if it was taken."""
        return self.benchmark["perplexity"] if self.benchmark else None

    def __str__(self) -> str:
        validation = self.validation_loss
        evaluated = "" if validation is None else f"  validation {validation:.4f}"
        if self.perplexity is not None:
            evaluated += f"  perplexity {self.perplexity:.3f}"
        change = ""
        if self.loss_change is not None:
            change = f" ({self.loss_change:+.4f} for the clients that trained before)"
        carried = self.wire_up + self.wire_down
        wire = f" (wire {mebibytes(carried)})" if carried else ""
        return (
            f"round {self.round}: loss {self.loss:.4f}{change}{evaluated}"
            f"  {len(self.clients) - len(self.rejected)} clients"
            f"  up {mebibytes(self.bytes_up)}  down {mebibytes(self.bytes_down)}{wire}"
            f"  discarded {self.discarded:.2%}  {self.seconds['total']:.1f} s"
        )


def mebibytes(count: int) -> str:
    """Return a number of bytes as text, e.g. ``3.1 MiB``."""
    return f"{count / 2**20:.1f} MiB"


def last_losses(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the loss of each client in the last of these rounds with an accepted update of it."""
    losses: dict[str, float] = {}
    for record in records:
        losses |= record.get("losses", {})  # Records of version 0.1 lack them.
    return losses
