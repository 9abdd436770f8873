import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from polyrank import report
from polyrank.algebra import LowRank
from polyrank.planning import CutPoint
from polyrank.run import RoundRecord
from polyrank.run.spectra import Spectrum
from polyrank.runner.inspect import SiteEnergy
from polyrank.training.split import SplitSettings


def shown(table: object, width: int = 80) -> str:
    out = StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def group(loss: float | None, exact: float | None = None, clients: int = 3) -> dict[str, Any]:
    return {"loss": loss, "exact_match": exact, "rouge_l": exact, "clients": clients}


def record(**changes: Any) -> RoundRecord:
    values = {
        "schema": 1,
        "round": 12,
        "attempt": 0,
        "clients": ["a", "b", "c"],
        "ranks": {"T1": 3},
        "loss": 2.5,
        "tokens": 1000,
        "bytes_down": 3 * 2**20,
        "bytes_up": 1234 * 2**20,
        "energy": {"s": [4.0, 1.0]},
        "rejected": {"c": "NaN"},
        "abandoned": [],
        "evaluation": None,
        "seconds": {"total": 1234.5},
    }
    return RoundRecord(**{**values, **changes})


def test_a_round_is_a_line_under_its_header_within_80_columns() -> None:
    line, header = report.round_line(record(loss_change=-0.125)), report.round_header()
    assert len(line) == len(header) <= 80
    cells = ["12", "2.5000", "-0.1250", "–", "2", "1234.0", "3.0", "25.0%", "1234.5"]
    assert line.split() == cells
    assert len(header.split()) == len(cells) + 2  # "up MiB", "down MiB"
    for cell, name in (("-0.1250", "change"), ("1234.0", "up MiB"), ("25.0%", "lost")):
        assert line.index(cell) + len(cell) == header.index(name) + len(name)
    assert report.round_line(record()).split()[2] == "–"  # None of the clients was there before.


def test_a_round_of_split_clients_tells_how_much_crossed_their_cuts() -> None:
    line = report.round_line(record(wire_up=2**20, wire_down=2**19), wire=True)
    header = report.round_header(wire=True)
    assert len(line) == len(header) <= 80
    cells = ["12", "2.5000", "–", "–", "2", "1237.0", "1.5", "25.0%", "1234.5"]
    assert line.split() == cells
    assert line.index("1.5 ") + 3 == header.index("wire MiB") + len("wire MiB")


@pytest.mark.parametrize(
    ("cut", "blocks", "text"),
    [
        (None, 4, "whole"),
        (CutPoint(1), 4, "block 0 of 4"),
        (CutPoint(2), 4, "blocks 0–1 of 4"),
        (CutPoint(2, 3), 4, "blocks 0–1 and 3 of 4 (U)"),
        (CutPoint(1, 3), 5, "blocks 0 and 3–4 of 5 (U)"),
    ],
)
def test_where_a_client_is_cut_is_told_by_its_blocks(
    cut: CutPoint | None, blocks: int, text: str
) -> None:
    assert report.hosted(cut, blocks) == text


def test_the_types_tell_who_runs_what_if_anyone_is_cut() -> None:
    counts, ranks = {"T1": 2, "T3": 1}, {"T1": {"q": 8}, "T3": {"q": 30, "u": 200}}
    text = shown(report.ranks(counts, ranks, {"T1": CutPoint(2)}, 4))
    rows = [re.split("  +", line.strip()) for line in text.splitlines() if " at " in line]
    assert "runs itself" in text
    assert rows == [
        ["T1", "2", "8 at 1 matrices", "blocks 0–1 of 4"],
        ["T3", "1", "30 at 1 matrices, 200 at 1 matrices", "whole"],
    ]
    assert "runs itself" not in shown(report.ranks(counts, ranks, {}, 4))


