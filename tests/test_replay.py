"""Recorded frames at a pace, by a clock that the test moves."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Wanted
from edgeadapt.devices.sources.replay import Replay
from edgeadapt.errors import InputError, SourceError, UsageError
from tests.source_contract import Taking, bounded

pytestmark = pytest.mark.device

IMAGES = np.random.default_rng(3).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
WANTED = Wanted(InputSpec((3, 8, 8)), Task("classification", 5))


class Clock:
    """Time that passes only in waits, and where the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits, self.over = 1000.0, [], False  # type: float, list[float], bool
        monkeypatch.setattr("edgeadapt.devices.sources.replay.time.monotonic", lambda: self.now)

    def drive(self, source: Replay) -> Replay:
        """Has its waits pass at once."""
        source._stopped = self  # type: ignore[assignment]
        return source

    def is_set(self) -> bool:
        return self.over

    def set(self) -> None:
        self.over = True

    def wait(self, seconds: float) -> bool:
        self.waits.append(round(seconds, 9))
        self.now += seconds
        return self.over


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "a.npz", x=IMAGES, y=np.arange(5))
    return tmp_path / "a.npz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"photos/{index}.png")
    return tmp_path / "photos"


def test_each_frame_comes_when_it_is_due(archive, clock):
    source = clock.drive(Replay(archive, WANTED, fps=10))
    assert (source.count, source.labelled, source.live) == (5, True, False)
    found = []
    for frame in source:
        found.append((frame.id, frame.truth, round(clock.now - 1000, 9)))
        clock.now += 0.03  # what is done with it
    assert found == [(0, 0, 0.0), (1, 1, 0.1), (2, 2, 0.2), (3, 3, 0.3), (4, 4, 0.4)]
    assert clock.waits == [0.0, 0.07, 0.07, 0.07, 0.07]
    assert source.counts == {"late": 0}


def test_who_is_late_gets_frames_at_once_until_the_stream_is_on_time_again(archive, clock):
    source = clock.drive(Replay(archive, WANTED, fps=10))
    times = []
    for busy, frame in zip((0.35, 0, 0, 0, 0), source):
        times.append(round(clock.now - 1000, 9))
        clock.now += busy
    assert times == [0.0, 0.35, 0.35, 0.35, 0.4]  # all of them, and no later than they have to be
    assert source.counts == {"late": 3}


def test_the_pace_does_not_drift(archive, clock):
    source = clock.drive(Replay(archive, WANTED, fps=30, loop=True))
    for frame in islice(source, 3_001):
        clock.now += 0.001
    assert clock.now - 1000 == pytest.approx(100.001, abs=1e-6)
    assert source.counts == {"late": 0}


def test_without_a_pace_frames_come_as_they_are_taken(archive, clock):
    source = clock.drive(Replay(archive, WANTED))
    for frame in source:
        clock.now += 5
    assert set(clock.waits) == {0.0}
    assert source.counts == {"late": 0}


def test_again_and_again_ids_stay_different(archive, folder):
    source = Replay(archive, WANTED, loop=True)
    assert source.count is None
    found = list(islice(source, 12))
    assert [frame.id for frame in found] == list(range(12))
    assert np.array_equal([frame.pixels for frame in found], np.concatenate([IMAGES, IMAGES, IMAGES[:2]]))
    names = [frame.id for frame in islice(Replay(folder, WANTED, loop=True), 11)]
    assert names[4:7] == ["4.png", "0.png#2", "1.png#2"]
    assert names[10] == "0.png#3"
    assert len(set(names)) == 11


def test_a_stop_ends_the_wait_for_a_frame_that_is_far_off(archive):
    with Taking(Replay(archive, WANTED, fps=1e-4)) as taking:
        taking.frame()
        taking.source.stop()
        assert taking.ended()
        assert taking.failure is None


def test_a_stop_ends_what_would_go_on_for_ever(folder):
    source = Replay(folder, WANTED, loop=True)
    found = []
    for frame in source:
        found.append(frame.id)
        if len(found) == 7:
            source.stop()
    assert len(found) == 7


def test_a_folder_that_is_emptied_between_two_rounds_is_not_gone_through_for_ever(folder):
    with bounded(Replay(folder, WANTED, loop=True)) as source:
        frames = iter(source)
        first = next(frames)
        for path in folder.iterdir():
            path.unlink()
        left = next(frames)  # it was found before
        assert (first.fault, left.pixels) == ("", None)
        with pytest.raises(SourceError, match="no frames"):
            list(frames)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_a_pace_that_is_none(fps, archive):
    with pytest.raises(UsageError, match="number above 0"):
        Replay(archive, WANTED, fps=fps)


def test_what_cannot_be_replayed_is_told_at_once(tmp_path, archive):
    (tmp_path / "clip.mp4").write_bytes(b"")
    for name in ("clip.mp4", "gone", "gone.npz"):
        with pytest.raises(SourceError, match=name):
            Replay(tmp_path / name, WANTED)
    with pytest.raises(InputError):
        Replay(archive, Wanted(InputSpec((3, 9, 9)), WANTED.task))
