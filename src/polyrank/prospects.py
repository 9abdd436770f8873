"""What is planned for devices, as tables for people."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from polyrank import report
from polyrank.planning import Plan
from polyrank.planning.plan import in_units
from polyrank.plans import Prospect


def table(prospect: Prospect) -> Table:
    """Return a table of the plans, a device a line."""
    counts = Counter(prospect.devices.values())
    made = report.table("plans before the first round")
    for name in ("device", "clients"):
        made.add_column(name)
    made.add_column("ranks")
    made.add_column("runs itself")
    for name in ("memory", "of", "GFLOP/step", "wire/step", "adapters/round", "s/round"):
        made.add_column(name, justify="right")
    for name, plan in sorted(prospect.plans.items()):
        made.add_row(
            name,
            str(counts[name]),
            _ranks(plan) if plan.feasible else "none: refused",
            report.hosted(plan.cut, prospect.blocks),
            in_units(plan.memory.total),
            in_units(plan.device.memory_bytes),
            f"{plan.operations.client / 1e9:.4g}",
            in_units(plan.wire.up + plan.wire.down) if plan.cut else "–",
            in_units(plan.adapters.up + plan.adapters.down),
            f"{plan.seconds.round:.4g}" if not plan.seconds.ignored else "–",
        )
    return made


def remarks(prospect: Prospect) -> list[str]:
    """Return a line for each device: why it is cut, or why it cannot take part and what would do.

    And what the times leave out, if anything.
    """
    lines = []
    for name, plan in sorted(prospect.plans.items()):
        if not plan.feasible:
            lines.append(f"{name} cannot take part: {plan.reason}{_change(plan)}")
        elif plan.cut is not None:
            lines.append(f"{name}: {plan.reason}")
    left_out = sorted({what for plan in prospect.plans.values() for what in plan.seconds.ignored})
    if left_out:
        lines.append(f"times leave out what is not given: {', '.join(left_out)}")
    return lines


def _change(plan: Plan) -> str:
    needed = {
        "memory": lambda value: f"{value:.0f} bytes of memory",
        "seconds": lambda value: f"plan.seconds = {value:.6g}",
    }
    told = [needed[key](value) for key, value in plan.change.items()]
    return f". It could with {' and '.join(told)}" if told else ""


def _ranks(plan: Plan) -> str:
    """How many matrices get which rank, e.g. ``8 at 12, 4 at 2``."""
    counts = Counter(plan.ranks.values())
    return ", ".join(f"{rank} at {counts[rank]}" for rank in sorted(counts, reverse=True))
