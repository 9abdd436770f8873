"""What is planned for devices, as tables for people."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from polyrank import report
from polyrank.planning import Plan
from polyrank.planning.plan import in_units
from polyrank.runner.plans import PlanPreview


def table(prospect: PlanPreview) -> Table:
    """Return a table of the plans, a device a line."""
    counts = Counter(prospect.devices.values())
    made = report.table("plans before the first round")
    for name in ("device", "clients", "runs itself"):
        made.add_column(name, no_wrap=True)
    for name in ("ranks there", "at the server"):
        made.add_column(name)
    for name in ("memory", "of", "GFLOP", "sent", "factors", "seconds"):
        made.add_column(name, justify="right")
    for name, plan in sorted(prospect.plans.items()):
        own, behind = _sides(prospect, plan)
        made.add_row(
            name,
            str(counts[name]),
            report.hosted(plan.cut, prospect.spec.blocks) if plan.feasible else "refused",
            _ranks(own) if plan.feasible else "–",
            _ranks(behind) if plan.feasible and plan.cut else "–",
            in_units(plan.memory.total),
            in_units(plan.device.memory_bytes),
            f"{plan.operations.client / 1e9:.3g}",
            in_units(plan.wire.up + plan.wire.down) if plan.cut else "–",
            in_units(plan.adapters.up + plan.adapters.down),
            f"{plan.seconds.round:.3g}" if not plan.seconds.ignored else "–",
        )
    return made


def remarks(prospect: PlanPreview) -> list[str]:
    """Return what the table does not say, a line each.

    Per device why it is cut and what holds its ranks down, or why it cannot take part and what
    would do. Then what memory and times stand for.
    """
    lines = [
        "ranks: rank × matrices that have it; GFLOP and sent: the client's, a step; factors and "
        "seconds: a round"
    ]
    for name, plan in sorted(prospect.plans.items()):
        if not plan.feasible:
            lines.append(f"{name} cannot take part: {plan.reason}{_change(plan)}")
            continue
        why = "whole" if plan.cut is None else plan.reason
        lines.append(f"{name}: {why}; {_held_down(prospect, plan)}")
    if prospect.scored:
        lines.append(
            "memory: of a step that scores importance; ranks follow scores from round 2 on"
        )
    left_out = sorted({what for plan in prospect.plans.values() for what in plan.seconds.ignored})
    if left_out:
        lines.append(f"times leave out what is not given: {', '.join(left_out)}")
    return lines


def _change(plan: Plan) -> str:
    needed = {
        "memory": lambda value: f"{value:.0f} bytes of memory ({in_units(int(value))})",
        "server": lambda value: f"{value:.0f} bytes of memory at the server",
        "seconds": lambda value: f"plan.seconds = {value!r}",
    }
    told = [needed[key](value) for key, value in plan.change.items()]
    return f". It could with {' and '.join(told)}" if told else ""


def _held_down(prospect: PlanPreview, plan: Plan) -> str:
    """Say what keeps a device from larger ranks, on each side of its cut."""
    own, behind = _sides(prospect, plan)
    held = _held(prospect, plan)
    full = {
        site.name: max((level for level in prospect.levels if level <= min(site.shape)), default=0)
        for site in prospect.spec.sites
    }
    inside = {site.name for site in prospect.spec.sites if site.block in held}
    top = f"the top level, {prospect.levels[-1]}"

    def by(ranks: dict[str, int], sites: set[str], budget: str) -> str:
        return top if all(ranks.get(site, 0) >= full[site] for site in sites) else budget

    said = f"ranks there are held down by {by(own, inside, 'its budget')}"
    if plan.cut is None:
        return said
    at_server = by(behind, set(full) - inside, "the server's memory")
    return f"{said}, at the server by {at_server}"


def _held(prospect: PlanPreview, plan: Plan) -> frozenset[int]:
    """The blocks that a client runs itself."""
    count = prospect.spec.blocks
    return frozenset(range(count)) if plan.cut is None else plan.cut.at_client(count)


def _sides(prospect: PlanPreview, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Return a plan's ranks in the client's own blocks, and behind its cut."""
    held = _held(prospect, plan)
    at = {site.name: site.block for site in prospect.spec.sites}
    own = {site: rank for site, rank in plan.ranks.items() if at[site] in held}
    return own, {site: rank for site, rank in plan.ranks.items() if site not in own}


def _ranks(ranks: dict[str, int]) -> str:
    """How many matrices get which rank, e.g. ``8 × 12, 4 × 2``."""
    counts = Counter(ranks.values())
    return ", ".join(f"{rank} × {counts[rank]}" for rank in sorted(counts, reverse=True)) or "none"
