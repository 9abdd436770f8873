"""Small federations: a random model of one block, and clients with a few random examples each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models import VOCABULARY, tiny_loaded
from polyrank.aggregation import Rule
from polyrank.data.types import ClientData, Example
from polyrank.evaluation import Evaluation
from polyrank.model import LoadedModel
from polyrank.planning import Fleet, LoRAType
from polyrank.run import Callbacks, Federation, Run, RunSettings
from polyrank.training import LocalTraining

TYPES = {
    "small": LoRAType("small", {"all": 1}),
    "middle": LoRAType("middle", {"attention": 2, "feed-forward": 3}),
    "large": LoRAType("large", {"all": 5}),
}
SITES = ("q_proj", "v_proj", "down_proj")
LOCAL = LocalTraining(lr=0.02, batch=2, epochs=1, dropout=0.1)
MEASURED = Evaluation(every=1, examples=2, own_rank=True, generate=1, max_new_tokens=3, batch=8)
QUIET = Evaluation(every=0, examples=1, own_rank=False, generate=0)
"""No evaluation between the rounds, and little before and after."""


def one_block(dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    """Return a random Llama of one block, with three sites."""
    return tiny_loaded("llama", dtype=dtype, seed=seed, num_hidden_layers=1, sites=SITES)


def clients(seen: int = 4, unseen: int = 1, examples: int = 5) -> dict[str, ClientData]:
    """Return clients c0, c1, … with 5, 6, 7, 5, … random examples, and u0, … that are held out."""
    draw = torch.Generator().manual_seed(1)

    def example(row: int) -> Example:
        words = [f"w{i}" for i in torch.randint(4, VOCABULARY, (5,), generator=draw).tolist()]
        return Example(" ".join(words[:3]), (" ".join(words[3 + row % 2 :]),), row)

    def client(id: str, number: int, seen: bool) -> ClientData:
        parts = [tuple(map(example, range(count))) for count in (examples + number % 3, 2, 2)]
        return ClientData(id, *parts, category="ab"[number % 2], seen=seen)

    made = [client(f"c{i}", i, True) for i in range(seen)]
    made += [client(f"u{i}", i, False) for i in range(unseen)]
    return {one.id: one for one in made}


def fleet(data: Mapping[str, ClientData], *, equal: bool = False) -> Fleet:
    """Return small, middle, large, small, … for the clients that train, in order; or all middle."""
    seen = sorted(id for id, client in data.items() if client.seen)
    names = ["middle"] if equal else [*TYPES]
    return Fleet.table({id: names[i % len(names)] for i, id in enumerate(seen)}, types=TYPES)


def opened(
    out: Path | None = None,
    *,
    model: LoadedModel | None = None,
    data: Mapping[str, ClientData] | None = None,
    rule: Rule | None = None,
    local: LocalTraining = LOCAL,
    settings: RunSettings | None = None,
    **rest: Any,
) -> Run:
    """Return a run of small parts, each of which can be given; see `run_of`."""
    data = clients() if data is None else data
    rest.setdefault("fleet", fleet(data))
    if rule is not None:
        rest["rule"] = rule
    settings = settings or RunSettings(evaluation=MEASURED, cohort=2)
    return run_of(out, model or one_block(), data, local=local, settings=settings, **rest)


def run_of(
    out: Path | None,
    *parts: Any,
    resume: bool = False,
    allow_inexact: bool = False,
    files: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    **rest: Any,
) -> Run:
    """Return the run of a federation of these parts, begun in `out`, or resumed there."""
    federation = Federation(*parts, callbacks=Callbacks(stop=stop), **rest)
    if resume:
        assert out is not None
        return federation.resume(out, allow_inexact=allow_inexact)
    return federation.open(out, files)
