"""The sections of a recipe: their keys, types and defaults, and the objects that they stand for.

The text below a key is its entry in docs/recipes.md, which is made from here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from polyrank.aggregation import Rule, rule
from polyrank.data import Clients, load_tasks, partition
from polyrank.errors import RecipeError
from polyrank.federation import EarlyStopping, Encoding, Evaluation, Faults, Sampling, Weighting
from polyrank.model import LoadedModel, load_model
from polyrank.planning import Fleet, LoRAType, Scaling
from polyrank.sample import MODEL, TASKS
from polyrank.training import LocalTraining

SAMPLE = "sample"
"""As model.source or data.source: the embedded miniature."""


@dataclass(frozen=True)
class Expected:
    """What a key takes, in words, where its type alone reads badly."""

    words: str


Names = Annotated[str | list[str], Expected("a string or a list of strings")]
Unseen = Annotated[
    str | list[str] | int | float | None,
    Expected("a column, a list of clients, a number or a fraction of clients"),
]
Fractions = Annotated[list[float], Expected("a list of three numbers")]
Cohort = Annotated[Literal["auto"] | int, Expected("'auto' or a whole number")]
Types = Annotated[
    str | dict[str, int | dict[str, int]],
    Expected("a family's name or a table, e.g. {T1 = 4, T2 = {attention = 4, feed-forward = 8}}"),
]
Distribution = Annotated[
    str | dict[str, float] | None,
    Expected("a name or a table of shares, e.g. {T1 = 0.9, T2 = 0.1}"),
]


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no infinities."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


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


class LoRASection(Section):
    """How strongly a LoRA product counts at each rank r: ΔW = s·BA."""

    scaling: Literal["proportional", "fixed", "rslora"] = "proportional"
    """`proportional`: s = alpha for every rank; `fixed`: s = alpha/r; `rslora`: s = alpha/√r."""
    alpha: float | None = None
    """Left out: 2 with `proportional`, otherwise 16."""

    def build(self) -> Scaling:
        """Return the policy."""
        return Scaling(self.scaling, self.alpha)


class AggregationSection(Section):
    """How clients' updates become the next global adapter."""

    rule: str = "flexlora"
    """`flexlora` (the paper's), `flexlora:delta`, `flexlora:tail-in-base`, or `fedit`."""
    split: str | None = None
    """Where FlexLoRA puts the singular values: `left` (B = UΣ) or `balanced`."""
    factorisation: str | None = None
    """FlexLoRA's method of factorisation; left out, chosen by shape."""
    weights: Literal["examples", "equal", "capped"] = "examples"
    """A client's weight: its training examples, 1, or its examples up to `cap`."""
    cap: int | None = None
    """The most examples that count, with `capped`."""
    server_rank: int | None = None
    """Rank at which the server keeps the aggregate; left out, per matrix the fleet's largest."""

    def build(self) -> Rule:
        """Return the rule."""
        return rule(self.rule, split=self.split, factorisation=self.factorisation)

    def weighting(self) -> Weighting:
        """Return how updates weigh."""
        return Weighting(self.weights, self.cap)


class LocalSection(Section):
    """A client's training in one round; its optimizer is made anew each time."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    lr: float = 3e-4
    """Learning rate."""
    epochs: float | None = None
    """Passes over the client's data in a round, also a fraction; 1 if `steps` is not given."""
    steps: int | None = None
    """Optimizer steps in a round, instead of `epochs`."""
    batch: int = 8
    """Examples in a microbatch."""
    accumulation: int = 1
    """Microbatches in an optimizer step."""
    clip: float = Field(default=1.0, ge=0)
    """Bound on the norm of a client's gradient; 0: none."""
    warmup: float = 0.0
    """Fraction of the steps with a rising rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls within a round."""
    weight_decay: float = 0.0
    """Weight decay of the factors."""
    dropout: float = 0.0
    """Dropout on the inputs of LoRA."""
    momentum: float = 0.0
    """Momentum of SGD."""

    def build(self) -> LocalTraining:
        """Return the local training; one epoch if neither epochs nor steps are given."""
        values = {**self.model_dump(), "clip": self.clip or None}
        if self.epochs is None and self.steps is None:
            values["epochs"] = 1
        return LocalTraining(**values)


class SamplingSection(Section):
    """How many seen clients take part in a round; all of them if neither key is given."""

    fraction: float | None = None
    """A fraction of them, rounded down, at least one."""
    number: int | None = None
    """A number of them, instead of `fraction`."""

    def build(self) -> Sampling:
        """Return the sampling."""
        return Sampling(self.fraction, self.number)


class EvaluationSection(Section):
    """What is measured, and how often."""

    every: int = 1
    """Validate the global adapter every so many rounds; 0: never in between."""
    examples: int = 32
    """At most so many examples per client for the loss; 0: all."""
    own_rank: bool = True
    """Validate also what each client gets at its own rank."""
    generate: int = 4
    """Examples per client whose answers are generated, for exact match and ROUGE-L, before the
    first and after the last round."""
    generate_every: int = 0
    """Generate also every so many rounds; 0: not in between."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    batch: int = 16
    """Examples in a batch of an evaluation."""

    def build(self) -> Evaluation:
        """Return the evaluation."""
        return Evaluation(**self.model_dump())


class StoppingSection(Section):
    """Stop early on the validation loss; left out, all rounds are run."""

    patience: int
    """Evaluations without a lower loss after which the run ends."""
    min_delta: float = 0.0
    """A loss counts as lower if it is so by this much."""
    restore_best: bool = True
    """The result is the adapter of the best evaluation, not of the last round."""

    def build(self) -> EarlyStopping:
        """Return the condition."""
        return EarlyStopping(self.patience, self.min_delta, self.restore_best)


class FaultsSection(Section):
    """What a round tolerates."""

    quorum: float = 0.5
    """Share of a round's clients whose updates must be usable."""
    attempts: int = 3
    """How often a round is tried, with other clients, before the run ends."""
    max_increment: float | None = None
    """Refuse updates that moved further than this (Frobenius norm); left out, any distance."""

    def build(self) -> Faults:
        """Return the bounds."""
        return Faults(self.quorum, self.attempts, self.max_increment)


class EngineSection(Section):
    """How the work is executed."""

    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0: one for each core. What was chosen is stored with the run."""
    cohort: Cohort = "auto"
    """Clients trained in one pass; `auto`: as memory allows, on a CPU up to 2,048 tokens a pass."""
    deterministic: bool = False
    """One client at a time, so that all engines give the same bytes."""

    def clients_in_one_pass(self) -> int | Literal["auto"]:
        """Return the cohort's size, or ``auto``."""
        if self.deterministic and self.cohort not in ("auto", 1):
            raise RecipeError("engine: deterministic trains one client at a time; drop cohort")
        return 1 if self.deterministic else self.cohort
