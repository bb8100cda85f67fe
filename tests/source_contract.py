"""What every source promises (devices/sources/base.py), checked with whatever device a kind of source has.

A new kind: a class of `Rig` in tests/source_rigs.py, and its name in tests/test_source_contract.py.
"""

from __future__ import annotations

import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import pytest

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Frame, Source, Wanted
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.errors import SourceError
from tests.fakecamera import GENEROUS, until

SIDE = 16
WANTED = Wanted(InputSpec((3, SIDE, SIDE)), Task("classification", 5))
FRAMES = np.random.default_rng(3).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)


class Rig(ABC):
    """A kind of source, with its device.

    Args:
        root: an empty folder of its own.
        monkeypatch: of the test.

    Attributes:
        frames: what a source of it gives, as pixels.
        live: whether its sources are; then they give nothing before `give`, and wait after the last.
        stops: whether `stop` ends them, which a plain file need not heed.
        breaks: whether there is a device that can break.
    """

    frames = FRAMES
    live = True
    stops = True
    breaks = True

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root

    @abstractmethod
    def make(self) -> Source:
        """A source at this device, as whoever wants one would make it."""

    def ready(self, source: Source) -> None:  # noqa: B027
        """Returns when the device, whose source is being iterated, can be given frames."""

    @abstractmethod
    def give(self, index: int) -> None:
        """Has that frame come, of a live source."""

    @abstractmethod
    def cut(self) -> None:
        """Breaks the device, or takes it away; also before anything is made."""

    def mend(self) -> None:  # noqa: B027
        """Brings it back as it was at first, with nothing in it."""

    def held(self) -> int:
        """How often its source has it open now."""
        return descriptors(str(self.root))

    def opened(self) -> int:
        """How often its source opened it so far, as far as can be seen."""
        return self.held()

    def done(self) -> None:  # noqa: B027
        """After the test."""


def descriptors(begin: str) -> int:
    """Open files of this process whose paths begin so."""
    found = 0
    for link in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # other threads' come and go
            found += os.readlink(f"/proc/self/fd/{link}").startswith(begin)
    return found


class Taking:
    """Iterates a source in a thread of its own, and hands on what it gives. Stopped and joined on leaving."""

    def __init__(self, source: Source) -> None:
        self.source, self.failure = source, None  # type: Source, BaseException | None
        self._found: queue.Queue[Frame] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for frame in self.source:
                self._found.put(frame)
        except BaseException as reason:
            self.failure = reason

    def frame(self) -> Frame:
        """The next frame."""
        return self._found.get(timeout=GENEROUS)

    def ended(self) -> bool:
        """Waits for the iteration's end; whether it came."""
        self._thread.join(GENEROUS)
        return not self._thread.is_alive()

    def __enter__(self) -> Taking:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.source.stop()
        self.source.close()
        assert self.ended()


@contextmanager
def bounded(source: Source) -> Iterator[Source]:
    """The source, stopped where a test hangs in it."""
    timer = threading.Timer(GENEROUS, source.stop)
    timer.start()
    try:
        yield source
    finally:
        timer.cancel()


def frames_of(rig: Rig, source: Source) -> Iterator[tuple[Frame, dict[str, int]]]:
    """All frames that the rig has, each given when the one before was taken, with the counts after it; then the source is stopped."""
    if not rig.live:
        yield from ((frame, dict(source.counts)) for frame in source)
        return
    with Taking(source) as taking:
        rig.ready(source)
        for index in range(len(rig.frames)):
            rig.give(index)
            yield taking.frame(), dict(source.counts)


def check_frames(rig: Rig) -> None:
    """Each frame once and in order, ids that differ, `live` and `count` that are right, counts that are whole numbers and never go down."""
    with rig.make() as source:
        assert source.name
        assert source.live is rig.live
        assert source.count in ((None,) if rig.live else (None, len(rig.frames)))
        found = list(frames_of(rig, source))
    assert [frame.fault for frame, _ in found] == [""] * len(rig.frames)
    assert np.array_equal([frame.pixels for frame, _ in found], rig.frames)
    assert len({frame.id for frame, _ in found}) == len(rig.frames)
    check_counts([{}, *(counts for _, counts in found), dict(source.counts)])


def check_counts(seen: list[dict[str, int]]) -> None:
    """Whole numbers by words, and none less than before."""
    for before, after in zip(seen, seen[1:]):
        assert all(type(kind) is str and type(count) is int for kind, count in after.items())
        assert all(after[kind] >= count >= 0 for kind, count in before.items())


def check_nothing_is_opened_before_it_is_iterated(rig: Rig) -> None:
    """A device that is not there is no reason not to make its source."""
    source = rig.make()
    assert not rig.opened()
    source.close()
    if rig.breaks:
        rig.cut()
        rig.make().close()
        assert not rig.opened()


def check_close(rig: Rig) -> None:
    """Twice, at any time; what was closed gives nothing more, and holds nothing."""
    source = rig.make()
    source.close()
    source.close()
    if rig.stops:
        assert list(source) == []
    source = rig.make()
    next(frames_of(rig, source))
    source.close()
    source.close()
    if rig.live:
        rig.give(1)  # what waits in a driver's read comes back
    until(lambda: not rig.held())


def check_stop_before(rig: Rig) -> None:
    """Stopped before it begins it gives nothing, for good."""
    with rig.make() as source:
        source.stop()
        assert list(source) == []
        assert list(source) == []
    assert not rig.opened()


def check_stop_while_it_waits(rig: Rig, given: int) -> None:
    """From another thread, after so many frames."""
    with Taking(rig.make()) as taking:
        rig.ready(taking.source)
        for index in range(given):
            rig.give(index)
            taking.frame()
        taking.source.stop()
        assert taking.ended()
        assert taking.failure is None


def check_broken(rig: Rig) -> None:
    """A device that is not there or breaks off is a SourceError with a hint, when it is made or iterated, after all frames that came."""
    if rig.live:
        with Taking(rig.make()) as taking:
            rig.ready(taking.source)
            rig.give(0)
            assert np.array_equal(taking.frame().pixels, rig.frames[0])
            rig.cut()
            assert taking.ended()
            check_complaint(taking.failure)
    else:
        rig.cut()
    with pytest.raises(SourceError) as found, rig.make() as source:
        list(source)
    check_complaint(found.value)


def check_complaint(reason: BaseException | None) -> None:
    """A SourceError that says how to mend it, and no secret."""
    assert type(reason) is SourceError, reason
    assert reason.message
    assert reason.hint
    assert "secret" not in str(reason)


def check_reopened(rig: Rig) -> None:
    """It goes on when its device is back; one that ends begins again."""
    with Taking(Reopened(rig.make, first=0.01, longest=0.02)) as taking:
        if not rig.live:
            found = [taking.frame().pixels for _ in range(2 * len(rig.frames))]
            assert np.array_equal(found, np.concatenate([rig.frames, rig.frames]))
            return
        rig.ready(taking.source)
        rig.give(0)
        assert np.array_equal(taking.frame().pixels, rig.frames[0])
        if rig.breaks:
            rig.cut()
            until(lambda: taking.source.counts["breaks"] > 1)  # it broke, and could not be opened
            rig.mend()
            rig.ready(taking.source)
        rig.give(1)
        assert np.array_equal(taking.frame().pixels, rig.frames[1])
