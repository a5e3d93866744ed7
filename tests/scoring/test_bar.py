"""Long work shows how far it is: lines of the log where there is no terminal, a bar where there is."""

import io
import logging

import pytest
from numbered_prints import NUMBERED, Numbers

from ifvit import bar as bars
from ifvit.data.pairs import Pair
from ifvit.scoring.scores import score_pairs


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(bars, "time", made)
    return made


def lines_of(caplog, clock, total, count, seconds):
    """`total` units, `count` at a time, each time after so many seconds."""
    with caplog.at_level(logging.INFO, "ifvit"), bars.bar("scoring", total, "pair") as shown:
        for _ in range(total // count):
            clock.now += seconds
            shown.update(count)
    return [r.getMessage() for r in caplog.records]


def test_without_a_terminal_a_line_a_minute_says_how_long_is_left(caplog, clock):
    assert lines_of(caplog, clock, 7200, 20, 1) == [
        f"scoring: {1200 * n:,} of 7,200 pairs, 20.0 a second, 0{6 - n}:00 left" for n in range(1, 6)
    ]


def test_what_is_done_within_a_minute_says_nothing(caplog, clock):
    assert lines_of(caplog, clock, 100, 10, 5) == []


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(bars, "QUIET", 0.0)
    with bars.bar("scoring", 40, "pair") as shown:
        shown.update(20)
        shown.refresh()
    assert "scoring:  50%" in terminal.getvalue() and "20/40" in terminal.getvalue()


def test_scoring_tells_each_batch(monkeypatch):
    told = []

    class Shown:
        update = staticmethod(told.append)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("ifvit.scoring.scores.bar", lambda name, total, unit: Shown())
    score_pairs(NUMBERED, (), Numbers(), 10 * [Pair(0, 1, True)], 4)
    assert told == [4, 4, 2]
