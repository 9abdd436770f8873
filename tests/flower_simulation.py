"""An app on Flower's simulation, in processes of its own.

status, log = simulate(tmp_path / "sim", app, nodes=2, config={"rounds": 1})
"""

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from daemons import Daemons
from machines import BIN, FLOWER, Status, free_port

Config = Mapping[str, bool | int | float | str]
ONE_CORE_EACH = "client-resources-num-cpus=1 init-args-num-cpus=2"


def simulate(
    folder: Path, app: Path, nodes: int, config: Config | None = None, timeout: float = 240.0
) -> tuple[Status, str]:
    """Run an app on Flower's simulation with so many machines; return how it ended and its log.

    The SuperLink that Flower starts for it has a FLWR_HOME and ports of its own, and is stopped,
    with all that it started, before this returns.
    """
    home = folder.resolve() / "flower"
    home.mkdir(parents=True)
    environment = {
        **FLOWER,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    with Daemons(folder.resolve() / "logs", environment) as daemons:

        def flwr(*words: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(word) for word in (BIN / "flwr", *words)],
                cwd=folder,
                env=daemons.environment,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )

        words: list[str | Path] = ["run", app.resolve(), "--format", "json"]
        words += ["--federation-config", f"num-supernodes={nodes} {ONE_CORE_EACH}"]
        if config:
            changes = folder / "changes.toml"
            changes.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
            words += ["--run-config", changes]
        done = flwr(*words)
        try:
            run = json.loads(done.stdout)["run-id"]
        except (ValueError, KeyError):
            raise RuntimeError(f"flwr run: {done.stdout}{done.stderr}") from None
        until = time.monotonic() + timeout
        while True:
            (found,) = json.loads(flwr("ls", "--run-id", run, "--format", "json").stdout)["runs"]
            status = Status(found["status"], found.get("status-details") or "")
            log = home / "local-superlink" / "superlink.log"
            if status.finished:
                return status, flwr("log", "--show", run).stdout
            if time.monotonic() > until:
                told = log.read_text(encoding="utf-8") if log.exists() else ""
                raise TimeoutError(f"run {run} is {status.word} after {timeout} s\n{told}")
            time.sleep(0.5)
