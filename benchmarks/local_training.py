"""Local training: one client against the Hugging Face Trainer with peft, a cohort against turns.

    python benchmarks/local_training.py [--model FOLDER] [--threads 1] [--repeats 5] [--quick]

Both sides of a comparison run in this process on the same batches from the same factors, in
alternation; the tables give the medians and the median ratio of neighbouring runs. Of the Trainer
only what lies between its begin and end of training counts, not its set-up. First it is checked
that both sides report the same losses and learn the same. On a machine that others use too,
``--clock cpu`` counts this process's processor time (with one thread) instead of the time of day.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from polyrank.aggregation.types import Assignment
from polyrank.algebra import Adapter, LowRank
from polyrank.data.collate import collate
from polyrank.data.types import Encoded
from polyrank.model import LoadedModel, load_model, wrap_model
from polyrank.training import Job, LocalTraining, Trained, train_cohort
from polyrank.training.batches import step_groups

SCALE = 2.0
WORDS = {"<pad>": 0, "</s>": 2, "<unk>": 3, "word": 4}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, {platform.machine()}, {options.threads} thread(s), "
        f"{options.repeats} repeats, {options.clock} clock\n"
    )
    for device in devices:
        model = make_model(options, device)
        print(f"### {device}: {describe(model, options)}\n")
        clock = make_clock(options.clock, device)
        against_the_trainer(model, options, clock)
        against_turns(model, options, clock)
    if "cuda" not in devices:
        print("### cuda\n\nnot run: no CUDA device")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder with a model; default: a random Llama")
    parser.add_argument("--hidden", type=int, default=320)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of the longest example")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        sizes = {"hidden": 32, "layers": 2, "vocabulary": 128, "length": 32}
        vars(options).update(sizes, batch=2, steps=2, clients=3, repeats=2)
    return options


def make_clock(name: str, device: str) -> Callable[[], float]:
    if device == "cpu":
        return time.process_time if name == "cpu" else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def make_model(options: argparse.Namespace, device: str) -> LoadedModel:
    if options.model:
        return load_model(options.model, device=device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 16 if options.hidden < 64 else options.hidden // 32,
        max_position_embeddings=2048,
    )
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return wrap_model(LlamaForCausalLM(config).to(device), tokenizer, source="random Llama")


def describe(model: LoadedModel, options: argparse.Namespace) -> str:
    return (
        f"{model.spec.architecture}, {model.spec.parameters / 1e6:.1f} M parameters, vocabulary "
        f"{model.spec.vocabulary}, {model.dtype}, rank {options.rank} at {len(model.spec.sites)} "
        f"sites, batches of {options.batch} × ≤ {options.length} tokens"
    )


def make_examples(
    model: LoadedModel, count: int, length: int, targets: int, seed: int
) -> list[Encoded]:
    """Return random rows of ¾ to the whole of `length` tokens, the last `targets` with loss."""
    source = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        size = int(torch.randint(length * 3 // 4, length + 1, (1,), generator=source))
        ids = torch.randint(4, model.spec.vocabulary, (size,), generator=source)
        rows.append(Encoded(tuple(ids.tolist()), size - targets, size - targets, i))
    return rows


def make_job(
    model: LoadedModel, name: str, rank: int, rows: Sequence[Encoded], local: LocalTraining
) -> Job:
    source = torch.Generator().manual_seed(rank)
    start = Adapter(
        {
            site: LowRank(
                1e-3 * torch.randn(m, rank, generator=source),
                torch.randn(rank, n, generator=source) / n**0.5,
            )
            for site, (m, n) in model.spec.shapes.items()
        }
    )
    return Job(name, Assignment(start, dict.fromkeys(start, SCALE)), rows, local, seed=0)


def interleaved(
    repeats: int,
    clock: Callable[[], float],
    ours: Callable[[], object],
    theirs: Callable[[], object],
) -> tuple[list[float], list[float]]:
    """Return the seconds of both, run in alternation and with the first going last next time."""
    pair: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for i in (0, 1) if repeat % 2 else (1, 0):
            start = clock()
            (ours, theirs)[i]()
            pair[i].append(clock() - start)
    return pair


def table_row(what: str, tokens: float, ours: list[float], theirs: list[float]) -> str:
    """Return a line with tokens per second of both and the median ratio."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    speeds = [tokens / statistics.median(seconds) for seconds in (theirs, ours)]
    return f"| {what} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} |"


# --- one client against the Trainer ---------------------------------------------------------------


def against_the_trainer(
    model: LoadedModel, options: argparse.Namespace, clock: Callable[[], float]
) -> None:
    print("| one client | Trainer + peft, tokens/s | polyrank, tokens/s | ratio |")
    print("| --- | --- | --- | --- |")
    notes = []
    long, short = options.length // 2, max(2, options.length // 16)
    for what, targets in (("long completions", long), ("short completions", short)):
        rows = make_examples(model, options.batch * options.steps, options.length, targets, 1)
        local = LocalTraining(batch=options.batch)
        job = make_job(model, "one", options.rank, rows, local)
        ordered = [
            rows[i]
            for group in step_groups(len(rows), local, job.seed)
            for micro in group
            for i in micro
        ]
        with PeftTrainer(model, job, ordered, clock) as theirs:
            notes.append(f"{what}: {theirs.compare(train_cohort(model, [job])[0])}")
            seconds = interleaved(
                options.repeats,
                clock,
                lambda job=job: train_cohort(model, [job]),
                theirs.train_timed,
            )
        tokens = sum(len(row.input_ids) for row in rows)
        print(table_row(f"{what} ({targets} targets a row)", tokens, seconds[0], theirs.seconds))
    print("\n" + "\n".join(f"- {note}" for note in notes) + "\n")


