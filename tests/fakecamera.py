"""Stand-ins for OpenCV and picamera2, as modules with what devices/sources uses of them, and a camera behind them that a test holds in its hands."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

NODE = "/dev/null"  # a device that is everywhere, and may be opened
GENEROUS = 60.0  # seconds: what takes longer hangs


class Device:
    """A camera: gives what is put, and waits where there is nothing.

    Attributes:
        there: whether it can be opened.
        opened: how often it was.
        asked: what it was last asked for, by key.
        closed: how often it was closed.
    """

    def __init__(self) -> None:
        self.there, self.opened, self.closed, self.reading = True, 0, 0, 0
        self.asked: dict[Any, Any] = {}
        self._gone = False
        self._images: deque[Any] = deque()
        self._changed = threading.Condition()

    def open(self) -> bool:
        """Opens it if it is there."""
        self.opened += self.there
        return self.there

    def put(self, image: object) -> None:
        """An image that comes next, an exception that is raised instead, or None where it breaks off."""
        with self._changed:
            self._images.append(image)
            self._changed.notify_all()

    def read(self) -> Any:
        """The next image, as soon as there is one."""
        with self._changed:
            self.reading += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._images or self._gone, GENEROUS)
            image = self._images.popleft() if self._images else None
            self.reading -= 1
        if isinstance(image, BaseException):
            raise image
        return image

    def pull(self) -> None:
        """Pulls it out, for good: every read ends."""
        with self._changed:
            self.there, self._gone = False, True
            self._changed.notify_all()

    def drained(self) -> None:
        """Returns when all that was put is taken and somebody waits for more."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._images and self.reading, GENEROUS)


class _Error(Exception):
    pass


def opencv(device: Device, given: dict[int, float] | None = None) -> ModuleType:
    """A module cv2 that knows one camera, whatever its address; `given` is what it has where it is asked for something else."""

    class VideoCapture:
        def __init__(self, node: str, backend: int = 0, options: list[int] | None = None) -> None:
            self._open = device.open()
            device.asked |= {"node": node, "backend": backend, "options": options}

        def isOpened(self) -> bool:
            return self._open

        def set(self, key: int, value: float) -> bool:
            device.asked[key] = value
            return True

        def get(self, key: int) -> float:
            return (given or {}).get(key, device.asked[key])

        def read(self) -> tuple[bool, NDArray[Any] | None]:
            image = device.read()
            return image is not None, image

        def release(self) -> None:
            device.closed += self._open
            self._open = False

    module: Any = ModuleType("cv2")
    module.VideoCapture, module.error = VideoCapture, _Error
    module.CAP_V4L2, module.CAP_FFMPEG = 200, 1900
    module.CAP_PROP_FRAME_WIDTH, module.CAP_PROP_FRAME_HEIGHT, module.CAP_PROP_FPS = 3, 4, 5
    module.CAP_PROP_OPEN_TIMEOUT_MSEC, module.CAP_PROP_READ_TIMEOUT_MSEC = 53, 54
    return module


def picamera2(device: Device) -> ModuleType:
    """A module picamera2 that knows one camera, number 0; an image put as RGB comes with blue first, as the format "RGB888" has it in memory."""

    class Picamera2:
        def __init__(self, camera_num: int = 0) -> None:
            if not device.there:
                [][camera_num]  # IndexError, as the library's own
            self._state = "made"

        def create_video_configuration(self, main: dict[str, Any] = {}, controls: dict[str, Any] = {}, **others: Any) -> dict[str, Any]:  # noqa: B006
            assert set(main) <= {"format", "size"}
            return {"main": {"format": "XBGR8888", "size": (1280, 720)} | main, "controls": {"FrameDurationLimits": (33333, 33333)} | controls}

        def configure(self, configuration: dict[str, Any]) -> None:
            device.asked |= configuration
            self._state = "configured"

        def start(self) -> None:
            assert self._state == "configured"
            self._state = "started"
            device.open()

        def capture_array(self, name: str = "main") -> NDArray[Any]:
            assert (self._state, name) == ("started", "main")
            image = device.read()
            if image is None:
                raise RuntimeError("Camera frontend has timed out")
            assert device.asked["main"]["format"] == "RGB888"
            return np.ascontiguousarray(image)

        def stop(self) -> None:
            self._state = "stopped"

        def close(self) -> None:
            assert self._state == "stopped"
            device.closed += 1

    module: Any = ModuleType("picamera2")
    module.Picamera2 = Picamera2
    return module


@contextmanager
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The camera that both modules lead to; in the end no thread reads it any more."""
    camera = Device()
    monkeypatch.setitem(sys.modules, "cv2", opencv(camera))
    monkeypatch.setitem(sys.modules, "picamera2", picamera2(camera))
    try:
        yield camera
    finally:
        camera.pull()
        until(lambda: not readers())


def readers() -> list[threading.Thread]:
    """The threads that read cameras now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("camera ")]


def until(true: Any) -> None:
    """Returns when `true()` is; fails where that never comes."""
    end = time.monotonic() + GENEROUS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)
