"""Live sources: opened again when their device breaks, stopped whatever they wait for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from edgeadapt.devices.sources import Frame, Source
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.errors import SourceError, UsageError

pytestmark = pytest.mark.device

PIXELS = np.zeros((2, 2, 3), np.uint8)


class Flaky(Source):
    """Gives some frames, then breaks, ends, or waits until it is stopped."""

    name, live = "flaky", True

    def __init__(self, frames: int, then: str) -> None:
        self._frames, self._then, self._stopped, self._crc = frames, then, threading.Event(), 0
        self.closed = 0

    @property
    def counts(self) -> Mapping[str, int]:
        return {"crc": self._crc}

    def __iter__(self) -> Iterator[Frame]:
        for index in range(self._frames):
            self._crc += 1
            yield Frame(index, PIXELS)
        if self._then == "waits":
            self._stopped.wait()
        elif self._then != "ends":
            raise SourceError(self._then, "plug it in")

    def stop(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.closed += 1


def opening(*sources: Flaky) -> tuple[Reopened, list[float]]:
    waiting, opened = list(sources), []

    def make() -> Source:
        opened.append(time.monotonic())
        return waiting.pop(0)

    return Reopened(make, first=0.02, longest=0.1), opened


def test_a_source_that_breaks_or_ends_is_opened_again_and_what_it_counted_stays(caplog):
    parts = Flaky(2, "it was pulled out"), Flaky(0, "it was pulled out"), Flaky(0, "it was pulled out"), Flaky(3, "ends"), Flaky(1, "waits")
    source, opened = opening(*parts)
    found, complaints = [], []
    with caplog.at_level(logging.INFO, "edgeadapt"):
        for frame in source:
            found.append(frame.id)
            complaints.append(source.complaint)
            if len(found) == 6:
                assert source.counts == {"crc": 6, "breaks": 4}
                threading.Timer(0.05, source.stop).start()
    assert found == [0, 1, 0, 1, 2, 0]
    assert len(opened) == 5
    assert complaints == [""] * 6
    assert source.last is not None
    assert [part.closed for part in parts] == [1] * 5
    assert [record.getMessage() for record in caplog.records] == [
        "it was pulled out",  # once, however often
        "flaky gives frames again",
        "flaky has ended",
        "flaky gives frames again",
    ]


def test_it_is_opened_less_and_less_often():
    source, opened = opening(*[Flaky(0, "no such device") for _ in range(6)], Flaky(1, "waits"))
    for _ in source:
        source.stop()
    gaps = np.diff(opened[1:])
    assert source.counts["breaks"] == 6
    assert (gaps >= 0.8 * np.array([0.04, 0.08, 0.1, 0.1, 0.1])).all()  # after the first, which was made at once


def test_a_stop_ends_the_wait_for_a_device():
    source = Reopened(lambda: Flaky(0, "no such device"), first=3600, longest=3600)
    thread = threading.Thread(target=lambda: list(source))
    thread.start()
    while not source.complaint:
        time.sleep(0.001)
    assert source.complaint == "no such device"
    source.stop()
    thread.join(60)
    assert not thread.is_alive()


def test_a_stop_before_the_first_frame_ends_it_and_it_stays_stopped():
    source, opened = opening(Flaky(5, "ends"), Flaky(5, "ends"))
    source.stop()
    assert list(source) == []
    assert list(source) == []
    assert len(opened) == 1


def test_a_mistake_of_the_user_is_told_at_once():
    def make() -> Source:
        raise UsageError("no such format", "take another")

    with pytest.raises(UsageError):
        Reopened(make)


def test_a_defect_or_want_of_memory_is_a_break_too_and_its_trace_is_told_once(caplog):
    class Broken(Flaky):
        def __iter__(self) -> Iterator[Frame]:
            raise MemoryError("no room")
            yield

    source, _ = opening(Broken(0, ""), Broken(0, ""), Flaky(1, "waits"))
    for frame in source:
        assert frame.id == 0
        source.stop()
    assert source.counts["breaks"] == 2
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True]
