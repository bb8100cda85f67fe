"""Numbers in a line of text, read in pieces: whatever the line's length, it takes a few times that in memory, not thirty times.

Python's own lists of numbers take 32 bytes for each, which may be two characters of the line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL = 2**16
"""Bytes of a line of JSON that are simply parsed."""

_PIECE = 2**12  # bytes that become Python's numbers at a time
_LARGEST = float(np.finfo(np.float32).max)
_CSV = re.compile(rb"[-+0-9.eE,; \t]*")
_PARTED = re.compile(rb"\s*[,;]\s*|\s+")
_TOKEN = re.compile(rb"[^,;\s]")
_LIST = re.compile(rb"\[[-+0-9.eE,\s\[\]]*\]")
_KEYED = re.compile(rb'"x"\s*:\s*(?=\[)')
_MISPLACED = re.compile(rb"[^\[,]\[|\][^\],]")  # without blanks
_APART = re.compile(rb"[^\[\],\s]\s+[^\[\],\s]")
_BLANKS, _INSTEAD = b" \t\r\n", "\x00numbers\x00"


def separated(line: bytes) -> NDArray[np.float32] | None:
    """Those of a line of csv, float32 [N]; None where there is anything else, or a number that is not finite."""
    if not _CSV.fullmatch(line):
        return None
    return _joined(_floats(_PARTED.split(piece)) for piece in _pieces(line.rstrip(b",; \t")))


def parsed(line: bytes) -> tuple[NDArray[np.float32] | None, object]:
    """Those of a line of JSON, float32 in the shape of its lists, which are of equal lengths, and the label; None for anything else."""
    found = _at_once(line) if len(line) <= SMALL else None
    if found is not None:
        return found
    begin = _KEYED.search(line)
    place = 0 if line.startswith(b"[") else begin.end() if begin is not None else -1
    region = None if place < 0 else _LIST.match(line, place)
    if region is None or len(line) - len(region[0]) > SMALL or (place == 0 and len(region[0]) != len(line)):
        return None, None
    if place == 0:
        return _lists(region[0]), None
    try:
        rest = json.loads(line[: region.start()] + json.dumps(_INSTEAD).encode() + line[region.end() :])
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(rest, dict) or rest.get("x") != _INSTEAD:  # what looked like it is in a text, or in another mapping
        return None, None
    return _lists(region[0]), rest.get("label")


def _at_once(line: bytes) -> tuple[NDArray[np.float32] | None, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None, None
    return (_nested(found.get("x")), found.get("label")) if isinstance(found, dict) else (_nested(found), None)


def _nested(value: object) -> NDArray[np.float32] | None:
    level: list[Any] = [value]
    shape: list[int] = []
    while level and isinstance(level[0], list) and len(shape) < 4:
        size = len(level[0])
        if any(not isinstance(part, list) or len(part) != size for part in level):
            return None
        shape.append(size)
        level = [item for part in level for item in part]
    if not shape or any(type(item) not in (int, float) for item in level):
        return None
    found = _finite(level)
    return None if found is None else found.reshape(shape)


def _lists(text: bytes) -> NDArray[np.float32] | None:
    """Lists of numbers, of which text has no other characters."""
    compact = text.translate(None, _BLANKS)
    if _APART.search(text) or _MISPLACED.search(compact) or (shape := _shape(compact.translate(None, b"-+0123456789.eE"))) is None:
        return None
    compact = compact.translate(None, b"[]")
    found = _joined(_floats(_json(piece)) for piece in _pieces(compact))
    return None if found is None or found.size != math.prod(shape) else found.reshape(shape)


def _shape(brackets: bytes) -> tuple[int, ...] | None:
    """That of lists, by their brackets and commas; None where they are of unequal lengths."""
    depth = len(brackets) - len(brackets.lstrip(b"["))
    if not 1 <= depth <= 4:
        return None
    sizes = [brackets.find(b"]") - depth + 1]
    pattern = b"[" + b"," * (sizes[0] - 1) + b"]"
    for level in range(2, depth + 1):
        length = brackets.find(b"]" * level) + level - (depth - level)
        sizes.append((length - 1) // (len(pattern) + 1))
        if sizes[-1] < 1:
            return None
        pattern = b"[" + (pattern + b",") * (sizes[-1] - 1) + pattern + b"]"  # join would take 80 bytes a piece
        if len(pattern) > len(brackets):
            return None
    return tuple(reversed(sizes)) if pattern == brackets else None


def _json(piece: bytes) -> list[Any]:
    found: list[Any] = json.loads(b"[" + piece + b"]")
    return found


def _pieces(line: bytes) -> Iterator[bytes]:
    """The line, cut where two numbers are parted."""
    begin = 0
    while (token := _TOKEN.search(line, begin + _PIECE)) and (end := _PARTED.search(line, token.start())):
        yield line[begin : end.start()]
        begin = end.end()
    yield line[begin:]


def _joined(pieces: Iterator[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    found = []
    try:
        for piece in pieces:
            if piece is None:
                return None
            found.append(piece)
    except ValueError:
        return None
    return np.concatenate(found)


def _floats(texts: list[Any]) -> NDArray[np.float32] | None:
    return _finite([float(text) if isinstance(text, bytes) else text for text in texts])


def _finite(values: list[Any]) -> NDArray[np.float32] | None:
    try:
        found = np.array(values, np.float64)
    except OverflowError:  # a whole number beyond any float
        return None
    return found.astype(np.float32) if (np.abs(found) <= _LARGEST).all() else None
