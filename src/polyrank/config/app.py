"""The keys of a Flower app's run config that begin with ``app``, beside those of the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt

from polyrank.config.keys import all_keys
from polyrank.config.reading import listed, toml_value
from polyrank.config.validation_errors import STRICT, validated
from polyrank.errors import RecipeError

Scalar = bool | int | float | str

PLACE = "run config"
OWN = "app."
"""Keys that begin so are the app's own, not the recipe's."""

ALLOW_CODE = "app.allow-code"

EVERYWHERE = ("0.0.0.0", "[::]")
"""Hosts to listen on that are no address for clients."""


@dataclass(frozen=True)
class SplitServer:
    """How split clients reach the server, and how long it waits for them."""

    listen: str = "127.0.0.1:0"
    """Address on which the split server listens; port 0: a free one."""
    address: str = ""
    """Host, or host:port, under which clients reach it; left out, where it listens."""
    gather: Annotated[float, Ge(0)] = 0.02
    """Seconds to wait, after one client's activations came, for those of others, to serve all in
    one pass."""
    silence: Annotated[float, Gt(0)] = 60.0
    """Seconds after which a client that is not heard of has left."""
    patience: Annotated[float, Gt(0)] = 60.0
    """Seconds that a client waits for an answer, reconnecting included."""


@dataclass(frozen=True)
class AppSettings:
    """Settings of a Flower app's server beside the recipe."""

    out: str = ""
    """The run's folder on the server, seen from where its SuperLink was started. Left out, a new
    one: `runs/NAME`, or `runs/NAME-2` and so on."""
    resume: bool = False
    """Go on with the run in `app.out`, which was begun with the same settings. Otherwise `app.out`
    must not exist."""
    clients: Annotated[int, Ge(0)] = 0
    """How many clients to wait for; 0: those that the fleet names, or all that answer."""
    wait: Annotated[float, Ge(0)] = 300.0
    """Seconds to wait for them."""
    client_files: str = ""
    """In a simulation where every client brings its own data: the client.toml files of the
    simulated machines, an absolute pattern such as `/data/clients/*.toml`; as many files as
    machines."""
    allow_inexact: bool = False
    """Resume in another environment; bytes may differ."""
    allow_code: str = ""
    """A folder on the server from which the recipe's rule, `aggregation.rule = "module:Class"`, may
    be imported. Left out, no such code is run. Clients never import it."""
    split: SplitServer = SplitServer()


@dataclass(frozen=True)
class _Config:
    """The table in which the keys stand."""

    __pydantic_config__ = STRICT

    app: AppSettings = AppSettings()


APP_KEYS: Mapping[str, Scalar] = {
    name.replace("_", "-"): key.default for name, key in all_keys(AppSettings, OWN)
}
"""The app's own keys in a run config, with their defaults."""


def own_keys(overrides: Sequence[str]) -> dict[str, Scalar]:
    """Return the app's own keys with these ``key=value`` changes; RecipeError as `app_settings`.

    Values are TOML, or else a text, as a recipe's are.
    """
    flat = dict(APP_KEYS)
    for override in overrides:
        key, _, text = (part.strip() for part in override.partition("="))
        flat[key] = toml_value(text) if text else ""
    app_settings(flat)
    return flat


def app_settings(flat: Mapping[str, Scalar]) -> AppSettings:
    """Return the app's own settings of a run config; an empty text is the default.

    Raises RecipeError, all mistakes at once, for unknown keys, wrong types and impossible values.
    """
    content: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        if key.startswith(OWN) and value != "":
            inside = content.setdefault("app", {})
            *sections, last = key.removeprefix(OWN).replace("-", "_").split(".")
            for name in sections:
                inside = inside.setdefault(name, {})  # type: ignore[assignment]
            inside[last] = value
    config, problems = validated(_Config, content, "the app")
    if config is not None:
        problems = [*_impossible(config.app)]
    if config is None or problems:
        raise RecipeError(_listed(problems))
    return config.app


def _listed(problems: Iterable[str]) -> str:
    """One message of all mistakes, the keys written as in a run config."""
    lines = [*problems]
    for key in APP_KEYS:
        lines = [line.replace(key.replace("-", "_"), key) for line in lines]
    return listed(PLACE, lines)


def _impossible(app: AppSettings) -> Iterator[str]:
    """Yield a line for everything that cannot be though every key is well formed."""
    if app.client_files and not Path(app.client_files).is_absolute():
        yield f"app.client-files: expected an absolute pattern, got {app.client_files!r}"
    if app.resume and not app.out:
        yield "app.resume: give app.out too, the folder of the run to go on with"
    split = app.split
    host, _, port = split.listen.rpartition(":")
    if not host or not _is_port(port):
        yield f"app.split.listen: expected host:port, e.g. 127.0.0.1:9099, got {split.listen!r}"
    elif host in EVERYWHERE and not split.address:
        yield (
            f"app.split.address: {split.listen} is every address of this machine, and none that "
            "clients can reach; give the one that they use"
        )
    host, colon, port = split.address.rpartition(":")
    if colon and not split.address.endswith("]") and (not host or not _is_port(port)):
        yield f"app.split.address: expected host or host:port, got {split.address!r}"


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) < 2**16
