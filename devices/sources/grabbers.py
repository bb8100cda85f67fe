"""What takes images from cameras and video files: OpenCV, and picamera2 for a Raspberry Pi's ribbon cameras. Neither is loaded before it is used."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import InputError, SourceError, UsageError
from edgeadapt.units import format_shape

LOG = logging.getLogger("edgeadapt")

_GREY = (7471, 38470, 19595)  # of 2**16, blue first: Pillow's, so that a camera and image files give the same greys


@dataclass(frozen=True)
class Asked:
    """What a camera is asked for; None leaves it to the camera.

    Attributes:
        width, height: of frames, in pixels.
        fps: frames a second.
        patience: seconds after which a network camera that does not answer is given up.
    """

    width: int | None = None
    height: int | None = None
    fps: float | None = None
    patience: float = 10.0


class Grabber(Protocol):
    """An opened camera or file. Made, used and closed by one thread."""

    def grab(self) -> NDArray[Any] | None:
        """The next image, [H,W,3] with blue first or [H,W]; None where there is none any more. May wait for long.

        Raises:
            SourceError: the camera broke off.
        """

    def close(self) -> None:
        """Lets go of it."""


def load_cv2() -> Any:
    """OpenCV's module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("cv2")
    except ImportError as reason:
        raise UsageError(f"cameras and video files need OpenCV, which cannot be loaded: {reason}", "pip install edgeadapt[camera]") from None


def load_picamera2() -> Any:
    """The module picamera2.

    Raises:
        UsageError: it is not installed, or not for this numpy.
    """
    try:
        return import_module("picamera2")
    except Exception as reason:  # ValueError where its own libraries were built for another numpy
        raise UsageError(
            f"a Raspberry Pi's ribbon cameras need picamera2, which cannot be loaded: {reason}",
            "apt install python3-picamera2, in an environment made with --system-site-packages whose numpy is of the same major version",
        ) from None


class OpenCV:
    """A V4L2 device by path or number, a network camera, or a video file.

    Args:
        device: which.
        name: how a person would call it.
        asked: of devices, else left alone.

    Raises:
        SourceError: it cannot be opened.
    """

    def __init__(self, device: str | int, name: str, asked: Asked) -> None:
        self._cv2, self._name = load_cv2(), name
        node = f"/dev/video{device}" if isinstance(device, int) else device
        try:
            if "://" in node:
                limit = int(1000 * asked.patience)
                waits = [self._cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, self._cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
                self._capture = self._cv2.VideoCapture(node, self._cv2.CAP_FFMPEG, waits)
                hint = "check the address, and that the camera answers"
            elif os.path.isfile(node):
                self._capture = self._cv2.VideoCapture(node)
                hint = "check that it is a video that OpenCV can read"
            else:
                _check_node(node)
                self._capture = self._cv2.VideoCapture(os.path.realpath(node), self._cv2.CAP_V4L2)
                hint = "check that it is a camera, and that no other program has it open"
        except self._cv2.error as reason:
            raise SourceError(f"{name} cannot be opened: {reason}", "check the camera") from None
        if not self._capture.isOpened():
            raise SourceError(f"{name} cannot be opened", hint)
        self._ask(asked)

    def _ask(self, asked: Asked) -> None:
        for key, value in (("FRAME_WIDTH", asked.width), ("FRAME_HEIGHT", asked.height), ("FPS", asked.fps)):
            if value is None:
                continue
            which = getattr(self._cv2, f"CAP_PROP_{key}")
            self._capture.set(which, value)
            given = self._capture.get(which)
            if abs(given - value) > 0.01 * value:
                LOG.warning("%s has no %s of %g and gives %g", self._name, key.lower().replace("_", " "), value, given)

    def grab(self) -> NDArray[Any] | None:
        """The next image, a new array."""
        try:
            there, image = self._capture.read()
        except self._cv2.error as reason:
            raise SourceError(f"{self._name} broke off: {reason}", "check the camera") from None
        return image if there else None

    def close(self) -> None:
        """Lets go of it."""
        self._capture.release()


def _check_node(node: str) -> None:
    if not os.path.exists(node):
        raise SourceError(f"{node} does not exist", "plug the camera in, or see in /dev/v4l/by-id what it is called")
    if not os.access(node, os.R_OK | os.W_OK):
        raise SourceError(f"{node} may not be used by this user", "add the user to the group video")


class Ribbon:
    """A camera that libcamera knows, by picamera2.

    Args:
        number: which, from 0.
        name: how a person would call it.
        asked: its size is that of picamera2's video configuration where it is left open.

    Raises:
        SourceError: it cannot be opened.
    """

    def __init__(self, number: int, name: str, asked: Asked) -> None:
        self._name = name
        self._camera: Any = None
        try:
            self._camera = load_picamera2().Picamera2(number)
            main: dict[str, Any] = {"format": "RGB888"}  # named after a little-endian word: in memory blue comes first
            if asked.width is not None and asked.height is not None:
                main["size"] = (asked.width, asked.height)
            controls = {} if asked.fps is None else {"FrameDurationLimits": (round(1e6 / asked.fps),) * 2}  # microseconds
            self._camera.configure(self._camera.create_video_configuration(main=main, controls=controls))
            self._camera.start()
        except UsageError:
            raise
        except Exception as reason:  # IndexError where there is no camera, RuntimeError where another program has it
            self.close()
            hint = "check the cable, and with rpicam-hello --list-cameras that it is found; no other program may use it"
            raise SourceError(f"{name} cannot be opened: {reason}", hint) from None

    def grab(self) -> NDArray[Any] | None:
        """The next image, a new array."""
        try:
            image: NDArray[Any] = self._camera.capture_array("main")
        except Exception as reason:
            raise SourceError(f"{self._name} broke off: {reason}", "check the cable") from None
        return image

    def close(self) -> None:
        """Lets go of it."""
        if self._camera is not None:
            for end in (self._camera.stop, self._camera.close):
                with contextlib.suppress(Exception):  # what is broken may not end well
                    end()


def as_pixels(image: NDArray[Any], channels: int) -> NDArray[np.uint8]:
    """A grabbed image as uint8 [H,W,channels], RGB or grey; new memory but for grey from grey. Greys are those that Pillow makes of image files.

    Args:
        image: uint8 [H,W,3] or [H,W,4] with blue first, the fourth channel left out, or grey [H,W] or [H,W,1].
        channels: 1 or 3.

    Raises:
        InputError: another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise InputError(f"the camera gives {image.dtype} of {format_shape(image.shape)}, no image of 8 bits a channel")
    if image.ndim == 2 or image.shape[2] == 1:
        grey = image.reshape(*image.shape[:2], 1)
        return grey if channels == 1 else np.repeat(grey, 3, axis=2)
    if channels == 1:
        sums = np.full(image.shape[:2], 1 << 15, np.uint32)
        for band, weight in enumerate(_GREY):
            sums += image[:, :, band] * np.uint32(weight)
        sums >>= 16
        return sums.astype(np.uint8)[..., None]
    pixels = np.empty((*image.shape[:2], 3), np.uint8)
    for band in range(3):  # three copies are four times as quick as one of a reversed view
        pixels[:, :, band] = image[:, :, 2 - band]
    return pixels
