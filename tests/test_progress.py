"""What long work shows: a redrawn line on a terminal, a line every tenth in a file, nothing where nobody looks."""

from __future__ import annotations

import io

import pytest

from edgeadapt.progress import Bars, duration, quiet

pytestmark = pytest.mark.device


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stream(io.StringIO):
    """A text stream with an encoding of its own."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False) -> None:
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


def test_a_file_gets_a_line_every_tenth() -> None:
    stream, clock = Stream(), Clock()
    bars = Bars(stream, clock=clock)
    for done in range(1, 101):
        clock.now += 1
        bars("warm-up", done, 100, f"loss {done}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "warm-up: 1%  loss 1"
    assert lines[5] == "warm-up: 50% 49 s left  loss 50"
    assert lines[10] == "warm-up: 100% in 1:39 min  loss 100"


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    stream, clock = Stream(terminal=True), Clock()
    with Bars(stream, columns=80, clock=clock) as bars:
        for done in range(0, 101):
            clock.now += 0.04
            bars("reading", done, 100)
        bars("next", 1, 4, "note")
    text = stream.getvalue()
    drawn = [part.partition("\x1b[K") for part in text.split("\r")[1:]]
    assert 30 < len(drawn) < 45, "not more often than ten times a second"
    assert drawn[0][0].startswith("reading ····")
    assert drawn[-2][0].startswith("reading " + "█" * 24 + " 100% in 4 s")
    assert [part[2] for part in drawn[-2:]] == ["\n", "\n"], "a stage and the whole end their lines"
    assert drawn[-1][0].startswith("next ██████····")
    assert drawn[-1][0].endswith("  note")
    assert all(len(part[0]) < 80 for part in drawn)


def test_a_narrow_terminal_and_one_without_unicode() -> None:
    stream = Stream("ascii", True)
    Bars(stream, columns=20)("stage", 1, 2, "a long note that does not fit")
    assert stream.getvalue() == "\rstage ############.\x1b[K"


def test_a_line_that_was_begun_is_ended_before_an_error_is_printed() -> None:
    stream = Stream(terminal=True)

    def work() -> None:
        with Bars(stream, columns=80) as bars:
            bars("stage", 1, 9)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        work()
    assert stream.getvalue().endswith("\n")


def test_work_of_unknown_length() -> None:
    stream = Stream()
    bars = Bars(stream)
    for done in range(5):
        bars("searching", done, 0)
    bars("other", 0, 0, "x")
    assert stream.getvalue() == "searching\nother  x\n"


def test_a_finished_stage_is_shown_once_and_may_come_again_later() -> None:
    stream = Stream()
    bars = Bars(stream)
    for stage in ("a", "a", "b", "a"):
        bars(stage, 1, 1)
    assert [line.partition(" in")[0] for line in stream.getvalue().splitlines()] == ["a: 100%", "b: 100%", "a: 100%"]


def test_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    bars = Bars(stream)
    stream.close()
    bars("stage", 1, 2)  # the reader has gone
    bars("stage", 2, 2)
    monkeypatch.setattr("sys.stderr", None)
    Bars()("stage", 1, 2)
    quiet("stage", 1, 2, "note")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3599.7, "1:00 h"), (7630, "2:07 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
