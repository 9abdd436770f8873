"""Messages over Flower's grid; the grid here behaves as Flower 1.41's."""

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

from polyrank.errors import PacketError
from polyrank.flower import grid_channel
from polyrank.flower.grid_channel import TOGETHER, GridChannel, packed, unpacked
from polyrank.remote.message_channel import Message

SUPERLINK, GONE = 1, 99


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """What a process of Flower has, and messages need."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, SUPERLINK)
    monkeypatch.setattr(grid_channel, "PAUSE", 0.0)


class Grid:
    """Delivers once; `empty` is what pushing to an unknown node gives."""

    def __init__(self, nodes=(5, 7), empty=("",)):
        self.nodes, self.empty = list(nodes), list(empty)
        self.pushed, self.replies, self.pulled = {}, {}, []

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        (message,) = messages
        if message.metadata.dst_node_id == GONE:
            return self.empty
        message_id = f"id{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = message_id
        self.pushed[message_id] = message
        return [message_id]

    def pull_messages(self, message_ids):
        """Replies that have come; an id that was pulled before is an error, as in Flower."""
        asked = list(message_ids)
        self.pulled.append(asked)
        found = [self.replies.pop(message_id) for message_id in asked if message_id in self.replies]
        for message_id in asked:
            if message_id not in self.pushed:
                found.append(self.error(message_id, 3, "message unavailable"))
        for message in found:
            self.pushed.pop(message.metadata.reply_to_message_id, None)
        return found

    def reply(self, message_id, content):
        self.replies[message_id] = FlowerMessage(content, reply_to=self.pushed[message_id])

    def error(self, message_id, code, reason):
        to = self.pushed.get(message_id)
        if to is None:
            to = FlowerMessage(RecordDict(), dst_node_id=5, message_type="train")
            to.metadata.__dict__["_message_id"] = message_id
        found = FlowerMessage(Error(code, reason), reply_to=to)
        found.metadata.__dict__["_src_node_id"] = SUPERLINK
        return found


def test_messages_live_longer_than_their_replies_may_take():
    grid = Grid()
    channel = GridChannel(grid)
    messages = [
        Message(5, "hello", b""),
        Message(7, "train", b"\x00request"),
        Message(5, "evaluate", b"e"),
    ]
    assert channel.nodes() == [5, 7]
    assert channel.send(iter(messages), 30.0) == ["id0", "id1", "id2"]
    for message, pushed in zip(messages, grid.pushed.values(), strict=True):
        about = pushed.metadata
        assert (about.dst_node_id, unpacked(pushed.content)) == (message.node, message.payload)
        assert about.ttl > 2 * 30.0, "a late answer is seen"
    types = [pushed.metadata.message_type for pushed in grid.pushed.values()]
    assert types == ["query", "train", "evaluate"]


def test_flowers_simulation_is_known_by_its_grid():
    assert not GridChannel(Grid()).simulated
    assert GridChannel(InMemoryGrid.__new__(InMemoryGrid)).simulated


@pytest.mark.parametrize("empty", [[""], [], [None]])
def test_a_machine_that_flower_does_not_know_has_no_message_id(empty):
    grid = Grid(nodes=(5, GONE), empty=empty)
    channel = GridChannel(grid)
    messages = [Message(GONE, "train", b"a"), Message(5, "train", b"b"), Message(8, "train", b"c")]
    assert channel.send(messages, 1.0) == [None, "id0", None]
    assert unpacked(grid.pushed["id0"].content) == b"b"


def test_answers_come_once_and_finished_messages_are_not_asked_again():
    grid = Grid()
    channel = GridChannel(grid)
    channel.send([Message(5, "train", b"a"), Message(7, "train", b"b")], 1.0)
    waiting = {"id0": 5, "id1": 7}
    assert list(channel.receive(waiting)) == []
    grid.reply("id1", packed(b"answer"))
    (came,) = channel.receive(waiting)
    assert (came.message_id, came.payload, came.error) == ("id1", b"answer", None)
    del waiting["id1"]
    assert list(channel.receive(waiting)) == []
    assert grid.pulled[-1] == ["id0"]


def test_what_flower_says_of_lost_messages_goes_to_the_client_that_was_asked():
    """Flower's own errors come from the SuperLink's node: only what they reply to tells."""
    grid = Grid()
    channel = GridChannel(grid)
    channel.send([Message(5, "train", b"a"), Message(7, "train", b"b")], 1.0)
    grid.replies["id1"] = grid.error("id1", 5, "Node Unavailable")
    (came,) = channel.receive({"id0": 5, "id1": 7})
    assert (came.message_id, came.payload) == ("id1", None)
    assert came.error == "Flower's error 5: Node Unavailable"


def test_an_answer_without_a_packet_is_lost_with_its_reason():
    grid = Grid()
    channel = GridChannel(grid)
    channel.send([Message(5, "train", b"a")], 1.0)
    grid.reply("id0", RecordDict({"metrics": ConfigRecord({"loss": 1.0})}))
    (came,) = channel.receive({"id0": 5})
    assert came.payload is None
    assert came.error == "message: expected one packet of polyrank, got ['metrics']"


def test_only_a_few_packets_are_pulled_at_once():
    grid = Grid()
    channel = GridChannel(grid)
    message_ids = channel.send([Message(5, "train", b"a")] * (TOGETHER + 3), 1.0)
    for message_id in message_ids:
        grid.reply(message_id, packed(message_id.encode()))
    coming = channel.receive(dict.fromkeys(message_ids, 5))
    assert next(coming).payload == b"id0"
    assert list(map(len, grid.pulled)) == [TOGETHER]
    assert [one.message_id for one in coming] == message_ids[1:]
    assert list(map(len, grid.pulled)) == [TOGETHER, 3]


def test_a_round_without_waiting_asks_nothing_of_the_grid():
    grid = Grid()
    assert list(GridChannel(grid).receive({})) == []
    assert grid.pulled == []


@pytest.mark.parametrize("size", [0, 1, 3 * 2**20])
def test_packets_come_out_as_they_went_in(size):
    payload = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert unpacked(packed(payload)) == payload


def test_a_record_of_another_form_is_no_packet():
    content = packed(b"abc")
    content["packet"]["packet"].stype = "numpy.ndarray"
    with pytest.raises(PacketError, match="expected one packet of polyrank"):
        unpacked(content)
