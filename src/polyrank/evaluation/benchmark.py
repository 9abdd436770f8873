"""Held-out sources that belong to no client: what a run is measured on beside its clients."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from polyrank.algebra import Adapter
from polyrank.data import Encoded, Skipped, Tasks, TokenStore, encode_each
from polyrank.errors import DataError, RecipeError
from polyrank.evaluation.metrics import check_corpus_metrics, corpus_scores
from polyrank.evaluation.settings import BenchmarkSettings
from polyrank.model import LoadedModel, generate
from polyrank.seeds import derive
from polyrank.training import token_losses
from polyrank.training.encoding import Encoding

Measured = dict[str, Any]
"""JSON: ``loss``, ``perplexity``, ``examples`` and, of texts, ``bleu``, ``nist``, ``rouge_l``,
``generated``."""

NO_ROOM = "no room to generate"

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One input of the test source, with all its references and its prompt as token ids."""

    prompt: str
    input: str
    references: tuple[str, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Benchmark:
    """Sources as token ids, ready to measure adapters on.

    `validation` are the rows that the loss is taken on at both ends of a run, `between` those for
    in between, `cases` what texts are generated for. Make it with `of`.
    """

    settings: BenchmarkSettings
    validation: Sequence[Encoded]
    between: Sequence[Encoded]
    cases: Sequence[Case]
    skipped: Skipped

    @staticmethod
    def of(
        model: LoadedModel,
        settings: BenchmarkSettings,
        encoding: Encoding,
        *,
        validation: Tasks | None = None,
        test: Tasks | None = None,
        seed: int = 0,
    ) -> Benchmark:
        """Return the benchmark of these tasks, encoded as those of clients are.

        The loss is on completions, whatever clients learn. Rows of `test` with the same prompt and
        input are one case with the references of all of them. Rows that are too long, and cases
        whose prompt leaves no room for the new tokens, are named in `skipped`.

        RecipeError if there is neither source, or a library lacks; DataError if nothing is left.
        """
        if validation is None and test is None:
            raise RecipeError("benchmark: give validation, test, or both: sources to measure on")
        store, missed = TokenStore(), []
        rows: Sequence[Encoded] = ()
        if validation is not None:
            rows, left_out = _encoded(model, encoding, validation, store, "benchmark.validation")
            missed.append(left_out)
        cases: Sequence[Case] = ()
        if test is not None:
            check_corpus_metrics()
            cases, left_out = _cases(model, encoding, test, settings.max_new_tokens)
            missed.append(left_out)
        return Benchmark(
            settings,
            _some(rows, settings.final_examples, seed, "validation"),
            _some(rows, settings.examples, seed, "validation"),
            _some(cases, settings.generate, seed, "test"),
            Skipped.of(missed),
        )

    def described(self) -> dict[str, Any]:
        """Return settings and a SHA-256 over all that is measured on, as JSON."""
        digest = hashlib.sha256()
        for rows in (self.validation, self.between):
            digest.update(f"{len(rows)}|".encode())
            for row in rows:
                digest.update(f"{row.loss_from}|{len(row.input_ids)}|".encode())
                digest.update(array("q", row.input_ids).tobytes())
        for case in self.cases:
            digest.update(repr((case.tokens, case.references)).encode("utf-8", "surrogatepass"))
        return {**asdict(self.settings), "data": digest.hexdigest()}

    def of_round(
        self,
        model: LoadedModel,
        adapter: Adapter | None,
        number: int,
        on_batch: Callable[[], None] | None = None,
    ) -> Measured | None:
        """Return loss and perplexity if they are due after round `number`, otherwise None."""
        every = self.settings.every
        if not self.between or not every or number % every:
            return None
        return perplexity(model, adapter, self.between, self.settings.batch, on_batch)

    def whole(
        self,
        model: LoadedModel,
        adapter: Adapter | None,
        on_batch: Callable[[], None] | None = None,
    ) -> Measured:
        """Return all scores, and what was generated as ``texts``."""
        scores: Measured = {}
        if self.validation:
            scores |= perplexity(model, adapter, self.validation, self.settings.batch, on_batch)
        if self.cases:
            scores |= self._texts(model, adapter, on_batch)
        return scores

    def _texts(
        self, model: LoadedModel, adapter: Adapter | None, on_batch: Callable[[], None] | None
    ) -> Measured:
        texts = generate(
            model,
            adapter,
            [case.tokens for case in self.cases],
            max_new_tokens=self.settings.max_new_tokens,
            batch=self.settings.batch,
            on_batch=on_batch,
        )
        scores = corpus_scores(texts, [case.references for case in self.cases])
        listed = [
            {"prompt": case.prompt, "input": case.input, "text": text}
            for case, text in zip(self.cases, texts, strict=True)
        ]
        return {**asdict(scores), "generated": len(texts), "texts": listed}


def perplexity(
    model: LoadedModel,
    adapter: Adapter | None,
    rows: Sequence[Encoded],
    batch: int,
    on_batch: Callable[[], None] | None = None,
) -> Measured:
    """Return ``loss``, the mean over target tokens, its exponential, and how many ``examples``.

    Each token counts once, so long completions weigh more. What is not finite, or too large for a
    float, is null.
    """
    pairs = token_losses(model, adapter, rows, batch, on_batch)
    loss = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
    known = math.isfinite(loss)
    return {
        "loss": loss if known else None,
        "perplexity": math.exp(loss) if known and loss < 700 else None,
        "examples": len(rows),
    }


def _encoded(
    model: LoadedModel, encoding: Encoding, tasks: Tasks, store: TokenStore, label: str
) -> tuple[Sequence[Encoded], Skipped]:
    missed: dict[str, list[str]] = {}
    rows = store.extend(
        encode_each(
            tasks.examples,
            model.tokenizer,
            missed,
            max_length=encoding.max_length or model.spec.context,
            template=encoding.template,
            too_long=encoding.too_long,
            label=label,
        )
    )
    skipped = tasks.skipped + Skipped(missed)
    if not rows:
        raise DataError(f"{label}: {tasks.source} has no usable row: {skipped}")
    return rows, skipped


def _cases(
    model: LoadedModel, encoding: Encoding, tasks: Tasks, new: int
) -> tuple[list[Case], Skipped]:
    room = model.spec.context - new
    if room < 1:
        raise RecipeError(
            f"benchmark.max_new_tokens: {new} leave no room for a prompt in the context of "
            f"{model.source}, {model.spec.context} tokens; lower it"
        )
    rows, skipped = _encoded(model, encoding, tasks, TokenStore(), "benchmark.test")
    references: dict[tuple[str, str], list[str]] = {}
    for example in tasks.examples:
        references.setdefault((example.prompt, example.input), []).extend(example.references)
    cases, crowded = [], []
    for row in rows:
        example = tasks.examples[row.example]
        own = references.pop((example.prompt, example.input), None)
        if own is None:  # The same input came before.
            continue
        if row.prompt_length > room:
            crowded.append(f"benchmark.test row {example.row}")
            continue
        tokens = row.input_ids[: row.prompt_length]
        cases.append(Case(example.prompt, example.input, tuple(own), tokens))
    skipped += Skipped({NO_ROOM: crowded} if crowded else {})
    if not cases:
        raise DataError(f"benchmark.test: {tasks.source} has no usable row: {skipped}")
    return cases, skipped


def _some(items: Sequence[T], most: int, seed: int, purpose: str) -> Sequence[T]:
    """Return up to `most` of the items in their order, drawn from the seed; all of them for 0."""
    if not most or most >= len(items):
        return items
    drawn = sorted(range(len(items)), key=lambda i: derive(seed, i, "benchmark", purpose))[:most]
    return [items[i] for i in sorted(drawn)]
