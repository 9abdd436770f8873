"""Make the miniature: ``python -m polyrank.sample.make --out DIR`` writes the model and its data.

The base is pretrained on declarative text only. The tasks lend the tokenizer their words, so that
the prompt template costs few tokens; the model never sees them here.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from polyrank.sample import codes, pretrain, tasks, text, tokenizer, world

TEMPLATE = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
VOCABULARY = 2432
STAGES = ((text.KNOWING, 2800), (text.READING, 2000))
SEED = 0


def make(out: Path, share: float = 1.0) -> float:
    """Write the data and ``model/`` below ``out`` and return the last pretraining loss.

    ``share`` shortens every stage of the pretraining; each stage starts from rounded weights.
    """
    torch.manual_seed(SEED)
    small_world = world.build(SEED)
    records = tasks.examples(small_world, SEED)
    out.mkdir(parents=True, exist_ok=True)
    for name, made in {"tasks": records, "codes": codes.examples(SEED)}.items():
        lines = "".join(json.dumps(record) + "\n" for record in made)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    plain = itertools.islice(text.paragraphs(small_world, text.KNOWING, SEED + 1), 20_000)
    forms = [TEMPLATE.format(**record) for record in records]
    coder = tokenizer.train(itertools.chain(plain, forms), VOCABULARY)
    coder.save_pretrained(out / "model")

    model = pretrain.blank_model(coder)
    loss = float("nan")
    for stage, (mixture, steps) in enumerate(STAGES):
        data = pretrain.batches(text.paragraphs(small_world, mixture, SEED + 2 + stage), coder)
        loss = pretrain.train(model, data, max(1, round(steps * share)))
        model.to(torch.bfloat16).save_pretrained(out / "model")
        model = LlamaForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    return loss


def main() -> None:
    """Read the command line and make the miniature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--share", type=float, default=1.0, help="share of the pretraining steps")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"pretraining loss {make(arguments.out, arguments.share):.3f}")


if __name__ == "__main__":
    main()
