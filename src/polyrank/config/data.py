"""[data] of a recipe: which examples, who holds them, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from annotated_types import Len

from polyrank.config.keys import keys_of
from polyrank.data.settings import ReadingSettings
from polyrank.errors import RecipeError
from polyrank.settings import Expected, part, types_of
from polyrank.training.encoding import Encoding

if TYPE_CHECKING:
    from polyrank.data import Clients, Tasks

CLIENT = "client"
"""As data.source: every client brings its own data, by its client.toml."""

Unseen = Annotated[
    str | list[str] | int | float | None,
    Expected("a column, a list of clients, a number or a fraction of clients"),
]
Fractions = Annotated[list[float], Len(3, 3), Expected("a list of three numbers")]


@dataclass(frozen=True, kw_only=True)
class DataSection(Encoding, ReadingSettings):
    """Which examples, who holds them, and how they become tokens; see [data](data.md)."""

    source: str
    """A file, a folder, or a data set of the hub; `sample` is the embedded miniature. `client`:
    every client brings its own, named in its [client.toml](client.md), in a Flower app."""
    by: str = "task"
    """A column, each of whose values becomes a client; or `iid`, `contiguous`, `dirichlet`."""
    clients: int | None = None
    """How many clients, with `iid`, `contiguous` and `dirichlet`."""
    alpha: float = 0.5
    """Dirichlet's concentration: small is very unequal."""
    on: str = "category"
    """The column whose values `dirichlet` divides unequally."""
    unseen: Unseen = None
    """Who is held out entirely for zero-shot evaluation; left out, the column `unseen` decides if
    there is one; 0 for nobody."""
    fractions: Fractions = field(default_factory=lambda: [0.8, 0.1, 0.1])
    """Training, validation and test part of each client."""
    limit: int | None = None
    """At most so many examples per client, chosen by the seed."""
    min_examples: int = 1
    """Clients with fewer examples are left out, and named."""
    pooled: bool = False
    """Centralised training: one client, of the fleet's strongest type and without a cut, has the
    training examples of all, and a round is as long as those of the clients together; see
    [methods](../explanation/methods.md#baselines)."""

    @property
    def at_clients(self) -> bool:
        """Whether every client brings its own data."""
        return self.source == CLIENT

    def load(self, seed: int) -> Clients:
        """Load the tasks and divide them among clients; RecipeError if each client has its own."""
        if self.at_clients:
            raise RecipeError(
                "data.source = 'client': the data lies with the clients, so the run needs them: "
                "make a Flower app (polyrank app RECIPE DIR), or name a source here"
            )
        from polyrank.data import partition

        return partition(
            self.tasks(),
            by=self.by,
            clients=self.clients,
            alpha=self.alpha,
            on=self.on,
            unseen=self.unseen,
            fractions=self.fractions,
            limit=self.limit,
            min_examples=self.min_examples,
            seed=seed,
        )

    def tasks_of(self, source: str | None, split: str | None) -> Tasks | None:
        """Load the tasks of another source that is read as this one is, if one is named."""
        return None if source is None else replace(self, source=source, split=split).tasks()

    def encoding(self) -> Encoding:
        """Return how examples become tokens."""
        return part(Encoding, self)

    def check_own(self, *, benchmark: bool) -> None:
        """Raise RecipeError for keys that have no meaning where clients bring their own data.

        `benchmark`: the recipe has one, whose sources are read as this section says.
        """
        if not self.at_clients:
            return
        here = dict.fromkeys(PARTITIONING, "every client has its own data, whole")
        if not benchmark:
            here |= dict.fromkeys(READING, "each client.toml says it")
        for key, instead in here.items():
            if getattr(self, key) != keys_of(DataSection)[key].default:
                raise RecipeError(
                    f"data.{key}: has no meaning with data.source = 'client'; leave it out: "
                    f"{instead}"
                )


PARTITIONING = ("by", "clients", "alpha", "on", "unseen", "min_examples", "pooled")
"""Keys of [data] that divide one source among clients."""

READING = tuple(key for key in types_of(ReadingSettings) if key != "source")
"""Keys of [data] that say how a source is read."""
