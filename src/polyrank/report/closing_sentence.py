"""The closing sentence of a run: its gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WHO = {"seen": "for clients that trained", "unseen": "for clients that did not"}


def gain(
    summary: Mapping[str, Any], control: Mapping[str, Any] | None = None, forced: str = ""
) -> str:
    """Return one sentence on the clients' test examples: before, after, and with the `control`.

    It tells how many answers match exactly, or the loss where no answers were generated. `forced`
    is the type that all clients of the control have.
    """
    base, final = summary["base"], summary["final"]
    groups = [who for who in _WHO if final[who]["clients"]]
    generated = all(final[who]["exact_match"] is not None for who in groups)
    what = "answers that match exactly" if generated else "the loss (lower is better)"
    changes = " and ".join(
        f"from {_score(base[who], generated)} to {_score(final[who], generated)} {_WHO[who]}"
        for who in groups
    )
    sentence = f"In short: {what} went {changes}"
    if control is None:
        return f"{sentence}."
    reached = " and ".join(_score(control["final"][who], generated) for who in groups)
    where = "at the weakest type" if forced == "weakest" else f"of type {forced}"
    verb = "they reach" if generated else "it reaches"
    return f"{sentence}; with every client {where}, {verb} {reached}."


def _score(scores: Mapping[str, Any], generated: bool) -> str:
    value = scores["exact_match" if generated else "loss"]
    if value is None:
        return "–"
    return f"{value:.0%}" if generated else f"{value:.2f}"
