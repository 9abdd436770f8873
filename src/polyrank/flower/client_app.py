"""polyrank's Flower ClientApp: a machine that keeps its data and answers what it is asked."""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from polyrank.errors import PolyrankError
from polyrank.flower.grid_channel import packed, unpacked
from polyrank.protocol.client_info import NodeInfo, write_node_info
from polyrank.remote.hosting import client_node
from polyrank.remote.message_channel import Kind

app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which clients are here; a machine that cannot take part says why."""
    try:
        return _answered("hello", message, context)
    except PolyrankError as error:
        return Message(packed(write_node_info(NodeInfo((), refusal=str(error)))), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train a client."""
    return _answered("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score adapters."""
    return _answered("evaluate", message, context)


def _answered(kind: Kind, message: Message, context: Context) -> Message:
    """Return the answer; what goes wrong is told without the text of foreign errors."""
    try:
        node = client_node(context.run_config, context.node_config)
        return Message(packed(node.answer(kind, unpacked(message.content))), reply_to=message)
    except PolyrankError:
        raise
    except Exception as error:  # Flower sends its text on, which may hold what must stay here.
        logging.getLogger(__name__).exception("the client's machine failed")
        raise RuntimeError(f"{type(error).__name__} on the client's machine") from None
