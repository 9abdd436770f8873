"""Blocks of bytes between a process and its child, over two pipes.

A block is its length (u64, little-endian) and its bytes. The reader gives the most bytes of a
block, and a longer one is refused before memory is taken for it. Every call has a time limit.
`multiprocessing.connection` bounds lengths too, but not time: once a block has begun, its
`recv_bytes` and `send_bytes` wait for ever for the rest.
"""

from __future__ import annotations

import os
import selectors
import time

from polyrank.errors import SplitServerError

_LENGTH = 8


class Pipe:
    """One end: a file descriptor to read from, and one to write to; `close` closes both.

    One thread at a time may use it. After an error it cannot be used any more.
    """

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)

    def send(self, block: bytes, seconds: float | None = None) -> None:
        """Write a block.

        Raises SplitServerError if the other end has closed, or has not read the whole block within
        `seconds` (None: no limit).
        """
        end = _end(seconds)
        for part in (len(block).to_bytes(_LENGTH, "little"), block):
            view = memoryview(part)
            while view:
                self._wait(self._writing, selectors.EVENT_WRITE, end)
                try:
                    view = view[os.write(self._writing, view[: 2**20]) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise SplitServerError(f"the other end has closed ({error})") from error

    def receive(self, most: int, seconds: float | None = None) -> bytearray | None:
        """Return the next block; None if the other end has closed.

        Raises SplitServerError if it has more than `most` bytes, ends half-way, or has not come
        within `seconds` (None: no limit).
        """
        end = _end(seconds)
        head = self._read(_LENGTH, end)
        if not head:
            return None
        length = int.from_bytes(head, "little")
        if len(head) < _LENGTH or length > most:
            raise SplitServerError(f"expected a block of at most {most} bytes; {length} came")
        block = self._read(length, end)
        if len(block) < length:
            raise SplitServerError(f"expected {length} bytes; it ended after {len(block)}")
        return block

    def close(self) -> None:
        """Close both descriptors; closing twice is closing once."""
        for descriptor in {self._reading, self._writing} - {-1}:
            os.close(descriptor)
        self._reading = self._writing = -1

    def _read(self, length: int, end: float | None) -> bytearray:
        """Return `length` bytes, or fewer if the other end closes."""
        block = bytearray(length)
        view, at = memoryview(block), 0
        while at < length:
            self._wait(self._reading, selectors.EVENT_READ, end)
            try:
                count = os.readv(self._reading, [view[at : at + 2**20]])
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if count == 0:
                view.release()
                del block[at:]
                break
            at += count
        return block

    @staticmethod
    def _wait(descriptor: int, event: int, end: float | None) -> None:
        if descriptor < 0:
            raise SplitServerError("the connection is closed")
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise SplitServerError("no answer in time")
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, event)
            selector.select(left)


def _end(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