class Stopwatch(TrainerCallback):
    """The time from the begin of a training to its end."""

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.seconds = clock, 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start."""
        self.seconds = -self.clock()

    def on_train_end(self, *_: object, **__: object) -> None:
        """Stop."""
        self.seconds += self.clock()


class PeftTrainer:
    """The Hugging Face Trainer on a peft model over a copy of the module that polyrank trains on.

    A copy, because peft changes the module: polyrank would train on top of peft's layers.
    """

    def __init__(
        self,
        model: LoadedModel,
        job: Job,
        ordered: Sequence[Encoded],
        clock: Callable[[], float],
    ):
        self.model, self.job, self.ordered, self.clock = model, job, ordered, clock
        self.seconds: list[float] = []
        start = job.assignment.start
        rank = next(iter(start.values())).rank
        config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=[*start])
        self.adapted: PeftModel = get_peft_model(copy.deepcopy(model.module), config)
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> PeftTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def trainer(self, logging: bool) -> Trainer:
        """Return a Trainer whose first step is yet to come, from the job's factors."""
        with torch.no_grad():
            for site, delta in self.job.assignment.start.items():
                layer = self.adapted.base_model.model.get_submodule(site)
                layer.lora_A["default"].weight.copy_(delta.a)
                layer.lora_B["default"].weight.copy_(delta.b / SCALE)
        local = self.job.local
        settings = TrainingArguments(
            output_dir=str(Path(self._folder.name)),
            per_device_train_batch_size=local.batch,
            num_train_epochs=1,
            learning_rate=local.lr,
            lr_scheduler_type="constant",
            max_grad_norm=local.clip,
            weight_decay=local.weight_decay,
            train_sampling_strategy="sequential",
            logging_strategy="steps" if logging else "no",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=self.model.device.type == "cpu",
        )
        trainer = Trainer(
            model=self.adapted,
            args=settings,
            train_dataset=self.ordered,  # type: ignore[arg-type]
            data_collator=self._collate,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _collate(self, rows: list[Encoded]) -> dict[str, torch.Tensor]:
        batch = collate(rows, self.model.tokenizer.pad_token_id)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.labels,
        }

    def train_timed(self) -> None:
        """Train; only the time between the Trainer's begin and end of training counts."""
        watch = Stopwatch(self.clock)
        trainer = self.trainer(logging=False)
        trainer.add_callback(watch)
        trainer.train()
        self.seconds.append(watch.seconds)

    def compare(self, ours: Trained) -> str:
        """Return what both report; RuntimeError if it is not the same training."""
        trainer = self.trainer(logging=True)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        first, last = ours.metrics["first_loss"], ours.metrics["last_loss"]
        gap = max(abs(losses[0] - first), abs(losses[-1] - last))
        moved = apart = 0.0
        for site, delta in ours.adapter.items():
            layer = self.adapted.base_model.model.get_submodule(site)
            b = layer.lora_B["default"].weight.detach().to(delta.b.device) * SCALE
            a = layer.lora_A["default"].weight.detach().to(delta.a.device)
            apart += (delta - LowRank(b, a)).norm() ** 2
            moved += (delta - self.job.assignment.start[site].to(device=b.device)).norm() ** 2
        relative = (apart / moved) ** 0.5
        if gap > 1e-3 or relative > 0.02:
            raise RuntimeError(f"not the same training: losses {gap:.1e}, ΔW {relative:.1e} apart")
        return (
            f"losses of the first and last step {losses[0]:.4f}, {losses[-1]:.4f} (Trainer) and "
            f"{first:.4f}, {last:.4f} (polyrank); what was learned differs by "
            f"{relative:.1e} of its norm"
        )


# --- a cohort against its clients in turn ---------------------------------------------------------


def against_turns(
    model: LoadedModel, options: argparse.Namespace, clock: Callable[[], float]
) -> None:
    count = options.clients
    print(f"| {count} clients | in turn, tokens/s | one cohort, tokens/s | ratio |")
    print("| --- | --- | --- | --- |")
    long, short = options.length // 2, max(2, options.length // 16)
    for what, targets, batch, unequal in (
        ("equal ranks, long completions", long, options.batch, False),
        ("unequal ranks and data, short completions", short, options.batch, True),
        ("unequal ranks, batches of 1, short completions", short, 1, True),
    ):
        local = LocalTraining(batch=batch)
        jobs = []
        for k in range(count):
            rows = batch * (options.steps - (k % 3 if unequal else 0))
            rank = max(1, options.rank * 2 // 2 ** (k % 4)) if unequal else options.rank
            own = make_examples(model, max(batch, rows), options.length, targets, k)
            jobs.append(make_job(model, f"client {k}", rank, own, local))
        together = train_cohort(model, jobs)
        apart = [train_cohort(model, [job])[0] for job in jobs]
        for one, other in zip(together, apart, strict=True):
            if abs(one.metrics["loss"] - other.metrics["loss"]) > 1e-3:
                raise RuntimeError("a cohort and its clients in turn report different losses")
        seconds = interleaved(
            options.repeats,
            clock,
            lambda jobs=jobs: train_cohort(model, jobs),
            lambda jobs=jobs: [train_cohort(model, [job]) for job in jobs],
        )
        tokens = sum(one.metrics["tokens"] for one in together)
        print(table_row(what, tokens, *seconds))
    print()


if __name__ == "__main__":
    main()
