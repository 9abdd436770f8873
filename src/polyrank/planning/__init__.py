"""What a model costs and which ranks each client affords. Pure."""

from polyrank.planning.fleet import DISTRIBUTIONS, TYPES, Fleet, LoRAType, shares_of
from polyrank.planning.scaling import Scaling
from polyrank.planning.schedule import EVERYONE, Redraw, Schedule, Trace
from polyrank.planning.spec import ModelSpec, Site

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
    "Trace",
    "shares_of",
]
