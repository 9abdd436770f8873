"""Every block of commands in docs/how-to/deployment.md is run on this machine, in its order.

Each machine is a folder with a shell of its own, in which its blocks are run. What stands in the
place of the network is said at the beginning of the page, and is `Machines.here` and `TOOLS` below.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import Daemons
from machines import BIN, FLOWER, free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "deployment.md").read_text(encoding="utf-8")
SERVER = "server.example"
CLIENTS = ("hospital-a", "hospital-b", "clinic-c")
BLOCK = re.compile(r"^```bash\n# on (.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WHO = {"every machine": (SERVER, *CLIENTS), "every client": CLIENTS}
DOTALL = re.DOTALL | re.MULTILINE
DONE = "the block has been done"
LONGEST = 200.0

TOOLS = {
    "scp": 'exec cp "${1/server.example:/$MACHINES/server.example/}" '
    '"${2/server.example:/$MACHINES/server.example/}"',
    "hostname": 'exec basename "$HOME"',
    "flower-supernode": f'exec {BIN}/flower-supernode --port "$OWN_PORT" "$@"',
}
"""Commands that are others here: files are copied, and each SuperNode has a port of its own."""


def blocks() -> list[tuple[str, str]]:
    """Return machine and commands of every block."""
    return [
        (machine, commands)
        for who, commands in BLOCK.findall(PAGE)
        for machine in WHO.get(who, (who,))
    ]


class Machines:
    """Shells in folders, of which each believes to be a machine."""

    def __init__(self, folder: Path, daemons: Daemons):
        self._folder = folder
        self._shells: dict[str, subprocess.Popen[str]] = {}
        self._ports = {name: free_port() for name in (SERVER, "split", *CLIENTS)}
        tools = folder / "tools"
        tools.mkdir()
        for name, does in TOOLS.items():
            (tools / name).write_text(f"#!/usr/bin/env bash\n{does}\n", encoding="utf-8")
            (tools / name).chmod(0o700)
        for name in (SERVER, *CLIENTS):
            (folder / name).mkdir()
            environment = {
                "HOME": str(folder / name),
                "MACHINES": str(folder),
                "COLUMNS": "200",
                "OWN_PORT": str(self._ports[name]),
                "PATH": f"{tools}:{daemons.environment['PATH']}",
            }
            self._shells[name] = subprocess.Popen(
                ["bash", "-e"],
                cwd=folder / name,
                env={**daemons.environment, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def here(self, commands: str) -> str:
        """Return commands with addresses of this machine, and the newest run where one is meant."""
        split = f"127.0.0.1:{self._ports['split']}"
        for there, put in {
            "server.example:8000": f"127.0.0.1:{self._ports[SERVER]}",
            "server.example:9099": split,
            "0.0.0.0:9099": split,
            "--host 0.0.0.0 --port 8000": f"--host 127.0.0.1 --port {self._ports[SERVER]}",
            "DNS:server.example": "IP:127.0.0.1",
        }.items():
            commands = commands.replace(there, put)
        return (
            commands.replace("RUN_ID", self.runs()[0]["run-id"])
            if "RUN_ID" in commands
            else commands
        )

    def do(self, machine: str, commands: str) -> str:
        """Run a block in a machine's shell; return what it prints."""
        shell = self._shells[machine]
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(f"{commands}\necho '{DONE}'\n")
        shell.stdin.flush()
        printed = []
        for line in shell.stdout:
            if line.rstrip() == DONE:
                return "".join(printed)
            printed.append(line)
        pytest.fail(f"on {machine}:\n{commands}\n{''.join(printed)}\n{self.logs()}")

    def runs(self) -> list[dict[str, str]]:
        """Return all runs of the SuperLink, the newest first."""
        answer = json.loads(self.do(SERVER, "flwr ls federation --format json"))
        return sorted(answer["runs"], key=lambda run: run["pending-at"], reverse=True)

    def rounds(self) -> int:
        """Return how many rounds are over."""
        file = self._folder / SERVER / "federation" / "runs" / "hospitals" / "rounds.jsonl"
        return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0

    def wait_for_round(self, number: int) -> None:
        """Wait until so many rounds are over."""
        until = time.monotonic() + LONGEST
        while self.rounds() < number:
            if time.monotonic() > until:
                pytest.fail(f"round {number} is not over after {LONGEST} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the end of all logs, and what the newest run says."""
        found = []
        for file in sorted(self._folder.glob("*/federation/*.log")):
            said = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"==> {file.parent.parent.name}/{file.name} <==", *said[-30:]]
        return "\n".join(found)

    def close(self) -> None:
        """End the shells."""
        for shell in self._shells.values():
            shell.kill()
            shell.wait()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Daemons(tmp_path / "logs", FLOWER) as daemons:
        machines = Machines(tmp_path, daemons)
        try:
            yield machines
        finally:
            machines.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_is_run_and_three_machines_end_with_an_adapter(
    machines: Machines, tmp_path: Path
) -> None:
    """The run is stopped after round 1, killed after round 2, and ends on a new SuperLink."""
    printed = []
    for machine, commands in blocks():
        if "flwr stop" in commands:
            machines.wait_for_round(1)
        if "kill -9" in commands:
            machines.wait_for_round(2)
        began = time.monotonic()
        printed.append(machines.do(machine, machines.here(commands)))
        print(f"{time.monotonic() - began:6.1f} s  {machine}: {commands.splitlines()[0]}")
    told = "\n".join(printed)
    assert told.count("Fingerprint") == 4
    assert len(set(re.findall(r"Fingerprint=(\S+)", told))) == 1
    run = tmp_path / SERVER / "federation" / "runs" / "hospitals"
    assert (run / "adapter" / "adapter_config.json").is_file()
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert {
        name: one["rounds_joined"] for name, one in summary["clients"].items()
    } == dict.fromkeys(CLIENTS, 3)
    assert "finished:completed" in told
    assert machines.rounds() == 3


def test_every_block_of_commands_names_a_machine_that_there_is() -> None:
    """The one block that is not run is the installation, which is marked ``sh``."""
    assert PAGE.count("```bash\n") == len(BLOCK.findall(PAGE)) > 0
    assert {machine for machine, _ in blocks()} == {SERVER, *CLIENTS}
    (left,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert all("pip install" in line or "venv" in line for line in left.splitlines())


def test_recipe_and_client_files_of_the_page_are_valid(tmp_path: Path) -> None:
    """And the fleet's types are within what the clients consent to."""
    from polyrank.config import read
    from polyrank.config.client import read_client

    written = {}
    for machine, commands in blocks():
        for name, text in re.findall(r"cat > (\w+\.toml) <<'END'\n(.*?)^END$", commands, DOTALL):
            file = tmp_path / f"{machine}-{name}"
            file.write_text(text, encoding="utf-8")
            written[machine, name] = file
    recipe = read(written[SERVER, "recipe.toml"])
    assert set(recipe.fleet.clients or ()) == set(CLIENTS)
    for client in CLIENTS:
        settings = read_client(written[client, "client.toml"])
        assert settings.name == client
        largest = settings.limits.largest_rank
        assert largest is None or largest >= 16
