"""polyrank's ClientApp: what it tells Flower, which sends the text of errors on."""

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from polyrank.errors import PacketError
from polyrank.flower import client_app
from polyrank.flower.grid_channel import packed, unpacked
from polyrank.protocol.client_info import read_node_info
from remote_federations import machine


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """What a process of Flower has, and messages need."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def context():
    return Context(1, 1, {}, RecordDict(), {})


def message(payload=b""):
    made = Message(packed(payload), dst_node_id=5, message_type="train")
    made.metadata.__dict__["_message_id"] = "id"
    return made


def test_hello_is_answered_with_the_clients(monkeypatch):
    monkeypatch.setattr(client_app, "client_node", lambda *_: machine(["c0"]))
    reply = client_app.hello(message(), context())
    (client,) = read_node_info(unpacked(reply.content)).clients
    assert client.name == "c0"
    assert reply.metadata.reply_to_message_id == "id"


def test_a_machine_that_is_set_up_wrongly_says_so():
    reply = client_app.hello(message(), context())
    info = read_node_info(unpacked(reply.content))
    assert info.clients == ()
    assert info.refusal


@pytest.mark.parametrize("answer", [client_app.hello, client_app.train, client_app.evaluate])
def test_of_foreign_errors_only_the_kind_is_told(monkeypatch, answer):
    def broken(*_):
        raise KeyError("SECRET sentence of a patient")

    monkeypatch.setattr(client_app, "client_node", broken)
    with pytest.raises(RuntimeError) as caught:
        answer(message(), context())
    assert str(caught.value) == "KeyError on the client's machine"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_request_that_cannot_be_read_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(client_app, "client_node", lambda *_: machine(["c0"]))
    with pytest.raises(PacketError):
        client_app.train(message(b"no packet"), context())
