"""A SuperLink and SuperNodes on this machine, as docs/how-to/deployment.md sets them up on several.

with Site(folder) as site:
    site.start_node("hospital-a", client_toml)
    run = site.run(app, {"app.out": str(folder / "run")})
    status = site.wait(run, 120)
"""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import psutil
import tomli_w

from certificates import make_authority, make_key, make_server
from daemons import Daemon, Daemons

BIN = Path(sys.executable).parent
FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "PATH": os.pathsep.join((str(BIN), os.environ.get("PATH", ""))),
}
"""What every process is told: nothing leaves this machine, and nothing waits needlessly."""
KINDS = {
    "superexec": "flower-superexec",
    "serverapp": "flwr-serverapp",
    "clientapp": "flwr-clientapp",
    "tails": "polyrank.split_server.worker",
}
"""By what a kind of process is known in its command line."""
CONNECTION = "here"
SECONDS_TO_START = 60.0


@dataclass(frozen=True)
class Status:
    """How a run stands: Flower's words, such as ``finished:completed``, and its details."""

    word: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or not."""
        return self.word.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether it has ended well."""
        return self.word == "finished:completed"


class Site:
    """A deployment in a folder: TLS, SuperNode authentication, a database, a FLWR_HOME of its own.

    Everything that it started, and what came of that, is stopped when the context is left; it is
    a RuntimeError if something is left over then. The logs stay in `folder`/logs; after an
    error their ends are printed.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        self.folder = folder.resolve()
        self.home = self.folder / "flower"
        self.home.mkdir(parents=True, mode=0o700)
        environment = {**FLOWER, "FLWR_HOME": str(self.home), **(environment or {})}
        self.daemons = Daemons(self.folder / "logs", environment)
        self.port = free_port()
        self.superlink: Daemon | None = None
        self.nodes: dict[str, Daemon] = {}

    @property
    def address(self) -> str:
        """Where the SuperLink is reached."""
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Site:
        with ExitStack() as failed:
            failed.push(self.daemons)
            make_authority(self.folder)
            make_server(self.folder)
            connection = {
                "address": self.address,
                "root-certificates": str(self.folder / "ca.crt"),
            }
            config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
            (self.home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
            self.start_superlink()
            failed.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            print(self.logs(), file=sys.stderr)
        self.daemons.stop()

    def start_superlink(self, database: str = "state.db") -> Daemon:
        """Start the SuperLink, also again, with the database of before or another one."""
        command = [
            *(BIN / "flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", self.folder / "ca.crt"),
            *("--ssl-certfile", self.folder / "server.pem"),
            *("--ssl-keyfile", self.folder / "server.key"),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--database", self.folder / database),
        ]
        self.superlink = self.daemons.start("superlink", command, self.folder)
        self._wait_for(self.superlink)
        return self.superlink

    def register(self, name: str) -> str:
        """Make the key of a SuperNode if it has none, register it, and return its id."""
        key = self.key(name)
        answer = self.flwr("supernode", "register", f"{key}.pub", CONNECTION)
        return str(answer.get("node-id", ""))

    def key(self, name: str) -> Path:
        """Return the private key of a SuperNode, made at the first asking."""
        key = self.folder / f"{name}.key"
        return key if key.exists() else make_key(key)

    def start_node(
        self,
        name: str,
        client_toml: Path | None = None,
        *,
        key: Path | None = None,
        authority: Path | None = None,
        register: bool = True,
    ) -> Daemon:
        """Start a SuperNode whose node config names a client.toml; registered unless it is known.

        `key` and `authority` (what the server's certificate must be signed by) may be others than
        the right ones.
        """
        if register and key is None and not (self.folder / f"{name}.key").exists():
            self.register(name)
        command = [
            *(BIN / "flower-supernode", "--superlink", self.address),
            *("--root-certificates", authority or self.folder / "ca.crt"),
            *("--auth-supernode-private-key", key or self.key(name)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ]
        if client_toml is not None:
            command += ["--node-config", f"client={json.dumps(str(client_toml.resolve()))}"]
        self.nodes[name] = self.daemons.start(name, command, self.folder)
        return self.nodes[name]

    def run(self, app: Path, config: Mapping[str, bool | int | float | str] | None = None) -> str:
        """Submit a run, with changes to its run config; return its id."""
        words = ["run", app.resolve(), CONNECTION]
        if config:
            changes = self.folder / "changes.toml"
            changes.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
            words += ["--run-config", changes]
        return str(self.flwr(*words)["run-id"])

    def status(self, run: str) -> Status:
        """Return how a run stands."""
        (found,) = self.flwr("ls", "--run-id", run, CONNECTION)["runs"]
        return Status(found["status"], found.get("status-details") or "")

    def wait(self, run: str, timeout: float) -> Status:
        """Wait until a run has ended; TimeoutError, with the end of all logs, if it does not."""
        until = time.monotonic() + timeout
        while not (status := self.status(run)).finished:
            if time.monotonic() > until:
                raise TimeoutError(f"run {run} is {status.word} after {timeout} s\n{self.logs()}")
            time.sleep(0.5)
        return status

    def log(self, run: str) -> str:
        """Return what the ServerApp of a run has printed so far."""
        return self._flwr("log", "--show", run, CONNECTION).stdout

    def follow(self, run: str) -> Iterator[str]:
        """Yield the lines of the ServerApp of a run as they come, until it ends."""
        command = [BIN / "flwr", "log", "--stream", run, CONNECTION]
        following = self.daemons.start(f"follow-{run}", command, self.folder)
        with following.log.open(encoding="utf-8", errors="replace") as lines:
            rest = ""
            while True:
                running = following.running
                text = rest + lines.read()
                *whole, rest = text.split("\n")
                yield from whole
                if not running:
                    return
                time.sleep(0.1)

    def stop(self, run: str) -> None:
        """Stop a run, as its owner would."""
        self.flwr("stop", run, CONNECTION)

    def pids(self, kind: str, node: str | None = None) -> list[int]:
        """Return the processes of a kind (`KINDS`); of one SuperNode if it is named."""
        among = self.daemons.all() if node is None else self.daemons.below(self.nodes[node].pid)
        found = []
        for process in among:
            with suppress(psutil.Error):
                if any(KINDS[kind] in word for word in process.cmdline()):
                    found.append(process.pid)
        return found

    def wait_for_pids(self, kind: str, timeout: float, node: str | None = None) -> list[int]:
        """Wait until there are processes of a kind; return them."""
        until = time.monotonic() + timeout
        while not (found := self.pids(kind, node)):
            if time.monotonic() > until:
                raise TimeoutError(f"no {kind} after {timeout} s\n{self.logs()}")
            time.sleep(0.05)
        return found

    def kill(self, daemon: Daemon, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a daemon a signal that ends it, and wait for that."""
        daemon.process.send_signal(number)
        daemon.process.wait(SECONDS_TO_START)

    def logs(self, lines: int = 60) -> str:
        """Return the end of what every process has printed."""
        parts = []
        for file in sorted(self.daemons.logs.glob("*.log")):
            said = file.read_text(encoding="utf-8", errors="replace").splitlines()
            parts += [f"==> {file.name} <==", *said[-lines:]]
        return "\n".join(parts)

    def flwr(self, *words: str | Path) -> dict[str, object]:
        """Run a command of Flower's and return its answer; RuntimeError if that is an error.

        With ``--format json`` the command exits with 0 whatever happens.
        """
        done = self._flwr(*words, "--format", "json")
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if not answer.get("success", False):
            told = answer.get("error-message") or done.stdout + done.stderr
            raise RuntimeError(f"flwr {' '.join(map(str, words))}: {told}")
        return answer

    def _flwr(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(word) for word in (BIN / "flwr", *words)],
            cwd=self.folder,
            env=self.daemons.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def _wait_for(self, superlink: Daemon) -> None:
        trusted = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        until = time.monotonic() + SECONDS_TO_START
        while superlink.running and time.monotonic() < until:
            with suppress(OSError):
                with urlopen(f"https://{self.address}/health", context=trusted, timeout=2):
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink does not start:\n{superlink.printed()}")


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
