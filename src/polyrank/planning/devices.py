"""What a machine offers a run: memory, arithmetic, links; and some real ones by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from polyrank.errors import RecipeError
from polyrank.planning.units import parse_bytes, parse_flops, parse_link, parse_seconds


@dataclass(frozen=True)
class DeviceProfile:
    """What one device offers.

    - `memory_bytes`: bytes that training may use, after what the system takes.
    - `flops`: arithmetic rate in floating-point operations per second, a multiplication and an
      addition counting as two, at the dtype that is trained in.
    - `up`, `down`: bytes per second from the device to the server and back.
    - `latency`: seconds that a message takes one way, beside its bytes.

    None means not limited by it: a plan does not consider it. Raises RecipeError, naming
    ``devices.NAME.KEY``, for figures that are missing, zero, negative or not finite.
    """

    name: str
    memory_bytes: int
    flops: float | None = None
    up: float | None = None
    down: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        place = f"devices.{self.name}"
        memory = self.memory_bytes
        if isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0:
            raise RecipeError(
                f"{place}.memory: expected a whole number of bytes above zero, got {memory!r}"
            )
        rates = {"flops": self.flops, "up": self.up, "down": self.down}
        for key, rate in rates.items():
            if rate is not None and not (_is_number(rate) and math.isfinite(rate) and rate > 0):
                raise RecipeError(
                    f"{place}.{key}: expected a finite number above zero, got {rate!r}; "
                    "leave the key out if it does not limit the device"
                )
        if not (_is_number(self.latency) and math.isfinite(self.latency) and self.latency >= 0):
            raise RecipeError(
                f"{place}.latency: expected seconds, finite and not negative; got {self.latency!r}"
            )

    @staticmethod
    def of(
        name: str,
        *,
        memory: int | float | str | None,
        flops: int | float | str | None = None,
        up: int | float | str | None = None,
        down: int | float | str | None = None,
        latency: int | float | str | None = None,
    ) -> DeviceProfile:
        """Return the profile that a recipe's table writes: numbers, or texts with units.

        See `polyrank.planning.units` for the texts. Raises RecipeError naming the key.
        """
        place = f"devices.{name}"
        if memory is None:
            raise RecipeError(
                f'{place}.memory: missing; say how much training may use, e.g. memory = "6 GiB"'
            )
        return DeviceProfile(
            name,
            parse_bytes(memory, f"{place}.memory"),
            None if flops is None else parse_flops(flops, f"{place}.flops"),
            None if up is None else parse_link(up, f"{place}.up"),
            None if down is None else parse_link(down, f"{place}.down"),
            0.0 if latency is None else parse_seconds(latency, f"{place}.latency"),
        )

    @property
    def written(self) -> dict[str, int | float]:
        """The table that a recipe takes, in bytes, operations and seconds; unlimited left out."""
        rates = {"flops": self.flops, "up": self.up, "down": self.down}
        given = {key: rate for key, rate in rates.items() if rate is not None}
        latency = {"latency": self.latency} if self.latency else {}
        return {"memory": self.memory_bytes, **given, **latency}


DEVICES: Mapping[str, DeviceProfile] = {}
"""Real devices by name."""


def device(
    name: str, own: Mapping[str, DeviceProfile] | Iterable[DeviceProfile] = ()
) -> DeviceProfile:
    """Return a device by name: one of the recipe's `own`, else one of `DEVICES`.

    Raises RecipeError with the nearest names for one that is in neither.
    """
    profiles = own.values() if isinstance(own, Mapping) else own
    known = {**DEVICES, **{profile.name: profile for profile in profiles}}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else "known are"
    listed = "" if near else f" {', '.join(sorted(known)) or 'none'}"
    raise RecipeError(
        f"devices: there is no device {name!r}; {meant}{listed}; or describe it in a table "
        f"[devices.{name}]"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
