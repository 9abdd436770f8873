"""Deployments whose processes are watched and killed, and what their runs must come to.

with Watched(tmp_path) as watched:                    # SuperLink, three SuperNodes, real processes
    watched.hold("training", "a", 2)
    run = watched.run(out)
    watched.kill(watched.event("training", "a", 2).pid)   # client a, when it trains in round 2
    ...
adapter = replayed(recipe, out, tmp_path / "again")   # what the members that are recorded train
"""

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from machines import Site
from models import write_tiny
from polyrank.aggregation import Update
from polyrank.config import Recipe
from polyrank.config.reading import checked
from polyrank.evaluation import Evaluator
from polyrank.evaluation.evaluator import LocalEvaluator
from polyrank.flower.app_folder import write_app
from polyrank.planning import Fleet
from polyrank.report.progress import RunProgress
from polyrank.rounds import Engine
from polyrank.rounds.messages import Failure, TrainTask
from polyrank.run.engine import InProcessEngine
from polyrank.runner.parts import Invocation, LocalParts
from polyrank.runner.runner import complete

WATCHED = Path(__file__).parent / "watched"
CLIENTS = {"a": "T4", "b": "T2", "c": "T1"}
SPLIT, CUT = "c", 2
ROWS = {"a": 30, "b": 20, "c": 40}
"""Rows of each client; four fifths of them train, of the split one whole batches."""
BATCH, STEPS, ROUNDS = 4, 40, 3
LONG = 400.0
"""Seconds that a step of a test may take on a machine that is busy."""

PATIENT = {"app.split.patience": 10.0, "app.split.silence": 10.0}
"""How long a split client tries to reach a split server that has died."""

CONTENT = {
    "name": "faults",
    "seed": 3,
    "rounds": ROUNDS,
    "data": {"template": "{prompt} {input}"},
    "fleet": {"types": {"T1": 1, "T2": 2, "T4": 4}, "clients": CLIENTS, "cuts": {"T1": CUT}},
    "split": {"wire": "float32"},
    "aggregation": {"rule": "flexlora"},
    "local": {"lr": 1e-2, "steps": STEPS, "batch": BATCH},
    "evaluation": {"every": 0, "examples": 2, "generate": 0},
    "engine": {"threads": 1, "deterministic": True},
    "faults": {"quorum": 0.3, "attempts": 2, "deadline": 120.0},
}


def write_base(folder: Path, counts: Mapping[str, int] = ROWS) -> None:
    """Write a tiny model of three blocks, and the clients' data."""
    write_tiny(folder / "base", num_hidden_layers=3)
    write_data(folder, counts)


def write_data(folder: Path, counts: Mapping[str, int]) -> None:
    """Write each client's examples, all of one length, and those of all in `union.jsonl`."""
    union = []
    for number, (client, count) in enumerate(counts.items()):
        rows = []
        for row in range(count):
            word = f"w{10 + (7 * row + number) % 80}"
            texts = {"instruction": f"w{90 + number}", "input": word, "output": word}
            rows.append(json.dumps({"client": client, **texts}) + "\n")
        (folder / f"{client}.jsonl").write_text("".join(rows), encoding="utf-8")
        union += rows
    (folder / "union.jsonl").write_text("".join(union), encoding="utf-8")


def client_toml(folder: Path, name: str, data: str | None = None) -> Path:
    """Write the client.toml of a name, with its own data or another one's."""
    file, source = folder / f"{name}.toml", folder / f"{data or name}.jsonl"
    file.write_text(f'name = "{name}"\n[data]\nsource = "{source}"\n', encoding="utf-8")
    return file


def recipe_of(folder: Path, *, apart: bool, **sections: Mapping[str, object] | int) -> Recipe:
    """Return the recipe with each client's data at the client, or with that of all in one file.

    `sections` change some keys of these sections, or a key of its own.
    """
    union = {"source": str(folder / "union.jsonl"), "by": "client"}
    data = {"source": "client"} if apart else union
    model = {"source": str(folder / "base"), "device": "cpu"}
    content = {**CONTENT, "model": model, "data": {**CONTENT["data"], **data}}
    for name, given in sections.items():
        content[name] = {**content[name], **given} if isinstance(given, Mapping) else given
    return checked(content, "recipe")


