"""What a log says of a run, and that a bar counts everybody's answers."""

import io

import pytest

from eval_vqa import progress
from eval_vqa.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("done", "seconds", "line"),
    [
        (50, 10.0, "50 of 1,000 questions, 4.0 questions/s, 3 min 58 s left"),
        (10, 10.0, "10 of 1,000 questions, 0.0 questions/s, time left unknown"),
        (11, 100.0, "11 of 1,000 questions, 0.0 questions/s, 27 h 28 min left"),
        (910, 10.0, "910 of 1,000 questions, 90.0 questions/s, 1 s left"),
    ],
)
def test_a_line_has_rate_and_time_left(done, seconds, line):
    """What an earlier start answered does not count for the rate."""
    assert Progress(1000, 10, file=io.StringIO()).line(done, seconds) == line


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 61.0, 61.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    log = io.StringIO()
    with Progress(100, 0, file=log) as shown:
        for done in (1, 61, 62):
            shown.show(done)
    assert log.getvalue() == "61 of 100 questions, 1.0 questions/s, 39 s left\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    with Progress(100, 20, file=terminal) as shown:
        shown.show(100)
    assert "100/100" in terminal.getvalue() and "question/s" in terminal.getvalue()


def test_only_the_first_rank_shows_anything():
    terminal = Terminal()
    with Progress(10, 0, visible=False, file=terminal) as shown:
        shown.show(10)
    assert terminal.getvalue() == ""
