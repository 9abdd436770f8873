"""A comparison as tables, for a terminal of 100 columns and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from polyrank import report


@dataclass(frozen=True)
class Sheet:
    """A table as text: a title, the columns' names, the rows, and notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> Table:
        """Return the table for a terminal; all but the first column at the right."""
        table = Table(
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption=Text("\n".join(self.notes)) if self.notes else None,
            caption_justify="left",
            caption_style="",
        )
        for place, name in enumerate(self.columns):
            if place == 0:
                table.add_column(name, overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))  # Brackets are no markup.
        return table

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [
            f"**{self.title}**",
            "",
            _line([column.replace("\n", " ") for column in self.columns]),
            _line(["---", *["---:"] * (len(self.columns) - 1)]),
            *map(_line, self.rows),
        ]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sheets(results: Mapping[str, Any]) -> list[Sheet]:
    """Return the tables of compare.json: losses, other scores and costs, and rates if tuned.

    Where the recipe has a benchmark, its scores are a table too.
    """
    found = [_losses(results), _rest(results)]
    if results.get("benchmark"):  # Comparisons of before had none.
        found.append(_benchmark(results))
    if results["tuned"]:
        found.append(_rates(results))
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Return compare.md: all tables, under the comparison's name."""
    head = f"# {results['name']}: {', '.join(one['label'] for one in results['methods'])}\n"
    return "\n".join([head, *(sheet.markdown() for sheet in sheets(results))])


def _losses(results: Mapping[str, Any]) -> Sheet:
    seeds = len(results["seeds"])
    seen, unseen = (_around(results["base"], who) for who in ("seen", "unseen"))
    rows = [["base, untrained", "", seen, "", unseen, ""]]
    for one in results["methods"]:
        rate = "–" if one["rate"] is None else f"{one['rate']:g}"
        side = one["tuning"]["edge"] if one["tuning"] else None
        cells = [_label(one, seeds), rate + (" !" if side else "")]
        for who in ("seen", "unseen"):
            cells += [_around(one, who), _difference(one["difference"], who)]
        rows.append(cells)
    return Sheet(
        f"test loss after {report.count(results['rounds'], 'round')}, "
        f"over {report.count(seeds, 'seed')}",
        ["method", "rate", "seen", "− first", "unseen", "− first"],
        rows,
        _notes(results),
    )


def _label(method: Mapping[str, Any], seeds: int) -> str:
    """The label, and how many seeds are behind the numbers where not all are."""
    done = sum(run["failure"] is None for run in method["runs"])
    return method["label"] if done == seeds else f"{method['label']} ({done}/{seeds})"


def _around(scores: Mapping[str, Any], who: str) -> str:
    return _pm(scores["mean"][who]["loss"], scores["spread"][who]["loss"])


def _difference(difference: Mapping[str, Any] | None, who: str) -> str:
    """Mean ± spread over seeds; of a single seed, ± the standard error over clients."""
    if difference is None:
        return ""
    middle, spread = difference["mean"][who]["loss"], difference["spread"][who]["loss"]
    if len(difference["per_seed"]) == 1:
        spread = difference["per_seed"][0][who]["loss"]["se"]
    return _pm(middle, spread, "+")


def _pm(middle: float | None, spread: float | None, sign: str = "", digits: int = 3) -> str:
    text = report.number(middle, digits, sign).replace("-", "−")
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def _notes(results: Mapping[str, Any]) -> list[str]:
    many = len(results["seeds"]) > 1
    around = "the spread over seeds" if many else "for − first, the standard error over clients"
    notes = [
        f"− first: minus {results['first']} on the same clients, so below 0 is better; ±: {around}"
    ]
    edges = [m["label"] for m in results["methods"] if m["tuning"] and m["tuning"]["edge"]]
    if edges:
        notes.append(f"!: the best rate is an edge of those tried ({', '.join(edges)})")
    for one in results["agreement"]:
        notes += [f"NOT COMPARABLE, seed {one['seed']}: {text}" for text in one["differences"]]
    notes += [f"failed: {failure(one).splitlines()[0]}" for one in results["failures"]]
    if not results["complete"] and not results["failures"]:
        notes.append("not all runs are finished")
    return notes


def failure(one: Mapping[str, Any]) -> str:
    """Return one of compare.json's failures in words."""
    rate = "" if one["rate"] is None else f"rate {one['rate']:g}, "
    return f"{one['method']}, {rate}seed {one['seed']}: {one['reason']}"


