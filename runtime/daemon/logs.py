"""Where the log goes and how it looks: text for a person at a terminal, lines with a priority for the journal, JSON lines for everything else.

The same message again and again is written once, and then how often it came, each minute. Nothing that goes wrong here reaches those who log.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal, TextIO

from edgeadapt.runtime.daemon.plain import as_json, one_line
from edgeadapt.units import format_count

LOG = logging.getLogger("edgeadapt")

Looks = Literal["text", "journal", "json"]

LONGEST, REMEMBERED, MINUTE = 2000, 256, 60.0
"""Characters of a message; messages that are remembered to tell repeated ones; seconds in which these are counted."""

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_TRACE = logging.Formatter()


@dataclass
class _Seen:
    since: float
    more: int = 0


def set_up(
    level: int | str = "INFO", looks: Looks | None = None, stream: TextIO | None = None, environ: Mapping[str, str] | None = None
) -> LogHandler:
    """Sends what our modules log from that level on, and the warnings of all others, to a stream; called again it does so anew.

    Args:
        level: of the logger "edgeadapt": "DEBUG", "INFO", "WARNING", "ERROR".
        looks: None: by the stream; see `looks_of`.
        stream: None: standard error.
        environ: where JOURNAL_STREAM is looked up; None: the process's own environment.

    Returns:
        the handler, whose `tell_repeated` the daemon calls now and then.
    """
    target = sys.stderr if stream is None else stream
    handler = LogHandler(target, looks or looks_of(target, environ))
    root = logging.getLogger()
    for other in root.handlers[:]:
        if isinstance(other, LogHandler):
            root.removeHandler(other)
            other.close()
    root.addHandler(handler)
    LOG.setLevel(level)
    return handler


def looks_of(stream: TextIO, environ: Mapping[str, str] | None = None) -> Looks:
    """"journal" where the stream is the one that JOURNAL_STREAM names, by its device and inode; "text" at a terminal; else "json"."""
    named = (os.environ if environ is None else environ).get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(stream.fileno())
        if named == f"{found.st_dev}:{found.st_ino}":
            return "journal"
        return "text" if stream.isatty() else "json"
    except (OSError, ValueError):  # a stream without a file
        return "json"


class LogHandler(logging.Handler):
    """Writes records to a stream, repeated ones as a count. What cannot be written is lost, and counted in `lost`.

    Args:
        stream: is written to and flushed.
        looks: how a line looks.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO, looks: Looks, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._stream, self._looks, self._clock = stream, looks, clock
        self._seen: dict[tuple[str, int, str], _Seen] = {}
        self.lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, or counts it where the same was written within the last minute."""
        try:
            text = one_line(record.getMessage(), LONGEST)
            self._due()
            key = (record.name, record.levelno, text)
            if (seen := self._seen.get(key)) is not None:
                seen.more += 1
                return
            while len(self._seen) >= REMEMBERED:
                self._told(next(iter(self._seen)))
            self._seen[key] = _Seen(self._clock())
            self._write(record.name, record.levelno, record.created, text, _trace(record))
        except Exception:  # whoever logs goes on, whatever the log's trouble
            self.lost += 1

    def tell_repeated(self) -> None:
        """Writes the counts of the minutes that are over; the daemon calls it now and then, for messages that no other follows."""
        self.acquire()
        try:
            self._due()
        except Exception:
            self.lost += 1
        finally:
            self.release()

    def close(self) -> None:
        """Writes the counts that are open. The stream stays open."""
        self.acquire()
        try:
            for key in list(self._seen):
                self._told(key)
        except Exception:
            self.lost += 1
        finally:
            self.release()
        super().close()

    def _due(self) -> None:
        now = self._clock()
        for key, seen in list(self._seen.items()):
            if now - seen.since < MINUTE:
                continue
            again = seen.more > 0
            self._told(key)
            if again:  # who goes on is counted on
                self._seen[key] = _Seen(now)

    def _told(self, key: tuple[str, int, str]) -> None:
        seen = self._seen.pop(key)
        if seen.more:
            name, level, text = key
            seconds = max(1, round(self._clock() - seen.since))
            self._write(name, level, time.time(), f"{text} ({format_count(seen.more, 'more time')} in {seconds} s)", "")

    def _write(self, name: str, level: int, when: float, text: str, trace: str) -> None:
        word = logging.getLevelName(level).lower()
        if self._looks == "json":
            moment = datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds")
            more = {"trace": trace} if trace else {}
            lines = [as_json({"time": moment, "level": word, "logger": name, "text": text, **more})]
        else:
            lines = [text, *trace.splitlines()]
            if self._looks == "journal":
                lines = [f"<{_priority(level)}>{line}" for line in lines]
            else:
                lines[0] = f"{time.strftime('%H:%M:%S', time.localtime(when))} {word:<8} {text}"
        whole = "".join(f"{line}\n" for line in lines)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(whole.encode(encoding, "backslashreplace").decode(encoding))
        self._stream.flush()


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def _trace(record: logging.LogRecord) -> str:
    return _TRACE.formatException(record.exc_info) if record.exc_info and record.exc_info[0] is not None else ""
