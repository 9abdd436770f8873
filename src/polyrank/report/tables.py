"""Tables of a run: scores, ranks, clients, and what is in its adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from polyrank.planning import CutPoint
from polyrank.report.cuts import hosted
from polyrank.report.words import number
from polyrank.run.spectra import Spectrum
from polyrank.runner.inspect import SiteEnergy

_SCORES = (  # key, label, digits, sign of an improvement
    ("loss", "loss", 4, -1),
    ("exact_match", "exact match", 3, 1),
    ("rouge_l", "ROUGE-L", 3, 1),
)
_GROUPS = ("seen", "unseen")
_MOST_CLIENTS = 20
_MOST_ANSWERS = 3
_LONGEST = 300
_BENCHMARK = (
    ("validation", "perplexity", "perplexity", 3, "examples"),
    ("test", "bleu", "BLEU", 2, "generated"),
    ("", "nist", "NIST", 3, ""),
    ("", "rouge_l", "ROUGE-L", 3, ""),
)


def table(title: str) -> Table:
    """Return an empty table in the house style."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def scores(
    base: Mapping[str, Any],
    method: str,
    final: Mapping[str, Any],
    control: Mapping[str, Any] | None = None,
    forced: str = "",
) -> Table:
    """Return the scores on the test parts before and after, and beside the control's.

    The last column is the run's score minus the control's, and whether that is better or worse;
    `forced` is the type of the control.
    """
    made = table("scores on the test parts; loss: lower is better, the others: higher")
    made.add_column("clients")
    made.add_column("score")
    columns = {"before": base, method: final}
    if control is not None:
        columns[f"all {forced}"] = control
    for name in columns:
        made.add_column(name, justify="right", overflow="fold")
    if control is not None:
        made.add_column("difference", justify="right")
    for who in _GROUPS:
        for key, label, digits, good in _SCORES:
            values = [column[who][key] for column in columns.values()]
            if all(value is None for value in values):
                continue
            cells = [number(value, digits) for value in values]
            if control is not None:
                cells.append(_difference(values[1], values[2], digits, good))
            made.add_row(f"{who} ({final[who]['clients']})", label, *cells)
    return made


def _difference(ours: float | None, theirs: float | None, digits: int, good: int) -> str:
    """Return ours minus theirs and what that means; an improvement has the sign `good`."""
    if ours is None or theirs is None:
        return "–"
    sign = (ours - theirs) * good
    word = "better" if sign > 0 else "worse" if sign < 0 else "equal"
    return f"{ours - theirs:+.{digits}f} {word}"


def benchmark(
    base: Mapping[str, Any],
    method: str,
    final: Mapping[str, Any],
    control: Mapping[str, Any] | None = None,
    forced: str = "",
) -> Table:
    """Return the scores on held-out sources before and after, and beside the control's."""
    columns = {"before": base, method: final}
    if control is not None:
        columns[f"all {forced}"] = control
    made = table("benchmark, of no client")
    for name in ("source", "score"):
        made.add_column(name)
    for name in columns:
        made.add_column(name, justify="right")
    for source, key, label, digits, counted in _BENCHMARK:
        if key in final:
            where = f"{source} ({final[counted]})" if source else ""
            made.add_row(
                where, label, *(number(scores[key], digits) for scores in columns.values())
            )
    return made


