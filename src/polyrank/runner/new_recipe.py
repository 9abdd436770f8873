"""A first recipe from a model, data and a number of clients: `polyrank init`."""

from __future__ import annotations

import itertools
import json
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyrank.config.reading import checked, resolve_sources
from polyrank.config.schema import directive
from polyrank.data.sources import Source
from polyrank.errors import FolderExistsError, RecipeError
from polyrank.sample import MODEL, SAMPLE, TASKS

ROWS = 2000
"""The rows of a source that are looked at."""

PROMPTS = ("instruction", "prompt", "question", "query", "text", "source", "input")
INPUTS = ("input", "context", "passage", "document")
COMPLETIONS = ("output", "completion", "answer", "response", "reply", "target", "label", "summary")
OWNERS = ("client", "client_id", "user", "user_id", "owner", "device", "site", "hospital", "task")
"""Names that columns often have, the likeliest first."""

RANKS = (4, 8, 16, 32)


@dataclass(frozen=True)
class Columns:
    """The columns of a source that are prompt, input (if any) and completion, and all of them."""

    prompt: str
    input: str | None
    completion: str
    values: Mapping[str, Sequence[Any]]

    def clients(self, column: str) -> int:
        """Return how many different values a column has in the rows that were looked at."""
        return len({str(value) for value in self.values[column]})


@dataclass(frozen=True)
class NewRecipe:
    """A recipe's file, and in lines what of the data was taken for what."""

    path: Path
    notes: tuple[str, ...]


def write_recipe(
    path: Path,
    *,
    model: str = SAMPLE,
    data: str = SAMPLE,
    clients: int | None = None,
    by: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
) -> NewRecipe:
    """Write a commented recipe that runs as it stands.

    `model` and `data` are what `model.source` and `data.source` take, seen from here. `by` names
    the column whose values are the clients. Without it, `clients` of them get equal shares of the
    rows; with neither, a column that tells owners apart is looked for. `prompt` and `completion`
    name columns where their names do not tell.

    Raises FolderExistsError if the file exists, RecipeError or DataError if no recipe can be made
    of these, with what to give.
    """
    if path.exists() or path.is_symlink():
        raise FolderExistsError(f"{path}: exists already, and is not overwritten; choose another")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: there is no folder {path.parent}; make it first")
    source, separator = _source(data)
    columns = _columns(source, prompt, completion)
    by, clients = _partition(columns, data, by, clients)
    partition = f"by = {_text(by)}"
    if clients is not None:
        partition += f"\nclients = {clients}"
    values = {
        "schema": directive("recipe"),
        "name": _text(path.stem),
        "model": _text(_seen_from(path, model)),
        "data": _text(_seen_from(path, data)),
        "columns": _column_keys(columns, separator),
        "partition": partition,
        "types": ", ".join(f"T{i} = {rank}" for i, rank in enumerate(_ranks(model), start=1)),
    }
    text = TEMPLATE.format_map(values)
    content = tomllib.loads(text)
    resolve_sources(content, path.parent, Path())
    recipe = checked(content, f"recipe {path}")
    made = recipe.clients()
    recipe.fleet_of(made)
    path.write_text(text, encoding="utf-8")
    shape = f"{columns.prompt} → {columns.completion}"
    how = f"one for each {by}" if clients is None else "with equal shares of the rows"
    return NewRecipe(path, (f"columns: {shape}", f"{len(made.seen)} training clients, {how}"))


def _source(data: str) -> tuple[Source, str | None]:
    """Return the source of the data and, for a text file, what divides its lines."""
    name = str(TASKS) if data == SAMPLE else data
    text = Path(name).suffixes[:1] == [".txt"]
    return Source(name, separator="\t" if text else None), "\t" if text else None


def _columns(source: Source, prompt: str | None, completion: str | None) -> Columns:
    """Return which columns are what; RecipeError with all of them if their names do not tell."""
    rows = [*itertools.islice(source.rows(), ROWS)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    for option, name in (("prompt", prompt), ("completion", completion)):
        if name is not None and name not in names:
            raise RecipeError(f"--{option}: {source.name} has no column {name!r}; it has {names}")
    answer = completion or _first(COMPLETIONS, names)
    question = prompt or _first(PROMPTS, [name for name in names if name != answer])
    if question is None or answer is None or question == answer:
        raise RecipeError(
            f"{source.name}: the names of its columns, {names}, do not tell which is the prompt "
            "and which the completion; say it: --prompt COLUMN --completion COLUMN"
        )
    rest = [name for name in names if name not in (question, answer)]
    values = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return Columns(question, _first(INPUTS, rest), answer, values)


def _first(known: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in known if name in by_lower), None)


