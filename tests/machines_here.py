"""Machines of clients without Flower: those of split clients are processes, which can be killed.

post = Machines(config, folder, clients, fate)    # fate(client, round) -> what becomes of it
serve(recipe, settings, post, "run")
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import split_client
from faults import client_toml
from polyrank.protocol.train_request import read_order
from polyrank.remote.hosting import side_of
from polyrank.remote.message_channel import Message, Reply


@dataclass(frozen=True)
class Fate:
    """What becomes of a client in a round: it, or the split server, is killed at a phase.

    Or, for `how`, it is ``silent``, or its answer comes ``late``: when the next round begins.
    """

    how: str = "fine"
    phase: str = ""


FINE = Fate()


class Machines:
    """One machine for each client; whole clients train in this process, split ones in their own."""

    def __init__(
        self,
        config: Mapping[str, bool | int | float | str],
        folder: Path,
        clients: Sequence[str],
        fate: Callable[[str, int], Fate] = lambda client, round: FINE,
    ):
        self._folder = folder
        self._config = folder / "config.json"
        self._config.write_text(json.dumps(dict(config)), encoding="utf-8")
        self._tomls = {number: client_toml(folder, one) for number, one in enumerate(clients)}
        self._sides = {
            number: side_of(config, {"client": str(toml)}) for number, toml in self._tomls.items()
        }
        self._fate = fate
        self.killed: list[int] = []
        self._count = 0
        self._working: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._here: dict[str, Reply] = {}
        self._held: dict[int, dict[str, Reply]] = {}

    simulated = False

    def nodes(self) -> Sequence[int]:
        return sorted(self._sides)

    def send(self, letters: Iterable[Message], seconds: float) -> list[str | None]:
        return [self._send(letter) for letter in letters]

    def receive(self, tickets: Mapping[str, int]) -> Iterator[Reply]:
        for ticket, (process, answer) in list(self._working.items()):
            if process.poll() is not None:
                del self._working[ticket]
                payload = answer.read_bytes() if process.returncode == 0 else None
                why = f"its process has ended with {process.returncode}"
                self._here[ticket] = Reply(ticket, payload, None if payload else why)
        found = [ticket for ticket in tickets if ticket in self._here]
        if not found:
            time.sleep(0.05)
        for ticket in found:
            yield self._here.pop(ticket)

    def close(self) -> None:
        """Kill what still runs."""
        for process, _ in self._working.values():
            process.kill()
            process.wait()

    def _send(self, letter: Message) -> str:
        self._count += 1
        ticket = f"t{self._count}"
        if letter.kind != "train":
            payload = self._sides[letter.node].answer(letter.kind, letter.payload)
            self._here[ticket] = Reply(ticket, payload)
            return ticket
        task = read_order(letter.payload).task
        for round in [round for round in self._held if round < task.round]:
            self._here |= self._held.pop(round)
        fate = self._fate(task.client, task.round)
        if fate.how == "silent":
            return ticket
        if task.cut is not None:
            self._start(ticket, letter, fate)
        elif fate.how == "dies":
            self._here[ticket] = Reply(ticket, None, "its process has ended with -9")
        else:
            delivery = Reply(ticket, self._sides[letter.node].answer("train", letter.payload))
            late = self._held.setdefault(task.round, {}) if fate.how == "late" else self._here
            late[ticket] = delivery
        return ticket

    def _start(self, ticket: str, letter: Message, fate: Fate) -> None:
        order, answer = self._folder / f"{ticket}.order", self._folder / f"{ticket}.answer"
        order.write_bytes(letter.payload)
        victim = split_server() if fate.how == "server dies" else 0
        words = [self._config, self._tomls[letter.node], order, answer, fate.phase, victim]
        process = subprocess.Popen(
            [sys.executable, split_client.__file__, *map(str, words)], stdin=subprocess.DEVNULL
        )
        self._working[ticket] = process, answer
        if fate.phase:
            self.killed.append(victim or process.pid)


def split_server() -> int:
    """Return the process of this one's split server."""
    (found,) = [
        child.pid
        for child in psutil.Process().children()
        if "polyrank.split_server.worker" in child.cmdline()
        and child.status() != psutil.STATUS_ZOMBIE
    ]
    return found
