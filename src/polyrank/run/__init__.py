"""A run on disk: its folder, its rounds, its checkpoints and records."""

from polyrank.run.adapter import GlobalAdapter
from polyrank.run.checkpoint import Checkpoint
from polyrank.run.federation import Federation
from polyrank.run.folder import RunFolder
from polyrank.run.planning import Planning, planner_of
from polyrank.run.records import RoundRecord
from polyrank.run.settings import EarlyStopping, RunSettings

__all__ = [
    "Checkpoint",
    "EarlyStopping",
    "Federation",
    "GlobalAdapter",
    "Planning",
    "RoundRecord",
    "RunFolder",
    "RunSettings",
    "planner_of",
]
