"""The sentence that a run ends with has the run's own figures, whichever way they went."""

from typing import Any

from polyrank import report


def group(loss: float | None, exact: float | None = None, clients: int = 3) -> dict[str, Any]:
    return {"loss": loss, "exact_match": exact, "rouge_l": exact, "clients": clients}


def summary(base: dict[str, Any], final: dict[str, Any]) -> dict[str, Any]:
    return {"base": base, "final": final}


BEFORE = {"seen": group(3.0, 0.0), "unseen": group(3.5, 0.01)}
AFTER = {"seen": group(1.0, 0.75), "unseen": group(2.0, 0.504)}
NOBODY = group(None, None, clients=0)


def test_both_groups_beside_the_control() -> None:
    control = {"final": {"seen": group(1.5, 0.8), "unseen": group(1.5, 0.25)}}
    assert report.gain(summary(BEFORE, AFTER), control, "weakest") == (
        "In short: answers that match exactly went from 0% to 75% for clients that trained and "
        "from 1% to 50% for clients that did not; with every client at the weakest type, they "
        "reach 80% and 25%."
    )
    assert "with every client of type T2, they reach" in report.gain(
        summary(BEFORE, AFTER), control, "T2"
    )


def test_without_a_control_held_out_clients_or_answers() -> None:
    alone = summary({"seen": group(3.0), "unseen": NOBODY}, {"seen": group(1.0), "unseen": NOBODY})
    assert report.gain(alone) == (
        "In short: the loss (lower is better) went from 3.00 to 1.00 for clients that trained."
    )
    diverged = {"final": {"seen": group(None), "unseen": NOBODY}}
    assert report.gain(alone, diverged, "weakest").endswith("at the weakest type, it reaches –.")
