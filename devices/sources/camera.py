"""Cameras and video files: of what is live always the newest frame, of a file each."""

from __future__ import annotations

import math
import os
import re
import stat
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.devices.sources.grabbers import Asked, Grabber, OpenCV, Ribbon, as_pixels, load_cv2, load_picamera2
from edgeadapt.devices.sources.mailbox import Mailbox
from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.units import format_shape

RIBBON = "picamera2:"
"""How a device begins that picamera2 opens; its number follows, 0 where none does."""
SCHEMES = ("rtsp", "rtsps", "http", "https")

_LEFT: dict[str | int, threading.Thread] = {}
"""Threads that a device has not let go of when their source was done, by device: as long as one lives, its device gets no second one."""


class Camera(Source):
    """Frames of a camera, numbered from 0, or of a video file.

    A camera is read by a thread of its own, so that neither a slow taker nor one that stops is held up: frames that nobody took in time give way to
    newer ones and are counted as "dropped". A video file gives every frame, once, and then ends.

    Args:
        device: a V4L2 device ("/dev/video0", "/dev/v4l/by-id/...") or its number; an address (rtsp, rtsps, http, https); a Raspberry Pi's ribbon
            camera ("picamera2:", "picamera2:1"); or a video file.
        wanted: what the bundle takes; frames come as uint8 [H,W,C] with its channels, RGB or grey.
        width, height: of frames in pixels; both or neither. The camera may have others and then takes the nearest, which is logged.
        fps: frames a second; as these, of devices only.
        stall: seconds without a frame after which a camera counts as broken (and is counted in "stalls").

    Raises:
        UsageError: what is asked for cannot be, or the library for this device is not installed.
        InputError: the model takes no images of 1 or 3 channels.
        SourceError: there is no such file.
    """

    def __init__(
        self,
        device: str | int,
        wanted: Wanted,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
        stall: float = 10.0,
    ) -> None:
        _check(wanted.input, width, height, fps, stall)
        self._device = int(device) if isinstance(device, str) and device.isascii() and device.isdigit() else device
        self.name = _shown(self._device)
        self.live = _is_live(self._device)
        asked = next((name for name, value in (("width", width), ("height", height), ("fps", fps)) if value is not None), None)
        if asked and (not self.live or "://" in str(device)):
            raise UsageError(f"{self.name} cannot be asked for a {asked}", "leave it out: only a camera at this machine can")
        self._open = _opener(self._device, self.name, Asked(width, height, fps, stall))
        if not self.live and not os.path.isfile(str(device)):
            raise SourceError(f"{self.name} is no video file, nor a camera's device or address", "give /dev/..., rtsp://..., picamera2: or a file")
        self._channels, self._stall, self._stalls = wanted.input.shape[0], stall, 0
        self._box: Mailbox[NDArray[Any]] = Mailbox(1)
        self._stopped = threading.Event()

    @property
    def counts(self) -> Mapping[str, int]:
        return {"dropped": self._box.dropped, "stalls": self._stalls} if self.live else {}

    def __iter__(self) -> Generator[Frame, None, None]:
        for number, image in enumerate(self._newest() if self.live else self._each()):
            try:
                yield Frame(number, as_pixels(image, self._channels))
            except InputError as reason:
                yield Frame(number, None, None, reason.message)

    def _each(self) -> Generator[NDArray[Any], None, None]:
        if self._stopped.is_set():
            return
        grabber = self._open()
        try:
            image = grabber.grab()
            if image is None:
                raise SourceError(f"{self.name} holds no frame that can be read", "check that it is a video that OpenCV can read")
            while image is not None and not self._stopped.is_set():
                yield image
                image = grabber.grab()
        finally:
            grabber.close()

    def _newest(self) -> Generator[NDArray[Any], None, None]:
        if self._stopped.is_set():
            return
        left = _LEFT.get(self._device)
        if left is not None and left.is_alive():
            raise SourceError(f"{self.name} has not come back from being read", "plug it out and in; if that does not help, restart this program")
        reader = _Reader(self._open, self.name, self._box)
        reader.start()
        try:
            while (image := self._box.take(self._stall)) is not None:
                yield image
            if self._stopped.is_set():
                return
            if reader.failure is not None:
                raise reader.failure
            self._stalls += 1
            raise SourceError(f"{self.name} has given no frame for {self._stall:g} s", "check the cable, the network and the camera's power")
        finally:
            self._box.stop()
            reader.join(0.25)
            if reader.is_alive():
                _LEFT[self._device] = reader
            else:
                _LEFT.pop(self._device, None)

    def stop(self) -> None:
        self._stopped.set()
        if self.live:
            self._box.stop()

    def close(self) -> None:
        """Stops; what reads the device closes it as soon as that lets it."""
        self.stop()


class _Reader(threading.Thread):
    """Opens a camera and reads it until its box is over; `failure` is why it ended before."""

    def __init__(self, opened: Callable[[], Grabber], name: str, box: Mailbox[NDArray[Any]]) -> None:
        super().__init__(name=f"camera {name}", daemon=True)  # a read may never come back
        self._opened, self._shown, self._box = opened, name, box
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            grabber = self._opened()
            try:
                while not self._box.over:
                    image = grabber.grab()
                    if image is None:
                        raise SourceError(f"{self._shown} gives no more frames", "check the cable, the network and the camera's power")
                    self._box.put(image)
            finally:
                grabber.close()
        except Exception as reason:  # raised again by the thread that takes the frames
            self.failure = reason
        finally:
            self._box.end()


def _check(spec: InputSpec, width: int | None, height: int | None, fps: float | None, stall: float) -> None:
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        raise InputError(
            f"cameras give images of 1 or 3 channels, but one frame of this model is {format_shape(spec.shape)}", "take another source for this model"
        )
    if (width is None) != (height is None):
        raise UsageError("a camera is asked for a width and a height, or for neither", "give both")
    for name, value in (("width", width), ("height", height), ("fps", fps), ("stall", stall)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"a camera's {name} is a number above 0, not {value}", "change it, or leave it out")


def _is_live(device: str | int) -> bool:
    if isinstance(device, int) or device.startswith((RIBBON, "/dev/")):
        return True
    if "://" in device:
        scheme = device.split("://")[0].lower()
        if scheme not in SCHEMES:
            raise UsageError(f"{scheme}:// is no address of a camera", f"use one of {', '.join(SCHEMES)}")
        return True
    try:
        return stat.S_ISCHR(os.stat(device).st_mode)
    except OSError:
        return False


def _opener(device: str | int, name: str, asked: Asked) -> Callable[[], Grabber]:
    if not isinstance(device, str) or not device.startswith(RIBBON):
        load_cv2()
        return lambda: OpenCV(device, name, asked)
    number = device.removeprefix(RIBBON) or "0"
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"{device} names no camera of picamera2", f"write {RIBBON}0 or {RIBBON}1")
    load_picamera2()
    return lambda: Ribbon(int(number), name, asked)


def _shown(device: str | int) -> str:
    """How a device is called where others may read it: without a password or a key."""
    if isinstance(device, int):
        return f"camera {device}"
    if "://" not in device:
        return device
    return re.sub(r"(?<=://).*@", "", device).split("?")[0]
