"""A comparison as tables, for a terminal of 80 columns and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from polyrank import report

BASE = "untrained base"


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
        for row in self.rows:  # Brackets are no markup.
            table.add_row(*(Text(cell.replace(" ± ", "±")) for cell in row))
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
    """Return the tables of compare.json: losses, text scores and costs, and rates if tuned.

    Where the recipe has a benchmark, its scores are a table too.
    """
    tables = [_losses(results), _text_scores(results), _costs(results)]
    if results.get("benchmark"):  # Comparisons of before had none.
        tables.append(_benchmark(results))
        if results["benchmark"]["target"] is not None:
            tables.append(_targets(results))
    if results["tuned"]:
        tables.append(_rates(results))
    return tables


def markdown(results: Mapping[str, Any]) -> str:
    """Return compare.md: all tables, under the comparison's name."""
    head = f"# {results['name']}: {', '.join(one['label'] for one in results['methods'])}\n"
    return "\n".join([head, *(sheet.markdown() for sheet in sheets(results))])


def _losses(results: Mapping[str, Any]) -> Sheet:
    seeds = len(results["seeds"])
    seen, unseen = (_around(results["base"], who) for who in ("seen", "unseen"))
    rows = [[BASE, "", seen, "", unseen, ""]]
    for method in results["methods"]:
        rate = "–" if method["rate"] is None else f"{method['rate']:g}"
        side = method["tuning"]["edge"] if method["tuning"] else None
        cells = [_label(method, seeds), rate + (" !" if side else "")]
        for who in ("seen", "unseen"):
            cells += [_around(method, who), _difference(method["difference"], who)]
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
    for agreement in results["agreement"]:
        notes += [
            f"NOT COMPARABLE, seed {agreement['seed']}: {text}" for text in agreement["differences"]
        ]
    notes += [f"failed: {failure(failed).splitlines()[0]}" for failed in results["failures"]]
    if not results["complete"] and not results["failures"]:
        notes.append("not all runs are finished")
    return notes


def failure(failed: Mapping[str, Any]) -> str:
    """Return one of compare.json's failures in words."""
    rate = "" if failed["rate"] is None else f"rate {failed['rate']:g}, "
    return f"{failed['method']}, {rate}seed {failed['seed']}: {failed['reason']}"


def _text_scores(results: Mapping[str, Any]) -> Sheet:
    rows = [[BASE, *_texts(results["base"])]]
    rows += [[method["label"], *_texts(method)] for method in results["methods"]]
    names = ["method", "exact match\nseen", "\nunseen", "ROUGE-L\nseen", "\nunseen"]
    return Sheet("text scores on the test parts (means over seeds)", names, rows)


def _costs(results: Mapping[str, Any]) -> Sheet:
    rows = []
    for method in results["methods"]:
        costs = {key: value["mean"] for key, value in method["costs"].items()}
        known = costs["seconds"] is not None
        sent = known and not method["pooled"]
        rows.append(
            [
                method["label"],
                f"{costs['bytes_up'] / 2**20:.1f}" if sent else "–",
                f"{costs['bytes_down'] / 2**20:.1f}" if sent else "–",
                f"{costs['discarded']:.2%}" if known else "–",
                report.duration(costs["seconds"]) if known else "–",
            ]
        )
    names = ["method", "up\nMiB", "down\nMiB", "discarded\na round", "time"]
    pooled = [method["label"] for method in results["methods"] if method["pooled"]]
    notes = [f"all training examples in one place, so nothing is sent: {', '.join(pooled)}"]
    return Sheet("costs of one run (means over seeds)", names, rows, notes if pooled else [])


def _texts(scores: Mapping[str, Any]) -> list[str]:
    return [
        report.number(scores["mean"][who][score], 3)
        for score in ("exact_match", "rouge_l")
        for who in ("seen", "unseen")
    ]


def _benchmark(results: Mapping[str, Any]) -> Sheet:
    """Scores on held-out sources."""
    seeds = len(results["seeds"])
    rows = [[BASE, *_held_out(results["base"]["benchmark"])]]
    rows += [
        [_label(method, seeds), *_held_out(method["benchmark"])] for method in results["methods"]
    ]
    names = ["method", "perplexity", "BLEU", "NIST", "ROUGE-L"]
    notes = ["perplexity: lower is better; BLEU, NIST, ROUGE-L: higher; ±: the spread over seeds"]
    return Sheet("benchmark, sources of no client, after the last round", names, rows, notes)


def _targets(results: Mapping[str, Any]) -> Sheet:
    """What it took to the target perplexity; modelled seconds where any method has them."""
    methods, seeds = results["methods"], len(results["seeds"])
    clock = "seconds"
    if any(
        method["benchmark"] and _modelled(method["benchmark"]) is not None for method in methods
    ):
        clock = "modelled_seconds"
    rows = [
        [_label(method, seeds), *_to_target(method["benchmark"], len(method["runs"]), clock)]
        for method in methods
    ]
    notes = [
        "until the perplexity was measured between the rounds, the mean of the runs that reached "
        "it (how many of them, where not all)"
    ]
    title = f"to a perplexity of {results['benchmark']['target']:g} on the benchmark"
    return Sheet(title, ["method", "rounds", "MiB", _CLOCKS[clock]], rows, notes)


_CLOCKS = {"seconds": "time", "modelled_seconds": "modelled"}


def _modelled(scores: Mapping[str, Any]) -> float | None:
    return scores["to_target"]["modelled_seconds"] if scores["to_target"] else None


def _held_out(scores: Mapping[str, Any] | None) -> list[str]:
    """The scores; dashes for a method without a finished run."""
    digits = {"perplexity": 2, "bleu": 1, "nist": 2, "rouge_l": 3}
    if scores is None:
        return ["–"] * len(digits)
    return [_pm(scores["mean"][key], scores["spread"][key], digits=n) for key, n in digits.items()]


def _to_target(scores: Mapping[str, Any] | None, runs: int, clock: str) -> list[str]:
    """Rounds, MiB and time; a method without that clock (nothing is modelled of it) has no time."""
    if scores is None or not scores["to_target"] or not scores["reached"]:
        return ["–", "–", "–"]
    spent, seconds = scores["to_target"], scores["to_target"][clock]
    some = "" if scores["reached"] == runs else f" ({scores['reached']}/{runs})"
    return [
        f"{spent['rounds']:.1f}{some}",
        f"{spent['bytes'] / 2**20:.1f}",
        "–" if seconds is None else report.duration(seconds),
    ]


def _rates(results: Mapping[str, Any]) -> Sheet:
    """The last validation loss of every rate that was tried, the chosen one in brackets."""
    rates = sorted({t["rate"] for method in results["methods"] for t in method["tuning"]["trials"]})
    rows = []
    for method in results["methods"]:
        tried = {trial["rate"]: trial for trial in method["tuning"]["trials"]}
        cells = []
        for rate in rates:
            trial = tried.get(rate)
            text = "" if trial is None else report.number(trial["validation_loss"], 3)
            failed = trial is not None and trial["validation_loss"] is None
            text = "failed" if failed else text
            cells.append(f"[{text}]" if rate == method["rate"] else text)
        rows.append([method["label"], *cells])
    return Sheet(
        "validation loss of the training clients by learning rate, first seed, last evaluation",
        ["method", *(f"{rate:g}" for rate in rates)],
        rows,
        ["[ ]: the rate that was chosen"],
    )
