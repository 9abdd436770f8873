"""A Flower app's folder, made from a recipe: text alone, for which Flower need not be installed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import tomli_w

from polyrank.config import Recipe
from polyrank.config.app import APP_KEYS, OWN, AppSettings, Scalar
from polyrank.config.flower import nested, to_run_config
from polyrank.config.keys import all_keys
from polyrank.errors import FolderExistsError, RecipeError
from polyrank.sample import SAMPLE

LONGEST_NAME = 32
"""Characters of a name that Flower takes."""

CLIENT_FILES = "app.client-files"

SIMULATED = 4
"""Simulated machines where a recipe does not tell how many clients there are."""

_PYPROJECT = """\
# A Flower app of polyrank, made by `polyrank app` {version}. README.md has the commands.
[project]
name = "{name}"
version = "{version}"
description = "The recipe {recipe} as a Flower app"
license = "Apache-2.0"
# polyrank is installed on the machines beforehand, with the build of torch that each needs:
# pip install 'polyrank[flower]'. So there is nothing that Flower would have to install.
dependencies = []

[tool.flwr.app]
publisher = "polyrank"
fab-include = ["README.md"]  # what else comes to lie in this folder is sent to nobody

[tool.flwr.app.components]
serverapp = "polyrank.flower.server_app:app"
clientapp = "polyrank.flower.client_app:app"

# Below is the recipe, as a run config: flwr run . -c 'local.lr=1e-3 rounds=5' changes it for a run.
# "" means left out. Lists and tables are texts in TOML. docs/reference/recipes.md has all keys.
"""

_README = """\
# {name}: a Flower app

polyrank's recipe `{recipe}` over [Flower](https://flower.ai). `pyproject.toml` holds the recipe;
the code is polyrank's, which must be installed wherever the app runs:

```
pip install 'polyrank[flower]'
```

Nothing but `pyproject.toml` and this page is sent to the machines. Flower's installing of
dependencies is of no use here: `export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1` before the
first command, or `--disable-runtime-dependency-installation` on the SuperLink, leaves it out.

{simulate}
## Run it on other machines

With a SuperLink named `NAME` in Flower's configuration, and a SuperNode on every client's machine:

```
flwr run . NAME --stream
```

polyrank's `docs/how-to/deployment.md` goes from nothing to there, with TLS and keys.
{client}
## Change it

```
flwr run . -c 'local.lr=1e-3 rounds=5'
flwr run . -c "fleet.types='{{T1 = 4, T2 = 16}}'"
flwr run . -c 'local.epochs="" local.steps=20'
```

Every key of the recipe can be changed, as can those below `app`; `""` leaves a key out. Of
`local.epochs` and `local.steps`, `sampling.fraction` and `sampling.number`, `fleet.distribution`
and `fleet.clients` a recipe gives one, so leave out the other. `plan.cuts` switches `[plan]` on,
`benchmark.validation` or `benchmark.test` `[benchmark]`, and `early_stopping.patience`
`[early_stopping]`.

| key | default | |
|---|---|---|
{keys}

## Watch, stop, resume

```
flwr ls
flwr log RUN_ID
flwr stop RUN_ID
```

