"""Adapters as the tensors of a packet, named ``role|site|name``, and back, bit by bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from polyrank.aggregation import Assignment, fixed
from polyrank.algebra import Adapter, Delta, Dense, LowRank, Sparse, from_tensors
from polyrank.errors import FactorError
from polyrank.protocol.json_fields import refusal
from polyrank.protocol.packet import Packet

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Number formats of an update."""
_PLACES = (torch.int32, torch.int64)
_MOST = 2**31


def write_adapter(role: str, adapter: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Return the tensors of an adapter.

    Positions travel as int32 where the matrix has fewer than 2^31 entries.
    """
    written = {}
    for site, delta in adapter.items():
        for name, tensor in delta.tensors().items():
            written[f"{role}|{site}|{name}"] = tensor
        if isinstance(delta, Sparse) and math.prod(delta.shape) < _MOST:
            written[f"{role}|{site}|positions"] = delta.positions.to(torch.int32)
    return written


def read_adapter(packet: Packet, role: str) -> Adapter[Delta]:
    """Return the adapter of a role; PacketError for tensors that make no update of a matrix."""
    sites: dict[str, dict[str, str]] = {}
    for whole in packet.names():
        if whole.startswith(f"{role}|"):
            site, _, name = whole[len(role) + 1 :].rpartition("|")
            sites.setdefault(site, {})[name] = whole
    return Adapter({site: _read(packet, f"{role}|{site}", names) for site, names in sites.items()})


def _read(packet: Packet, place: str, names: Collection[str]) -> Delta:
    kind = set(names)
    try:
        if kind == {"b", "a"}:
            b = packet.tensor(f"{place}|b", (None, None), REAL)
            return LowRank(b, packet.tensor(f"{place}|a", (b.shape[1], None), [b.dtype]))
        if kind == {"matrix"}:
            return Dense(packet.tensor(f"{place}|matrix", (None, None), REAL))
        if kind == {"values", "positions", "shape"}:
            return _sparse(packet, place)
    except FactorError as error:
        raise refusal(f"{packet.place}, {place!r}", "an update of a matrix", error) from error
    raise refusal(
        f"{packet.place}, {place!r}",
        "factors b and a, a matrix, or values with positions and shape",
        sorted(kind),
    )


def _sparse(packet: Packet, place: str) -> Sparse:
    values = packet.tensor(f"{place}|values", (None,), REAL)
    positions = packet.tensor(f"{place}|positions", tuple(values.shape), _PLACES).long()
    m, n = packet.tensor(f"{place}|shape", (2,), [torch.int64]).tolist()
    at = f"{packet.place}, {place!r}"
    if not (0 <= m < _MOST and 0 <= n < _MOST):
        raise refusal(at, f"a shape of two numbers below {_MOST}", f"{m}×{n}")
    if len(positions):
        least, most = (int(end) for end in torch.aminmax(positions))
        if least < 0 or most >= m * n:
            raise refusal(at, f"positions of 0 to {m * n - 1}", f"{least} to {most}")
        ordered = positions.sort().values
        if bool((ordered[1:] == ordered[:-1]).any()):
            raise refusal(at, "each position once", "one that is there twice")
    return Sparse(values, positions, (m, n))


def negatives(assignment: Assignment) -> list[str]:
    """Return the sites whose frozen term is −B, A of the start bit by bit, negative zeros too.

    A reader that has the start can make it, so it need not travel.
    """
    return [
        site
        for site, frozen in assignment.frozen.items()
        if isinstance(start := assignment.start.get(site), LowRank)
        and _same_bits(start.a, frozen.a)
        and _same_bits(-start.b, frozen.b)
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(-1).view(whole), b.contiguous().view(-1).view(whole))


def write_trained(
    role: str, trained: Mapping[str, Delta], sent: Assignment, place: str
) -> dict[str, Tensor]:
    """Return the tensors that training may have changed, of an update to the assignment `sent`.

    PacketError if it changed what was not to be trained, or has other sites: neither would travel.
    """
    _check_sites(trained, sent, place)
    written: dict[str, Tensor] = {}
    for site, delta in trained.items():
        start, at = sent.start[site], f"{place}, {site!r}"
        if type(delta) is not type(start) or delta.shape != start.shape:
            expected = f"{type(start).__name__} of {start.shape}, as was sent"
            raise refusal(at, expected, f"{type(delta).__name__} of {delta.shape}")
        tensors = delta.tensors()
        for name in fixed(start, sent.train):
            before, after = start.tensors()[name], tensors.pop(name)
            if not torch.equal(before.to(after), after):
                raise refusal(at, f"{name} as it was sent", "another")
        written |= {f"{role}|{site}|{name}": tensor for name, tensor in tensors.items()}
    return written


def read_trained(packet: Packet, role: str, sent: Assignment) -> Adapter[Delta]:
    """Return the update to `sent` whose trained tensors a packet has, of any real dtype.

    PacketError for a site, kind or shape that was not sent, or that is missing.
    """
    update: dict[str, Delta] = {}
    for site, start in sent.start.items():
        tensors, dtypes = start.tensors(), [*REAL]
        untrained = fixed(start, sent.train)
        for name in [name for name in tensors if name not in untrained]:
            tensor = packet.tensor(f"{role}|{site}|{name}", tuple(tensors[name].shape), dtypes)
            tensors[name], dtypes = tensor, [tensor.dtype]
        for name in untrained:
            if tensors[name].is_floating_point():
                tensors[name] = tensors[name].to("cpu", dtypes[0])
        update[site] = from_tensors(tensors)
    return Adapter(update)


def _check_sites(trained: Mapping[str, Delta], sent: Assignment, place: str) -> None:
    if trained.keys() != sent.start.keys():
        missing = sorted(sent.start.keys() - trained.keys())
        extra = sorted(trained.keys() - sent.start.keys())
        raise refusal(
            place, f"the sites that were sent; {missing} are missing", extra or "the rest"
        )
