"""Progress of long work on a terminal: one line that is redrawn, or a line every tenth where the output is a file.

Functions that take long accept a `Progress` and call it as they go; they know nothing of terminals. `quiet` is the one that shows nothing.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, TextIO

FILL, EMPTY = "█", "·"
REDRAW = 0.1  # seconds between two drawings of a terminal line
WIDTH = 24


class Progress(Protocol):
    """Whoever wants to know how far a piece of work is."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `stage` are finished (total 0: unknown); `note` is a few words, such as a loss."""


def quiet(stage: str, done: int, total: int, note: str = "") -> None:
    """Shows nothing."""


class Bars:
    """Shows progress on a stream; a context manager, so that an error message starts on a line of its own.

    Args:
        stream: where to; standard error by default. None (a process without one) shows nothing.
        terminal: redraw one line; found out from the stream by default.
        columns: width of the terminal in characters; asked of it by default.
        clock: seconds, for the time that is left.
    """

    def __init__(
        self, stream: TextIO | None = None, terminal: bool | None = None, columns: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream: TextIO | None = sys.stderr if stream is None else stream
        self._terminal = bool(self._stream and self._stream.isatty()) if terminal is None else terminal
        self._columns, self._clock = columns, clock
        self._plain = not _can_write(self._stream, FILL)
        self._stage = ""
        self._begun = self._drawn = 0.0
        self._tenth = -1
        self._open = False

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        if stage != self._stage:
            self.close()
            self._stage, self._begun, self._drawn, self._tenth = stage, now, -1.0, -1
        elif self._tenth == 10:
            return  # finished and said so
        finished = total > 0 and done >= total
        if self._terminal:
            if finished or now - self._drawn >= REDRAW:
                self._drawn = now
                self._draw(self._line(done, total, note, now))
                self._open = True
                if finished:
                    self._tenth = 10
                    self.close(keep=True)
            return
        tenth = min(10, 10 * done // total) if total > 0 else 0
        if tenth > self._tenth:
            self._tenth = tenth
            self._write(self._line(done, total, note, now).rstrip() + "\n")

    def close(self, keep: bool = False) -> None:
        """Ends the line that is being redrawn, if there is one; the next call starts a new one."""
        if self._open:
            self._write("\n")
            self._open = False
        if not keep:
            self._stage = ""

    def _line(self, done: int, total: int, note: str, now: float) -> str:
        passed = now - self._begun
        if total <= 0:
            text = f"{self._stage}: {done}" if done else self._stage
        else:
            share = min(1.0, done / total)
            left = passed * (1 - share) / share if share > 0 else 0.0
            times = f"in {duration(passed)}" if done >= total else f"{duration(left)} left" if done > 0 and passed > 0 else ""
            if self._terminal:
                full = round(WIDTH * share)
                fill, empty = ("#", ".") if self._plain else (FILL, EMPTY)
                text = f"{self._stage} {fill * full}{empty * (WIDTH - full)} {share:4.0%} {times}"
            else:
                text = f"{self._stage}: {share:.0%} {times}".rstrip()
        return f"{text}  {note}" if note else text

    def _draw(self, line: str) -> None:
        columns = self._columns or shutil.get_terminal_size().columns
        self._write("\r" + line[: max(1, columns - 1)] + "\x1b[K")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the reader has gone: the work goes on
            self._stream = None


def duration(seconds: float) -> str:
    """Seconds as people say them: `"8 s"`, `"3:05 min"`, `"2:07 h"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def _can_write(stream: TextIO | None, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