@dataclass(frozen=True)
class Event:
    """What a process has told: that it trains a client, or has its split server's first reply."""

    what: str
    pid: int
    client: str
    round: int


class Watched:
    """A deployment of the three clients, of which one is split, whose processes can be killed."""

    def __init__(self, folder: Path, heartbeat: int | None = None):
        self.folder = folder
        write_base(folder)
        self._events = folder / "events"
        self._secrets = folder / "secrets"
        self._held = folder / "held"
        self._held.mkdir()
        self._seen = 0
        environment = {
            "PYTHONPATH": os.pathsep.join(
                filter(None, (str(WATCHED), os.environ.get("PYTHONPATH")))
            ),
            "WATCHED_EVENTS": str(self._events),
            "WATCHED_SECRETS": str(self._secrets),
            "WATCHED_HELD": str(self._held),
        }
        if heartbeat is not None:
            environment["WATCHED_HEARTBEAT"] = str(heartbeat)
        self.site = Site(folder / "site", environment)
        self.commands: set[tuple[str, ...]] = set()
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watched":
        self.site.__enter__()
        try:
            self._looking.start()
            write_app(recipe_of(self.folder, apart=True), self.folder / "app")
            for client in CLIENTS:
                self.start_node(client)
        except BaseException as error:
            self._end(type(error), error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_) -> None:
        self._end(kind, error)

    def _end(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        self._over.set()
        if self._looking.is_alive():
            self._looking.join()
        self.site.__exit__(kind, error, None)
        assert self.site.daemons.all() == []

    def start_node(self, client: str) -> None:
        """Start a client's SuperNode, also again."""
        self.site.start_node(client, client_toml(self.folder, client))

    def split_server(self) -> int:
        """Return the process of the split server, which must be there."""
        (found,) = self.site.pids("tails")
        return found

    def run(self, out: Path, **changes: bool | int | float | str) -> str:
        """Submit the run with a folder, a new one unless `app__resume` is true; return its id."""
        written = {key.replace("__", "."): value for key, value in changes.items()}
        own = {"app.out": str(out), "app.wait": LONG, **PATIENT}
        return self.site.run(self.folder / "app", {**own, **written})

    def completed(self, run: str, out: Path) -> None:
        """Wait for a run's end, which must be a good one."""
        until, asked = time.monotonic() + LONG, 0.0
        while not (out / "summary.json").exists():  # Asking Flower takes a process each time.
            assert time.monotonic() < until, self.site.log(run)
            if time.monotonic() > asked + 10:
                asked = time.monotonic()
                status = self.site.status(run)
                assert not status.finished or status.completed, (status, self.site.log(run))
            time.sleep(0.2)
        status = self.site.wait(run, LONG)
        assert status.completed, (status, self.site.log(run))

    def hold(self, what: str, client: str, round: int) -> None:
        """Let a process go no further once it is at something, until `release`."""
        (self._held / f"{what} {client} {round}").touch()

    def release(self) -> None:
        """Let all processes go on."""
        for file in self._held.iterdir():
            file.unlink()

    def event(self, what: str, client: str, round: int, skip: int = 0) -> Event:
        """Wait until a client is at something in a round, `skip` times more often than once."""
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            found = [
                e for e in self.events() if (e.what, e.client, e.round) == (what, client, round)
            ]
            if len(found) > skip:
                return found[skip]
            time.sleep(0.02)
        raise TimeoutError(f"{client} is not {what} in round {round}\n{self.site.logs()}")

    def events(self) -> list[Event]:
        """Return all that was told so far."""
        if not self._events.exists():
            return []
        lines = [line.split() for line in self._events.read_text(encoding="utf-8").splitlines()]
        return [Event(what, int(pid), client, int(round)) for what, pid, client, round in lines]

    def forget(self) -> None:
        """Forget the events of before, so that another run can be followed."""
        self._events.unlink(missing_ok=True)

    def kill(self, pid: int) -> None:
        """Kill a process, which must be there, at once."""
        os.kill(pid, signal.SIGKILL)

    def secrets(self) -> list[bytes]:
        """Return all access tokens, session secrets and lines of private keys that there were."""
        lines = self._secrets.read_text(encoding="utf-8").split()
        found = {bytes.fromhex(line) for line in lines}
        for key in (*self.site.folder.glob("*.key"), self.site.folder / "server.key"):
            found |= {line for line in key.read_bytes().splitlines()[1:-1] if len(line) > 20}
        return sorted(found)

    def _look(self) -> None:
        while not self._over.wait(0.3):
            for process in self.site.daemons.all():
                with suppress(psutil.Error):
                    self.commands.add(tuple(process.cmdline()))


def written(secret: bytes) -> list[bytes]:
    """Return the ways in which a secret may be found in a text or a file."""
    plain = [secret, secret.hex().encode(), repr(secret)[2:-1].encode()]
    ways = (base64.b64encode, base64.urlsafe_b64encode)
    return plain + [way(secret).rstrip(b"=") for way in ways]


def found_in(places: Mapping[str, bytes], secrets: Iterable[bytes]) -> list[str]:
    """Return the places that hold one of the secrets."""
    forms = [form for secret in secrets for form in written(secret)]
    return [name for name, content in places.items() if any(form in content for form in forms)]


def files_below(*folders: Path) -> dict[str, bytes]:
    """Return the files of folders with what is in them."""
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): file.read_bytes() for file in files}


