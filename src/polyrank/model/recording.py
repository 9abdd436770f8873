"""Autograd's graph of single blocks, recorded in one pass of a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyrank.errors import ModelError
from polyrank.model.absent import outside, replaced_forward
from polyrank.model.load import UNREADABLE
from polyrank.model.sites import Blocks
from polyrank.planning.anatomy import ENTRY

_NEEDS: Mapping[tuple[str, str], int] = {
    ("MulBackward0", "self"): 1,
    ("MulBackward0", "other"): 0,
    ("DivBackward0", "self"): 1,
    ("MmBackward0", "self"): 1,
    ("MmBackward0", "mat2"): 0,
    ("BmmBackward0", "self"): 1,
    ("BmmBackward0", "mat2"): 0,
    ("AddmmBackward0", "mat1"): 2,
    ("AddmmBackward0", "mat2"): 1,
    ("BaddbmmBackward0", "batch1"): 2,
    ("BaddbmmBackward0", "batch2"): 1,
}
"""The input for whose gradient alone a node keeps a tensor; other tensors are kept anyway."""

_FACTORS: Mapping[str, tuple[str, str]] = {
    "MmBackward0": ("self", "mat2"),
    "BmmBackward0": ("self", "mat2"),
    "AddmmBackward0": ("mat1", "mat2"),
    "BaddbmmBackward0": ("batch1", "batch2"),
}
"""The names under which products keep their factors."""

_PASSING = frozenset(
    f"{name}Backward0"
    for name in (
        "Add",
        "Alias",
        "Clone",
        "Permute",
        "ReshapeAlias",
        "Squeeze",
        "T",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
) | {"_MarkBackward"}
"""Nodes whose gradient passes through in the memory in which it came."""

_FUSED_BACKWARD = 2.5
"""Five products in the fused kernel's backward pass, for two forward: it forms q·k again."""


@dataclass(frozen=True)
class RecordedStorage:
    """A storage that a node keeps; `shared` names those that come from outside the block."""

    nbytes: int
    shared: str | None


@dataclass(frozen=True)
class RecordedNode:
    """A node as `polyrank.planning.anatomy.Node`, with numbers of one batch."""

    name: str
    inputs: tuple[int, ...]
    saved: tuple[tuple[int, int | None], ...]
    product: int
    backward: float | None
    attention: bool
    site: str | None
    nbytes: int
    passes: bool


@dataclass(frozen=True)
class Recorded:
    """A section's graph for one batch."""

    nodes: tuple[RecordedNode, ...]
    storages: tuple[RecordedStorage, ...]
    inputs: tuple[tuple[str, int], ...]
    entry: int

    @property
    def form(self) -> object:
        """What must be equal for all batches."""
        nodes = tuple((n.name, n.inputs, n.saved, n.site, n.backward) for n in self.nodes)
        return nodes, tuple(storage.shared for storage in self.storages), self.inputs, self.entry


@dataclass(frozen=True)
class Run:
    """One pass: the sections of the chosen blocks, then of the end; modules before the blocks."""

    sections: tuple[Recorded, ...]
    before: frozenset[str]


def record(
    module: PreTrainedModel, blocks: Blocks, chosen: list[int], rows: int, length: int, targets: int
) -> Run:
    """Run a batch of rows×length tokens on the meta device and return the graphs of some blocks.

    Raises ModelError if the model cannot be run without weights.
    """
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    recorder = _Recorder(module, blocks, chosen, targets)
    try:
        with recorder, torch.enable_grad(), _Fused():
            logits = module(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
    except (*UNREADABLE, IndexError) as error:
        raise ModelError(
            f"{type(module).__name__}: it cannot be run without weights "
            f"({' '.join(str(error).split())[:300]}), so its costs are not known; give every "
            "client its ranks yourself"
        ) from error
    return recorder.run(logits)


class _Attention(torch.autograd.Function):
    """Stands in for the fused attention kernel; saves the same tensors for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Tensor) -> Tensor:
        # As the kernels do it: laid out in memory as the query is, so that joining the heads
        # copies the output of some models and not of others.
        rows, heads, length, _ = query.shape
        out = torch.empty_like(query)
        if value.shape[-1] != query.shape[-1]:
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
        exponents = query.new_empty(rows, heads, length, dtype=torch.float32)
        added = [_as_added(tensor, query) for tensor in mask]
        ctx.save_for_backward(query, key, value, out, exponents, *added)
        pairs = length * key.shape[2] if mask or length == 1 else length * (length + 1) // 2
        ctx.product = 2 * rows * heads * pairs * (query.shape[-1] + value.shape[-1])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _as_added(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask becomes one of numbers in every call."""
    return torch.zeros_like(mask, dtype=like.dtype) if mask.dtype == torch.bool else mask


class _Fused(TorchFunctionMode):
    """Calls of scaled_dot_product_attention go to the stand-in.

    What a model asks of its batch, which has no numbers here, is answered with yes: whether no
    token is padding, so that no mask is needed, is the question.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        mask = named.get("attn_mask")
        masks = () if mask is None else (mask,)
        return _Attention.apply(named["query"], named["key"], named["value"], *masks)


class _Mark(torch.autograd.Function):
    """The identity; its node says whose output this is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, site: str) -> Tensor:
        ctx.site = site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


