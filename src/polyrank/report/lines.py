"""A run in lines: its rounds as they come, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyrank.report.words import count, duration, number
from polyrank.run import RoundRecord


def round_header(wire: bool = False) -> str:
    """Return the line above lines of `round_line`."""
    columns = "    MiB  wire MiB" if wire else "up MiB  down MiB"
    return f"round     loss   change  validation  clients  {columns}   lost  seconds"


def round_legend() -> str:
    """Return what a reader of `round_line` may take wrongly."""
    return (
        "loss: of the round's own clients, which are others each time; change: the same clients' "
        "loss now minus that of their last round, below 0 is better"
    )


def round_line(record: RoundRecord, wire: bool = False) -> str:
    """Return a finished round as one line under `round_header`.

    Bytes are up and down or, with `wire`, both together and the activations and gradients in them.
    """
    sent = f"{record.bytes_up / 2**20:6.1f}  {record.bytes_down / 2**20:8.1f}"
    if wire:
        both, carried = record.bytes_up + record.bytes_down, record.wire_up + record.wire_down
        sent = f"{both / 2**20:7.1f}  {carried / 2**20:8.1f}"
    return (
        f"{record.round:5}  {record.loss:7.4f}  {number(record.loss_change, 4, '+'):>7}"
        f"  {number(record.validation_loss, 4):>10}"
        f"  {len(record.clients) - len(record.rejected):7}"
        f"  {sent}  {record.discarded:5.1%}  {record.seconds['total']:7.1f}"
    )


def remarks(record: RoundRecord) -> list[str]:
    """Return lines on clients of a round whose updates are not aggregated, or only shortened."""
    silent = ("late", "lost")
    kinds = {
        answer["client"]: answer["kind"]
        for answer in record.turned_away
        if answer["kind"] in silent
    }
    lines = [
        f"{kinds.get(client, 'refused')} {client}: {why}" for client, why in record.rejected.items()
    ]
    if record.clipped:
        client, least = min(record.clipped.items(), key=lambda item: item[1])
        lines.append(
            f"shortened {count(len(record.clipped), 'update')}, most of all {client}: "
            f"{least:.3g} of its way counts"
        )
    return lines


def perplexity(record: RoundRecord) -> str | None:
    """Return the perplexity on the benchmark after a round, if it was measured."""
    if record.benchmark is None:
        return None
    return f"perplexity {number(record.benchmark['perplexity'], 3)} on the benchmark"


def own_rank(record: RoundRecord) -> str | None:
    """Return the validation loss of what clients get at their own ranks, if it was measured."""
    if record.evaluation is None or record.evaluation["own_rank"] is None:
        return None
    losses = {name: scores["loss"] for name, scores in record.evaluation["own_rank"].items()}
    everyone = losses.pop("all")
    by_type = ", ".join(f"{name} {number(loss, 4)}" for name, loss in losses.items())
    return (
        f"validation after round {record.round}: {number(record.validation_loss, 4)} at the "
        f"server's rank, {number(everyone, 4)} at the clients' own ({by_type})"
    )


def spent(summary: Mapping[str, Any]) -> str:
    """Return what a run took, and how it ended, in one or two sentences."""
    text = (
        f"{count(summary['rounds'], 'round')} in {duration(summary['seconds'])}, "
        f"{summary['bytes_up'] / 2**20:.1f} MiB up, {summary['bytes_down'] / 2**20:.1f} MiB down."
    )
    wire = summary.get("wire_up", 0) + summary.get("wire_down", 0)  # Runs of before had no cuts.
    if wire:
        text += f" {wire / 2**20:.1f} MiB of that are activations and gradients."
    if summary["stopped"]:
        text += f" Stopped early: {summary['stopped']}; result of round {summary['result_round']}."
    lost = summary.get("adapter_lost", 0.0)  # Runs of before had no exact sums.
    if lost > 1e-6:
        text += (
            f" The update is an exact sum; the adapter folder, at the server's rank, lacks "
            f"{lost:.2%} of its energy (`polyrank export --merged` keeps all)."
        )
    target = summary["to_target"]
    if target and target["rounds"] is None:
        text += f" The target loss {target['loss']:g} was not reached."
    elif target:
        text += (
            f" The target loss {target['loss']:g} was reached after {target['rounds']} rounds, "
            f"{target['bytes'] / 2**20:.1f} MiB and {duration(target['seconds'])}."
        )
    target = summary.get("to_target_perplexity")
    if target and target["rounds"] is None:
        text += f" The target perplexity {target['perplexity']:g} was not reached."
    elif target:
        modelled = target["modelled_seconds"]
        also = "" if modelled is None else f" ({duration(modelled)} by the cost model)"
        text += (
            f" The target perplexity {target['perplexity']:g} was reached after "
            f"{count(target['rounds'], 'round')}, {target['bytes'] / 2**20:.1f} MiB and "
            f"{duration(target['seconds'])}{also}."
        )
    return text
