"""Ctrl-C and SIGTERM: the first asks a run to stop and save, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from polyrank.compare import ComparisonProgress
    from polyrank.runner.parts import Invocation


@contextmanager
def followed(allow_inexact: bool = False) -> Iterator[Invocation]:
    """Show a run on stderr, and have it stop at the first Ctrl-C or SIGTERM."""
    console = Console(stderr=True)
    with _interrupts(console) as stop:
        from polyrank.report.progress import RunProgress
        from polyrank.runner.parts import Invocation

        with RunProgress(console) as terminal:
            yield Invocation(terminal, stop, allow_inexact)


@contextmanager
def followed_comparison(
    allow_inexact: bool = False,
) -> Iterator[tuple[Invocation, ComparisonProgress]]:
    """Do the same for a comparison."""
    console = Console(stderr=True)
    with _interrupts(console) as stop:
        from polyrank.compare import ComparisonProgress
        from polyrank.runner.parts import Invocation

        with ComparisonProgress(console) as following:
            yield Invocation(following, stop, allow_inexact), following


@contextmanager
def _interrupts(console: Console) -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C or SIGTERM came; the second ends at once."""
    asked = threading.Event()

    def note(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        console.print("stopping after this step or batch; once more to end at once", style="yellow")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