class _Recorder:
    """Hooks that cut a pass into blocks, each a graph of its own."""

    def __init__(self, module: PreTrainedModel, blocks: Blocks, chosen: list[int], targets: int):
        self._module, self._blocks, self._chosen, self._targets = module, blocks, chosen, targets
        self._stack = ExitStack()
        self._outputs: dict[int, Tensor] = {}
        self._leaves: dict[int, Tensor] = {}  # what enters each block, and the end
        self._inputs: dict[int, dict[str, Tensor]] = {i: {} for i in chosen}
        self._shared: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no storage's address is used twice
        self._before: set[str] = set()
        self._begun = False
        self._form: Callable[[list[Tensor]], Any] | None = None  # in what blocks wrap their states

    def __enter__(self) -> _Recorder:
        for name, child in outside(self._module, self._blocks).items():
            self._hook(child.register_forward_pre_hook(self._note_before(name)))
        last = len(self._blocks.modules) - 1
        for i, block in enumerate(self._blocks.modules):
            self._hook(block.register_forward_pre_hook(self._entering(i), with_kwargs=True))
            self._hook(block.register_forward_hook(self._leaving(i, i == last)))
            if i not in self._inputs:
                self._stack.enter_context(replaced_forward(block, self._passed))
                continue
            for name, child in block.named_modules():
                if isinstance(child, nn.Linear | Conv1D):
                    self._hook(child.register_forward_hook(self._mark(i, name)))
        head = self._module.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise ModelError(
                f"{type(self._module).__name__}: expected an output embedding, "
                f"get_output_embeddings() gave {head!r}"
            )
        self._hook(head.register_forward_pre_hook(self._gather))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, logits: Tensor) -> Run:
        """Return what was recorded."""
        if logits.shape[:-1] != (1, self._targets):
            raise ModelError(
                f"{type(self._module).__name__}: this model does not compute its logits by its "
                "output embedding; its costs are not known"
            )
        fixed = {_key(t) for t in (*self._module.parameters(), *self._module.buffers())}
        sections = [
            _Graph(self._outputs[i], self._leaves[i], self._inputs[i], fixed, self._shared)
            for i in self._chosen
        ]
        end = _Graph(logits, self._leaves[len(self._blocks.modules)], {}, fixed, self._shared)
        return Run(
            (*(section.recorded() for section in sections), end.recorded(result=logits)),
            frozenset(self._before),
        )

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _note_before(self, name: str) -> Callable[..., None]:
        def note(*_: object) -> None:
            if not self._begun:
                self._before.add(name)

        return note

    def _entering(self, index: int) -> Callable[..., Any]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._begun = True
            hidden, *rest = args if args else (kwargs["hidden_states"],)
            for value in tree_leaves((rest, kwargs)):
                if isinstance(value, Tensor) and value is not hidden:
                    self._alive.append(value)
                    self._shared.setdefault(_key(value), f"shared {len(self._shared)}")
            if index not in self._inputs:
                return None
            leaf = hidden.detach().requires_grad_()
            self._leaves[index] = leaf
            if args:
                return (leaf, *rest), kwargs
            return args, {**kwargs, "hidden_states": leaf}

        return enter

    def _passed(self, *args: Any, **kwargs: Any) -> Any:
        """Stand for a block of a kind that was recorded already."""
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._form is None else self._form([hidden])

    def _leaving(self, index: int, is_last: bool) -> Callable[..., Any]:
        def leave(_: nn.Module, __: tuple[Any, ...], out: Any) -> Any:
            hidden = out if isinstance(out, Tensor) else out[0]
            if index in self._inputs:
                self._outputs[index] = hidden
            passed = hidden.detach().requires_grad_(is_last)
            self._leaves.setdefault(index + 1, passed)
            if isinstance(out, Tensor):
                return passed
            self._form = lambda states: type(out)([*states, *out[1:]])
            return self._form([passed])

        return leave

    def _mark(self, index: int, name: str) -> Callable[..., Any]:
        def mark(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            self._inputs[index][name] = args[0]
            return _Mark.apply(y, name)

        return mark

    def _gather(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        positions = torch.zeros(self._targets, dtype=torch.long, device="meta")
        return (hidden.index_select(0, positions).unsqueeze(0),)


class _Graph:
    """The graph between a leaf and an output."""

    def __init__(
        self,
        out: Tensor,
        leaf: Tensor,
        inputs: Mapping[str, Tensor],
        fixed: set[int],
        shared: Mapping[int, str],
    ):
        self._leaf, self._inputs, self._fixed, self._shared = leaf, inputs, fixed, shared
        self._order = _in_order(out.grad_fn)
        self._place = {node: i for i, node in enumerate(self._order)}
        self._storages: dict[int, RecordedStorage] = {}

    def recorded(self, result: Tensor | None = None) -> Recorded:
        nodes = [self._node(node) for node in self._order]
        if result is not None:
            saved = ((self._storage(result), None),)
            inputs = (len(nodes) - 1,)
            nbytes = result.untyped_storage().nbytes()
            nodes.append(RecordedNode("result", inputs, saved, 0, None, False, None, nbytes, True))
        inputs_of = tuple((name, self._storage(x)) for name, x in self._inputs.items())
        entry = self._storage(self._leaf)
        return Recorded(tuple(nodes), tuple(self._storages.values()), inputs_of, entry)

    def _storage(self, tensor: Tensor) -> int:
        key = _key(tensor)
        if key not in self._storages:
            nbytes = tensor.untyped_storage().nbytes()
            self._storages[key] = RecordedStorage(nbytes, self._shared.get(key))
        return list(self._storages).index(key)

    def _node(self, node: Any) -> RecordedNode:
        name = node.name()
        inputs: list[int] = []
        position: dict[int, int] = {}  # of an argument among the inputs
        for argument, (before, _) in enumerate(node.next_functions):
            if before is not None:
                position[argument] = len(inputs)
                inputs.append(self._place.get(before, ENTRY))
        saved = []
        for what, tensor in _saved(node):
            if _key(tensor) in self._fixed:
                continue
            needs = _NEEDS.get((name, what))
            saved.append((self._storage(tensor), None if needs is None else position[needs]))
        product, backward, attention, site = _product(node, name), None, False, None
        if name == "_AttentionBackward":
            product, backward, attention = node.product, _FUSED_BACKWARD, True
        elif name == "_MarkBackward":
            site = node.site
        elif product:
            attention = len(inputs) > 1
        about = node._input_metadata[0]
        return RecordedNode(
            name=name,
            inputs=tuple(inputs),
            saved=tuple(saved),
            product=product,
            backward=backward,
            attention=attention,
            site=site,
            nbytes=torch.Size(about.shape).numel() * about.dtype.itemsize,
            passes=name in _PASSING,
        )


def _product(node: Any, name: str) -> int:
    """Return the operations of a matrix product, from its result's shape and a factor's."""
    if name not in _FACTORS:
        return 0
    saved = dict(_saved(node))
    left, right = (saved.get(what) for what in _FACTORS[name])
    inner = left.shape[-1] if left is not None else 0 if right is None else right.shape[-2]
    return 2 * inner * torch.Size(node._input_metadata[0].shape).numel()


def _saved(node: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the value of each tensor that a node saves for the backward pass."""
    for what in dir(node):
        if what == "saved_tensors" or (what.startswith("_saved_") and what != "_saved_tensors"):
            value = getattr(node, what)
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, Tensor):
                    yield what.removeprefix("_saved_"), item


def _in_order(root: Any) -> list[Any]:
    """Return the nodes as the forward pass made them, without leaves.

    The backward pass takes them in the reverse order.
    """
    visited: dict[Any, None] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited or node.name() == "torch::autograd::AccumulateGrad":
            continue
        visited[node] = None
        waiting += [before for before, _ in node.next_functions]
    return sorted(visited, key=lambda node: node._sequence_nr())


def _key(tensor: Tensor) -> int:
    """Tell storages apart; on the meta device all have the address 0."""
    return tensor.untyped_storage()._cdata
