"""Who of those that were found takes part, with which type: a recipe's, or a device's plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyrank.config import Recipe
from polyrank.errors import RecipeError
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, Limits, LoRAType
from polyrank.protocol import Profile
from polyrank.remote.registration import ClientRegistry, clients_of, work_of
from polyrank.run import Planning
from polyrank.runner.plans import planning_of
from polyrank.training import ClientWork

NO_DEVICE = (
    "its client.toml has no [device], and the recipe plans for what every client has; say there "
    'what training may use, e.g. memory = "6 GiB"'
)


@dataclass(frozen=True)
class Admission:
    """The clients that take part, and why the others do not.

    `devices` are those that the recipe does not name, `limits` of any; both by type of the fleet.
    """

    roll: ClientRegistry
    fleet: Fleet
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def planning(
        self, recipe: Recipe, model: LoadedModel, work: Mapping[str, ClientWork]
    ) -> Planning:
        """Return how the run plans; RecipeError for a recipe without [plan]."""
        return planning_of(recipe, model, self.fleet, work, self.devices, self.limits)

    def without(self, reasons: Mapping[str, str]) -> Admission:
        """Return the same without some clients; RecipeError if nobody is left to train."""
        out = {**self.left_out, **reasons}
        assigned = {id: name for id, name in self.fleet.assigned.items() if id not in out}
        if not assigned:
            raise _nobody(out)
        homes = {id: node for id, node in self.roll.homes.items() if id not in out}
        return replace(
            self,
            roll=replace(self.roll, homes=homes),
            fleet=replace(self.fleet, assigned=assigned),
            left_out=out,
        )


def enrol(recipe: Recipe, roll: ClientRegistry, model: LoadedModel) -> Admission:
    """Return who takes part of those that were found.

    With a plan for the clients' own devices, each is a type of its own. Limits of clients are those
    of their types: where a recipe names devices, a client with limits has one of its own, alike but
    for them; where devices change hands, plans know no limits, and the client alone keeps its own.
    A client whose device cannot take part is left out, unless devices change hands.

    Raises RecipeError if nobody is left.
    """
    profiles = {
        one.client: roll.profiles[roll.homes[one.client]] for one in roll.hosted if one.seen
    }
    if recipe.devices_of_clients:
        found = _own(roll, profiles)
    else:
        found = Admission(roll, recipe.fleet_of(clients_of(roll.hosted)))
    if recipe.plan is None:
        return found
    if not recipe.devices_of_clients:
        found = _named(recipe, found, {id: _limits(one) for id, one in profiles.items()})
    while True:  # Who leaves may have had the longest rows, by which all are planned.
        work = {one.client: work_of(one) for one in found.roll.hosted}
        unable = found.planning(recipe, model, work).unable()
        if not unable:
            return found
        found = found.without(unable)


def _own(roll: ClientRegistry, profiles: Mapping[str, Profile]) -> Admission:
    """Every client with the device that it says it has."""
    devices, out = {}, {}
    for client, profile in profiles.items():
        if client == "all":
            out[client] = "its name means every client in reports; name it otherwise"
        elif profile.device is None:
            out[client] = NO_DEVICE
        else:
            devices[client] = replace(profile.device, name=client)
    if not devices:
        raise _nobody(out)
    types = {name: LoRAType(name, {"all": 1}) for name in devices}
    fleet = Fleet.table({client: client for client in devices}, types=types)
    limits = {client: _limits(profiles[client]) for client in devices}
    return Admission(roll, fleet, devices, limits).without(out)


def _named(recipe: Recipe, found: Admission, limits: Mapping[str, Limits]) -> Admission:
    """Every client with the device that the recipe gives it."""
    fleet, limited = found.fleet, {id: one for id, one in limits.items() if one != Limits()}
    if not limited or fleet.schedule is not None:
        return found
    profiles, types, assigned = recipe.profiles(), dict(fleet.types), dict(fleet.assigned)
    if recipe.fleet.force is not None:  # Everybody's plan is within everybody's limits.
        everyone = Limits.of_all([*limited.values()])
        return replace(found, limits=dict.fromkeys(fleet.possible, everyone))
    devices, by_type = {}, {}
    for client, one in limited.items():
        device = assigned[client]
        name = f"{device}, {client}"
        types[name] = LoRAType(name, fleet.types[device].ranks)
        devices[name] = replace(profiles[device], name=name)
        assigned[client], by_type[name] = name, one
    fleet = replace(fleet, types=types, assigned=assigned)
    return replace(found, fleet=fleet, devices=devices, limits=by_type)


def _limits(profile: Profile) -> Limits:
    terms = profile.terms
    return Limits(terms.largest_rank, terms.lowest_cut, terms.labels_may_leave)


def _nobody(reasons: Mapping[str, str]) -> RecipeError:
    listed = "\n  ".join(f"{client}: {why}" for client, why in sorted(reasons.items()))
    return RecipeError(f"plan: no client can take part:\n  {listed}")