# --- what a run must come to ---


class Recorded:
    """Trains in this process, and loses the clients that another run has lost, in its rounds."""

    def __init__(self, inner: InProcessEngine, lost: Mapping[tuple[int, int], Collection[str]]):
        self._inner, self._lost = inner, lost
        self.cohort, self.scoring = 1, inner.scoring

    def cohorts(self, clients: Sequence[str], cut_of: Callable[[str], object]) -> list[list[str]]:
        return [[client] for client in clients]

    def run(
        self, groups: Sequence[Sequence[TrainTask]], on_step: Callable[[], None] | None
    ) -> Iterator[Update | Failure]:
        for task in [task for group in groups for task in group]:
            if task.client in self._lost.get((task.round, task.attempt), ()):
                yield Failure(task.client, task.round, task.attempt, "lost there", kind="lost")
            else:
                yield from self._inner.execute([task], on_step)

    def close(self) -> None:
        pass


class RecordedParts:
    """Data and model in this process, with the members of the rounds of another run."""

    lost: Mapping[tuple[int, int], Collection[str]] = {}

    def __init__(self, recipe: Recipe, invocation: Invocation):
        self._recipe, self._parts = recipe, LocalParts(recipe, invocation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parts, name)

    def executors(self, fleet: Fleet) -> tuple[Engine, Evaluator]:
        recipe, work = self._recipe, self.prepared[0]
        inner = InProcessEngine(self.model, work, recipe.local, 1, recipe.split)
        evaluator = LocalEvaluator(self.model, work, recipe.evaluation)
        return Recorded(inner, self.lost), evaluator


def parts_of(recipe: Recipe) -> tuple[RecordedParts, Invocation]:
    """Return what a run in this process is made of."""
    quiet = RunProgress(Console(file=StringIO()))
    invocation = Invocation(quiet, lambda: False)
    return RecordedParts(recipe, invocation), invocation


def records(run: Path) -> list[dict]:
    """Return the records of a run's rounds."""
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def lost_in(run: Path) -> dict[tuple[int, int], set[str]]:
    """Return whom each attempt of each round has lost, as it was recorded."""
    found = {}
    for record in records(run):
        for attempt, rejected in enumerate([*record["abandoned"], record["rejected"]]):
            found[record["round"], attempt] = set(rejected)
    return found


def replayed(recipe: Recipe, run: Path, folder: Path) -> bytes:
    """Return the adapter of a run in this process in which the members of another one take part."""
    parts, invocation = parts_of(recipe.resolved())
    parts.lost = lost_in(run)
    complete(recipe.resolved(), folder, invocation, parts, resume=False)
    return adapter(folder)


def adapter(run: Path) -> bytes:
    """Return the factors that a run has ended with."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
