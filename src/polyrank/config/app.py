"""What a Flower app's run config says beside the recipe: the keys that begin with ``app``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from polyrank.config.reading import listed, toml_value
from polyrank.config.section import Section
from polyrank.config.validation_errors import keys, mistakes
from polyrank.errors import RecipeError

Scalar = bool | int | float | str

PLACE = "run config"
OWN = "app."
"""Keys that begin so are the app's own, not the recipe's."""

EVERYWHERE = ("0.0.0.0", "[::]")
"""Hosts to listen on that are no address for clients."""


class SplitServer(Section):
    """How split clients reach the server, and how long it waits for them."""

    listen: str = "127.0.0.1:0"
    """Address on which the split server listens; port 0: a free one."""
    address: str = ""
    """Host, or host:port, under which clients reach it; left out, where it listens."""
    gather: float = Field(default=0.02, ge=0)
    """Seconds to wait, after one client's activations came, for those of others, to serve all in
    one pass."""
    silence: float = 60.0
    """Seconds after which a client that is not heard of has left."""
    patience: float = 60.0
    """Seconds that a client waits for an answer, reconnecting included."""


class AppSettings(Section):
    """What the server's part of a Flower app is told beside the recipe."""

    out: str = ""
    """The run's folder on the server, seen from where its SuperLink was started. Left out, a new
    one: `runs/NAME`, or `runs/NAME-2` and so on."""
    resume: bool = False
    """Go on with the run in `app.out`, which was begun with the same settings. Otherwise `app.out`
    must not exist."""
    clients: int = Field(default=0, ge=0)
    """How many clients to wait for; 0: those that the fleet names, or all that answer."""
    wait: float = Field(default=300.0, ge=0)
    """Seconds to wait for them."""
    client_files: str = ""
    """In a simulation where every client brings its own data: the client.toml files of the
    simulated machines, an absolute pattern such as `/data/clients/*.toml`; as many files as
    machines."""
    allow_inexact: bool = False
    """Resume in another environment; bytes may differ."""
    split: SplitServer = SplitServer()


class _Config(Section):
    """The table in which the keys stand."""

    app: AppSettings = AppSettings()


APP_KEYS: Mapping[str, Scalar] = {
    key.replace("_", "-"): field.default for key, field in keys(AppSettings, OWN)
}
"""The app's own keys in a run config, with their defaults."""


def own_keys(overrides: Sequence[str]) -> dict[str, Scalar]:
    """Return the app's own keys with these ``key=value`` changes; RecipeError as `app_settings`.

    Values are TOML, or else a text, as a recipe's are.
    """
    found = dict(APP_KEYS)
    for override in overrides:
        key, _, text = (part.strip() for part in override.partition("="))
        found[key] = toml_value(text) if text else ""
    app_settings(found)
    return found


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
    try:
        settings = _Config.model_validate(content).app
    except ValidationError as error:
        found = mistakes(_Config, content, error, "the app")
        raise RecipeError(_told(found)) from error
    found = [*_impossible(settings.split)]
    if settings.client_files and not Path(settings.client_files).is_absolute():
        found.append(
            f"app.client-files: expected an absolute pattern, got {settings.client_files!r}"
        )
    if settings.resume and not settings.out:
        found.append("app.resume: give app.out too, the folder of the run to go on with")
    if found:
        raise RecipeError(_told(found))
    return settings


def _told(found: list[str]) -> str:
    """One message of all mistakes, the keys written as in a run config."""
    for key in APP_KEYS:
        found = [line.replace(key.replace("-", "_"), key) for line in found]
    return listed(PLACE, found)


def _impossible(split: SplitServer) -> list[str]:
    """What of the split server's settings cannot be, a line each."""
    found = [
        f"app.split.{key}: expected seconds above 0, got {value}"
        for key, value in (("silence", split.silence), ("patience", split.patience))
        if value <= 0
    ]
    host, _, port = split.listen.rpartition(":")
    if not host or not _is_port(port):
        found.append(
            f"app.split.listen: expected host:port, e.g. 127.0.0.1:9099, got {split.listen!r}"
        )
    elif host in EVERYWHERE and not split.address:
        found.append(
            f"app.split.address: {split.listen} is every address of this machine, and none that "
            "clients can reach; give the one that they use"
        )
    host, colon, port = split.address.rpartition(":")
    if colon and not split.address.endswith("]") and (not host or not _is_port(port)):
        found.append(f"app.split.address: expected host or host:port, got {split.address!r}")
    return found


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) < 2**16
