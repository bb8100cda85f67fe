"""Packets of frames as they go over a serial line: a header, the numbers, a checksum, stuffed so that a zero byte ends each (COBS).

The format is described in devices/firmware/README.md, and devices/firmware/EdgeAdaptFrame sends it from a microcontroller. Whatever comes between two
zeros is a packet or is counted as what is wrong with it, so that a receiver is back in step at the next zero, wherever it began to listen.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle import InputSpec
from edgeadapt.errors import InputError
from edgeadapt.units import format_shape

VERSION = 1
END = b"\0"
UNKNOWN = -1
"""The label of a frame whose class is not known."""

MOST_PIXELS = 2**20
"""Of a picture that comes in a size of its own: 1280 x 800 fits. Three channels of it take three seconds at 1 MB/s, and most lines are slower."""

COUNTED = ("bytes", "packets", "cobs", "crc", "header", "oversize", "lost", "duplicates", "reordered", "restarts")

_HEADER = struct.Struct("<BBHIhBBf")  # version, kind, boot, sequence, label, dims, reserved, scale
_CRC = struct.Struct("<I")
_IMAGE, _FLOAT, _SHORT = 1, 2, 3
_KINDS: dict[int, tuple[np.dtype[Any], range]] = {
    _IMAGE: (np.dtype("u1"), range(2, 4)),
    _FLOAT: (np.dtype("<f4"), range(1, 5)),
    _SHORT: (np.dtype("<i2"), range(1, 5)),
}  # how they lie, and how many dimensions they may have
_CODES = [bytes((length + 1,)) for length in range(255)]  # of blocks of so many bytes
_AROUND = _HEADER.size + 8 + _CRC.size  # bytes beside the payload, at most
_SCALES = 2.0**-100, 2.0**100  # all that int16 become with them are float32
_NUMBERS = 2**32
_KEPT = 64  # numbers, the newest and those before it, that are told apart
_FAR = 2**16  # numbers that may be missing at once; more are no gap


def most_payload(spec: InputSpec) -> int:
    """Bytes of the largest payload that a bundle needs: a frame as float32, or a picture of `MOST_PIXELS` where pictures are resized or cut.

    At least 4 KiB, so that frames of another shape than a small one are read and can be told from noise.
    """
    frame = max(4 * math.prod(spec.shape), 4096)
    return max(frame, spec.shape[0] * MOST_PIXELS) if spec.resize is not None or spec.crop else frame


@dataclass(frozen=True, eq=False)
class Packet:
    """One frame as it came.

    Attributes:
        array: uint8 [H,W] or [H,W,C]; or float32 of one to four dimensions, int16 already times their scale. Its own memory.
        sequence: its number, 0 to 2**32 - 1; after the last comes 0.
        boot: differs from one start of the sender to the next, 0 to 65535.
        label: its class by number, -1 where that is not known.
    """

    array: NDArray[Any]
    sequence: int
    boot: int
    label: int


def encode(array: NDArray[Any], sequence: int, boot: int = 0, label: int = UNKNOWN, scale: float = 1.0) -> bytes:
    """One packet as it goes on the line, the zero that ends it included. A sender writes one more zero before its first.

    Args:
        array: uint8 image [H,W] or [H,W,C]; or float32 or int16 of one to four dimensions.
        sequence: the frame's number, counted from any number on; taken modulo 2**32.
        boot: a number that differs from the last start's, such as a random one; taken modulo 2**16.
        label: its class by number, or -1.
        scale: what an int16 is worth; other arrays are sent as they are.

    Raises:
        InputError: another dtype or shape, a label above 32767, or a scale of 0 or beyond 2**100.
    """
    kinds = {np.dtype(np.uint8): _IMAGE, np.dtype(np.float32): _FLOAT, np.dtype(np.int16): _SHORT}
    kind = kinds.get(array.dtype)
    if kind is None:
        raise InputError(f"packets hold uint8, int16 or float32, not {array.dtype}", "convert the array")
    dtype, dims = _KINDS[kind]
    if array.ndim not in dims or not array.size or max(array.shape) > 0xFFFF:
        wanted = "H x W or H x W x C" if kind == _IMAGE else "one to four dimensions"
        raise InputError(f"{array.dtype} in packets has {wanted}, each of 1 to 65535, not {format_shape(array.shape)}", "send it in parts")
    if not UNKNOWN <= label <= 0x7FFF:
        raise InputError(f"the label {label} is not one of -1 to 32767", "give the class by number, or -1 where it is not known")
    if kind != _SHORT:
        scale = 1.0
    if not _SCALES[0] <= abs(scale) <= _SCALES[1]:
        raise InputError(f"the scale {scale} is not one of {_SCALES[0]:g} to {_SCALES[1]:g}", "give what an int16 of 1 is worth")
    data = _HEADER.pack(VERSION, kind, boot % 2**16, sequence % _NUMBERS, label, array.ndim, 0, scale)
    data += struct.pack(f"<{array.ndim}H", *array.shape) + array.astype(dtype, copy=False).tobytes()
    return stuffed(data + _CRC.pack(zlib.crc32(data))) + END


# ------------------------------------------------------------------------------------------------------------ stuffing


def stuffed(data: bytes) -> bytes:
    """Bytes without a zero among them, by consistent overhead byte stuffing; at most one more for each 254, and one."""
    blocks: list[bytes] = []
    *before, last = data.split(END)
    for part in before:
        whole = len(part) - len(part) % 254
        for at in range(0, whole, 254):
            blocks += _CODES[254], part[at : at + 254]
        blocks += _CODES[len(part) - whole], part[whole:]
    whole = max(0, len(last) - 1) // 254 * 254
    for at in range(0, whole, 254):
        blocks += _CODES[254], last[at : at + 254]
    return b"".join((*blocks, _CODES[len(last) - whole], last[whole:]))


def unstuffed(data: bytes | bytearray) -> bytearray | None:
    """What was stuffed into these bytes; None where that is not how they look. A bytearray that is given is written over."""
    if not data or 0 in data:
        return None
    work = data if isinstance(data, bytearray) else bytearray(data)
    size, code, at, start, runs = len(work), work[0], 0, 1, []
    while (at := at + code) < size:
        full, code = code == 255, work[at]
        if full:  # 254 bytes and no zero after them: this one only says how long the next block is
            runs.append((start, at))
            start = at + 1
        else:
            work[at] = 0
    if at > size:
        return None
    if not runs:
        return work[1:]
    view = memoryview(work)
    return bytearray().join([*(view[first:last] for first, last in runs), view[start:]])


class Pieces:
    """Cuts a stream of bytes at a mark, and holds back no more than it must.

    Args:
        mark: one byte, which ends a piece.
        most: bytes of a piece; what is longer is thrown away as it comes.
    """

    def __init__(self, mark: bytes, most: int) -> None:
        self._mark, self._most = mark, most
        self._held, self._over = bytearray(), False

    @property
    def held(self) -> int:
        """Bytes of a piece that has not ended, at most `most`."""
        return len(self._held)

    def feed(self, data: bytes) -> list[bytes | bytearray | None]:
        """The pieces that end in these bytes, without their marks; None for one that is too long."""
        found: list[bytes | bytearray | None] = []
        *ended, tail = data.split(self._mark)
        for piece in ended:
            if self._add(piece, found):
                found.append(self._held)
                self._held = bytearray()
            self._over = False
        self._add(tail, found)
        return found

    def _add(self, part: bytes, found: list[bytes | bytearray | None]) -> bool:
        """Whether what is held now is all of the piece so far."""
        if self._over:
            return False
        if len(self._held) + len(part) > self._most:
            self._held, self._over = bytearray(), True
            found.append(None)
            return False
        self._held += part
        return True


class Decoder:
    """Packets out of a stream of bytes that may be cut anywhere, begin anywhere, and hold anything.

    It holds no more than one packet of the largest payload, and takes twice that while it reads one; what a header claims is compared with what came,
    and nothing is allocated by it.

    Args:
        most: bytes of the largest payload that is taken, such as `most_payload` gives.

    Attributes:
        counts: how often what happened, all keys of `COUNTED` from the beginning.
            bytes: that came.
            packets: that were good, and given.
            cobs: pieces between zeros that are stuffed wrongly.
            crc: packets whose checksum differs.
            header: packets that cannot be, whether their checksum is right or not: version, kind, dimensions, or another length than they say.
            oversize: longer ones than are taken, good or not.
            lost: numbers that did not come. Those before the first packet, and between two starts of the sender, are not known.
            duplicates: packets that came before, the same in every bit, and are not given again.
            reordered: packets that came after a later one; they are given, and no longer counted as lost.
            restarts: the sender's, by its boot number; or without that, where numbers leap by more than 65536, go back by 64 or more, or one of
                the last 64 comes again with something else.
    """

    def __init__(self, most: int) -> None:
        raw = _AROUND + most
        self.counts = dict.fromkeys(COUNTED, 0)
        self._most, self._pieces, self._order = most, Pieces(END, raw + raw // 254 + 1), _Order(self.counts)

    @property
    def held(self) -> int:
        """Bytes of a packet that has not ended."""
        return self._pieces.held

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that end in these bytes."""
        self.counts["bytes"] += len(data)
        found = []
        for piece in self._pieces.feed(data):
            if piece is None:
                self.counts["oversize"] += 1
            elif piece:  # zeros alone fill the line while nothing is sent
                packet = self._read(piece)
                if isinstance(packet, Packet):
                    found.append(packet)
                elif packet:
                    self.counts[packet] += 1
        self.counts["packets"] += len(found)
        return found

    def _read(self, piece: bytes | bytearray) -> Packet | str:
        """A packet, or what it is counted as; nothing for a duplicate."""
        raw = unstuffed(piece)
        if raw is None:
            return "cobs"
        if len(raw) < _HEADER.size:
            return "header"
        version, kind, boot, sequence, label, ndim, reserved, scale = _HEADER.unpack_from(raw)
        begin, end = _HEADER.size + 2 * ndim, len(raw) - _CRC.size
        if version != VERSION or reserved or kind not in _KINDS or ndim not in _KINDS[kind][1] or begin >= end:
            return "header"
        dtype = _KINDS[kind][0]
        dims = struct.unpack_from(f"<{ndim}H", raw, _HEADER.size)
        if math.prod(dims) * dtype.itemsize != end - begin or (kind == _SHORT and not _SCALES[0] <= abs(scale) <= _SCALES[1]):
            return "header"
        crc = zlib.crc32(memoryview(raw)[:end])
        if crc != _CRC.unpack_from(raw, end)[0]:
            return "crc"
        if end - begin > self._most:
            return "oversize"
        if not self._order.take(boot, sequence, crc):
            return ""
        array = np.frombuffer(raw, dtype, math.prod(dims), begin).reshape(dims)
        if kind != _IMAGE:
            array = array.astype(np.float32)  # also moves them to where floats may lie
        if kind == _SHORT:
            array *= np.float32(scale)
        return Packet(array, sequence, boot, max(label, UNKNOWN))