@pytest.mark.parametrize(
    ("cuts", "who", "labels"),
    [
        ([CutPoint(1), CutPoint(2)], "the tails", ", and the labels;"),
        ([CutPoint(1, 3)], "the other blocks", ", while the labels stay with the clients;"),
        (
            [CutPoint(1, 3), CutPoint(1)],
            "the other blocks",
            ", and the labels of all but the clients in a U-shape;",
        ),
    ],
)
def test_a_split_run_says_what_leaks(cuts: list[CutPoint], who: str, labels: str) -> None:
    text = report.leaks(cuts, SplitSettings())
    assert text is not None
    assert text.startswith(f"split: the server that trains {who} sees activations, from which most")
    assert labels in text
    assert text.endswith("see docs/explanation/privacy.md")
    noisy = report.leaks(cuts, SplitSettings(noise=0.25))
    assert noisy is not None
    assert "activations (with Gaussian noise σ=0.25, which is no guarantee), from which" in noisy
    assert labels in noisy


def test_a_run_without_cuts_has_nothing_to_say_of_them() -> None:
    assert report.leaks([], SplitSettings(noise=0.25)) is None


def test_scores_beside_the_control_show_their_difference() -> None:
    base = {"seen": group(3.0, 0.0), "unseen": group(3.5, 0.0)}
    final = {"seen": group(1.0, 0.75), "unseen": group(2.0, 0.5)}
    control = {"seen": group(1.5, 0.5), "unseen": group(1.5, None)}
    text = shown(report.scores(base, "flexlora", final, control, "weakest"))
    cells = [line.split() for line in text.splitlines()]
    assert ["seen", "(3)", "loss", "3.0000", "1.0000", "1.5000", "-0.5000", "better"] in cells
    assert ["seen", "(3)", "exact", "match", "0.000", "0.750", "0.500", "+0.250", "better"] in cells
    assert ["unseen", "(3)", "loss", "3.5000", "2.0000", "1.5000", "+0.5000", "worse"] in cells
    assert ["unseen", "(3)", "exact", "match", "0.000", "0.500", "–", "–"] in cells
    assert "all weakest" in text


def test_scores_without_a_control_and_without_texts_leave_those_out() -> None:
    base = {"seen": group(3.0), "unseen": group(None, clients=0)}
    text = shown(report.scores(base, "fedit", base))
    assert "difference" not in text
    assert "exact" not in text
    assert "unseen" not in text


def test_answers_stand_below_each_other_in_80_columns() -> None:
    sample = {
        "client": "a",
        "prompt": "Reverse the words. " * 40,
        "input": "one\ntwo",
        "references": ["two one", "two, one"],
        "before": "[bold]one",
        "after": "two one",
    }
    text = shown(report.answers([sample, {**sample, "before": None}, *[sample] * 9]))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    heads = [row[0] for row in rows if row[0] in ("asked", "right", "before", "after")]
    assert heads == [
        *("asked", "right", "before", "after"),
        *("asked", "right", "after"),
        *("asked", "right", "before", "after"),
    ]
    assert ["before", "[bold]one"] in [[part.strip() for part in row] for row in rows]
    assert report.answers([]) is None


def test_categories_fit_80_columns_with_names_as_long_as_natural_instructions_has() -> None:
    name = "Answerability Classification"
    groups = {"seen": group(12.345, 0.5, 100), "unseen": group(None, None, 0)}
    text = shown(report.categories({name: groups}))
    assert name in text
    row = next(line for line in text.splitlines() if name in line)
    assert row.split()[2:] == ["100", "12.345", "0.50", "0", "–", "–"]


def test_ranks_tell_how_many_matrices_have_which() -> None:
    text = shown(report.ranks({"T1": 2, "T3": 1}, {"T1": {"q": 8}, "T3": {"q": 30, "u": 200}}))
    rows = [line.strip().split(maxsplit=2) for line in text.splitlines() if " at " in line]
    assert rows == [
        ["T1", "2", "8 at 1 matrices"],
        ["T3", "1", "30 at 1 matrices, 200 at 1 matrices"],
    ]


