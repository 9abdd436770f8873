"""Rounds, run folders and engines."""

from polyrank.federation.answers import Failure
from polyrank.federation.benchmark import Benchmark, BenchmarkSettings
from polyrank.federation.checkpoint import Checkpoint
from polyrank.federation.engine import Engine
from polyrank.federation.examiner import Examiner
from polyrank.federation.federation import Federation
from polyrank.federation.folder import RunFolder
from polyrank.federation.planning import Planning, planner_of
from polyrank.federation.records import RoundRecord
from polyrank.federation.result import GlobalAdapter
from polyrank.federation.round import Round
from polyrank.federation.round_settings import RoundSettings
from polyrank.federation.settings import (
    Conduct,
    EarlyStopping,
    Encoding,
    Evaluation,
    Faults,
    Sampling,
    Weighting,
)
from polyrank.federation.task import Task
from polyrank.federation.work import ClientWork, prepare

__all__ = [
    "Benchmark",
    "BenchmarkSettings",
    "Checkpoint",
    "ClientWork",
    "Conduct",
    "EarlyStopping",
    "Encoding",
    "Engine",
    "Evaluation",
    "Examiner",
    "Failure",
    "Faults",
    "Federation",
    "GlobalAdapter",
    "Planning",
    "Round",
    "RoundRecord",
    "RoundSettings",
    "RunFolder",
    "Sampling",
    "Task",
    "Weighting",
    "planner_of",
    "prepare",
]
