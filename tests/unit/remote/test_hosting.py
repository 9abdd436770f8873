"""A client's machine from what Flower tells its app: a partition, or a client.toml."""

import json
from pathlib import Path

import pytest

from polyrank.config.app import APP_KEYS
from polyrank.config.flower import to_run_config
from polyrank.config.reading import checked
from polyrank.errors import RecipeError
from polyrank.planning import CutPoint
from polyrank.protocol.client_info import ClientPolicy, read_node_info
from polyrank.remote.hosting import RecipeModel, client_node

CONTENT = {
    "name": "tiny",
    "seed": 1,
    "model": {"source": "sample"},
    "data": {"source": "sample"},
    "fleet": {"distribution": "uniform", "types": "scaled"},
    "local": {"steps": 1},
    "engine": {"threads": 1},
}


def run_config(**changes):
    return {**APP_KEYS, **to_run_config(checked({**CONTENT, **changes}, "recipe"))}


def clients_at(node):
    return [client.name for client in read_node_info(node.answer("hello", b"")).clients]


def part(number, of):
    return client_node(run_config(), {"partition-id": number, "num-partitions": of})


def test_partitions_share_all_clients_of_the_recipes_data():
    everyone = sorted(checked(CONTENT, "recipe").clients())
    names = [clients_at(part(number, 4)) for number in range(4)]
    assert sorted(client for one in names for client in one) == everyone
    assert max(map(len, names)) - min(map(len, names)) <= 1


def test_a_machine_beyond_the_clients_hosts_nobody():
    assert clients_at(part(40, 41)) == []


def test_a_machine_is_made_once_for_the_same_configuration():
    assert part(0, 4) is part(0, 4)
    assert part(0, 4) is not part(1, 4)


def test_partitions_in_one_process_have_one_model_and_prepare_their_data_once():
    one, other = part(0, 4), part(1, 4)
    assert one.models.full() is other.models.full()
    tokens = [side.prepare(side.models.bare()) for side in (one, other, part(0, 4))]
    assert not tokens[0].keys() & tokens[1].keys()
    assert all(tokens[0][client] is tokens[2][client] for client in tokens[0])


def deployed(folder: Path, name: str = "ward", **limits):
    rows = [{"prompt": f"w{n}", "answer": "secretive words"} for n in range(20)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in limits.items())
    (folder / "client.toml").write_text(
        f'name = "{name}"\n[data]\nsource = "own.jsonl"\nprompt = "prompt"\ncompletion = "answer"\n'
        f'[device]\nmemory = "1 GiB"\n[limits]\n{lines}\n'
    )
    return {"client": str(folder / "client.toml")}


def test_a_client_toml_gives_one_client_its_device_and_its_limits(tmp_path):
    config = run_config(data={"source": "client"}, fleet={**CONTENT["fleet"]})
    node = deployed(tmp_path, largest_rank=4, smallest_count=2)
    side = client_node(config, node)
    payload = side.answer("hello", b"")
    info = read_node_info(payload)
    (one,) = info.clients
    assert (one.name, one.seen) == ("ward", True)
    assert sum(one.counts[name].rows for name in one.counts) == 20
    assert info.device.memory_bytes == 2**30
    assert info.policy == ClientPolicy(largest_rank=4, smallest_count=2)
    assert b"secretive" not in payload
    assert str(tmp_path).encode() not in payload


def test_a_simulated_machine_is_the_one_of_its_client_toml(tmp_path):
    """Where clients bring their own data, there is a file for each machine."""
    own = {"data": {"source": "client"}}
    config = run_config(**own) | {"app.client-files": str(tmp_path / "*" / "client.toml")}
    machine = {"partition-id": 1, "num-partitions": 2}
    with pytest.raises(RecipeError, match=r"app\.client-files: .* matches no file"):
        client_node(config, machine)
    for name in ("ward", "annex"):
        (tmp_path / name).mkdir()
        deployed(tmp_path / name, name=name)
    names = [clients_at(client_node(config, machine | {"partition-id": n})) for n in range(2)]
    assert names == [["annex"], ["ward"]], "in the order of the files"
    with pytest.raises(RecipeError, match="matches 2 files, and 3 machines are simulated"):
        client_node(config, machine | {"num-partitions": 3})
    with pytest.raises(RecipeError, match=r"a simulated machine has no data.*app\.client-files"):
        client_node(run_config(**own), machine)


@pytest.mark.parametrize("node", [{}, {"partition-id": 1}, {"site": "x"}])
def test_a_node_that_says_nothing_of_itself_is_told_what_to_say(node):
    with pytest.raises(RecipeError, match=r"node config: expected client = .*client\.toml"):
        client_node(run_config(), node)


def test_a_client_toml_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match=r"nowhere\.toml"):
        client_node(run_config(), {"client": "/nowhere.toml"})


def test_a_split_client_loads_its_own_blocks_alone_but_for_simulation():
    section = checked(CONTENT, "recipe").model
    own, simulated = RecipeModel(section, full_only=False), RecipeModel(section, full_only=True)
    assert own.client_part(CutPoint(1)).hosted == {0}
    assert own.client_part(CutPoint(1, 3)).hosted == {0, 3}
    assert own.full().hosted == {0, 1, 2, 3}
    assert simulated.client_part(CutPoint(1)) is simulated.full()
    assert own.full() is own.full()
