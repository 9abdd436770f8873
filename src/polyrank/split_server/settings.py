"""Settings of the split server's process: the model that it holds, and how it serves clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from polyrank.errors import RecipeError, SplitServerError
from polyrank.model import LoadedModel, Span, load_model
from polyrank.training.split import SplitSettings
from polyrank.transport.serving import ServingSettings


@dataclass(frozen=True)
class HostedModel:
    """A model of which only some blocks are loaded: those from `lower` on and below `upper`.

    `lower` is the lowest cut of all clients, `upper` the highest upper cut if all clients have one
    (U-shape), else None: to the last block. The other fields are those of `load_model`.
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

    `run` is the run's id. The server binds to `listen` alone (port 0: a free one); clients dial
    `address` (default: the bound one). The certificate is for `hosts` (names and IP addresses;
    default: the host that clients dial). Up to `cohort` clients of one cut with adapters of their
    own are trained in one pass; with `deterministic` each is trained alone, and clients that share
    an adapter one after the other. A client waits `patience` seconds for an answer. `threads` are
    torch's; 0: its own choice. The `credit` and `turns` of `serving` follow from the other
    settings.

    Raises RecipeError if `deterministic` is set and the cohort is not 1, or a number is negative.
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
    serving: ServingSettings = field(default_factory=ServingSettings)
    patience: float = 60.0

    def __post_init__(self) -> None:
        if self.cohort < 1 or (self.deterministic and self.cohort != 1):
            raise RecipeError(
                f"split server: expected a cohort of 1 or more, and of 1 where the run is "
                f"deterministic; got {self.cohort}"
            )
        for name in ("patience", "threads"):
            if not getattr(self, name) >= 0:
                raise RecipeError(
                    f"split server, {name}: expected 0 or more, got {getattr(self, name)}"
                )

    @property
    def certified(self) -> list[str]:
        """The hosts that the certificate is for."""
        dialled = self.address or self.listen
        host, _, port = dialled.rpartition(":")
        whole = bool(host) and port.isdigit() and (":" not in host or host.endswith("]"))
        return self.hosts or [(host if whole else dialled).strip("[]")]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON has them."""
        return asdict(self)

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> SplitServerSettings:
        """Return the settings that `to_dict` wrote; SplitServerError for anything else."""
        try:
            parts = {
                "model": HostedModel(**given["model"]),
                "split": SplitSettings(**given["split"]),
                "serving": ServingSettings(**given["serving"]),
            }
            return SplitServerSettings(**{**given, **parts})
        except (TypeError, KeyError) as error:
            raise SplitServerError(f"split server, settings: not readable: {error}") from error
