"""What is written down of a round, and the summary of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    (`polyrank.rounds.messages.Kind`) and reason; `clipped` the share of its way that counted,
    per client whose update was shortened; `traffic` the bytes ``up`` and ``down`` per client, which
    sum to `bytes_up` and `bytes_down`. Records of before lack these three: `traffic` is then None.
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
    ) -> RoundRecord:
        """Return the record of a round, given its attempts; the last is the one that succeeded."""
        round = attempts[-1]
        receipts = [round.accepted[client] for client in sorted(round.accepted)]
        targets = sum(r.metrics["target_tokens"] for r in receipts)
        present = [types[client] for client in round.clients]
        return RoundRecord(
            schema=SCHEMA,
            round=round.number,
            attempt=round.attempt,
            clients=list(round.clients),
            ranks={name: present.count(name) for name in sorted(set(present))},
            loss=sum(r.metrics["loss"] * r.metrics["target_tokens"] for r in receipts) / targets,
            tokens=int(sum(r.metrics["tokens"] for a in attempts for r in a.accepted.values())),
            bytes_down=sum(attempt.bytes_down for attempt in attempts),
            bytes_up=sum(attempt.bytes_up for attempt in attempts),
            energy={site: [r.energy, r.discarded] for site, r in sorted(reports.items())},
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
                dataclasses.asdict(one) for attempt in attempts for one in attempt.turned_away
            ],
            clipped={
                client: receipt.clipped
                for client, receipt in sorted(round.accepted.items())
                if receipt.clipped < 1
            },
            traffic=added(attempt.traffic for attempt in attempts),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> RoundRecord:
        """Return the record that `to_json` gave; RunError for one of another layout."""
        if found.get("schema") != SCHEMA:
            raise RunError(
                f"rounds.jsonl: expected records of schema {SCHEMA}, got {found.get('schema')}; "
                "another version wrote them"
            )
        return RoundRecord(**found)

    @property
    def late(self) -> list[str]:
        """The clients that were late in the round, once for each attempt."""
        return [one["client"] for one in self.turned_away if one["kind"] == "late"]

    @property
    def discarded(self) -> float:
        """The share of the aggregate's energy that the cut to the server's rank took away."""
        total = sum(energy for energy, _ in self.energy.values())
        return sum(lost for _, lost in self.energy.values()) / total if total else 0.0

    @property
    def validation_loss(self) -> float | None:
        """The global adapter's loss on the seen clients' validation parts, if evaluated."""
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
        carried = self.wire_up + self.wire_down
        wire = f" (wire {mebibytes(carried)})" if carried else ""
        return (
            f"round {self.round}: loss {self.loss:.4f}{evaluated}"
            f"  {len(self.clients) - len(self.rejected)} clients"
            f"  up {mebibytes(self.bytes_up)}  down {mebibytes(self.bytes_down)}{wire}"
            f"  discarded {self.discarded:.2%}  {self.seconds['total']:.1f} s"
        )


def mebibytes(count: int) -> str:
    """Return a number of bytes as text, e.g. ``3.1 MiB``."""
    return f"{count / 2**20:.1f} MiB"


def summary(
    *,
    method: str,
    records: Sequence[Mapping[str, Any]],
    base: Mapping[str, Any],
    final: Mapping[str, Any],
    target: float | None,
    target_perplexity: float | None = None,
    stopped: str | None,
    result_round: int,
    adapter_lost: float,
) -> dict[str, Any]:
    """Return summary.json's content; `base` and `final` are evaluations on the test parts.

    `adapter_lost` is the share of energy that the adapter folder lacks of what `final` evaluates.
    Where there is a benchmark, its scores are there too, without the texts. ``clients`` tells what
    each client did (`polyrank.run.records`).
    """
    keys = ("loss", "loss_se", "exact_match", "rouge_l", "clients")

    def short(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        return {who: {k: evaluation[who][k] for k in keys} for who in ("seen", "unseen")}

    def held_out(evaluation: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in evaluation["benchmark"].items() if k != "texts"}

    benchmark: dict[str, Any] = {}
    if "benchmark" in final:
        benchmark["benchmark"] = {"base": held_out(base), "final": held_out(final)}
        benchmark["to_target_perplexity"] = to_target_perplexity(records, target_perplexity)
    return {
        "schema": SCHEMA,
        "method": method,
        "rounds": len(records),
        "result_round": result_round,
        "adapter_lost": adapter_lost,
        "stopped": stopped,
        "seconds": sum(r["seconds"]["total"] for r in records),
        "tokens": sum(r["tokens"] for r in records),
        "bytes_up": sum(r["bytes_up"] for r in records),
        "bytes_down": sum(r["bytes_down"] for r in records),
        "wire_up": sum(r.get("wire_up", 0) for r in records),  # Records of before lack them.
        "wire_down": sum(r.get("wire_down", 0) for r in records),
        "to_target": to_target(records, target),
        "base": short(base),
        "final": short(final),
        **benchmark,
        "clients": attendance(records),
        "per_category": final["per_category"],
    }


def to_target(records: Sequence[Mapping[str, Any]], loss: float | None) -> dict[str, Any] | None:
    """Return rounds, bytes and seconds until the seen clients' validation loss fell to `loss`.

    None if no target was given; values of None if it was not reached.
    """

    def measured(record: Mapping[str, Any]) -> float | None:
        evaluation = record["evaluation"]
        return evaluation["server"]["seen"]["loss"] if evaluation else None

    if loss is None:
        return None
    spent = _until(records, loss, measured)
    return {"loss": loss, **{key: spent[key] for key in ("rounds", "bytes", "seconds")}}


def to_target_perplexity(
    records: Sequence[Mapping[str, Any]], perplexity: float | None
) -> dict[str, Any] | None:
    """Return the same for the perplexity on the benchmark, and the seconds by the cost model."""

    def measured(record: Mapping[str, Any]) -> float | None:
        found = record.get("benchmark")
        return found["perplexity"] if found else None

    if perplexity is None:
        return None
    return {"perplexity": perplexity, **_until(records, perplexity, measured)}


def _until(
    records: Sequence[Mapping[str, Any]],
    target: float,
    measured: Callable[[Mapping[str, Any]], float | None],
) -> dict[str, Any]:
    """What all rounds took together up to the first that measured the target or less."""
    for count, record in enumerate(records, start=1):
        reached = measured(record)
        if reached is not None and reached <= target:
            done = records[:count]
            modelled = [one.get("modelled_seconds") for one in done]
            return {
                "rounds": record["round"],
                "bytes": sum(one["bytes_up"] + one["bytes_down"] for one in done),
                "seconds": sum(one["seconds"]["total"] for one in done),
                "modelled_seconds": None if None in modelled else sum(modelled),
            }
    return dict.fromkeys(("rounds", "bytes", "seconds", "modelled_seconds"))


_REFUSED = {"invalid", "failed", "refused"}
_COUNTED = {**dict.fromkeys(_REFUSED, "refused"), "late": "late", "lost": "lost"}


def attendance(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """Return per client that was ever asked what it did in all rounds, in order of the names.

    ``rounds_joined`` counts the rounds with an accepted update of it, ``bytes_up`` and
    ``bytes_down`` all that travelled, ``refused`` the answers that said no or could not be used,
    ``late`` and ``lost`` how often none came in time, or at all. `records` are read once, in one
    pass. Records of before say no bytes per client, which are then None for all, and of refusals
    only how many clients had no accepted update in an attempt.
    """
    found: dict[str, dict[str, int]] = {}
    measured = True
    for record in records:
        traffic, away = record.get("traffic"), record.get("turned_away", [])
        measured &= traffic is not None
        for client in record["clients"]:
            _of(found, client)["rounds_joined"] += client not in record["rejected"]
        for client, count in (traffic or {}).items():
            for way, nbytes in count.items():
                _of(found, client)[f"bytes_{way}"] += nbytes
        if traffic is None:
            attempts = [record["rejected"], *record["abandoned"]]
            away = [{"client": c, "kind": "failed"} for one in attempts for c in one]
        for one in away:
            if one["kind"] in _COUNTED:
                _of(found, one["client"])[_COUNTED[one["kind"]]] += 1
    unknown = {} if measured else {"bytes_up": None, "bytes_down": None}
    return {client: {**found[client], **unknown} for client in sorted(found)}


def _of(found: dict[str, dict[str, int]], client: str) -> dict[str, int]:
    names = ("rounds_joined", "bytes_up", "bytes_down", "refused", "late", "lost")
    return found.setdefault(client, dict.fromkeys(names, 0))
