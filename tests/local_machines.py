"""Machines of clients without Flower: those of split clients are processes, which can be killed.

channel = Machines(config, folder, clients, fate)    # fate(client, round) -> what becomes of it
serve(recipe, settings, channel, "run")
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
from polyrank.protocol.train_request import read_train_request
from polyrank.remote.hosting import client_node
from polyrank.remote.message_channel import Message, Reply
from watched_deployment import client_toml


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

    simulated = False

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
        self._tomls = {number: client_toml(folder, name) for number, name in enumerate(clients)}
        self._nodes = {
            number: client_node(config, {"client": str(toml)})
            for number, toml in self._tomls.items()
        }
        self._fate = fate
        self.killed: list[int] = []
        self._count = 0
        self._working: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._here: dict[str, Reply] = {}
        self._late_replies: dict[int, dict[str, Reply]] = {}

    def nodes(self) -> Sequence[int]:
        return sorted(self._nodes)

    def send(self, messages: Iterable[Message], seconds: float) -> list[str | None]:
        return [self._send(message) for message in messages]

    def receive(self, message_ids: Mapping[str, int]) -> Iterator[Reply]:
        for message_id, (process, answer) in list(self._working.items()):
            if process.poll() is not None:
                del self._working[message_id]
                payload = answer.read_bytes() if process.returncode == 0 else None
                why = f"its process has ended with {process.returncode}"
                self._here[message_id] = Reply(message_id, payload, None if payload else why)
        found = [message_id for message_id in message_ids if message_id in self._here]
        if not found:
            time.sleep(0.05)
        for message_id in found:
            yield self._here.pop(message_id)

    def close(self) -> None:
        """Kill what still runs."""
        for process, _ in self._working.values():
            process.kill()
            process.wait()

    def _send(self, message: Message) -> str:
        self._count += 1
        message_id = f"t{self._count}"
        if message.kind != "train":
            payload = self._nodes[message.node].answer(message.kind, message.payload)
            self._here[message_id] = Reply(message_id, payload)
            return message_id
        task = read_train_request(message.payload).task
        for round in [round for round in self._late_replies if round < task.round]:
            self._here |= self._late_replies.pop(round)
        fate = self._fate(task.client, task.round)
        if fate.how == "silent":
            return message_id
        if task.cut is not None:
            self._start(message_id, message, fate)
        elif fate.how == "dies":
            self._here[message_id] = Reply(message_id, None, "its process has ended with -9")
        else:
            reply = Reply(message_id, self._nodes[message.node].answer("train", message.payload))
            late = (
                self._late_replies.setdefault(task.round, {}) if fate.how == "late" else self._here
            )
            late[message_id] = reply
        return message_id

    def _start(self, message_id: str, message: Message, fate: Fate) -> None:
        request, answer = (
            self._folder / f"{message_id}.request",
            self._folder / f"{message_id}.answer",
        )
        request.write_bytes(message.payload)
        victim = split_server() if fate.how == "server dies" else 0
        words = [self._config, self._tomls[message.node], request, answer, fate.phase, victim]
        process = subprocess.Popen(
            [sys.executable, split_client.__file__, *map(str, words)], stdin=subprocess.DEVNULL
        )
        self._working[message_id] = process, answer
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
