"""What each client did in a run: rounds, bytes, refusals, lateness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_REFUSED = {"invalid", "failed", "refused"}
_COUNTED = {**dict.fromkeys(_REFUSED, "refused"), "late": "late", "lost": "lost"}


def attendance(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int | None]]:
    """Return per client that was ever asked what it did in all rounds, in order of the names.

    ``rounds_joined`` counts the rounds with an accepted update of it, ``bytes_up`` and
    ``bytes_down`` all that travelled, ``refused`` the answers that said no or could not be used,
    ``late`` and ``lost`` how often none came in time, or at all. `records` are read once, in one
    pass. Records of before say no bytes per client, which are then None for all, and of refusals
    only how many clients had no accepted update in an attempt.
    """
    found: dict[str, dict[str, int]] = {}
    measured = True
    for record in records:
        traffic, away = record.get("traffic"), record.get("turned_away", [])
        measured &= traffic is not None
        for client in record["clients"]:
            _of(found, client)["rounds_joined"] += client not in record["rejected"]
        for client, count in (traffic or {}).items():
            for way, nbytes in count.items():
                _of(found, client)[f"bytes_{way}"] += nbytes
        if traffic is None:
            attempts = [record["rejected"], *record["abandoned"]]
            away = [{"client": c, "kind": "failed"} for one in attempts for c in one]
        for one in away:
            if one["kind"] in _COUNTED:
                _of(found, one["client"])[_COUNTED[one["kind"]]] += 1
    unknown = {} if measured else {"bytes_up": None, "bytes_down": None}
    return {client: {**found[client], **unknown} for client in sorted(found)}


def _of(found: dict[str, dict[str, int]], client: str) -> dict[str, int]:
    names = ("rounds_joined", "bytes_up", "bytes_down", "refused", "late", "lost")
    return found.setdefault(client, dict.fromkeys(names, 0))
