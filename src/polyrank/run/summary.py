"""The summary of a run: scores before and after, what it took, and what each client did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from polyrank.run.records import SCHEMA


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
    each client did (`participation`), ``samples`` some texts before and after (`before_and_after`).
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
        "wire_up": sum(r.get("wire_up", 0) for r in records),  # Records of version 0.1 lack them.
        "wire_down": sum(r.get("wire_down", 0) for r in records),
        "to_target": to_target(records, target),
        "base": short(base),
        "final": short(final),
        **benchmark,
        "clients": participation(records),
        "per_category": final["per_category"],
        "samples": before_and_after(base.get("samples", []), final.get("samples", [])),
    }


def before_and_after(
    base: Iterable[Mapping[str, Any]], final: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the final evaluation's sample texts, each with the bare base's for the same prompt.

    ``before`` is None where an evaluation of an earlier version kept none.
    """

    def asked(sample: Mapping[str, Any]) -> tuple[str, ...]:
        return sample["client"], sample["prompt"], sample["input"]

    texts = {asked(sample): sample["text"] for sample in base}
    return [
        {
            **{key: value for key, value in sample.items() if key != "text"},
            "before": texts.get(asked(sample)),
            "after": sample["text"],
        }
        for sample in final
    ]


def to_target(records: Sequence[Mapping[str, Any]], loss: float | None) -> dict[str, Any] | None:
    """Return rounds, bytes and seconds until the training clients' validation loss fell to `loss`.

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
        scores = record.get("benchmark")
        return scores["perplexity"] if scores else None

    if perplexity is None:
        return None
    return {"perplexity": perplexity, **_until(records, perplexity, measured)}


def _until(
    records: Sequence[Mapping[str, Any]],
    target: float,
    measured: Callable[[Mapping[str, Any]], float | None],
) -> dict[str, Any]:
    """Return the cost of all rounds up to the first that measured the target or less."""
    for count, record in enumerate(records, start=1):
        reached = measured(record)
        if reached is not None and reached <= target:
            spent = records[:count]
            modelled = [each.get("modelled_seconds") for each in spent]
            return {
                "rounds": record["round"],
                "bytes": sum(each["bytes_up"] + each["bytes_down"] for each in spent),
                "seconds": sum(each["seconds"]["total"] for each in spent),
                "modelled_seconds": None if None in modelled else sum(modelled),
            }
    return dict.fromkeys(("rounds", "bytes", "seconds", "modelled_seconds"))


_COUNTED = {
    **dict.fromkeys(("invalid", "failed", "refused"), "refused"),
    "late": "late",
    "lost": "lost",
}
"""Why an answer was not aggregated -> what it counts as; other kinds count as nothing."""

_NAMES = ("rounds_joined", "bytes_up", "bytes_down", "refused", "late", "lost")


def participation(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """Return per client that was ever asked what it did in all rounds, in order of the names.

    ``rounds_joined`` counts the rounds with an accepted update of it, ``bytes_up`` and
    ``bytes_down`` all that travelled, ``refused`` the answers that said no or could not be used,
    ``late`` and ``lost`` how often none came in time, or at all. `records` are read once, in one
    pass. Old records lack bytes per client, which are then None for all, and of refusals they say
    only which clients had no accepted update in an attempt.
    """
    clients: dict[str, dict[str, int]] = {}

    def counts(client: str) -> dict[str, int]:
        return clients.setdefault(client, dict.fromkeys(_NAMES, 0))

    measured = True
    for record in records:
        traffic, rejections = record.get("traffic"), record.get("turned_away", [])
        for client in record["clients"]:
            counts(client)["rounds_joined"] += client not in record["rejected"]
        for client, nbytes in (traffic or {}).items():
            counts(client)["bytes_up"] += nbytes["up"]
            counts(client)["bytes_down"] += nbytes["down"]
        if traffic is None:
            measured = False
            attempts = [record["rejected"], *record["abandoned"]]
            rejections = [{"client": c, "kind": "failed"} for failed in attempts for c in failed]
        for rejection in rejections:
            if rejection["kind"] in _COUNTED:
                counts(rejection["client"])[_COUNTED[rejection["kind"]]] += 1
    unknown = {} if measured else {"bytes_up": None, "bytes_down": None}
    return {client: {**clients[client], **unknown} for client in sorted(clients)}
