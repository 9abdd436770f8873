"""Who scores adapters on clients' data: this process, or the clients themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from polyrank.algebra import Adapter
from polyrank.federation.evaluate import Marks, marked
from polyrank.federation.settings import Evaluation
from polyrank.federation.work import ClientWork, Part
from polyrank.model import LoadedModel


@dataclass(frozen=True)
class Question:
    """How well an adapter (None: the bare base) does on one part of some clients' data.

    With `texts` answers are generated too, as many as the evaluation says. The clients in `cut`
    train some blocks of the model only, as their machines may hold no more.
    """

    adapter: Adapter | None
    clients: tuple[str, ...]
    part: Part
    texts: bool = False
    cut: frozenset[str] = frozenset()


class Examiner(Protocol):
    """Scores adapters on clients."""

    def answer(self, questions: Sequence[Question]) -> list[Marks]:
        """Return each question's scores; clients that cannot be scored are left out."""
        ...


class OwnExaminer:
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

    def answer(self, questions: Sequence[Question]) -> list[Marks]:
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
