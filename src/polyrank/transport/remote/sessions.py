"""Who may speak for which client: tokens that redeem once, and secrets that resume."""

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
_NOBODY = bytes(32)
_NEW_ORDER = "the client needs a new order from the run"


@dataclass(frozen=True)
class Work:
    """What a token is bound to: one client's work in one round and attempt of a run."""

    run: str
    round: int
    attempt: int
    client: str


def proof(secret: bytes, nonce: bytes, work: Work) -> bytes:
    """Return HMAC-SHA256(secret, nonce, run, round, attempt, client), 32 bytes.

    Every field is preceded by its length, so that no two works are written alike.
    """
    fields = (
        nonce,
        work.run.encode(),
        struct.pack(">I", work.round),
        struct.pack(">I", work.attempt),
        work.client.encode(),
    )
    written = b"".join(struct.pack(">I", len(one)) + one for one in fields)
    return hmac.digest(secret, written, "sha256")


@dataclass
class _Session:
    digest: bytes = field(repr=False)
    expires: float
    secret: bytes | None = field(default=None, repr=False)


class Sessions:
    """Judges tokens and proofs; holds one session per piece of work, and of a token its SHA-256.

    Whatever is wrong with what came, its refusal says the same, in about the same time: it tells
    nobody which clients there are, or whether they have connected. `clock` is in seconds. May be
    used from several threads.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock, self._random = clock, random
        self._sessions: dict[Work, _Session] = {}
        self._lock = threading.Lock()

    def issue(self, work: Work, seconds: float) -> bytes:
        """Return a new token for this work, 32 random bytes that are accepted for so long.

        FrameError if it has one already.
        """
        token = self._random(TOKEN_BYTES)
        with self._lock:
            if work in self._sessions:
                raise FrameError(f"{work}: expected one token for a piece of work")
            digest = hashlib.sha256(token).digest()
            self._sessions[work] = _Session(digest, self._clock() + seconds)
        return token

    def redeem(self, work: Work, token: bytes, secret: bytes) -> None:
        """Accept a token, and the secret by which its client may resume.

        Raises FrameError for what is no token of this work, or has expired or was redeemed.
        """
        with self._lock:
            found = self._sessions.get(work)
            digest = _NOBODY if found is None else found.digest
            same = hmac.compare_digest(hashlib.sha256(token).digest(), digest)
            if len(secret) != SECRET_BYTES:
                raise FrameError(f"secret: expected {SECRET_BYTES} bytes; {len(secret)} came")
            if (
                found is None
                or not same
                or found.secret is not None
                or self._clock() >= found.expires
            ):
                raise FrameError(
                    "the token is not accepted: it is of other work than is open here, has "
                    f"expired, or was redeemed already; {_NEW_ORDER}"
                )
            found.secret = secret

    def challenge(self) -> bytes:
        """Return 32 random bytes for one stream."""
        return self._random(NONCE_BYTES)

    def prove(self, work: Work, nonce: bytes, given: bytes) -> None:
        """Accept the proof that who resumes knows the secret; FrameError otherwise."""
        with self._lock:
            found = self._sessions.get(work)
            known = found is not None and found.secret is not None
            secret = found.secret if found is not None and found.secret is not None else _NOBODY
            same = hmac.compare_digest(proof(secret, nonce, work), given)
            if not (known and same):
                raise FrameError(
                    "there is no session here that this proof fits: the token was not redeemed, "
                    f"or the round has ended; {_NEW_ORDER} unless it has a token still"
                )

    def clear(self) -> None:
        """End all sessions; no token is accepted any more."""
        with self._lock:
            self._sessions.clear()
