"""Prints what the cost model foresees beside what real training passes take.

    python benchmarks/cost_model.py                 # on a CPU
    python benchmarks/cost_model.py --device cuda   # against the allocator's peak

Random models; one microbatch of a whole client, forward, loss and backward, factors at every site.
`kept` is what stays for the backward pass, by saved-tensor hooks. `peak` is the most that is held
beyond weights and factors: on a GPU by torch.cuda.max_memory_allocated, on a CPU by following the
storages that every operation makes. `operations` are torch's FlopCounterMode's, which counts no
fused attention on CPUs; there the predicted ones leave it out as well.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from polyrank.algebra import Adapter, LowRank
from polyrank.model import Cohort, LoadedModel, Part, Slot, logits_at, losses_then_gradient
from polyrank.model.anatomy import anatomy_of
from polyrank.model.load import wrap_model
from polyrank.planning.cost import CostModel
from polyrank.planning.workload import Workload

ROWS, LENGTH, TARGETS, RANK = 4, 192, 64, 8

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
}
CONFIGS = {
    "Llama": LlamaConfig(**{**_SIZES, "num_key_value_heads": 8}),
    "Qwen3, grouped queries": Qwen3Config(**_SIZES),
    "Gemma2, eager": Gemma2Config(**_SIZES, sliding_window=128),
    "GPT-2": GPT2Config(n_embd=256, n_layer=6, n_head=8, vocab_size=4096),
}


def model_of(config: object, dtype: torch.dtype, device: str, checkpointing: bool) -> LoadedModel:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).to(device=device, dtype=dtype)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    return wrap_model(module, tokenizer, checkpointing=checkpointing)


@contextmanager
def cohort_of(model: LoadedModel) -> Iterator[Cohort]:
    start = Adapter(
        {
            site: LowRank(torch.randn(m, RANK), torch.randn(RANK, n))
            for site, (m, n) in model.spec.shapes.items()
        }
    )
    with Cohort(model, [Slot(start, dict.fromkeys(start, 1.0))]) as cohort:
        cohort.route([Part(0, ROWS, LENGTH, (0, 0))])
        yield cohort


def step(model: LoadedModel, after_forward: Callable[[Tensor], object] = lambda _: None) -> None:
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long, device=model.device)
    positions = (torch.arange(ROWS)[:, None] * LENGTH + torch.arange(TARGETS)).flatten()
    wanted = torch.zeros(ROWS * TARGETS, dtype=torch.long, device=model.device)
    logits = logits_at(model, ids, positions.to(model.device))
    after_forward(logits)
    losses_then_gradient(logits, wanted, torch.ones(len(wanted), device=model.device))
    logits.backward(logits.detach())


def kept(model: LoadedModel) -> int:
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor.detach()

    with cohort_of(model) as cohort:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            step(model, note)
        fixed = [*model.module.parameters(), *model.module.buffers(), *cohort.parameters(0)]
    for tensor in fixed:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


class Live(TorchDispatchMode):
    """Follows the bytes of all storages that operations make."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self._storages = {t.untyped_storage()._cdata: (self._weak(t), 0) for t in known}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._storages or self._storages[key][0].expired():
                    self._storages[key] = (self._weak(tensor), tensor.untyped_storage().nbytes())
        for key in [key for key, (storage, _) in self._storages.items() if storage.expired()]:
            del self._storages[key]
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._storages.values()))
        return out

    @staticmethod
    def _weak(tensor: Tensor) -> StorageWeakRef:
        return StorageWeakRef(tensor.untyped_storage())


def peak(model: LoadedModel) -> int:
    with cohort_of(model) as cohort:
        own = cohort.parameters(0)
        if model.device.type == "cuda":
            step(model)  # libraries take their workspaces in the first step
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(model)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        known = [*model.module.parameters(), *model.module.buffers(), *own, *(p.grad for p in own)]
        with Live(known) as live:
            step(model)
        return live.peak


def operations(model: LoadedModel) -> int:
    with cohort_of(model), FlopCounterMode(display=False) as counter:
        step(model)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {device}; {ROWS}×{LENGTH} tokens, {TARGETS} targets per row")
    print("\n| model | base | kept, MB | measured | peak, MB | measured | Gop | measured |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for checkpointing in (False, True):
                model = model_of(config, dtype, device, checkpointing)
                load = Workload(
                    ROWS, LENGTH, TARGETS, itemsize=dtype.itemsize, checkpointing=checkpointing
                )
                costs = CostModel(anatomy_of(model), model.spec, load)
                ranks = dict.fromkeys(model.spec.shapes, RANK)
                memory, spent = costs.memory(ranks, None), costs.operations(ranks, None)
                uncounted = device == "cpu" and costs.anatomy.attention == "fused"
                counted = spent.client - spent.attention * uncounted
                pairs = [
                    # Hooks do not see what is held for a block that is computed again.
                    (memory.activations, None if checkpointing else kept(model), 1e6),
                    (memory.activations + memory.temporary, peak(model), 1e6),
                    (counted, operations(model), 1e9),
                ]
                cells = [
                    f"{mine / unit:.1f} | {'–' if real is None else _beside(mine, real, unit)}"
                    for mine, real, unit in pairs
                ]
                base = f"{str(dtype).split('.')[1]}{', checkpointed' if checkpointing else ''}"
                print(f"| {name} | {base} | {' | '.join(cells)} |", flush=True)


def _beside(predicted: float, measured: float, unit: float) -> str:
    return f"{measured / unit:.1f} ({predicted / measured - 1:+.1%})"


if __name__ == "__main__":
    main()