class _Order:
    """Tells packets that come in order from those that come again, come late, or begin anew."""

    def __init__(self, counts: dict[str, int]) -> None:
        self._counts = counts
        self._boot: int | None = None
        self._newest = 0
        self._came: dict[int, int] = {}  # the checksums of the newest packets, by number
        self._missing: set[int] = set()  # numbers among them that are counted as lost

    def take(self, boot: int, number: int, crc: int) -> bool:
        """Whether the packet is to be given."""
        if boot != self._boot:
            self._counts["restarts"] += self._boot is not None
            return self._begin(boot, number, crc)
        ahead = (number - self._newest) % _NUMBERS
        if 0 < ahead <= _FAR:
            return self._advance(ahead, crc)
        if _NUMBERS - ahead < _KEPT or not ahead:
            if self._came.get(number) == crc:
                self._counts["duplicates"] += 1
                return False
            if number not in self._came:
                self._counts["reordered"] += 1
                self._counts["lost"] -= number in self._missing
                self._missing.discard(number)
                self._came[number] = crc
                return True
        self._counts["restarts"] += 1
        return self._begin(boot, number, crc)

    def _begin(self, boot: int, number: int, crc: int) -> bool:
        self._boot, self._newest, self._came, self._missing = boot, number, {number: crc}, set()
        return True

    def _advance(self, ahead: int, crc: int) -> bool:
        self._counts["lost"] += ahead - 1
        before, self._newest = self._newest, (self._newest + ahead) % _NUMBERS
        for back in range(_KEPT - min(ahead, _KEPT), _KEPT):  # those that are no longer among the newest
            gone = (before - back) % _NUMBERS
            self._came.pop(gone, None)
            self._missing.discard(gone)
        self._missing.update((self._newest - back) % _NUMBERS for back in range(1, min(ahead, _KEPT)))
        self._came[self._newest] = crc
        return True
