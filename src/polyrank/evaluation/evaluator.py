"""What a run is measured by: the global adapter on its clients, at the server's and own ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyrank.aggregation import State
from polyrank.algebra import Adapter
from polyrank.evaluation.benchmark import Benchmark, Measured
from polyrank.evaluation.clients import ClientMetrics, Scores, grouped, loss_only, marked
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel
from polyrank.planning import Fleet
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.round import Round
from polyrank.rounds.sampling import panel
from polyrank.training.client_data import ClientWork, Part

Progress = Callable[[str, int, int], None]
"""(phase, done, total), told of every step forward; phases: ``evaluate``, ``train``, ``merge``."""


class Scorer:
    """Evaluates states of a rule on the clients of one run, whoever the `examiner` is."""

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        fleet: Fleet,
        round_settings: RoundSettings,
        settings: Evaluation,
        examiner: Evaluator,
        progress: Progress,
        check_stop: Callable[[], None],
        benchmark: Benchmark | None = None,
    ):
        self._model, self._fleet, self._examiner = model, fleet, examiner
        self._round_settings, self._settings, self._progress = round_settings, settings, progress
        self._check_stop, self._benchmark = check_stop, benchmark
        types, seed = fleet.assigned, round_settings.seed
        self._panel = panel(work, "validation", types, settings.clients, seed)
        self._final_panel = panel(work, "test", types, settings.final_clients, seed)

    def of(self, adapter: Adapter | None, part: Part, number: int, *, texts: bool) -> Scores:
        """Return the scores of an adapter, or of the bare base, as before and after the rounds.

        Clients are cut as in round `number`. With a benchmark, what it says of them is among them,
        as ``benchmark``.
        """
        asked = self._question(adapter, [*self._final_panel], part, number, texts)
        (marks,) = self._answers([asked])
        scores = grouped(marks, self._final_panel, part)
        if self._benchmark is not None:
            found = self._benchmark.whole(self._model, adapter, self._check_stop)
            scores["benchmark"] = found
        return scores

    def _question(
        self,
        adapter: Adapter | None,
        clients: Sequence[str],
        part: Part,
        number: int,
        texts: bool = False,
    ) -> EvaluateQuery:
        settings = self._round_settings
        cut = {id for id in clients if id in settings.ranks and settings.cut(id, number)}
        return EvaluateQuery(adapter, tuple(clients), part, texts, frozenset(cut))

    def _answers(self, questions: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        self._progress("evaluate", 0, 1)
        found = self._examiner.answer(questions)
        self._progress("evaluate", 1, 1)
        return found

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
        asked = [self._question(adapter, [*self._panel], "validation", number, texts)]
        by_type = self._by_type(number + 1) if settings.own_rank else {}
        asked += self._own_rank(state, number, [id for ids in by_type.values() for id in ids])
        whole, *own = self._answers(asked)
        scores = grouped(whole, self._panel, "validation")
        if not settings.own_rank:
            return {"server": scores, "own_rank": None}
        found = {id: marks for each in own for id, marks in each.clients.items()}
        groups = {
            name: loss_only([found[id] for id in ids if id in found])
            for name, ids in by_type.items()
        }
        everyone = [found[id] for ids in by_type.values() for id in ids if id in found]
        return {"server": scores, "own_rank": {**groups, "all": loss_only(everyone)}}

    def benchmark_of_round(self, state: State, number: int) -> Measured | None:
        """Return what a benchmark says of the global adapter, if it is due after round `number`."""
        if self._benchmark is None:
            return None
        adapter = self._round_settings.rule.adapter(state)
        return self._benchmark.of_round(self._model, adapter, number, self._check_stop)

    def _own_rank(self, state: State, number: int, clients: Sequence[str]) -> list[EvaluateQuery]:
        """Ask for the clients' losses, each with what it is dealt next; equal assignments once."""
        dealt = Round(self._round_settings, state, number + 1, 0, list(self._round_settings.ranks))
        alike: dict[str, list[str]] = {}
        for id in clients:
            alike.setdefault(dealt.assignment_hash(id), []).append(id)
        asked = []
        for ids in alike.values():
            assignment = dealt.assignment(ids[0])
            adapter = assignment.start + assignment.frozen + assignment.merged
            asked.append(self._question(adapter, ids, "validation", number))
        return asked

    def _by_type(self, round: int) -> dict[str, list[str]]:
        """The clients of each LoRA type in a round, of those that are scored and train."""
        types = self._fleet.at(round)
        groups: dict[str, list[str]] = {}
        for id, client in self._panel.items():
            if client.seen:
                groups.setdefault(types[id], []).append(id)
        return dict(sorted(groups.items()))


@dataclass(frozen=True)
class EvaluateQuery:
    """How well an adapter (None: the bare base) does on one part of some clients' data.

    With `texts` answers are generated too, as many as the evaluation says. The clients in `cut`
    train some blocks of the model only, as their machines may hold no more.
    """

    adapter: Adapter | None
    clients: tuple[str, ...]
    part: Part
    texts: bool = False
    cut: frozenset[str] = frozenset()


class Evaluator(Protocol):
    """Scores adapters on clients."""

    def answer(self, questions: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each question's scores; clients that cannot be scored are left out."""
        ...


class LocalEvaluator:
    """Scores clients whose data is here. `check_stop` is called before every batch."""

    def __init__(
        self,
        model: LoadedModel,
        work: Mapping[str, ClientWork],
        settings: Evaluation,
        check_stop: Callable[[], None] | None = None,
    ):
        self._model, self._work = model, work
        self._settings, self._check_stop = settings, check_stop

    def answer(self, questions: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each question's scores; clients without an example of the part are left out."""
        return [
            marked(
                self._model,
                one.adapter,
                [self._work[id] for id in one.clients],
                one.part,
                self._settings,
                texts=one.texts,
                on_batch=self._check_stop,
            )
            for one in questions
        ]
