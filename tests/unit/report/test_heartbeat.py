import re
import time
from io import StringIO

import pytest
from rich.console import Console

from polyrank.compare.progress import ComparisonProgress
from polyrank.report.heartbeat import SECONDS, Heartbeat
from polyrank.report.progress import RunProgress


def lines_of(out: StringIO) -> list[str]:
    return out.getvalue().splitlines()


def wait_for_lines(out: StringIO, count: int) -> list[str]:
    end = time.monotonic() + 20
    while len(lines_of(out)) < count and time.monotonic() < end:
        time.sleep(0.01)
    return lines_of(out)


def test_a_line_comes_at_least_every_half_minute() -> None:
    assert SECONDS <= 30


def test_lines_come_while_nothing_else_is_printed_also_within_one_long_step() -> None:
    out = StringIO()
    beat = Heartbeat(Console(file=out), lambda: "at work", 0.02)
    beat.start()
    try:
        assert wait_for_lines(out, 3)[:3] == ["at work"] * 3
    finally:
        beat.stop()
    ended = len(lines_of(out))
    time.sleep(0.1)
    assert len(lines_of(out)) == ended


def test_no_line_comes_where_others_were_printed_just_now() -> None:
    out = StringIO()
    beat = Heartbeat(Console(file=out), lambda: "at work", 5)
    beat.start()
    for _ in range(20):
        beat.printed()
        time.sleep(0.01)
    beat.stop()
    assert lines_of(out) == []


def test_a_terminal_has_its_bar_instead() -> None:
    out = StringIO()
    beat = Heartbeat(Console(file=out, force_terminal=True), lambda: "at work", 0.01)
    beat.start()
    time.sleep(0.2)
    beat.stop()
    assert out.getvalue() == ""


def test_a_run_tells_its_phase_the_clients_and_the_seconds() -> None:
    out = StringIO()
    with RunProgress(Console(file=out), seconds=0.02) as progress:
        progress.loading("model")
        wait_for_lines(out, 1)
        progress.progress("train", 5, 20)
        at = len(lines_of(out)) + 1  # One may be on its way.
        told = wait_for_lines(out, at + 1)
    assert re.fullmatch(r"loading model, \d+ s", told[0])
    assert re.fullmatch(r"training, 5 of 20 clients, \d+ s", told[at])


def test_a_comparison_tells_its_run_the_round_and_the_seconds() -> None:
    out = StringIO()
    with ComparisonProgress(Console(file=out), seconds=0.02) as progress:
        progress.next_run(2, 6, "fedit, rate 0.001, seed 1")
        told = wait_for_lines(out, 1)
    assert re.fullmatch(r"run 2/6, round 1/1, \d+ s: fedit, rate 0.001, seed 1", told[0])


def test_colours_are_left_out_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = StringIO()
    with RunProgress(Console(file=out, force_terminal=True)) as progress:
        progress.console.print("warning", style="yellow")
    assert "\x1b[33m" not in out.getvalue()
