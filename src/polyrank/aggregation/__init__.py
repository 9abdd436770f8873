"""Rules that turn clients' updates into the next global adapter. Pure: state in, state out."""

from polyrank.aggregation.fedit import FedIT
from polyrank.aggregation.flexlora import FlexLoRA
from polyrank.aggregation.registry import RULES, rule
from polyrank.aggregation.rule import Rule, deal
from polyrank.aggregation.types import (
    Assignment,
    Contribution,
    Dealt,
    FleetSpec,
    Json,
    Penalty,
    SiteReport,
    State,
    Train,
    Update,
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
    "Penalty",
    "Rule",
    "SiteReport",
    "State",
    "Train",
    "Update",
    "deal",
    "normalised",
    "rule",
]
