"""Admission: the registered clients that take part, and each one's LoRA type or device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from polyrank.config import Recipe
from polyrank.errors import RecipeError
from polyrank.model import LoadedModel
from polyrank.planning import DeviceProfile, Fleet, Limits, LoRAType
from polyrank.protocol.client_info import NodeInfo
from polyrank.remote.registration import ClientRegistry, clients_of, work_of
from polyrank.run import Planning
from polyrank.runner.plans import planning_of
from polyrank.settings import part
from polyrank.training import ClientWork

NO_DEVICE = (
    "its client.toml has no [device], and the recipe plans for what every client has; say there "
    'what training may use, e.g. memory = "6 GiB"'
)


@dataclass(frozen=True)
class Admission:
    """The clients that take part, and why the others do not.

    `devices` are those that the recipe does not name, `limits` those of clients, both by type of
    the fleet.
    """

    registry: ClientRegistry
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
        """Return the same without some clients; RecipeError if none is left to train."""
        left_out = {**self.left_out, **reasons}
        assigned = {id: name for id, name in self.fleet.assigned.items() if id not in left_out}
        if not assigned:
            raise _none_left(left_out)
        node_of = {id: node for id, node in self.registry.node_of.items() if id not in left_out}
        return replace(
            self,
            registry=replace(self.registry, node_of=node_of),
            fleet=replace(self.fleet, assigned=assigned),
            left_out=left_out,
        )


def admit(recipe: Recipe, registry: ClientRegistry, model: LoadedModel) -> Admission:
    """Return which of the registered clients take part.

    With a plan for the clients' own devices, each is a type of its own. Limits of clients are those
    of their types: where a recipe names devices, a client with limits has a type of its own, with
    the same device; where devices change hands, plans know no limits, and the client alone keeps
    its own. A client whose device cannot take part is left out, unless devices change hands.

    Raises RecipeError if none is left.
    """
    nodes = {
        client.name: registry.nodes[registry.node_of[client.name]]
        for client in registry.clients
        if client.seen
    }
    if recipe.devices_of_clients:
        admission = _with_own_devices(registry, nodes)
    else:
        admission = Admission(registry, recipe.fleet_of(clients_of(registry.clients)))
    if recipe.plan is None:
        return admission
    if not recipe.devices_of_clients:
        admission = _with_limits(recipe, admission, {id: _limits(n) for id, n in nodes.items()})
    while True:  # A client that leaves may have had the longest rows, by which all are planned.
        work = {client.name: work_of(client) for client in admission.registry.clients}
        unable = admission.planning(recipe, model, work).unable()
        if not unable:
            return admission
        admission = admission.without(unable)


def _with_own_devices(registry: ClientRegistry, nodes: Mapping[str, NodeInfo]) -> Admission:
    """Give every client the device that it says it has."""
    devices, left_out = {}, {}
    for client, node in nodes.items():
        if client == "all":
            left_out[client] = "its name means every client in reports; name it otherwise"
        elif node.device is None:
            left_out[client] = NO_DEVICE
        else:
            devices[client] = replace(node.device, name=client)
    if not devices:
        raise _none_left(left_out)
    types = {name: LoRAType(name, {"all": 1}) for name in devices}
    fleet = Fleet.table({client: client for client in devices}, types=types)
    limits = {client: _limits(nodes[client]) for client in devices}
    return Admission(registry, fleet, devices, limits).without(left_out)


def _with_limits(recipe: Recipe, admission: Admission, limits: Mapping[str, Limits]) -> Admission:
    """Give every client with limits a type of its own, with the device that the recipe names."""
    fleet = admission.fleet
    limited = {client: own for client, own in limits.items() if own != Limits()}
    if not limited or fleet.schedule is not None:
        return admission
    if recipe.fleet.force is not None:  # All have one plan, which is within the limits of all.
        common = Limits.of_all([*limited.values()])
        return replace(admission, limits=dict.fromkeys(fleet.possible, common))
    profiles, types, assigned = recipe.profiles(), dict(fleet.types), dict(fleet.assigned)
    devices, by_type = {}, {}
    for client, own in limited.items():
        device = assigned[client]
        name = f"{device}, {client}"
        types[name] = LoRAType(name, fleet.types[device].ranks)
        devices[name] = replace(profiles[device], name=name)
        assigned[client], by_type[name] = name, own
    fleet = replace(fleet, types=types, assigned=assigned)
    return replace(admission, fleet=fleet, devices=devices, limits=by_type)


def _limits(node: NodeInfo) -> Limits:
    return part(Limits, node.policy)


def _none_left(reasons: Mapping[str, str]) -> RecipeError:
    listed = "\n  ".join(f"{client}: {why}" for client, why in sorted(reasons.items()))
    return RecipeError(f"plan: no client can take part:\n  {listed}")
