"""The population of a run: its clients, or one client with all their examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from polyrank.data import joined
from polyrank.errors import RankError
from polyrank.evaluation.settings import Evaluation
from polyrank.planning import Fleet, ModelSpec
from polyrank.run.settings import RunSettings
from polyrank.training import LocalTraining
from polyrank.training.client_data import ClientWork

EVERYONE = "everyone"
"""The one client of a pooled run."""


@dataclass(frozen=True)
class Population:
    """The clients that train, with their work, types and local training, and what is measured."""

    work: Mapping[str, ClientWork]
    fleet: Fleet
    local: LocalTraining
    evaluation: Evaluation

    @property
    def clients(self) -> list[str]:
        """The names of those that train."""
        return [id for id, client in self.work.items() if client.seen]


def population(
    work: Mapping[str, ClientWork],
    fleet: Fleet,
    local: LocalTraining,
    settings: RunSettings,
    spec: ModelSpec,
) -> Population:
    """Return who trains: the clients themselves or, in a pooled run, one client called everyone.

    *Centralised training.* Everyone has all training clients' training examples, in the order of
    the clients' names, the type of the fleet with the most parameters [I], and the whole model. A
    round is as long as the rounds of the federated clients together [I]: with n of N clients a
    round, `steps` become n·steps and `epochs` n/N·epochs, so that as many examples are seen, in as
    many optimizer steps, one after the other. Scores stay those of the original clients; what
    clients get at ranks of their own is not measured, for they get nothing.

    The one update is the average. The optimizer is made anew every round, as in every run: fewer,
    longer rounds come closer to one uninterrupted training.

    Raises RankError for a training client without a LoRA type.
    """
    if not settings.pooled:
        return Population(work, fleet, local, settings.evaluation)
    seen = [id for id, client in sorted(work.items()) if client.seen]
    without = [id for id in seen if id not in fleet.assigned]
    if without:
        raise RankError(f"fleet: no LoRA type for the clients {without[:10]}; assign one each")
    strongest = fleet.strongest(spec)
    return Population(
        {EVERYONE: _pooled([work[id] for id in seen])},
        Fleet(fleet.types, {EVERYONE: strongest}),
        _as_long_as(local, settings.sampling.count(len(seen)), len(seen)),
        replace(settings.evaluation, own_rank=False),
    )


def _pooled(clients: list[ClientWork]) -> ClientWork:
    """Return one client with all training rows; for training alone, so without the examples."""
    rows = joined(*(client.rows["train"] for client in clients))
    nothing: tuple[()] = ()
    return ClientWork(
        EVERYONE,
        EVERYONE,
        True,
        {"train": rows, "validation": nothing, "test": nothing},
        {"train": nothing, "validation": nothing, "test": nothing},
    )


def _as_long_as(local: LocalTraining, taking_part: int, clients: int) -> LocalTraining:
    """Return the training of one client that sees as many examples as those taking part."""
    if local.steps is not None:
        return replace(local, steps=local.steps * taking_part)
    return replace(local, epochs=(local.epochs or 1) * taking_part / clients)
