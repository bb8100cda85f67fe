"""Memory running short while an adapter serves: how it is noticed, and how far to give way before predictions would stop.

No single sign is there on every board: Raspberry Pi OS starts with the memory cgroup switched off, pressure stall information is a kernel option,
and in a container /proc/meminfo is the host's. So every sign that is known is read, and the worst counts.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from edgeadapt.runtime import library
from edgeadapt.runtime.memory import resident
from edgeadapt.units import format_bytes

LOG = logging.getLogger("edgeadapt")


_LEAST, _MOST, _RELIEF = 16 * 2**20, 256 * 2**20, 64 * 2**20


class Level(IntEnum):
    """What is still done, from everything to the least."""

    NORMAL = 0
    PAUSED = 1
    SHED = 2
    PREDICT = 3

    def __str__(self) -> str:
        return ("normal", "adaptation paused", "caches released", "predicting only")[self]


class Sign(NamedTuple):
    """Something that says how memory stands. grade: 0 well, 1 short, 2 about to fail."""

    grade: int
    reason: str


WELL = Sign(0, "")


@dataclass(frozen=True)
class Marks:
    """When memory is called short, and how fast to follow.

    Attributes:
        reserve: bytes that the system should have left. None: a twentieth of its memory, from 16 to 256 MiB. For a cgroup it is a thirty-second
            of the limit, at most 256 MiB. Less than half of it is about to fail.
        stall: percent of the last ten seconds in which some process waited for memory.
        interval: seconds between two looks.
        dwell: seconds between two steps down, where memory is short but not about to fail.
        calm: seconds without a sign before a step up; twice as long after each one that did not last, up to 32 times.
    """

    reserve: int | None = None
    stall: float = 10.0
    interval: float = 0.25
    dwell: float = 1.0
    calm: float = 10.0


class Change(NamedTuple):
    """A change of level: seconds since the adapter was opened, from what to what, and why."""

    seconds: float
    before: Level
    after: Level
    reason: str

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s {self.after}: {self.reason}"


@dataclass
class _Group:
    """A cgroup with a limit: its files, and how often the limit was hit when last looked at."""

    limits: list[str]
    used: str
    statistics: str
    kind: bytes
    events: str
    hits: tuple[int, int] | None = None


class Signs:
    """Reads how memory stands. A sign that this system does not have is passed over.

    Args:
        budget: the most this process may hold resident, in bytes; None: no matter.
        planned: what it comes to hold by plan. All is well again where less than half of what that leaves is taken.
        marks: when memory is short.
        root: the folder that `proc` and `sys` lie in.
    """

    def __init__(self, budget: int | None, planned: int, marks: Marks, root: str = "/") -> None:
        self._root, self._marks, self._budget = root, marks, budget
        self._near = 0 if budget is None else budget - max(0, min(budget // 32, (budget - planned) // 2))
        self._groups = list(_groups(root))

    def read(self, more: int = 0, relief: bool = False) -> Sign:
        """The worst of all signs.

        Args:
            more: bytes that are about to be taken.
            relief: ask whether all is well again, which takes a quarter more than not being short, at most 64 MiB.
        """
        found = WELL
        groups = (self._group(group, more, relief) for group in self._groups)
        for sign in (self._own(more, relief), self._system(more, relief), self._stall(relief), *groups):
            if sign.grade > found.grade:
                found = sign
        return found

    def _own(self, more: int, relief: bool) -> Sign:
        if self._budget is None:
            return WELL
        most = self._near if relief else self._budget
        held = resident(self._root) + more
        if held > most:  # code that something else in the program brought in is no reason to give way
            held -= library.give_back(self._root)
        if held <= most:
            return WELL
        grade = 1 + (held > self._budget + self._budget // 32)
        return Sign(grade, f"the process holds {format_bytes(held)} of its budget of {format_bytes(self._budget)}")

    def _system(self, more: int, relief: bool) -> Sign:
        text = _bytes(self._root, "proc/meminfo")
        free, total = (re.search(rb"^%s:\s*(\d+) kB" % name, text, re.MULTILINE) for name in (b"MemAvailable", b"MemTotal"))
        if free is None or total is None:
            return WELL
        low = min(max(int(total[1]) * 1024 // 20, _LEAST), _MOST) if self._marks.reserve is None else self._marks.reserve
        return self._short(int(free[1]) * 1024 - more, low, relief, "the system has")

    @staticmethod
    def _short(left: int, low: int, relief: bool, who: str) -> Sign:
        if left >= (low + min(low // 4, _RELIEF) if relief else low):
            return WELL
        return Sign(1 + (left < low // 2), f"{who} {format_bytes(left)} left, less than {format_bytes(low)}")

    def _stall(self, relief: bool) -> Sign:
        found = re.search(rb"some avg10=([0-9.]+)", _bytes(self._root, "proc/pressure/memory"))
        if found is None or float(found[1]) < (self._marks.stall / 2 if relief else self._marks.stall):
            return WELL
        return Sign(1, f"processes waited for memory in {float(found[1]):.0f} % of the last ten seconds")

    def _group(self, group: _Group, more: int, relief: bool) -> Sign:
        limit = min((_number(path) or 2**63 for path in group.limits), default=2**63)
        used = _number(group.used)
        if limit >= 2**60 or used is None:  # "max", or the largest number there is
            return WELL
        cache = re.findall(rb"^%s(?:in)?active_file (\d+)" % group.kind, _bytes(group.statistics), re.MULTILINE)
        left = limit - used + sum(map(int, cache))
        hits, kills = _hits(_bytes(group.events))
        before, group.hits = group.hits or (hits, kills), (hits, kills)
        if kills > before[1]:
            return Sign(2, "a process of this cgroup was killed for want of memory")
        if hits > before[0] and left - more < limit // 4:  # with more than that, it is the page cache that hits the limit
            return Sign(1, f"the cgroup hit its limit of {format_bytes(limit)}")
        return self._short(left - more, min(limit // 32, _MOST), relief, "the cgroup has")


def _bytes(*path: str) -> bytes:
    """The beginning of a file, or nothing. Plain calls, because this is done ten times a second."""
    try:
        file = os.open(os.path.join(*path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(file, 16384)
    except OSError:
        return b""
    finally:
        os.close(file)


def _number(path: str) -> int | None:
    text = _bytes(path).strip()
    return int(text) if text.isdigit() else None


def _hits(text: bytes) -> tuple[int, int]:
    """How often a limit was hit, and how often a process was killed for it: memory.events, or the one number of memory.failcnt."""
    if text.strip().isdigit():
        return int(text), 0
    counts = {name: int(count) for name, count in re.findall(rb"^(\w+) (\d+)", text, re.MULTILINE)}
    return counts.get(b"max", 0) + counts.get(b"high", 0), counts.get(b"oom_kill", 0) + counts.get(b"oom", 0)


def _groups(root: str) -> Iterator[_Group]:
    """This process's cgroup and those above it: version 2 wherever it is mounted, and version 1's for memory."""
    for line in _bytes(root, "proc/self/cgroup").decode(errors="replace").splitlines():
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"] if not kinds else ["sys/fs/cgroup/memory"] if "memory" in kinds.split(",") else []
        for mount in mounts:
            for folder in _upwards(os.path.join(root, mount), path):
                place = folder + "/memory."
                if not kinds and os.path.exists(place + "max"):
                    yield _Group([place + "max", place + "high"], place + "current", place + "stat", b"", place + "events")
                elif kinds and os.path.exists(place + "limit_in_bytes"):
                    used, kind = place + "usage_in_bytes", b"total_"
                    yield _Group([place + "limit_in_bytes"], used, place + "stat", kind, place + "failcnt")


def _upwards(mount: str, path: str) -> Iterator[str]:
    """A cgroup's folder and those above it; inside a container the path may be the host's, and the mount itself is the group."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        folder = os.path.join(mount, *parts[:count])
        if os.path.isdir(folder):
            yield folder


