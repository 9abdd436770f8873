"""The packets that pass between server and clients: each to write, and to read back."""

from polyrank.federation.remote.answers import read_answer, write_answer
from polyrank.federation.remote.bounds import EXAMS, MARKS, ORDERS, PROFILES, Bounds
from polyrank.federation.remote.exams import (
    Exam,
    read_exam,
    read_marks,
    write_exam,
    write_marks,
)
from polyrank.federation.remote.orders import Order, read_order, write_order
from polyrank.federation.remote.packet import Packet, pack
from polyrank.federation.remote.profiles import (
    Counts,
    Hosted,
    Profile,
    Terms,
    read_profile,
    write_profile,
)

__all__ = [
    "EXAMS",
    "MARKS",
    "ORDERS",
    "PROFILES",
    "Bounds",
    "Counts",
    "Exam",
    "Hosted",
    "Order",
    "Packet",
    "Profile",
    "Terms",
    "pack",
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
