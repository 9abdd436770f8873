"""Evaluation in a run: queries that score adapters on clients, and when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from polyrank.aggregation import State
from polyrank.algebra import Adapter
from polyrank.evaluation.benchmark import Benchmark, Measured
from polyrank.evaluation.clients import ClientMetrics, Scores, client_metrics, grouped, loss_only
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round
from polyrank.rounds.sampling import evaluation_subset
from polyrank.training.client_data import ClientWork, Part

Progress = Callable[[str, int, int], None]
"""(phase, done, total), told of every step forward; phases: ``evaluate``, ``train``, ``merge``."""


@dataclass(frozen=True)
class EvaluateQuery:
    """Asks how well an adapter (None: the bare base) does on one part of some clients' data.

    With `texts` answers are generated too, as many as the evaluation settings say. The clients in
    `cut` train some blocks of the model only, and their machines may hold no more.
    """

    adapter: Adapter | None
    clients: tuple[str, ...]
    part: Part
    texts: bool = False
    cut: frozenset[str] = frozenset()


class Evaluator(Protocol):
    """Scores adapters on clients, wherever they are."""

    def evaluate(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each query's metrics; clients that cannot be scored are left out."""
        ...


class LocalEvaluator:
    """Scores clients whose data is here, and keeps up to `samples` of the texts of each query.

    `check_stop` is called before every batch.
    """

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        settings: Evaluation,
        check_stop: Callable[[], None] | None = None,
        *,
        samples: int = 0,
    ):
        self._model, self._work, self._samples = model, work, samples
        self._settings, self._check_stop = settings, check_stop

    def evaluate(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each query's metrics; clients without an example of the part are left out."""
        return [
            client_metrics(
                self._model,
                query.adapter,
                [self._work[id] for id in query.clients],
                query.part,
                self._settings,
                texts=query.texts,
                samples=self._samples,
                on_batch=self._check_stop,
            )
            for query in queries
        ]


class RunEvaluation:
    """Evaluates the states of one run: before, between and after its rounds.

    `work` and `fleet` are the clients that are scored, with their types.
    """

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        fleet: Fleet,
        rounds: RoundSettings,
        settings: Evaluation,
        evaluator: Evaluator,
        progress: Progress,
        check_stop: Callable[[], None],
        benchmark: Benchmark | None = None,
    ):
        self._model, self._fleet, self._rounds = model, fleet, rounds
        self._settings, self._evaluator, self._benchmark = settings, evaluator, benchmark
        self._progress, self._check_stop = progress, check_stop
        types, seed = fleet.assigned, rounds.seed
        self._between = evaluation_subset(work, "validation", types, settings.clients, seed)
        self._final = evaluation_subset(work, "test", types, settings.final_clients, seed)

    def on_test(self, adapter: Adapter | None, number: int) -> Scores:
        """Return the test scores of an adapter, or of the bare base: before and after the rounds.

        Clients are cut as in round `number`. ``samples`` are some generated texts, where the
        clients' data is here; ``benchmark`` are the scores on a benchmark, if there is one.
        """
        (metrics,) = self._ask([self._query(adapter, [*self._final], "test", number, texts=True)])
        scores = grouped(metrics, self._final, "test")
        if metrics.samples:
            scores["samples"] = [asdict(sample) for sample in metrics.samples]
        if self._benchmark is not None:
            scores["benchmark"] = self._benchmark.whole(self._model, adapter, self._check_stop)
        return scores

    def of_round(self, state: State, number: int, *, last: bool) -> dict[str, Any] | None:
        """Return the validation scores due after round `number`, or None.

        The `last` round is evaluated whatever its number, unless none is. ``server`` is the global
        adapter at the server's rank; ``own_rank`` gives, per LoRA type and for ``all`` of these
        that train, the loss with the assignment that each client would get next.
        """
        settings = self._settings
        if not settings.every or (number % settings.every and not last):
            return None
        texts = bool(settings.generate_every) and number % settings.generate_every == 0
        adapter = self._rounds.rule.adapter(state)
        server = self._query(adapter, [*self._between], "validation", number, texts=texts)
        by_type = self._by_type(number + 1) if settings.own_rank else {}
        clients = [id for ids in by_type.values() for id in ids]
        whole, *own = self._ask([server, *self._at_own_rank(state, number, clients)])
        scores = grouped(whole, self._between, "validation")
        if not settings.own_rank:
            return {"server": scores, "own_rank": None}
        each = {id: scored for metrics in own for id, scored in metrics.clients.items()}
        groups = {**by_type, "all": clients}
        return {
            "server": scores,
            "own_rank": {
                name: loss_only([each[id] for id in ids if id in each])
                for name, ids in groups.items()
            },
        }

    def benchmark_of_round(self, state: State, number: int) -> Measured | None:
        """Return the global adapter's benchmark scores, if they are due after round `number`."""
        if self._benchmark is None:
            return None
        adapter = self._rounds.rule.adapter(state)
        return self._benchmark.of_round(self._model, adapter, number, self._check_stop)

    def _ask(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        self._progress("evaluate", 0, 1)
        metrics = self._evaluator.evaluate(queries)
        self._progress("evaluate", 1, 1)
        return metrics

    def _query(
        self,
        adapter: Adapter | None,
        clients: Sequence[str],
        part: Part,
        number: int,
        *,
        texts: bool = False,
    ) -> EvaluateQuery:
        rounds = self._rounds
        cut = {id for id in clients if id in rounds.ranks and rounds.cut(id, number)}
        return EvaluateQuery(adapter, tuple(clients), part, texts, frozenset(cut))

    def _at_own_rank(
        self, state: State, number: int, clients: Sequence[str]
    ) -> list[EvaluateQuery]:
        """Ask for the clients' losses with their next assignments; equal assignments once."""
        following = Round(self._rounds, state, number + 1, 0, list(self._rounds.ranks))
        alike: dict[str, list[str]] = {}
        for id in clients:
            alike.setdefault(following.assignment_hash(id), []).append(id)
        queries = []
        for ids in alike.values():
            assignment = following.assignment(ids[0])
            adapter = assignment.start + assignment.frozen + assignment.merged
            queries.append(self._query(adapter, ids, "validation", number))
        return queries

    def _by_type(self, round: int) -> dict[str, list[str]]:
        """The clients of each LoRA type in a round, of those that are scored and train."""
        types = self._fleet.at(round)
        groups: dict[str, list[str]] = {}
        for id, client in self._between.items():
            if client.seen:
                groups.setdefault(types[id], []).append(id)
        return dict(sorted(groups.items()))
