"""Scores of adapters that clients measure on their own machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from polyrank.errors import PacketError
from polyrank.evaluation.clients import ClientMetrics
from polyrank.evaluation.evaluator import EvaluateQuery
from polyrank.protocol.evaluate import EvaluateRequest, read_client_metrics, write_evaluate_request
from polyrank.remote.message_channel import Message, MessageChannel


class RemoteEvaluator:
    """Asks every machine once for all scores that are wanted of its clients.

    `node_of` says which machine hosts a client. Clients whose model is cut hold only some of its
    blocks and cannot score it: they are left out, and so are those whose machine does not answer
    within `seconds`, which `tell` is told.
    """

    def __init__(
        self,
        channel: MessageChannel,
        node_of: Mapping[str, int],
        seconds: float,
        tell: Callable[[str], None],
        on_step: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._channel, self._node_of = channel, node_of
        self._seconds, self._tell, self._on_step, self._clock = seconds, tell, on_step, clock
        self._unscored: set[str] = set()

    def evaluate(self, queries: Sequence[EvaluateQuery]) -> list[ClientMetrics]:
        """Return each query's scores of the clients that could be asked and answered."""
        self._tell_unscored({id for query in queries for id in query.clients if id in query.cut})
        scores: list[dict[str, Mapping[str, float | None]]] = [{} for _ in queries]
        no_room = [0] * len(queries)
        requests, places = self._requests(queries)
        for node, payload in self._payloads(requests):
            try:
                answers = read_client_metrics(payload, requests[node])
            except PacketError as error:
                self._tell(f"scores of machine {node} are not used: {error}")
                continue
            for place, metrics in zip(places[node], answers, strict=True):
                scores[place] |= metrics.clients
                no_room[place] += metrics.no_room
        return [
            ClientMetrics({id: each[id] for id in query.clients if id in each}, none)
            for query, each, none in zip(queries, scores, no_room, strict=True)
        ]

    def _requests(
        self, queries: Sequence[EvaluateQuery]
    ) -> tuple[dict[int, EvaluateRequest], dict[int, list[int]]]:
        """Return what each machine is asked, and which of the queries these are."""
        requests, places = {}, {}
        for node in sorted({self._node_of[id] for query in queries for id in query.clients}):
            own, numbers = [], []
            for number, query in enumerate(queries):
                here = tuple(
                    id for id in query.clients if self._node_of[id] == node and id not in query.cut
                )
                if here:
                    own.append(EvaluateQuery(query.adapter, here, query.part, query.texts))
                    numbers.append(number)
            if own:
                requests[node], places[node] = EvaluateRequest(tuple(own)), numbers
        return requests, places

    def _tell_unscored(self, clients: set[str]) -> None:
        if clients - self._unscored:
            names = ", ".join(sorted(clients))
            self._tell(f"not scored, for they hold only some blocks of the model: {names}")
        self._unscored |= clients

    def _payloads(self, requests: Mapping[int, EvaluateRequest]) -> list[tuple[int, bytes]]:
        """Send the requests; return the packets that come back in time, by machine."""
        until = self._clock() + self._seconds
        messages = (
            Message(node, "evaluate", write_evaluate_request(request))
            for node, request in requests.items()
        )
        ids = self._channel.send(messages, self._seconds)
        waiting: dict[str, int] = {}
        for node, message_id in zip(requests, ids, strict=True):
            if message_id is None:
                self._tell(f"machine {node} has no scores: it cannot be reached")
            else:
                waiting[message_id] = node
        self._tell(f"asked {len(waiting)} machines for scores")
        payloads, over = [], False
        while waiting and not over:
            self._on_step()
            over = self._clock() >= until
            for reply in self._channel.receive(waiting):
                node = waiting.pop(reply.message_id)
                if reply.payload is None:
                    self._tell(f"machine {node} has no scores: {reply.error}")
                else:
                    payloads.append((node, reply.payload))
        for node in waiting.values():
            self._tell(f"machine {node} has no scores: none came within {self._seconds:.0f} s")
        return payloads
