"""The sections of a recipe that say what goes in: model, data and fleet.

The text below a key is its entry in docs/recipes.md, which is made from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from polyrank.config.section import Expected, Section
from polyrank.data import Clients, load_tasks, partition
from polyrank.errors import RecipeError
from polyrank.federation import Encoding
from polyrank.model import LoadedModel, load_model
from polyrank.planning import Fleet, LoRAType
from polyrank.sample import MODEL, TASKS

SAMPLE = "sample"
"""As model.source or data.source: the embedded miniature."""

Names = Annotated[str | list[str], Expected("a string or a list of strings")]
Unseen = Annotated[
    str | list[str] | int | float | None,
    Expected("a column, a list of clients, a number or a fraction of clients"),
]
Fractions = Annotated[list[float], Expected("a list of three numbers")]
Types = Annotated[
    str | dict[str, int | dict[str, int]],
    Expected("a family's name or a table, e.g. {T1 = 4, T2 = {attention = 4, feed-forward = 8}}"),
]
Distribution = Annotated[
    str | dict[str, float] | None,
    Expected("a name or a table of shares, e.g. {T1 = 0.9, T2 = 0.1}"),
]


class ModelSection(Section):
    """Which model, where it runs, and which of its matrices are adapted."""

    source: str
    """A hub id or a folder (seen from the recipe's folder, then from here); `sample` is the
    embedded miniature."""
    revision: str | None = None
    """A hub model's branch, tag or commit."""
    device: str = "auto"
    """`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Number format of the base; adapters are float32, or float64 on a float64 base."""
    sites: Names = "all-linear"
    """The adapted matrices: `all-linear` (all of the blocks), or names such as `q_proj`."""
    exclude: list[str] = Field(default_factory=list)
    """Names or globs of matrices to leave out."""
    groups: dict[str, list[str]] | None = None
    """Which names count as `attention` and as `feed-forward`, where module paths do not tell."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time."""

    def load(self) -> LoadedModel:
        """Load the model."""
        return load_model(
            MODEL if self.source == SAMPLE else self.source,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            sites=self.sites,
            exclude=self.exclude,
            groups=self.groups,
            checkpointing=self.checkpointing,
        )


class DataSection(Section):
    """Which examples, who holds them, and how they become tokens; see [data](data.md)."""

    source: str
    """A file, a folder, or a data set of the hub; `sample` is the embedded miniature."""
    split: str | None = None
    """Which split, where a source has several."""
    subset: str | None = None
    """A hub data set's configuration."""
    revision: str | None = None
    """A hub data set's branch, tag or commit."""
    format: str = "auto"
    """`json`, `csv`, `tsv`, `text`, `parquet`, `folder` or `hub`, where the name does not tell."""
    prompt: str | None = None
    """Column or format string of the prompt; left out, `instruction`."""
    input: str | None = None
    """Column or format string of the input below the prompt; left out, `input`."""
    completion: str = "output"
    """Column or format string of the answer; a list of references is allowed."""
    separator: str | None = None
    """For text files: what divides a line into input and output."""
    by: str = "task"
    """A column, each of whose values becomes a client; or `iid`, `contiguous`, `dirichlet`."""
    clients: int | None = None
    """How many clients, with `iid`, `contiguous` and `dirichlet`."""
    alpha: float = 0.5
    """Dirichlet's concentration: small is very unequal."""
    on: str = "category"
    """The column whose values `dirichlet` deals out unequally."""
    unseen: Unseen = None
    """Who is held out entirely for zero-shot evaluation; left out, the column `unseen` decides if
    there is one; 0 for nobody."""
    fractions: Fractions = Field(default=[0.8, 0.1, 0.1], min_length=3, max_length=3)
    """Training, validation and test part of each client."""
    limit: int | None = None
    """At most so many examples per client, chosen by the seed."""
    min_examples: int = 1
    """Clients with fewer examples are left out, and named."""
    template: str = "auto"
    """`auto` (the tokenizer's chat template if it has one), `chat`, `plain`, or a text of your own
    with `{prompt}` and `{input}`."""
    max_length: int = 0
    """Tokens per example; 0 is the model's context."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens are learnt."""
    too_long: Literal["skip", "cut-prompt", "error"] = "skip"
    """What happens to examples above `max_length`; skipped ones are counted and named."""

    def load(self, seed: int) -> Clients:
        """Load the tasks and deal them to clients."""
        tasks = load_tasks(
            TASKS if self.source == SAMPLE else self.source,
            split=self.split,
            subset=self.subset,
            revision=self.revision,
            format=self.format,
            prompt=self.prompt,
            input=self.input,
            completion=self.completion,
            separator=self.separator,
        )
        return partition(
            tasks,
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

    def encoding(self) -> Encoding:
        """Return how examples become tokens."""
        return Encoding(self.max_length, self.template, self.loss_on, self.too_long)


class FleetSection(Section):
    """Which LoRA ranks every client has: give `distribution` or `clients`."""

    types: Types = "paper"
    """A family by name, or a table of types: one rank, or ranks by `all`, group (`attention`,
    `feed-forward`) or site. `paper`: T1 8, T2 30, T3 30 in attention and 200 in feed-forward,
    T4 200. `scaled`, for narrow models: T1 1, T2 4, T3 4 and 24, T4 24."""
    distribution: Distribution = None
    """How many clients have which type: `uniform`, `heavy-tail-light` (85% T1),
    `heavy-tail-strong` (85% T4), `normal` (T2 and T3), or shares that sum to 1."""
    clients: dict[str, str] | None = None
    """The type of every seen client, by name."""
    force: str | None = None
    """Give every client this type, or the `weakest` of the fleet: the homogeneous control."""

    def build(self, clients: Iterable[str], seed: int) -> Fleet:
        """Return the fleet of these clients, not yet forced to one type."""
        if (self.distribution is None) == (self.clients is None):
            raise RecipeError(
                "fleet: give either distribution (a name or shares per type) or clients (a table "
                "client = type)"
            )
        types = self._types()
        if self.clients is None:
            return Fleet.sample(clients, self.distribution or {}, types=types, seed=seed)
        known = sorted(clients)
        unknown = sorted(set(self.clients) - set(known))
        if unknown:
            raise RecipeError(
                f"fleet.clients: {unknown[:5]} are no seen clients of the data; there are "
                f"{known[:5]}{' and others' if len(known) > 5 else ''}"
            )
        return Fleet.table(self.clients, types=types)

    def check(self, force: Iterable[str | None]) -> None:
        """Raise RecipeError or RankError for mistakes that show without clients and model."""
        names = sorted(self.clients or {"someone": ""})
        fleet = self.build(names, seed=0)
        for name in force:
            if name is not None and name not in ("weakest", *fleet.types):
                raise RecipeError(
                    f"fleet.force and control: expected weakest or one of {sorted(fleet.types)}, "
                    f"got {name!r}"
                )

    def _types(self) -> str | dict[str, LoRAType]:
        if isinstance(self.types, str):
            return self.types
        return {
            name: LoRAType(name, {"all": ranks} if isinstance(ranks, int) else ranks)
            for name, ranks in self.types.items()
        }
