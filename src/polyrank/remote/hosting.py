"""A client's machine, from what Flower tells its app and what its owner has written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from polyrank.config import Recipe
from polyrank.config.app import AppSettings, Scalar, app_settings
from polyrank.config.client import ClientSettings, read_client
from polyrank.config.flower import from_run_config
from polyrank.data import Clients
from polyrank.errors import RecipeError
from polyrank.model import LoadedModel, Span
from polyrank.model.settings import ModelSettings
from polyrank.planning import CutPoint
from polyrank.remote.client import ClientNode
from polyrank.training import ClientWork, prepare

PARTITION, PARTITIONS, CLIENT = "partition-id", "num-partitions", "client"
"""Keys of Flower's node config: the first two in simulation, the third names a client.toml."""

NO_CLIENT_FILES = (
    "data.source = 'client': a simulated machine has no data of its own; give the client.toml "
    "files of the machines to simulate, -c 'app.client-files=\"/data/clients/*.toml\"', or run "
    "the app on the clients' own machines"
)


def client_node(run_config: Mapping[str, Scalar], node_config: Mapping[str, Scalar]) -> ClientNode:
    """Return the machine; made once in a process for the same configuration.

    RecipeError if neither a client.toml is named nor a partition given, or one cannot be read.
    """
    return _client_node(json.dumps(dict(run_config)), json.dumps(dict(node_config)))


@lru_cache(maxsize=2)
def _client_node(run_config: str, node_config: str) -> ClientNode:
    flat, node = json.loads(run_config), json.loads(node_config)
    recipe = from_run_config(flat, at_server=False)
    if CLIENT in node:
        return _deployed(recipe, read_client(Path(str(node[CLIENT])).expanduser()))
    if PARTITION in node and PARTITIONS in node:
        partition, partitions = int(node[PARTITION]), int(node[PARTITIONS])
        if recipe.data.at_clients:
            files = client_files(app_settings(flat), partitions)
            return _deployed(recipe, read_client(files[partition]))
        return _simulated(recipe, _shared_in_process(run_config), partition, partitions)
    raise RecipeError(
        'node config: expected client = "/path/to/client.toml" (flower-supernode --node-config '
        f"'client=\"…\"'), got {sorted(node) or 'nothing'}"
    )


def client_files(settings: AppSettings, machines: int) -> list[Path]:
    """Return the client.toml of each simulated machine; RecipeError if their number differs."""
    if not settings.client_files:
        raise RecipeError(NO_CLIENT_FILES)
    pattern = Path(settings.client_files)
    files = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not files:
        raise RecipeError(f"app.client-files: {settings.client_files!r} matches no file")
    if len(files) != machines:
        raise RecipeError(
            f"app.client-files: {settings.client_files!r} matches {len(files)} files, and "
            f"{machines} machines are simulated; give num-supernodes={len(files)}"
        )
    return files


class RecipeModel:
    """The model as a recipe's section says; with `full_only` all of it, also for split clients."""

    def __init__(self, section: ModelSettings, *, full_only: bool):
        self._section, self._full_only = section, full_only
        self.full = lru_cache(1)(self._section.load)
        self.bare = lru_cache(1)(self._section.load_bare)

    def client_part(self, cut: CutPoint) -> LoadedModel:
        """Return the blocks below the cut and, in a U-shape, the last ones."""
        if self._full_only:
            return self.full()
        own = [Span(0, cut.lower)] + ([] if cut.upper is None else [Span(cut.upper)])
        return self._section.load(own)


class PreparedClients:
    """The work of the clients that are here, made once."""

    def __init__(self, clients: Clients, recipe: Recipe):
        self._clients, self._encoding = clients, recipe.data.encoding()
        self._work: Mapping[str, ClientWork] | None = None

    def __call__(self, model: LoadedModel) -> Mapping[str, ClientWork]:
        """Return the work; the model gives the tokenizer."""
        if self._work is None:
            self._work, _ = prepare(self._clients, model, self._encoding)
        return self._work

    def only(self, names: Collection[str]) -> Callable[[LoadedModel], Mapping[str, ClientWork]]:
        """Return what gives the work of these clients alone."""
        return lambda model: {id: work for id, work in self(model).items() if id in names}


def _deployed(recipe: Recipe, own: ClientSettings) -> ClientNode:
    torch.set_num_threads(own.threads(recipe))
    return ClientNode(
        RecipeModel(own.model_of(recipe), full_only=False),
        PreparedClients(own.clients(recipe), recipe),
        recipe.local,
        recipe.split,
        recipe.evaluation,
        own.limits,
        own.profile(recipe.model.dtype),
    )


def _simulated(
    recipe: Recipe, shared: _SharedInProcess, partition: int, partitions: int
) -> ClientNode:
    """Every so many clients of the recipe's data, which are trained one after the other."""
    return ClientNode(
        shared.models,
        shared.prepared.only([*shared.clients][partition::partitions]),
        recipe.local,
        recipe.split,
        recipe.evaluation,
    )


class _SharedInProcess:
    """Model, clients and their work, which the simulated machines of a process share."""

    def __init__(self, recipe: Recipe):
        if recipe.engine.threads:  # Otherwise what the simulation's resources leave.
            torch.set_num_threads(recipe.engine.threads)
        self.models = RecipeModel(recipe.model, full_only=True)
        self.clients = recipe.clients()
        self.prepared = PreparedClients(self.clients, recipe)


@lru_cache(maxsize=1)
def _shared_in_process(run_config: str) -> _SharedInProcess:
    return _SharedInProcess(from_run_config(json.loads(run_config), at_server=False))
