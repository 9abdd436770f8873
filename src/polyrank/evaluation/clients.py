"""Scores of an adapter on clients: loss, and exact match and ROUGE-L of generated text."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polyrank.algebra import Adapter
from polyrank.data import Encoded, Example, joined, sizes
from polyrank.evaluation.metrics import exact_match, rouge_l
from polyrank.evaluation.settings import Evaluation
from polyrank.model import LoadedModel, generate
from polyrank.training import token_losses
from polyrank.training.client_data import ClientWork, Part

OnBatch = Callable[[], None] | None
"""Called before each batch; may raise to end the evaluation."""

SAMPLES = 6
"""Generated texts that a run keeps of an evaluation on the test parts."""

_LONGEST = 500

LOSSES_TOGETHER, TEXTS_TOGETHER = 4096, 1024
"""So many rows are put into batches of like length at once; more would have to be remembered."""

Scores = dict[str, Any]
"""JSON: per group ``loss``, ``loss_se``, ``exact_match``, ``rouge_l``, ``clients``."""


@dataclass(frozen=True)
class ClientMetrics:
    """What clients scored: ``loss``, ``exact_match`` and ``rouge_l`` of each, null if not measured.

    `no_room` counts the prompts that left no room to generate; `samples` are some of the texts.
    """

    clients: Mapping[str, Mapping[str, float | None]]
    no_room: int = 0
    samples: tuple[SampleText, ...] = ()


@dataclass(frozen=True)
class SampleText:
    """A text that was generated for a client's example, to be read by people.

    `references` are up to three of the completions that count as right. Long texts are shortened.
    """

    client: str
    prompt: str
    input: str
    references: tuple[str, ...]
    text: str

    @staticmethod
    def of(client: str, example: Example, text: str) -> SampleText:
        """Return it with texts of at most 500 characters."""
        references = tuple(map(_short, example.references[:3]))
        return SampleText(
            client, _short(example.prompt), _short(example.input), references, _short(text)
        )


def client_losses(
    model: LoadedModel,
    adapter: Adapter | None,
    work: Sequence[ClientWork],
    part: Part,
    settings: Evaluation,
    on_batch: OnBatch = None,
) -> dict[str, float]:
    """Return each client's loss: the mean over the target tokens of its first examples.

    Clients without an example in this part are left out.
    """
    rows = {c.id: c.rows[part][: settings.examples or None] for c in work if c.rows[part]}
    means = {}
    for ids in _chunks({id: len(own) for id, own in rows.items()}, LOSSES_TOGETHER):
        flat = joined(*(rows[id] for id in ids))
        losses = iter(token_losses(model, adapter, flat, settings.batch, on_batch))
        for id in ids:
            pairs = list(itertools.islice(losses, len(rows[id])))
            means[id] = sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)
    return means


def client_texts(
    model: LoadedModel,
    adapter: Adapter | None,
    work: Sequence[ClientWork],
    part: Part,
    settings: Evaluation,
    on_batch: OnBatch = None,
) -> tuple[dict[str, tuple[float, float]], dict[str, SampleText]]:
    """Return each client's (exact match, ROUGE-L) of greedy generations, both in 0…1.

    Also returned is each client's first text. Prompts that leave no room in the context for the new
    tokens are passed over; a client left without any is left out.
    """
    clients = {client.id: client for client in work}
    scores: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, SampleText] = {}
    for ids in _chunks(dict.fromkeys(clients, settings.generate), TEXTS_TOGETHER):
        rows = [
            (clients[id], row)
            for id in ids
            for row in _generated_rows(clients[id], part, model, settings)
        ]
        texts = generate(
            model,
            adapter,
            [row.input_ids[: row.prompt_length] for _, row in rows],
            max_new_tokens=settings.max_new_tokens,
            batch=settings.batch,
            on_batch=on_batch,
        )
        for (client, row), text in zip(rows, texts, strict=True):
            example = client.examples[part][row.example]
            pair = exact_match(text, example.references), rouge_l(text, example.references)
            scores.setdefault(client.id, []).append(pair)
            first.setdefault(client.id, SampleText.of(client.id, example, text))
    means = {
        id: (statistics.fmean(e for e, _ in pairs), statistics.fmean(r for _, r in pairs))
        for id, pairs in scores.items()
    }
    return means, first


def _short(text: str) -> str:
    """Return a text of at most 500 characters."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _generated_rows(
    client: ClientWork, part: Part, model: LoadedModel, settings: Evaluation
) -> list[Encoded]:
    """Return the first rows from which there is room to generate."""
    own = client.rows[part]
    fit = (i for i, size in enumerate(sizes(own)) if _fits(size.prompt, model, settings))
    return [own[i] for i in itertools.islice(fit, settings.generate)]


