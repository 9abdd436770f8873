"""Reading a run folder, finished or not: its recipe, its rounds and its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.errors import RunError
from polyrank.planning import CutPoint
from polyrank.run import RoundRecord, RunFolder, storage
from polyrank.run.folder import RUN, SUMMARY
from polyrank.run.spectra import Spectrum, read_spectra

if TYPE_CHECKING:
    from polyrank.aggregation import Rule
    from polyrank.algebra import Adapter
    from polyrank.config import Recipe
    from polyrank.run import GlobalAdapter

RECIPE = "recipe.toml"
FLEET = "fleet.json"


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run folder; RunError if there is none."""
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder")
    if (folder / RUN).is_file() and not (folder / RECIPE).is_file():
        raise RunError(
            f"{folder}: this run was made from Python, so it has no {RECIPE}; make the same "
            f"Federation again and go on there: federation.resume({str(folder)!r}), then rounds, "
            "or adapter.save"
        )
    if not (folder / RECIPE).is_file():
        raise RunError(
            f"{folder}: expected a folder that `polyrank run` made, with a {RECIPE} in it"
        )
    from polyrank import config

    return config.read(folder / RECIPE)


@dataclass(frozen=True)
class SiteEnergy:
    """What one site, or several together, hold: ‖D‖², and how much of it a cut to a rank lost."""

    energy: float = 0.0
    lost: float = 0.0

    def __add__(self, other: SiteEnergy) -> SiteEnergy:
        return SiteEnergy(self.energy + other.energy, self.lost + other.lost)

    @property
    def share_lost(self) -> float:
        """The share of the energy that was lost."""
        return self.lost / self.energy if self.energy else 0.0


@dataclass(frozen=True)
class RunInspection:
    """What a run folder holds, whether or not the run is finished.

    `records` are those of the rounds that count: up to the newest whole checkpoint. `result_round`
    is the round whose adapter is the result, 0 before the first.
    """

    folder: Path
    method: str
    finished: bool
    records: list[RoundRecord]
    fleet: Mapping[str, Any] | None
    result_round: int
    notes: list[str]

    @property
    def result(self) -> RoundRecord | None:
        """The record of the round whose adapter is the result."""
        return next((r for r in self.records if r.round == self.result_round), None)

    @property
    def energies(self) -> dict[str, SiteEnergy]:
        """The energy at each site in the result's round."""
        result = self.result
        return {s: SiteEnergy(*values) for s, values in result.energy.items()} if result else {}

    @property
    def by_block(self) -> dict[str, SiteEnergy]:
        """The energy of each of the model's blocks, in their order."""
        summed = self._summed(lambda site: block_and_kind(site)[0])
        return dict(sorted(summed.items(), key=lambda item: (len(item[0]), item[0])))

    @property
    def by_kind(self) -> dict[str, SiteEnergy]:
        """The energy of each kind of matrix, such as ``self_attn.q_proj``, over all blocks."""
        return dict(sorted(self._summed(lambda site: block_and_kind(site)[1]).items()))

    def _summed(self, group: Callable[[str], str]) -> dict[str, SiteEnergy]:
        sums: dict[str, SiteEnergy] = {}
        for site, energy in self.energies.items():
            sums[group(site)] = sums.get(group(site), SiteEnergy()) + energy
        return sums

    @property
    def cuts(self) -> tuple[dict[str, CutPoint], int]:
        """The cut per type and the model's blocks; of older runs, or without cuts, none."""
        fleet = self.fleet or {}
        cuts = {name: CutPoint.of(text) for name, text in fleet.get("cuts", {}).items()}
        return cuts, fleet.get("blocks", 0)

    def spectra(self) -> Mapping[str, Spectrum]:
        """Return the singular values of the result in short, per site; empty before round 1.

        A finished run stored them. Those of another are computed from its checkpoint, which needs
        torch.
        """
        if not self.result_round:
            return {}
        spectra = read_spectra(self.folder, self.result_round)
        if spectra is not None:
            return spectra
        saved = RunFolder.peek(self.folder).load_checkpoint()
        adapter = _rule_of(self.folder).adapter(saved.best or saved.state)
        return {site: Spectrum.of(delta) for site, delta in adapter.items()}

    def to_json(self) -> dict[str, Any]:
        """Return all of it, the sites' spectra too, as a JSON object."""
        spectra = self.spectra()

        def told(energies: Mapping[str, SiteEnergy]) -> dict[str, Any]:
            return {
                name: {**asdict(energy), **(asdict(spectra[name]) if name in spectra else {})}
                for name, energy in energies.items()
            }

        return {
            "folder": str(self.folder),
            "method": self.method,
            "finished": self.finished,
            "result_round": self.result_round,
            "notes": self.notes,
            "fleet": self.fleet,
            "rounds": [record.to_json() for record in self.records],
            "blocks": told(self.by_block),
            "kinds": told(self.by_kind),
            "sites": told(self.energies),
        }


