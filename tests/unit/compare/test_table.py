import copy
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from polyrank.compare.results import _benchmark as over_seeds
from polyrank.compare.table import markdown, sheets
from runs import lines_with, widest


def scores(loss: float | None, other: float | None = 0.25) -> dict[str, Any]:
    one = {"loss": loss, "exact_match": other, "rouge_l": other}
    return {"seen": one, "unseen": one}


def method(label: str, loss: float | None = 1.5, **changes: Any) -> dict[str, Any]:
    costs = {"bytes_up": 2**20 * 1234.5, "bytes_down": 2**21, "seconds": 7200, "discarded": 0.0123}
    paired = {
        who: {s: {"mean": -0.5, "se": 0.125} for s in ("loss", "exact_match", "rouge_l")}
        for who in ("seen", "unseen")
    }
    made: dict[str, Any] = {
        "label": label,
        "pooled": False,
        "rate": 1e-3,
        "tuning": None,
        "runs": [{"seed": seed, "failure": None} for seed in (0, 1, 2)],
        "mean": scores(loss),
        "spread": scores(0.0625),
        "costs": {key: {"mean": value, "spread": 1.0} for key, value in costs.items()},
        "difference": {
            "per_seed": [{"seed": seed, **paired} for seed in (0, 1, 2)],
            "mean": scores(-0.5),
            "spread": scores(0.03125),
        },
    }
    return made | changes


def results(*methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "name",
        "rounds": 12,
        "seeds": [0, 1, 2],
        "tuned": False,
        "rates": [1e-3],
        "first": methods[0]["label"],
        "complete": True,
        "base": {"mean": scores(10.142), "spread": scores(0.414)},
        "methods": [{**methods[0], "difference": None}, *methods[1:]],
        "agreement": [{"seed": seed, "same": True, "differences": []} for seed in (0, 1, 2)],
        "failures": [],
    }
    return made | changes


def shown(found: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=80)
    for sheet in sheets(found):
        console.print(sheet.rich())
    return console.file.getvalue()  # type: ignore[attr-defined]


def tuning(edge: str | None, *trials: tuple[float, float | None]) -> dict[str, Any]:
    listed = [{"rate": rate, "validation_loss": loss} for rate, loss in trials]
    return {"seed": 0, "trials": listed, "edge": edge}


def test_what_a_pooled_method_sends_is_not_counted() -> None:
    found = results(method("flexlora"), method("ft", pooled=True), method("cenlora", pooled=True))
    text = shown(found)
    [sending] = lines_with(text, "flexlora", "1234.5")
    assert "2.0" in sending
    [pooled] = lines_with(text, "ft", "1.23%")
    assert "1234.5" not in pooled
    assert "in one place, so nothing is sent: ft, cenlora" in " ".join(text.split())
    assert "in one place" not in shown(results(method("flexlora")))


def test_a_row_has_mean_spread_and_difference_and_fits_80_columns() -> None:
    text = shown(results(method("flexlora"), method("flexlora:tail-in-base+slora, all weakest")))
    assert lines_with(text, "flexlora", "1.500±0.062")
    assert lines_with(text, "untrained base", "10.142±0.414")
    assert text.count("−0.500±0.031") == 2
    assert lines_with(text, "1234.5", "2.0", "1.23%", "2 h 00 min")
    assert widest(text) <= 80
    assert "…" not in text


def test_one_seed_shows_the_standard_error_over_clients() -> None:
    one = method("fedit")
    one["difference"]["per_seed"] = one["difference"]["per_seed"][:1]
    one["difference"]["spread"] = scores(None)
    text = shown(results(method("flexlora"), one, seeds=[0]))
    assert text.count("−0.500±0.125") == 2
    assert "standard error over clients" in " ".join(text.split())


def test_the_rate_that_was_chosen_is_in_brackets_and_an_edge_is_said() -> None:
    first = method("flexlora", rate=1e-3, tuning=tuning(None, (1e-3, 2.5), (3e-3, None)))
    other = method("fedit", rate=3e-3, tuning=tuning("high", (1e-3, 2.25), (3e-3, 2.125)))
    text = shown(results(first, other, tuned=True))
    assert lines_with(text, "flexlora", "[2.500]", "failed")
    assert lines_with(text, "fedit", "2.250", "[2.125]")
    assert lines_with(text, "fedit", "0.003 !")
    assert "edge of those tried (fedit)" in text


def test_what_is_not_comparable_or_failed_is_said_below_the_table() -> None:
    found = results(method("flexlora"), method("fedit"))
    found["agreement"][1]["differences"] = ["fedit and flexlora: other clients in round 3"]
    found["failures"] = [{"method": "fedit", "rate": 1e-3, "seed": 2, "reason": "why\nmore"}]
    found["methods"][1]["runs"][2]["failure"] = "why"
    text = shown(found)
    assert "NOT COMPARABLE, seed 1: fedit and flexlora: other clients in round 3" in text
    assert "failed: fedit, rate 0.001, seed 2: why" in text
    assert "fedit (2/3)" in text


