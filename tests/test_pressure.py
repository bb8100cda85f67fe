"""The signs of memory running short on made-up boards, and when a level is left for the next."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from edgeadapt.runtime import pressure
from edgeadapt.runtime.pressure import Level, Marks, Pressure, Sign, Signs

pytestmark = pytest.mark.device

MIB = 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")


class Board:
    """A folder with what Linux would say in /proc and /sys."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.memory(1024, 512)
        self.resident(50)

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def memory(self, total: float, available: float) -> None:
        self.write("proc/meminfo", f"MemTotal:  {int(total * 1024)} kB\nMemFree:  99 kB\nMemAvailable: {int(available * 1024)} kB\n")

    def resident(self, mib: float) -> None:
        self.write("proc/self/statm", f"99999 {int(mib * MIB) // PAGE} 7 1 0 1 0\n")

    def stall(self, percent: float) -> None:
        rest = "avg60=0.00 avg300=0.00 total=1"
        self.write("proc/pressure/memory", f"some avg10={percent:.2f} {rest}\nfull avg10=0.00 {rest}\n")

    def second(self, path: str, current: float, limit: object, high: object = "max", cache: float = 0, events: str = "", mount: str = "") -> None:
        """A cgroup of version 2; sizes in MiB."""
        folder = f"sys/fs/cgroup{mount}{path}/memory."
        self.write(folder + "max", f"{limit if limit == 'max' else int(limit) * MIB}\n")
        self.write(folder + "high", f"{high if high == 'max' else int(high) * MIB}\n")
        self.write(folder + "current", f"{int(current * MIB)}\n")
        self.write(folder + "stat", f"anon 1\nfile 2\ninactive_anon 3\ninactive_file {int(cache * MIB)}\n")
        self.write(folder + "events", events or "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n")

    def first(self, path: str, used: float, limit: int, cache: float = 0, failures: int = 0) -> None:
        """A cgroup of version 1; the limit in bytes."""
        folder = f"sys/fs/cgroup/memory{path}/memory."
        self.write(folder + "limit_in_bytes", f"{limit}\n")
        self.write(folder + "usage_in_bytes", f"{int(used * MIB)}\n")
        self.write(folder + "stat", f"cache 5\ninactive_file 1\ntotal_inactive_file {int(cache * MIB)}\n")
        self.write(folder + "failcnt", f"{failures}\n")

    def signs(self, budget: float | None = None, planned: float = 0, marks: Marks | None = None) -> Signs:
        return Signs(None if budget is None else int(budget * MIB), int(planned * MIB), marks or Marks(), str(self.root))


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_a_board_that_tells_nothing_is_never_short(tmp_path):
    assert Signs(None, 0, Marks(), str(tmp_path)).read(10**12) == Sign(0, "")


@pytest.mark.parametrize(("available", "grade"), [(52, 0), (51, 1), (26, 1), (25, 2), (0, 2)])
def test_little_left_in_the_system(board, available, grade):
    board.memory(1024, available)  # a twentieth is 51.2
    sign = board.signs().read()
    assert sign.grade == grade
    assert (f"the system has {available} " in sign.reason) == (grade > 0)


def test_the_reserve_has_bounds_and_can_be_given(board):
    board.memory(64, 17)
    assert board.signs().read().grade == 0  # 16, not a twentieth of 64
    board.memory(64, 15)
    assert board.signs().read().grade == 1
    board.memory(32768, 300)
    assert board.signs().read().grade == 0  # 256, not a twentieth of 32768
    assert board.signs(marks=Marks(reserve=400 * MIB)).read().grade == 1


def test_what_is_about_to_be_taken_counts_and_relief_takes_more(board):
    board.memory(1024, 60)
    signs = board.signs()
    assert signs.read().grade == 0
    assert signs.read(10 * MIB).grade == 1
    assert signs.read(relief=True).grade == 1  # 51.2 and a quarter
    board.memory(1024, 65)
    assert signs.read(relief=True).grade == 0
    board.memory(32768, 256 + 63)
    assert board.signs(marks=Marks(reserve=256 * MIB)).read(relief=True).grade == 1
    board.memory(32768, 256 + 64)
    assert board.signs(marks=Marks(reserve=256 * MIB)).read(relief=True).grade == 0


@pytest.mark.parametrize(
    ("planned", "held", "grade", "again"),
    [(60, 62.9, 0, 1), (60, 61.9, 0, 0), (60, 64, 0, 1), (60, 64.1, 1, 1), (60, 66.1, 2, 2), (62, 62.9, 0, 0), (62, 63.1, 0, 1), (40, 62.1, 0, 1)],
)
def test_the_process_against_its_budget(board, planned, held, grade, again):
    """Within the budget nothing gives way; to come back, at most half of what the plan leaves may be taken, or a thirty-second of the budget."""
    board.resident(held)
    assert board.signs(64, planned).read().grade == grade
    assert board.signs(64, planned).read(relief=True).grade == again


