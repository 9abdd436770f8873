"""What the split server's process is to hold and to serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from polyrank.errors import RecipeError, SplitServerError
from polyrank.model import LoadedModel, Span, load_model
from polyrank.training.split import SplitSettings


@dataclass(frozen=True)
class HostedModel:
    """A model of which only the blocks from `lower` on are held, in a U-shape those below `upper`.

    `lower` is the lowest cut of all clients, `upper` the highest upper one if all clients have one.
    The others are those of `load_model`.
    """

    source: str
    lower: int
    upper: int | None = None
    revision: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    sites: str | list[str] = "all-linear"
    exclude: list[str] = field(default_factory=list)
    groups: dict[str, list[str]] | None = None
    checkpointing: bool = False

    def load(self) -> LoadedModel:
        """Return the model with these blocks; raises what `load_model` raises."""
        return load_model(
            self.source,
            device=self.device,
            dtype=self.dtype,
            sites=self.sites,
            exclude=self.exclude,
            groups=self.groups,
            checkpointing=self.checkpointing,
            revision=self.revision,
            spans=[Span(self.lower, self.upper)],
        )


@dataclass(frozen=True)
class SplitServerSettings:
    """All that the split server's process is told, once, when it starts.

    `run` is the run's id. `listen` is the address that it binds to, and no other (port 0: a free
    one), `address` what clients dial (default: the bound one), and `hosts` the names and addresses
    that its certificate is for (default: the one that clients dial). Up to `cohort` clients of one
    cut with adapters of their own are trained in one pass, once their frames are there or `gather`
    seconds after the first; `deterministic` trains each alone, and clients that share an adapter
    one after the other. A client that is silent for `silence` seconds has left; `patience` is how
    many seconds a client waits for an answer, and at most `streams` clients are connected.
    `threads` are torch's; 0: its own choice.

    Raises RecipeError if `deterministic` meets another cohort than 1, or a number is out of range.
    """

    model: HostedModel
    run: str
    split: SplitSettings = field(default_factory=SplitSettings)
    listen: str = "127.0.0.1:0"
    address: str | None = None
    hosts: list[str] = field(default_factory=list)
    cohort: int = 1
    deterministic: bool = False
    threads: int = 0
    gather: float = 0.02
    silence: float = 60.0
    patience: float = 60.0
    streams: int = 256

    def __post_init__(self) -> None:
        if self.cohort < 1 or (self.deterministic and self.cohort != 1):
            raise RecipeError(
                f"split server: expected a cohort of 1 or more, and of 1 where the run is "
                f"deterministic; got {self.cohort}"
            )
        for name in ("gather", "silence", "patience", "threads"):
            if not getattr(self, name) >= 0:
                raise RecipeError(
                    f"split server, {name}: expected 0 or more, got {getattr(self, name)}"
                )

    @property
    def certified(self) -> list[str]:
        """The names that the certificate is for."""
        dialled = self.address or self.listen
        host, _, port = dialled.rpartition(":")
        whole = bool(host) and port.isdigit() and (":" not in host or host.endswith("]"))
        return self.hosts or [(host if whole else dialled).strip("[]")]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self)

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> SplitServerSettings:
        """Return what `to_dict` gave; SplitServerError for anything else."""
        try:
            model, split = HostedModel(**found["model"]), SplitSettings(**found["split"])
            return SplitServerSettings(**{**found, "model": model, "split": split})
        except (TypeError, KeyError) as error:
            raise SplitServerError(f"split server, settings: not readable: {error}") from error
