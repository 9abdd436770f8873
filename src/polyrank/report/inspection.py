"""A run folder as a page: ranks, rounds, and where the update's energy is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from polyrank.report.lines import own_rank, round_header, round_legend, round_line
from polyrank.report.tables import participation, ranks, spectra, table
from polyrank.report.words import count
from polyrank.run import RoundRecord
from polyrank.run.summary import participation as participation_of
from polyrank.runner.inspect import RunInspection, SiteEnergy

MOST_ROUNDS = 20
MOST_GROUPS = 12
WORST = 5
_BAR = 28


def page(run: RunInspection, *, sites: bool = False) -> Iterator[RenderableType]:
    """Yield what a person wants to see of a run; with `sites` the table of all sites at the end."""
    yield Text.assemble((run.method, "bold"), f" in {run.folder}, {_state(run)}")
    for note in run.notes:
        yield Text(note, style="yellow")
    if run.fleet is not None:
        types = list(run.fleet["clients"].values())
        counts = {name: types.count(name) for name in run.fleet["ranks"]}
        yield ranks(counts, run.fleet["ranks"], *run.cuts)
    yield from _rounds(run)
    troubled = participation(participation_of(map(vars, run.records)))
    if troubled is not None:
        yield troubled
    if run.result is None:
        yield Text("no round is finished yet, so there is no adapter")
        return
    measured = [text for record in run.records if (text := own_rank(record))]
    if measured:
        yield Text(measured[-1])
    if run.result_round < run.records[-1].round:
        yield Text(f"early stopping keeps the adapter of round {run.result_round}")
    yield _energy("energy ‖D‖² of the update, by kind of matrix", run.by_kind)
    yield _energy("energy ‖D‖² of the update, by block", _in_groups(run.by_block))
    yield _worst(run.energies)
    if sites:
        yield spectra(run.spectra(), run.energies)
    else:
        yield Text(
            f"all {len(run.energies)} matrices: polyrank inspect {run.folder} --sites; "
            "everything for programs: --json",
            overflow="fold",
        )


def _state(run: RunInspection) -> str:
    done = count(len(run.records), "round")
    return f"finished after {done}" if run.finished else f"{done} done, not finished"


def _rounds(run: RunInspection) -> Iterator[RenderableType]:
    """The header and a line a round: all of a short run, some of a long one."""
    wire = any(record.wire_up + record.wire_down for record in run.records)
    yield Text(round_header(wire), style="bold")
    for record in _some(run.records, MOST_ROUNDS):
        yield Text(round_line(record, wire))
    if len(run.records) > MOST_ROUNDS:
        yield Text(f"{MOST_ROUNDS} of {len(run.records)} rounds; --json has all of them")
    yield Text(round_legend(), style="dim")


def _some(records: Sequence[RoundRecord], most: int) -> list[RoundRecord]:
    """At most so many rounds, evenly spaced, the first and the last among them."""
    if len(records) <= most:
        return list(records)
    last = len(records) - 1
    return [records[round(i * last / (most - 1))] for i in range(most)]


def _in_groups(blocks: Mapping[str, SiteEnergy]) -> dict[str, SiteEnergy]:
    """Neighbouring blocks summed, so that a deep model is a few lines."""
    names = [*blocks]
    size = math.ceil(len(names) / MOST_GROUPS) or 1
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    return {
        group[0] if len(group) == 1 else f"{group[0]}–{group[-1]}": sum(
            (blocks[name] for name in group), SiteEnergy()
        )
        for group in groups
    }


def _energy(title: str, groups: Mapping[str, SiteEnergy]) -> Table:
    """A line a group: its share of the update's energy ‖D‖², and the share that the cut lost."""
    total = sum((group.energy for group in groups.values()), 0.0)
    largest = max((group.energy for group in groups.values()), default=0.0)
    made = table(title)
    made.add_column("", overflow="fold")
    made.add_column("share", justify="right")
    made.add_column("", min_width=_BAR, no_wrap=True)
    made.add_column("lost", justify="right")
    for name, group in groups.items():
        bar = round(_BAR * group.energy / largest) if largest else 0
        made.add_row(
            name,
            f"{group.energy / total:.1%}" if total else "–",
            "█" * bar,
            f"{group.share_lost:.2%}",
        )
    return made


def _worst(energies: Mapping[str, SiteEnergy]) -> RenderableType:
    """The sites that lost the largest share of their energy to the server's rank."""
    losing = [site for site, energy in energies.items() if energy.share_lost > 0]
    if not losing:
        return Text("the cut to the server's rank lost no energy at any matrix")
    made = table("most energy lost to the server's rank")
    made.add_column("matrix", overflow="fold")
    for name in ("‖D‖", "lost"):
        made.add_column(name, justify="right")
    for site in sorted(losing, key=lambda site: -energies[site].share_lost)[:WORST]:
        norm = energies[site].energy ** 0.5
        made.add_row(site, f"{norm:.3g}", f"{energies[site].share_lost:.2%}")
    return made