def _fits(prompt: int, model: LoadedModel, settings: Evaluation) -> bool:
    """Whether the context has room for so many tokens and what is generated from them."""
    return prompt + settings.max_new_tokens <= model.spec.context


def _chunks(counts: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Yield the clients in groups of up to `most` rows in all, or of one client with more."""
    group: list[str] = []
    total = 0
    for id, count in counts.items():
        if group and total + count > most:
            yield group
            group, total = [], 0
        group.append(id)
        total += count
    if group:
        yield group


def client_metrics(
    model: LoadedModel,
    adapter: Adapter | None,
    work: Sequence[ClientWork],
    part: Part,
    settings: Evaluation,
    *,
    texts: bool,
    samples: int = 0,
    on_batch: OnBatch = None,
) -> ClientMetrics:
    """Return each client's scores of an adapter (None: the bare base) on one part of its data.

    A value that was not measured, or is not finite, is null. Up to `samples` of the texts are kept,
    of clients of as many categories as there are.
    """
    generating = texts and settings.generate > 0
    losses = client_losses(model, adapter, work, part, settings, on_batch)
    generated: Mapping[str, tuple[float, float]] = {}
    first: Mapping[str, SampleText] = {}
    if generating:
        generated, first = client_texts(model, adapter, work, part, settings, on_batch)
    prompts = (size.prompt for client in work for size in sizes(client.rows[part]))
    each = {
        id: {
            "loss": _finite(loss),
            "exact_match": generated[id][0] if id in generated else None,
            "rouge_l": generated[id][1] if id in generated else None,
        }
        for id, loss in losses.items()
    }
    no_room = sum(not _fits(prompt, model, settings) for prompt in prompts) if generating else 0
    sample_texts = [first[id] for id in _spread([c for c in work if c.id in first])[:samples]]
    return ClientMetrics(each, no_room, tuple(sample_texts))


def _spread(work: Sequence[ClientWork]) -> list[str]:
    """Return the clients so that the first ones differ in category, those that train before."""
    place: dict[tuple[str, bool], int] = {}
    keys = {}
    for client in sorted(work, key=lambda client: client.id):
        group = client.category, client.seen
        place[group] = place.get(group, -1) + 1
        keys[client.id] = place[group], not client.seen, client.category
    return sorted(keys, key=lambda id: keys[id])


def grouped(metrics: ClientMetrics, work: Mapping[str, ClientWork], part: Part) -> Scores:
    """Return the clients' metrics in groups.

    ``seen`` and ``unseen`` give the mean over clients, each counting once, with the standard error
    of the mean loss; ``per_category`` the same for training and held-out clients of each category;
    ``clients`` each client's own; ``no_room`` counts the prompts of this part that are too long to
    generate from. A mean over a value that is not finite is null, as the value is.
    """
    each = metrics.clients

    def group(seen: bool, categories: Collection[str]) -> Scores:
        return summarise(
            [each[id] for id in each if work[id].seen == seen and work[id].category in categories]
        )

    categories = sorted({work[id].category for id in each})
    return {
        "part": part,
        "seen": group(True, categories),
        "unseen": group(False, categories),
        "per_category": {
            name: {"seen": group(True, [name]), "unseen": group(False, [name])}
            for name in categories
        },
        "clients": {id: dict(each[id]) for id in each},
        "no_room": metrics.no_room,
    }


def summarise(scores: Sequence[Mapping[str, float | None]]) -> Scores:
    """Return the mean of each score over clients, and the standard error of the mean loss."""
    losses = [s["loss"] for s in scores if s["loss"] is not None]
    if len(losses) < len(scores):  # A mean over the others would hide that one diverged.
        losses = []
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return {
        "loss": _mean(losses),
        "loss_se": spread,
        "exact_match": _mean([s["exact_match"] for s in scores if s["exact_match"] is not None]),
        "rouge_l": _mean([s["rouge_l"] for s in scores if s["rouge_l"] is not None]),
        "clients": len(scores),
    }


def loss_only(metrics: Sequence[Mapping[str, float | None]]) -> Scores:
    """Return the mean of clients' losses, its standard error, and their number."""
    scores = summarise(metrics)
    return {key: scores[key] for key in ("loss", "loss_se", "clients")}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
