"""Lines for the user while a round's results are awaited."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

from polyrank.split_server.interface import ClientStatus

EVERY = 30.0
"""Seconds between two reports of how far split clients are."""
LEAST = 10.0
"""Seconds before which no client is called slow."""


class AnswerProgress:
    """Notices stragglers, and says from time to time how far the split clients are.

    `began` is when the round's clients were asked; times are in seconds of one clock.
    """

    def __init__(self, began: float):
        self._began, self._told = began, began
        self._answers: list[float] = []
        self._slow: set[str] = set()

    def answered(self, now: float) -> None:
        """Take note of an answer."""
        self._answers.append(now - self._began)

    def lines(
        self, now: float, waiting: Collection[str], status: Mapping[str, ClientStatus]
    ) -> list[str]:
        """Return new lines: clients that take twice as long as half of the others, and steps."""
        lines = []
        slow = self._stragglers(now, waiting)
        if slow:
            self._slow |= slow
            lines.append(f"still waiting for {', '.join(sorted(slow))}")
        if now - self._told >= EVERY:
            self._told = now
            lines += [
                f"{client}: step {at.step} of {at.steps}, {at.up / 2**20:.1f} MiB up, "
                f"{at.down / 2**20:.1f} MiB down{'' if at.connected else ', not connected'}"
                for client, at in sorted(status.items())
                if client in waiting
            ]
        return lines

    def _stragglers(self, now: float, waiting: Collection[str]) -> set[str]:
        """The clients that take twice as long as half of those that have answered, once each."""
        new = set(waiting) - self._slow
        if not new or len(self._answers) < len(waiting):
            return set()
        if now - self._began < max(LEAST, 2 * statistics.median(self._answers)):
            return set()
        return new
