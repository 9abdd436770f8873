"""Blocks over pipes: whole, bounded, and never waited for longer than was said."""

import os
import threading
from collections.abc import Iterator

import pytest

from polyrank.errors import SplitServerError
from polyrank.split_server.pipe import Pipe

MIB = 2**20


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    """Two pipes that are joined."""
    (one_reads, other_writes), (other_reads, one_writes) = os.pipe(), os.pipe()
    one, other = Pipe(one_reads, one_writes), Pipe(other_reads, other_writes)
    yield one, other
    one.close()
    other.close()


def test_blocks_arrive_whole_and_in_order(ends: tuple[Pipe, Pipe]) -> None:
    one, other = ends
    blocks = [b"", b"x", bytes(range(256)) * 5000, b"last"]  # the third is larger than a pipe

    def send() -> None:
        for block in blocks:
            one.send(block, 10)

    sender = threading.Thread(target=send)
    sender.start()
    assert [other.receive(2 * MIB, 10) for _ in blocks] == blocks
    sender.join()
    other.send(b"back", 10)
    assert one.receive(4, 10) == b"back"


def test_a_block_that_is_too_long_is_refused_before_it_is_read(
    ends: tuple[Pipe, Pipe],
) -> None:
    one, other = ends
    one.send(b"12345", 1)
    with pytest.raises(SplitServerError, match="at most 4 bytes; 5 came"):
        other.receive(4, 1)


def test_a_length_that_no_memory_has_is_refused() -> None:
    reading, writing = os.pipe()
    pipe = Pipe(reading, os.dup(writing))
    os.write(writing, b"\xff" * 8)
    with pytest.raises(SplitServerError, match="at most 100 bytes"):
        pipe.receive(100, 1)
    pipe.close()
    os.close(writing)


def test_the_end_is_seen_between_blocks_and_within_one() -> None:
    for sent, ended in ((b"", None), ((9).to_bytes(8, "little") + b"half", "ended after 4")):
        reading, writing = os.pipe()
        spare, closed = os.pipe()
        pipe = Pipe(reading, closed)
        os.write(writing, sent)
        os.close(writing)
        if ended is None:
            assert pipe.receive(100, 1) is None
        else:
            with pytest.raises(SplitServerError, match=ended):
                pipe.receive(100, 1)
        os.close(spare)
        with pytest.raises(SplitServerError, match="the other end has closed"):
            pipe.send(b"x", 1)
        pipe.close()


def test_nobody_waits_for_an_end_that_is_silent(ends: tuple[Pipe, Pipe]) -> None:
    one, other = ends
    with pytest.raises(SplitServerError, match="in time"):
        one.receive(100, 0.05)
    with pytest.raises(SplitServerError, match="in time"):
        other.send(bytes(MIB), 0.05)  # nobody reads, and a pipe holds less


def test_a_closed_pipe_is_of_no_use(ends: tuple[Pipe, Pipe]) -> None:
    one, _ = ends
    one.close()
    one.close()
    with pytest.raises(SplitServerError, match="closed"):
        one.send(b"x", 1)
    with pytest.raises(SplitServerError, match="closed"):
        one.receive(1, 1)
