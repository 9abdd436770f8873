"""Who has which examples, who is held out, and what is refused."""

from collections import Counter

import pytest

from kit import kit_path
from polyrank.data import Clients, Tasks, load_tasks, partition, tasks_from_rows
from polyrank.errors import DataError, RecipeError


def rows(counts, **columns):
    return [
        {"task": task, "category": task[0], "input": f"{task} {i}", "output": f"{i}", **columns}
        for task, count in counts.items()
        for i in range(count)
    ]


def tasks(counts, **columns):
    return tasks_from_rows(rows(counts, **columns))


def sizes(clients):
    return {id: len(client.examples) for id, client in clients.items()}


def test_one_task_is_one_client_with_its_category():
    clients = partition(tasks({"b1": 10, "a2": 20, "a1": 3}))
    assert list(clients) == ["a1", "a2", "b1"]
    assert sizes(clients) == {"a1": 3, "a2": 20, "b1": 10}
    assert clients["b1"].category == "b"
    assert {e.columns["task"] for e in clients["a2"].examples} == {"a2"}
    assert [len(part) for part in (clients["a2"].train, clients["a2"].test)] == [16, 2]


def test_a_client_of_several_categories_has_none():
    mixed = tasks_from_rows(rows({"a": 3}) + rows({"b": 3}, who="x"))
    assert partition(mixed, by="category")["a"].category == "a"
    one = tasks_from_rows([{**row, "who": "x"} for row in rows({"a": 3, "b": 3})])
    assert partition(one, by="who")["x"].category == ""


def test_iid_is_shuffled_and_equal_and_contiguous_is_in_the_order_of_the_source():
    data = tasks({"a": 31, "b": 30})
    even = partition(data, by="iid", clients=3)
    assert list(even) == ["client-000", "client-001", "client-002"]
    assert sorted(sizes(even).values()) == [20, 20, 21]
    assert all({e.columns["task"] for e in c.examples} == {"a", "b"} for c in even.values())
    blocks = partition(data, by="contiguous", clients=3)
    assert [sorted(e.row for e in c.examples) for c in blocks.values()] == [
        list(range(21)),
        list(range(21, 41)),
        list(range(41, 61)),
    ]


def test_dirichlet_follows_alpha():
    data = tasks({"a": 200, "b": 200})
    flat = partition(data, by="dirichlet", clients=4, alpha=1000.0, seed=1)
    steep = partition(data, by="dirichlet", clients=4, alpha=0.1, seed=1)

    def share_of_a(client):
        count = Counter(e.columns["category"] for e in client.examples)
        return count["a"] / count.total()

    assert all(0.4 < share_of_a(client) < 0.6 for client in flat.values())
    assert any(abs(share_of_a(client) - 0.5) > 0.3 for client in steep.values())
    assert sum(sizes(steep).values()) == 400


def test_numbers_are_padded_so_that_the_order_of_ids_is_the_order_of_numbers():
    clients = partition(tasks({"a": 1100}), by="contiguous", clients=1001)
    assert [next(iter(clients)), list(clients)[-1]] == ["client-0000", "client-1000"]


def test_unseen_by_the_default_column_by_another_and_by_nobody():
    data = tasks_from_rows(
        rows({"a": 5, "b": 5}, unseen=False, far="0") + rows({"c": 5}, unseen=True, far="1")
    )
    assert list(partition(data).unseen) == ["c"]
    assert list(partition(data).seen) == ["a", "b"]
    assert list(partition(data, unseen="far").unseen) == ["c"]
    assert partition(data, unseen=0).unseen == {}


def test_unseen_by_list_number_and_fraction():
    data = tasks({f"t{i}": 4 for i in range(10)})
    assert list(partition(data, unseen=["t3", "t1"]).unseen) == ["t1", "t3"]
    three = partition(data, unseen=3)
    assert len(three.unseen) == 3
    assert partition(data, unseen=0.3).unseen.keys() == three.unseen.keys()
    assert len(partition(data, unseen=0.01).unseen) == 1
    assert len({tuple(partition(data, unseen=3, seed=s).unseen) for s in range(5)}) > 1


def test_rows_held_out_of_an_even_partition_form_a_client_of_their_own():
    data = tasks_from_rows(rows({"a": 20}, unseen=False) + rows({"z": 5}, unseen=True))
    clients = partition(data, by="iid", clients=2)
    assert sizes(clients) == {"client-000": 10, "client-001": 10, "unseen": 5}
    assert list(clients.unseen) == ["unseen"]


def test_limit_and_minimum_are_reported_by_name():
    data = tasks({"a": 20, "b": 2})
    clients = partition(data, limit=5, min_examples=3)
    assert sizes(clients) == {"a": 5}
    assert {reason: len(rows) for reason, rows in clients.skipped.rows.items()} == {
        "above the limit of 5": 15,
        "client below 3 examples": 2,
    }
    assert clients.skipped.rows["client below 3 examples"] == ["b row 20", "b row 21"]
    rows_kept = {e.row for e in clients["a"].examples}
    assert rows_kept != set(range(5))
    assert rows_kept == {e.row for e in partition(data, limit=5)["a"].examples}
    assert rows_kept != {e.row for e in partition(data, limit=5, seed=1)["a"].examples}


