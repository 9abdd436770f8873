"""Rules that turn clients' updates into the next global adapter. Pure: state in, state out."""

from polyrank.aggregation.custom import code_allowed, is_custom
from polyrank.aggregation.fedit import FedIT
from polyrank.aggregation.ffa import FFA
from polyrank.aggregation.flexlora import FlexLoRA
from polyrank.aggregation.flora import FLoRA
from polyrank.aggregation.full import Full
from polyrank.aggregation.hetlora import HetLoRA
from polyrank.aggregation.registry import RULES, rule
from polyrank.aggregation.rule import Rule, assign
from polyrank.aggregation.segment import Segment
from polyrank.aggregation.settings import DEFAULT, OPTIONS, RuleSettings
from polyrank.aggregation.slora import SLoRA
from polyrank.aggregation.types import (
    TRAINED,
    Assignment,
    Contribution,
    FleetSpec,
    Json,
    Penalty,
    SiteAssignment,
    SiteReport,
    State,
    Train,
    Update,
    fixed,
)
from polyrank.aggregation.weights import normalised

__all__ = [
    "DEFAULT",
    "FFA",
    "OPTIONS",
    "RULES",
    "TRAINED",
    "Assignment",
    "Contribution",
    "FLoRA",
    "FedIT",
    "FleetSpec",
    "FlexLoRA",
    "Full",
    "HetLoRA",
    "Json",
    "Penalty",
    "Rule",
    "RuleSettings",
    "SLoRA",
    "Segment",
    "SiteAssignment",
    "SiteReport",
    "State",
    "Train",
    "Update",
    "assign",
    "code_allowed",
    "fixed",
    "is_custom",
    "normalised",
    "rule",
]
