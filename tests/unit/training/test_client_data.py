"""Clients' work: what is on disk equals what was encoded, and the fingerprint stays what it was."""

import hashlib
from array import array

import pytest

from federations import clients, one_block
from polyrank.data import (
    ClientData,
    Clients,
    ExampleStore,
    Skipped,
    encode,
    partition,
    tasks_from_rows,
)
from polyrank.data import spool as spools
from polyrank.errors import DataError
from polyrank.training import prepare
from polyrank.training.client_data import fingerprint
from polyrank.training.encoding import Encoding

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def model():
    return one_block()


def encoded(client: ClientData, model):
    """Return the rows by part, held in memory."""
    examples = {
        "train": client.train if client.seen else (),
        "validation": client.validation,
        "test": client.test if client.seen else (*client.train, *client.test),
    }
    length = model.spec.context
    return {
        part: encode(list(examples[part]), model.tokenizer, max_length=length)[0] for part in PARTS
    }, examples


def in_memory_fingerprint(data, model) -> str:
    """The fingerprint by its definition, from rows that were never on disk."""
    digest = hashlib.sha256()
    for id, client in sorted(data.items()):
        digest.update(repr((id, client.seen, client.category)).encode())
        rows, examples = encoded(client, model)
        for part in PARTS:
            digest.update(f"{part}|{len(rows[part])}|".encode())
            for row in rows[part]:
                digest.update(f"{row.prompt_length}|{row.loss_from}|{len(row.input_ids)}|".encode())
                digest.update(array("q", row.input_ids).tobytes())
                references = examples[part][row.example].references
                digest.update(repr(references).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def on_disk(data):
    """Return the same clients with their examples in one store."""
    store = ExampleStore()
    moved = []
    for client in data.values():
        parts = []
        for part in PARTS:
            first = len(store)
            for example in getattr(client, part):
                store.append(example)
            parts.append(store[first:])
        moved.append(ClientData(client.id, *parts, client.category, client.seen))
    return Clients(moved)


@pytest.mark.parametrize("kept", [1, 1 << 20])
def test_the_work_is_what_encoding_in_memory_gives(model, monkeypatch, kept):
    monkeypatch.setattr(spools, "KEPT", kept)
    data = clients(seen=3, unseen=2)
    for given in (data, on_disk(data)):
        work, skipped = prepare(given, model, Encoding())
        assert skipped.count == 0
        for id, client in data.items():
            rows, examples = encoded(client, model)
            assert work[id].rows == rows
            assert {part: list(work[id].examples[part]) for part in PARTS} == {
                part: list(examples[part]) for part in PARTS
            }


def test_the_fingerprint_of_the_same_data_is_what_it_always_was(model):
    data = clients(seen=3, unseen=2)
    expected = in_memory_fingerprint(data, model)
    assert fingerprint(prepare(data, model, Encoding())[0]) == expected
    assert fingerprint(prepare(on_disk(data), model, Encoding())[0]) == expected
    # Taken when rows were tuples in memory, on the same clients.
    assert expected.startswith("15683c4843036f28")


def test_rows_that_cannot_be_used_are_named_by_client_and_row(model):
    word = "w5 "
    made = [
        {"task": task, "input": word * count, "output": "w6"}
        for task in ("a", "b")
        for count in (1, 2, 500, 3, 4)
    ]
    made += [{"task": "c", "input": word * 500, "output": "w6"}]
    divided = partition(tasks_from_rows(made), fractions=(1.0, 0.0, 0.0))
    work, skipped = prepare(divided, model, Encoding())
    assert list(work) == ["a", "b"]
    assert skipped.rows == {
        "too long": ["a row 2", "b row 7", "c row 10"],
        "client without a usable training example": ["c"],
    }
    assert [row.example for row in work["a"].rows["train"]] == [0, 1, 3, 4]
    with pytest.raises(DataError, match="14 rows were skipped: 11 too long, 3 client"):
        prepare(divided, model, Encoding(max_length=2))


def test_many_reasons_add_up_in_order():
    parts = [Skipped({"a": ["1"]}), Skipped({}), Skipped({"b": ["2"], "a": ["3"]})]
    assert Skipped.of(parts).rows == {"a": ["1", "3"], "b": ["2"]}
    assert (parts[0] + parts[2]).rows == Skipped.of(parts).rows
    assert parts[0].rows == {"a": ["1"]}, "the parts stay as they are"
