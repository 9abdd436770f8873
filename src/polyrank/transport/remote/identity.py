"""The TLS certificate of a split server: made for one run, pinned by its clients."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyrank.errors import FrameError

_CLOCK_SKEW = datetime.timedelta(days=1)
"""How far the clocks of two machines may be apart."""


@dataclass(frozen=True)
class Identity:
    """A server's certificate and its private key, both PEM; the key is not shown."""

    certificate: bytes
    key: bytes = field(repr=False)


def new_identity(hosts: Sequence[str], *, days: float = 30.0) -> Identity:
    """Return a new self-signed certificate for these hosts, and its key (EC P-256).

    `hosts` are the names and IP addresses at which clients reach the server; `days` is how long it
    is valid. It cannot sign other certificates: whoever trusts it trusts this server alone.

    Raises FrameError without hosts, for a host that is no name or address, or days of 0 or less.
    """
    if not hosts or not days > 0:
        raise FrameError(
            f"certificate: expected one host or more and days above 0; {list(hosts)} and {days} "
            "came"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "polyrank split server")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        if not host:
            raise ValueError
        return x509.DNSName(host)
    except ValueError as error:
        raise FrameError(
            f"certificate: expected a host name in ASCII or an IP address; {host!r} came"
        ) from error
