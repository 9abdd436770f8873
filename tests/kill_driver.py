"""One small run, ended early at many moments and resumed each time; prints what came of it.

    python kill_driver.py kill|full|steps FOLDER MOMENTS SEED [whole|own|shared|planned]

``kill`` ends it by SIGKILL, ``steps`` too, but between steps of training only, and ``full`` lets
the disk be full. Clients have whole models, or some are cut, with adapters of their own or a shared
one at the server, or ranks and cuts are planned anew after rounds. Every run is a process of its
own, forked after the imports. Moments are calls that write, move or delete files (before the call,
and with the write half done) and steps of training; some kills come from outside at a random time
instead. The hooks live here: the product knows nothing of them.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

import federations
import models
import plannings
from polyrank.algebra import Adapter
from polyrank.errors import ResourceError
from polyrank.model import LoadedModel, peft_folder
from polyrank.planning import CutPoint, Fleet, LoRAType
from polyrank.rounds import Faults, Sampling
from polyrank.run import EarlyStopping, RunFolder, RunSettings
from polyrank.training.split import SplitSettings

ROUNDS = 4
CONDUCT = RunSettings(
    seed=3,
    sampling=Sampling(number=3),
    evaluation=federations.MEASURED,
    stopping=EarlyStopping(patience=3),
    faults=Faults(quorum=0.6, attempts=2),
    cohort=2,
    target_loss=4.4,
)


def setting(name: str) -> dict[str, object]:
    """Return the arguments of a federation in which clients are cut as `name` says, and how."""
    data = federations.clients()
    if name == "whole":
        return {"model": federations.one_block(), "data": data, "settings": CONDUCT}
    if name == "planned":
        local = replace(federations.LOCAL, epochs=None, steps=2)
        made = plannings.planning(deep(), data, run_settings=CONDUCT, local=local, threshold=0.0)
        given = {"model": deep(), "data": data, "settings": CONDUCT, "local": local}
        return {**given, "planning": replace(made, every=1), "fleet": made.fleet}
    ranks = {"own": (1, 2, 3), "shared": (2, 2, 2)}[name]
    types = {one: LoRAType(one, {"all": rank}) for one, rank in zip("abc", ranks, strict=True)}
    seen = sorted(id for id, client in data.items() if client.seen)
    kinds = {id: "abca"[i % 4] for i, id in enumerate(seen)}
    split = SplitSettings(wire="bf16", adapters=name, clip=9.0, noise=0.01)  # type: ignore[arg-type]
    return {
        "model": deep(),
        "data": data,
        "fleet": Fleet.table(kinds, types=types, cuts={"a": CutPoint(1), "b": CutPoint(1, 2)}),
        "settings": replace(CONDUCT, split=split),
    }


def deep() -> LoadedModel:
    return models.tiny_loaded("llama", num_hidden_layers=3, sites=federations.SITES)


REFUSED = 7
"""The exit status of a run that ended with a ResourceError."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Moments:
    """Counts the moments of a process and ends it at the chosen one."""

    def __init__(self, fatal: int | None, end: Callable[[], None], log: Path | None):
        self.fatal, self.end, self.log, self.names = fatal, end, log, []

    def pass_by(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.fatal:
            half()
            self.end()

    def write_log(self) -> None:
        if self.log:
            self.log.write_text(json.dumps(self.names))


def hook(moments: Moments) -> None:
    """Make every call that changes the disk two moments: before it, and half done."""

    def before(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*args, **rest):
            moments.pass_by(f"{name} {args[0] if args else ''}")
            return real(*args, **rest)

        setattr(owner, name, call)

    def written(owner: object, name: str, where: int) -> None:
        real = getattr(owner, name)

        def call(*args, **rest):
            path = Path(args[where])

            def half() -> None:
                real(*args, **rest)
                os.truncate(path, path.stat().st_size // 2)

            moments.pass_by(f"{name} {path}")
            moments.pass_by(f"half of {name} {path}", half)
            return real(*args, **rest)

        setattr(owner, name, call)

    real_rmtree = shutil.rmtree

    def rmtree(path, *args, **rest):
        if Path(path).is_dir():
            half = sorted(Path(path).iterdir())[:2]
            moments.pass_by(f"half of rmtree {path}", lambda: [p.unlink() for p in half])
        real_rmtree(path, *args, **rest)

    real_append = RunFolder.append_record

    def append_record(self, record):
        def half() -> None:
            with (self.path / "rounds.jsonl").open("a") as file:
                file.write(json.dumps(record)[:100])

        moments.pass_by("half of append", half)
        real_append(self, record)

    for owner, name in (
        *((os, name) for name in ("fsync", "ftruncate")),
        *((Path, name) for name in ("replace", "rename", "mkdir", "unlink")),
        (tempfile, "mkdtemp"),
    ):
        before(owner, name)
    written(Path, "write_text", 0)
    written(safetensors.torch, "save_file", 1)  # run.storage imports it when it saves
    written(peft_folder, "save_file", 1)
    shutil.rmtree = rmtree
    RunFolder.append_record = append_record


def spoil_first_attempt_of_round_two(federation) -> None:
    """Let too few updates of one attempt be usable, so that a second one is made."""
    real = federation.engine.execute

    def execute(tasks, on_step=None):
        for answer in real(tasks, on_step):
            if (answer.round, answer.attempt) == (2, 0) and answer.client != tasks[0].client:
                broken = {s: d.scale(float("nan")) for s, d in answer.adapter.items()}
                answer = replace(answer, adapter=Adapter(broken))
            yield answer

    federation.engine.execute = execute


def run(
    folder: Path,
    given: dict[str, object],
    fatal: int | None = None,
    end: Callable[[], None] = kill,
    log: Path | None = None,
) -> None:
    """Carry the run out in this process, or go on with it."""
    moments = Moments(fatal, end, log)
    hook(moments)

    def step() -> bool:
        moments.pass_by("step")
        return False

    run = federations.opened(
        folder,
        **given,
        resume=folder.exists(),
        files={"recipe.toml": "name = 'tiny'\n"},
        stop=step,
    )
    with run:
        spoil_first_attempt_of_round_two(run)
        for _ in run.rounds(ROUNDS):
            pass
        run.finish()
    moments.write_log()


def child(work: Callable[[], None]) -> int:
    """Return the id of a forked process that does this work and nothing else."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except ResourceError as error:
            print(error, file=sys.stderr)
            status = REFUSED
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return process


def outcome(process: int) -> str:
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit {os.WEXITSTATUS(status)}"


def without_seconds(value):
    """Return JSON without the only fields that may differ."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, str]:
    """Return every file of a run, comparable: bytes as hex, JSON with seconds left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == ".lock":
            continue
        if name == "rounds.jsonl":
            lines = path.read_text().splitlines()
            found[name] = json.dumps([without_seconds(json.loads(line)) for line in lines])
        elif name == "summary.json":
            found[name] = json.dumps(without_seconds(json.loads(path.read_text())))
        else:
            found[name] = path.read_bytes().hex()
    return found


WRITES = ("write_text", "save_file", "fsync", "mkdir", "mkdtemp", "half of write", "half of save")


def choose(names: list[str], count: int, draw: random.Random, how: str) -> list[int]:
    """Return moments: a third in checkpoints, a third in updates, the others anywhere."""
    if how == "steps":
        return sorted(draw.sample([i for i, name in enumerate(names) if name == "step"], count))
    usable = [i for i, name in enumerate(names) if how == "kill" or name.startswith(WRITES)]
    kinds = [
        [i for i in usable if "checkpoints/" in names[i]],
        [i for i in usable if "updates/" in names[i]],
        usable,
    ]
    chosen: set[int] = set()
    while len(chosen) < count:
        chosen.add(draw.choice(kinds[len(chosen) % 3]))
    return sorted(chosen)


def main(how: str, root: Path, count: int, seed: int, name: str = "whole") -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    end = fill_disk if how == "full" else kill
    given = setting(name)
    log = root / "moments.json"
    started = time.monotonic()
    whole = outcome(child(lambda: run(root / "whole", given, log=log)))
    assert whole == "exit 0", whole
    seconds = time.monotonic() - started
    expected, names = content(root / "whole"), json.loads(log.read_text())
    report = []
    outside = count // 6 if how == "kill" else 0
    plans: list[int | None] = [*choose(names, count - outside, draw, how), *([None] * outside)]
    for number, moment in enumerate(plans):
        folder = root / f"ended-{number}"

        def part(fatal: int | None, folder: Path = folder) -> int:
            return child(lambda: run(folder, given, fatal=fatal, end=end))

        ended = [outcome(part(moment)) if moment is not None else ""]
        delay = draw.random() * seconds * 0.8
        while moment is None and ended != ["SIGKILL"]:
            shutil.rmtree(folder, ignore_errors=True)
            process = part(None)
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            ended = [outcome(process)]
            delay /= 2  # A run that was faster than the first one ended before: kill sooner.
        if how == "kill" and number % 3 == 0:  # Again, sometimes before the first step.
            ended.append(outcome(part(draw.randrange(len(names) // 2))))
        ended.append(outcome(part(None)))
        got = content(folder)
        differing = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
        where = "from outside" if moment is None else names[moment].replace(str(root), "")
        report.append({"moment": where, "ended": ended, "differing": differing})
        shutil.rmtree(folder)
    beside = sorted(p.name for p in root.iterdir() if p.name not in ("whole", "moments.json"))
    print(json.dumps({"runs": report, "beside": beside, "files": [*expected]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