def _rest(results: Mapping[str, Any]) -> Sheet:
    rows = [["base, untrained", *_texts(results["base"]), "", "", "", ""]]
    pooled = [one["label"] for one in results["methods"] if one["pooled"]]
    for one in results["methods"]:
        costs = {key: value["mean"] for key, value in one["costs"].items()}
        known = costs["seconds"] is not None
        sent = known and not one["pooled"]
        rows.append(
            [
                one["label"],
                *_texts(one),
                f"{costs['bytes_up'] / 2**20:.1f}" if sent else "–",
                f"{costs['bytes_down'] / 2**20:.1f}" if sent else "–",
                f"{costs['discarded']:.2%}" if known else "–",
                report.duration(costs["seconds"]) if known else "–",
            ]
        )
    columns = ["exact match\nseen", "\nunseen", "ROUGE-L\nseen", "\nunseen"]
    names = ["method", *columns, "up\nMiB", "down\nMiB", "discarded\na round", "time"]
    title = "text scores on the test parts, and costs of one run (means over seeds)"
    notes = [f"all training examples in one place, so nothing is sent: {', '.join(pooled)}"]
    return Sheet(title, names, rows, notes if pooled else [])


def _texts(scores: Mapping[str, Any]) -> list[str]:
    return [
        report.number(scores["mean"][who][score], 3)
        for score in ("exact_match", "rouge_l")
        for who in ("seen", "unseen")
    ]


def _benchmark(results: Mapping[str, Any]) -> Sheet:
    """Scores on held-out sources, and what it took to the target perplexity, if there is one."""
    seeds, target = len(results["seeds"]), results["benchmark"]["target"]
    methods = results["methods"]
    clock = "seconds"
    if any(one["benchmark"] and _modelled(one["benchmark"]) is not None for one in methods):
        clock = "modelled_seconds"
    ends = [f"{what}\nto target" for what in ("rounds", "MiB", _CLOCKS[clock])]
    ends = [] if target is None else ends
    rows = [["base, untrained", *_held_out(results["base"]["benchmark"]), *[""] * len(ends)]]
    for one in methods:
        found = one["benchmark"]
        spent = _to_target(found, len(one["runs"]), clock) if ends else []
        rows.append([_label(one, seeds), *_held_out(found), *spent])
    notes = ["perplexity: lower is better; BLEU, NIST, ROUGE-L: higher; ±: the spread over seeds"]
    if target is not None:
        notes.append(
            f"to target: until a perplexity of {target:g} was measured between the rounds, the "
            "mean of the runs that reached it (how many of them, where not all)"
        )
    names = ["method", "perplexity", "BLEU", "NIST", "ROUGE-L", *ends]
    return Sheet("benchmark, sources of no client, after the last round", names, rows, notes)


_CLOCKS = {"seconds": "time", "modelled_seconds": "modelled"}


def _modelled(found: Mapping[str, Any]) -> float | None:
    return found["to_target"]["modelled_seconds"] if found["to_target"] else None


def _held_out(found: Mapping[str, Any] | None) -> list[str]:
    """The scores; dashes for a method without a finished run."""
    digits = {"perplexity": 2, "bleu": 1, "nist": 2, "rouge_l": 3}
    if found is None:
        return ["–"] * len(digits)
    return [_pm(found["mean"][key], found["spread"][key], digits=n) for key, n in digits.items()]


def _to_target(found: Mapping[str, Any] | None, runs: int, clock: str) -> list[str]:
    """Rounds, MiB and time; a method without that clock (nothing is modelled of it) has no time."""
    if found is None or not found["to_target"] or not found["reached"]:
        return ["–", "–", "–"]
    spent, seconds = found["to_target"], found["to_target"][clock]
    some = "" if found["reached"] == runs else f" ({found['reached']}/{runs})"
    return [
        f"{spent['rounds']:.1f}{some}",
        f"{spent['bytes'] / 2**20:.1f}",
        "–" if seconds is None else report.duration(seconds),
    ]


def _rates(results: Mapping[str, Any]) -> Sheet:
    """The last validation loss of every rate that was tried, the chosen one in brackets."""
    rates = sorted({t["rate"] for one in results["methods"] for t in one["tuning"]["trials"]})
    rows = []
    for one in results["methods"]:
        tried = {trial["rate"]: trial for trial in one["tuning"]["trials"]}
        cells = []
        for rate in rates:
            trial = tried.get(rate)
            text = "" if trial is None else report.number(trial["validation_loss"], 3)
            failed = trial is not None and trial["validation_loss"] is None
            text = "failed" if failed else text
            cells.append(f"[{text}]" if rate == one["rate"] else text)
        rows.append([one["label"], *cells])
    return Sheet(
        "validation loss of the seen clients by learning rate, first seed, last evaluation",
        ["method", *(f"{rate:g}" for rate in rates)],
        rows,
        ["[ ]: the rate that was chosen"],
    )
