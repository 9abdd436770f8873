"""What the owner of a client's machine says of it: client.toml, which never leaves the machine.

The text below a key is its entry in docs/reference/client.md, which is made from here.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from polyrank.config.model_and_data import SAMPLE, DataSection, ModelSection
from polyrank.config.reading import listed
from polyrank.config.recipe import Recipe, cores
from polyrank.config.section import Expected, Section
from polyrank.config.validation_errors import mistakes
from polyrank.data import Clients, single
from polyrank.errors import PolyrankError, RecipeError
from polyrank.planning import DEVICES, DeviceProfile, device
from polyrank.protocol.client_info import ClientPolicy
from polyrank.seeds import derive

LONGEST_NAME = 200

Bytes = Annotated[int | float | str | None, Expected('bytes, or a text such as "6 GiB"')]
Rate = Annotated[
    int | float | str | None, Expected('operations a second, or a text such as "1.2 TFLOPS"')
]
Link = Annotated[
    int | float | str | None, Expected('bytes a second, or a text such as "100 Mbit/s"')
]
Seconds = Annotated[int | float | str | None, Expected('seconds, or a text such as "20 ms"')]


class OwnData(Section):
    """The client's examples; they are read here, and no text of them is sent."""

    source: str
    """A file or a folder, seen from the folder of client.toml; or a data set of the hub."""
    split: str | None = None
    """Which split, where the source has several."""
    subset: str | None = None
    """A hub data set's configuration."""
    revision: str | None = None
    """A hub data set's branch, tag or commit."""
    format: str = "auto"
    """`json`, `csv`, `tsv`, `text`, `parquet`, `folder` or `hub`, where the name does not tell."""
    prompt: str | None = None
    """Column or format string of the prompt; left out, `instruction`."""
    input: str | None = None
    """Column or format string of the input below the prompt; left out, `input`."""
    completion: str = "output"
    """Column or format string of the answer; a list of references is allowed."""
    separator: str | None = None
    """For text files: what divides a line into input and output."""
    limit: int | None = Field(default=None, ge=1)
    """Use at most so many examples, chosen by the run's seed; the recipe's `data.limit` holds
    too."""


class OwnModel(Section):
    """Where the base model lies and runs on this machine; left out, as the recipe says."""

    source: str | None = None
    """A folder with the recipe's base, seen from the folder of client.toml. A configuration
    that differs is found out, weights that differ are not."""
    device: str = "auto"
    """`auto` (cuda, else mps, else cpu) or a torch device such as `cuda:1`."""
    threads: int = Field(default=0, ge=0)
    """Threads of torch; 0: as the recipe says. With `deterministic` the bytes of an update may
    depend on it."""


class OwnDevice(Section):
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
        given = self.model_dump(exclude={"profile"}, exclude_none=True)
        named = {} if self.profile is None else device(self.profile, dtype=dtype).written
        return DeviceProfile.of(name, **{"memory": None, **named, **given})


class Limits(Section):
    """What the client consents to; what goes beyond is refused here, and the server told why."""

    largest_rank: int | None = Field(default=None, ge=1)
    """The largest LoRA rank that it trains; left out, any."""
    lowest_cut: int | None = Field(default=None, ge=1)
    """In split training, the fewest blocks that it runs itself: the deeper the cut, the less the
    activations that it sends tell; left out, any."""
    labels_may_leave: bool = True
    """Whether a split client's labels may go to the server; false: only a U-shaped cut, which keeps
    them here."""
    smallest_count: int = Field(default=1, ge=0)
    """The smallest number of examples that a count or a score may stand on. What stands on fewer is
    not told, and with fewer training examples the client takes no part."""


class ClientSettings(Section):
    """A client's machine. Its TOML sections are the fields here."""

    name: str
    """The client's name in the run: its split of the data and its place in the fleet go by it."""
    category: str | None = None
    """What reports group it by; left out, the column `category`, where all examples agree."""
    data: OwnData
    model: OwnModel = OwnModel()
    device: OwnDevice = OwnDevice()
    limits: Limits = Limits()

    def clients(self, recipe: Recipe) -> Clients:
        """Load the examples; return the one client, split as in a run where all data is together.

        Raises DataError for a source that cannot be read.
        """
        limits = (self.data.limit, recipe.data.limit)
        reading = DataSection(**self.data.model_dump(exclude={"limit"}))
        return single(
            reading.tasks(self.data.source, self.data.split),
            self.name,
            category=self.category,
            fractions=recipe.data.fractions,
            limit=min((limit for limit in limits if limit is not None), default=None),
            seed=derive(recipe.seed, "data"),
        )

    def model_of(self, recipe: Recipe) -> ModelSection:
        """Return the recipe's model as it is loaded on this machine."""
        changed: dict[str, Any] = {"device": self.model.device}
        if self.model.source is not None:
            changed |= {"source": self.model.source, "revision": None}
        return recipe.model.model_copy(update=changed)

    def threads(self, recipe: Recipe) -> int:
        """Return the threads to compute with."""
        return self.model.threads or recipe.engine.threads or cores()

    def profile(self, dtype: str = "float32") -> DeviceProfile | None:
        """Return what the machine offers for training in that dtype; None if it is not said."""
        if self.device == OwnDevice():
            return None
        return self.device.build(self.name, dtype)

    def terms(self) -> ClientPolicy:
        """Return the limits as they are told to the server."""
        return ClientPolicy(**self.limits.model_dump())


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
    try:
        settings = ClientSettings.model_validate(content)
    except ValidationError as error:
        found = mistakes(ClientSettings, content, error, "a client.toml")
        raise RecipeError(listed(place, found)) from error
    found = [*_impossible(settings)]
    if found:
        raise RecipeError(listed(place, found))
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