def _partition(
    columns: Columns, data: str, by: str | None, clients: int | None
) -> tuple[str, int | None]:
    """Return the partition and the number of clients, None where a column tells them apart."""
    if by is not None and by not in columns.values:
        raise RecipeError(f"--by: {data} has no column {by!r}; it has {[*columns.values]}")
    if by is not None and clients is not None:
        raise RecipeError(
            f"--by and --clients: every value of {by!r} is a client, and there are "
            f"{columns.clients(by)}; leave --clients out, or --by for equal shares of the rows"
        )
    if clients is not None:
        return "iid", clients
    owner = by or _first(OWNERS, [name for name in columns.values if _tells_owners(columns, name)])
    if owner is None:
        raise RecipeError(
            f"{data}: no column tells who has which row; say how many clients share the rows, "
            f"--clients 6, or the column whose values are the clients: --by, of {[*columns.values]}"
        )
    return owner, None


def _tells_owners(columns: Columns, name: str) -> bool:
    """Whether a column has several values, each in several rows."""
    counts = Counter(map(str, columns.values[name]))
    return len(counts) > 1 and sum(count > 2 for count in counts.values()) > len(counts) / 2


def _column_keys(columns: Columns, separator: str | None) -> str:
    """The keys that say what is what, without those that are the defaults."""
    keys = {"prompt": columns.prompt, "completion": columns.completion, "separator": separator}
    if columns.input is not None:
        keys["input"] = columns.input
    return "\n".join(f"{key} = {_text(name)}" for key, name in keys.items() if name is not None)


def _ranks(model: str) -> tuple[int, ...]:
    """The ranks of four types: smaller ones for a model, in a folder, that is very narrow."""
    file = (MODEL if model == SAMPLE else Path(model).expanduser()) / "config.json"
    try:
        width = json.loads(file.read_text(encoding="utf-8")).get("hidden_size", 0)
    except (OSError, ValueError, AttributeError):
        return RANKS
    return RANKS if not isinstance(width, int) or width >= 4 * RANKS[-1] else (1, 2, 4, 8)


def _seen_from(recipe: Path, source: str) -> str:
    """A folder or file as the recipe's folder sees it; names of a hub stay as they are."""
    path = Path(source).expanduser()
    if source == SAMPLE or not path.exists():
        return source
    return os.path.relpath(path.resolve(), recipe.parent.resolve())


def _text(value: str) -> str:
    """A text in TOML; JSON's texts are TOML's."""
    return json.dumps(value, ensure_ascii=False)


TEMPLATE = """\
{schema}
# Made by polyrank init. Editors that read the line above show every key and what it takes.

name = {name}                     # the run's folder: runs/NAME
rounds = 10                      # of local training and aggregation
seed = 0                         # from it every random choice derives

[model]
source = {model}
# sites = ["q_proj", "v_proj"]   # the matrices that are adapted; left out, all in the blocks

[data]
source = {data}
{columns}
{partition}
# unseen = 0.2                   # hold a fifth of the clients out, to test on who never trained
# max_length = 512               # tokens of an example; left out, the model's context

[fleet]
types = {{ {types} }}   # LoRA ranks, the weakest type first
distribution = "uniform"         # or shares: {{ T1 = 0.5, T2 = 0.5 }}, or heavy-tail-light, normal
# cuts = {{ T1 = 2 }}              # T1 runs 2 blocks, the server the rest: split learning

[aggregation]
rule = "flexlora:delta"          # polyrank compare tries others on the same data

[local]
lr = 1e-3                        # polyrank compare --tune chooses one
epochs = 1                       # passes over a client's data in a round
batch = 8

[sampling]
fraction = 1.0                   # of the clients, in each round

[evaluation]
every = 1                        # rounds between two validations
generate = 4                     # answers per client that are generated at both ends of the run
"""
