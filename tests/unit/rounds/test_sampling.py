"""Who is scored: the same ones every time, every type among them."""

from collections import Counter
from dataclasses import replace

import pytest

from federations import MEASURED, clients, one_block, opened
from polyrank.errors import RecipeError
from polyrank.evaluation import Evaluation
from polyrank.rounds.sampling import evaluation_subset
from polyrank.run import RunSettings
from polyrank.training import prepare
from polyrank.training.encoding import Encoding


@pytest.fixture(scope="module")
def work():
    return prepare(clients(seen=20, unseen=6), one_block(), Encoding())[0]


@pytest.fixture(scope="module")
def types(work):
    """c0 … c16 are light, two are middle, one is strong."""
    seen = sorted((id for id in work if work[id].seen), key=lambda id: int(id[1:]))
    return dict.fromkeys(seen, "light") | dict.fromkeys(seen[17:], "middle") | {"c19": "strong"}


def test_all_for_zero(work, types):
    assert evaluation_subset(work, "validation", types, 0, 0) == work


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, {"light": 1}),
        (2, {"light": 1, "middle": 1}),
        (3, {"light": 1, "middle": 1, "strong": 1}),
        (10, {"light": 8, "middle": 1, "strong": 1}),
        (19, {"light": 16, "middle": 2, "strong": 1}),
        (99, {"light": 17, "middle": 2, "strong": 1}),
    ],
)
def test_types_get_their_shares_and_each_one_client_where_there_is_room(
    work, types, most, expected
):
    chosen = evaluation_subset(work, "validation", types, most, 0)
    assert Counter(types[id] for id, client in chosen.items() if client.seen) == expected
    assert sum(not client.seen for client in chosen.values()) == min(most, 6)
    assert list(chosen) == [id for id in work if id in chosen], "in the order of all"


def test_the_seed_alone_decides(work, types):
    five = evaluation_subset(work, "validation", types, 5, 3)
    assert evaluation_subset(dict(reversed(work.items())), "validation", types, 5, 3) == five
    assert (
        len({tuple(evaluation_subset(work, "validation", types, 5, seed)) for seed in range(5)}) > 1
    )


def test_clients_without_an_example_in_the_part_are_not_drawn(work, types):
    bare = {
        id: replace(client, rows={**client.rows, "validation": ()}) if id < "c15" else client
        for id, client in work.items()
    }
    chosen = evaluation_subset(bare, "validation", types, 4, 0)
    assert len(chosen) == 8
    assert all(client.rows["validation"] for client in chosen.values())


def test_a_run_scores_its_evaluation_subsets_and_no_other_clients():
    evaluation = replace(MEASURED, clients=3, final_clients=2)
    run_settings = RunSettings(evaluation=evaluation, cohort=4)
    with opened(data=clients(seen=8, unseen=4), settings=run_settings) as parts:
        records = list(parts.rounds(2))
        types = parts.fleet.assigned
        between = evaluation_subset(parts.work, "validation", types, 3, run_settings.seed)
        ends = evaluation_subset(parts.work, "test", types, 2, run_settings.seed)
        final = parts.finish()["final"]
        assert parts.base()["clients"].keys() == ends.keys()
    assert len(between) == 6
    for record in records:
        assert record.evaluation["server"]["clients"].keys() == between.keys()
        own = record.evaluation["own_rank"]
        assert {name: group["clients"] for name, group in own.items()} == {
            "small": 1,
            "middle": 1,
            "large": 1,
            "all": 3,
        }
    assert (final["seen"]["clients"], final["unseen"]["clients"]) == (2, 2)


def test_a_negative_number_is_refused_by_name():
    for name in ("clients", "final_clients"):
        with pytest.raises(RecipeError, match=f"evaluation.{name}: expected at least 0"):
            Evaluation(**{name: -1})
