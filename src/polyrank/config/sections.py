"""The sections of a recipe that say how the run is conducted: from LoRA's scale to threads.

The text below a key is its entry in docs/reference/recipes.md, which is made from here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from polyrank.aggregation import DEFAULT, OPTIONS, Rule, rule
from polyrank.config.section import Expected, Section
from polyrank.errors import RecipeError
from polyrank.evaluation import Evaluation
from polyrank.planning import Scaling
from polyrank.rounds import Faults, Sampling, Weighting
from polyrank.run import EarlyStopping
from polyrank.training import LocalSettings, LocalTraining, local_method
from polyrank.training.split import SplitSettings
from polyrank.training.split.settings import Wire

Cohort = Annotated[Literal["auto"] | int, Expected("'auto' or a whole number")]


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

    rule: str = DEFAULT
    """`flexlora` (the paper's), `flexlora:delta`, `flexlora:tail-in-base`, `fedit`, `hetlora`,
    `segment`, `ffa`, `ffa:replace`, `flora` (also called `noise-free`), `flora:keep` or `full`;
    see [methods](../explanation/methods.md)."""
    split: str | None = None
    """Where FlexLoRA puts the singular values: `left` (B = UΣ) or `balanced`."""
    factorisation: str | None = None
    """FlexLoRA's method of factorisation; left out, chosen by shape."""
    gamma: float | None = None
    """HetLoRA: the share of its rank that a client keeps when it prunes; left out, 0.99; 1: no
    pruning."""
    penalty: float | None = None
    """HetLoRA: strength of the local term on the ranks at stake; left out, 0.01."""
    reinitialise: bool | None = None
    """`flora`: whether every round begins with fresh factors; false is `flora:keep`: clients go on
    with their own. Left out, true."""
    weights: Literal["examples", "equal", "capped"] = "examples"
    """A client's weight: its training examples, 1, or its examples up to `cap`."""
    cap: int | None = None
    """The most examples that count, with `capped`."""
    max_share: float | None = None
    """No client's weight in a round is more than this share of all weights; what is taken off is
    shared among the others in proportion. Clients too few for it weigh equally. It holds for each
    matrix among the clients that train it; left out, any share."""
    server_rank: int | None = None
    """Rank at which the server keeps the aggregate; left out, per matrix the fleet's largest."""

    def build(self) -> Rule:
        """Return the rule."""
        return rule(self.rule, self.model_dump(include=set(OPTIONS)))

    def weighting(self) -> Weighting:
        """Return how updates weigh."""
        return Weighting(self.weights, self.cap, self.max_share)


_METHOD_KEYS = ("optimizer", "proximal", "sparse_rounds")


class LocalSection(Section):
    """A client's training in one round; its optimizer is made anew each time."""

    method: Literal["fedavg", "fedit", "fedprox", "slora"] | None = None
    """A paper's name for a set of the next three keys: `fedavg` (SGD), `fedit` (AdamW), `fedprox`
    (`proximal` 0.01), `slora` (`sparse_rounds` 5)."""
    optimizer: Literal["adamw", "sgd"] | None = None
    """The optimizer; left out, the method's, or `adamw`."""
    proximal: float | None = Field(default=None, ge=0)
    """FedProx's μ: strength of the pull to where the round began; left out, the method's, or 0."""
    sparse_rounds: int | None = Field(default=None, ge=0)
    """SLoRA's first rounds, in which some entries of the matrices are trained instead of factors;
    left out, the method's, or 0."""
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
        values = self.model_dump(exclude={"method", *_METHOD_KEYS})
        values["clip"] = self.clip or None
        if self.epochs is None and self.steps is None:
            values["epochs"] = 1
        return self.settings().applied(LocalTraining(**values))

    def settings(self) -> LocalSettings:
        """Return what the method, or its keys alone, come to; RecipeError if they contradict."""
        given = self.model_dump(include=set(_METHOD_KEYS), exclude_none=True)
        if self.method is None:
            return LocalSettings(**given)
        return local_method(self.method).settings(**given)


class SplitSection(Section):
    """How clients whose type is cut talk to the server, if any is; see
    [privacy](../explanation/privacy.md)."""

    wire: Wire = "bf16"
    """Format of the activations and gradients that travel: 4, 2, 1 or 8 bytes a number; `int8` has
    a scale per token and sends gradients in bf16. The last is for a float64 base."""
    adapters: Literal["own", "shared"] = "own"
    """What the server trains behind the cut: `own` factors of each client, or one `shared` set on
    the batches of all together, SplitLoRA's way."""
    in_flight: int = Field(default=2, ge=1)
    """Microbatches of a client that are under way at once."""
    clip: float | None = None
    """Bound on each token's L2 norm in the activations that are sent; left out, none."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on the activations that are sent, after clipping. It
    helps little at levels that leave a model useful; no differential privacy is claimed."""

    def build(self) -> SplitSettings:
        """Return the settings."""
        return SplitSettings(**self.model_dump())


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
    """Validate the global adapter every so many rounds, and after the last; 0: never."""
    examples: int = 32
    """At most so many examples per client for the loss, the first ones in the order of the source;
    0: all."""
    clients: int = 0
    """Between the rounds, score at most so many clients that train and so many that are held out:
    always the same ones, drawn by the seed, every LoRA type among them; 0: all."""
    final_clients: int = 0
    """The same before the first and after the last round."""
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
    """Refuse updates that moved further than this: ‖ΔW − what was dealt‖ over all matrices
    together, in the Frobenius norm; left out, any distance."""
    clip_increment: float | None = None
    """Shorten updates that moved further than this to it, in the same norm, instead of refusing
    them; `max_increment` is checked before. Left out, none."""
    deadline: float | None = None
    """Seconds that the clients of a round have to answer. Who is later counts as missing, and the
    answer is not aggregated. Left out, as long as it takes."""

    def build(self) -> Faults:
        """Return the bounds."""
        return Faults(
            self.quorum, self.attempts, self.max_increment, self.deadline, self.clip_increment
        )


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
