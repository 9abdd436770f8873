"""The plans of a run as it goes on: which are in force, and when others come."""

from __future__ import annotations

from polyrank.aggregation import State
from polyrank.model import LoadedModel
from polyrank.rounds.round import Round
from polyrank.run.planning import Importance, Planned, Planning
from polyrank.training.interval import scoring_interval


class Replanning:
    """Follows what a run learns of importance with plans; without planning there are none.

    In a pooled run nothing is scored, and the first plans stay.
    """

    def __init__(self, planning: Planning | None, *, pooled: bool):
        self._planning, self._pooled = planning, pooled
        self.now: Planned | None = None if planning is None else planning.first
        """The plans in force."""

    @property
    def metric(self) -> str | None:
        """The metric by which importance is scored; None where it is not."""
        return None if self._planning is None or self._pooled else self._planning.metric

    @property
    def metric_name(self) -> str:
        """The metric, or its default where nothing is scored."""
        return self.metric or "channel"

    def score_every(self, model: LoadedModel) -> int:
        """Return how often importance is scored, as asked or as measured now; 0: never."""
        planning, planned, metric = self._planning, self.now, self.metric
        if planning is None or planned is None or metric is None:
            return 0
        if planning.every != "auto":
            return planning.every
        load = planning.planner.cost.workload
        ranks = planned.narrowest(model.spec)
        return scoring_interval(model, metric, ranks=ranks, rows=load.batch, length=load.length)

    def go_on(self, known: Importance) -> None:
        """Put the plans in force that were made of what a run knew, if it had planned anew."""
        if known.planned and self._planning is not None:
            self.now = self._planning.planned(known)

    def seconds(self, round: Round) -> float | None:
        """Return how long a round takes by the cost model, under the plans in force."""
        if self.now is None or self._pooled:
            return None
        return self.now.seconds(round.clients, round.number)

    def after(self, round: Round, state: State, before: Importance) -> Importance:
        """Return what is known of importance after a round that led to `state`, and plan by it."""
        if self._planning is None or self._pooled:
            return before
        scores = {client: receipt.importance for client, receipt in round.accepted.items()}
        known = self._planning.after(before, scores, round.settings.weights, round.number)
        if known.planned != before.planned:
            known = self._planning.with_spectra(known, round.settings.rule.adapter(state))
            self.now = self._planning.planned(known)
        return known
