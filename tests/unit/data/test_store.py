"""Stores and views: refusals, laziness, what a full disk says."""

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from polyrank.data import Example, ExampleStore, joined, tasks_from_rows
from polyrank.data import spool as spools
from polyrank.data.sequences import View, select
from polyrank.data.spool import Spool
from polyrank.errors import ResourceError

EXAMPLES = [Example(f"q{i}", (f"a{i}",), i, {"task": "t"}) for i in range(5)]


def stored(examples=EXAMPLES):
    store = ExampleStore()
    for example in examples:
        store.append(example)
    return store


def descriptors() -> int:
    """Return how many files this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


@pytest.fixture
def on_disk(monkeypatch):
    """Every record goes to the file at once."""
    monkeypatch.setattr(spools, "KEPT", 1)


def test_bytes_that_span_file_and_memory_are_read_whole(monkeypatch):
    monkeypatch.setattr(spools, "KEPT", 10)
    spool = Spool()
    ends = [spool.append(data) for data in (b"0123", b"456789", b"abc")]
    assert ends == [4, 10, 13]
    assert spool.read(0, 13) == b"0123456789abc"
    assert spool.read(8, 12) == b"89ab"
    assert spool.read(11, 12) == b"b"


def test_a_little_needs_no_file_and_more_needs_one_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(spools.tempfile, "tempdir", str(tmp_path))
    before = descriptors()
    stored()
    assert descriptors() == before
    monkeypatch.setattr(spools, "KEPT", 1)
    store = stored()
    assert descriptors() == before + 1
    assert list(tmp_path.iterdir()) == []
    del store
    gc.collect()
    assert descriptors() == before, "the file is closed with the store"


def test_a_file_that_cannot_be_written_says_where_and_what_to_do(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(spools.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ResourceError, match=r"gone|TMPDIR") as told:
        stored()
    assert "could not be written" in str(told.value)
    assert "TMPDIR" in str(told.value)


def test_a_full_disk_is_a_resource_error(tmp_path):
    """For real: files of this process may not grow beyond a limit."""
    code = (
        "import resource, sys\n"
        "from polyrank.data import tasks_from_rows\n"
        "from polyrank.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "rows = ({'input': 'x' * 1000, 'output': 'y'} for _ in range(5000))\n"
        "try:\n"
        "    tasks_from_rows(rows)\n"
        "except ResourceError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{tmp_path}: the temporary file that holds examples could not be written" in done.stdout
    assert "File too large" in done.stdout


def test_a_file_that_was_cut_off_is_not_read_as_if_it_were_whole(on_disk):
    store = stored()
    os.truncate(store._spool._file, 10)
    with pytest.raises(ResourceError, match="shorter than what was written"):
        store[4]


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_a_store_is_not_copied_since_its_file_would_not_be(act):
    with pytest.raises(TypeError, match="temporary file"):
        act(stored())


def test_items_out_of_range_are_refused_and_slices_are_views():
    store = stored()
    for wrong in (5, -6):
        with pytest.raises(IndexError):
            store[wrong]
        with pytest.raises(IndexError):
            store[1:][wrong]
    assert store[-1] == EXAMPLES[-1]
    assert isinstance(store[1:3], View)
    assert store[::-1] == EXAMPLES[::-1]


def test_sequences_are_equal_by_their_items():
    store = stored()
    assert store == EXAMPLES == list(store)
    assert tuple(EXAMPLES) == store
    assert store[:4] != EXAMPLES
    assert store != stored(EXAMPLES[1:])
    assert store != "text"


def test_what_is_not_lazy_stays_a_tuple():
    assert select(EXAMPLES, [3, 1]) == (EXAMPLES[3], EXAMPLES[1])
    assert isinstance(joined(EXAMPLES[:2], tuple(EXAMPLES[2:])), tuple)
    store = stored()
    assert joined((), store, []) is store
    assert joined(tuple(EXAMPLES), store) == EXAMPLES * 2
    assert joined() == ()


def test_joining_and_cutting_read_nothing():
    store = stored()
    with patch.object(Spool, "read", side_effect=AssertionError("read")):
        both = joined(store[1:], select(store, [0, 0]))
        assert len(both[2:]) == 4
    assert both[4:] == [EXAMPLES[0]] * 2


def test_rows_of_an_iterator_are_taken_too():
    rows = [{"input": "q", "output": "a"}, {"input": "r", "output": "b", "late": "x"}]
    assert tasks_from_rows(iter(rows)).examples == tasks_from_rows(rows).examples
    assert tasks_from_rows(iter(rows), prompt="late").skipped.rows == {"empty prompt": ["row 0"]}
