"""Rounds, run folders and engines."""

from polyrank.federation.checkpoint import Checkpoint
from polyrank.federation.federation import Federation
from polyrank.federation.folder import RunFolder
from polyrank.federation.records import RoundRecord
from polyrank.federation.result import GlobalAdapter
from polyrank.federation.round import Failure, Round, RoundSettings, Task
from polyrank.federation.settings import (
    Conduct,
    EarlyStopping,
    Encoding,
    Evaluation,
    Faults,
    Sampling,
    Weighting,
)
from polyrank.federation.work import ClientWork, prepare

__all__ = [
    "Checkpoint",
    "ClientWork",
    "Conduct",
    "EarlyStopping",
    "Encoding",
    "Evaluation",
    "Failure",
    "Faults",
    "Federation",
    "GlobalAdapter",
    "Round",
    "RoundRecord",
    "RoundSettings",
    "RunFolder",
    "Sampling",
    "Task",
    "Weighting",
    "prepare",
]
