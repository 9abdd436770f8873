"""Kills at every phase, broken and slow streams, machines that drop out: `make test-all`.

docs/explanation/faults.md keeps what these tests print. Each run must end with the adapter that a
run in one process gives from which the clients that were lost are left out.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from local_machines import Fate, Machines
from machines import free_port
from polyrank.config import Recipe
from polyrank.config.app import APP_KEYS, app_settings
from polyrank.config.flower import from_run_config, to_run_config
from polyrank.remote.server import serve
from polyrank.run import storage
from proxy import Proxy
from split_client import PHASES
from watched_deployment import (
    CLIENTS,
    ROUNDS,
    SPLIT,
    Watched,
    adapter,
    lost_in,
    recipe_of,
    records,
    replayed,
    write_base,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FEW = {"local": {"steps": 6}, "rounds": 2}


@contextmanager
def machines(
    recipe: Recipe, folder: Path, out: Path, fate=lambda client, round: Fate(), **own: object
) -> Iterator[tuple[Machines, Mapping]]:
    """Machines of the recipe's clients, and the run config of a run with them."""
    told = {f"app.split.{key}": value for key, value in own.items()}
    config = {**APP_KEYS, **to_run_config(recipe), "app.out": str(out), **told}
    channel = Machines(config, folder, sorted(recipe.fleet.clients or ()), fate)
    try:
        yield channel, config
    finally:
        channel.close()


def carried_out(channel: Machines, config: Mapping) -> None:
    serve(from_run_config(config), app_settings(config), channel, "run")


def turned_away(run: Path) -> Counter[tuple[str, str, int]]:
    """Return (client, kind, round) of what was not aggregated; each must have a reason."""
    found: Counter[tuple[str, str, int]] = Counter()
    for record in records(run):
        for one in record["turned_away"]:
            assert one["reason"]
            found[one["client"], one["kind"], record["round"]] += 1
    return found


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("who", ["dies", "server dies"], ids=["client", "split server"])
def test_a_kill_at_any_phase_of_a_step_costs_one_client_one_round(
    who: str, phase: str, tmp_path: Path
) -> None:
    """The next round has a new process, or split server, and the tail of before is discarded."""
    write_base(tmp_path)
    out = tmp_path / "run"

    def fate(client: str, round: int) -> Fate:
        return Fate(who, phase) if (client, round) == (SPLIT, 1) else Fate()

    recipe = recipe_of(tmp_path, apart=True, **FEW)
    with machines(recipe, tmp_path, out, fate, patience=4.0, silence=4.0) as (channel, config):
        carried_out(channel, config)
        assert len(channel.killed) == 1
    assert lost_in(out) == {(1, 0): {SPLIT}, (2, 0): set()}
    ((client, kind, round),) = turned_away(out)
    assert (client, round) == (SPLIT, 1)
    assert kind == ("lost" if who == "dies" or phase == PHASES[3] else "failed")
    together = recipe_of(tmp_path, apart=False, **FEW)
    assert adapter(out) == replayed(together, out, tmp_path / "again")


class Cutting:
    """Cuts a proxy's connections whenever so many bytes have gone in a direction."""

    def __init__(self, direction: str, every: int):
        self._direction, self._every, self._left = direction, every, every
        self.proxy: Proxy | None = None
        self.times = 0

    def __call__(self, direction: str, data: bytes) -> None:
        if direction == self._direction:
            self._left -= len(data)
            if self._left < 0 and self.proxy is not None:
                self._left, self.times = self._every, self.times + 1
                self.proxy.cut()


@pytest.mark.parametrize(
    ("direction", "options"),
    [("up", {}), ("down", {}), ("neither", {"delay": 0.05, "rate": 50_000.0})],
    ids=["cut on the way there", "cut on the way back, so that frames come twice", "delayed"],
)
def test_a_broken_or_slow_stream_changes_no_byte(
    direction: str, options: dict[str, float], tmp_path: Path
) -> None:
    write_base(tmp_path)
    out = tmp_path / "run"
    recipe = recipe_of(tmp_path, apart=True, **FEW)
    listen = f"127.0.0.1:{free_port()}"
    cutting = Cutting(direction, 7000)  # TLS's beginning is about half of it
    with Proxy(listen, watch=cutting, **options) as proxy:
        cutting.proxy = proxy
        own = {"listen": listen, "address": proxy.address}
        with machines(recipe, tmp_path, out, **own) as (channel, config):
            carried_out(channel, config)
        carried = dict(proxy.carried)
    assert min(carried.values()) > 5000, "it went through the proxy"
    assert (cutting.times > 1) == (direction != "neither")
    assert turned_away(out) == Counter()
    together = recipe_of(tmp_path, apart=False, **FEW)
    assert adapter(out) == replayed(together, out, tmp_path / "again")


