"""Image files as arrays."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources import fitting
from edgeadapt.devices.sources.base import PIXELS, PictureTooLarge, Wanted
from edgeadapt.errors import InputError, SourceError
from edgeadapt.units import format_shape

PLAIN = ("PNG", "JPEG", "BMP", "GIF", "PPM")
"""Kinds, as Pillow calls them, that bytes of strangers may be: decoders of others are larger, or start programs."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

KNOWN = (*PLAIN, "TIFF", "WEBP")
"""Kinds that files may be of whose memory is bounded: those of `SUFFIXES`."""

_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # Pillow's own conversion of these to 8 bits clips


def check(spec: InputSpec) -> None:
    """Refuses at once what every file of a folder would fail on.

    Raises:
        SourceError: the model's input is no image of 1 or 3 channels, or Pillow is missing.
    """
    if len(spec.shape) != 3 or spec.shape[0] not in fitting.MODES:
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
    _check_file(path)
    return decoded(path, channels)


def taken(path: str | os.PathLike[str], wanted: Wanted) -> NDArray[np.uint8]:
    """An image file as a source gives it: as `read` does, or where its memory is bounded as `bounded`.

    Raises:
        InputError: as those.
    """
    if wanted.picture is None:
        return read(path, wanted.input.shape[0])
    _check_file(path)
    return bounded(path, wanted.input, wanted.picture, KNOWN)


def bounded(file: str | os.PathLike[str] | IO[bytes], spec: InputSpec, most: int, formats: tuple[str, ...] = PLAIN) -> NDArray[np.uint8]:
    """An image file in the size that the model takes, uint8 [*spec.shape[1:],C]: `preprocess.fitted` of what `decoded` would give.

    Args:
        file: see there. formats: see there.
        spec: the model's input, of 1 or 3 channels.
        most: bytes that this may take, all threads together.

    Raises:
        PictureTooLarge: it would take more; nothing of it was read but its head.
        InputError: as `read`; or its size is none that the model takes.
    """
    with _opened(file, formats) as image:
        return fitting.within(image, spec, most)


def _check_file(path: str | os.PathLike[str]) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise InputError("is not a file")
    except (OSError, ValueError) as reason:
        raise InputError(f"cannot be read as an image: {getattr(reason, 'strerror', None) or reason}") from None


def decoded(file: str | os.PathLike[str] | IO[bytes], channels: int, formats: tuple[str, ...] | None = None) -> NDArray[np.uint8]:
    """The same of a file that is open, or known to be one; `formats` are the kinds that it may be of, as Pillow calls them, None any.

    Raises:
        InputError: as `read`.
    """
    with _opened(file, formats) as image:
        pixels: NDArray[Any] = np.asarray(image if image.mode == fitting.MODES[channels] else image.convert(fitting.MODES[channels]))
    return pixels[..., None] if pixels.ndim == 2 else pixels


@contextmanager
def _opened(file: str | os.PathLike[str] | IO[bytes], formats: tuple[str, ...] | None) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > PIXELS:
                raise PictureTooLarge(f"has {image.width} x {image.height} pixels; at most {PIXELS} are read", "send it smaller")
            if image.mode in _DEEP:
                raise InputError(f"has more than 8 bits a channel (mode {image.mode})")
            yield image
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise PictureTooLarge(f"has more than {PIXELS} pixels", "send it smaller") from None
    except Exception as reason:  # Pillow's decoders raise many types on damaged files, struct.error and IndexError among them
        what = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason).split(":")[0]
        raise InputError(f"cannot be read as an image: {what}") from None
