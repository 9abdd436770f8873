from typing import Any

import pytest

from polyrank.compare.curves import apart, curve, discarded_by_round, loss_by_bytes, loss_by_round
from polyrank.run import RoundRecord


def record(number: int, loss: float | None = None, **changes: Any) -> RoundRecord:
    evaluation = None if loss is None else {"server": {"seen": {"loss": loss}}, "own_rank": None}
    made: dict[str, Any] = {
        "schema": 1,
        "round": number,
        "attempt": 0,
        "clients": ["a"],
        "ranks": {},
        "loss": 1.0,
        "tokens": 1,
        "bytes_down": 2**20,
        "bytes_up": 2**19,
        "energy": {"w": [4.0, 0.0]},
        "rejected": {},
        "abandoned": [],
        "evaluation": evaluation,
        "seconds": {"total": 1.0},
    }
    return RoundRecord.from_json(made | changes)


def test_a_curve_is_the_mean_over_runs_with_the_lowest_and_the_highest() -> None:
    found = curve("m", [{1: (10.0, 1.0), 2: (20.0, 5.0)}, {1: (14.0, 2.0), 2: (22.0, 3.0)}])
    assert found is not None
    assert (found.x, found.mean) == ([12.0, 21.0], [1.5, 4.0])
    assert (found.low, found.high) == ([1.0, 3.0], [2.0, 5.0])


def test_rounds_that_a_run_lacks_or_did_not_measure_are_left_out() -> None:
    found = curve("m", [{1: (1.0, 1.0), 2: (2.0, None), 3: (3.0, 1.0)}, {1: (1.0, 3.0)}])
    assert found is not None
    assert (found.x, found.mean) == ([1.0], [2.0])
    assert curve("m", [{1: (1.0, None)}]) is None
    assert curve("m", []) is None


def test_bytes_add_up_over_rounds_that_were_not_evaluated_too() -> None:
    run = [record(1), record(2, 3.0), record(3), record(4, 2.0)]
    [found] = loss_by_bytes({"m": [run]})
    assert (found.x, found.mean) == ([3.0, 6.0], [3.0, 2.0])  # 1.5 MiB a round.
    [found] = loss_by_round({"m": [run]})
    assert (found.x, found.mean) == ([2, 4], [3.0, 2.0])


def test_only_methods_that_discard_something_have_a_curve_of_it() -> None:
    lossy = [record(1, energy={"w": [4.0, 1.0], "v": [4.0, 0.0]}), record(2)]
    [found] = discarded_by_round({"exact": [[record(1)]], "lossy": [lossy]})
    assert (found.label, found.x, found.mean) == ("lossy", [1, 2], [12.5, 0.0])


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([0.5, 0.2], [0.5, 0.2]),  # Far enough.
        ([0.5, 0.5, 0.5], [0.5, 0.6, 0.7]),
        ([1.0, 0.98], [1.0, 0.9]),  # Down where there is no room above.
        ([-3.0, 0.05], [0.0, 0.1]),
        ([2.0], [1.0]),
        ([], []),
    ],
)
def test_names_are_set_apart_in_their_order(wanted: list[float], placed: list[float]) -> None:
    assert apart(wanted, 0.1, 0.0, 1.0) == pytest.approx(placed)


def test_names_without_room_share_it_evenly() -> None:
    assert apart([0.4] * 5, 0.5, 0.0, 1.0) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
