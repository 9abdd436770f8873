"""Real processes on loopback: TLS, SuperNodes' keys, three clients, one of them split; and kills.

Flower's heartbeats come faster here than in the product (tests/watched), so that a death is noticed
after 16 s and not after 60; nothing else is changed. test_deployed_faults.py has the slow ones.
"""

import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import make_authority, make_key
from polyrank.data import sizes
from polyrank.model.anatomy import anatomy_of
from polyrank.planning import CutPoint
from polyrank.planning.cost import CostModel
from polyrank.planning.workload import Workload
from polyrank.run import storage
from runs import polyrank
from watched_deployment import (
    BATCH,
    CLIENTS,
    CUT,
    LONG,
    ROUNDS,
    SPLIT,
    STEPS,
    Watched,
    adapter,
    client_toml,
    files_below,
    found_in,
    parts_of,
    recipe_of,
    records,
    replayed,
    written,
)

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs openssl and ssh-keygen"),
]
HEARTBEAT = 8


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with Watched(tmp_path_factory.mktemp("deployed"), HEARTBEAT) as found:
        yield found


def start_intruders(watched: Watched) -> None:
    """Start SuperNodes that must not get in: with a key that nobody registered, with another CA."""
    site = watched.site
    stranger = make_key(watched.folder / "stranger")
    toml = client_toml(watched.folder, "stranger", "a")
    site.start_node("stranger", toml, key=stranger, register=False)
    others = watched.folder / "others"
    others.mkdir()
    make_authority(others)
    toml = client_toml(watched.folder, "misled", "a")
    site.start_node("misled", toml, authority=others / "ca.crt")


def predicted_wire(watched: Watched) -> tuple[int, int]:
    """Return the split client's bytes up and down by the cost model."""
    parts, _ = parts_of(recipe_of(watched.folder, apart=False).resolved())
    rows = [*sizes(parts.prepared[0][SPLIT].rows["train"])]
    ((length, targets),) = {(row.tokens, row.targets) for row in rows}
    assert len(rows) % BATCH == 0
    load = Workload(BATCH, length, targets, wire="float32")
    wire = CostModel(anatomy_of(parts.model), parts.model.spec, load).wire(CutPoint(CUT))
    return ROUNDS * STEPS * wire.up, ROUNDS * STEPS * wire.down


def test_three_machines_give_the_bytes_of_one_process_and_nobody_else_gets_in(
    watched: Watched, tmp_path: Path
) -> None:
    start_intruders(watched)
    out = watched.folder / "runs" / "away"
    run = watched.run(out)
    watched.completed(run, out)
    log = watched.site.log(run)

    # The bytes of `polyrank run` with all data in one file.
    recipe = tmp_path / "union.toml"
    recipe.write_text(recipe_of(watched.folder, apart=False).to_toml(), encoding="utf-8")
    here = tmp_path / "here"
    done = polyrank("run", recipe, "--out", here)
    assert done.code == 0, done.err
    assert adapter(out) == adapter(here)

    # The counts of each client, those of the run in one process.
    summary, expected = (storage.read_json(place / "summary.json") for place in (out, here))
    assert summary["clients"] == expected["clients"]
    for client in CLIENTS:
        found = summary["clients"][client]
        assert found["rounds_joined"] == ROUNDS
        assert found["refused"] == found["late"] == found["lost"] == 0
        assert min(found["bytes_up"], found["bytes_down"]) > 0
    up, down = predicted_wire(watched)
    assert summary["wire_up"] == pytest.approx(up, rel=0.02)
    assert summary["wire_down"] == pytest.approx(down, rel=0.02)

    # Nobody else was let in.
    stranger, misled = (watched.site.nodes[name] for name in ("stranger", "misled"))
    assert stranger.process.wait(LONG) != 0
    assert "2004" in stranger.printed()  # Flower's: this SuperNode is not registered
    assert "CERTIFICATE_VERIFY_FAILED" in misled.printed().replace(" ", "_").upper()
    for name in ("stranger", "misled"):
        assert name not in log
    assert {record_client for one in records(out) for record_client in one["clients"]} == {*CLIENTS}
    if misled.running:  # It tries again and again.
        watched.site.kill(misled)


