"""Pictures brought to the model's size as they are read, within a bound on the memory that takes, which is known before any of it is taken.

They go from the decoder to the filter without becoming an array in their own size between: of a JPEG file 4.5 bytes a pixel, not 14. What comes of it
is the same to the byte, which rules out JPEG's own way to decode at a half or a quarter of the size: its pixels are others than those of the export.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.devices.sources.base import PictureTooLarge
from edgeadapt.preprocess import batch_of, cut_out, fitted, placed
from edgeadapt.units import format_bytes

MODES = {1: "L", 3: "RGB"}
"""Pillow's, by channels."""

_BESIDE = 2**19  # bytes that a decoder holds whatever the picture's size: tables, rows, pieces of the file
_TEXT = 2**20  # bytes that notes in a PNG file may become; Pillow itself lets them be 64 MiB
_STORED = {"1": 1, "L": 1, "P": 1}  # bytes a pixel of Pillow's images; 4 of all others, RGB among them
# What decoders hold beside the image, bytes a pixel: what was measured of pictures of 2048 x 2048 (Pillow 13.0, peak resident memory of a child
# process), and a little more. Baseline JPEG 0.06, progressive 3.0 (4:2:0) to 6.0 (4:4:4), 2 a coefficient; PNG of every kind 0.05; GIF and BMP 0.05;
# PPM 0.05, of 16 bits 6.0, in text 35; TIFF as it stands 0.6, in one compressed strip 3.6 and the file; WebP 12.9, lossless 14.0.
_BY_CODEC = {"raw": 2, "zip": 1, "gif": 4, "bmp_rle": 3, "ppm": 7, "ppm_plain": 40, "libtiff": 12, "WEBP": 16}
_UNKNOWN = 40

_TURN = threading.Lock()  # one picture at a time, whichever threads read some: the bound is of all of them together


def within(image: Any, spec: InputSpec, most: int) -> NDArray[np.uint8]:
    """An image that Pillow has opened and not read yet, as uint8 [*spec.shape[1:],C]: what `preprocess.fitted` makes of it.

    Args:
        image: it is closed.
        spec: the model's input, of 1 or 3 channels.
        most: bytes that this may take.

    Raises:
        PictureTooLarge: it would take more.
        InputError: its size is none that the model takes.
        Exception: whatever Pillow's decoders raise.
    """
    batch_of(np.broadcast_to(np.zeros((), np.uint8), (image.height, image.width, spec.shape[0])), spec)
    _check(cost(image, spec), (image.height, image.width), most)
    mode = MODES[spec.shape[0]]
    with _TURN:
        _bound_notes(image)
        image.load()
        made = image
        if image.mode != mode:
            made = image.convert(mode)
            image.close()  # or there would be two while it is resized
        return cut_out(made, spec)


def array(pixels: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    """One frame of an array as it was read, which `check_array` has let pass; an image [H,W,C] or [H,W] in the input's size."""
    if pixels.dtype != np.uint8:
        return pixels
    frame = batch_of(pixels, spec)[0][0]
    if frame.shape[:2] == spec.shape[1:]:
        return pixels
    with _TURN:
        return fitted(frame, spec).copy()  # and not a view of all of it


def check_array(shape: tuple[int, ...], dtype: np.dtype[Any], spec: InputSpec, most: int) -> None:
    """See that a frame of an array can be read and brought to the model's size within so many bytes; one in the model's own always can.

    Args:
        shape: of one frame that the model takes, [H,W,C] of images.

    Raises:
        PictureTooLarge: it would take more.
    """
    if dtype == np.uint8 and len(shape) == 3 and shape[:2] != spec.shape[1:]:
        height, width, channels = shape
        _check(height * width * (channels + (4 if channels == 3 else 2)) + _resized(height, width, spec), (height, width), most)


def cost(image: Any, spec: InputSpec) -> int:
    """Bytes that reading an image will take at its peak, from its head alone: decoded, converted, and brought to the model's size."""
    pixels, mode = image.width * image.height, MODES[spec.shape[0]]
    stored, made = _STORED.get(image.mode, 4), _STORED.get(mode, 4)
    decoding = pixels * (stored + _beside(image) + (0 if image.mode == mode else made))
    return _BESIDE + _whole_file(image) + max(decoding, pixels * made + _resized(image.height, image.width, spec))


def largest(spec: InputSpec, most: int) -> int:
    """Bytes that reading one picture takes for this model, where it may take `most`. One that does not resize only takes pictures in its own size."""
    if spec.resize is not None or spec.crop:
        return most
    height, width = spec.shape[1:]
    return min(most, _BESIDE + height * width * (4 + _UNKNOWN + 4))


def _resized(height: int, width: int, spec: InputSpec) -> int:
    """Bytes of what is resized, first across and then down, and of what is cut out of it."""
    tall, wide, _, _ = placed(height, width, spec)
    depth = 1 if spec.shape[0] == 1 else 4
    resizing = 0 if (tall, wide) == (height, width) else depth * wide * (height + tall)
    return resizing + (depth + 3 * spec.shape[0]) * spec.shape[1] * spec.shape[2]


def _beside(image: Any) -> int:
    """Bytes a pixel that its decoder holds beside the image."""
    codec = image.tile[0][0] if image.tile else image.format
    if codec == "jpeg":
        return 0 if _in_one_scan(image.fp) else 2 * len(image.getbands())
    return max(_BY_CODEC.get(tile[0], _UNKNOWN) for tile in image.tile) if image.tile else _BY_CODEC.get(codec, _UNKNOWN)


def _whole_file(image: Any) -> int:
    """Bytes of the file, of the kinds that are read or mapped whole."""
    if image.format not in ("WEBP", "TIFF"):
        return 0
    file = image.fp
    with suppress(OSError, ValueError, AttributeError):
        place = file.tell()
        size = file.seek(0, os.SEEK_END)
        file.seek(place)
        return int(size)
    return 0


def _in_one_scan(file: IO[bytes]) -> bool:
    """Whether a JPEG file is sequential and its first scan has all components: else libjpeg holds every coefficient. False where it is not clear."""
    place, components, sequential = file.tell(), 0, False
    try:
        file.seek(2)
        while len(head := file.read(4)) == 4 and head[0] == 0xFF:
            kind, size = head[1], int.from_bytes(head[2:], "big") - 2
            if kind == 0xDA:
                return sequential and components == file.read(1)[0]
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                sequential, components = kind in (0xC0, 0xC1), file.read(6)[-1]
                size -= 6
            if size < 0:
                return False
            file.seek(size, os.SEEK_CUR)
        return False
    except (OSError, ValueError, IndexError):
        return False
    finally:
        file.seek(place)


def _bound_notes(image: Any) -> None:
    png = getattr(image, "png", None)
    if png is not None:  # notes may stand behind the pixels too
        from PIL import PngImagePlugin

        PngImagePlugin.MAX_TEXT_MEMORY = min(PngImagePlugin.MAX_TEXT_MEMORY, _TEXT)


def _check(takes: int, size: tuple[int, int], most: int) -> None:
    height, width = size
    if takes > most:
        raise PictureTooLarge(
            f"has {width} x {height} pixels, and reading it takes {format_bytes(takes)}; at most {format_bytes(most)} may be (memory.picture)",
            "send it smaller, or as plain JPEG or PNG, or raise memory.picture",
        )
