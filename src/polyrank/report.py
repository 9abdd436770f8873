"""Tables for people: what a run did, beside its control, and what is inside its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from polyrank.algebra import Adapter, factorise
from polyrank.federation import RoundRecord

_SCORES = (("loss", "loss", 4), ("exact_match", "exact match", 3), ("rouge_l", "ROUGE-L", 3))


def number(value: float | None, digits: int) -> str:
    """Return a score as text, or a dash where it was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def scores(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of seen and unseen scores, one column per result (e.g. base, FlexLoRA)."""
    table = Table(title=title, title_justify="left")
    table.add_column("clients")
    table.add_column("score")
    for name in columns:
        table.add_column(name, justify="right")
    for who in ("seen", "unseen"):
        for key, label, digits in _SCORES:
            values = [column[who][key] for column in columns.values()]
            if any(value is not None for value in values):
                table.add_row(who, label, *(number(value, digits) for value in values))
    return table


def categories(summary: Mapping[str, Any]) -> Table:
    """Return a table of the final scores per category."""
    table = Table(title="by category, after the last round", title_justify="left")
    table.add_column("category")
    table.add_column("clients", justify="right")
    for who in ("seen", "unseen"):
        for _, label, _ in _SCORES:
            table.add_column(f"{who} {label}", justify="right")
    for category, groups in summary["per_category"].items():
        cells = [number(groups[w][k], d) for w in ("seen", "unseen") for k, _, d in _SCORES]
        count = groups["seen"]["clients"] + groups["unseen"]["clients"]
        table.add_row(category, str(count), *cells)
    return table


def ranks(counts: Mapping[str, int], by_type: Mapping[str, Mapping[str, int]]) -> Table:
    """Return a table of LoRA types: how many clients, which ranks."""
    table = Table(title="ranks dealt", title_justify="left")
    for name in ("type", "clients", "ranks"):
        table.add_column(name)
    for name, count in counts.items():
        spread = sorted(set(by_type[name].values()))
        table.add_row(name, str(count), " and ".join(str(rank) for rank in spread))
    return table


def rounds(records: Sequence[RoundRecord]) -> Table:
    """Return a table of the rounds of a run."""
    table = Table(title="rounds", title_justify="left")
    for name in ("round", "loss", "validation", "clients", "up", "down", "discarded", "seconds"):
        table.add_column(name, justify="right")
    for r in records:
        table.add_row(
            str(r.round),
            number(r.loss, 4),
            number(r.validation_loss, 4),
            str(len(r.clients) - len(r.rejected)),
            f"{r.bytes_up / 2**20:.1f} MiB",
            f"{r.bytes_down / 2**20:.1f} MiB",
            f"{r.discarded:.2%}",
            f"{r.seconds['total']:.1f}",
        )
    return table


def spectra(adapter: Adapter, last: RoundRecord | None) -> Table:
    """Return per site the stored rank, the singular values, and the energy discarded last."""
    table = Table(title="global adapter", title_justify="left")
    for name in ("site", "matrix", "rank", "‖D‖", "σ₁", "σ½", "σᵣ", "90% in rank", "discarded"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for site, delta in adapter.items():
        s = factorise(delta, max(1, delta.rank)).s.double()
        energy = (s**2).cumsum(0)
        total = float(energy[-1])
        ninety = int((energy < 0.9 * total).sum()) + 1 if total else 0
        kept, lost = (last.energy.get(site, [0.0, 0.0])) if last else (0.0, 0.0)
        table.add_row(
            site,
            f"{delta.shape[0]}×{delta.shape[1]}",
            str(delta.rank),
            f"{total**0.5:.3g}",
            *(f"{float(s[i]):.2g}" for i in (0, len(s) // 2, -1)),
            str(ninety),
            f"{lost / kept:.2%}" if kept else "–",
        )
    return table
