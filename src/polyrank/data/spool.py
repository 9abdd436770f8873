"""Bytes that are written once and read back by position, without staying in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref

from polyrank.errors import ResourceError

KEPT = 1 << 20
"""So many of the last bytes wait in memory to be written; less than that needs no disk at all."""


class Spool:
    """A file without a name, in the folder for temporary files; it goes with this object.

    Read with `os.pread`: pages of a mapped file would count as the process's memory. Not to be
    written by several threads. Raises ResourceError if the disk is full.
    """

    def __init__(self) -> None:
        self._file = -1
        self._written = 0
        self._recent = bytearray()

    def __len__(self) -> int:
        return self._written + len(self._recent)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        raise TypeError("what lies in a temporary file of this process cannot be copied or pickled")

    def append(self, data: bytes) -> int:
        """Add bytes and return the position after them."""
        self._recent += data
        if len(self._recent) >= KEPT:
            self._flush()
        return len(self)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`."""
        content = bytearray()
        end = min(stop, self._written)
        while start < end:
            piece = os.pread(self._file, end - start, start)
            if not piece:
                raise ResourceError(
                    f"{tempfile.gettempdir()}: a temporary file of this process is shorter than "
                    "what was written to it; something cut it off"
                )
            content += piece
            start += len(piece)
        if start < stop:
            content += self._recent[start - self._written : stop - self._written]
        return bytes(content)

    def _flush(self) -> None:
        try:
            if self._file < 0:
                self._file, name = tempfile.mkstemp(prefix="polyrank-")
                weakref.finalize(self, os.close, self._file)
                os.unlink(name)  # noqa: PTH108 - the name as it came
            left = memoryview(bytes(self._recent))
            while left:
                count = os.write(self._file, left)
                left = left[count:]
        except OSError as error:
            raise ResourceError(_full(error)) from error
        self._written += len(self._recent)
        self._recent = bytearray()


def _full(error: OSError) -> str:
    try:
        folder = tempfile.gettempdir()
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
    except OSError:
        folder, free = "TMPDIR", "there is no folder for temporary files"
    return (
        f"{folder}: the temporary file that holds examples could not be written ({error}); {free}. "
        "Make room, or set TMPDIR to a folder with more"
    )
