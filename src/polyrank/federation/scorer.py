"""What a run is measured by: the global adapter on its clients, at the server's and own ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyrank.aggregation import State
from polyrank.algebra import Adapter
from polyrank.federation.benchmark import Benchmark, Measured
from polyrank.federation.evaluate import Scores, client_losses, evaluate, loss_only
from polyrank.federation.panel import panel
from polyrank.federation.round import Round, RoundSettings
from polyrank.federation.settings import Evaluation
from polyrank.federation.work import ClientWork, Part
from polyrank.model import LoadedModel
from polyrank.planning import Fleet

Progress = Callable[[str, int, int], None]
"""(phase, done, total), told of every step forward; phases: ``evaluate``, ``train``, ``merge``."""


class Scorer:
    """Evaluates states of a rule on the clients of one run."""

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        fleet: Fleet,
        round_settings: RoundSettings,
        settings: Evaluation,
        progress: Progress,
        check_stop: Callable[[], None],
        benchmark: Benchmark | None = None,
    ):
        self._model, self._fleet = model, fleet
        self._round_settings, self._settings, self._progress = round_settings, settings, progress
        self._check_stop, self._benchmark = check_stop, benchmark
        types, seed = fleet.assigned, round_settings.seed
        self._panel = panel(work, "validation", types, settings.clients, seed)
        self._final_panel = panel(work, "test", types, settings.final_clients, seed)

    def of(self, adapter: Adapter | None, part: Part, *, texts: bool) -> Scores:
        """Return the scores of an adapter, or of the bare base, as before and after the rounds.

        With a benchmark, what it says of them is among them, as ``benchmark``.
        """
        scores = self._of(adapter, self._final_panel, part, texts)
        if self._benchmark is not None:
            found = self._benchmark.whole(self._model, adapter, self._check_stop)
            scores["benchmark"] = found
        return scores

    def _of(
        self, adapter: Adapter | None, work: Mapping[str, ClientWork], part: Part, texts: bool
    ) -> Scores:
        self._progress("evaluate", 0, 1)
        scores = evaluate(
            self._model,
            adapter,
            work,
            part,
            self._settings,
            texts=texts,
            on_batch=self._check_stop,
        )
        self._progress("evaluate", 1, 1)
        return scores

    def of_round(self, state: State, number: int) -> dict[str, Any] | None:
        """Return the scores due after round `number` on the validation parts, or None.

        ``server`` is the global adapter at the server's rank; ``own_rank`` gives, per LoRA type and
        for ``all`` of these that train, the loss with what each client would be dealt next.
        """
        settings = self._settings
        if not settings.every or number % settings.every:
            return None
        texts = bool(settings.generate_every) and number % settings.generate_every == 0
        adapter = self._round_settings.rule.adapter(state)
        scores = self._of(adapter, self._panel, "validation", texts)
        own = self._own_rank(state, number) if settings.own_rank else None
        return {"server": scores, "own_rank": own}

    def benchmark_of_round(self, state: State, number: int) -> Measured | None:
        """Return what a benchmark says of the global adapter, if it is due after round `number`."""
        if self._benchmark is None:
            return None
        adapter = self._round_settings.rule.adapter(state)
        return self._benchmark.of_round(self._model, adapter, number, self._check_stop)

    def _own_rank(self, state: State, number: int) -> Scores:
        dealt = Round(self._round_settings, state, number + 1, 0, list(self._round_settings.ranks))
        by_type = self._by_type(number + 1)
        losses = {name: self._own_losses(dealt, clients) for name, clients in by_type.items()}
        everyone = {id: loss for found in losses.values() for id, loss in found.items()}
        groups = {name: loss_only(found) for name, found in losses.items()}
        return {**groups, "all": loss_only(everyone)}

    def _own_losses(self, dealt: Round, clients: Sequence[str]) -> dict[str, float]:
        """Return the clients' losses, each with what it is dealt; equal assignments together."""
        alike: dict[str, list[str]] = {}
        for id in clients:
            alike.setdefault(dealt.assignment_hash(id), []).append(id)
        losses: dict[str, float] = {}
        for ids in alike.values():
            assignment = dealt.assignment(ids[0])
            adapter = assignment.start + assignment.frozen + assignment.merged
            work = [self._panel[id] for id in ids]
            losses |= client_losses(
                self._model, adapter, work, "validation", self._settings, self._check_stop
            )
        return losses

    def _by_type(self, round: int) -> dict[str, list[str]]:
        """The clients of each LoRA type in a round, of those that are scored and train."""
        types = self._fleet.at(round)
        groups: dict[str, list[str]] = {}
        for id, client in self._panel.items():
            if client.seen:
                groups.setdefault(types[id], []).append(id)
        return dict(sorted(groups.items()))
