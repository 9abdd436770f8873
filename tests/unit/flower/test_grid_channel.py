"""Letters over Flower's grid; the grid here behaves as Flower 1.41's."""

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

from polyrank.errors import PacketError
from polyrank.flower import grid_channel as grid_post
from polyrank.flower.grid_channel import TOGETHER, GridChannel, packed, unpacked
from polyrank.remote.message_channel import Message

SUPERLINK, GONE = 1, 99


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """What a process of Flower has, and messages need."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, SUPERLINK)
    monkeypatch.setattr(grid_post, "PAUSE", 0.0)


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
        ticket = f"id{len(self.pushed)}"
        message.metadata.__dict__["_message_id"] = ticket
        self.pushed[ticket] = message
        return [ticket]

    def pull_messages(self, message_ids):
        """Replies that have come; an id that was pulled before is an error, as in Flower."""
        asked = list(message_ids)
        self.pulled.append(asked)
        found = [self.replies.pop(ticket) for ticket in asked if ticket in self.replies]
        for ticket in asked:
            if ticket not in self.pushed:
                found.append(self.error(ticket, 3, "message unavailable"))
        for message in found:
            self.pushed.pop(message.metadata.reply_to_message_id, None)
        return found

    def reply(self, ticket, content):
        self.replies[ticket] = FlowerMessage(content, reply_to=self.pushed[ticket])

    def error(self, ticket, code, reason):
        to = self.pushed.get(ticket)
        if to is None:
            to = FlowerMessage(RecordDict(), dst_node_id=5, message_type="train")
            to.metadata.__dict__["_message_id"] = ticket
        found = FlowerMessage(Error(code, reason), reply_to=to)
        found.metadata.__dict__["_src_node_id"] = SUPERLINK
        return found


def test_letters_are_messages_that_live_longer_than_their_answers_may_take():
    grid = Grid()
    post = GridChannel(grid)
    letters = [
        Message(5, "hello", b""),
        Message(7, "train", b"\x00order"),
        Message(5, "evaluate", b"e"),
    ]
    assert post.nodes() == [5, 7]
    assert post.send(iter(letters), 30.0) == ["id0", "id1", "id2"]
    for letter, message in zip(letters, grid.pushed.values(), strict=True):
        about = message.metadata
        assert (about.dst_node_id, unpacked(message.content)) == (letter.node, letter.payload)
        assert about.ttl > 2 * 30.0, "a late answer is seen"
    types = [message.metadata.message_type for message in grid.pushed.values()]
    assert types == ["query", "train", "evaluate"]


def test_flowers_simulation_is_known_by_its_grid():
    assert not GridChannel(Grid()).simulated
    assert GridChannel(InMemoryGrid.__new__(InMemoryGrid)).simulated


@pytest.mark.parametrize("empty", [[""], [], [None]])
def test_a_machine_that_flower_does_not_know_has_no_ticket(empty):
    grid = Grid(nodes=(5, GONE), empty=empty)
    post = GridChannel(grid)
    letters = [Message(GONE, "train", b"a"), Message(5, "train", b"b"), Message(8, "train", b"c")]
    assert post.send(letters, 1.0) == [None, "id0", None]
    assert unpacked(grid.pushed["id0"].content) == b"b"


def test_answers_come_once_and_finished_tickets_are_not_asked_again():
    grid = Grid()
    post = GridChannel(grid)
    post.send([Message(5, "train", b"a"), Message(7, "train", b"b")], 1.0)
    waiting = {"id0": 5, "id1": 7}
    assert list(post.receive(waiting)) == []
    grid.reply("id1", packed(b"answer"))
    (came,) = post.receive(waiting)
    assert (came.ticket, came.payload, came.lost) == ("id1", b"answer", None)
    del waiting["id1"]
    assert list(post.receive(waiting)) == []
    assert grid.pulled[-1] == ["id0"]


def test_what_flower_says_of_lost_messages_goes_to_the_client_that_was_asked():
    """Flower's own errors come from the SuperLink's node: only what they reply to tells."""
    grid = Grid()
    post = GridChannel(grid)
    post.send([Message(5, "train", b"a"), Message(7, "train", b"b")], 1.0)
    grid.replies["id1"] = grid.error("id1", 5, "Node Unavailable")
    (came,) = post.receive({"id0": 5, "id1": 7})
    assert (came.ticket, came.payload) == ("id1", None)
    assert came.lost == "Flower's error 5: Node Unavailable"


def test_an_answer_without_a_packet_is_lost_with_its_reason():
    grid = Grid()
    post = GridChannel(grid)
    post.send([Message(5, "train", b"a")], 1.0)
    grid.reply("id0", RecordDict({"metrics": ConfigRecord({"loss": 1.0})}))
    (came,) = post.receive({"id0": 5})
    assert came.payload is None
    assert came.lost == "message: expected one packet of polyrank, got ['metrics']"


def test_only_a_few_packets_are_pulled_at_once():
    grid = Grid()
    post = GridChannel(grid)
    tickets = post.send([Message(5, "train", b"a")] * (TOGETHER + 3), 1.0)
    for ticket in tickets:
        grid.reply(ticket, packed(ticket.encode()))
    coming = post.receive(dict.fromkeys(tickets, 5))
    assert next(coming).payload == b"id0"
    assert list(map(len, grid.pulled)) == [TOGETHER]
    assert [one.ticket for one in coming] == tickets[1:]
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
