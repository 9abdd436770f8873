"""Credentials of a split client: the server's address, certificate and token."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field

from polyrank.codecs import codec
from polyrank.errors import FrameError
from polyrank.settings import LONGEST_WAIT
from polyrank.transport.layout import NAME_BYTES, FrameLimits

TOKEN_BYTES = 32
_CERTIFICATE_BYTES = 16384
_ADDRESS_BYTES = 300


@dataclass(frozen=True)
class Credentials:
    """What one client needs to reach the split server in one round and attempt.

    `address` is host:port as the client dials it, `certificate` the server's (PEM), which the
    client pins. `token` (32 bytes) is accepted once; it is left out of `repr`. `limits` are the
    agreed sizes and codec. `patience` is how many seconds a reply may take, reconnecting included.

    Raises FrameError, naming the field, for values out of range.
    """

    address: str
    certificate: bytes = field(repr=False)
    run: str
    round: int
    attempt: int
    client: str
    token: bytes = field(repr=False)
    limits: FrameLimits
    patience: float

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16) or (
            len(self.address) > _ADDRESS_BYTES
        ):
            raise FrameError(
                f"credentials, address: expected host:port; {self.address[:80]!r} came"
            )
        pem = self.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
        if not pem or len(self.certificate) > _CERTIFICATE_BYTES:
            raise FrameError(
                f"credentials, certificate: expected PEM of at most {_CERTIFICATE_BYTES} bytes; "
                f"{len(self.certificate)} bytes came"
            )
        for name in ("run", "client"):
            length = len(getattr(self, name).encode("utf-8", "replace"))
            if not 0 < length <= NAME_BYTES:
                raise FrameError(
                    f"credentials, {name}: expected 1 to {NAME_BYTES} bytes; {length} came"
                )
        for name in ("round", "attempt"):
            if not 0 <= getattr(self, name) < 2**32:
                raise FrameError(
                    f"credentials, {name}: expected 0 to 2^32 - 1; {getattr(self, name)} came"
                )
        if len(self.token) != TOKEN_BYTES:
            raise FrameError(
                f"credentials, token: expected {TOKEN_BYTES} bytes; {len(self.token)} came"
            )
        if not (self.limits.tokens > 0 and self.limits.width > 0):
            raise FrameError(
                f"credentials, limits: expected tokens and width above 0; {self.limits.tokens} and "
                f"{self.limits.width} came"
            )
        if not 0 < self.patience <= LONGEST_WAIT:
            raise FrameError(
                f"credentials, patience: expected seconds above 0, at most {LONGEST_WAIT:.0f}; "
                f"{self.patience} came"
            )

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON, bytes in base64; the token is among them."""
        return {
            "address": self.address,
            "certificate": base64.b64encode(self.certificate).decode("ascii"),
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "client": self.client,
            "token": base64.b64encode(self.token).decode("ascii"),
            "tokens": self.limits.tokens,
            "width": self.limits.width,
            "wire": self.limits.codec.name,
            "patience": self.patience,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Credentials:
        """Return what `to_dict` wrote; FrameError, naming the field, for anything else."""
        expected = {*_TEXTS, *_NUMBERS, "certificate", "token", "patience"}
        if not isinstance(fields, Mapping) or set(fields) != expected:
            names = sorted(map(str, fields)) if isinstance(fields, Mapping) else type(fields)
            raise FrameError(f"credentials: expected the fields {sorted(expected)}; {names} came")
        texts = {name: _text(fields, name) for name in _TEXTS}
        numbers = {name: _number(fields, name) for name in _NUMBERS}
        patience = fields["patience"]
        if isinstance(patience, bool) or not isinstance(patience, int | float):
            raise FrameError(f"credentials, patience: expected a number; {patience!r} came")
        return cls(
            address=texts["address"],
            certificate=_bytes(fields, "certificate"),
            run=texts["run"],
            round=numbers["round"],
            attempt=numbers["attempt"],
            client=texts["client"],
            token=_bytes(fields, "token"),
            limits=FrameLimits(numbers["tokens"], numbers["width"], codec(texts["wire"])),
            patience=float(patience),
        )


_TEXTS = ("address", "run", "client", "wire")
_NUMBERS = ("round", "attempt", "tokens", "width")


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise FrameError(f"credentials, {name}: expected a text; {type(value).__name__} came")
    return value


def _number(fields: Mapping[str, object], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise FrameError(f"credentials, {name}: expected a whole number of 0 to 2^32 - 1")
    return value


def _bytes(fields: Mapping[str, object], name: str) -> bytes:
    text = _text(fields, name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        # The text is not shown and the error not chained: they may hold a secret.
        raise FrameError(f"credentials, {name}: expected base64; other text came") from None
