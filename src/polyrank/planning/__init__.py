"""What a model costs and which ranks each client affords. Pure."""

from polyrank.planning.fleet import DISTRIBUTIONS, TYPES, Fleet, LoRAType, shares_of
from polyrank.planning.scaling import Scaling
from polyrank.planning.schedule import EVERYONE, Redraw, Schedule, Trace
from polyrank.planning.spec import ModelSpec, Site
from polyrank.planning.split import Split

__all__ = [
    "DISTRIBUTIONS",
    "EVERYONE",
    "TYPES",
    "Fleet",
    "LoRAType",
    "ModelSpec",
    "Redraw",
    "Scaling",
    "Schedule",
    "Site",
    "Split",
    "Trace",
    "shares_of",
]