@dataclass
class Pressure:
    """How far an adapter gives way. Not thread-safe: looked at under the adapter's lock.

    Each step down takes one level; where memory is about to fail, one at every look. A step up takes a while without a sign.

    Attributes:
        signs: how memory stands.
        marks: when to follow.
        clock: seconds, never going back.
        level: of now.
        reason: why it is not normal; "" where it is.
        events: how many steps down there were.
        changes: the latest changes, the oldest first.
    """

    signs: Signs
    marks: Marks = Marks()
    clock: Callable[[], float] = time.monotonic
    level: Level = Level.NORMAL
    reason: str = ""
    events: int = 0
    changes: deque[Change] = field(default_factory=lambda: deque(maxlen=100))

    def __post_init__(self) -> None:
        self._begun = self._looked = self._moved = self._quiet = self.clock()
        self._looked -= self.marks.interval
        self._wait = self.marks.calm

    def look(self, more: int = 0) -> Level | None:
        """The level to go to, one from the present one, or None to stay; `go` says that it was done. Costs nothing before the interval is over.

        Args:
            more: bytes that the next step up would take.
        """
        now = self.clock()
        if now - self._looked < self.marks.interval:
            return None
        self._looked = now
        sign = self.signs.read()
        if sign.grade:
            self._quiet = now
            if self.level < Level.PREDICT and (sign.grade > 1 or self.level == Level.NORMAL or now - self._moved >= self.marks.dwell):
                return self._towards(self.level + 1, sign.reason)
        elif self.level > Level.NORMAL:
            sign = self.signs.read(more, relief=True)
            if sign.grade:
                self._quiet = now
            elif now - max(self._quiet, self._moved) >= self._wait:
                return self._towards(self.level - 1, f"nothing was short for {now - self._quiet:.0f} s")
        elif now - self._moved >= self._wait:
            self._wait = self.marks.calm
        return None

    def failed(self, reason: str) -> Level | None:
        """As `look`, after memory was refused."""
        self._quiet = self.clock()
        return self._towards(self.level + 1, reason) if self.level < Level.PREDICT else None

    def _towards(self, level: int, reason: str) -> Level:
        self._next = reason
        return Level(level)

    def go(self, level: Level) -> None:
        """Notes that the level has changed, for the reason of the last answer."""
        now, before = self.clock(), self.level
        if level > before:
            self.events += 1
            if self.changes and self.changes[-1].after < self.changes[-1].before and now - self._moved < self._wait:  # the step up did not last
                self._wait = min(2 * self._wait, 32 * self.marks.calm)
        change = Change(now - self._begun, before, level, self._next)
        self.changes.append(change)
        self.level, self._moved, self._quiet = level, now, now
        self.reason = self._next if level > before else self.reason if level else ""
        LOG.log(logging.WARNING if level > before else logging.INFO, "memory: from %s to %s: %s", before, level, self._next)

    def stay(self, reason: str) -> None:
        """Notes that a step up could not be taken: the next try waits twice as long."""
        self._moved = self._quiet = self.clock()
        self._wait = min(2 * self._wait, 32 * self.marks.calm)
        LOG.warning("memory: still %s: %s", self.level, reason)
