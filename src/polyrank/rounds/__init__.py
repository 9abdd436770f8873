"""One round without I/O: who takes part, what they are sent, which updates count."""

from polyrank.rounds.engine import Engine
from polyrank.rounds.settings import Faults, Sampling, Weighting

__all__ = ["Engine", "Faults", "Sampling", "Weighting"]