def test_code_that_something_else_brought_in_is_given_back_before_anything_gives_way(board, monkeypatch):
    asked = []

    def give_back(root: str) -> int:
        asked.append(root)
        return 5 * MIB

    monkeypatch.setattr(pressure.library, "give_back", give_back)
    board.resident(63)
    assert board.signs(64, 60).read().grade == 0
    assert asked == []
    board.resident(68)
    assert board.signs(64, 60).read().grade == 0
    board.resident(70)
    assert board.signs(64, 60).read().reason == "the process holds 65 MiB of its budget of 64 MiB"
    assert asked == [str(board.root)] * 2


def test_without_a_budget_its_size_does_not_matter(board):
    board.resident(10**6)
    assert board.signs().read().grade == 0


def test_processes_that_wait_for_memory(board):
    board.stall(9.9)
    signs = board.signs()
    assert signs.read().grade == 0
    assert signs.read(relief=True).grade == 1
    board.stall(11)
    assert signs.read() == Sign(1, "processes waited for memory in 11 % of the last ten seconds")
    board.stall(4.9)
    assert signs.read(relief=True).grade == 0


@pytest.mark.parametrize(("current", "cache", "grade"), [(100, 0, 0), (123, 0, 0), (125, 0, 1), (127, 0, 2), (127, 20, 0), (130, 0, 2)])
def test_a_cgroup_of_version_2(board, current, cache, grade):
    board.write("proc/self/cgroup", "0::/system.slice/edgeadapt.service\n")
    board.second("/system.slice/edgeadapt.service", current, 128, cache=cache)
    assert board.signs().read().grade == grade


def test_the_softer_limit_and_those_above_count_too(board):
    board.write("proc/self/cgroup", "0::/a/b\n")
    board.second("/a/b", 10, "max")
    signs = board.signs()
    assert signs.read().grade == 0
    board.second("/a/b", 99, 200, high=100)
    assert signs.read().grade == 2
    board.second("/a/b", 99, "max")
    assert signs.read().grade == 0
    board.second("/a", 127, 128)
    sign = board.signs().read()
    assert sign == Sign(2, "the cgroup has 1 MiB left, less than 4 MiB")


def test_in_a_container_the_mount_is_the_group(board):
    board.write("proc/self/cgroup", "0::/../../docker/1234\n")
    board.second("", 127, 128)
    assert board.signs().read().grade == 2


def test_version_2_beside_version_1(board):
    board.write("proc/self/cgroup", "4:memory:/x\n0::/y\n")
    board.second("/y", 127, 128, mount="/unified")
    assert board.signs().read().grade == 2


def test_a_limit_that_is_hit_counts_unless_the_page_cache_hits_it(board):
    board.write("proc/self/cgroup", "0::/g\n")
    board.second("/g", 100, 128, events="low 0\nhigh 5\nmax 7\noom 0\noom_kill 0\n")
    signs = board.signs()
    assert signs.read().grade == 0  # what happened before is not ours
    board.second("/g", 100, 128, events="low 0\nhigh 5\nmax 8\noom 0\noom_kill 0\n")
    assert signs.read() == Sign(1, "the cgroup hit its limit of 128 MiB")
    assert signs.read().grade == 0
    board.second("/g", 128, 128, cache=40, events="low 0\nhigh 5\nmax 99\noom 0\noom_kill 0\n")
    assert signs.read().grade == 0
    board.second("/g", 100, 128, events="low 0\nhigh 5\nmax 99\noom 1\noom_kill 1\n")
    assert signs.read().grade == 2


def test_a_cgroup_of_version_1(board):
    board.write("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/\n")
    board.first("/jobs/7", 100, 2**63 - 4096)
    signs = board.signs()
    assert signs.read().grade == 0
    board.first("/jobs/7", 125, 128 * MIB)
    assert signs.read().grade == 1
    board.first("/jobs/7", 125, 128 * MIB, cache=30)
    assert signs.read().grade == 0
    board.first("/jobs/7", 100, 128 * MIB, failures=1)
    assert signs.read() == Sign(1, "the cgroup hit its limit of 128 MiB")
    board.first("/jobs", 127, 128 * MIB)
    assert board.signs().read().grade == 2


def test_the_worst_sign_counts(board):
    board.stall(50)
    board.memory(1024, 1)
    assert "the system has" in board.signs().read().reason


@pytest.mark.parametrize("text", ["", "MemTotal: x kB\n", "MemTotal: 5 kB\n", "\0\0\0"])
def test_files_that_say_something_else_say_nothing(board, text):
    for path in ("proc/meminfo", "proc/pressure/memory", "proc/self/cgroup"):
        board.write(path, text)
    assert board.signs().read().grade == 0
    board.write("proc/self/cgroup", "0::/g\n")
    board.second("/g", 1, 128)
    for name in ("current", "stat", "events", "max"):
        board.write(f"sys/fs/cgroup/g/memory.{name}", text)
    assert board.signs().read().grade == 0


