"""Costs of a model and the ranks that each client affords. Pure."""

from polyrank.planning.cost import CostModel
from polyrank.planning.cut import CutPoint
from polyrank.planning.devices import DEVICES, DeviceProfile, device
from polyrank.planning.fleet import DISTRIBUTIONS, TYPES, Fleet, LoRAType, shares_of
from polyrank.planning.importance import Scores, averaged, moved, smoothed
from polyrank.planning.limits import Limits
from polyrank.planning.plan import Plan, PlanSettings, planned_fleet
from polyrank.planning.planner import Planner
from polyrank.planning.scaling import Scaling
from polyrank.planning.schedule import EVERYONE, Redraw, Schedule, Trace
from polyrank.planning.sharing import BySpectrum
from polyrank.planning.spec import ModelSpec, Site
from polyrank.planning.workload import Workload

__all__ = [
    "DEVICES",
    "DISTRIBUTIONS",
    "EVERYONE",
    "TYPES",
    "BySpectrum",
    "CostModel",
    "CutPoint",
    "DeviceProfile",
    "Fleet",
    "Limits",
    "LoRAType",
    "ModelSpec",
    "Plan",
    "PlanSettings",
    "Planner",
    "Redraw",
    "Scaling",
    "Schedule",
    "Scores",
    "Site",
    "Trace",
    "Workload",
    "averaged",
    "device",
    "moved",
    "planned_fleet",
    "shares_of",
    "smoothed",
]