def test_a_method_without_a_result_has_dashes() -> None:
    none = {key: {"mean": None, "spread": None} for key in method("x")["costs"]}
    lost = method(
        "fedit", rate=None, runs=[], costs=none, mean=scores(None, None), spread=scores(None)
    )
    lost["difference"] = {"per_seed": [], "mean": scores(None), "spread": scores(None)}
    text = shown(results(method("flexlora"), lost))
    assert lines_with(text, "fedit (0/3)", "–")
    assert "None" not in text


def test_markdown_has_the_same_cells(tmp_path: object) -> None:
    found = results(method("flexlora"), method("fe|dit"))
    before = copy.deepcopy(found)
    text = markdown(found)
    assert found == before
    assert text.startswith("# name: flexlora, fe|dit\n")
    assert lines_with(text, "| fe\\|dit | 0.001 | 1.500 ± 0.062 | −0.500 ± 0.031 |")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows[:4]}) == 1


def held_out(perplexity: float | None = 4.5, **changes: Any) -> dict[str, Any]:
    scores = {"perplexity": perplexity, "bleu": 61.25, "nist": 7.125, "rouge_l": 0.625}
    spent = {"rounds": 4.0, "bytes": 2**20 * 12.5, "seconds": 90.0, "modelled_seconds": None}
    spread = {"perplexity": 0.25, "bleu": 1.5, "nist": 0.5, "rouge_l": 0.125}
    return {"mean": scores, "spread": spread, "to_target": spent, "reached": 3} | changes


def with_benchmark(*methods: dict[str, Any], target: float | None) -> dict[str, Any]:
    found = results(*methods, benchmark={"target": target})
    found["base"]["benchmark"] = held_out(150.0, to_target=None, reached=0)
    return found


def test_a_benchmark_is_a_table_where_the_recipe_has_one() -> None:
    found = with_benchmark(method("flora", benchmark=held_out()), target=None)
    text = shown(found)
    assert lines_with(text, "untrained base", "150.00±0.25")
    assert lines_with(text, "flora", "4.50±0.25", "61.2±1.5", "7.12±0.50", "0.625±0.125")
    assert "target" not in text
    assert widest(text) <= 80
    assert "benchmark" not in shown(results(method("flora"), benchmark=None))
    assert "benchmark" not in shown(results(method("flora")))  # A comparison of before.


def test_a_target_is_told_with_the_runs_that_reached_it() -> None:
    some = held_out(reached=2)
    never = held_out(reached=0, to_target=dict.fromkeys(held_out()["to_target"]))
    found = with_benchmark(
        method("flora", benchmark=held_out()),
        method("fedit", benchmark=some),
        method("hetlora", benchmark=never),
        method("flexlora", benchmark=None, runs=[]),
        target=5.0,
    )
    text = shown(found)
    assert lines_with(text, "flora", "4.0 ", "12.5", "90 s")
    assert lines_with(text, "fedit", "4.0 (2/3)", "12.5")
    assert lines_with(text, "hetlora", "4.50±0.25")
    assert lines_with(text, "hetlora")[-1].count("–") == 3
    assert [line.count("–") for line in lines_with(text, "flexlora")[-2:]] == [4, 3]
    assert "to a perplexity of 5 on the benchmark" in text
    assert widest(text) <= 80


def test_a_modelled_time_never_stands_beside_a_measured_one() -> None:
    spent = {**held_out()["to_target"], "modelled_seconds": 600.0}
    found = with_benchmark(
        method("flora", benchmark=held_out(to_target=spent)),
        method("cenlora", benchmark=held_out()),
        target=5.0,
    )
    text = shown(found)
    assert lines_with(text, "rounds", "MiB", "modelled")
    assert lines_with(text, "flora", "12.5", "10 min")
    assert "90 s" not in text


def test_what_a_target_took_is_a_mean_over_the_runs_that_reached_it() -> None:
    never = dict.fromkeys(("rounds", "bytes", "seconds", "modelled_seconds"))
    taken = [{**never, "rounds": 2, "bytes": 100}, {**never, "rounds": 4, "bytes": 300}, never]
    runs = [
        {"benchmark": {"perplexity": value}, "to_target_perplexity": spent}
        for value, spent in zip((4.0, 5.0, 9.0), taken, strict=True)
    ]
    found = over_seeds(runs)
    assert found is not None
    assert found["reached"] == 2
    assert found["to_target"] == {**never, "rounds": 3.0, "bytes": 200.0}
    assert found["mean"] == {"perplexity": 6.0, "bleu": None, "nist": None, "rouge_l": None}
    assert found["spread"]["perplexity"] == pytest.approx(7**0.5)
    assert over_seeds([{"benchmark": None}]) is None
