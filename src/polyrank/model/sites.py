"""The matrices of a model that can be adapted, and the choice among them.

Nothing here knows an architecture: the decoder blocks are found as the list of as many modules as
the configuration counts layers, and sites are the linear modules inside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyrank.errors import ModelError, SiteError
from polyrank.planning.spec import Site

ALL_LINEAR = "all-linear"

GROUPS: Mapping[str, Sequence[str]] = {
    "attention": ("*attn*", "*attention*"),
    "feed-forward": ("*mlp*", "*ffn*", "*feed_forward*", "*feedforward*", "*.fc1", "*.fc2"),
}
"""The globs that tell groups apart by a module's path; fc1 and fc2 stand alone in OPT's blocks."""


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model: `prefix` is the path of their list."""

    prefix: str
    modules: tuple[nn.Module, ...]


def find_blocks(module: PreTrainedModel) -> Blocks:
    """Return the decoder blocks: the outermost ModuleList with one entry per hidden layer.

    Of several (a second tower of the same depth) the one with most parameters counts.
    Raises ModelError if there is none.
    """
    layers = getattr(module.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == layers
    ]
    outermost = [
        (name, child)
        for name, child in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not layers or not outermost:
        raise ModelError(
            f"{type(module).__name__}: expected a ModuleList of as many decoder blocks as the "
            f"configuration has hidden layers ({layers}), found none; this architecture cannot be "
            "adapted"
        )
    name, module_list = max(
        outermost, key=lambda item: sum(p.numel() for p in item[1].parameters())
    )
    return Blocks(name, tuple(module_list))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (m, n) = (out, in) of a linear module; a Conv1D stores its weight as n×m."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def choose_sites(
    module: PreTrainedModel,
    wanted: Sequence[str] | str = ALL_LINEAR,
    exclude: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Site, ...]:
    """Return the chosen sites in the model's own order.

    `wanted` is ``"all-linear"`` (every linear module of the decoder blocks, never the embeddings,
    the head, routers or experts) or names: a full path, a suffix of one (``q_proj``,
    ``attn.c_proj``) or a glob on full paths (``*.self_attn.*``). `exclude` takes names of the same
    kinds away. `groups` overrides or adds to `GROUPS`, by globs on full paths.

    Raises SiteError if a name matches nothing, stands for modules in different places of a block,
    names something that cannot be adapted, or if a chosen site belongs to no group or to two.
    """
    blocks = find_blocks(module)
    candidates, refused = _candidates(module, blocks)
    asked = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    chosen: set[str] = set()
    for name in asked:
        chosen |= set(candidates) if name == ALL_LINEAR else _match(name, candidates, refused)
    for name in exclude:
        chosen -= _match(name, candidates, refused)
    if not chosen:
        raise SiteError(
            f"sites: nothing is left of {list(asked)} without {list(exclude)}; this model has "
            f"{_listed(_roles(candidates))}"
        )
    ordered = [name for name in candidates if name in chosen]
    group = _group(ordered, {**GROUPS, **(groups or {})})
    return tuple(
        Site(name, *linear_shape(candidates[name]), _block(name, blocks), group[name])
        for name in ordered
    )


def _block(name: str, blocks: Blocks) -> int:
    return int(name[len(blocks.prefix) + 1 :].split(".", 1)[0])


