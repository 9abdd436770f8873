"""Scores of adapters that clients measure on their own machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from polyrank.errors import PacketError
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.protocol import EvaluateRequest, read_marks, write_exam
from polyrank.remote.message_channel import Message, MessageChannel


class RemoteEvaluator:
    """Asks every machine once for all that is wanted of its clients.

    `homes` says which machine hosts a client. Clients whose model is cut hold only some of its
    blocks and cannot score it: they are left out, and so are those whose machine does not answer
    within `seconds`, which `tell` is told.
    """

    def __init__(
        self,
        post: MessageChannel,
        homes: Mapping[str, int],
        seconds: float,
        tell: Callable[[str], None],
        on_step: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._post, self._homes = post, homes
        self._seconds, self._tell, self._on_step, self._clock = seconds, tell, on_step, clock
        self._unscored: set[str] = set()

    def evaluate(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each query's metrics of the clients that could be asked and answered."""
        self._tell_unscored({id for one in queries for id in one.clients if id in one.cut})
        found: list[dict[str, Mapping[str, float | None]]] = [{} for _ in queries]
        no_room = [0] * len(queries)
        places: dict[int, list[int]] = {}
        exams: dict[int, EvaluateRequest] = {}
        for node in sorted({self._homes[id] for one in queries for id in one.clients}):
            asked = []
            for place, one in enumerate(queries):
                here = tuple(
                    id for id in one.clients if self._homes[id] == node and id not in one.cut
                )
                if here:
                    asked.append(EvaluateQuery(one.adapter, here, one.part, one.texts))
                    places.setdefault(node, []).append(place)
            if asked:
                exams[node] = EvaluateRequest(tuple(asked))
        for node, payload in self._asked(exams):
            try:
                marks = read_marks(payload, exams[node])
            except PacketError as error:
                self._tell(f"scores of machine {node} are not used: {error}")
                continue
            for place, scored in zip(places[node], marks, strict=True):
                found[place] |= scored.clients
                no_room[place] += scored.no_room
        return [
            ClientMetrics({id: each[id] for id in one.clients if id in each}, none)
            for one, each, none in zip(queries, found, no_room, strict=True)
        ]

    def _tell_unscored(self, clients: set[str]) -> None:
        if clients - self._unscored:
            names = ", ".join(sorted(clients))
            self._tell(f"not scored, for they hold only some blocks of the model: {names}")
        self._unscored |= clients

    def _asked(self, exams: Mapping[int, EvaluateRequest]) -> list[tuple[int, bytes]]:
        """Return the packets that come back in time, by machine."""
        until = self._clock() + self._seconds
        letters = (Message(node, "evaluate", write_exam(exam)) for node, exam in exams.items())
        waiting: dict[str, int] = {}
        for node, ticket in zip(exams, self._post.send(letters, self._seconds), strict=True):
            if ticket is None:
                self._tell(f"machine {node} has no scores: it cannot be reached")
            else:
                waiting[ticket] = node
        self._tell(f"asked {len(waiting)} machines for scores")
        came, over = [], False
        while waiting and not over:
            self._on_step()
            over = self._clock() >= until
            for delivery in self._post.receive(waiting):
                node = waiting.pop(delivery.ticket)
                if delivery.payload is None:
                    self._tell(f"machine {node} has no scores: {delivery.lost}")
                else:
                    came.append((node, delivery.payload))
        for node in waiting.values():
            self._tell(f"machine {node} has no scores: none came within {self._seconds:.0f} s")
        return came
