"""Image files as arrays."""

from __future__ import annotations

import os
import stat
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import PIXELS
from edgeadapt.errors import InputError, SourceError
from edgeadapt.units import format_shape

PLAIN = ("PNG", "JPEG", "BMP", "GIF", "PPM")
"""Kinds, as Pillow calls them, that bytes of strangers may be: decoders of others are larger, or start programs."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

_MODES = {1: "L", 3: "RGB"}
_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's own conversion of these to 8 bits clips


def check(spec: InputSpec) -> None:
    """Refuses at once what every file of a folder would fail on.

    Raises:
        SourceError: the model's input is no image of 1 or 3 channels, or Pillow is missing.
    """
    if len(spec.shape) != 3 or spec.shape[0] not in _MODES:
        raise SourceError(
            f"image files have 1 or 3 channels, but one frame of this model is {format_shape(spec.shape)}",
            "give the frames as float32 in an .npz file",
        )
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise SourceError("reading image files needs Pillow", "pip install edgeadapt[images], or give the frames in an .npz file") from None


def read(path: str | os.PathLike[str], channels: int) -> NDArray[np.uint8]:
    """An image file as uint8 [H,W,channels], converted to grey or colour as that asks. Rotation marks of cameras are not applied.

    Raises:
        InputError: the file is missing, no image, damaged, too large, or has more than 8 bits a channel.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise InputError("is not a file")
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot be read as an image: {getattr(reason, 'strerror', None) or reason}") from None
    return decoded(path, channels)


def decoded(file: str | os.PathLike[str] | IO[bytes], channels: int, formats: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    """The same of a file that is open, or known to be one; `formats` are the kinds that it may be of, as Pillow calls them, None any.

    Raises:
        InputError: as `read`.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > PIXELS:
                raise InputError(f"has {image.width} x {image.height} pixels; at most {PIXELS} are read")
            if image.mode in _DEEP:
                raise InputError(f"has more than 8 bits a channel (mode {image.mode})")
            pixels: NDArray[Any] = np.asarray(image.convert(_MODES[channels]))
    except InputError:
        raise
    except Exception as reason:  # Pillow's decoders raise many types on damaged files, struct.error and IndexError among them
        what = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason).split(":")[0]
        raise InputError(f"cannot be read as an image: {what}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels
