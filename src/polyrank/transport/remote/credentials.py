"""How a split client reaches its tail: what its order brings it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field

from polyrank.errors import FrameError
from polyrank.transport.codec import codec
from polyrank.transport.layout import LONGEST_WAIT, NAME_BYTES, Limits

TOKEN_BYTES = 32
_CERTIFICATE_BYTES = 16384
_ADDRESS_BYTES = 300


@dataclass(frozen=True)
class Credentials:
    """The way to one tail, for one client's work in one round and attempt; the token is not shown.

    `address` is host:port as the client dials it, `certificate` the server's (PEM), which the
    client pins. `token` (32 bytes) redeems once. `limits` are the agreed sizes and codec.
    `patience` is how many seconds an answer may take, reconnecting included.

    Raises FrameError, naming the field, for values that cannot be.
    """

    address: str
    certificate: bytes = field(repr=False)
    run: str
    round: int
    attempt: int
    client: str
    token: bytes = field(repr=False)
    limits: Limits
    patience: float

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16) or (
            len(self.address) > _ADDRESS_BYTES
        ):
            raise FrameError(f"access, address: expected host:port; {self.address[:80]!r} came")
        pem = self.certificate.startswith(b"-----BEGIN CERTIFICATE-----")
        if not pem or len(self.certificate) > _CERTIFICATE_BYTES:
            raise FrameError(
                f"access, certificate: expected PEM of at most {_CERTIFICATE_BYTES} bytes; "
                f"{len(self.certificate)} bytes came"
            )
        for name in ("run", "client"):
            length = len(getattr(self, name).encode("utf-8", "replace"))
            if not 0 < length <= NAME_BYTES:
                raise FrameError(f"access, {name}: expected 1 to {NAME_BYTES} bytes; {length} came")
        for name in ("round", "attempt"):
            if not 0 <= getattr(self, name) < 2**32:
                raise FrameError(
                    f"access, {name}: expected 0 to 2^32 - 1; {getattr(self, name)} came"
                )
        if len(self.token) != TOKEN_BYTES:
            raise FrameError(f"access, token: expected {TOKEN_BYTES} bytes; {len(self.token)} came")
        if not (self.limits.tokens > 0 and self.limits.width > 0):
            raise FrameError(
                f"access, limits: expected tokens and width above 0; {self.limits.tokens} and "
                f"{self.limits.width} came"
            )
        if not 0 < self.patience <= LONGEST_WAIT:
            raise FrameError(
                f"access, patience: expected seconds above 0, at most {LONGEST_WAIT:.0f}; "
                f"{self.patience} came"
            )

    def to_dict(self) -> dict[str, object]:
        """Return it as texts and numbers, bytes in base64; this holds the token."""
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
            raise FrameError(f"access: expected the fields {sorted(expected)}; {names} came")
        texts = {name: _text(fields, name) for name in _TEXTS}
        numbers = {name: _number(fields, name) for name in _NUMBERS}
        patience = fields["patience"]
        if isinstance(patience, bool) or not isinstance(patience, int | float):
            raise FrameError(f"access, patience: expected a number; {patience!r} came")
        return cls(
            address=texts["address"],
            certificate=_bytes(fields, "certificate"),
            run=texts["run"],
            round=numbers["round"],
            attempt=numbers["attempt"],
            client=texts["client"],
            token=_bytes(fields, "token"),
            limits=Limits(numbers["tokens"], numbers["width"], codec(texts["wire"])),
            patience=float(patience),
        )


_TEXTS = ("address", "run", "client", "wire")
_NUMBERS = ("round", "attempt", "tokens", "width")


def _text(fields: Mapping[str, object], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise FrameError(f"access, {name}: expected a text; {type(value).__name__} came")
    return value


def _number(fields: Mapping[str, object], name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise FrameError(f"access, {name}: expected a whole number of 0 to 2^32 - 1")
    return value


def _bytes(fields: Mapping[str, object], name: str) -> bytes:
    text = _text(fields, name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        # What came is not shown, nor chained: it may hold a secret.
        raise FrameError(f"access, {name}: expected base64; other text came") from None
