"""Each kind of source with a device that a test can feed, break and mend, for tests/source_contract.py."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeadapt.devices.framing import encode
from edgeadapt.devices.sources import Frame, Source
from edgeadapt.devices.sources.arrays import Archive
from edgeadapt.devices.sources.camera import Camera
from edgeadapt.devices.sources.folder import Folder
from edgeadapt.devices.sources.posted import Posted
from edgeadapt.devices.sources.replay import Replay
from edgeadapt.devices.sources.serial import Serial
from edgeadapt.devices.sources.stdin import Arrays, Paths
from edgeadapt.devices.sources.watch import Watch
from tests import fakecamera
from tests.fakecamera import until
from tests.source_contract import FRAMES, SIDE, WANTED, Rig, descriptors


class Files(Rig):
    """Plain files; cut before they are made."""

    live = stops = False

    def give(self, index: int) -> None:
        raise AssertionError("a file is all there")

    def cut(self) -> None:
        raise AssertionError("a file has no device that breaks")


class FolderRig(Files):
    """A folder of images."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        for index, frame in enumerate(FRAMES):
            Image.fromarray(frame).save(root / f"{index}.png")

    def make(self) -> Source:
        return Folder(self.root, WANTED)

    def cut(self) -> None:
        shutil.rmtree(self.root)


class ArchiveRig(Files):
    """An .npz file."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self.path = root / "a.npz"
        np.savez(self.path, x=FRAMES, y=np.arange(len(FRAMES)))

    def make(self) -> Source:
        return Archive(self.path, WANTED)

    def cut(self) -> None:
        self.path.write_bytes(self.path.read_bytes()[:-200])


class ReplayRig(ArchiveRig):
    """An .npz file at a pace."""

    stops = True

    def make(self) -> Source:
        return Replay(self.path, WANTED, fps=500)


class ReplayFolderRig(FolderRig):
    """A folder of images at a pace."""

    stops = True

    def make(self) -> Source:
        return Replay(self.root, WANTED, fps=500)


class PathsRig(FolderRig):
    """Names of files on standard input."""

    stops = True
    breaks = False

    def make(self) -> Source:
        return Paths(io.BytesIO("".join(f"{self.root}/{index}.png\n" for index in range(len(FRAMES))).encode()), WANTED)


class ArraysRig(Files):
    """Arrays on standard input."""

    stops = True

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self.lost = 0

    def make(self) -> Source:
        out = io.BytesIO()
        for frame in FRAMES:
            np.save(out, frame)
        return Arrays(io.BytesIO(out.getvalue()[: len(out.getvalue()) - self.lost]), WANTED)

    def cut(self) -> None:
        self.lost = 7


class VideoRig(Files):
    """A video file, with the real OpenCV."""

    stops = True

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import cv2

        super().__init__(root, monkeypatch)
        self.path = root / "a.avi"
        writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*"FFV1"), 10, (SIDE, SIDE))
        for frame in FRAMES:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()

    def make(self) -> Source:
        return Camera(str(self.path), WANTED)

    def cut(self) -> None:
        self.path.write_bytes(b"no video" * 100)


class CameraRig(Rig):
    """A V4L2 device, with a stand-in for OpenCV."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self._plugged = fakecamera.plugged(monkeypatch)
        self.device = self._plugged.__enter__()

    def make(self) -> Source:
        return Camera(fakecamera.NODE, WANTED)

    def give(self, index: int) -> None:
        self.device.put(FRAMES[index][..., ::-1])

    def cut(self) -> None:
        self.device.there = False
        self.device.put(None)

    def mend(self) -> None:
        self.device.there = True

    def held(self) -> int:
        return self.device.opened - self.device.closed

    def opened(self) -> int:
        return self.device.opened

    def done(self) -> None:
        self._plugged.__exit__(None, None, None)


class AddressRig(CameraRig):
    """A network camera, with a stand-in for OpenCV."""

    def make(self) -> Source:
        return Camera("rtsp://user:secret@192.0.2.1/stream", WANTED)


class RibbonRig(CameraRig):
    """A Raspberry Pi's ribbon camera, with a stand-in for picamera2."""

    def make(self) -> Source:
        return Camera("picamera2:", WANTED)


class WatchRig(Rig):
    """Files that appear in a folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self.folder = root / "in"
        self.mend()

    def make(self) -> Source:
        return Watch(self.folder, WANTED, existing=True, poll=0.01)

    def give(self, index: int) -> None:
        Image.fromarray(FRAMES[index]).save(self.root / "finished.png")
        (self.root / "finished.png").rename(self.folder / f"{index}.png")

    def cut(self) -> None:
        shutil.rmtree(self.folder)

    def mend(self) -> None:
        self.folder.mkdir()


class PostedRig(Rig):
    """Frames that other threads put."""

    breaks = False
    source: Posted

    def make(self) -> Source:
        self.source = Posted()
        return self.source

    def give(self, index: int) -> None:
        self.source.put(Frame(index, FRAMES[index]))

    def cut(self) -> None:
        raise AssertionError("there is no device")


class SerialRig(Rig):
    """Packets on a serial line, which is a pseudo-terminal."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root, monkeypatch)
        self.port = root / "port"
        self.mend()

    def make(self) -> Source:
        return Serial(str(self.port), WANTED)

    def ready(self, source: Source) -> None:
        """It is open when a zero comes through: what came before that is thrown away."""
        before = source.counts["bytes"]

        def through() -> bool:
            with suppress(BlockingIOError):
                os.write(self.ends[0], b"\0")
            return source.counts["bytes"] > before

        until(through)

    def give(self, index: int) -> None:
        os.write(self.ends[0], encode(FRAMES[index], index))

    def cut(self) -> None:
        self.port.unlink()
        self.done()

    def mend(self) -> None:
        self.ends = os.openpty()
        os.set_blocking(self.ends[0], False)
        self.port.symlink_to(os.ttyname(self.ends[1]))

    def held(self) -> int:
        return descriptors(os.ttyname(self.ends[1])) - 1 if self.ends else 0

    def done(self) -> None:
        for end in self.ends:
            os.close(end)
        self.ends = ()