def test_spectra_show_the_singular_values_and_what_was_lost() -> None:
    values = torch.tensor([3.0, 1.0])
    delta = LowRank(torch.eye(4, 2) * values, torch.eye(2, 5))
    name = "model.layers.10.self_attn.q_proj"
    other = "model.layers.11.mlp.down_proj"
    nothing = LowRank(torch.zeros(4, 1), torch.zeros(1, 5))
    sites = {name: Spectrum.of(delta), other: Spectrum.of(nothing)}
    text = shown(report.spectra(sites, {name: SiteEnergy(10.0, 1.0)}))
    assert "matrices under model.layers." in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "." in line}
    assert rows["10.self_attn.q_proj"] == ["2", "4", "3.16", "3", "1", "1", "1", "10.00%"]
    assert rows["11.mlp.down_proj"][-1] == "–"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (600, "10 min"), (7300, "2 h 02 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def summary(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"rounds": 3, "seconds": 61.2, "bytes_up": 2**20, "bytes_down": 2**21}
    return {**values, "stopped": None, "result_round": 3, "to_target": None, **changes}


def test_what_a_run_took_is_told_with_its_target_and_its_end() -> None:
    assert report.spent(summary()) == "3 rounds in 61 s, 1.0 MiB up, 2.0 MiB down."
    wired = report.spent(summary(wire_up=2**20, wire_down=2**19))
    assert wired.endswith("2.0 MiB down. 1.5 MiB of that are activations and gradients.")
    target = {"loss": 2.0, "rounds": 2, "bytes": 2**20, "seconds": 30.0}
    assert "2 was reached after 2 rounds, 1.0 MiB and 30 s" in report.spent(
        summary(to_target=target)
    )
    missed = {"loss": 2.0, "rounds": None, "bytes": None, "seconds": None}
    assert "was not reached" in report.spent(summary(to_target=missed))
    early = report.spent(summary(stopped="no lower loss", result_round=1))
    assert "Stopped early: no lower loss; result of round 1." in early


def test_own_ranks_are_told_if_they_were_measured() -> None:
    assert report.own_rank(record()) is None
    server = {"seen": group(1.0), "unseen": group(1.0)}
    assert report.own_rank(record(evaluation={"server": server, "own_rank": None})) is None
    own = {"T1": {"loss": 1.5}, "all": {"loss": 1.25}}
    text = report.own_rank(record(evaluation={"server": server, "own_rank": own}))
    assert text is not None
    assert "1.0000 at the server's rank, 1.2500 at the clients' own (T1 1.5000)" in text


def test_the_adapter_is_loaded_in_two_lines() -> None:
    lines = report.loading(Path("runs/x/adapter")).splitlines()
    assert lines[0] == "adapter: runs/x/adapter"
    assert lines[-1].strip().endswith('from_pretrained("runs/x/adapter")')
    assert len(lines) == 3


def test_remarks_tell_who_is_missing_in_a_round_and_what_was_shortened() -> None:
    away = [
        {"client": "d", "kind": "late", "reason": "took too long"},
        {"client": "e", "kind": "lost", "reason": "its process has died"},
        {"client": "c", "kind": "invalid", "reason": "NaN"},
    ]
    made = record(
        rejected={"c": "NaN", "d": "took too long", "e": "its process has died"},
        turned_away=away,
        clipped={"a": 0.75, "b": 0.125},
    )
    assert report.remarks(made) == [
        "refused c: NaN",
        "late d: took too long",
        "lost e: its process has died",
        "shortened 2 updates, most of all b: 0.125 of its way counts",
    ]
    assert report.remarks(record(rejected={})) == []


def attended(**counts: int) -> dict[str, int | None]:
    return {"rounds_joined": 3, "refused": 0, "late": 0, "lost": 0, "bytes_up": None} | counts


def test_clients_with_refusals_or_lateness_have_a_table_and_only_they() -> None:
    assert report.participation({}) is None
    assert report.participation({"a": attended()}) is None
    made = report.participation({"a": attended(), "b": attended(late=1), "c": attended(refused=2)})
    rows = [re.split("  +", line.strip()) for line in shown(made).splitlines()]
    assert [row for row in rows if row[0] in "abc" and row[0]] == [
        ["c", "3", "2", "0", "0"],
        ["b", "3", "0", "1", "0"],
    ]


def test_a_long_table_of_clients_is_cut_and_says_so() -> None:
    text = shown(report.participation({f"client-{i}": attended(late=1) for i in range(25)}))
    assert text.count("client-") == 20
    assert "and 5 more, in summary.json" in text
