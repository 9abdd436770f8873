"""How a run follows its validation loss: the best so far, and when waiting for less ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from polyrank.federation.settings import EarlyStopping


@dataclass(frozen=True)
class Patience:
    """The best validation loss with its round, the evaluations since, and why the run stopped."""

    best_loss: float | None = None
    best_round: int = 0
    waited: int = 0
    stopped: str | None = None

    def after(self, round: int, loss: float | None, stopping: EarlyStopping) -> Patience:
        """Return what follows from an evaluation; a `loss` of None was not finite: no progress."""
        if loss is not None and (
            self.best_loss is None or loss < self.best_loss - stopping.min_delta
        ):
            return Patience(loss, round)
        waited = self.waited + 1
        ended = (
            f"no lower validation loss in {stopping.patience} evaluations since round "
            f"{self.best_round}"
        )
        return replace(self, waited=waited, stopped=ended if waited >= stopping.patience else None)
