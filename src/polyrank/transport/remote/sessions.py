"""Authentication of clients: tokens that are accepted once, and secrets that resume a session."""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from polyrank.errors import FrameError
from polyrank.transport.remote.credentials import TOKEN_BYTES

SECRET_BYTES = NONCE_BYTES = 32
_NO_SECRET = bytes(32)
_NEW_REQUEST = "the client needs a new train request from the run"


@dataclass(frozen=True)
class SessionId:
    """What a token is valid for: one client's work in one round and attempt of a run."""

    run: str
    round: int
    attempt: int
    client: str


def proof(secret: bytes, nonce: bytes, session: SessionId) -> bytes:
    """Return HMAC-SHA256(secret, nonce, run, round, attempt, client), 32 bytes.

    Every field is preceded by its length, so no two sessions give the same bytes.
    """
    fields = (
        nonce,
        session.run.encode(),
        struct.pack(">I", session.round),
        struct.pack(">I", session.attempt),
        session.client.encode(),
    )
    written = b"".join(struct.pack(">I", len(value)) + value for value in fields)
    return hmac.digest(secret, written, "sha256")


@dataclass
class _Session:
    digest: bytes = field(repr=False)
    expires: float
    secret: bytes | None = field(default=None, repr=False)


class Sessions:
    """Checks tokens and proofs; of a token only its SHA-256 is kept.

    All refusals of one kind say the same and take about the same time, so that they do not reveal
    which clients exist or have connected. `clock` is in seconds. Thread-safe.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock, self._random = clock, random
        self._sessions: dict[SessionId, _Session] = {}
        self._lock = threading.Lock()

    def issue(self, session: SessionId, seconds: float) -> bytes:
        """Return a new token, 32 random bytes that are accepted for `seconds`.

        FrameError if the session has a token already.
        """
        token = self._random(TOKEN_BYTES)
        with self._lock:
            if session in self._sessions:
                raise FrameError(f"{session}: expected one token for a session")
            digest = hashlib.sha256(token).digest()
            self._sessions[session] = _Session(digest, self._clock() + seconds)
        return token

    def redeem(self, session: SessionId, token: bytes, secret: bytes) -> None:
        """Accept a token, and the secret with which its client may resume.

        Raises FrameError for a token of another session, or one that has expired or was redeemed.
        """
        with self._lock:
            known = self._sessions.get(session)
            digest = _NO_SECRET if known is None else known.digest
            same = hmac.compare_digest(hashlib.sha256(token).digest(), digest)
            if len(secret) != SECRET_BYTES:
                raise FrameError(f"secret: expected {SECRET_BYTES} bytes; {len(secret)} came")
            if (
                known is None
                or not same
                or known.secret is not None
                or self._clock() >= known.expires
            ):
                raise FrameError(
                    "the token is not accepted: it is of a session that is not open here, has "
                    f"expired, or was redeemed already; {_NEW_REQUEST}"
                )
            known.secret = secret

    def challenge(self) -> bytes:
        """Return a nonce for one stream, 32 random bytes."""
        return self._random(NONCE_BYTES)

    def prove(self, session: SessionId, nonce: bytes, given: bytes) -> None:
        """Accept a proof that the client knows the session's secret; FrameError for any other."""
        with self._lock:
            known = self._sessions.get(session)
            secret = None if known is None else known.secret
            expected = proof(_NO_SECRET if secret is None else secret, nonce, session)
            if not hmac.compare_digest(expected, given) or secret is None:
                raise FrameError(
                    "there is no session here that this proof fits: the token was not redeemed, "
                    f"or the round has ended; {_NEW_REQUEST} unless it has a token still"
                )

    def clear(self) -> None:
        """End all sessions; no token is accepted any more."""
        with self._lock:
            self._sessions.clear()
