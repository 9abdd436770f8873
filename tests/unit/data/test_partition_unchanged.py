"""A partition is a promise: the same source and settings give the same clients in every version."""

import hashlib
import random

import pytest

from polyrank.data import Tasks, partition, tasks_from_rows

PARTS = ("train", "validation", "test")

KNOWN = {
    "task": ({}, "1791ad9c404a27e0", "91143fb5298843f8"),
    "column": ({"by": "kind", "unseen": 0, "on": "kind"}, "b04d80d42cd9aa34", "b60f6502e624e452"),
    "fraction": ({"unseen": 0.25, "seed": 5}, "1a8cadf8cebacc4c", "f809f2bb319e8875"),
    "limit": (
        {"limit": 20, "min_examples": 10, "seed": 3},
        "cf9c4335a0258811",
        "35b59a9d8cb04d15",
    ),
    "iid": ({"by": "iid", "clients": 7, "seed": 2}, "825e9e6f83175dd7", "3bf38bb6ec9227b6"),
    "contiguous": (
        {"by": "contiguous", "clients": 9, "unseen": 0},
        "9ab412af0fa47639",
        "ff2f19b92af7a7ba",
    ),
    "dirichlet": (
        {"by": "dirichlet", "clients": 6, "alpha": 0.4, "seed": 1},
        "9e4f9091454631c8",
        "585efb81d3012b14",
    ),
    "dirichlet over another column": (
        {
            "by": "dirichlet",
            "clients": 11,
            "alpha": 2.0,
            "seed": 4,
            "on": "kind",
            "unseen": 2,
            "limit": 30,
        },
        "b5e7e719b19bbbf1",
        "118b271306cb8a9c",
    ),
}
"""Settings, and two hashes of what they gave when every example was held in memory: the beginning
of `Clients.hash`, and one of the row numbers in every part with the rows left out."""


def rows():
    draw = random.Random(7)
    made = []
    for i in range(400):
        task = f"t{draw.randint(0, 12)}"
        row = {
            "task": task,
            "category": "abcé"[int(task[1:]) % 4],
            "kind": draw.choice("xyz"),
            "instruction": f"Say it {draw.randint(0, 9)}.",
            "input": f"{task} {draw.randint(0, 25)}\n∑",
            "output": [f"o{i}", "ö"][: draw.randint(1, 2)],
            "number": i,
            "unseen": task in ("t3", "t11"),
        }
        if i % 50 == 3:
            del row["task"]
        if i % 61 == 2:
            row["output"] = ""
        made.append(row)
    return made


@pytest.mark.parametrize("case", KNOWN)
def test_clients_parts_and_what_is_left_out_are_those_of_before(case):
    options, data, numbers = KNOWN[case]
    tasks = tasks_from_rows(rows())
    made = partition(tasks, **options)
    told = [
        (id, part, [e.row for e in getattr(c, part)]) for id, c in made.items() for part in PARTS
    ]
    left_out = {reason: list(named) for reason, named in made.skipped.rows.items()}
    assert made.hash().startswith(data)
    assert hashlib.sha256(repr((told, left_out)).encode()).hexdigest().startswith(numbers)


@pytest.mark.parametrize("case", KNOWN)
def test_examples_in_memory_and_on_disk_are_divided_alike(case):
    options, _, _ = KNOWN[case]
    tasks = tasks_from_rows(rows())
    in_memory = partition(Tasks(tuple(tasks.examples), tasks.skipped), **options)
    on_disk = partition(tasks, **options)
    assert dict(on_disk) == dict(in_memory)
    assert on_disk.skipped.rows == in_memory.skipped.rows
    assert all(type(client.train) is tuple for client in in_memory.values())
