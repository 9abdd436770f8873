"""The settings of devices and of planning in a recipe."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from polyrank.config.fleet import FleetSection
from polyrank.errors import RecipeError
from polyrank.planning import DeviceProfile, PlanSettings
from polyrank.planning.importance import METRICS
from polyrank.settings import Expected, OneOf

Profiles = dict[str, DeviceProfile]
Every = Annotated[Literal["auto"] | Annotated[int, Ge(1)], Expected("'auto' or a whole number")]

Devices = Annotated[
    dict[str, dict[str, int | float | str]] | None,
    Expected('tables of devices, e.g. [devices.phone] with memory = "3 GiB"'),
]
_KEYS = ("memory", "flops", "up", "down", "latency")


def own_devices(tables: Mapping[str, Mapping[str, int | float | str]] | None) -> Profiles:
    """Return the devices that a recipe describes; RecipeError, naming table and key, if it cannot.

    `memory` is what training may use, `flops` operations per second, `up` and `down` the links to
    and from the server, `latency` the seconds that a message takes one way: numbers in bytes,
    operations and seconds, or texts with units.
    """
    profiles = {}
    for name, table in (tables or {}).items():
        unknown = sorted(set(table) - set(_KEYS))
        if unknown:
            near = difflib.get_close_matches(unknown[0], _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {list(_KEYS)}"
            raise RecipeError(f"devices.{name}: unknown key {unknown[0]!r}{hint}")
        given = {key: table.get(key) for key in _KEYS}
        profiles[name] = DeviceProfile.of(name, **given)
    return profiles


def check_unchanged(fleet: FleetSection) -> None:
    """Raise RecipeError for what has no meaning where every client has its own device."""
    for key in ("redraw", "trace", "schedule"):
        if getattr(fleet, key) is not None:
            raise RecipeError(
                f"fleet.{key}: has no meaning where every client has its own device; leave it out, "
                "or give devices in fleet.distribution or fleet.clients"
            )


@dataclass(frozen=True, kw_only=True)
class PlanSection(PlanSettings):
    """Plan ranks and cuts from devices: with this section, the fleet's types are devices.

    `fleet.distribution` or `fleet.clients` then names devices in the place of LoRA types, and
    `fleet.types` and `fleet.cuts` are left out. With `data.source = "client"` both may be left out
    too: then every client has the device of its [client.toml](client.md).
    """

    server: str | None = None
    """The device that trains the tails: a name of `[devices]` or of [this list](devices.md); left
    out, a server without limits."""
    importance: Annotated[str, OneOf([*METRICS, "none"])] = "channel"
    """How important weights are scored while training; `none`: ranks are spread evenly."""
    allocation: Literal["importance", "spectrum"] = "importance"
    """What new plans share ranks out by: importance, or the spectra of what has been learnt so far,
    from the smallest of the levels to the largest."""
    every: Every = "auto"
    """Score every so many optimizer steps of a client, from its first; `auto`: so rarely that it
    costs less than 5%."""
    threshold: Annotated[float, Ge(0)] = 0.1
    """Plan anew after a round once so large a share of all importance lies at other sites than when
    the present plan was made."""

    def __post_init__(self) -> None:
        PlanSettings.__post_init__(self)
        if self.allocation == "spectrum" and self.importance == "none":
            raise RecipeError(
                "plan.allocation = 'spectrum' and plan.importance = 'none' exclude each other: "
                "plans are made anew when importance has moved; score it, by 'channel' or 'paper'"
            )

    @property
    def metric(self) -> str | None:
        """How importance is scored, None if it is not."""
        return None if self.importance == "none" else self.importance
