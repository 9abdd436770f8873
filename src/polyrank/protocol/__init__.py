"""The messages between a server and its clients, as bytes: each to write, and to read back."""

from polyrank.protocol.client_info import (
    ClientInfo,
    ClientPolicy,
    Counts,
    Profile,
    read_profile,
    write_profile,
)
from polyrank.protocol.evaluate import (
    EvaluateRequest,
    read_exam,
    read_marks,
    write_exam,
    write_marks,
)
from polyrank.protocol.size_limits import SizeLimits
from polyrank.protocol.train_request import TrainRequest, read_order, write_order
from polyrank.protocol.train_result import read_answer, write_answer

__all__ = [
    "ClientInfo",
    "ClientPolicy",
    "Counts",
    "EvaluateRequest",
    "Profile",
    "SizeLimits",
    "TrainRequest",
    "read_answer",
    "read_exam",
    "read_marks",
    "read_order",
    "read_profile",
    "write_answer",
    "write_exam",
    "write_marks",
    "write_order",
    "write_profile",
]
