"""Frames that another program writes to our standard input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import BinaryIO

from edgeadapt.devices.sources import pictures
from edgeadapt.devices.sources.arrays import Reader, frames_shape
from edgeadapt.devices.sources.base import Frame, Source, Wanted
from edgeadapt.errors import InputError, SourceError

_LINE = 65536  # bytes; a longer line is no path


class Paths(Source):
    """Lines that name image files: a path, or JSON {"path": "...", "label": 3} with the label (a class's number or name) left out where unknown.

    Args:
        file: the lines, UTF-8.
        wanted: what the bundle takes.

    Raises:
        SourceError: no image files can be read for this model.
    """

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        pictures.check(wanted.input)
        self._file, self._wanted = file, wanted

    def __iter__(self) -> Iterator[Frame]:
        while line := self._file.readline(_LINE):
            if len(line) == _LINE and not line.endswith(b"\n"):
                raise SourceError(f"stdin has a line of more than {_LINE} bytes", "write one path a line, or use --stdin-format npy")
            text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
            if text.strip():
                yield self._frame(text)

    def _frame(self, text: str) -> Frame:
        path, truth = text, None
        if text.lstrip().startswith("{"):
            try:
                values = json.loads(text)
                path, truth = values["path"], self._wanted.label(values.get("label"))
            except (ValueError, KeyError, RecursionError):
                path = None  # type: ignore[assignment]
            if not isinstance(path, str):
                return Frame(text[:200], None, None, 'is neither a path nor JSON like {"path": "a.png"}')
        shown = path.encode("utf-8", "replace").decode()
        try:
            return Frame(shown, pictures.read(path, self._wanted.input.shape[0]), truth)
        except InputError as reason:
            return Frame(shown, None, truth, reason.message)


class Arrays(Source):
    """Arrays in numpy's .npy format, one after another, as numpy.save writes them: each one frame or N frames.

    Args:
        file: the bytes.
        wanted: what the bundle takes.
    """

    name = "stdin"

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self._file, self._wanted = file, wanted

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while first := self._file.read(1):
            reader = Reader(_Again(first, self._file), f"stdin (array {index})")  # type: ignore[arg-type]
            try:
                shape, _ = frames_shape(reader.shape, reader.dtype, self._wanted.input)
            except InputError as reason:
                left = reader.dtype.itemsize * math.prod(reader.shape)
                while left:
                    left -= len(reader.take(min(left, 2**20), "a frame that does not fit"))
                yield Frame(index, None, None, reason.message)
                index += 1
                continue
            for pixels in reader.rows(shape[1:], shape[0]):
                yield Frame(index, pixels)
                index += 1


class _Again:
    """A file whose first byte was taken to see whether there is one."""

    def __init__(self, first: bytes, file: BinaryIO) -> None:
        self._first, self._file = first, file

    def read(self, size: int) -> bytes:
        if self._first and size:
            data, self._first = self._first + (self._file.read(size - 1) if size > 1 else b""), b""
            return data
        return self._file.read(size)