# ------------------------------------------------------------------------------------------------------------ levels


TICK = 0.125  # seconds; in binary, so that sums are exact


class Scripted(Signs):
    """Says what it is told to."""

    def __init__(self) -> None:
        self.grade, self.after_more, self.looks = 0, 0, 0

    def read(self, more: int = 0, relief: bool = False) -> Sign:
        self.looks += not relief
        grade = max(self.grade, self.after_more if relief else 0)
        return Sign(grade, "made up" if grade else "")


class Watched(Pressure):
    """A pressure whose every answer is followed, on a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        super().__init__(Scripted(), Marks(interval=TICK), lambda: self.now)

    def after(self, seconds: float) -> Level:
        """The level after that time, looked at every interval."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.marks.interval
            if (level := self.look()) is not None:
                self.go(level)
        return self.level


def test_one_level_at_a_time_down_and_up():
    pressure = Watched()
    assert pressure.after(5) == Level.NORMAL
    pressure.signs.grade = 1
    assert pressure.after(TICK) == Level.PAUSED
    assert pressure.after(6 * TICK) == Level.PAUSED
    assert pressure.after(2 * TICK) == Level.SHED
    assert pressure.after(8 * TICK) == Level.PREDICT
    assert pressure.after(50) == Level.PREDICT
    assert pressure.reason == "made up"
    pressure.signs.grade = 0
    assert pressure.after(9) == Level.PREDICT
    assert pressure.after(1.3) == Level.SHED
    assert pressure.after(10.1) == Level.PAUSED
    assert pressure.reason == "made up"
    assert pressure.after(10.1) == Level.NORMAL
    assert pressure.reason == ""
    assert pressure.events == 3
    assert [change.after for change in pressure.changes] == [1, 2, 3, 2, 1, 0]


def test_about_to_fail_goes_down_at_every_look():
    pressure = Watched()
    pressure.signs.grade = 2
    assert [pressure.after(TICK) for _ in range(4)] == [1, 2, 3, 3]


def test_a_short_sign_is_enough_to_begin_the_wait_anew():
    pressure = Watched()
    pressure.signs.grade = 1
    pressure.after(TICK)
    pressure.signs.grade = 0
    for _ in range(20):
        assert pressure.after(9) == Level.PAUSED
        pressure.signs.grade = 1
        pressure.after(TICK)
        pressure.signs.grade = 0
        pressure.level = Level.PAUSED  # and not further down, whatever the dwell


def test_no_step_up_while_there_is_no_room_for_it():
    pressure = Watched()
    pressure.signs.grade = 1
    pressure.after(3)
    pressure.signs.grade, pressure.signs.after_more = 0, 1
    assert pressure.after(100) == Level.PREDICT
    pressure.signs.after_more = 0
    assert pressure.after(10.2) == Level.SHED


def test_what_does_not_last_is_tried_less_and_less_often():
    pressure, waits = Watched(), []
    for _ in range(8):
        pressure.failed("refused")
        pressure.go(Level.PAUSED)
        begun = pressure.now
        while pressure.level:
            pressure.after(pressure.marks.interval)
        waits.append(round(pressure.now - begun))
    assert waits == [10, 20, 40, 80, 160, 320, 320, 320]
    pressure.after(320.2)
    pressure.failed("refused")
    pressure.go(Level.PAUSED)
    assert pressure.after(10.2) == Level.NORMAL


def test_a_refusal_goes_down_at_once_but_not_below_the_last():
    pressure = Watched()
    for level in (Level.PAUSED, Level.SHED, Level.PREDICT):
        assert pressure.failed("refused") == level
        pressure.go(level)
    assert pressure.failed("refused") is None
    pressure.stay("no room")
    assert pressure.after(19) == Level.PREDICT
    assert pressure.after(1.3) == Level.SHED


def test_it_looks_no_more_often_than_it_was_told():
    pressure = Watched()
    for _ in range(1000):
        pressure.now += TICK / 100
        pressure.look()
    assert 9 <= pressure.signs.looks <= 11


def test_changes_are_logged_with_their_reason(caplog):
    pressure = Watched()
    with caplog.at_level(logging.INFO, "edgeadapt"):
        pressure.signs.grade = 1
        pressure.after(TICK)
        pressure.signs.grade = 0
        pressure.after(11)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "memory: from normal to adaptation paused: made up"),
        ("INFO", "memory: from adaptation paused to normal: nothing was short for 10 s"),
    ]
    assert str(pressure.changes[0]) == "0.1 s adaptation paused: made up"
