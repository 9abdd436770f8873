"""Split training: a client's first blocks at the client, the others at the server."""

from polyrank.training.split.heads import Heads
from polyrank.training.split.job import ServerPartJob, SplitJob
from polyrank.training.split.link import Link, Pending, ServerPart, Traffic
from polyrank.training.split.messages import (
    Activations,
    At,
    Gradients,
    Refused,
    Reply,
    Request,
    Returned,
    Step,
    Stepped,
)
from polyrank.training.split.run import train_head, train_split
from polyrank.training.split.settings import SplitSettings
from polyrank.training.split.tails import ServerParts

__all__ = [
    "Activations",
    "At",
    "Gradients",
    "Heads",
    "Link",
    "Pending",
    "Refused",
    "Reply",
    "Request",
    "Returned",
    "ServerPart",
    "ServerPartJob",
    "ServerParts",
    "SplitJob",
    "SplitSettings",
    "Step",
    "Stepped",
    "Traffic",
    "train_head",
    "train_split",
]
