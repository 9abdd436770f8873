"""The sections of a recipe that say what goes in: model and data.

The text below a key is its entry in docs/reference/recipes.md, which is made from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from polyrank.config.section import Expected, Section
from polyrank.data import Clients, Tasks, load_tasks, partition
from polyrank.errors import RecipeError
from polyrank.model import LoadedModel, Span, load_bare, load_model
from polyrank.sample import MODEL, TASKS
from polyrank.training import Encoding

SAMPLE = "sample"
"""As model.source or data.source: the embedded miniature."""

CLIENT = "client"
"""As data.source: every client brings its own data, by its client.toml."""

Names = Annotated[str | list[str], Expected("a string or a list of strings")]
Unseen = Annotated[
    str | list[str] | int | float | None,
    Expected("a column, a list of clients, a number or a fraction of clients"),
]
Fractions = Annotated[list[float], Expected("a list of three numbers")]


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

    def load(self, spans: Sequence[Span] | None = None) -> LoadedModel:
        """Load the model, or the blocks in `spans` alone."""
        return load_model(device=self.device, spans=spans, **self.options())

    def load_bare(self) -> LoadedModel:
        """Load configuration and tokenizer alone: a model that can be planned for, not run."""
        return load_bare(**self.options())

    def options(self) -> dict[str, Any]:
        """Return how the model is loaded wherever it is: all but the device."""
        kept = ("revision", "dtype", "sites", "exclude", "groups", "checkpointing")
        source = str(MODEL) if self.source == SAMPLE else self.source
        return {"source": source, **{key: getattr(self, key) for key in kept}}


class DataSection(Section):
    """Which examples, who holds them, and how they become tokens; see [data](data.md)."""

    source: str
    """A file, a folder, or a data set of the hub; `sample` is the embedded miniature. `client`:
    every client brings its own, named in its [client.toml](client.md), in a Flower app."""
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
    pooled: bool = False
    """Centralised training: one client, of the fleet's strongest type and without a cut, has the
    training examples of all, and a round is as long as those of the clients together; see
    [methods](../explanation/methods.md#baselines)."""

    @property
    def at_clients(self) -> bool:
        """Whether every client brings its own data."""
        return self.source == CLIENT

    def load(self, seed: int) -> Clients:
        """Load the tasks and deal them to clients; RecipeError if each client has its own."""
        if self.at_clients:
            raise RecipeError(
                "data.source = 'client': the data lies with the clients, so the run needs them: "
                "make a Flower app (polyrank app RECIPE DIR), or name a source here"
            )
        return partition(
            self.tasks(TASKS if self.source == SAMPLE else self.source, self.split),
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

    def tasks(self, source: str | Path, split: str | None) -> Tasks:
        """Load the tasks of a source that is read as this one is."""
        return load_tasks(
            source,
            split=split,
            subset=self.subset,
            revision=self.revision,
            format=self.format,
            prompt=self.prompt,
            input=self.input,
            completion=self.completion,
            separator=self.separator,
        )

    def encoding(self) -> Encoding:
        """Return how examples become tokens."""
        return Encoding(self.max_length, self.template, self.loss_on, self.too_long)


DEALING = ("by", "clients", "alpha", "on", "unseen", "min_examples", "pooled")
"""Keys of [data] that deal one source out to clients."""

READING = ("split", "subset", "revision", "format", "prompt", "input", "completion", "separator")
"""Keys of [data] that say how a source is read."""


def check_own(data: DataSection, *, benchmark: bool) -> None:
    """Raise RecipeError for keys that have no meaning where clients bring their own data.

    `benchmark`: the recipe has one, whose sources are read as this section says.
    """
    if not data.at_clients:
        return
    here = dict.fromkeys(DEALING, "every client has its own data, whole")
    if not benchmark:
        here |= dict.fromkeys(READING, "each client.toml says it")
    for key, instead in here.items():
        if getattr(data, key) != DataSection.model_fields[key].default:
            raise RecipeError(
                f"data.{key}: has no meaning with data.source = 'client'; leave it out: {instead}"
            )
