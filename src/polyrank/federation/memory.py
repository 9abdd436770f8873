"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc); elsewhere nothing.

    A round frees what it allocated, but glibc keeps the pages, in pieces that the next round does
    not fit, so that the resident memory of a long run creeps up although what is in use does not.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
