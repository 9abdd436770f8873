"""A client's work, and evaluation."""

from polyrank.training.evaluation import token_losses
from polyrank.training.local import Job, Trained, train_cohort
from polyrank.training.recipe import LocalTraining

__all__ = ["Job", "LocalTraining", "Trained", "token_losses", "train_cohort"]
