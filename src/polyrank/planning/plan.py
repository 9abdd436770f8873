"""Plans: for every device the ranks per site and the cut that its budgets afford."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from polyrank.errors import RecipeError
from polyrank.planning.cost import Memory, Operations, Seconds, WireBytes
from polyrank.planning.cut import CutPoint
from polyrank.planning.devices import DeviceProfile
from polyrank.planning.fleet import Fleet, LoRAType
from polyrank.planning.rank_choices import checked_rank_choices
from polyrank.settings import check


@dataclass(frozen=True)
class PlanSettings:
    """What may be planned."""

    levels: tuple[int, ...] | None = None
    """The ranks to choose from, rising; left out, powers of two up to what the richest device
    affords."""
    cuts: Literal["best", "needed", "none"] = "best"
    """`best`: a device is cut where that lets it train more; `needed`: only if it cannot train the
    whole model; `none`: never."""
    lowest_cut: Annotated[int, Ge(1)] = 1
    """The fewest blocks that a split client runs itself."""
    u_shape: bool = False
    """Split clients also run the last block, and keep labels and loss."""
    seconds: Annotated[float, Gt(0)] | None = None
    """The longest that a round may take a client, by the cost model; left out, any time."""

    def __post_init__(self) -> None:
        check(self, "plan")
        if self.levels is not None:
            checked_rank_choices(self.levels)

    def possible_cuts(self, blocks: int) -> list[CutPoint]:
        """Return the cuts of a model of so many blocks, the fewest at the client first."""
        if not self.u_shape:
            return [CutPoint(lower) for lower in range(self.lowest_cut, blocks)]
        return [CutPoint(lower, blocks - 1) for lower in range(self.lowest_cut, blocks - 1)]


@dataclass(frozen=True)
class Plan:
    """What one device is to train, what that is predicted to cost, and why.

    `memory`, `seconds`, `operations`, `wire` (a step's) and `adapters` (a round's) are predictions;
    where the plan is not feasible they are those of the least that a client could do. `reason` says
    why it is cut, or which budget fails and by how much; `change` is then the smallest that would
    let it in: new values of ``memory`` and ``server`` (bytes) and ``seconds`` (of a round). Which
    of the device's own limits would do it, the reason alone says.
    """

    device: DeviceProfile
    ranks: Mapping[str, int]
    cut: CutPoint | None
    memory: Memory
    operations: Operations
    wire: WireBytes
    adapters: WireBytes
    seconds: Seconds
    feasible: bool
    reason: str
    change: Mapping[str, float] = field(default_factory=dict)


def planned_fleet(fleet: Fleet, plans: Mapping[str, Plan]) -> Fleet:
    """Return the fleet whose types are devices, with the ranks and cuts of their plans.

    Raises RecipeError, with the reasons, if a device that a client has cannot take part.
    """
    refused = {name: plan for name, plan in plans.items() if not plan.feasible}
    if any(name in refused for name in fleet.possible):
        listed = "\n  ".join(f"{name}: {plan.reason}" for name, plan in sorted(refused.items()))
        raise RecipeError(f"plan: devices that cannot take part:\n  {listed}")
    feasible = {name: plan for name, plan in plans.items() if plan.feasible}
    return replace(
        fleet,
        types={name: LoRAType(name, plan.ranks) for name, plan in feasible.items()},
        cuts={name: plan.cut for name, plan in feasible.items() if plan.cut is not None},
    )


def in_units(count: int) -> str:
    """Return bytes as text, e.g. ``512.0 MiB``."""
    power = min(3, max(1, (count.bit_length() - 1) // 10))
    return f"{count / 2 ** (10 * power):.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"
