"""A client's work, and evaluation."""

from polyrank.training.capacity import cohort_size, slot_bytes
from polyrank.training.client_data import ClientWork, prepare
from polyrank.training.encoding import Encoding
from polyrank.training.evaluation import token_losses
from polyrank.training.interval import scoring_cost, scoring_interval
from polyrank.training.job import Job, Trained
from polyrank.training.local import train_cohort
from polyrank.training.methods import METHODS, LocalMethod, LocalSettings, local_method
from polyrank.training.scoring import Scoring
from polyrank.training.settings import LocalTraining

__all__ = [
    "METHODS",
    "ClientWork",
    "Encoding",
    "Job",
    "LocalMethod",
    "LocalSettings",
    "LocalTraining",
    "Scoring",
    "Trained",
    "cohort_size",
    "local_method",
    "prepare",
    "scoring_cost",
    "scoring_interval",
    "slot_bytes",
    "token_losses",
    "train_cohort",
]