def block_and_kind(site: str) -> tuple[str, str]:
    """Return the block of a site and what it is there: its name after the first number.

    A site outside the blocks has the block ``–``.

    >>> block_and_kind("model.layers.10.self_attn.q_proj")
    ('10', 'self_attn.q_proj')
    """
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return ("–", site) if at is None else (parts[at], ".".join(parts[at + 1 :]))


def look(folder: Path) -> RunInspection:
    """Read a run folder, also while the run goes on, without its model and without torch.

    Raises RunError for a folder that holds no run.
    """
    opened = RunFolder.peek(folder)
    head = opened.load_head()
    return RunInspection(
        folder=folder,
        method=storage.read_json(folder / RUN)["settings"]["rule"],
        finished=(folder / SUMMARY).is_file(),
        records=[RoundRecord.from_json(r) for r in opened.records() if r["round"] <= head.round],
        fleet=storage.read_json(folder / FLEET) if (folder / FLEET).exists() else None,
        result_round=head.result_round,
        notes=opened.notes,
    )


def adapter_of(folder: Path) -> GlobalAdapter:
    """Return the adapter of a run as its last whole checkpoint has it, finished or not.

    Raises RunError for a folder without a run, or without a finished round.
    """
    from polyrank.run import GlobalAdapter

    recipe = recipe_of(folder)
    saved = RunFolder.peek(folder).load_checkpoint()
    if not saved.round:
        raise RunError(
            f"{folder}: no round is finished yet, so there is no adapter; polyrank resume {folder}"
        )
    factors = recipe.rule().adapter(saved.best or saved.state)
    ranks = _server_ranks(folder, factors, recipe.aggregation.server_rank)
    return GlobalAdapter(factors, recipe.model.load(), recipe.lora, ranks)


def _server_ranks(folder: Path, factors: Adapter, wanted: int | None) -> dict[str, int]:
    """The rank at which the server keeps each site: `wanted`, or the fleet's largest there."""
    if wanted is not None:
        return {site: min(wanted, *delta.shape) for site, delta in factors.items()}
    by_type = storage.read_json(folder / FLEET)["ranks"].values()
    return {site: max(ranks.get(site, 0) for ranks in by_type) for site in factors}


def _rule_of(folder: Path) -> Rule:
    """The rule of a run, by its recipe, or by its name where the run was made from Python.

    RunError for a rule that is not polyrank's own: its class is not imported here.
    """
    if (folder / RECIPE).is_file():
        return recipe_of(folder).rule()
    from polyrank.aggregation import SLoRA, rule

    begun = storage.read_json(folder / RUN)
    if "rule_class" in begun:
        raise RunError(
            f"{folder}: its rule {begun['rule_class']} is code outside polyrank, so the singular "
            "values are not known here; make the same Federation in Python, then "
            "federation.resume(...).adapter"
        )
    settings = begun["settings"]
    name, begins_sparsely, _ = settings["rule"].partition("+")
    return SLoRA(rule(name), settings["options"]["rounds"]) if begins_sparsely else rule(name)
