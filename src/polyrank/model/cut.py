"""Running a part of a model: its first blocks, its last, or those between.

    cut = Cut(model, 4)
    hidden = cut.head(input_ids)          # embeddings and blocks 0…3
    logits = cut.tail(hidden, positions)  # blocks 4…, norm and output embedding

Nothing here knows an architecture. The model's own forward method runs and builds masks and rotary
positions; hooks stop it, hand it hidden states from elsewhere, and let blocks be passed over.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.errors import ModelError, SiteError
from polyrank.model.absent import as_zeros, outside, replaced_forward, without_weights
from polyrank.model.forward import checked_logits, gathered
from polyrank.model.load import LoadedModel
from polyrank.model.sites import find_blocks
from polyrank.model.span import Span, blocks_of, sites_within


class _Reached(Exception):
    """Ends a forward pass at the block where a part of the model ends; never leaves this module."""


class Cut:
    """A model that is cut before block `lower` and, in a U-shape, before block `upper` as well.

    The head runs blocks 0 … lower − 1, the tail those from the last cut on, the middle of a U-shape
    those between the cuts. Composed, they compute what the whole model computes, with the same
    gradients. Each needs the weights of its own blocks only, so `model` may be one that holds no
    others (`load_model(..., spans=...)`); there, modules before the first block that a later part
    has no use for give zeros.

    Batches are padded on the right and the attention mask is all ones, as in `logits_at`. Between
    calls the model is as it was, also after an error. A call belongs to one thread: while it runs,
    nobody else may run the same module. A cohort may be attached around the calls; one that is
    routed sees the same batch in every part. Where blocks are checkpointed, it must stay attached
    and routed until the backward pass is done.

    Raises ModelError if a cut is not within 1 … blocks − 1 or upper ≤ lower, or the same module
    stands for several blocks, and SiteError if the weight of a site is tied to one beyond the cut.
    """

    def __init__(self, model: LoadedModel, lower: int, upper: int | None = None):
        self.model, self.lower, self.upper = model, lower, upper
        blocks = find_blocks(model.module)
        self._blocks = blocks.modules
        self._outside = outside(model.module, blocks)
        self._place = type(model.module).__name__
        count = len(self._blocks)
        for name, cut in (("cut", lower), ("upper cut", upper)):
            if cut is not None and not 0 < cut < count:
                raise ModelError(
                    f"{name}: expected 1…{count - 1} (the blocks below it, of the {count} of "
                    f"{self._place}), got {cut}"
                )
        if upper is not None and upper <= lower:
            raise ModelError(
                f"upper cut: expected {lower + 1}…{count - 1}, above the lower cut at {lower}, got "
                f"{upper}"
            )
        if len({id(block) for block in self._blocks}) < count:
            raise ModelError(
                f"{self._place}: one module stands for several blocks; expected blocks of their "
                "own. Such a model cannot be cut"
            )
        self._refuse_ties(blocks.prefix)
        self._form: _Form | None = None

    @property
    def last(self) -> int:
        """The block at which the tail begins."""
        return self.lower if self.upper is None else self.upper

    def head(self, input_ids: Tensor) -> Tensor:
        """Return the hidden states that enter block `lower`, B×T×d, of token ids B×T."""
        self._needs(range(self.lower))
        with self._until(self.lower) as reached:
            self._run(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return self._only(reached, self.lower)

    def middle(self, hidden: Tensor) -> Tensor:
        """Return what enters block `upper`, given what enters block `lower`; both B×T×d.

        Raises ModelError if there is no upper cut or `hidden` has another shape.
        """
        if self.upper is None:
            raise ModelError("Cut.middle: this cut has no upper block; use `tail`")
        self._needs(range(self.lower, self.upper))
        with self._from(hidden, self.lower), self._until(self.upper) as reached:
            self._run(**self._stand_in(hidden))
        return self._only(reached, self.upper)

    def tail(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return logits, P×vocabulary, given what enters the block at the last cut, B×T×d.

        `positions` are P indices into the flattened B·T.
        Raises ModelError if `hidden` has another shape, and as `logits_at`.
        """
        self._needs(range(self.last, len(self._blocks)))
        with self._from(hidden, self.last), gathered(self.model, positions):
            logits = self._run(**self._stand_in(hidden)).logits
        return checked_logits(self.model, logits, positions)

    def _run(self, **inputs: Tensor) -> Any:
        return self.model.module(**inputs, use_cache=False)

    def _stand_in(self, hidden: Tensor) -> dict[str, Tensor]:
        """Embedded tokens that are never read, for a pass that begins further up."""
        width = self.model.module.get_input_embeddings().weight.shape[1]
        batch = hidden.shape[:2]
        return {
            "inputs_embeds": hidden.new_zeros(*batch, width),
            "attention_mask": torch.ones(batch, dtype=torch.long, device=hidden.device),
        }

    @contextmanager
    def _until(self, index: int) -> Iterator[list[Tensor]]:
        """Stop at a block and give what enters it."""
        reached: list[Tensor] = []
        block = self._blocks[index]

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0] if args else kwargs[_first(block)])
            raise _Reached

        handle = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield reached
        except _Reached:
            pass
        finally:
            handle.remove()

    @contextmanager
    def _from(self, hidden: Tensor, index: int) -> Iterator[None]:
        """Pass over the blocks below and hand `hidden` to the block."""
        width = self.model.spec.hidden
        if hidden.ndim != 3 or hidden.shape[2] != width:
            raise ModelError(
                f"Cut: expected hidden states of B×T×{width} for block {index}, got "
                f"{tuple(hidden.shape)}"
            )
        block = self._blocks[index]
        begun = False

        def inject(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal begun
            begun = True
            self._refuse_state(args, kwargs)
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, _first(block): hidden}

        def called(name: str) -> None:
            if begun:
                raise ModelError(
                    f"{self._place}: {name} is needed after block {index}, and its weights are not "
                    "held here"
                )

        def passed(*args: Any, **kwargs: Any) -> Any:
            if self._form is None:
                self._form = self._learn(block, args, kwargs)
            return self._form.around(hidden.detach())

        with ExitStack() as stack:
            for below in self._blocks[:index]:
                stack.enter_context(replaced_forward(below, passed))
            stack.enter_context(as_zeros(without_weights(self._outside), called))
            stack.callback(block.register_forward_pre_hook(inject, with_kwargs=True).remove)
            yield

    def _learn(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Form:
        """Run a block that is held once, to see in what it wraps hidden states."""
        with torch.no_grad():
            out = block.forward(*args, **kwargs)
        if isinstance(out, Tensor):
            return _Form(lambda hidden: hidden, [])
        if not isinstance(out, tuple | list) or not isinstance(out[0], Tensor):
            raise ModelError(
                f"{self._place}: expected its blocks to give hidden states, alone or first of a "
                f"tuple, got {type(out).__name__}; this architecture cannot be cut"
            )
        kind = type(out)
        others = [other.new_zeros(()) if isinstance(other, Tensor) else other for other in out[1:]]
        return _Form(lambda hidden: kind([hidden, *others]), others)

    def _refuse_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a model whose blocks hand each other more than hidden states."""
        form = self._form
        given = [*args[1:], *kwargs.values()]
        if form is not None and any(
            value is other for other in form.others if isinstance(other, Tensor) for value in given
        ):
            raise ModelError(
                f"{self._place}: its blocks hand each other more than hidden states; this "
                "architecture cannot be cut"
            )

    def _only(self, reached: list[Tensor], index: int) -> Tensor:
        if len(reached) != 1:
            raise ModelError(f"{self._place}: its forward method never came to block {index}")
        return reached[0]

    def _needs(self, needed: range) -> None:
        _check_held(self.model, frozenset(needed), "Cut")

    def _side(self, name: str, prefix: str) -> int | None:
        """Which part a module belongs to; None outside the blocks."""
        if not name.startswith(f"{prefix}."):
            return None
        block = int(name[len(prefix) + 1 :].split(".", 1)[0])
        return sum(cut is not None and cut <= block for cut in (self.lower, self.upper))

    def _refuse_ties(self, prefix: str) -> None:
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.module.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        for site in self.model.spec.sites:
            weight = self.model.module.get_submodule(site.name).weight
            mine = self._side(site.name, prefix)
            for name in owners[id(weight)]:
                if self._side(name, prefix) != mine:
                    raise SiteError(
                        f"cut: {site.name} is adapted and its weight is tied to {name} beyond the "
                        "cut, where it would not change; exclude the site or cut elsewhere"
                    )


class _Form:
    """In what the blocks of a model wrap the hidden states that they give."""

    def __init__(self, around: Callable[[Tensor], Any], others: list[Any]):
        self.around, self.others = around, others


def side(model: LoadedModel, *spans: Span) -> LoadedModel:
    """Return the same model with the sites of some blocks only, for the adapter of one side.

    The weights are shared, not copied. Raises ModelError as `blocks_of` and if the model does not
    hold one of these blocks, and SiteError if none of its sites lies in them.
    """
    chosen = blocks_of(spans, model.spec.blocks)
    _check_held(model, chosen, "side")
    return replace(model, spec=sites_within(model.spec, chosen))


def _check_held(model: LoadedModel, needed: frozenset[int], place: str) -> None:
    missing = sorted(needed - model.hosted)
    if missing:
        raise ModelError(
            f"{place}: blocks {missing} are needed, this model holds {sorted(model.hosted)}; load "
            "it with the spans of this part"
        )


def _first(block: nn.Module) -> str:
    """The name of a block's first argument, its hidden states."""
    return next(iter(inspect.signature(block.forward).parameters))
