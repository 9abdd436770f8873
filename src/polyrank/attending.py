"""Commands in progress: shown on stderr, stopped by Ctrl-C at the next good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from polyrank.compare import Following
    from polyrank.runner import Attendance


@contextmanager
def attending(allow_inexact: bool = False) -> Iterator[Attendance]:
    """Show a run on stderr, and turn the first Ctrl-C or SIGTERM into a wish to stop."""
    console = Console(stderr=True)
    with _wish_to_stop(console) as stop:
        from polyrank.runner import Attendance
        from polyrank.terminal import Terminal

        with Terminal(console) as terminal:
            yield Attendance(terminal, stop, allow_inexact)


@contextmanager
def comparing(allow_inexact: bool = False) -> Iterator[tuple[Attendance, Following]]:
    """Do the same for a comparison."""
    console = Console(stderr=True)
    with _wish_to_stop(console) as stop:
        from polyrank.compare import Following
        from polyrank.runner import Attendance

        with Following(console) as following:
            yield Attendance(following, stop, allow_inexact), following


@contextmanager
def _wish_to_stop(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C or SIGTERM came; the second one ends at once."""
    wish = threading.Event()

    def note(*_: Any) -> None:
        if wish.is_set():
            raise KeyboardInterrupt
        wish.set()
        console.print("stopping after this step or batch; once more to end at once", style="yellow")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield wish.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
