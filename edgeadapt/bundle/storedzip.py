"""A strict reader of zip files whose members are stored, not compressed.

`zipfile` would read them too, but costs a device 1.1 MB of resident memory at import, tolerates files that two readers can understand
differently, and does not say where a member's bytes begin. Here a file is exactly: members, central directory, end record.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from edgeadapt.bundle.reading import shortened
from edgeadapt.errors import BundleError

_END = struct.Struct("<4sHHHHIIH")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MAX_DIRECTORY = 4 * 2**20
_UTF8 = 0x800


@dataclass(frozen=True)
class Place:
    """Where a member's bytes lie in the file, how many there are, and their CRC-32."""

    offset: int
    size: int
    crc: int


def places(file: BinaryIO, where: str) -> dict[str, Place]:
    """The members of an open file by name, in the order of their bytes.

    Raises:
        BundleError: not a zip file, truncated, compressed, encrypted, split, zip64, names twice, or records that contradict each other.
    """

    def bad(what: str) -> BundleError:
        return BundleError(f"{where} is not a sound bundle: {shortened(what)}", "copy or export it again")

    total = file.seek(0, 2)
    if total < _END.size:
        raise bad(f"{total} bytes are too few for a zip file")
    magic, disk, first_disk, here, count, size, begin, comment = _END.unpack(_at(file, total - _END.size, _END.size))
    if magic != b"PK\x05\x06":
        file.seek(0)
        raise bad("it is truncated (its end record is missing)" if file.read(4) == b"PK\x03\x04" else "it is not a zip file")
    if disk or first_disk or here != count or comment or 0xFFFF in (count, here) or 0xFFFFFFFF in (size, begin):
        raise bad("its end record is not that of a plain zip file")
    if size > _MAX_DIRECTORY or begin + size != total - _END.size:
        raise bad(f"its directory of {size} bytes at {begin} does not end where its end record begins ({total - _END.size})")
    directory, position, found = _at(file, begin, size), 0, {}
    for _ in range(count):
        if position + _CENTRAL.size > size:
            raise bad("its directory is cut short")
        entry = _CENTRAL.unpack_from(directory, position)
        magic, flags, method, crc, packed, length = entry[0], entry[3], entry[4], entry[7], entry[8], entry[9]
        name_size, extra, note, header = entry[10], entry[11], entry[12], entry[16]
        position += _CENTRAL.size
        raw = directory[position : position + name_size]
        position += name_size + extra + note
        if magic != b"PK\x01\x02" or position > size:
            raise bad("its directory is damaged")
        try:
            name = raw.decode("ascii")
        except UnicodeDecodeError:
            raise bad(f"a member's name {raw[:80]!r} is not ASCII") from None
        if method or packed != length:
            raise bad(f"member {name} is compressed; bundles are stored uncompressed")
        if flags & ~_UTF8:
            raise bad(f"member {name} is encrypted or streamed (flags {flags:#x})")
        if name in found:
            raise bad(f"member {name} stands twice")
        found[name] = _local(file, header, begin, raw, Place(0, length, crc), bad)
    if position != size:
        raise bad("its directory holds more than it says")
    ordered = dict(sorted(found.items(), key=lambda item: item[1].offset))
    end = 0
    for name, place in ordered.items():
        if place.offset < end:
            raise bad(f"member {name} overlaps the one before it")
        end = place.offset + place.size
    return ordered


def _local(file: BinaryIO, header: int, limit: int, name: bytes, listed: Place, bad: Callable[[str], BundleError]) -> Place:
    """Checks a member's own header against the directory's entry and says where its bytes begin; they must end before `limit`."""
    shown = name.decode("ascii")
    if header + _LOCAL.size > limit:
        raise bad(f"member {shown} is outside the file")
    magic, _, flags, method, _, _, crc, packed, length, name_size, extra = _LOCAL.unpack(_at(file, header, _LOCAL.size))
    offset = header + _LOCAL.size + name_size + extra
    if magic != b"PK\x03\x04" or name_size != len(name) or _at(file, header + _LOCAL.size, name_size) != name:
        raise bad(f"member {shown} is not where the directory says")
    if method or flags & ~_UTF8 or (crc, packed, length) != (listed.crc, listed.size, listed.size):
        raise bad(f"member {shown} is described differently in two places")
    if offset + listed.size > limit:
        raise bad(f"member {shown} is truncated")
    return Place(offset, listed.size, listed.crc)


def _at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
