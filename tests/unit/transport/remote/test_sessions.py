"""Authentication: a token is accepted once, and only its secret resumes the session."""

import pytest

from polyrank.errors import FrameError
from polyrank.transport.remote.sessions import SessionId, Sessions, proof

SESSION = SessionId("run", 2, 1, "a")
SECRET, NONCE = b"s" * 32, b"n" * 32
OTHERS = [
    SessionId("other", 2, 1, "a"),
    SessionId("run", 3, 1, "a"),
    SessionId("run", 2, 0, "a"),
    SessionId("run", 2, 1, "b"),
]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def opened():
    clock = Clock()
    sessions = Sessions(clock)
    return sessions, sessions.issue(SESSION, 10.0), clock


def test_a_token_redeems_once():
    sessions, token, _ = opened()
    sessions.redeem(SESSION, token, SECRET)
    with pytest.raises(FrameError, match="not accepted"):
        sessions.redeem(SESSION, token, SECRET)
    sessions.prove(SESSION, NONCE, proof(SECRET, NONCE, SESSION))


@pytest.mark.parametrize("other", OTHERS)
def test_a_token_is_valid_for_one_session_alone(other):
    sessions, token, _ = opened()
    sessions.issue(other, 10.0)
    with pytest.raises(FrameError, match="not accepted"):
        sessions.redeem(other, token, SECRET)
    sessions.redeem(SESSION, token, SECRET)


def test_a_token_expires_and_a_session_does_not():
    sessions, token, clock = opened()
    clock.now += 10.0
    with pytest.raises(FrameError, match="has expired"):
        sessions.redeem(SESSION, token, SECRET)
    other, clock.now = SessionId("run", 2, 1, "b"), 100.0
    sessions.redeem(other, sessions.issue(other, 10.0), SECRET)
    clock.now += 1000.0
    sessions.prove(other, NONCE, proof(SECRET, NONCE, other))


def test_nothing_is_accepted_after_the_end():
    sessions, token, _ = opened()
    other = OTHERS[0]
    sessions.redeem(other, sessions.issue(other, 10.0), SECRET)
    sessions.clear()
    with pytest.raises(FrameError):
        sessions.redeem(SESSION, token, SECRET)
    with pytest.raises(FrameError):
        sessions.prove(other, NONCE, proof(SECRET, NONCE, other))


def test_only_the_secret_resumes_and_only_its_work_and_nonce():
    sessions, token, _ = opened()
    with pytest.raises(FrameError):  # before the token was redeemed nobody resumes
        sessions.prove(SESSION, NONCE, proof(bytes(32), NONCE, SESSION))
    sessions.redeem(SESSION, token, SECRET)
    wrong = [
        proof(b"t" * 32, NONCE, SESSION),
        proof(bytes(32), NONCE, SESSION),
        proof(SECRET, b"m" * 32, SESSION),
        *(proof(SECRET, NONCE, other) for other in OTHERS),
        b"",
        token,
    ]
    for given in wrong:
        with pytest.raises(FrameError, match="no session"):
            sessions.prove(SESSION, NONCE, given)
    with pytest.raises(FrameError):
        sessions.prove(OTHERS[0], NONCE, proof(SECRET, NONCE, OTHERS[0]))
    sessions.prove(SESSION, NONCE, proof(SECRET, NONCE, SESSION))


def test_no_two_works_are_proved_alike():
    """Texts run into each other unless their lengths count."""
    one, other = SessionId("ab", 1, 1, "c"), SessionId("a", 1, 1, "bc")
    assert proof(SECRET, NONCE, one) != proof(SECRET, NONCE, other)


def test_refusals_say_the_same_whatever_is_wrong_and_show_nothing():
    sessions, token, _ = opened()
    reasons = set()
    for work, given in ((OTHERS[0], token), (SESSION, b"x" * 32)):
        with pytest.raises(FrameError) as caught:
            sessions.redeem(work, given, SECRET)
        reasons.add(str(caught.value))
    sessions.redeem(SESSION, token, SECRET)
    with pytest.raises(FrameError) as caught:
        sessions.redeem(SESSION, token, SECRET)
    reasons.add(str(caught.value))
    assert len(reasons) == 1
    held = repr(vars(sessions))
    assert repr(token) not in held
    assert repr(SECRET) not in held


def test_tokens_and_nonces_are_fresh_and_a_session_has_one_token():
    sessions, token, _ = opened()
    others = {sessions.issue(other, 1.0) for other in OTHERS} | {sessions.challenge(), token}
    assert len(others) == len(OTHERS) + 2
    assert {len(one) for one in others} == {32}
    with pytest.raises(FrameError, match="one token"):
        sessions.issue(SESSION, 1.0)


def test_a_secret_of_another_length_spends_no_token():
    sessions, token, _ = opened()
    with pytest.raises(FrameError, match="secret: expected 32 bytes"):
        sessions.redeem(SESSION, token, b"short")
    sessions.redeem(SESSION, token, SECRET)
