"""Texts and tables for people: what a run did, beside its control, and what is in its adapter.

Everything fits 80 columns, unless names of tasks and matrices are very long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from polyrank.algebra import Adapter
from polyrank.federation import RoundRecord
from polyrank.federation.result import factored
from polyrank.planning import Split
from polyrank.training.split import SplitSettings

_SCORES = (("loss", "loss", 4), ("exact_match", "exact match", 3), ("rouge_l", "ROUGE-L", 3))
_GROUPS = ("seen", "unseen")
_MOST_CLIENTS = 20
_BENCHMARK = (
    ("validation", "perplexity", "perplexity", 3, "examples"),
    ("test", "bleu", "BLEU", 2, "generated"),
    ("", "nist", "NIST", 3, ""),
    ("", "rouge_l", "ROUGE-L", 3, ""),
)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Return a score as text, or a dash where it was not measured."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


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

    The last column is the run's score minus the control's, `forced` the type of the control.
    """
    made = table("scores on the test parts")
    made.add_column("clients")
    made.add_column("score")
    columns = {"before": base, method: final}
    if control is not None:
        columns[f"all {forced}"] = control
    for name in columns:
        made.add_column(name, justify="right")
    if control is not None:
        made.add_column("difference", justify="right")
    for who in _GROUPS:
        for key, label, digits in _SCORES:
            values = [column[who][key] for column in columns.values()]
            if all(value is None for value in values):
                continue
            cells = [number(value, digits) for value in values]
            if control is not None:
                known = None not in values[1:]
                cells.append(number(values[1] - values[2] if known else None, digits, "+"))
            made.add_row(f"{who} ({final[who]['clients']})", label, *cells)
    return made


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
            made.add_row(where, label, *(number(one[key], digits) for one in columns.values()))
    return made


def perplexity(record: RoundRecord) -> str | None:
    """Return the perplexity on the benchmark after a round, if it was measured."""
    if record.benchmark is None:
        return None
    return f"perplexity {number(record.benchmark['perplexity'], 3)} on the benchmark"


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
    cuts: Mapping[str, Split] | None = None,
    blocks: int = 0,
) -> Table:
    """Return a table of LoRA types: how many seen clients, which ranks at how many matrices.

    Where there are `cuts`, it also says which of the model's `blocks` the clients run themselves.
    """
    made = table("ranks dealt")
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


def hosted(cut: Split | None, blocks: int) -> str:
    """Return which blocks of a model a client runs itself, e.g. ``blocks 0–1 of 4``."""
    if cut is None:
        return "whole"
    below = "block 0" if cut.lower == 1 else f"blocks 0–{cut.lower - 1}"
    if cut.upper is None:
        return f"{below} of {blocks}"
    last = f"{cut.upper}" if cut.upper == blocks - 1 else f"{cut.upper}–{blocks - 1}"
    return f"blocks {below.split()[1]} and {last} of {blocks} (U)"


def leaks(cuts: Iterable[Split], settings: SplitSettings) -> str | None:
    """Return what the server learns of split clients, in a sentence; None if nobody is cut."""
    shapes = {cut.upper is not None for cut in cuts}
    if not shapes:
        return None
    labels = {
        (False,): "and the labels",
        (True,): "while the labels stay with the clients",
        (False, True): "and the labels of all but the clients in a U-shape",
    }[tuple(sorted(shapes))]
    what = "the tails" if shapes == {False} else "the other blocks"
    noise = f" (with Gaussian noise σ={settings.noise:g}, which is no guarantee)"
    return (
        f"split: the server that trains {what} sees activations{noise if settings.noise else ''}, "
        f"from which most tokens can be recovered, {labels}; see docs/privacy.md"
    )


def attendance(clients: Mapping[str, Mapping[str, int | None]]) -> Table | None:
    """Return the clients with refusals or lateness, the most of them first; None without any."""
    troubles = ("refused", "late", "lost")
    counts = {name: sum(one[key] or 0 for key in troubles) for name, one in clients.items()}
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


def remarks(record: RoundRecord) -> list[str]:
    """Return lines on clients of a round whose updates are not aggregated, or only shortened."""
    late = {*record.late}
    lines = [
        f"{'late' if client in late else 'refused'} {client}: {why}"
        for client, why in record.rejected.items()
    ]
    if record.clipped:
        client, least = min(record.clipped.items(), key=lambda one: one[1])
        lines.append(
            f"shortened {count(len(record.clipped), 'update')}, most of all {client}: "
            f"{least:.3g} of its way counts"
        )
    return lines


def round_header(wire: bool = False) -> str:
    """Return the line above lines of `round_line`."""
    columns = "  wire MiB   lost" if wire else "  discarded"
    return f"round     loss  validation  clients   up MiB  down MiB{columns}  seconds"


def round_line(record: RoundRecord, wire: bool = False) -> str:
    """Return a finished round as one line under `round_header`.

    With `wire` it says how much of the bytes, up and down, are activations and gradients.
    """
    lost = f"  {record.discarded:9.2%}"
    if wire:
        carried = record.wire_up + record.wire_down
        lost = f"  {carried / 2**20:8.1f}  {record.discarded:5.1%}"
    return (
        f"{record.round:5}  {record.loss:7.4f}  {number(record.validation_loss, 4):>10}"
        f"  {len(record.clients) - len(record.rejected):7}"
        f"  {record.bytes_up / 2**20:7.1f}  {record.bytes_down / 2**20:8.1f}"
        f"{lost}  {record.seconds['total']:7.1f}"
    )


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


def count(number: int, noun: str) -> str:
    """Return a number with its noun, e.g. ``1 round`` or ``2 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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


def duration(seconds: float) -> str:
    """Return a length of time, e.g. ``42 s`` or ``1 h 03 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def loading(adapter: Path) -> str:
    """Return where the adapter lies and the lines that load it."""
    return (
        f"adapter: {adapter}\n"
        "  from peft import AutoPeftModelForCausalLM\n"
        f'  model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")'
    )


def spectra(adapter: Adapter, last: RoundRecord | None) -> Table:
    """Return per matrix the stored rank, the singular values, and the energy discarded last.

    σ₁, σ½ and σᵣ are the largest, the middle and the smallest; "90%" is the rank that holds 90% of
    the energy ‖D‖²; "lost" what the last cut to the server's rank discarded.
    """
    prefix = _common([*adapter])
    made = table(f"global adapter, matrices under {prefix}" if prefix else "global adapter")
    made.add_column("matrix", overflow="fold")
    for name in ("rank", "of", "‖D‖", "σ₁", "σ½", "σᵣ", "90%", "lost"):
        made.add_column(name, justify="right")
    for site, delta in adapter.items():
        s = factored(delta, delta.rank).s.double()
        energy = (s**2).cumsum(0)
        total = float(energy.amax()) if len(s) else 0.0  # A matrix that nobody moved has none.
        ninety = int((energy < 0.9 * total).sum()) + 1 if total else 0
        before, lost = last.energy.get(site, [0.0, 0.0]) if last else (0.0, 0.0)
        made.add_row(
            site.removeprefix(prefix),
            str(delta.rank),
            str(min(delta.shape)),
            f"{total**0.5:.3g}",
            *(f"{float(s[i]):.2g}" if len(s) else "–" for i in (0, len(s) // 2, -1)),
            str(ninety),
            f"{lost / before:.2%}" if before else "–",
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
