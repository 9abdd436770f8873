"""Attempts at a round: clients train, their updates are saved, others are asked where they fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from polyrank.aggregation import State, Update
from polyrank.errors import RoundFailedError, UpdateError
from polyrank.evaluation.evaluator import Progress
from polyrank.rounds.assignments import RoundSettings
from polyrank.rounds.engine import Engine
from polyrank.rounds.messages import Failure
from polyrank.rounds.round import Round
from polyrank.rounds.sampling import sample_clients
from polyrank.run.folder import RunFolder
from polyrank.run.settings import RunSettings


class Attempts:
    """Has an engine train the clients of a round, drawn from `clients` until enough have an update.

    Updates are saved in the folder as they come. Those that a killed run has left there are read
    instead of training their clients again.
    """

    def __init__(
        self,
        engine: Engine,
        folder: RunFolder,
        settings: RunSettings,
        clients: Sequence[str],
        progress: Progress,
        check_stop: Callable[[], None],
    ):
        self._engine, self._folder, self._settings = engine, folder, settings
        self._clients, self._progress, self._check_stop = clients, progress, check_stop

    def at(self, rounds: RoundSettings, state: State, number: int) -> list[Round]:
        """Return the attempts at round `number`, the last of which has enough updates.

        Each asks clients drawn anew, and those that failed before only if there are no others.
        Raises RoundFailedError if none has enough.
        """
        faults, size = self._settings.faults, self._settings.sampling.count(len(self._clients))
        attempts: list[Round] = []
        failed: dict[str, str] = {}
        for attempt in range(faults.attempts):
            seed = (self._settings.seed, number, attempt, "sample")
            clients = sample_clients(self._clients, size, *seed, last=failed)
            attempts.append(Round(rounds, state, number, attempt, clients))
            self._train(attempts[-1])
            if attempts[-1].enough(faults.quorum):
                return attempts
            failed |= attempts[-1].rejected
        listed = "\n  ".join(f"{client}: {why}" for client, why in sorted(failed.items()))
        raise RoundFailedError(
            f"round {number}: fewer than {faults.quorum:.0%} of the updates were usable in each of "
            f"{faults.attempts} attempts; the state is that of round {number - 1}\n  {listed}"
        )

    def _train(self, round: Round) -> None:
        """Train the round's clients, cohort by cohort; those persisted before a kill are read."""
        done, total = 0, len(round.clients)
        self._progress("train", 0, total)
        cuts = {client: round.settings.cut(client, round.number) for client in round.clients}
        left = []
        for cohort in self._engine.cohorts(round.clients, cuts.get):
            saved = self._saved(round, cohort)
            for update in saved:
                self._take(round, update)
                done += 1
            if not saved:
                left.append([round.task(client) for client in cohort])
        self._progress("train", done, total)
        for answer in self._engine.run(left, self._check_stop):
            if self._take(round, answer):
                done += 1
            self._progress("train", done, total)

    def _take(self, round: Round, answer: Update | Failure) -> bool:
        """Accept and persist an update, or leave the reason why not in the round.

        Returns whether this was the answer of one of the round's clients.
        """
        if (answer.round, answer.attempt) != (round.number, round.attempt):
            round.reject_stale(answer)
            return False
        with suppress(UpdateError):  # It is counted, with its reason, in the round.
            if isinstance(answer, Failure):
                round.fail(answer)
            else:
                self._folder.save_update(round.accept(answer))
        return True

    def _saved(self, round: Round, cohort: list[str]) -> list[Update]:
        """Return the persisted updates of a cohort; none unless there is one of every client."""
        updates = []
        for client in cohort:
            expected = round.assignment_hash(client)
            update = self._folder.load_update(round.number, round.attempt, client, expected)
            if update is None:
                return []
            updates.append(update)
        return updates
