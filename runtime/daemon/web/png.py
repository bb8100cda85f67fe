"""Pictures as PNG files, without a library."""

from __future__ import annotations

import base64
import binascii
import struct
import zlib
from collections.abc import Mapping
from http import HTTPStatus

from edgeadapt.runtime.daemon.web.refusals import Refusal

_COLOURS = {1: 0, 3: 2}


def png(frame: Mapping[str, object]) -> bytes:
    """A PNG file of what the verb "frame" gives: {"shape": [H, W, C], "pixels": base64 of uint8}, C being 1 or 3.

    Raises:
        Refusal: 409, it is no such picture.
    """
    shape, pixels = frame.get("shape"), frame.get("pixels")
    if not isinstance(pixels, str) or not isinstance(shape, list | tuple) or len(shape) != 3 or shape[2] not in _COLOURS:
        raise Refusal(HTTPStatus.CONFLICT, "the latest frame is no picture", "ask for /frame.json: it has its numbers")
    height, width, channels = shape
    rows, length = base64.b64decode(pixels), width * channels
    if len(rows) != height * length:
        raise Refusal(HTTPStatus.CONFLICT, f"a picture of {height} x {width} x {channels} has {len(rows)} bytes", "ask for /frame.json")
    packed = zlib.compressobj(1)
    body = b"".join(packed.compress(b"\0" + rows[begin : begin + length]) for begin in range(0, len(rows), length)) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", binascii.crc32(name + data))
