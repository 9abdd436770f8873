"""Partition and split: everything exactly once, and nobody's split depends on others."""

from hypothesis import given, settings
from hypothesis import strategies as st

from polyrank.data import Example, Tasks, partition, split

words = st.text("abc", min_size=1, max_size=2)
counts = st.dictionaries(st.sampled_from("pqrstuvw"), st.integers(1, 12), min_size=1)
seeds = st.integers(0, 2**31)


def make(counts):
    listed = []
    for task, count in counts.items():
        for i in range(count):
            columns = {"task": task, "category": "ab"[i % 2]}
            listed.append(Example(f"{task} {i % 7}", (str(i),), len(listed), columns))
    return Tasks(tuple(listed))


def all_rows(clients):
    return sorted(example.row for client in clients.values() for example in client.examples)


@settings(max_examples=25, deadline=None)
@given(counts, seeds, st.sampled_from(["task", "iid", "contiguous"]), st.data())
def test_every_example_is_with_exactly_one_client_in_exactly_one_part(counts, seed, by, data):
    tasks = make(counts)
    clients = None if by == "task" else data.draw(st.integers(1, len(tasks.examples)))
    assigned = partition(tasks, by=by, clients=clients, seed=seed)
    assert all_rows(assigned) == list(range(len(tasks.examples)))
    assert assigned.skipped.count == 0


@settings(max_examples=25, deadline=None)
@given(counts, seeds)
def test_dirichlet_deals_every_example_once(counts, seed):
    tasks = make(counts)
    assigned = partition(tasks, by="dirichlet", clients=1 + (len(tasks.examples) > 20), seed=seed)
    assert all_rows(assigned) == list(range(len(tasks.examples)))


@settings(max_examples=25, deadline=None)
@given(counts, seeds, st.integers(1, 5))
def test_with_a_limit_every_example_is_kept_or_named(counts, seed, limit):
    tasks = make(counts)
    assigned = partition(tasks, seed=seed, limit=limit)
    named = [int(row.rpartition(" ")[2]) for rows in assigned.skipped.rows.values() for row in rows]
    assert sorted(all_rows(assigned) + named) == list(range(len(tasks.examples)))


@settings(max_examples=25, deadline=None)
@given(counts, seeds)
def test_the_same_seed_gives_the_same_split(counts, seed):
    first, second = partition(make(counts), seed=seed), partition(make(counts), seed=seed)
    assert dict(first) == dict(second)
    assert first.hash() == second.hash()


@settings(max_examples=25, deadline=None)
@given(counts, st.integers(1, 12), seeds, st.one_of(st.none(), st.integers(1, 4)))
def test_another_client_changes_nobodys_split(counts, count, seed, limit):
    before = partition(make(counts), seed=seed, limit=limit)
    after = partition(make({**counts, "newcomer": count}), seed=seed, limit=limit)
    assert {id: after[id] for id in before} == dict(before)


@settings(deadline=None)
@given(st.lists(words, max_size=30), seeds, st.sampled_from([(0.8, 0.1, 0.1), (0.4, 0.3, 0.3)]))
def test_a_split_is_a_partition_in_which_questions_stay_together(prompts, seed, shares):
    examples = [Example(prompt, ("x",), row) for row, prompt in enumerate(prompts)]
    parts = split(examples, shares, seed, "client")
    assert sorted(e.row for part in parts for e in part) == list(range(len(prompts)))
    asked = [{example.prompt for example in part} for part in parts]
    assert sum(map(len, asked)) == len(set(prompts))
    assert all(parts) or len(set(prompts)) < 3
    assert parts[0] or not prompts