MANY = {"a": "T4", "b": "T2", "c": "T1", "d": "T4", "e": "T2", "f": "T1"}
MANY_ROWS = {"a": 30, "b": 20, "c": 40, "d": 20, "e": 30, "f": 20}


def test_a_third_of_the_machines_dropping_out_in_each_of_ten_rounds_is_counted_and_survived(
    tmp_path: Path,
) -> None:
    """With chance 0.3 a client dies, at any phase of a step, or is silent, or late."""
    write_base(tmp_path, MANY_ROWS)
    out = tmp_path / "run"
    draw = random.Random(5)
    fates: dict[tuple[str, int], Fate] = {}
    for round in range(1, 11):
        for client, type in MANY.items():
            if draw.random() < 0.3:
                split = type == "T1"
                how = draw.choice(["dies", "silent"] if split else ["dies", "silent", "late"])
                fates[client, round] = Fate(how, draw.choice(PHASES) if how == "dies" else "")
    changes = {
        "rounds": 10,
        "local": {"steps": 6},
        "fleet": {"clients": MANY},
        "faults": {"deadline": 40.0, "quorum": 0.3},
    }
    recipe = recipe_of(tmp_path, apart=True, **changes)

    def fate(client: str, round: int) -> Fate:
        return fates.get((client, round), Fate())

    with machines(recipe, tmp_path, out, fate, patience=10.0, silence=10.0) as (channel, config):
        carried_out(channel, config)
    expected = {(round, 0): set() for round in range(1, 11)}
    kinds: Counter[tuple[str, str, int]] = Counter()
    for (client, round), one in fates.items():
        expected[round, 0].add(client)
        kinds[client, "lost" if one.how == "dies" else "late", round] += 1
        if one.how == "late" and round < 10:
            kinds[client, "stale", round + 1] += 1
    assert len(fates) > 12
    assert lost_in(out) == expected
    assert turned_away(out) == kinds
    together = recipe_of(tmp_path, apart=False, **changes)
    assert adapter(out) == replayed(together, out, tmp_path / "again")
    counts = storage.read_json(out / "summary.json")["clients"]
    for client in MANY:
        missed = sum(one == client for one, _ in fates)
        assert counts[client]["rounds_joined"] == 10 - missed
        assert counts[client]["lost"] + counts[client]["late"] == missed


needs_keys = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")


@needs_keys
def test_the_server_dies_mid_round_and_goes_on_at_a_superlink_that_knows_nothing(
    tmp_path: Path,
) -> None:
    """Flower's own heartbeats. The final bytes are those of a run without disturbance."""
    with Watched(tmp_path) as watched:
        site, out = watched.site, tmp_path / "run"
        watched.hold("training", "a", 2)
        watched.run(out)
        watched.event("training", "a", 2)
        (server,) = site.pids("serverapp")
        watched.kill(server)
        watched.release()
        watched.hold("training", "a", 3)
        watched.run(out, app__resume=True)
        watched.event("training", "a", 3)
        assert site.superlink is not None
        site.kill(site.superlink)
        for client in CLIENTS:
            site.kill(site.nodes[client])
        watched.release()
        site.start_superlink("another.db")
        for client in CLIENTS:
            site.register(client)
            watched.start_node(client)
        watched.completed(watched.run(out, app__resume=True), out)
    assert lost_in(out) == {(round, 0): set() for round in range(1, ROUNDS + 1)}
    together = recipe_of(tmp_path, apart=False)
    assert adapter(out) == replayed(together, out, tmp_path / "again")


@needs_keys
def test_machines_that_die_are_late_when_the_deadline_comes_before_flower_notices(
    tmp_path: Path,
) -> None:
    """Flower's own heartbeats: a ClientApp and a SuperNode die, the round's deadline is 45 s."""
    with Watched(tmp_path) as watched:
        site, out = watched.site, tmp_path / "run"
        watched.hold("training", "a", 1)
        watched.hold("training", "b", 1)
        run = watched.run(out, rounds=2, faults__deadline=45.0)
        watched.kill(watched.event("training", "a", 1).pid)
        watched.event("training", "b", 1)
        site.kill(site.nodes["b"])
        watched.completed(run, out)
        log = site.log(run)
    assert lost_in(out)[1, 0] == {"a", "b"}
    kinds = {kind for client, kind, round in turned_away(out) if round == 1}
    assert kinds == {"late"}, json.dumps(records(out), indent=1) + log
    together = recipe_of(tmp_path, apart=False, rounds=2)
    assert adapter(out) == replayed(together, out, tmp_path / "again")