def answers(samples: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return some generated texts before and after, each below its prompt; None without any.

    Each of `samples` has ``client``, ``prompt``, ``input``, ``references``, ``before`` (None where
    it was not kept) and ``after``.
    """
    if not samples:
        return None
    made = table("answers before and after")
    made.show_header = False
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for sample in samples[:_MOST_ANSWERS]:
        asked = " ".join(f"{sample['prompt']} {sample['input']}".split())
        made.add_row("asked", Text(asked if len(asked) <= _LONGEST else f"{asked[:_LONGEST]}…"))
        if sample["references"]:
            made.add_row("right", Text(sample["references"][0]))
        if sample["before"] is not None:
            made.add_row("before", Text(sample["before"]))
        made.add_row("after", Text(sample["after"]), end_section=True)
    return made


def categories(per_category: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Return the final loss and exact match per category."""
    made = table("by category, after the last round")
    made.add_column("category")
    for who in _GROUPS:
        for label in ("clients", "loss", "exact\nmatch"):
            made.add_column(f"{who}\n{label}", justify="right")
    for category, groups in per_category.items():
        cells: list[str] = []
        for who in _GROUPS:
            group = groups[who]
            cells.append(str(group["clients"]))
            cells += [number(group["loss"], 3), number(group["exact_match"], 2)]
        made.add_row(category, *cells)
    return made


def ranks(
    counts: Mapping[str, int],
    by_type: Mapping[str, Mapping[str, int]],
    cuts: Mapping[str, CutPoint] | None = None,
    blocks: int = 0,
) -> Table:
    """Return a table of LoRA types: how many training clients, which ranks at how many matrices.

    Where there are `cuts`, it also says which of the model's `blocks` the clients run themselves.
    """
    made = table("ranks by type")
    made.add_column("type")
    made.add_column("clients", justify="right")
    made.add_column("ranks")
    if cuts:
        made.add_column("runs itself")
    for name, count in counts.items():
        values = list(by_type[name].values())
        spread = (f"{rank} at {values.count(rank)} matrices" for rank in sorted(set(values)))
        where = [hosted(cuts.get(name), blocks)] if cuts else []
        made.add_row(name, str(count), ", ".join(spread), *where)
    return made


def participation(clients: Mapping[str, Mapping[str, int | None]]) -> Table | None:
    """Return the clients with refusals or lateness, the most of them first; None without any."""
    troubles = ("refused", "late", "lost")
    counts = {name: sum(client[key] or 0 for key in troubles) for name, client in clients.items()}
    named = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
    if not named:
        return None
    made = table("clients with refusals or lateness")
    made.add_column("client", overflow="fold")
    for column in ("rounds joined", *troubles):
        made.add_column(column, justify="right")
    for name in named[:_MOST_CLIENTS]:
        cells = (clients[name][key] for key in ("rounds_joined", *troubles))
        made.add_row(name, *map(str, cells))
    if len(named) > _MOST_CLIENTS:
        made.caption = f"and {len(named) - _MOST_CLIENTS} more, in summary.json"
    return made


def spectra(
    sites: Mapping[str, Spectrum], energy: Mapping[str, SiteEnergy], title: str = "global adapter"
) -> Table:
    """Return a line a site: the stored rank, the singular values, and the energy lost last.

    σ₁, σ½ and σᵣ are the largest, the middle and the smallest; "90%" is the rank that holds 90% of
    the energy ‖D‖²; "lost" what the last cut to the server's rank discarded.
    """
    prefix = _common([*sites])
    made = table(f"{title}, matrices under {prefix}" if prefix else title)
    made.add_column("matrix", overflow="fold")
    for name in ("rank", "of", "‖D‖", "σ₁", "σ½", "σᵣ", "90%", "lost"):
        made.add_column(name, justify="right")
    for site, spectrum in sites.items():
        values = (spectrum.first, spectrum.middle, spectrum.last)
        made.add_row(
            site.removeprefix(prefix),
            str(spectrum.rank),
            str(spectrum.largest_rank),
            f"{spectrum.norm:.3g}",
            *("–" if value is None else f"{value:.2g}" for value in values),
            str(spectrum.rank_90),
            f"{energy[site].share_lost:.2%}" if site in energy and energy[site].energy else "–",
        )
    return made


def _common(names: Sequence[str]) -> str:
    """The dotted prefix that all names share, with its last dot."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for together in zip(*parts, strict=False):
        if len(set(together)) > 1:
            break
        shared.append(together[0])
    return "".join(f"{part}." for part in shared)
