"""Progress of long work: lines in a log, a bar on a terminal."""

import io

import pytest

from tvaprune import progress
from tvaprune.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_whole_lines_that_end_with_the_last_step() -> None:
    log = io.StringIO()
    for _ in Progress(range(200), desc="gates", file=log):
        pass
    assert "\r" not in log.getvalue()
    (line,) = log.getvalue().splitlines()
    assert line.startswith("gates: 100%")
    assert "200/200" in line


def test_lines_come_between_when_their_time_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    log = io.StringIO()
    with Progress(total=3, desc="steps", file=log) as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert all(line.startswith("steps: ") for line in lines)
    assert "1/3" in log.getvalue()
    assert "3/3" in lines[-1]


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    terminal = Terminal()
    for _ in Progress(range(3), desc="gates", file=terminal):
        pass
    assert terminal.getvalue().startswith("\rgates:   0%|")
    assert "<" in terminal.getvalue()


def test_a_bar_that_is_off_writes_nothing() -> None:
    log = io.StringIO()
    for _ in Progress(range(3), file=log, disable=True):
        pass
    assert log.getvalue() == ""
