"""Who may speak for which client: tokens redeem once, and only their secret resumes."""

import pytest

from polyrank.errors import FrameError
from polyrank.transport.remote.sessions import SessionId, Sessions, proof

WORK = SessionId("run", 2, 1, "a")
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
    return sessions, sessions.issue(WORK, 10.0), clock


def test_a_token_redeems_once():
    sessions, token, _ = opened()
    sessions.redeem(WORK, token, SECRET)
    with pytest.raises(FrameError, match="not accepted"):
        sessions.redeem(WORK, token, SECRET)
    sessions.prove(WORK, NONCE, proof(SECRET, NONCE, WORK))


@pytest.mark.parametrize("other", OTHERS)
def test_a_token_is_of_one_piece_of_work_alone(other):
    sessions, token, _ = opened()
    sessions.issue(other, 10.0)
    with pytest.raises(FrameError, match="not accepted"):
        sessions.redeem(other, token, SECRET)
    sessions.redeem(WORK, token, SECRET)


def test_a_token_expires_and_a_session_does_not():
    sessions, token, clock = opened()
    clock.now += 10.0
    with pytest.raises(FrameError, match="has expired"):
        sessions.redeem(WORK, token, SECRET)
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
        sessions.redeem(WORK, token, SECRET)
    with pytest.raises(FrameError):
        sessions.prove(other, NONCE, proof(SECRET, NONCE, other))


def test_only_the_secret_resumes_and_only_its_work_and_nonce():
    sessions, token, _ = opened()
    with pytest.raises(FrameError):  # before the token was redeemed nobody resumes
        sessions.prove(WORK, NONCE, proof(bytes(32), NONCE, WORK))
    sessions.redeem(WORK, token, SECRET)
    wrong = [
        proof(b"t" * 32, NONCE, WORK),
        proof(bytes(32), NONCE, WORK),
        proof(SECRET, b"m" * 32, WORK),
        *(proof(SECRET, NONCE, other) for other in OTHERS),
        b"",
        token,
    ]
    for given in wrong:
        with pytest.raises(FrameError, match="no session"):
            sessions.prove(WORK, NONCE, given)
    with pytest.raises(FrameError):
        sessions.prove(OTHERS[0], NONCE, proof(SECRET, NONCE, OTHERS[0]))
    sessions.prove(WORK, NONCE, proof(SECRET, NONCE, WORK))


def test_no_two_works_are_proved_alike():
    """Texts run into each other unless their lengths count."""
    one, other = SessionId("ab", 1, 1, "c"), SessionId("a", 1, 1, "bc")
    assert proof(SECRET, NONCE, one) != proof(SECRET, NONCE, other)


def test_refusals_say_the_same_whatever_is_wrong_and_show_nothing():
    sessions, token, _ = opened()
    reasons = set()
    for work, given in ((OTHERS[0], token), (WORK, b"x" * 32)):
        with pytest.raises(FrameError) as caught:
            sessions.redeem(work, given, SECRET)
        reasons.add(str(caught.value))
    sessions.redeem(WORK, token, SECRET)
    with pytest.raises(FrameError) as caught:
        sessions.redeem(WORK, token, SECRET)
    reasons.add(str(caught.value))
    assert len(reasons) == 1
    held = repr(vars(sessions))
    assert repr(token) not in held
    assert repr(SECRET) not in held


def test_tokens_and_nonces_are_fresh_and_a_work_has_one_token():
    sessions, token, _ = opened()
    others = {sessions.issue(other, 1.0) for other in OTHERS} | {sessions.challenge(), token}
    assert len(others) == len(OTHERS) + 2
    assert {len(one) for one in others} == {32}
    with pytest.raises(FrameError, match="one token"):
        sessions.issue(WORK, 1.0)


def test_a_secret_of_another_length_spends_no_token():
    sessions, token, _ = opened()
    with pytest.raises(FrameError, match="secret: expected 32 bytes"):
        sessions.redeem(WORK, token, b"short")
    sessions.redeem(WORK, token, SECRET)
