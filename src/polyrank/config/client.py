"""client.toml, the settings of a client's machine by its owner; it never leaves the machine."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from polyrank.config.reading import listed
from polyrank.config.recipe import Recipe, cores
from polyrank.config.validation_errors import STRICT, validated
from polyrank.data import Clients, single
from polyrank.data.settings import ReadingSettings
from polyrank.errors import PolyrankError, RecipeError
from polyrank.model.settings import ModelSettings
from polyrank.planning import DEVICES, DeviceProfile, device
from polyrank.protocol.client_info import ClientPolicy
from polyrank.sample import SAMPLE
from polyrank.seeds import derive
from polyrank.settings import Expected

LONGEST_NAME = 200

Bytes = Annotated[int | float | str | None, Expected('bytes, or a text such as "6 GiB"')]
Rate = Annotated[
    int | float | str | None, Expected('operations a second, or a text such as "1.2 TFLOPS"')
]
Link = Annotated[
    int | float | str | None, Expected('bytes a second, or a text such as "100 Mbit/s"')
]
Seconds = Annotated[int | float | str | None, Expected('seconds, or a text such as "20 ms"')]


@dataclass(frozen=True, kw_only=True)
class OwnData(ReadingSettings):
    """The client's examples; they are read here, and no text of them is sent."""

    source: str
    """A file or a folder, seen from the folder of client.toml; or a data set of the hub."""
    limit: Annotated[int, Ge(1)] | None = None
    """Use at most so many examples, chosen by the run's seed; the recipe's `data.limit` holds
    too."""


@dataclass(frozen=True)
class OwnModel:
    """Where the base model lies and runs on this machine; left out, as the recipe says."""

    source: str | None = None
    """A folder with the recipe's base, seen from the folder of client.toml. A configuration
    that differs is found out, weights that differ are not."""
    device: str = "auto"
    """`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`."""
    threads: Annotated[int, Ge(0)] = 0
    """Threads of torch; 0: as the recipe says. With `deterministic` the bytes of an update may
    depend on it."""


@dataclass(frozen=True)
class OwnDevice:
    """What the machine offers, where the recipe plans ranks and cuts; the server is told."""

    profile: str | None = None
    """A device of [this list](devices.md), such as `jetson-orin-nano-8gb`; other keys change it."""
    memory: Bytes = None
    """What training may use."""
    flops: Rate = None
    """Arithmetic; left out, not considered."""
    up: Link = None
    """The link to the server; left out, not considered."""
    down: Link = None
    """The link from the server; left out, not considered."""
    latency: Seconds = None
    """How long a message takes one way."""

    def build(self, name: str, dtype: str = "float32") -> DeviceProfile:
        """Return the device, for training in that dtype; RecipeError for figures that cannot be."""
        given = {key: item for key, item in asdict(self).items() if item is not None}
        given.pop("profile", None)
        named = {} if self.profile is None else device(self.profile, dtype=dtype).written
        return DeviceProfile.of(name, **{"memory": None, **named, **given})


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """A client's machine. Its TOML sections are the fields here."""

    __pydantic_config__ = STRICT

    name: str
    """The client's name in the run: its split of the data and its place in the fleet go by it."""
    category: str | None = None
    """What reports group it by; left out, the column `category`, where all examples agree."""
    data: OwnData
    model: OwnModel = field(default_factory=OwnModel)
    device: OwnDevice = field(default_factory=OwnDevice)
    limits: ClientPolicy = field(default_factory=ClientPolicy)

    def clients(self, recipe: Recipe) -> Clients:
        """Load the examples; return the one client, split as in a run where all data is together.

        Raises DataError for a source that cannot be read.
        """
        limits = (self.data.limit, recipe.data.limit)
        return single(
            self.data.tasks(),
            self.name,
            category=self.category,
            fractions=recipe.data.fractions,
            limit=min((limit for limit in limits if limit is not None), default=None),
            seed=derive(recipe.seed, "data"),
        )

    def model_of(self, recipe: Recipe) -> ModelSettings:
        """Return the recipe's model as it is loaded on this machine."""
        changed: dict[str, Any] = {"device": self.model.device}
        if self.model.source is not None:
            changed |= {"source": self.model.source, "revision": None}
        return replace(recipe.model, **changed)

    def threads(self, recipe: Recipe) -> int:
        """Return the threads to compute with."""
        return self.model.threads or recipe.engine.threads or cores()

    def profile(self, dtype: str = "float32") -> DeviceProfile | None:
        """Return what the machine offers for training in that dtype; None if it is not said."""
        if self.device == OwnDevice():
            return None
        return self.device.build(self.name, dtype)


def read_client(path: str | Path) -> ClientSettings:
    """Read a client.toml. Its files and folders are seen from the folder that it lies in.

    Raises RecipeError, naming the file, for one that is missing or malformed, for unknown keys,
    wrong types and impossible values, all that are found at once.
    """
    file = Path(path).expanduser()
    place = f"client {file}"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{place}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{place}: not valid TOML: {error}") from error
    for name in ("data", "model"):
        _resolve(content.get(name), file.parent)
    settings, mistakes = validated(ClientSettings, content, "a client.toml")
    if settings is not None:
        mistakes = [*_impossible(settings)]
    if settings is None or mistakes:
        raise RecipeError(listed(place, mistakes))
    return settings


def _resolve(section: Any, folder: Path) -> None:
    """Make a source that exists beside client.toml an absolute path; others stay as they are."""
    source = section.get("source") if isinstance(section, dict) else None
    if isinstance(source, str) and source not in ("", SAMPLE):
        path = folder / Path(source).expanduser()
        section["source"] = str(path.resolve()) if path.exists() else source


def _impossible(settings: ClientSettings) -> Iterator[str]:
    """What cannot be though every key is well formed, a line each."""
    name = settings.name
    if not name.strip() or not name.isprintable() or len(name) > LONGEST_NAME:
        yield f"name: expected 1 to {LONGEST_NAME} printable characters, got {name!r}"
    if not settings.data.source:
        yield "data.source: expected a file, a folder or a data set of the hub, got an empty text"
    profile = settings.device.profile
    if profile is not None and profile not in DEVICES:
        near = difflib.get_close_matches(profile, DEVICES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(DEVICES)}"
        yield f"device.profile: no device {profile!r}; {hint}"
        return
    try:
        settings.profile()
    except PolyrankError as error:
        yield str(error).replace(f"devices.{name}.", "device.")
