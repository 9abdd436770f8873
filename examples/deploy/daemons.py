"""Processes that are started here, found again with all their children, and stopped by their ids.

Every process gets a mark in its environment, which its children inherit. So those are found too
whose parents have died, and those that have detached themselves. Linux and macOS.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "POLYRANK_STARTED_BY_"
"""Begins the name of the variable that marks what was started; marks of several add up."""
SECONDS_TO_END = 5.0
"""How long processes may take to end when asked, before they are killed."""
SECONDS_FOR_ORPHANS = 1.0
"""The same for what lives on when all that was started here has ended."""


@dataclass(frozen=True)
class Daemon:
    """A process that was started, and the file with what it prints."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Its id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def printed(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Daemons:
    """What was started with one mark; stopped on leaving the context, whatever happened."""

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None):
        self._mark = MARK + uuid.uuid4().hex
        self.logs = logs
        self.environment = {**os.environ, **(environment or {}), self._mark: "1"}
        self._started: list[Daemon] = []
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str | Path], folder: Path) -> Daemon:
        """Start a process in a folder, in a group of its own, so that Ctrl-C is left to us.

        What it prints is added to its log, so that a restart keeps what was said before.
        """
        log = self.logs / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        daemon = Daemon(name, process, log)
        self._started.append(daemon)
        return daemon

    def all(self) -> list[psutil.Process]:
        """Return all that live with the mark: what was started here and what came of it."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and self._mark in process.environ():
                    found.append(process)
        return [process for process in found if _lives(process)]

    def below(self, pid: int) -> list[psutil.Process]:
        """Return what lives below a process: its children, theirs, and so on."""
        with suppress(psutil.Error):
            return [one for one in psutil.Process(pid).children(recursive=True) if _lives(one)]
        return []

    def stop(self) -> None:
        """Stop all: ask what was started here, wait, then kill what is left, children included.

        Raises RuntimeError if something cannot be stopped.
        """
        for daemon in self._started:
            if daemon.running:
                daemon.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + SECONDS_TO_END
        while (left := self.all()) and time.monotonic() < until:
            time.sleep(0.1)
            if not any(daemon.running for daemon in self._started):
                until = min(until, time.monotonic() + SECONDS_FOR_ORPHANS)
        until = time.monotonic() + SECONDS_TO_END
        while left and time.monotonic() < until:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)
            self._reap()  # not by psutil, which would keep how they ended to itself
            left = self.all()
        if left:
            raise RuntimeError(f"cannot be stopped: {[process.cmdline() for process in left]}")

    def _reap(self) -> None:
        for daemon in self._started:
            daemon.process.poll()


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
