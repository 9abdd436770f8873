"""Recipes: TOML files that say everything about a run, checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polyrank.aggregation import Rule, rule
from polyrank.data import Clients, Tasks, load_tasks, partition
from polyrank.errors import PolyrankError, RecipeError
from polyrank.federation import (
    Conduct,
    EarlyStopping,
    Encoding,
    Evaluation,
    Faults,
    Sampling,
    Weighting,
)
from polyrank.model import LoadedModel, load_model
from polyrank.planning import Fleet, LoRAType, Scaling
from polyrank.sample import MODEL, TASKS
from polyrank.seeds import derive
from polyrank.training import LocalTraining

SAMPLE = "sample"
"""As model.source or data.source: the embedded miniature."""


_PAIRS = (("local.epochs", "local.steps"), ("sampling.fraction", "sampling.number"))
_EITHER_OR = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
"""Keys of which a recipe gives one: an override of one takes the other back."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    """Which model, where it runs, and which of its matrices are adapted."""

    source: str
    revision: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    sites: str | list[str] = "all-linear"
    exclude: list[str] = Field(default_factory=list)
    groups: dict[str, list[str]] | None = None
    checkpointing: bool = False

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


class DataSection(_Section):
    """Which examples, who holds them, and how they become tokens."""

    source: str
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    format: str = "auto"
    prompt: str | None = None
    input: str | None = None
    completion: str = "output"
    separator: str | None = None
    by: str = "task"
    clients: int | None = None
    alpha: float = 0.5
    on: str = "category"
    unseen: str | list[str] | int | float | None = None
    fractions: list[float] = Field(default=[0.8, 0.1, 0.1], min_length=3, max_length=3)
    limit: int | None = None
    min_examples: int = 1
    template: str = "auto"
    max_length: int = 0
    loss_on: Literal["completion", "all"] = "completion"
    too_long: Literal["skip", "cut-prompt", "error"] = "skip"


class FleetSection(_Section):
    """Which LoRA ranks every client has: types by share or distribution, or a table of clients."""

    types: str | dict[str, dict[str, int] | int] = "paper"
    distribution: str | dict[str, float] | None = None
    clients: dict[str, str] | None = None
    force: str | None = None

    def build(self, clients: Sequence[str], model: LoadedModel, seed: int) -> Fleet:
        """Return the fleet of these clients."""
        if (self.distribution is None) == (self.clients is None):
            raise RecipeError(
                "fleet: give either distribution (a name or shares per type) or clients (a table "
                "client = type)"
            )
        types: str | dict[str, LoRAType]
        if isinstance(self.types, str):
            types = self.types
        else:
            types = {
                name: LoRAType(name, {"all": ranks} if isinstance(ranks, int) else ranks)
                for name, ranks in self.types.items()
            }
        if self.clients is not None:
            fleet = Fleet.table(self.clients, types=types)
        else:
            assert self.distribution is not None
            fleet = Fleet.sample(
                clients, self.distribution, types=types, seed=derive(seed, "fleet")
            )
        return fleet.forced(self.force, model.spec) if self.force else fleet


class LoRASection(_Section):
    """How strongly a LoRA product counts at each rank; see `polyrank.Scaling`."""

    scaling: Literal["proportional", "fixed", "rslora"] = "proportional"
    alpha: float | None = None


class AggregationSection(_Section):
    """The rule, its options, and the weights of the clients."""

    rule: str = "flexlora"
    options: dict[str, Any] = Field(default_factory=dict)
    weights: Literal["examples", "equal", "capped"] = "examples"
    cap: int | None = None
    server_rank: int | None = None


class LocalSection(_Section):
    """A client's local training; see `polyrank.LocalTraining`."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    epochs: float | None = None
    steps: int | None = None
    batch: int = 8
    accumulation: int = 1
    clip: float | None = 1.0
    warmup: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    dropout: float = 0.0
    momentum: float = 0.0

    def build(self) -> LocalTraining:
        """Return the local training; one epoch if neither epochs nor steps are given."""
        values = self.model_dump()
        if self.epochs is None and self.steps is None:
            values["epochs"] = 1
        return LocalTraining(**values)


class SamplingSection(_Section):
    """How many clients take part in a round."""

    fraction: float | None = None
    number: int | None = None


class EvaluationSection(_Section):
    """What is measured and how often; see `polyrank.Evaluation`."""

    every: int = 1
    examples: int = 32
    own_rank: bool = True
    generate: int = 4
    generate_every: int = 0
    max_new_tokens: int = 64
    batch: int = 16


class StoppingSection(_Section):
    """Early stopping on the validation loss; see `polyrank.EarlyStopping`."""

    patience: int
    min_delta: float = 0.0
    restore_best: bool = True


class FaultsSection(_Section):
    """What a round tolerates; see `polyrank.Faults`."""

    quorum: float = 0.5
    attempts: int = 3
    max_increment: float | None = None


class EngineSection(_Section):
    """How the work is executed: threads (0: one a core), clients in one pass, exactness."""

    threads: int = Field(default=0, ge=0)
    cohort: int | Literal["auto"] = "auto"
    deterministic: bool = False


