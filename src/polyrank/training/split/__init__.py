"""Split training: a client's first blocks at the client, the others at the server."""

from polyrank.training.split.link import Link, Pending, Tail, Traffic
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
from polyrank.training.split.settings import SplitSettings

__all__ = [
    "Activations",
    "At",
    "Gradients",
    "Link",
    "Pending",
    "Refused",
    "Reply",
    "Request",
    "Returned",
    "SplitSettings",
    "Step",
    "Stepped",
    "Tail",
    "Traffic",
]