def test_secrets_are_in_no_command_line_no_log_and_no_run_folder(watched: Watched) -> None:
    """Of the run before: access tokens, session secrets, private keys."""
    if not (watched.folder / "runs" / "away").exists():
        pytest.skip("looks at what the test above has left; run both")
    secrets = watched.secrets()
    assert len(secrets) >= 2 * ROUNDS + 3, "the tokens and secrets of three rounds, and a key"
    site = watched.site
    commands = {" ".join(words): " ".join(words).encode() for words in watched.commands}
    assert any("polyrank.split_server.worker" in line for line in commands)
    assert any("flwr-clientapp" in line for line in commands)
    assert found_in(commands, secrets) == []
    kept = files_below(site.daemons.logs, watched.folder / "runs", watched.folder / "app")
    assert any("rounds.jsonl" in name for name in kept)
    assert any(content for name, content in kept.items() if name.endswith("superlink.log"))
    assert found_in(kept, secrets) == []
    hidden = {"x": b"..." + written(secrets[0])[-1] + b"..."}
    assert found_in(hidden, secrets) == ["x"], "what is looked for would be found"


def test_plaintext_gets_no_answer_from_the_superlink(watched: Watched) -> None:
    with socket.create_connection(("127.0.0.1", watched.site.port), timeout=20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        try:
            answer = plain.recv(4096)
        except ConnectionResetError:
            answer = b""
    assert b"HTTP" not in answer
    trusting = ssl.create_default_context(cafile=str(watched.site.folder / "ca.crt"))
    with socket.create_connection(("127.0.0.1", watched.site.port), timeout=20) as raw:
        with trusting.wrap_socket(raw, server_hostname="127.0.0.1") as connected:
            connected.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b"200" in connected.recv(4096)


def test_a_kill_of_each_kind_of_process_is_survived_and_the_adapter_is_that_of_who_took_part(
    watched: Watched, tmp_path: Path
) -> None:
    """The split server, the server and its SuperLink, a ClientApp and a SuperNode, in this order.

    Which process is killed when is told by the processes themselves, so that each is in training.
    """
    site, out = watched.site, watched.folder / "runs" / "killed"
    watched.forget()
    watched.hold("replied", SPLIT, 1)
    first = watched.run(out)
    watched.event("replied", SPLIT, 1)
    watched.kill(watched.split_server())
    watched.release()
    watched.hold("training", "a", 2)

    watched.event("training", "a", 2)
    (server,) = site.pids("serverapp")
    watched.kill(server)
    watched.release()
    second = watched.run(out, app__resume=True)
    watched.hold("training", "a", 2)  # Others may have had their updates saved.

    watched.event("training", "a", 2, skip=1)
    assert site.superlink is not None
    site.kill(site.superlink)
    watched.release()
    watched.hold("training", "a", 3)
    watched.hold("training", "b", 3)
    site.start_superlink()
    third = watched.run(out, app__resume=True)

    watched.kill(watched.event("training", "a", 3).pid)
    watched.event("training", "b", 3)
    site.kill(site.nodes["b"])
    watched.completed(third, out)
    watched.release()

    for run in (first, second):
        assert not site.status(run).completed
    one, two, three = records(out)
    assert one["rejected"].keys() == {SPLIT}
    assert two["rejected"] == {}
    assert three["rejected"].keys() == {"a", "b"}
    for record in (one, three):
        assert {away["kind"] for away in record["turned_away"]} <= {"lost", "failed", "late"}
        assert all(record["rejected"].values())
    recipe = recipe_of(watched.folder, apart=False)
    assert adapter(out) == replayed(recipe, out, tmp_path / "again")
    counts = storage.read_json(out / "summary.json")["clients"]
    joined = {client: found["rounds_joined"] for client, found in counts.items()}
    assert joined == {"a": 2, "b": 2, "c": 2}
    assert site.pids("tails") == site.pids("serverapp") == []
