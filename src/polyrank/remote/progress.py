"""What there is to tell of a round while its answers are awaited."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping

from polyrank.split_server.interface import ClientStatus

EVERY = 30.0
"""Seconds between two reports of how far split clients are."""
LEAST = 10.0
"""Seconds before which nobody is called slow."""


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
        """Return what is new: who has taken twice as long as half of the others, and steps."""
        told = []
        slow = self._stragglers(now, waiting)
        if slow:
            self._slow |= slow
            told.append(f"still waiting for {', '.join(sorted(slow))}")
        if now - self._told >= EVERY:
            self._told = now
            told += [
                f"{client}: step {one.step} of {one.steps}, {one.up / 2**20:.1f} MiB up, "
                f"{one.down / 2**20:.1f} MiB down{'' if one.connected else ', not connected'}"
                for client, one in sorted(status.items())
                if client in waiting
            ]
        return told

    def _stragglers(self, now: float, waiting: Collection[str]) -> set[str]:
        """Who is waited for twice as long as half of those that have answered took."""
        fresh = set(waiting) - self._slow
        if not fresh or len(self._answers) < len(waiting):
            return set()
        if now - self._began < max(LEAST, 2 * statistics.median(self._answers)):
            return set()
        return fresh