def test_rows_without_the_column_are_skipped_and_those_of_the_source_stay_named():
    listed = rows({"a": 4})
    del listed[1]["task"]
    listed[2]["output"] = ""
    clients = partition(tasks_from_rows(listed))
    assert clients.skipped.rows == {"no completion": ["row 2"], "no task": ["row 1"]}
    assert sizes(clients) == {"a": 2}


def test_the_summary_counts_and_names_small_clients():
    data = tasks({"a": 10, "b": 2, "c": 10})
    clients = partition(data, unseen=["c"])
    summary = clients.summary()
    assert (summary.seen, summary.unseen) == (2, 1)
    assert (summary.train, summary.validation, summary.test) == (9, 1, 2)
    assert (summary.held_out, summary.skipped, summary.short) == (10, 0, ("b",))
    assert "1 clients too small for three parts: b" in str(summary)


def test_the_hash_is_that_of_the_data():
    data = tasks({"a": 10, "b": 10})
    assert partition(data).hash() == partition(data).hash()
    assert partition(data).hash() != partition(data, seed=1).hash()
    assert partition(data).hash() != partition(data, unseen=1).hash()


REFUSED = {
    "missing column": ({"by": "who"}, DataError, "no column 'who' to partition by; the .* task"),
    "missing on": (
        {"by": "dirichlet", "clients": 2, "on": "who"},
        DataError,
        "no column 'who' to partition by",
    ),
    "missing unseen": ({"unseen": "far"}, DataError, "no column 'far' to say who is held out"),
    "unseen not a bool": ({"unseen": "category"}, DataError, "row 0: expected true or false"),
    "unknown client": ({"unseen": ["a", "z"]}, DataError, "no client 'z'; the clients are a, b"),
    "all held out": ({"unseen": 2}, RecipeError, "fewer than the 2 clients, got 2"),
    "all named": ({"unseen": ["a", "b"]}, DataError, "none of the 2 takes part"),
    "negative": ({"unseen": -1}, RecipeError, "got -1"),
    "fraction of one": ({"unseen": 1.0}, RecipeError, "fraction from 0 to below 1"),
    "bool": ({"unseen": True}, RecipeError, "got a bool"),
    "no clients": ({"by": "iid"}, RecipeError, "number of clients of at least 1, got None"),
    "clients for a column": ({"clients": 3}, RecipeError, "its values are the clients"),
    "alpha": ({"by": "dirichlet", "clients": 2, "alpha": 0.0}, RecipeError, "alpha above 0"),
    "too many": (
        {"by": "dirichlet", "clients": 2, "min_examples": 5},
        DataError,
        "11 draws of 8 examples for 2 clients all left a client with fewer than 5",
    ),
    "too many iid": ({"by": "iid", "clients": 50}, DataError, "8 examples .* 50 clients; lower"),
    "minimum": ({"min_examples": 99}, DataError, "none of the 0 takes part"),
    "limit": ({"limit": 0}, RecipeError, "limit of at least 1, got 0"),
    "two shares": ({"fractions": (0.5, 0.5)}, RecipeError, "three shares"),
    "sum": ({"fractions": (0.8, 0.1, 0.2)}, RecipeError, "a sum of 1"),
    "no training": ({"fractions": (0.0, 0.5, 0.5)}, RecipeError, "a part for training"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        partition(tasks({"a": 4, "b": 4}), **options)


def test_a_client_held_out_by_halves_is_refused():
    listed = rows({"a": 4}, unseen=False)
    listed[3]["unseen"] = True
    with pytest.raises(DataError, match="'a' is held out in some rows and not in others"):
        partition(tasks_from_rows(listed))


def test_joined_sources_with_the_same_row_numbers_are_refused():
    data = tasks({"a": 4})
    with pytest.raises(DataError, match="a row number of its own"):
        partition(Tasks((*data.examples, *data.examples)))


def test_two_clients_of_one_id_are_refused():
    client = partition(tasks({"a": 4}))["a"]
    with pytest.raises(DataError, match=r"one client per id, got several for \['a'\]"):
        Clients([client, client])


def test_the_partitioners_print_nothing(capfd):
    partition(tasks({"a": 4, "b": 4}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.kit
def test_natural_instructions_by_task():
    data = load_tasks(kit_path("natural_instructions", "tasks.jsonl.gz"))
    clients = partition(data)
    assert (len(clients.seen), len(clients.unseen)) == (107, 18)
    assert sum(sizes(clients).values()) == len(data.examples)
    assert all(client.category for client in clients.values())
    assert clients.summary().short == ()
