"""A folder that files appear in: what is taken of it, when, and how often."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeadapt.bundle import InputSpec, Task
from edgeadapt.devices.sources import Frame, Wanted
from edgeadapt.devices.sources.live import Reopened
from edgeadapt.devices.sources.watch import Watch
from edgeadapt.errors import SourceError, UsageError
from tests.source_contract import Taking, bounded, until

pytestmark = pytest.mark.device

IMAGES = np.random.default_rng(3).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
WANTED = Wanted(InputSpec((3, 8, 8)), Task("classification", 5))
SENSOR = Wanted(InputSpec((6, 16)), Task("classification", 5))
SIGNALS = np.random.default_rng(4).standard_normal((3, 6, 16)).astype(np.float32)


class Looks:
    """A watch that looks when the test says so; between two looks the folder stands still."""

    def __init__(self, source: Watch) -> None:
        self.source, self._found, self._failure = source, [], None  # type: Watch, list[Frame], BaseException | None
        self._look, self._looked = threading.Semaphore(0), threading.Semaphore(0)
        source._stopped = self  # type: ignore[assignment]
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._looked.acquire(timeout=60)

    def is_set(self) -> bool:
        return self._over

    def set(self) -> None:
        self._over = True
        self._look.release()

    def wait(self, poll: float) -> bool:
        assert poll == self.source._poll
        self._looked.release()
        assert self._look.acquire(timeout=60)
        return self._over

    def _run(self) -> None:
        try:
            for frame in self.source:
                self._found.append(frame)
        except SourceError as reason:
            self._failure = reason
        self._looked.release()

    def again(self) -> list[Frame]:
        """What one look more gives."""
        self._found = []
        self._look.release()
        assert self._looked.acquire(timeout=60)
        if self._failure is not None:
            raise self._failure
        return self._found

    def names(self) -> list[str | int]:
        """What one look more gives, by name."""
        return [frame.id for frame in self.again()]


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., Looks]:
    made: list[Watch] = []

    def make(wanted: Wanted = WANTED, **options: object) -> Looks:
        made.append(Watch(tmp_path / "in", wanted, **options))  # type: ignore[arg-type]
        return Looks(made[-1])

    (tmp_path / "in").mkdir()
    yield make  # type: ignore[misc]
    for source in made:
        source.stop()


def png(path: Path, image: np.ndarray = IMAGES[0]) -> Path:
    Image.fromarray(image).save(path)
    return path


def test_files_are_taken_when_they_are_as_the_time_before_once_and_by_name(watched, tmp_path):
    png(tmp_path / "in/before.png")
    looks = watched()
    assert looks.names() == []
    for name, image in zip(("c.png", "a.JPG", "b.png"), IMAGES):
        png(tmp_path / "in" / name, image)
    assert looks.names() == []
    png(tmp_path / "in/0.png", IMAGES[3])
    found = looks.again()
    assert [frame.id for frame in found] == ["a.JPG", "b.png", "c.png"]
    assert np.array_equal(found[1].pixels, IMAGES[2])
    assert np.array_equal(found[2].pixels, IMAGES[0])
    assert looks.names() == ["0.png"]
    assert looks.names() == []


def test_files_that_are_there_are_taken_where_that_is_asked_for(watched, tmp_path):
    png(tmp_path / "in/b.png")
    png(tmp_path / "in/a.png")
    looks = watched(existing=True)
    assert looks.names() == ["a.png", "b.png"]
    assert looks.names() == []


def test_a_file_is_left_alone_as_long_as_somebody_writes_it(watched, tmp_path):
    looks = watched()
    data = png(tmp_path / "whole.png", IMAGES[1]).read_bytes()
    with open(tmp_path / "in/a.png", "wb") as file:
        for part in (data[:40], data[40:80], data[80:]):
            file.write(part)
            file.flush()
            assert looks.names() == []
    assert np.array_equal(looks.again()[0].pixels, IMAGES[1])


def test_a_file_that_is_rewritten_in_the_same_size_is_not_whole(watched, tmp_path):
    looks = watched()
    path = png(tmp_path / "in/a.png")
    assert looks.names() == []
    os.utime(path, ns=(1, 1))
    assert looks.names() == []
    assert looks.names() == ["a.png"]


@pytest.mark.parametrize("name", [".a.png", "a.png.tmp", "a.png.part", "a.TMP"])
def test_hidden_and_unfinished_names_are_passed_over_until_they_are_renamed(name, watched, tmp_path):
    looks = watched()
    png(tmp_path / "x.png").rename(tmp_path / "in" / name)
    assert looks.names() == []
    assert looks.names() == []
    (tmp_path / "in" / name).rename(tmp_path / "in/a.png")
    assert looks.names() == ["a.png"]  # at once: it is as it was under its other name
    assert looks.names() == []


def test_a_file_that_is_renamed_and_still_written_is_not_whole(watched, tmp_path):
    looks = watched()
    data = png(tmp_path / "x.png").read_bytes()
    part = tmp_path / "in/a.part"
    part.write_bytes(data[:50])
    assert looks.names() == []
    part.write_bytes(data)
    part.rename(tmp_path / "in/a.png")
    assert looks.names() == []
    assert looks.names() == ["a.png"]


def test_a_file_that_changed_is_taken_again(watched, tmp_path):
    looks = watched()
    path = png(tmp_path / "in/now.png", IMAGES[0])
    assert [looks.names(), looks.names(), looks.names()] == [[], ["now.png"], []]
    png(path, IMAGES[1])
    os.utime(path, ns=(1, 1))
    assert looks.names() == []
    found = looks.again()
    assert [frame.id for frame in found] == ["now.png"]
    assert np.array_equal(found[0].pixels, IMAGES[1])


def test_only_what_is_there_is_remembered(watched, tmp_path):
    looks = watched()
    for _ in range(3):
        path = png(tmp_path / "in/a.png")
        os.utime(path, ns=(1, 1))
        assert [looks.names(), looks.names(), looks.names()] == [[], ["a.png"], []]
        path.unlink()
        assert looks.names() == []
    assert looks._thread.is_alive()


def test_an_inode_that_changes_alone_is_no_other_file(watched, tmp_path):
    looks = watched()
    path = png(tmp_path / "in/a.png")
    assert [looks.names(), looks.names()] == [[], ["a.png"]]
    at = path.stat().st_mtime_ns
    shutil.copyfile(path, tmp_path / "copy")
    os.utime(tmp_path / "copy", ns=(at, at))
    (tmp_path / "copy").rename(path)
    assert [looks.names(), looks.names()] == [[], []]


def test_what_cannot_be_read_is_a_fault_and_the_rest_goes_on(watched, tmp_path, monkeypatch):
    looks = watched()
    folder = tmp_path / "in"
    data = png(folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])
    (folder / "c.png").write_bytes(b"")
    np.save(folder / "d.npy", IMAGES[..., :2])
    np.save(folder / "e.npy", IMAGES[:2])
    (folder / "e.npy").write_bytes((folder / "e.npy").read_bytes()[:-3])
    (folder / "f.npy").write_bytes(b"no array")
    png(folder / "g.png")
    png(folder / "h.png")
    (folder / "not.txt").write_text("no image")
    assert looks.names() == []
    monkeypatch.setattr("edgeadapt.devices.sources.pictures.read", vanishing(folder / "g.png"))
    found = looks.again()
    assert [frame.id for frame in found] == ["a.png", "b.png", "c.png", "d.npy", "e.npy#0", "e.npy", "f.npy", "g.png", "h.png"]
    assert [bool(frame.fault) for frame in found] == [False, True, True, True, False, True, True, True, False]
    assert [frame.pixels is None for frame in found] == [bool(frame.fault) for frame in found]
    assert "No such file" in found[7].fault
    assert looks.names() == []


def vanishing(gone: Path) -> Callable[..., object]:
    from edgeadapt.devices.sources import pictures

    read = pictures.read

    def look(path: str, channels: int) -> object:
        gone.unlink(missing_ok=True)
        return read(path, channels)

    return look


def test_what_is_no_file_is_passed_over(watched, tmp_path):
    looks = watched(existing=True)
    os.mkfifo(tmp_path / "in/a.npy")
    os.mkfifo(tmp_path / "in/b.png")
    (tmp_path / "in/c.png").mkdir()
    (tmp_path / "in/d.png").symlink_to(tmp_path / "gone.png")
    png(tmp_path / "in/c.png/deeper.png")
    assert [looks.names(), looks.names(), looks.names()] == [[], [], []]


def test_a_pipe_that_takes_the_place_of_an_array_is_a_fault(watched, tmp_path, monkeypatch):
    looks = watched()
    path = tmp_path / "in/a.npy"
    np.save(path, IMAGES[0])
    assert looks.names() == []
    monkeypatch.setattr("edgeadapt.devices.sources.watch._opened", replaced(path))
    assert looks.again()[0].fault == "is not a file"


def replaced(path: Path) -> Callable[[str], object]:
    from edgeadapt.devices.sources.watch import _opened

    def opened(name: str) -> object:
        path.unlink()
        os.mkfifo(path)
        return _opened(name)

    return opened


def test_arrays_of_one_or_several_frames(watched, tmp_path):
    looks = watched()
    np.save(tmp_path / "in/a.npy", IMAGES[0])
    np.save(tmp_path / "in/b.npy", IMAGES[1:4])
    assert looks.names() == []
    found = looks.again()
    assert [frame.id for frame in found] == ["a.npy", "b.npy#0", "b.npy#1", "b.npy#2"]
    assert np.array_equal([frame.pixels for frame in found], IMAGES[:4])


def test_a_model_that_takes_no_images_takes_arrays(watched, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    looks = watched(SENSOR)
    np.save(tmp_path / "in/a.npy", SIGNALS)
    (tmp_path / "in/b.png").write_bytes(b"not looked at")
    assert looks.names() == []
    found = looks.again()
    assert np.array_equal([frame.pixels for frame in found], SIGNALS)
    with pytest.raises(SourceError, match="Pillow"):
        Watch(tmp_path / "in", WANTED)


def test_names_that_are_no_text_can_be_told(watched, tmp_path):
    looks = watched()
    png(tmp_path / "x.png").rename(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.png"))
    assert looks.names() == []
    assert looks.names() == ["?.png"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_that_is_not_there_or_vanishes_is_a_source_error(existing, watched, tmp_path):
    looks = watched(existing=existing)
    assert looks.names() == []
    (tmp_path / "in").rename(tmp_path / "away")
    with pytest.raises(SourceError, match="No such file"):
        looks.names()
    with pytest.raises(SourceError, match="No such file"):
        next(iter(Watch(tmp_path / "in", WANTED, existing)))
    (tmp_path / "in").write_text("a file")
    with pytest.raises(SourceError, match="Not a directory"):
        next(iter(Watch(tmp_path / "in", WANTED, existing)))


def test_a_stick_that_was_pulled_out_leaves_an_empty_folder_and_is_missed(watched, tmp_path, monkeypatch):
    looks = watched()
    png(tmp_path / "in/a.png")
    assert looks.names() == []
    monkeypatch.setattr(Watch, "_place", lambda self: -1)  # another file system
    with pytest.raises(SourceError, match="another file system"):
        looks.names()


def test_it_goes_on_when_the_folder_is_back(tmp_path):
    folder = tmp_path / "in"
    with Taking(Reopened(lambda: Watch(folder, WANTED, existing=True, poll=0.01), first=0.01, longest=0.02)) as taking:
        until(lambda: "No such file" in taking.source.complaint)
        folder.mkdir()
        png(folder / "a.png")
        assert taking.frame().id == "a.png"
        shutil.rmtree(folder)
        breaks = taking.source.counts["breaks"]
        until(lambda: taking.source.counts["breaks"] > breaks)
        folder.mkdir()
        png(folder / "b.png")
        assert taking.frame().id == "b.png"


def test_files_are_deleted_after_they_were_taken_and_only_these(watched, tmp_path):
    folder = tmp_path / "in"
    outside = png(tmp_path / "outside.png")
    looks = watched(remove=True)
    (folder / "broken.png").write_bytes(b"broken")
    (folder / "link.png").symlink_to(outside)
    (folder / "notes.txt").write_text("no image")
    png(folder / "a.png")
    np.save(folder / "b.npy", IMAGES)
    assert looks.names() == []
    assert len(looks.names()) == 1 + len(IMAGES) + 2
    assert looks.names() == []
    assert sorted(path.name for path in folder.iterdir()) == ["broken.png", "link.png", "notes.txt"]
    assert outside.is_file()
    assert looks.source.counts == {"kept": 0}


def test_a_file_is_not_deleted_before_it_was_taken_nor_when_it_changed_since(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = png(folder / "a.png")
    with bounded(Watch(folder, WANTED, existing=True, poll=0.001, remove=True)) as source:
        frames = iter(source)
        assert next(frames).id == "a.png"
        assert path.is_file()
        frames.close()
        assert path.is_file()
    with bounded(Watch(folder, WANTED, existing=True, poll=0.001, remove=True)) as source:
        frames = iter(source)
        next(frames)
        os.utime(path, ns=(1, 1))
        assert next(frames).id == "a.png"  # again, as it changed
        assert path.is_file()
        png(folder / "b.png")
        next(frames)
        assert not path.exists()


def test_nothing_is_deleted_through_a_link_that_takes_the_place_of_a_file_or_of_the_folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = png(folder / "a.png")
    other = tmp_path / "other"
    with bounded(Watch(folder, WANTED, existing=True, poll=0.001, remove=True)) as source:
        frames = iter(source)
        next(frames)
        path.rename(tmp_path / "a.png")
        path.symlink_to(tmp_path / "a.png")
        png(folder / "b.png")
        assert next(frames).id == "b.png"
        assert path.is_symlink()
        assert (tmp_path / "a.png").is_file()
        folder.rename(other)
        with pytest.raises(SourceError):
            next(frames)
    assert (other / "b.png").is_file()


def test_what_cannot_be_deleted_is_kept_and_told_once(watched, tmp_path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.unlink", refuse)
    looks = watched(remove=True)
    for name in "ab":
        png(tmp_path / f"in/{name}.png")
    assert looks.names() == []
    with caplog.at_level(logging.WARNING, "edgeadapt"):
        assert looks.names() == ["a.png", "b.png"]
    assert looks.names() == []
    assert looks.source.counts == {"kept": 2}
    assert [record.getMessage() for record in caplog.records] == [f"a.png in {tmp_path / 'in'} cannot be deleted: Permission denied"]


def test_a_stop_among_many_files_leaves_the_rest(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        png(folder / f"{name}.png")
    source = Watch(folder, WANTED, existing=True, poll=0.001)
    found = []
    for frame in source:
        found.append(frame.id)
        source.stop()
    assert found == ["a.png"]


@pytest.mark.parametrize("poll", [0, -1, float("nan"), float("inf")])
def test_no_time_between_two_looks(poll, tmp_path):
    with pytest.raises(UsageError, match="number above 0"):
        Watch(tmp_path, WANTED, poll=poll)
