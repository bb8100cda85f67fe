"""Frames on their way to who answers them: files that wait for their turn, bursts, and sources of which nothing can be used."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Frame, Source, Wanted
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.devices.sources.posted import MOST, WAITING, Posted
from edgeadapt.devices.sources.watch import Watch
from edgeadapt.runtime.daemon.feed import Feed
from edgeadapt.runtime.daemon.web.bodies import FRAMES

pytestmark = pytest.mark.device

WANTED = Wanted(InputSpec((3, 8, 8)), Task("classification", 5))
PIXELS = np.zeros((8, 8, 3), np.uint8)


def until(found: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


class Told(Source):
    """Gives what it is told to, and counts as it is told to."""

    name, live, wrong, advice = "told", True, ("crc", "cobs"), "look at its baud rate"

    def __init__(self) -> None:
        self.counted: dict[str, int] = {"bytes": 0, "crc": 0}
        self._box = Posted()

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.counted)

    def give(self, frame: Frame) -> None:
        self._box.put(frame)

    def __iter__(self) -> Iterator[Frame]:
        yield from self._box

    def stop(self) -> None:
        self._box.stop()


@pytest.fixture
def told() -> Iterator[tuple[Told, Feed]]:
    source = Told()
    feed = Feed(Reopened(lambda: source), 64)
    feed.start()
    yield source, feed
    feed.close()


# ------------------------------------------------------------------------------------------------------------ waiting


def test_a_file_is_deleted_when_the_frame_after_it_is_asked_for(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", PIXELS)
    feed = Feed(Watch(tmp_path, WANTED, existing=True, poll=0.001, remove=True), 64)
    feed.start()
    until(lambda: len(feed))
    time.sleep(0.1)
    assert (tmp_path / "a.npy").exists(), "nobody has taken it"
    for name in "ab":
        frame = feed.take(60)
        assert frame is not None
        assert frame.id == f"{name}.npy"
        time.sleep(0.1)
        assert (tmp_path / f"{name}.npy").exists(), "it is being answered"
    assert not (tmp_path / "a.npy").exists()
    feed.close()
    assert (tmp_path / "b.npy").exists(), "it may not have been answered"


def test_a_file_that_was_answered_is_deleted_though_no_other_comes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    feed = Feed(Watch(tmp_path, WANTED, existing=True, poll=0.001, remove=True), 64)
    feed.start()
    assert feed.take(60) is not None
    assert feed.take(0.01) is None
    until(lambda: not (tmp_path / "a.npy").exists())
    feed.close()
    assert feed.ended


def test_a_file_whose_frame_could_not_be_answered_stays(tmp_path: Path) -> None:
    for name in "abc":
        np.save(tmp_path / f"{name}.npy", np.stack([PIXELS] * 2))
    feed = Feed(Reopened(lambda: Watch(tmp_path, WANTED, existing=True, poll=0.001, remove=True)), 64)
    feed.start()
    for row in range(6):
        frame = feed.take(60)
        assert frame is not None
        if frame.id == "b.npy#0":
            feed.source.spare()
    assert feed.take(0.01) is None
    until(lambda: not (tmp_path / "c.npy").exists())
    assert [path.name for path in tmp_path.iterdir()] == ["b.npy"]
    assert feed.source.counts["kept"] == 1
    feed.close()


def test_the_next_file_is_read_while_one_is_answered_unless_files_are_deleted(tmp_path: Path) -> None:
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", PIXELS)
    feed = Feed(Watch(tmp_path, WANTED, existing=True, poll=0.001), 64)
    feed.start()
    assert feed.take(60) is not None
    until(lambda: len(feed) == 1)
    feed.close()


def test_all_frames_of_one_request_wait_and_older_ones_give_way() -> None:
    assert WAITING >= FRAMES
    source = Posted()
    for number in range(10 + FRAMES):
        source.put(Frame(number, PIXELS))
    assert source.counts == {"dropped": 10 + FRAMES - WAITING}
    feed = Feed(source, 64)
    feed.start()
    assert [frame.id for _ in range(FRAMES) if (frame := feed.take(60)) is not None] == list(range(10, 10 + FRAMES))
    feed.close()


def test_what_is_posted_and_waits_is_bounded_by_bytes() -> None:
    source, large = Posted(), np.zeros((1200, 1200, 3), np.uint8)
    for number in range(5):
        source.put(Frame(number, large))
    assert source.counts == {"dropped": 5 - MOST // large.nbytes}
    source.put(Frame("larger than may wait", np.zeros((1, MOST + 1), np.uint8)))
    assert next(iter(source)).id == "larger than may wait"
    source.put(Frame("next", large))
    assert next(iter(source)).id == "next"


def test_a_second_close_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(Told):
        def __iter__(self) -> Iterator[Frame]:
            go.wait(60)
            yield from ()

        def stop(self) -> None:
            stops.append(self)

    go, stops = threading.Event(), list[Source]()
    feed = Feed(Stuck(), 1)
    feed.start()
    feed.close(0.01)
    feed.close(60)
    go.set()
    assert len(stops) == 1
    assert [record.getMessage() for record in caplog.records] == ["told does not stop; it is left alone"]


# ------------------------------------------------------------------------------------------------------------ rubbish


def test_a_source_that_brings_only_what_cannot_be_used_has_a_complaint(told: tuple[Told, Feed], caplog: pytest.LogCaptureFixture) -> None:
    source, feed = told
    now = time.monotonic()
    feed.look(now)
    source.counted |= {"bytes": 9000, "crc": 40, "cobs": 10}
    feed.look(now + 29)
    assert feed.complaint == ""
    with caplog.at_level(logging.WARNING, "edgeadapt"):
        for later in (31, 45, 62):
            source.counted["crc"] += later > 31
            feed.look(now + later)
            assert "pieces could not be used in the last 3" in feed.complaint
            assert feed.complaint.endswith("; look at its baud rate")
    assert len(caplog.records) == 1, "it is told once"
    assert feed.complaint.startswith("2 pieces")
    source.give(Frame(0, PIXELS))
    assert feed.take(60) is not None
    feed.look(now + 63)
    assert feed.complaint == ""


def test_numbers_of_what_was_seen_are_told(told: tuple[Told, Feed]) -> None:
    source, feed = told
    source.counted |= {"crc": 40, "cobs": 10}
    feed.look(time.monotonic() + 30)
    assert feed.complaint == "50 pieces could not be used in the last 30 s, and no frame came (crc 40, cobs 10); look at its baud rate"
    feed.look(time.monotonic() + 90)
    assert feed.complaint == "", "nothing came any more, and that is told by the source"


def test_frames_of_which_none_fits_are_rubbish_too(told: tuple[Told, Feed]) -> None:
    source, feed = told
    for number in range(3):
        source.give(Frame(number, None, None, "is 5x5"))
    until(lambda: feed.taken == 3)
    feed.look(time.monotonic() + 30)
    assert feed.complaint.startswith("3 pieces could not be used in the last 30 s, and no frame came (unfit 3); the last frame is 5x5;")


def test_errors_among_frames_and_silence_are_no_complaint(told: tuple[Told, Feed]) -> None:
    source, feed = told
    now = time.monotonic()
    feed.look(now)
    feed.look(now + 60)
    source.counted["bytes"] += 100
    feed.look(now + 120)
    assert feed.complaint == ""
    source.counted["crc"] += 100
    source.give(Frame(0, PIXELS))
    assert feed.take(60) is not None
    feed.look(now + 200)
    assert feed.complaint == ""


def test_lines_that_are_no_frame_yet_are_no_rubbish(told: tuple[Told, Feed]) -> None:
    """A window of a slow sensor takes longer than the patience with it."""
    source, feed = told
    feed.source.right = ("lines",)
    now = time.monotonic()
    feed.look(now)
    source.counted |= {"lines": 60, "crc": 1}
    feed.look(now + 31)
    assert feed.complaint == ""
    source.counted["crc"] += 5
    feed.look(now + 62)
    assert feed.complaint.startswith("5 pieces")
    source.counted["lines"] += 1
    feed.look(now + 63)
    assert feed.complaint == ""


def test_files_that_cannot_be_read_are_no_complaint(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"no array")
    feed = Feed(Watch(tmp_path, WANTED, existing=True, poll=0.001), 64)
    feed.start()
    until(lambda: len(feed))
    feed.look(time.monotonic() + 60)
    assert feed.complaint == ""
    feed.close()