def _candidates(
    module: PreTrainedModel, blocks: Blocks
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the linear modules that can be sites, and why the other matrices cannot."""
    candidates: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    expert_places, routers = _mixture(blocks)
    for name, child in module.named_modules():
        if not isinstance(child, nn.Linear | Conv1D | nn.Embedding):
            continue
        if not name.startswith(f"{blocks.prefix}."):
            refused[name] = "it lies outside the decoder blocks (embedding or output head)"
        elif isinstance(child, nn.Embedding):
            refused[name] = "it is an embedding"
        elif any(name.startswith(f"{place}.") for place in expert_places):
            refused[name] = "it is an expert, which sees only the tokens that are routed to it"
        elif name in routers:
            refused[name] = "it routes tokens to experts"
        else:
            candidates[name] = child
    for place in expert_places:
        refused[place] = "experts of a mixture see only the tokens that are routed to them"
    return candidates, refused


def _mixture(blocks: Blocks) -> tuple[set[str], set[str]]:
    """Return the paths that hold experts and the linear modules that route to them.

    Experts are parameters of three dimensions (expert, out, in) or a list of modules with linear
    ones in it; a router is a linear module of the same block's mixture with one output per expert
    (or a single one, the gate of a shared expert).
    """
    places: set[str] = set()
    routers: set[str] = set()
    for index, block in enumerate(blocks.modules):
        prefix = f"{blocks.prefix}.{index}"
        counts: dict[str, int] = {}
        for name, child in block.named_modules():
            tensors = [p for p in child.parameters(recurse=False) if p.ndim == 3]
            if tensors and not isinstance(child, nn.Conv1d):
                counts[name] = tensors[0].shape[0]
            elif isinstance(child, nn.ModuleList) and _has_linear(child):
                counts[name] = len(child)
        places |= {f"{prefix}.{name}" for name in counts}
        for name, child in block.named_modules():
            if isinstance(child, nn.Linear) and any(
                child.out_features in (1, experts) and _beside(name, place)
                for place, experts in counts.items()
            ):
                routers.add(f"{prefix}.{name}")
    return places, routers


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear | Conv1D) for child in module.modules())


def _beside(name: str, place: str) -> bool:
    """Whether a module lies in the same part of the block as these experts."""
    return name.split(".", 1)[0] == place.split(".", 1)[0]


def _match(name: str, candidates: Mapping[str, object], refused: Mapping[str, str]) -> set[str]:
    is_glob = any(mark in name for mark in "*?[")
    matched = [path for path in candidates if _names(name, path, is_glob)]
    if not matched:
        for path, reason in refused.items():
            if _names(name, path, is_glob) or name.startswith(f"{path}."):
                raise SiteError(f"sites: {name!r} cannot be adapted: {path} – {reason}")
        raise SiteError(
            f"sites: {name!r} matches no linear module of the decoder blocks; this model has "
            f"{_listed(_roles(candidates))}"
        )
    roles = _roles(matched)
    if not is_glob and len(roles) > 1:
        longer = " or ".join(repr(role) for role in _suffixes(roles))
        raise SiteError(
            f"sites: {name!r} is ambiguous: it stands for {_listed(roles)}; be specific with "
            f"{longer}, or write '*.{name}' to mean them all"
        )
    return set(matched)


def _names(name: str, path: str, is_glob: bool) -> bool:
    if is_glob:
        return fnmatchcase(path, name)
    return path == name or path.endswith(f".{name}")


def _roles(paths: Iterable[str]) -> list[str]:
    """Return the paths with `*` for every number, each once, in order."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))


def _suffixes(roles: Sequence[str]) -> list[str]:
    """Return for every role the part after its last `*`, a suffix that tells it from the others."""
    return [role.rsplit("*.", 1)[-1] for role in roles]


def _group(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    by_name = {
        name: [g for g, globs in groups.items() if any(fnmatchcase(name, glob) for glob in globs)]
        for name in names
    }
    wrong = {name: matched for name, matched in by_name.items() if len(matched) != 1}
    if wrong:
        lines = {role: [] for role in _roles(wrong)}  # type: dict[str, list[str]]
        for name, matched in wrong.items():
            lines[_roles([name])[0]] = matched
        told = "; ".join(
            f"{role} in {' and '.join(matched) if matched else 'none'}"
            for role, matched in lines.items()
        )
        raise SiteError(
            f"sites: expected every site in exactly one group of {list(groups)}, found {told}; "
            "say which with groups, e.g. groups={'attention': ['*attn*']}, or exclude the sites"
        )
    return {name: matched[0] for name, matched in by_name.items()}


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)
