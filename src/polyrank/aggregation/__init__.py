"""Rules that turn clients' updates into the next global adapter. Pure: state in, state out."""

from polyrank.aggregation.fedit import FedIT
from polyrank.aggregation.flexlora import FlexLoRA
from polyrank.aggregation.registry import RULES, rule
from polyrank.aggregation.types import (
    Assignment,
    Contribution,
    Dealt,
    FleetSpec,
    Json,
    Rule,
    SiteReport,
    State,
    Update,
    deal,
)
from polyrank.aggregation.weights import normalised

__all__ = [
    "RULES",
    "Assignment",
    "Contribution",
    "Dealt",
    "FedIT",
    "FleetSpec",
    "FlexLoRA",
    "Json",
    "Rule",
    "SiteReport",
    "State",
    "Update",
    "deal",
    "normalised",
    "rule",
]
