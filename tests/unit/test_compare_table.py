import copy
from io import StringIO
from typing import Any

from rich.console import Console

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
    console = Console(file=StringIO(), width=100)
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
    assert "in one place, so nothing is sent: ft, cenlora" in text
    assert "in one place" not in shown(results(method("flexlora")))


def test_a_row_has_mean_spread_and_difference_and_fits_a_hundred_columns() -> None:
    text = shown(results(method("flexlora"), method("flexlora:tail-in-base+slora, all weakest")))
    assert lines_with(text, "flexlora", "1.500 ± 0.062")
    assert lines_with(text, "base, untrained", "10.142 ± 0.414")
    assert text.count("−0.500 ± 0.031") == 2
    assert lines_with(text, "1234.5", "2.0", "1.23%", "2 h 00 min")
    assert widest(text) <= 100
    assert "…" not in text


def test_one_seed_shows_the_standard_error_over_clients() -> None:
    one = method("fedit")
    one["difference"]["per_seed"] = one["difference"]["per_seed"][:1]
    one["difference"]["spread"] = scores(None)
    text = shown(results(method("flexlora"), one, seeds=[0]))
    assert text.count("−0.500 ± 0.125") == 2
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