(with the SuperLink's `NAME` behind them if it is not the default). The adapter, the records and
`summary.json` lie on the server, in the run's folder, which the log names first. Every run takes a
new folder: `runs/{run}`, then `runs/{run}-2`, and so on, or `app.out`, which must not exist.

A run that was stopped or killed goes on from its last checkpoint, on the same SuperLink or another
one, when it is started again with its folder and the same settings:

```
flwr run . --stream -c 'app.resume=true app.out="runs/{run}"'
```
"""

_SIMULATE = """\
## Simulate it

```
{command}
```

Clients are shared out among the simulated machines, so that any number up to that of the clients
does; each takes a process with a model of its own. Flower starts a SuperLink for it, which stays.
"""

_SIMULATE_CLIENTS = """\
## Simulate it

Every client brings its own data (`data.source = "client"`), so a simulation needs each client's
`client.toml` and data on this machine:

```
{command}
```

`num-supernodes` is the number of files.
"""

_CLIENT = """
Each client's machine has a `client.toml`, like `client.example.toml` here, which stays there:

```
flower-supernode … --node-config 'client="/path/to/client.toml"'
```
"""

_EXAMPLE = """\
# A client's machine; docs/reference/client.md has all keys. It stays there, as does the data.
name = "client-1"               # its split of the data and its place in the fleet go by it

[data]
source = "data.jsonl"           # seen from this file's folder
# prompt = "instruction"        # columns, or format strings such as "{title}: {question}"
# input = "input"
# completion = "output"

[model]
# source = "models/base"        # where the recipe's model lies here; left out, as the recipe says
device = "auto"

[device]                        # where the recipe plans ranks and cuts
# profile = "jetson-orin-nano-8gb"
# memory = "6 GiB"
# up = "20 Mbit/s"
# down = "100 Mbit/s"

[limits]
# largest_rank = 16
# lowest_cut = 1
labels_may_leave = true
smallest_count = 1
"""


@dataclass(frozen=True)
class AppFolder:
    """A folder that was written: what was changed on the way, and what to do next, as lines."""

    path: Path
    notes: tuple[str, ...]
    next: tuple[str, ...]


def write_app(recipe: Recipe, folder: Path, *, own: Mapping[str, Scalar] = APP_KEYS) -> AppFolder:
    """Write a recipe as a Flower app into a new folder; `own` are the app's keys beside it.

    Local sources stand in it as absolute paths, a fleet's trace by what it holds. A homogeneous
    control, which is a run of its own, is left out.

    Raises FolderExistsError if the folder exists, RecipeError for what cannot run over Flower, and
    DataError or RecipeError if the recipe's data is here and cannot be divided among clients.
    """
    if folder.exists() or folder.is_symlink():
        raise FolderExistsError(f"{folder}: exists already; choose another folder")
    if recipe.data.pooled:
        raise RecipeError(
            "data.pooled: clients over Flower keep their data, so there is no centralised run; use "
            "polyrank run"
        )
    if recipe.data.source == SAMPLE or Path(recipe.data.source).exists():
        recipe.fleet_of(recipe.clients())  # What is wrong with them shows here, not on machines.
    fleet = recipe.fleet.resolved()
    written = replace(recipe, control=None, fleet=fleet)
    files = {
        "pyproject.toml": _pyproject(written, folder, own),
        "README.md": _readme(written, folder, own),
    }
    if recipe.data.at_clients:
        files["client.example.toml"] = _EXAMPLE
    folder.mkdir(parents=True)
    try:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError:
        shutil.rmtree(folder)
        raise
    notes = () if recipe.control is None else (_control(recipe.control),)
    return AppFolder(folder, notes, _next(written, folder, own))


def project_name(folder: Path) -> str:
    """Return the name of the folder as Flower takes it: letters, digits and hyphens."""
    plain = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    named = plain if plain[:1].isalpha() else f"app-{plain}"
    return named[:LONGEST_NAME].rstrip("-")


def _pyproject(recipe: Recipe, folder: Path, own: Mapping[str, Scalar]) -> str:
    head = _PYPROJECT.format(
        name=project_name(folder), version=metadata.version("polyrank"), recipe=_text(recipe.name)
    )
    config = nested({**to_run_config(recipe), **own})
    return head + tomli_w.dumps({"tool": {"flwr": {"app": {"config": config}}}})


def _readme(recipe: Recipe, folder: Path, own: Mapping[str, Scalar]) -> str:
    away = recipe.data.at_clients
    simulate = _SIMULATE_CLIENTS if away else _SIMULATE
    return _README.format(
        name=project_name(folder),
        recipe=recipe.name,
        run=recipe.name,
        simulate=simulate.format(command=_simulation(recipe, ".", own)),
        client=_CLIENT if away else "",
        keys="\n".join(_keys()),
    )


def _keys() -> Iterator[str]:
    for name, key in all_keys(AppSettings, OWN):
        yield f"| `{name.replace('_', '-')}` | `{json.dumps(key.default)}` | {key.meaning} |"


def _simulation(recipe: Recipe, app: str | Path, own: Mapping[str, Scalar]) -> str:
    """The command that simulates the app, with few machines where they may share the clients."""
    machines: int | str = recipe.data.clients or len(recipe.fleet.clients or ())
    files = ""
    if recipe.data.at_clients:
        machines = machines or "N"
        if not own.get(CLIENT_FILES):
            files = f""" -c '{CLIENT_FILES}="/path/to/clients/*.toml"'"""
    else:
        machines = min(machines or SIMULATED, SIMULATED)
    size = f"num-supernodes={machines} client-resources-num-cpus=1"
    return f"flwr run {app} --stream --federation-config '{size}'{files}"


def _text(name: str) -> str:
    """A name within a TOML text."""
    return tomli_w.dumps({"x": name}).removeprefix('x = "').rstrip("\n").removesuffix('"')


def _control(control: str) -> str:
    return (
        f"control = {control!r} is left out, being a run of its own: make a second app for it, "
        f"with fleet.force={control}"
    )


def _next(recipe: Recipe, folder: Path, own: Mapping[str, Scalar]) -> tuple[str, ...]:
    simulation = _simulation(recipe, folder, own)
    superlink = f"run it on a SuperLink:  flwr run {folder} NAME --stream"
    more = f"more:                   {folder / 'README.md'}"
    if not recipe.data.at_clients:
        return f"simulate it:            {simulation}", superlink, more
    return (
        f"each client's machine:  a client.toml, like {folder / 'client.example.toml'}",
        superlink,
        f"simulate it:            {simulation}",
        "                        with all clients' files and data on this machine",
        more,
    )
