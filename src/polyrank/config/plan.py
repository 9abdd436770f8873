"""What a recipe says of devices, and of what is planned for them.

The text below a key is its entry in docs/reference/recipes.md, which is made from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from polyrank.config.fleet import FleetSection
from polyrank.config.section import Expected, Section
from polyrank.errors import RecipeError
from polyrank.planning import DeviceProfile, PlanSettings

Profiles = dict[str, DeviceProfile]
Every = Annotated[Literal["auto"] | int, Expected("'auto' or a whole number")]


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
    found = {}
    for name, table in (tables or {}).items():
        unknown = sorted(set(table) - set(_KEYS))
        if unknown:
            near = difflib.get_close_matches(unknown[0], _KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {list(_KEYS)}"
            raise RecipeError(f"devices.{name}: unknown key {unknown[0]!r}{hint}")
        given = {key: table.get(key) for key in _KEYS}
        found[name] = DeviceProfile.of(name, **given)
    return found


def check_unchanged(fleet: FleetSection) -> None:
    """Raise RecipeError for what has no meaning where every client has its own device."""
    for key in ("redraw", "trace", "schedule"):
        if getattr(fleet, key) is not None:
            raise RecipeError(
                f"fleet.{key}: has no meaning where every client has its own device; leave it out, "
                "or give devices in fleet.distribution or fleet.clients"
            )


class PlanSection(Section):
    """Plan ranks and cuts from devices: with this section, the fleet's types are devices.

    `fleet.distribution` or `fleet.clients` then names devices in the place of LoRA types, and
    `fleet.types` and `fleet.cuts` are left out. With `data.source = "client"` both may be left out
    too: then every client has the device of its [client.toml](client.md).
    """

    levels: list[int] | None = None
    """The ranks to choose from, rising; left out, powers of two up to what the richest device
    affords."""
    cuts: Literal["best", "needed", "none"] = "best"
    """`best`: a device is cut where that lets it train more; `needed`: only if it cannot train the
    whole model; `none`: never."""
    lowest_cut: int = 1
    """The fewest blocks that a split client runs itself."""
    u_shape: bool = False
    """Split clients also run the last block, and keep labels and loss."""
    server: str | None = None
    """The device that trains the tails: a name of `[devices]` or of [this list](devices.md); left
    out, a server without limits."""
    seconds: float | None = None
    """The longest that a round may take a client, by the cost model; left out, any time."""
    importance: Literal["channel", "paper", "none"] = "channel"
    """How important weights are scored while training; `none`: ranks are spread evenly."""
    allocation: Literal["importance", "spectrum"] = "importance"
    """What new plans share ranks out by: importance, or the spectra of what has been learnt so far,
    from the smallest of the levels to the largest."""
    every: Every = "auto"
    """Score every so many optimizer steps of a client, from its first; `auto`: so rarely that it
    costs less than 5%."""
    threshold: float = Field(default=0.1, ge=0)
    """Plan anew after a round once so large a share of all importance lies at other sites than when
    the present plan was made."""

    def build(self) -> PlanSettings:
        """Return what may be planned."""
        if self.every != "auto" and self.every < 1:
            raise RecipeError(f"plan.every: expected auto or at least 1, got {self.every}")
        if self.allocation == "spectrum" and self.importance == "none":
            raise RecipeError(
                "plan.allocation = 'spectrum' and plan.importance = 'none' exclude each other: "
                "plans are made anew when importance has moved; score it, by 'channel' or 'paper'"
            )
        return PlanSettings(
            levels=None if self.levels is None else tuple(self.levels),
            cuts=self.cuts,
            lowest_cut=self.lowest_cut,
            u_shape=self.u_shape,
            seconds=self.seconds,
        )