class Recipe(_Section):
    """Everything about a run. Its TOML sections are the fields here."""

    name: str = "run"
    seed: int = 0
    rounds: int = Field(default=10, ge=1)
    control: str | None = None
    target_loss: float | None = None
    model: ModelSection
    data: DataSection
    fleet: FleetSection
    lora: LoRASection = LoRASection()
    aggregation: AggregationSection = AggregationSection()
    local: LocalSection = LocalSection()
    sampling: SamplingSection = SamplingSection()
    evaluation: EvaluationSection = EvaluationSection()
    early_stopping: StoppingSection | None = None
    faults: FaultsSection = FaultsSection()
    engine: EngineSection = EngineSection()

    @property
    def threads(self) -> int:
        """The threads that torch may use."""
        return self.engine.threads or len(os.sched_getaffinity(0))

    def rule(self) -> Rule:
        """Return the aggregation rule."""
        return rule(self.aggregation.rule, **self.aggregation.options)

    def clients(self) -> Clients:
        """Load the tasks and deal them to clients."""
        data = self.data
        tasks: Tasks = load_tasks(
            TASKS if data.source == SAMPLE else data.source,
            **_only(data, "split subset revision format prompt input completion separator"),
        )
        scheme = _only(data, "by clients alpha on unseen fractions limit min_examples")
        return partition(tasks, **scheme, seed=derive(self.seed, "data"))

    def conduct(self) -> Conduct:
        """Return how the run is conducted."""
        engine = self.engine
        if engine.deterministic and engine.cohort not in ("auto", 1):
            raise RecipeError("engine: deterministic trains one client at a time; drop cohort")
        return Conduct(
            seed=self.seed,
            sampling=Sampling(**self.sampling.model_dump()),
            weights=Weighting(self.aggregation.weights, self.aggregation.cap),
            scaling=Scaling(self.lora.scaling, self.lora.alpha),
            evaluation=Evaluation(**self.evaluation.model_dump()),
            stopping=EarlyStopping(**self.early_stopping.model_dump())
            if self.early_stopping
            else None,
            encoding=Encoding(**_only(self.data, "template max_length loss_on too_long")),
            faults=Faults(**self.faults.model_dump()),
            server_rank=self.aggregation.server_rank,
            cohort=1 if engine.deterministic else engine.cohort,
            target_loss=self.target_loss,
        )

    def check(self) -> None:
        """Build every part that needs neither model nor data, so that mistakes show at once."""
        self.rule()
        self.conduct()
        self.local.build()

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """Return the recipe with dotted keys changed, e.g. ``{"fleet.force": "T1"}``."""
        content = self.model_dump()
        for key, value in changes.items():
            _place(content, key, value)
        return parse(content, "the changed recipe")

    def to_toml(self) -> str:
        """Return the resolved recipe as TOML; keys without a value are left out."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def _only(section: _Section, names: str) -> dict[str, Any]:
    """The named fields of a section, to hand on."""
    return {name: getattr(section, name) for name in names.split()}


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``key=value`` overrides; relative data paths are the recipe's.

    Values are TOML (``local.lr=1e-3``, ``fleet.force="T1"``); what is not valid TOML is taken as a
    string. Raises RecipeError for a missing or malformed file, unknown keys (with the nearest known
    one), wrong types and impossible values.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {file}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file}: not valid TOML: {error}") from error
    for section in ("model", "data"):
        _relative_to(file.parent, content.get(section))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: expected key=value, e.g. local.lr=1e-3")
        _place(content, key.strip(), _value(text))
        if (other := _EITHER_OR.get(key.strip())) is not None:
            _place(content, other, None)
    recipe = parse(content, f"recipe {file}")
    recipe.check()
    return recipe


def parse(content: Mapping[str, Any], place: str) -> Recipe:
    """Return the validated recipe; RecipeError lists every mistake in it."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError(f"{place}:\n  " + "\n  ".join(dict.fromkeys(lines))) from error
    except PolyrankError as error:
        raise RecipeError(f"{place}: {error}") from error


def _relative_to(folder: Path, section: Any) -> None:
    """Make a source that is a file beside the recipe, or here, an absolute path."""
    source = section.get("source") if isinstance(section, dict) else None
    if isinstance(source, str) and source != SAMPLE:
        places = (folder / source, Path(source))
        section["source"] = next((str(p.resolve()) for p in places if p.exists()), source)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _place(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if content.get(section) is None:
            content[section] = {}
        content = content[section]
        if not isinstance(content, dict):
            raise RecipeError(f"override {key}: {section} is a value, not a section")
    content[last] = value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _explain(item: Any) -> str:
    """One mistake as a line: where, what was expected, what came."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _known(item["loc"][:-1]), 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {_known(item['loc'][:-1])}"
        return f"{where}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{where}: missing; the recipe must give it"
    return f"{where}: {item['msg'][:1].lower()}{item['msg'][1:]}, got {item['input']!r}"


def _known(location: Sequence[Any]) -> list[str]:
    """The keys that a section has."""
    section: Any = Recipe
    for part in location:
        if part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        section = next(
            (o for o in options if isinstance(o, type) and issubclass(o, _Section)), None
        )
        if section is None:
            return []
    return sorted(section.model_fields)
