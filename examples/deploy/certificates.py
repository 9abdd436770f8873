"""The keys of a deployment, by the commands of docs/how-to/deployment.md (openssl, ssh-keygen)."""

from __future__ import annotations

import subprocess
from pathlib import Path


def make_authority(folder: Path, name: str = "ca") -> None:
    """Make a certificate authority: NAME.key and NAME.crt."""
    _run(
        folder,
        *("openssl", "req", "-x509", "-nodes", "-days", "365", *_NEW_KEY, f"{name}.key"),
        *("-subj", "/CN=polyrank example", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        *("-out", f"{name}.crt"),
    )


def make_server(folder: Path, host: str = "IP:127.0.0.1", authority: str = "ca") -> None:
    """Make a server's certificate for a host (``DNS:…`` or ``IP:…``): server.key and server.pem."""
    (folder / "server.ext").write_text(
        f"subjectAltName={host}\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n"
    )
    _run(
        folder,
        *("openssl", "req", "-new", "-nodes", *_NEW_KEY, "server.key"),
        *("-subj", "/CN=superlink", "-out", "server.csr"),
    )
    _run(
        folder,
        *("openssl", "x509", "-req", "-in", "server.csr", "-days", "365"),
        *("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-CAcreateserial"),
        *("-extfile", "server.ext", "-out", "server.pem"),
    )


def make_key(file: Path) -> Path:
    """Make a SuperNode's key, ECDSA on P-384; its public half lies beside it, FILE.pub."""
    _run(
        file.parent,
        *("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384"),
        *("-N", "", "-C", file.name, "-f", file.name),
    )
    return file


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout")


def _run(folder: Path, *command: str) -> None:
    try:
        subprocess.run(
            command, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True
        )
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace")
        raise RuntimeError(f"{command[0]} has failed: {told}") from error
