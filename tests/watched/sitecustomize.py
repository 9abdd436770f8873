"""What every Python process of a test deployment does beside its work; the product has none of it.

Python imports this file at its start where the folder is in PYTHONPATH, which only `faults.Watched`
does. Flower's heartbeats are made to come faster (WATCHED_HEARTBEAT seconds), so that a death is
noticed in seconds instead of a minute. What happens goes into the file WATCHED_EVENTS, a line each:
what, process, client, round. While there is a file of that name, without the process, in the folder
WATCHED_HELD, the process goes no further, so that it can be killed right there. Secrets go into the
file WATCHED_SECRETS, in hexadecimal, so that a test can look for them wherever they must not be.
"""

import importlib.machinery
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _note(variable: str, line: str) -> None:
    descriptor = os.open(os.environ[variable], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    found = getattr(owner, name)

    def changed(*arguments: Any, **named: Any) -> Any:
        act(*arguments, **named)
        return found(*arguments, **named)

    setattr(owner, name, changed)


def _heartbeats(constant: ModuleType) -> None:
    seconds = os.environ.get("WATCHED_HEARTBEAT")
    if seconds is not None:
        constant.HEARTBEAT_DEFAULT_INTERVAL = constant.HEARTBEAT_MIN_INTERVAL = int(seconds)


def _event(what: str, client: str, round: int) -> None:
    _note("WATCHED_EVENTS", f"{what} {os.getpid()} {client} {round}")
    held = Path(os.environ["WATCHED_HELD"]) / f"{what} {client} {round}"
    while held.exists():
        time.sleep(0.05)


def _training(client: ModuleType) -> None:
    def begun(node: Any, request: Any) -> None:
        _event("training", request.task.client, request.task.round)

    _before(client.ClientNode, "train", begun)


def _stream(stream: ModuleType) -> None:
    seen: set[Any] = set()

    def replied(self: Any, *_: Any) -> None:
        if self not in seen:
            seen.add(self)
            _note("WATCHED_SECRETS", self._session._secret.hex())
            _event("replied", self.credentials.client, self.credentials.round)

    _before(stream.ReconnectingStream, "_receive_part", replied)


def _credentials(credentials: ModuleType) -> None:
    _before(
        credentials.Credentials,
        "__post_init__",
        lambda self: _note("WATCHED_SECRETS", self.token.hex()),
    )


def _identity(identity: ModuleType) -> None:
    made = identity.new_identity

    def noted(*arguments: Any, **named: Any) -> Any:
        found = made(*arguments, **named)
        for line in found.key.decode().splitlines()[1:-1]:
            _note("WATCHED_SECRETS", line.encode().hex())
        return found

    identity.new_identity = noted


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "flwr.common.constant": _heartbeats,
    "polyrank.remote.client": _training,
    "polyrank.transport.remote.reconnecting_stream": _stream,
    "polyrank.transport.remote.credentials": _credentials,
    "polyrank.transport.remote.identity": _identity,
}
"""What is done to a module once it is loaded."""


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> Any:
        change = CHANGES.get(name)
        spec = None if change is None else importlib.machinery.PathFinder.find_spec(name, path)
        if change is None or spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "WATCHED_EVENTS" in os.environ:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
