"""The page of `polyrank plan`: ranks, cut and costs of every device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from polyrank import report
from polyrank.planning import Plan
from polyrank.planning.plan import in_units
from polyrank.runner.plans import PlanPreview


def page(preview: PlanPreview) -> Iterator[RenderableType]:
    """Yield the tables of the plans, a device a line, and what they do not say."""
    plans = dict(sorted(preview.plans.items()))
    yield _who(preview, plans)
    yield _ranks(preview, plans)
    yield _costs(plans)
    for line in remarks(preview):
        yield Text(line)


def _who(preview: PlanPreview, plans: dict[str, Plan]) -> Table:
    counts = Counter(preview.devices.values())
    made = _table("plans before the first round", "clients", "memory", "of", "s a round")
    made.add_column("runs itself")
    for name, plan in plans.items():
        made.add_row(
            name,
            str(counts[name]),
            in_units(plan.memory.total),
            in_units(plan.device.memory_bytes),
            f"{plan.seconds.round:.3g}" if not plan.seconds.ignored else "–",
            report.hosted(plan.cut, preview.spec.blocks) if plan.feasible else "refused",
        )
    return made


def _ranks(preview: PlanPreview, plans: dict[str, Plan]) -> Table:
    made = _table("ranks (rank × matrices that have it)")
    made.add_column("at the device")
    made.add_column("at the server")
    for name, plan in plans.items():
        own, behind = _sides(preview, plan)
        made.add_row(
            name,
            _counted(own) if plan.feasible else "–",
            _counted(behind) if plan.feasible and plan.cut else "–",
        )
    return made


def _costs(plans: dict[str, Plan]) -> Table:
    columns = ("GFLOP a step", "cut, a step", "factors, a round")
    made = _table("what a client computes, and sends and receives", *columns)
    for name, plan in plans.items():
        made.add_row(
            name,
            f"{plan.operations.client / 1e9:.3g}",
            in_units(plan.wire.up + plan.wire.down) if plan.cut else "–",
            in_units(plan.adapters.up + plan.adapters.down),
        )
    return made


def _table(title: str, *numbers: str) -> Table:
    made = report.table(title)
    made.add_column("device", overflow="fold")
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def remarks(preview: PlanPreview) -> list[str]:
    """Return what the tables do not say, a line each.

    Per device why it is cut and what holds its ranks down, or why it cannot take part and what
    would do. Then what memory and times stand for.
    """
    lines = []
    for name, plan in sorted(preview.plans.items()):
        if not plan.feasible:
            lines.append(f"{name} cannot take part: {plan.reason}{_change(plan)}")
            continue
        why = "whole" if plan.cut is None else plan.reason
        lines.append(f"{name}: {why}; {_held_down(preview, plan)}")
    if preview.scored:
        lines.append(
            "memory: of a step that scores importance; ranks follow scores from round 2 on"
        )
    left_out = sorted({what for plan in preview.plans.values() for what in plan.seconds.ignored})
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


def _held_down(preview: PlanPreview, plan: Plan) -> str:
    """Say what keeps a device from larger ranks, on each side of its cut."""
    own, behind = _sides(preview, plan)
    client_blocks = _held(preview, plan)
    full = {
        site.name: max((level for level in preview.levels if level <= min(site.shape)), default=0)
        for site in preview.spec.sites
    }
    inside = {site.name for site in preview.spec.sites if site.block in client_blocks}
    top = f"the top level, {preview.levels[-1]}"

    def by(ranks: dict[str, int], sites: set[str], budget: str) -> str:
        return top if all(ranks.get(site, 0) >= full[site] for site in sites) else budget

    said = f"ranks there are held down by {by(own, inside, 'its budget')}"
    if plan.cut is None:
        return said
    at_server = by(behind, set(full) - inside, "the server's memory")
    return f"{said}, at the server by {at_server}"


def _held(preview: PlanPreview, plan: Plan) -> frozenset[int]:
    """The blocks that a client runs itself."""
    count = preview.spec.blocks
    return frozenset(range(count)) if plan.cut is None else plan.cut.at_client(count)


def _sides(preview: PlanPreview, plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Return a plan's ranks in the client's own blocks, and behind its cut."""
    client_blocks = _held(preview, plan)
    at = {site.name: site.block for site in preview.spec.sites}
    own = {site: rank for site, rank in plan.ranks.items() if at[site] in client_blocks}
    return own, {site: rank for site, rank in plan.ranks.items() if site not in own}


def _counted(ranks: dict[str, int]) -> str:
    """How many matrices get which rank, e.g. ``8 × 12, 4 × 2``."""
    counts = Counter(ranks.values())
    return ", ".join(f"{rank} × {counts[rank]}" for rank in sorted(counts, reverse=True)) or "none"
