"""What a model costs and which ranks each client affords. Pure."""

from polyrank.planning.fleet import DISTRIBUTIONS, TYPES, Fleet, LoRAType
from polyrank.planning.scaling import Scaling
from polyrank.planning.spec import ModelSpec, Site

__all__ = ["DISTRIBUTIONS", "TYPES", "Fleet", "LoRAType", "ModelSpec", "Scaling", "Site"]
